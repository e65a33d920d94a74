"""Names of tensors: Mistral's own, Hugging Face's and GGUF's. All other modules use Mistral's own names."""

from __future__ import annotations

import re

# From Hugging Face's names within a layer to Mistral's own.
_IN_LAYER = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.gate": "feed_forward.gate",  # the router's name in files with fused experts
    "block_sparse_moe.gate": "feed_forward.gate",  # the published name; it stands last, so huggingface_name returns it
}
_AROUND_LAYERS = {"embed_tokens": "tok_embeddings", "norm": "norm"}
_ENDINGS = {"weight": "weight", "weight_scale_inv": "qscale_weight", "activation_scale": "qscale_act"}
_EXPERT = re.compile(r"block_sparse_moe\.experts\.(\d+)\.(w[123])")
# transformers 5 stores all experts of a layer in two tensors: gate_up_proj (E, 2F, D) holds the rows of w1 and then the
# rows of w3, down_proj (E, D, F) holds w2.
_FUSED = {
    "mlp.experts.gate_up_proj": "feed_forward.experts.w1_w3",
    "mlp.experts.down_proj": "feed_forward.experts.w2",
}
# mlx-lm keeps all experts of a layer in three modules.
_MLX_EXPERTS = {
    f"block_sparse_moe.switch_mlp.{theirs}_proj": f"feed_forward.experts.{own}"
    for theirs, own in {"gate": "w1", "down": "w2", "up": "w3"}.items()
}
# From GGUF's names to Mistral's own.
_GGUF_AROUND_LAYERS = {"token_embd": "tok_embeddings", "output_norm": "norm", "output": "output"}
_GGUF_EXPERTS = {"ffn_gate": "w1", "ffn_down": "w2", "ffn_up": "w3"}
_GGUF_IN_LAYER = {
    "attn_norm": "attention_norm",
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "ffn_norm": "ffn_norm",
    "ffn_gate_inp": "feed_forward.gate",
    **{name: f"feed_forward.{own}" for name, own in _GGUF_EXPERTS.items()},
    **{f"{name}_exps": f"feed_forward.experts.{own}" for name, own in _GGUF_EXPERTS.items()},
}
_GGUF_NAME = re.compile(r"(?:blk\.(0|[1-9]\d{0,5})\.)?([a-z_]+)(?:\.(0|[1-9]\d{0,5}))?\.weight")

_OWN_NAME = re.compile(r"(tok_embeddings|norm|output|layers\.\d+\.[\w.]+)\.(weight|qscale_weight|scales)|units")
_LAYER = re.compile(r"(layers\.\d+\.)?(.*)", re.DOTALL)
_TEXT_PREFIX = re.compile(r"(model\.language_model|language_model\.model|model)\.")
_OTHER_PARTS = re.compile(
    r"(model\.)?(vision_tower|multi_modal_projector|vision_encoder|vision_language_adapter|patch_merger"
    r"|pre_mm_projector_norm)\."
)
# Parts of names: tables of RoPE that the pass computes itself, and calibration data, which some converters saved.
_UNUSED_PARTS = {"rotary_emb", "rotary_pos_emb", "rope", "kv_fake_quantizer"}
_UNUSED_ENDS = {
    "inv_freq",
    "original_inv_freq",
    "cos_cached",
    "sin_cached",
    "freqs_cis",
    "qscale_act",
    "activation_scale",
}


def mistral_name(name: str) -> str | None:
    """Return Mistral's own name of a tensor of either layout; None if the name belongs to no known text model.

    >>> mistral_name("model.layers.3.self_attn.q_proj.weight")
    'layers.3.attention.wq.weight'
    >>> mistral_name("lm_head.weight")
    'output.weight'
    """
    if _OWN_NAME.fullmatch(name):
        return name
    if name in ("lm_head.weight", "language_model.lm_head.weight"):
        return "output.weight"
    prefix = _TEXT_PREFIX.match(name)
    if prefix is None:
        return None
    layer, rest = _LAYER.fullmatch(name[prefix.end() :]).groups("")  # type: ignore[union-attr]
    if rest in _FUSED:
        return f"{layer}{_FUSED[rest]}"
    stem, _, ending = rest.rpartition(".")
    if match := _EXPERT.fullmatch(stem):
        own = f"feed_forward.experts.{match[1]}.{match[2]}"
    else:
        own = (_IN_LAYER if layer else _AROUND_LAYERS).get(stem, "")
    return f"{layer}{own}.{_ENDINGS[ending]}" if own and ending in _ENDINGS else None


def experts_of_mlx(module: str) -> str | None:
    """Return the name of all experts of a layer that a module of mlx-lm holds, without a number; None for another one.

    >>> experts_of_mlx("model.layers.3.block_sparse_moe.switch_mlp.up_proj")
    'layers.3.feed_forward.experts.w3'
    """
    prefix = _TEXT_PREFIX.match(module)
    layer, rest = _LAYER.fullmatch(module[prefix.end() if prefix else 0 :]).groups("")  # type: ignore[union-attr]
    return f"{layer}{_MLX_EXPERTS[rest]}" if layer and rest in _MLX_EXPERTS else None


def huggingface_name(name: str) -> str:
    """Return Hugging Face's name of the tensor with Mistral's own name `name`.

    >>> huggingface_name("layers.3.attention.wq.weight")
    'model.layers.3.self_attn.q_proj.weight'
    """
    layer, rest = _LAYER.fullmatch(name).groups("")  # type: ignore[union-attr]
    if rest == "output.weight":
        return "lm_head.weight"
    theirs = {own: name for names in (_IN_LAYER, _AROUND_LAYERS, _ENDINGS, _FUSED) for name, own in names.items()}
    if rest in theirs:
        return f"model.{layer}{theirs[rest]}"
    stem, _, ending = rest.rpartition(".")
    stem = theirs.get(stem, stem.replace("feed_forward.experts", "block_sparse_moe.experts"))
    return f"model.{layer}{stem}.{theirs[ending]}"


def name_of_gguf(name: str) -> str | None:
    """Return Mistral's own name of a tensor of a GGUF file; None if the name belongs to no known text model.

    All experts of a layer lie in one tensor, whose name here has no number: layers.0.feed_forward.experts.w1.weight.
    Older files have a tensor for each expert.

    >>> name_of_gguf("blk.3.attn_q.weight"), name_of_gguf("blk.3.ffn_up.7.weight")
    ('layers.3.attention.wq.weight', 'layers.3.feed_forward.experts.7.w3.weight')
    """
    match = _GGUF_NAME.fullmatch(name)
    if match is None:
        return None
    layer, stem, expert = match.groups()
    own = (_GGUF_AROUND_LAYERS if layer is None else _GGUF_IN_LAYER).get(stem)
    if own is None or (expert and stem not in _GGUF_EXPERTS):
        return None
    if expert:
        own = own.replace("feed_forward", f"feed_forward.experts.{expert}")
    return f"{own}.weight" if layer is None else f"layers.{layer}.{own}.weight"


def gguf_name(name: str) -> str:
    """Return GGUF's name of the tensor with Mistral's own name `name`; of an expert, the tensor of all experts.

    >>> gguf_name("layers.3.attention.wq.weight"), gguf_name("layers.3.feed_forward.experts.7.w3.weight")
    ('blk.3.attn_q.weight', 'blk.3.ffn_up_exps.weight')
    """
    theirs = {own: stem for names in (_GGUF_IN_LAYER, _GGUF_AROUND_LAYERS) for stem, own in names.items()}
    layer, rest = _LAYER.fullmatch(re.sub(r"experts\.\d+", "experts", name)).groups("")  # type: ignore[union-attr]
    return f"{layer.replace('layers', 'blk')}{theirs[rest.removesuffix('.weight')]}.weight"


def other_component(name: str) -> str | None:
    """Return the part of a model that a tensor belongs to, like "vision_tower"; None if it is the text model."""
    match = _OTHER_PARTS.match(name)
    return match[2] if match else None


def is_unused(name: str) -> bool:
    """Return whether a tensor is a table or calibration data that the forward pass does not use.

    >>> is_unused("model.layers.3.self_attn.rotary_emb.cos_cached"), is_unused("layers.3.attention.wq.weight")
    (True, False)
    """
    parts = name.split(".")
    return parts[-1] in _UNUSED_ENDS or not _UNUSED_PARTS.isdisjoint(parts)
