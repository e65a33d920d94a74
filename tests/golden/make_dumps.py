"""Make the golden dumps: every step of two tiny families as transformers computes it.

    pip install torch==2.13.0 transformers==5.24.0
    PYTHONPATH=.:tests:docs python tests/golden/make_dumps.py

docs/dump_transformers.py does the work, so that the files prove what its readers are told to do: 12 tokens of
`dense_windowed`, whose window is 5, and of `ministral3`, which has YaRN and a query temperature.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import transformers
from dump_transformers import dump
from safetensors.torch import save_file
from support.checkpoints import ARCHITECTURES, FAMILIES, write_hf
from support.tiny import tokens_for

NAMES = ("dense_windowed", "ministral3")
N_TOKENS = 12


def main() -> None:
    torch.set_num_threads(1)
    for name in NAMES:
        family = FAMILIES[name]
        with tempfile.TemporaryDirectory() as directory:
            write_hf(Path(directory), family)
            model = getattr(transformers, ARCHITECTURES[family.model_type]).from_pretrained(
                directory, attn_implementation="eager", dtype=torch.float32
            )
        steps = dump(model.eval(), tokens_for(family.config, N_TOKENS))
        metadata = {"transformers": transformers.__version__, "torch": torch.__version__}
        save_file(steps, Path(__file__).parent / f"dump_{name}.safetensors", metadata=metadata)


if __name__ == "__main__":
    main()
