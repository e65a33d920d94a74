"""Make the golden logits of the conformance kit: what transformers computes of each text of each model.

    pip install torch==2.13.0 transformers==5.24.0 accelerate
    PYTHONPATH=.:kernels:tests python tests/golden/make_conform_golden.py [--out DIRECTORY]

conform.safetensors holds MODEL.TEXT, the logits (T, V) of the last pass: float32, eager attention, over a cache where
the text has a first pass. accelerate is needed for fp8.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from support.checkpoints import Stored, write_tensor_file

from mistral_ref.study.conform.cases import CASES, Case
from mistral_ref.study.conform.layouts import write_huggingface


def logits_of(case: Case) -> dict[str, np.ndarray]:
    """Return the logits of each text of a model."""
    with tempfile.TemporaryDirectory() as directory:
        write_huggingface(case, Path(directory))
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
        )
    logits = {}
    for text in case.texts():
        tokens, cache = torch.tensor([text.tokens]), None
        if text.n_first:
            cache = model(tokens[:, : text.n_first], use_cache=True).past_key_values
        logits[text.name] = model(tokens[:, text.n_first :], past_key_values=cache, use_cache=True).logits[0].numpy()
    return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="default: beside this script")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    stored: Stored = {}
    with torch.inference_mode():
        for case in CASES:
            for text, logits in logits_of(case).items():
                stored[f"{case.name}.{text}"] = "F32", logits
    metadata = {"transformers": transformers.__version__, "torch": torch.__version__}
    write_tensor_file(arguments.out / "conform.safetensors", stored, metadata)


if __name__ == "__main__":
    main()
