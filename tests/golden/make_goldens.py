"""Make the golden files: what transformers computes for the tiny families of tests/support/checkpoints.py.

    pip install torch==2.13.0 transformers==5.23.0
    PYTHONPATH=.:tests python tests/golden/make_goldens.py [--out DIRECTORY] [--family NAME]

For each family the Hugging Face layout is written to a temporary directory and read by transformers' own class, so that
its own conversions are part of what is kept: `tests/golden/<family>.safetensors` with

    tokens               (T,) int64
    logits               (T, V) float32, of one pass over all tokens, eager attention and experts, float32
    inv_freq             (K/2,) float32, YaRN families only, as are attention_scaling () and what multiplies cos and sin
    metadata             versions; max_attention_weight, the largest given to any key but the query's own

Before anything is kept, transformers must agree with itself: every weight of the directory used and none missing, one
pass the same as cached passes of several lengths, and experts in two tensors the same as experts one by one. Running
it twice gives the same bytes. The files beside this script were made with the versions in their metadata, in one thread
on x86-64; other versions and machines may differ in the last bits.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from support.checkpoints import ARCHITECTURES, FAMILIES, Family, write_hf, write_tensor_file

# Of the largest logit. Rounding in float32 gives about a tenth of it.
AGREEMENT = 1e-5


def load(family: Family, **layout: Any) -> transformers.PreTrainedModel:
    """Write the family in Hugging Face's layout and return transformers' model of it, float32 and eager."""
    with tempfile.TemporaryDirectory() as directory:
        write_hf(Path(directory), family, **layout)
        model, info = getattr(transformers, ARCHITECTURES[family.model_type]).from_pretrained(
            directory,
            attn_implementation="eager",
            experts_implementation="eager",
            dtype=torch.float32,
            output_loading_info=True,
        )
    problems = {kind: found for kind, found in info.items() if found}
    assert not problems, f"{family.name}: {problems}"
    return model.eval()


def cached_logits(model: transformers.PreTrainedModel, tokens: torch.Tensor, chunk: int) -> torch.Tensor:
    """Return the logits (T, V) of passes of `chunk` tokens over one cache."""
    cache, parts = None, []
    for part in tokens.split(chunk, dim=1):
        output = model(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits[0])
    return torch.cat(parts)


def make(family: Family, path: Path) -> None:
    """Write the golden file of one family and print what was measured on the way."""
    random = np.random.RandomState(1000 + family.seed)
    tokens = random.randint(0, family.config.vocab_size, family.n_tokens)
    batch = torch.from_numpy(tokens)[None]
    model = load(family)
    whole = model(batch, use_cache=False, output_attentions=True)
    logits, largest = whole.logits[0], whole.logits.abs().max()

    def off(other: torch.Tensor) -> float:
        return float((other - logits).abs().max() / largest)

    disagreement = {
        f"chunks of {chunk}": off(cached_logits(model, batch, chunk)) for chunk in (1, 3, 11, family.n_tokens)
    }
    disagreement["3 shards"] = off(load(family, shards=3)(batch, use_cache=False).logits[0])
    if family.config.moe is not None:
        disagreement["fused experts"] = off(load(family, fused_experts=True)(batch, use_cache=False).logits[0])
    for what, found in disagreement.items():
        assert found < AGREEMENT, f"{family.name}: transformers differs from itself by {found:.1e} with {what}"

    to_others = torch.stack(whole.attentions)[:, 0].tril(-1)  # layer, head, query, key
    peak = float(to_others.max())
    assert peak > 0.5, f"{family.name}: attention is flat, at most {peak:.2f}"
    stored = {"tokens": ("I64", tokens.astype(np.int64)), "logits": ("F32", logits.numpy())}
    if family.config.yarn is not None:
        rotary = model.model.rotary_emb
        stored["inv_freq"] = ("F32", rotary.inv_freq.numpy())
        stored["attention_scaling"] = ("F32", np.float32(rotary.attention_scaling))
    metadata = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "architecture": type(model).__name__,
        "max_attention_weight": f"{peak:.3f}",
    }
    write_tensor_file(path, stored, metadata)
    likeliest = logits.softmax(-1).max(-1).values
    print(
        f"{family.name:20} attention: largest {peak:.3f}, mean of rows' largest {float(to_others.amax(-1).mean()):.2f};"
        f" largest logit {float(largest):.1f}; likeliest token {float(likeliest.mean()):.2f} on average;"
        f" differs from itself by {max(disagreement.values()):.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, action="append", help="may be repeated; default: all of them")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="default: beside this script")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with torch.inference_mode():
        for name in arguments.family or FAMILIES:
            make(FAMILIES[name], arguments.out / f"{name}.safetensors")


if __name__ == "__main__":
    main()
