"""What published models say of themselves: facts that we wrote down, and the files that they make in both spellings."""

from __future__ import annotations

import json
from typing import Any

from support.paths import PUBLISHED_MODELS

Values = dict[str, Any]
ORIGINAL = "original_max_position_embeddings"
FULL, SLIDING = "full_attention", "sliding_attention"

PUBLISHED = json.loads(PUBLISHED_MODELS.read_text())
MODELS: dict[str, Values] = {
    name: dict(zip(PUBLISHED["columns"], row, strict=True)) | PUBLISHED["more"].get(name, {})
    for name, row in PUBLISHED["models"].items()
}
ALIKE = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "norm_eps", "rope_theta")
CONFIG_JSON_NAMES = {
    "model_type": "model_type",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "max_seq_len": "max_position_embeddings",
}


def params_json_of(model: Values) -> Values:
    """Return the params.json of a model."""
    values = {field: model[field] for field in (*ALIKE, "max_seq_len", "sliding_window") if model[field] is not None}
    values |= {"moe": model["moe"]} if "moe" in model else {}
    if rope := model.get("rope_scaling"):
        values["yarn"] = {"factor": rope["factor"], ORIGINAL: rope[ORIGINAL], "beta": 32, "alpha": 1}
        values["yarn"]["apply_scale"] = model["attention_factor"] != 1
        if "llama_4_scaling_beta" in rope:
            values["llama_4_scaling"] = {"beta": rope["llama_4_scaling_beta"], ORIGINAL: rope[ORIGINAL]}
    return values | ({"tied_embeddings": True} if model.get("tied") else {})


def config_json_of(model: Values, transformers: int) -> Values:
    """Return the file as transformers 4 or 5 writes it; 4 left head_dim out where it follows from the width."""
    window, rope = model["sliding_window"], model.get("rope_scaling")
    text = {theirs: model[ours] for ours, theirs in CONFIG_JSON_NAMES.items()}
    text |= {"hidden_act": "silu", "tie_word_embeddings": model.get("tied", False), "sliding_window": window}
    if isinstance(window, list):
        kinds = [FULL if size is None else SLIDING for size in window]
        text |= {"layer_types": kinds * (model["n_layers"] // len(kinds)), "sliding_window": window[-1]}
    if "moe" in model:
        text |= {"num_local_experts": 8, "num_experts_per_tok": 2}
    if transformers == 4:
        text |= {"rope_theta": model["rope_theta"], "rope_scaling": rope and rope | {"type": "yarn"}}
        if model["dim"] == model["n_heads"] * model["head_dim"] and model["model_type"] != "ministral3":
            del text["head_dim"]
    else:
        rope_type = "yarn" if rope else "default"
        text["rope_parameters"] = (rope or {}) | {"rope_theta": model["rope_theta"], "rope_type": rope_type}
    wrapper = {"model_type": "mistral3", "text_config": text, "tie_word_embeddings": model.get("tied", False)}
    return wrapper if model.get("wrapped") else text
