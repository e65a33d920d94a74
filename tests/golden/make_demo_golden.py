"""Make demo_model.safetensors: what transformers computes with the demonstration model's own weights.

    pip install torch==2.13.0 transformers==5.23.0
    PYTHONPATH=.:tests:tests/golden python tests/golden/make_demo_golden.py

The weights in the package are written in Hugging Face's layout and read by transformers' MistralForCausalLM, float32
and eager. The text is one that the model writes itself, several stories long, so that every window is left far behind.
Kept:

    tokens      (T,) int64
    positions   (P,) int64, some of 0 to T - 1
    logits      (P, V) float32 at those positions
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers
from make_goldens import load
from support.checkpoints import Family, write_tensor_file

import mistral_ref
from mistral_ref.files.checkpoint import open_checkpoint
from mistral_ref.loading import DEMO_MODEL
from mistral_ref.sampling import SamplingSettings, sample
from mistral_ref.weights import Matrix

N_TOKENS = 1500


def write_text(model: mistral_ref.Model) -> list[int]:
    """Return tokens that the model draws at temperature 0.8, story after story in one sequence."""
    rng, settings = np.random.default_rng(1), SamplingSettings(temperature=0.8)
    bos, eos = model.tokenizer.bos_id, model.tokenizer.eos_id
    cache, ids = model.new_cache(), [bos]
    while len(ids) < N_TOKENS:
        logits_1V = model.forward(ids[cache.length :], cache, last_only=True)
        ids.append(sample(logits_1V[0], settings, rng, ids))
        ids += [bos] * (ids[-1] == eos)
    return ids[:N_TOKENS]


def main() -> None:
    torch.set_num_threads(1)
    model = mistral_ref.load()
    weights = {}
    for name, tensor in open_checkpoint(DEMO_MODEL).tensors.items():
        kind, data = tensor.mapped()
        rows = data.reshape(-1, data.shape[-1])
        weights[name] = Matrix(name, kind, rows).rows(slice(None), np.float32).reshape(data.shape)
    family = Family(
        name="demo_model",
        model_type="mistral",
        seed=0,
        n_tokens=N_TOKENS,
        config=model.config.replace(max_seq_len=N_TOKENS),
    )
    theirs = load(family, weights=weights)
    tokens = write_text(model)
    with torch.no_grad():
        logits = theirs(torch.tensor([tokens])).logits[0].numpy()
    window = model.config.sliding_window[0]
    positions = [0, 1, window - 1, window, window + 1, 2 * window, 10 * window * model.config.n_layers % N_TOKENS]
    positions += list(range(N_TOKENS - 5, N_TOKENS))
    kept = {
        "tokens": ("I64", np.array(tokens)),
        "positions": ("I64", np.array(positions)),
        "logits": ("F32", np.ascontiguousarray(logits[positions])),
    }
    metadata = {"torch": torch.__version__, "transformers": transformers.__version__}
    write_tensor_file(Path(__file__).with_name("demo_model.safetensors"), kept, metadata)


if __name__ == "__main__":
    main()
