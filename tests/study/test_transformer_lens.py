"""Our steps and sweeps against TransformerLens's (pip install transformer-lens==4.3.0), by the tables of the docs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from support.checkpoints import FAMILIES, draw_weights, write_hf
from support.paths import ROOT
from support.tiny import tokens_for

import mistral_ref
from mistral_ref.model import Model
from mistral_ref.study import patching

pytestmark = pytest.mark.soak

LLAMA = FAMILIES["llama"]
FAMILY = dataclasses.replace(
    LLAMA, config=LLAMA.config.replace(n_layers=3, n_heads=6, n_kv_heads=2, sliding_window=(None,) * 3)
)
TOKENS, OTHER = tokens_for(FAMILY.config, 9), tokens_for(FAMILY.config, 9, seed=1)
TO = (3, 5)
# transformers computes norms and angles in float32, whatever the dtype
CLOSE = {"rtol": 0, "atol": 2e-5}


class Pair(NamedTuple):
    """The same model in both libraries."""

    ours: Model
    theirs: Any


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Return one random model, in float64, as both libraries load it."""
    pytest.importorskip("transformer_lens", reason="transformer-lens is not installed")
    import tokenizers  # noqa: PLC0415
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415
    from transformer_lens import TransformerBridge  # noqa: PLC0415

    folder, beside = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("tokenizer")
    write_hf(folder, FAMILY, draw_weights(FAMILY))
    words = tokenizers.models.WordLevel({f"w{n}": n for n in range(FAMILY.config.vocab_size)}, unk_token="w0")
    names = {"unk_token": "w0", "bos_token": "w1", "eos_token": "w2", "pad_token": "w2"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words), **names).save_pretrained(beside)
    theirs = TransformerBridge.boot_transformers(
        str(folder),
        hf_model=transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="eager"
        ),
        tokenizer=transformers.AutoTokenizer.from_pretrained(beside),
        dtype=torch.float64,
        device="cpu",
    )
    return Pair(mistral_ref.load(folder, dtype="float64"), theirs)


def batch(tokens: list[int]) -> Any:
    """Return tokens as TransformerLens takes them."""
    import torch  # noqa: PLC0415

    return torch.tensor([tokens])


def table(heading: str) -> list[list[str]]:
    """Return the cells of the table under a heading of the page, without backticks."""
    page = (ROOT / "docs" / "transformer-lens.md").read_text(encoding="utf-8")
    part = page.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("|")]
    return [[cell.replace("`", "") for cell in row] for row in rows[2:]]


def as_theirs(name: str, value: np.ndarray) -> np.ndarray:
    """Return a step's value as TransformerLens has it: the first numbers of all RoPE pairs before the second ones."""
    if name.rpartition(".")[2] not in ("q", "k", "q_rotated", "k_rotated"):
        return value
    return value.reshape(*value.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(value.shape)


def test_each_hook_of_the_table_has_the_value_of_its_step(pair: Pair) -> None:
    _, cache = pair.theirs.run_with_cache(batch(TOKENS))
    trace, seen = pair.ours.trace(TOKENS), set()
    for hook, step in table("Names"):
        for layer in map(str, range(FAMILY.config.n_layers)):
            name = step.replace("N", layer)
            found = cache[hook.replace("N", layer)][0].numpy()
            expected = as_theirs(name, trace[name])
            is_visible = np.isfinite(expected)
            np.testing.assert_allclose(found[is_visible], expected[is_visible], **CLOSE)
            assert (found[~is_visible] < -1e30).all()
            seen.add(name)
    assert seen == set(trace)
    for layer in (1, 2):
        found = cache[f"blocks.{layer}.hook_resid_pre"][0].numpy()
        np.testing.assert_allclose(found, trace[f"layers.{layer - 1}.residual_after_ffn"], **CLOSE)


def their_sweep(pair: Pair, name: str) -> np.ndarray:
    from transformer_lens import patching as theirs  # noqa: PLC0415

    _, clean = pair.theirs.run_with_cache(batch(OTHER))
    metric: Callable[[Any], Any] = lambda logits: logits[0, -1, TO[0]] - logits[0, -1, TO[1]]  # noqa: E731
    return getattr(theirs, name)(pair.theirs, batch(TOKENS), clean, metric).detach().numpy()


def test_each_sweep_of_the_table_gives_the_same_numbers(pair: Pair) -> None:
    n_sweeps = 0
    for there, here in table("What one does"):
        if call := re.fullmatch(r"patching\.patch\(\.\.\., (.*)\)", here):
            name = there.removeprefix("patching.").partition(",")[0]
            expected = their_sweep(pair, name)  # by position: (layer, position, head), for the heads
            for position in range(len(TOKENS)) if "by_pos" in name else [0]:
                how: dict[str, Any] = eval(f"dict({call[1]})", {"position": position})
                found = patching.patch(pair.ours, TOKENS, OTHER, metric=TO, **how).values_RC
                found = found[:-1] if name.endswith("resid_pre") else found
                np.testing.assert_allclose(found, expected[:, position] if "by_pos" in name else expected, **CLOSE)
            n_sweeps += 1
    assert n_sweeps == 6


def test_hooks_and_edits_change_the_same(pair: Pair) -> None:
    def hook(value: Any, hook: Any) -> Any:
        value[:, :, 2] = 0
        return value

    def edit(value: np.ndarray) -> np.ndarray:
        value = value.copy()
        value[:, 2] = 0
        return value

    for hook_name, step in (("blocks.1.attn.hook_z", "layers.1.heads"), ("blocks.1.attn.hook_q", "layers.1.q")):
        found = pair.theirs.run_with_hooks(batch(TOKENS), fwd_hooks=[(hook_name, hook)])[0].detach().numpy()
        np.testing.assert_allclose(found, pair.ours.forward(TOKENS, edits={step: edit}), **CLOSE)
