"""What a trace tells: the lens against NumPy, contributions that add up, attention with its tokens, hostile pieces."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer
from support.adapters import adapted
from support.checkpoints import FAMILIES, write_consolidated, write_hf
from support.errors import refused
from support.pages import Page
from support.tiny import BACKENDS, configs, model_of, ops_of, tokens_for

import mistral_ref
from mistral_ref import InputError, Model, Trace
from mistral_ref.compare import difference
from mistral_ref.config import ModelConfig
from mistral_ref.steps import CATALOGUE, Step, step_names
from mistral_ref.study import lens
from mistral_ref.text import load_tokenizer
from mistral_ref.trace import MissingStepError

DENSE = FAMILIES["dense_windowed"].config  # a window of 5
NEMO = FAMILIES["nemo"].config  # H * K is not D
STREAM = ["embedding", "layers.*.residual_after_*"]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


# --------------------------------------------------------------------------------------------------------- logit lens


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15)
@given(config=configs(), n_tokens=st.integers(1, 9), data=st.data())
def test_the_last_row_of_the_lens_is_what_the_model_says(
    backend: str, config: ModelConfig, n_tokens: int, data: st.DataObject
) -> None:
    top = data.draw(st.integers(1, config.vocab_size))
    model, tokens = model_of(config, backend=backend), tokens_for(config, n_tokens)
    trace = model.trace(tokens)
    seen = lens.logit_lens(model, trace, top=top)
    logprobs_TV = log_softmax(trace["logits"])
    assert seen.names == ["embedding", *(name for name in step_names(config) if "residual" in name)]
    assert seen.ids_RTN.shape == seen.logprobs_RTN.shape == (1 + 2 * config.n_layers, n_tokens, top)
    assert seen.final_RT.shape == (1 + 2 * config.n_layers, n_tokens)
    expected = np.take_along_axis(logprobs_TV, seen.ids_RTN[-1], axis=-1)
    np.testing.assert_allclose(seen.logprobs_RTN[-1], expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(expected, -np.sort(-logprobs_TV)[:, :top], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(seen.final_RT[-1], seen.logprobs_RTN[-1, :, 0])
    assert sorted(seen.pieces) == np.unique(seen.ids_RTN).tolist()
    assert seen.labels == [f"[{token}]" for token in tokens]


@settings(max_examples=15)
@given(config=configs(), n_tokens=st.integers(1, 9))
def test_each_row_of_the_lens_is_norm_and_output_of_its_residual(config: ModelConfig, n_tokens: int) -> None:
    """With the row's own RMS."""
    model, tokens = model_of(config, dtype="float64"), tokens_for(config, n_tokens)
    trace = model.trace(tokens, keep=STREAM)
    seen = lens.logit_lens(model, trace, top=config.vocab_size)
    final_T1 = seen.ids_RTN[-1, :, :1]
    for row, (name, x_TD) in enumerate(trace.items()):
        assert seen.names[row] == name
        rms_T1 = np.array([[np.sqrt(sum(x * x for x in x_D) / config.dim + config.norm_eps)] for x_D in x_TD])
        logprobs_TV = log_softmax(x_TD / rms_T1 * model.weights.norm @ model.weights.output.data.T.astype(float))
        np.testing.assert_allclose(
            seen.logprobs_RTN[row], np.take_along_axis(logprobs_TV, seen.ids_RTN[row], -1), atol=1e-9
        )
        assert (np.diff(seen.logprobs_RTN[row]) <= 0).all()
        np.testing.assert_allclose(seen.final_RT[row], np.take_along_axis(logprobs_TV, final_T1, -1)[:, 0], atol=1e-9)


def test_the_lens_takes_what_residuals_there_are() -> None:
    model = model_of(DENSE)
    trace = model.trace([1, 2], keep=["layers.1.*", "embedding"])
    seen = lens.logit_lens(model, trace, top=3)
    assert seen.names == ["embedding", "layers.1.residual_after_attention", "layers.1.residual_after_ffn"]
    np.testing.assert_array_equal(seen.final_RT[-1], seen.logprobs_RTN[-1, :, 0])
    with refused(InputError, "trace", "residual", "keep=['embedding', 'layers.*.residual_after_*']"):
        lens.logit_lens(model, model.trace([1], keep="logits"))


def test_the_table_of_the_lens() -> None:
    model = model_of(DENSE)
    seen = lens.logit_lens(model, model.trace([1, 2], keep=STREAM), top=2)
    for token in (0, 1, -1):
        for row, (name, first, second) in enumerate(seen.rows(token)):
            assert name == seen.names[row]
            for n, text in enumerate((first, second)):
                piece = model.piece(int(seen.ids_RTN[row, token, n]))
                assert text == f"{piece} {np.exp(seen.logprobs_RTN[row, token, n]):.2f}"
    lines = str(seen).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0] == ["after [2]", "choice 1", "choice 2"]
    assert cells[2:] == seen.rows()
    (table,) = Page(seen._repr_html_()).tables
    assert table == [["after [2]", "choice 1", "choice 2"], *seen.rows()]


# ------------------------------------------------------------------------------------------ contributions, attribution


def total(model: Model, trace: Trace) -> np.ndarray:
    return sum(x_TD.astype(np.float64) for _, x_TD in lens.contributions(model, trace))


def sum_of(found: lens.Attribution) -> float:
    return found.embedding + found.heads_LH.sum() + found.ffn_L.sum()


@settings(max_examples=25)
@given(config=configs(), n_tokens=st.integers(1, 9), data=st.data())
def test_contributions_add_up_to_the_last_residual(config: ModelConfig, n_tokens: int, data: st.DataObject) -> None:
    """And attributions to the logit: grouped heads, H * K unlike D, either row order, experts, tied ends, adapters."""
    model, tokens = model_of(config, dtype="float64"), tokens_for(config, n_tokens)
    model = adapted(model) if data.draw(st.booleans()) else model
    trace = model.trace(tokens, keep=["embedding", "layers.*.heads", "layers.*.ffn_out", "*.residual_*", "logits"])
    last_TD = trace[f"layers.{config.n_layers - 1}.residual_after_ffn"]
    np.testing.assert_allclose(total(model, trace), last_TD, rtol=0, atol=1e-12 * np.abs(last_TD).max())
    names = [name for name, _ in lens.contributions(model, trace)]
    assert names[0] == "embedding"
    assert names[1 : 1 + config.n_heads] == [f"layers.0.heads.{head}" for head in range(config.n_heads)]
    assert len(set(names)) == len(names) == 1 + config.n_layers * (config.n_heads + 1)
    token = data.draw(st.integers(0, config.vocab_size - 1))
    index = data.draw(st.integers(-n_tokens, n_tokens - 1))
    found = lens.attribution(model, trace, token=token, index=index)
    size = np.abs(trace["logits"]).max()
    np.testing.assert_allclose(found.logit, trace["logits"][index, token], rtol=0, atol=1e-9 * size)
    np.testing.assert_allclose(sum_of(found), found.logit, rtol=0, atol=1e-9 * size)
    assert (found.token, found.piece, found.label) == (token, f"[{token}]", f"[{tokens[index]}]")
    assert found.heads_LH.shape == (config.n_layers, config.n_heads)


def test_each_contribution_is_what_its_part_adds() -> None:
    """A head's is the difference that the pass's `attention_out` makes when the head is silenced."""
    model, tokens = model_of(NEMO, dtype="float64"), [1, 2, 3]
    trace = model.trace(tokens)
    parts = dict(lens.contributions(model, trace))
    norm_V, output_VD = model.weights.norm.astype(float), model.weights.output.data.astype(float)
    last_D = trace["layers.2.residual_after_ffn"][1]
    found = lens.attribution(model, trace, token=7, index=1)
    for layer, head in [(0, 0), (1, 3), (2, 2)]:

        def silent(heads_THK: np.ndarray, head: int = head) -> np.ndarray:
            changed = heads_THK.copy()
            changed[:, head] = 0
            return changed

        without = model.trace(tokens, edits={f"layers.{layer}.heads": silent})[f"layers.{layer}.attention_out"]
        added_TD = trace[f"layers.{layer}.attention_out"] - without
        np.testing.assert_allclose(parts[f"layers.{layer}.heads.{head}"], added_TD, atol=1e-12)
        logit = added_TD[1] * norm_V @ output_VD[7] / np.sqrt(np.mean(last_D**2) + NEMO.norm_eps)
        np.testing.assert_allclose(found.heads_LH[layer, head], logit, atol=1e-12)
    np.testing.assert_array_equal(parts["layers.1.ffn_out"], trace["layers.1.ffn_out"])
    for tokens_ in ([1], slice(0, 2), [2, 0, 0]):
        for name, x_TD in lens.contributions(model, trace, tokens=tokens_):
            np.testing.assert_allclose(x_TD, parts[name][tokens_], rtol=1e-12, atol=1e-14)


def test_heads_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(NEMO, dtype="float64")
    trace = model.trace([1, 2, 3])
    expected = total(model, trace)
    for elements in (1, 64 * 7, 64 * 40):
        monkeypatch.setattr(lens, "_BLOCK_ELEMENTS", elements)
        np.testing.assert_allclose(total(model, trace), expected, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["dense_windowed", "nemo", "tied_multi_query", "mixtral", "ministral3", "llama"])
def test_in_float32_they_add_up_to_ulps(name: str, backend: str) -> None:
    config = FAMILIES[name].config
    for order in ("interleaved", "halves"):
        model = model_of(config.replace(rope_row_order=order), backend=backend)
        trace = model.trace(tokens_for(config, 9))
        last = f"layers.{config.n_layers - 1}.residual_after_ffn"
        assert difference(last, total(model, trace), trace[last], 1).ulps < 20
        found = lens.attribution(model, trace)
        assert found.token == trace["logits"][-1].argmax()
        size = np.spacing(np.abs(trace["logits"]).max())
        assert abs(sum_of(found) - found.logit) < 30 * size
        assert abs(found.logit - trace["logits"][-1, found.token]) < 30 * size


@pytest.mark.parametrize("layout", ["fp8", "hf"])
def test_weights_however_they_lie(layout: str, tmp_path: Path) -> None:
    """With scales, in halves; a matrix is widened before it is used."""
    family = FAMILIES["bfloat16"]
    if layout == "hf":
        write_hf(tmp_path, family)
    else:
        write_consolidated(tmp_path, family, fp8=True)
    model = mistral_ref.load(tmp_path, backend="numpy", dtype="float64")
    trace = model.trace(tokens_for(family.config, 5))
    last_TD = trace[f"layers.{family.config.n_layers - 1}.residual_after_ffn"]
    np.testing.assert_allclose(total(model, trace), last_TD, rtol=0, atol=1e-10)
    for token in (None, 3):
        found = lens.attribution(model, trace, token=token, index=2)
        assert found.token == (trace["logits"][2].argmax() if token is None else token)
        np.testing.assert_allclose(found.logit, trace["logits"][2, found.token], rtol=0, atol=1e-10)
        np.testing.assert_allclose(sum_of(found), found.logit, rtol=0, atol=1e-10)


def test_the_table_of_an_attribution() -> None:
    model = model_of(DENSE)
    found = lens.attribution(model, model.trace([1, 2, 3]), token=5, index=-2)
    rows = found.rows()
    assert len(rows) == 1 + 3 * (6 + 1)
    assert [abs(x) for _, x in rows] == sorted((abs(x) for _, x in rows), reverse=True)
    parts = dict(rows)
    assert parts["embedding"] == found.embedding
    assert parts["layers.2.heads.4"] == found.heads_LH[2, 4]
    assert parts["layers.1.ffn_out"] == found.ffn_L[1]
    lines = str(found).splitlines()
    assert lines[0] == f"logit of [5] after [2]: {found.logit:.4g}, of which"
    assert len(lines) == 3 + 20 + 1
    assert lines[-1].split("|")[1].strip() == "2 others"
    assert float(lines[-1].split("|")[2]) == pytest.approx(rows[20][1] + rows[21][1], rel=1e-3)
    assert [cell.strip() for cell in lines[3].split("|")[1:3]] == [rows[0][0], f"{rows[0][1]:+.4g}"]
    page = Page(found._repr_html_())
    assert page.texts[0] == lines[0]
    assert page.tables[0][1] == [rows[0][0], f"{rows[0][1]:+.4g}"]


def test_attribution_does_not_hold_what_every_head_adds_for_every_token() -> None:
    model = model_of(DENSE)
    trace = model.trace(tokens_for(DENSE, 30))
    widths: list[int] = []
    heads_out = lens._heads_out

    def watched(heads_THK: np.ndarray, wo: object) -> np.ndarray:
        widths.append(len(heads_THK))
        return heads_out(heads_THK, wo)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lens, "_heads_out", watched)
        lens.attribution(model, trace)
    assert widths == [1, 1, 1]


# ---------------------------------------------------------------------------------------------------------- attention


def test_attention_with_what_stands_at_its_positions() -> None:
    """From a cache: keys from before the pass are known by their positions alone."""
    model = model_of(DENSE)
    cache = model.new_cache(chunk=3)
    model.forward(tokens_for(DENSE, 7), cache)
    trace = model.trace([8, 9], cache=cache)
    found = lens.attention(trace, 1, 4)
    assert found.name == "layers.1.attention_weights, head 4"
    assert found.keys == ["@3", "@4", "@5", "@6", "[8]", "[9]"]
    assert found.queries == ["[8]", "[9]"]
    np.testing.assert_array_equal(found.weights_TS, trace["layers.1.attention_weights"][4])
    assert trace.steps["layers.1.attention_weights"].key_positions == range(3, 9)


def test_the_strongest_keys() -> None:
    weights_HTS = np.array([[[0.25, 0.5, 0.25, 0.0], [0.1, 0.2, 0.3, 0.4]]])
    step = Step("layers.0.attention_weights", CATALOGUE["attention_weights"], weights_HTS)
    found = lens.attention(Trace([step], [1, 2], ["a", "b"], start=2), 0, 0)
    assert found.top(0) == [("@1", 0.5), ("@0", 0.25), ("a", 0.25), ("b", 0.0)]  # of equals the oldest first
    assert found.top(1, 2) == found.top(-1, 2) == [("b", 0.4), ("a", 0.3)]
    assert str(found).splitlines() == [
        "layers.0.attention_weights, head 0",
        "| query | keys, oldest first |",
        "|-------|-------------------:|",
        "| a     |               ▓█▓  |",
        "| b     |               ▒▓██ |",
        "░▒▓█ up to 0.03125, 0.125, 0.2812, 0.5 (square-root scale)",
    ]
    page = Page(found._repr_html_())
    assert page.tables[0] == [
        ["query", "attends to"],
        ["a", "@1 0.50, @0 0.25, a 0.25, b 0.00"],
        ["b", "b 0.40, a 0.30, @1 0.20, @0 0.10"],
    ]
    assert page.images[0]["alt"] == "heat map of 2 by 4 cells, scale 0.5"


def test_a_long_attention_map_is_made_small() -> None:
    model = model_of(FAMILIES["dense_no_window"].config)
    found = lens.attention(model.trace(tokens_for(model.config, 100), keep="layers.0.attention_weights"), 0, 1)
    assert found.heat().cells.shape == (64, 64)
    lines = str(found).splitlines()
    assert len(lines) == 3 + 64 + 1
    assert len({len(line) for line in lines[1:-1]}) == 1
    assert len(Page(found._repr_html_()).tables[0]) == 101


# ----------------------------------------------------------------------------------------------------------- mistakes


MISTAKES: dict[str, tuple[Callable[[Model, Trace], object], tuple[object, ...]]] = {
    "a head too many": (lambda m, t: lens.attention(t, 0, 6), ("head", 6, "whole number", "0 to 5")),
    "a head below": (lambda m, t: lens.attention(t, 0, -1), ("head", -1, "0 to 5")),
    "a layer too many": (lambda m, t: lens.attention(t, 3, 0), ("trace", "'layers.3.attention_weights'")),
    "a layer below": (lambda m, t: lens.attention(t, -1, 0), ("trace", "'layers.-1.attention_weights'")),
    "a query too many": (lambda m, t: lens.attention(t, 0, 0).top(2), ("query", 2, "-2 to 1")),
    "no tokens": (lambda m, t: lens.logit_lens(m, t, top=0), ("top", 0, "whole number", "1 to 101")),
    "tokens too many": (lambda m, t: lens.logit_lens(m, t, top=102), ("top", 102, "1 to 101")),
    "a token too many": (lambda m, t: lens.attribution(m, t, token=101), ("token", 101, "0 to 100")),
    "a token below": (lambda m, t: lens.attribution(m, t, token=-1), ("token", -1, "0 to 100")),
    "a token of no kind": (lambda m, t: lens.attribution(m, t, token=1.5), ("token", 1.5, "whole number")),
    "an index too many": (lambda m, t: lens.attribution(m, t, index=2), ("index", 2, "-2 to 1")),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(case: str) -> None:
    call, facts = MISTAKES[case]
    model = model_of(DENSE)
    with refused(InputError, *facts):
        call(model, model.trace([1, 2]))


@pytest.mark.parametrize(
    ("missing", "call"),
    [
        ("layers.2.residual_after_ffn", lens.attribution),
        ("embedding", lens.attribution),
        ("layers.1.heads", lens.attribution),
        ("layers.0.ffn_out", lens.attribution),
        ("layers.2.heads", lambda model, trace: list(lens.contributions(model, trace))),
        ("layers.2.attention_weights", lambda model, trace: lens.attention(trace, 2, 0)),
    ],
)
def test_a_step_that_the_trace_does_not_hold(missing: str, call: Callable[[Model, Trace], object]) -> None:
    model = model_of(DENSE)
    keep = [name for name in step_names(DENSE) if name != missing]
    with refused(MissingStepError, "trace", f"'{missing}'", keep[0]):
        call(model, model.trace([1, 2], keep=keep))


@pytest.mark.parametrize("other", [DENSE.replace(dim=36), DENSE.replace(n_heads=4), DENSE.replace(head_dim=6)])
def test_a_trace_of_another_model(other: ModelConfig) -> None:
    model, trace = model_of(DENSE), model_of(other).trace([1, 2])
    names = ("layers.0.heads", "layers.0.heads")
    shapes = [(2, config.n_heads, config.head_dim) for config in (other, DENSE)]
    if other.dim != DENSE.dim:
        names, shapes = ("layers.2.residual_after_ffn", "embedding"), [(2, 36), (2, 40)]
    with refused(InputError, names[0], *shapes, "this model"):
        lens.attribution(model, trace)
    with refused(InputError, names[1], *shapes, "this model"):
        list(lens.contributions(model, trace))
    if other.dim != DENSE.dim:
        with refused(InputError, "residual_after_ffn", (2, 36), (2, 40)):
            lens.logit_lens(model, trace)


# ------------------------------------------------------------------------------------------------------------ hostile


HOSTILE = ["<script>alert(1)</script>", '"><img onerror=x>', "\x1b[2J", "\u202eabc", "🙂", "&lt;b&gt;", "a|b", "<bdi>"]


@functools.cache
def hostile_tokenizer() -> bytes:
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["some text", *HOSTILE]),
        model_writer=model,
        vocab_size=280 + len(HOSTILE),
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        user_defined_symbols=HOSTILE,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return model.getvalue()


def test_hostile_pieces_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(hostile_tokenizer())
    tokenizer = load_tokenizer(tmp_path)
    n_pieces = tokenizer.vocab_size
    config = DENSE.replace(vocab_size=n_pieces)
    ids = [next(id_ for id_ in range(n_pieces) if tokenizer.decode([id_]) == piece) for piece in HOSTILE]
    model = Model(config, model_of(config).weights, ops_of("numpy"), tokenizer=tokenizer)
    trace = model.trace(ids)
    expected = [*HOSTILE[:2], "\\x1b[2J", "\\u202eabc", *HOSTILE[4:]]
    assert trace.pieces == expected
    raw = Trace(trace.steps.values(), ids, HOSTILE)  # of somebody who has not made them safe
    saved = tmp_path / "t"
    raw.save(saved)
    for one in (trace, raw, Trace.load(saved)):
        attention = lens.attention(one, 0, 0)
        assert attention.queries == expected
        found = lens.attribution(model, one, token=ids[0], index=1)
        seen = lens.logit_lens(model, one, top=n_pieces)  # every piece is in the table
        for value in (attention, found, seen):
            assert all(line.isprintable() for line in str(value).split("\n"))
            page = Page(value._repr_html_())  # which asserts that no tag or attribute came from a piece
            assert page.tables
        assert [row[0] for row in Page(attention._repr_html_()).tables[0][1:]] == expected
        assert Page(found._repr_html_()).texts[0].startswith(f"logit of {HOSTILE[0]} after {HOSTILE[1]}: ")
        cells = [cell for row in Page(seen._repr_html_()).tables[0] for cell in row]
        for piece in expected:
            assert any(cell.startswith(f"{piece} ") for cell in cells)
        assert "&lt;script&gt;" in seen._repr_html_()
        assert "<script" not in seen._repr_html_()


def test_labels_where_nothing_is_known(tmp_path: Path) -> None:
    """A dump without tokens."""
    trace = model_of(DENSE).trace([1, 2, 3])
    bare = Trace(trace.steps.values(), [], [])
    assert lens.attention(bare, 0, 0).queries == ["@0", "@1", "@2"]
    assert lens.attribution(model_of(DENSE), bare).label == "@2"
    assert lens.logit_lens(model_of(DENSE), bare).labels == ["@0", "@1", "@2"]
    saved = tmp_path / "t"
    bare.save(saved)
    assert lens.attention(Trace.load(saved), 0, 0).keys == ["@0", "@1", "@2"]
