"""Make the golden adapters: what PEFT writes for tiny models, and the logits that it computes with them.

    pip install torch==2.13.0 transformers==5.24.0 peft==0.21.2
    PYTHONPATH=.:tests python tests/golden/make_peft_goldens.py [--out DIRECTORY]

Each adapter is a folder peft_NAME, as PEFT saves it, with random A and B. Beside it is peft_NAME.safetensors:

    tokens      (T,) int64
    logits      (T, V) float32, of the model with the adapter, in float32 with eager attention
    without     (T, V) float32, of the model without it
    metadata    the versions, and the family of tests/support/checkpoints.py

Before anything is kept, PEFT must agree with itself: the model with merged weights gives the same logits.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from support.checkpoints import ARCHITECTURES, FAMILIES, write_hf, write_tensor_file

_EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# For each adapter the family of its model, and PEFT's settings.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("dense_windowed", {"r": 4, "lora_alpha": 6, "target_modules": _EVERY}),
    "patterns": (
        "nemo",
        {
            "r": 3,
            "lora_alpha": 5,
            "use_rslora": True,
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            "layers_to_transform": [0, 2],
            "rank_pattern": {"k_proj": 2, "layers.2.self_attn.q_proj": 5},
            "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 9, "down_proj": 2},
        },
    ),
    "experts": ("mixtral", {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
}  # fmt: skip
AGREEMENT = 1e-5  # of the largest logit


def make(name: str, out: Path) -> None:
    """Write one adapter and its logits."""
    family_name, fields = CASES[name]
    family = FAMILIES[family_name]
    with tempfile.TemporaryDirectory() as directory:
        write_hf(Path(directory), family)
        base = getattr(transformers, ARCHITECTURES[family.model_type]).from_pretrained(
            directory, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
        )
    base.name_or_path = base.config._name_or_path = ""
    tokens = np.random.RandomState(2000 + family.seed).randint(0, family.config.vocab_size, 24)
    batch = torch.from_numpy(tokens)[None]
    without = base.eval()(batch, use_cache=False).logits[0]
    torch.manual_seed(family.seed)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **fields)).eval()
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            parameter.data = torch.randn(parameter.shape) * 0.3
    logits = model(batch, use_cache=False).logits[0]
    folder = out / f"peft_{name}"
    model.save_pretrained(folder)
    for other in folder.iterdir():
        if other.name not in ("adapter_config.json", "adapter_model.safetensors"):
            other.unlink()
    off = (model.merge_and_unload()(batch, use_cache=False).logits[0] - logits).abs().max() / logits.abs().max()
    moved = (without - logits).abs().max() / logits.abs().max()
    assert off < AGREEMENT, off
    print(f"{name}: merged weights are off by {float(off):.1e}, and the adapter moves the logits by {float(moved):.2f}")
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    arrays = {"logits": logits, "without": without}
    write_tensor_file(
        out / f"peft_{name}.safetensors",
        {"tokens": ("I64", tokens.astype("<i8"))}
        | {key: ("F32", value.detach().numpy().astype("<f4")) for key, value in arrays.items()},
        {"family": family_name, **versions},
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        for name in CASES:
            make(name, arguments.out)


if __name__ == "__main__":
    main()
