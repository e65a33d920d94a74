"""Write what transformers computes on its way to the logits as a trace, to compare another engine's steps with.

    pip install torch transformers
    python docs/dump_transformers.py DIR OUT.safetensors 1 415 6137 28725
    mistral-ref compare OUT.safetensors DIR --rope-row-order halves

DIR holds a model in Hugging Face's layout, Mistral's block without experts; the numbers are token ids. Everything is
float32. Steps that transformers never has in hand (scores before the softmax) are left out. An engine of your own would
be dumped in the same way: its values under the names of the steps, in one safetensors file. NumPy arrays have to go
through np.ascontiguousarray first, as tensors go through contiguous() here: save_file writes others out of order.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

# The module of a layer whose input or output a step is, with the axes that transformers folds into one.
_OUTPUTS = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "attention_out",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "ffn_out",
}
_INPUTS = {"post_attention_layernorm": "residual_after_attention", "mlp.down_proj": "ffn_hidden"}


def dump(model: transformers.PreTrainedModel, tokens: list[int]) -> dict[str, torch.Tensor]:
    """Return the values of one pass by the names of their steps; `model` has to use eager attention."""
    steps: dict[str, torch.Tensor] = {}
    head_dim = model.config.head_dim or model.config.hidden_size // model.config.num_attention_heads

    def keep(name: str, value: torch.Tensor) -> None:
        value = value[0].float()
        is_folded = name.rpartition(".")[2] in ("q", "k", "v")
        steps[name] = (value.reshape(len(value), -1, head_dim) if is_folded else value).contiguous().clone()

    def output_of(module: torch.nn.Module, name: str) -> None:
        module.register_forward_hook(
            lambda module, args, output: keep(name, output[0] if isinstance(output, tuple) else output)
        )

    def input_of(module: torch.nn.Module, name: str) -> None:
        module.register_forward_pre_hook(lambda module, args: keep(name, args[0]))

    output_of(model.model.embed_tokens, "embedding")
    output_of(model.model.norm, "norm")
    output_of(model.lm_head, "logits")
    for index, layer in enumerate(model.model.layers):
        for path, name in _OUTPUTS.items():
            output_of(layer.get_submodule(path), f"layers.{index}.{name}")
        for path, name in _INPUTS.items():
            input_of(layer.get_submodule(path), f"layers.{index}.{name}")
        output_of(layer, f"layers.{index}.residual_after_ffn")

    code = sys.modules[type(model).__module__]
    attend = code.eager_attention_forward

    def observed(module: torch.nn.Module, q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        layer = f"layers.{module.layer_idx}"
        keep(f"{layer}.q_rotated", q.transpose(1, 2))
        keep(f"{layer}.k_rotated", k.transpose(1, 2))
        heads, weights = attend(module, q, k, *args, **kwargs)
        keep(f"{layer}.attention_weights", weights)
        keep(f"{layer}.heads", heads)
        return heads, weights

    code.eager_attention_forward = observed
    try:
        with torch.inference_mode():
            model(torch.tensor([tokens]), use_cache=False)
    finally:
        code.eager_attention_forward = attend
    return steps | {"tokens": torch.tensor(tokens)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("tokens", metavar="ID", type=int, nargs="+")
    arguments = parser.parse_args()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.directory, attn_implementation="eager", dtype=torch.float32
    )
    steps = dump(model.eval(), arguments.tokens)
    save_file(steps, arguments.out)
    print(f"{arguments.out}: {len(steps) - 1} steps of {len(arguments.tokens)} tokens")


if __name__ == "__main__":
    main()
