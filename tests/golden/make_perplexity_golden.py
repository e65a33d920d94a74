"""Make the golden files of perplexity: what transformers computes for two tiny families, in both ways.

    pip install torch==2.13.0 transformers==5.24.0
    PYTHONPATH=.:tests:tests/golden python tests/golden/make_perplexity_golden.py [--out DIRECTORY]

For each family `tests/golden/perplexity_<family>.safetensors` with

    tokens                                  (300,) int64, random
    strided_positions, halves_positions     (N,) int64, which of the tokens are scored, in the order of the text
    strided_logprobs, halves_logprobs       (N,) float64, of these tokens: float32 logits, log-softmax in float64
    strided_mean, halves_mean               (2,) float64, of -logprobs: mean and standard error
    recipe_nll                              () float64, what the recipe itself ends with: its weights differ a little

`strided` follows the loop printed in transformers' documentation ("Perplexity of fixed-length models"), with windows of
64 tokens, 24 apart; which tokens it scores is read off its labels, and transformers' own loss of each window must be
the mean of what is kept. `halves` follows the loop of llama.cpp's tools/perplexity/perplexity.cpp, with n_ctx 64 and
BOS 1, down to how it computes its standard error.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import transformers
from make_goldens import load
from support.checkpoints import FAMILIES, write_tensor_file
from support.tiny import tokens_for

NAMES = ("dense_windowed", "mixtral")
N_TOKENS, CONTEXT, STRIDE, BOS = 300, 64, 24, 1


def logprobs_of_next(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the log-probability (T-1,) of each token after the first."""
    return logits[:-1].double().log_softmax(-1).gather(1, tokens[1:, None])[:, 0]


def strided(model: transformers.PreTrainedModel, tokens: torch.Tensor) -> tuple[list[int], list[float], float]:
    """Return the positions that the recipe scores, their log-probabilities, and its own mean."""
    positions, logprobs, nll_sum, n_tokens, previous_end = [], [], 0.0, 0, 0
    for begin in range(0, len(tokens), STRIDE):
        end = min(begin + CONTEXT, len(tokens))
        n_targets = end - previous_end
        inputs = tokens[begin:end]
        labels = inputs.clone()
        labels[:-n_targets] = -100
        output = model(inputs[None], labels=labels[None], use_cache=False)
        is_scored = labels[1:] != -100  # transformers shifts them
        kept = logprobs_of_next(output.logits[0], inputs)[is_scored]
        assert math.isclose(float(output.loss), -float(kept.mean()), rel_tol=1e-5)
        positions += (begin + 1 + is_scored.nonzero()[:, 0]).tolist()
        logprobs += kept.tolist()
        n_loss_tokens = int((labels != -100).sum()) - 1
        nll_sum += float(output.loss) * n_loss_tokens
        n_tokens += n_loss_tokens
        previous_end = end
        if end == len(tokens):
            break
    return positions, logprobs, nll_sum / n_tokens


def halves(model: transformers.PreTrainedModel, tokens: torch.Tensor) -> tuple[list[int], list[float]]:
    """Return the positions that llama-perplexity scores and their log-probabilities."""
    positions, logprobs, first = [], [], CONTEXT // 2
    for chunk in range(len(tokens) // CONTEXT):
        start = chunk * CONTEXT
        inputs = tokens[start : start + CONTEXT].clone()
        inputs[0] = BOS
        next_logprobs = logprobs_of_next(model(inputs[None], use_cache=False).logits[0], inputs)
        for i in range(CONTEXT - 1 - first):  # the logits of token first + i, and the token after it
            positions.append(start + first + i + 1)
            logprobs.append(float(next_logprobs[first + i]))
    return positions, logprobs


def mean_and_error(logprobs: list[float]) -> np.ndarray:
    """Return nll and its error as llama-perplexity computes them: from the sums of v and v², v = -log p."""
    nll, nll2, count = 0.0, 0.0, len(logprobs)
    for logprob in logprobs:
        nll -= logprob
        nll2 += logprob * logprob
    nll, nll2 = nll / count, nll2 / count
    return np.array([nll, math.sqrt((nll2 - nll * nll) / (count - 1))])


def make(name: str, path: Path) -> None:
    """Write the golden file of one family."""
    family = FAMILIES[name]
    tokens = tokens_for(family.config, N_TOKENS, seed=2000 + family.seed)
    model, ids = load(family), torch.tensor(tokens)
    strided_positions, strided_logprobs, recipe_nll = strided(model, ids)
    halves_positions, halves_logprobs = halves(model, ids)
    stored = {
        "tokens": ("I64", np.array(tokens)),
        "strided_positions": ("I64", np.array(strided_positions)),
        "strided_logprobs": ("F64", np.array(strided_logprobs)),
        "strided_mean": ("F64", mean_and_error(strided_logprobs)),
        "recipe_nll": ("F64", np.float64(recipe_nll)),
        "halves_positions": ("I64", np.array(halves_positions)),
        "halves_logprobs": ("F64", np.array(halves_logprobs)),
        "halves_mean": ("F64", mean_and_error(halves_logprobs)),
    }
    write_tensor_file(path, stored, {"transformers": transformers.__version__, "torch": torch.__version__})
    print(f"{name}: strided {stored['strided_mean'][1]}, by the recipe {recipe_nll}; halves {stored['halves_mean'][1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="default: beside this script")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with torch.inference_mode():
        for name in NAMES:
            make(name, arguments.out / f"perplexity_{name}.safetensors")


if __name__ == "__main__":
    main()
