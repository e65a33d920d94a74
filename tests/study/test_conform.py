"""The conformance kit: the same bytes everywhere, the truth of transformers, and proof that its verdicts are right."""

from __future__ import annotations

import hashlib
import html
import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.errors import refused
from support.paths import GOLDEN

import mistral_ref
from mistral_ref import CheckpointError, InputError, Model, Step, Trace
from mistral_ref.compare import compare_walks
from mistral_ref.study.broken import BUGS, broken
from mistral_ref.study.conform import report
from mistral_ref.study.conform.cases import CASES, WINDOW, Case
from mistral_ref.study.conform.check import Verdict, check, verdict
from mistral_ref.study.conform.hypotheses import Evidence, Hypotheses, logits_of, run
from mistral_ref.study.conform.kit import Kit, make_kit, open_kit
from mistral_ref.study.conform.layouts import GGUF_TYPES, write_gguf, write_huggingface, write_mistral
from mistral_ref.walk import Edit
from mistral_ref.weights import bf16_bits, bf16_values

BY_NAME = {case.name: case for case in CASES}
IN_WINDOWED_LAYERS = (
    *("no-window", "extra-key", "one-key-less", "prompt-extra-key", "cache-key-less"),
    *("short-ring", "small-ring", "slot-order"),
)
each_case = pytest.mark.parametrize("case", CASES, ids=BY_NAME)


def model_of(case: Case, folder: Path, dtype: str = "float64") -> Model:
    write_mistral(case, folder)
    return mistral_ref.load(folder, backend="numpy", dtype=dtype, threads=1)


@pytest.fixture(scope="module")
def hypotheses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Hypotheses]:
    """Return the passes of every model; each is computed once for all tests of this module."""
    return {case.name: Hypotheses(model_of(case, tmp_path_factory.mktemp(case.name))) for case in CASES}


def in_bf16(value: np.ndarray) -> np.ndarray:
    return bf16_values(bf16_bits(value)).astype(value.dtype)


def in_f16(value: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return value.astype(np.float16).astype(value.dtype)


def dumps_of(case: Case, model: Model, edit: Edit | None = None, *, whole: bool = False) -> list[Evidence]:
    """Return what an engine would dump that computes as a model does: the logits, or every step."""
    edits: Mapping[str, Edit] = {} if edit is None else {"*": edit}
    traces = ((text, run(model, text, edits)) for text in case.texts())
    return [Evidence(text, trace if whole else logits_of(trace)) for text, trace in traces]


def float32_model(hypotheses: Hypotheses) -> Model:
    oracle = hypotheses.model
    return Model(oracle.config, oracle.weights, mistral_ref.load(backend="numpy", threads=1).ops)


# --------------------------------------------------------------------------------------------------------- the models


def test_the_weights_and_texts_are_the_same_everywhere() -> None:
    digest = hashlib.sha256()
    for case in CASES:
        for name, codes in case.codes().items():
            digest.update(f"{case.name} {name} {codes.exponent} {codes.codes.shape}".encode())
            digest.update(codes.codes.astype("<i4").tobytes())
        digest.update(json.dumps(case.texts()).encode())
    assert digest.hexdigest() == "dde1f1a6dec8d4dac3c94e2013e343f4076e9e27d2d19e271b4175c576664c21"


@each_case
def test_every_layout_holds_the_same_model(case: Case, tmp_path: Path) -> None:
    model, tokens = model_of(case, tmp_path), case.texts()[2].tokens
    logits = model.forward(tokens)
    others = [tmp_path / "hf"]
    others[0].mkdir()
    write_huggingface(case, others[0])
    if case.architecture is not None:
        others += [tmp_path / f"{kind}.gguf" for kind in GGUF_TYPES]
        for kind, path in zip(GGUF_TYPES, others[1:], strict=True):
            write_gguf(case, kind, path)
    assert model.config == case.config
    for other in others:
        loaded = mistral_ref.load(other, dtype="float64")
        row_order = "halves" if other.name == "hf" else "interleaved"
        assert loaded.config == case.config.replace(rope_row_order=row_order)
        np.testing.assert_allclose(loaded.forward(tokens), logits, rtol=0, atol=1e-12 * np.abs(logits).max())


@each_case
def test_texts_are_as_long_as_they_should_be(case: Case) -> None:
    texts = {text.name: text for text in case.texts()}
    assert len(texts["short"].tokens) < len(texts["window"].tokens) == WINDOW
    assert len(texts["past"].tokens) >= 5 * WINDOW
    chunks = texts["chunks"]
    assert WINDOW < chunks.n_first < len(chunks.tokens) - WINDOW
    temperature = case.config.query_temperature
    if temperature is not None:
        assert len(texts["past"].tokens) > 3 * temperature.original_max_position_embeddings
    for text in texts.values():
        assert text.tokens[0] == 1
        assert 1 < min(text.tokens[1:]) <= max(text.tokens) < case.config.vocab_size


@each_case
def test_the_oracle_computes_what_transformers_computes(case: Case, hypotheses: dict[str, Hypotheses]) -> None:
    golden = load_file(GOLDEN / "conform.safetensors")
    for text in case.texts():
        found, expected = hypotheses[case.name].trace((), text)["logits"], golden[f"{case.name}.{text.name}"]
        assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


@each_case
def test_attention_is_peaked(case: Case, hypotheses: dict[str, Hypotheses]) -> None:
    weights_HTS = hypotheses[case.name].trace((), case.texts()[2])["layers.0.attention_weights"]
    assert np.tril(weights_HTS, -1).max() > 0.9


# ------------------------------------------------------------------------------------------------------------ verdicts


@each_case
def test_a_pass_in_float32_agrees(case: Case, hypotheses: dict[str, Hypotheses]) -> None:
    found = hypotheses[case.name]
    for whole in (False, True):
        result = verdict(case, found, dumps_of(case, float32_model(found), whole=whole))
        assert (result.outcome, result.precision) == ("agrees", "float32")
        assert result.distance < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("edit", "precision"), [(in_bf16, "bf16"), (in_f16, "f16")])
@each_case
def test_a_pass_in_16_bits_is_not_accused(
    case: Case, edit: Edit, precision: str, hypotheses: dict[str, Hypotheses]
) -> None:
    found = hypotheses[case.name]
    for whole in (False, True):
        result = verdict(case, found, dumps_of(case, found.model, edit, whole=whole))
        assert (result.outcome, result.precision, result.causes) == ("agrees in 16 bits", precision, ())


def first_step(case: Case, bug: str) -> str:
    """Return the step at which a bug departs, by its entry in BUGS."""
    if bug in ("tied-head", "bos-twice"):
        return BUGS[bug].first_step
    windows = case.config.sliding_window
    layer = windows.index(WINDOW) if bug in IN_WINDOWED_LAYERS else 0
    return f"layers.{layer}.{BUGS[bug].first_step}"


def assert_every_bug_is_found(case: Case, found: Hypotheses, bugs: Sequence[str]) -> None:
    for bug in bugs:
        wrong = broken(float32_model(found), bug)
        of_logits = verdict(case, found, dumps_of(case, wrong))
        assert (of_logits.outcome, of_logits.causes) == ("departs", ((bug,),)), bug
        assert of_logits.departure is not None
        assert of_logits.departure.step == "logits"
        of_steps = verdict(case, found, dumps_of(case, wrong, whole=True))
        assert (of_steps.outcome, of_steps.causes) == ("departs", ((bug,),)), bug
        assert of_steps.departure is not None
        assert of_steps.departure.step == first_step(case, bug)


def test_a_bug_is_found_from_logits_and_from_a_dump(hypotheses: dict[str, Hypotheses]) -> None:
    assert_every_bug_is_found(BY_NAME["window"], hypotheses["window"], ["extra-key"])
    assert_every_bug_is_found(BY_NAME["ministral3"], hypotheses["ministral3"], ["temperature-early"])


@pytest.mark.slow
@each_case
def test_every_bug_is_found_from_logits_and_from_a_dump(case: Case, hypotheses: dict[str, Hypotheses]) -> None:
    found = hypotheses[case.name]
    assert_every_bug_is_found(case, found, found.bugs)


@pytest.mark.soak
@each_case
def test_in_16_bits_a_bug_is_found_or_hides_and_no_other_is_accused(
    case: Case, hypotheses: dict[str, Hypotheses]
) -> None:
    found = hypotheses[case.name]
    for bug in found.bugs:
        for edit in (in_bf16, in_f16):
            result = verdict(case, found, dumps_of(case, broken(found.model, bug), edit))
            alike = {"eps-default": "eps-outside", "eps-outside": "eps-default"}  # up to a tenth of what they do
            allowed = {(bug,), (alike.get(bug, bug),)}
            assert set(result.causes) <= allowed, (bug, result.causes)
            if result.outcome != "departs":
                assert bug in ("short-ring", "temperature-early", "eps-default", "eps-outside", "norm-cast")


@pytest.mark.slow
def test_two_bugs_at_once_are_never_taken_for_another(hypotheses: dict[str, Hypotheses]) -> None:
    draw, n_named, n_pairs = random.Random(28), 0, 200
    for _ in range(n_pairs):
        case = draw.choice(CASES)
        found = hypotheses[case.name]
        planted = tuple(draw.sample(found.bugs, 2))
        dumps = dumps_of(case, broken(found.model, *planted))
        result = verdict(case, found, dumps)
        if result.outcome == "agrees":  # row-order and permuted-twice undo each other
            assert found.explains((), dumps)
            continue
        named = [cause for cause in result.causes if set(cause) <= set(planted)]
        assert named or not result.causes, (planted, result.causes)
        for cause in result.causes:  # it gives the same logits in every text
            assert found.explains(cause, dumps), (planted, cause)
        n_named += bool(named)
    assert n_named > 0.85 * n_pairs


@pytest.mark.soak
def test_two_bugs_at_once_in_16_bits_are_never_taken_for_another(hypotheses: dict[str, Hypotheses]) -> None:
    draw = random.Random(5)
    for _ in range(60):
        case = draw.choice(CASES)
        found = hypotheses[case.name]
        planted = tuple(draw.sample(found.bugs, 2))
        result = verdict(case, found, dumps_of(case, broken(found.model, *planted), in_bf16))
        assert all(set(cause) <= set(planted) for cause in result.causes), (planted, result.causes)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
def test_bugs_that_are_none_of_ours_are_not_named(whole: bool, hypotheses: dict[str, Hypotheses]) -> None:
    """Each of these changes one kind of step, as a mistake there would."""
    strangers: dict[str, Edit] = {
        "layers.*.gate": lambda gate: gate / (1 + np.exp(-gate)),
        "layers.*.v": lambda v_TGK: v_TGK[:, ::-1],
        "layers.1.k_rotated": lambda k_TGK: np.concatenate([k_TGK[..., :4], 0.9 * k_TGK[..., 4:]], axis=-1),
        "layers.0.residual_after_attention": lambda x_TD: x_TD * 1.01,
    }
    for name in ("full", "window", "mixtral"):
        case, found = BY_NAME[name], hypotheses[name]
        for step, edit in strangers.items():
            traces = [(text, run(found.model, text, {step: edit})) for text in case.texts()]
            dumps = [Evidence(text, trace if whole else logits_of(trace)) for text, trace in traces]
            result = verdict(case, found, dumps, float32=True)
            assert (result.outcome, result.causes) == ("departs", ())
            assert result.departure is not None
            assert result.departure.step == (step.replace("*", "0") if whole else "logits")
            if whole and step == "layers.1.k_rotated":
                assert result.departure.where == "pairs 2 and up"


def test_the_place_is_told_in_words(hypotheses: dict[str, Hypotheses]) -> None:
    case, found = BY_NAME["window"], hypotheses["window"]
    result = verdict(case, found, dumps_of(case, broken(found.model, "one-key-less"), whole=True))
    assert result.departure is not None
    assert result.departure.where == "token 7 sees keys 1 to 7; expected 0 to 7"
    case, found = BY_NAME["ministral3"], hypotheses["ministral3"]
    result = verdict(case, found, dumps_of(case, broken(found.model, "temperature-early"), whole=True))
    assert result.departure is not None
    assert result.departure.where == "tokens 9, 19, 29, 39"


def test_causes_that_a_text_does_not_tell_apart_are_all_told(hypotheses: dict[str, Hypotheses]) -> None:
    case, found = BY_NAME["window"], hypotheses["window"]
    past = [one for one in dumps_of(case, broken(found.model, "extra-key")) if one.text.name == "past"]
    result = verdict(case, found, past)
    assert result.causes == (("extra-key",), ("prompt-extra-key",))
    assert result.separating == "chunks"


def test_any_steps_and_the_last_token_alone_are_enough(hypotheses: dict[str, Hypotheses]) -> None:
    case, found = BY_NAME["nemo"], hypotheses["nemo"]
    wrong = broken(found.model, "wrong-scale")
    keeps = (["layers.1.heads"], ["layers.0.attention_out", "logits"])
    dumps = [[Evidence(text, wrong.trace(text.tokens, keep=keep)) for text in case.texts()[:3]] for keep in keeps]
    last = [
        Evidence(text, Trace([Step("logits", trace.steps["logits"].kind, trace["logits"][-1:])], [], []))
        for text, trace in dumps_of(case, wrong)
    ]
    for evidence in (*dumps, last):
        assert verdict(case, found, evidence).causes == (("wrong-scale",),)


def test_a_dump_of_both_passes_is_that_of_the_second(hypotheses: dict[str, Hypotheses]) -> None:
    case, found = BY_NAME["full"], hypotheses["full"]
    chunks = case.texts()[3]
    for bug, causes in ((None, ()), ("theta", (("theta",),))):
        model = found.model if bug is None else broken(found.model, bug)
        assert verdict(case, found, [Evidence(chunks, model.trace(chunks.tokens))]).causes == causes


# ----------------------------------------------------------------------------------------------------- files and kits


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return make_kit(tmp_path_factory.mktemp("kits") / "kit", cases=[BY_NAME["nemo"]])


def write_dumps(kit: Kit, folder: Path, *bugs: str) -> Path:
    folder.mkdir()
    for case in kit.cases:
        model = mistral_ref.load(kit.directory / case.name / "mistral", backend="numpy", threads=1)
        for text, trace in dumps_of(case, broken(model, *bugs) if bugs else model):
            trace.save(folder / f"{case.name}-{text.name}.safetensors")
    return folder


def test_a_kit_is_written_and_opened_again(kit: Kit) -> None:
    assert open_kit(kit.directory) == kit
    content = json.loads((kit.directory / "kit.json").read_text())
    (nemo,) = content["models"]
    assert nemo["texts"]["chunks"]["first_pass"] == 24
    assert content["shows"]["nemo"]["wrong-scale"] == "SWPC"
    readme = (kit.directory / "README.md").read_text()
    assert all(bug in readme for bug in BUGS)
    model = mistral_ref.load(kit.directory / "nemo" / "huggingface", dtype="float64")
    stored = Trace.load(kit.directory / "nemo" / "past.safetensors")
    assert {step.value.dtype.name for step in stored.steps.values()} == {"float32"}
    assert model.trace(stored.tokens).compare(stored, bound=1).first is None


def test_dumps_are_checked(kit: Kit, tmp_path: Path) -> None:
    (right,) = check(kit, write_dumps(kit, tmp_path / "right"))
    assert (right.outcome, right.texts) == ("agrees", ("short", "window", "past", "chunks"))
    (wrong,) = check(kit, write_dumps(kit, tmp_path / "wrong", "tiled-heads", "theta"))
    assert (wrong.outcome, wrong.causes) == ("departs", (("tiled-heads", "theta"),))


def test_halves_are_brought_into_order(kit: Kit, tmp_path: Path) -> None:
    folder = tmp_path / "dumps"
    folder.mkdir()
    text = kit.cases[0].texts()[0]
    model = mistral_ref.load(kit.directory / "nemo" / "mistral", dtype="float64")
    trace = model.trace(text.tokens, keep=["layers.0.q", "logits"])
    q_TGK = trace["layers.0.q"]
    halves = np.concatenate([q_TGK[..., ::2], q_TGK[..., 1::2]], axis=-1)
    save_file({"layers.0.q": halves, "logits": trace["logits"]}, folder / "nemo-short.safetensors")
    (found,) = check(kit, folder, rope_row_order="halves")
    assert found.outcome == "agrees"
    (found,) = check(kit, folder)
    assert found.departure is not None
    assert (found.departure.step, found.causes) == ("layers.0.q", ())


def test_what_cannot_be_checked_is_refused(kit: Kit, tmp_path: Path) -> None:
    with refused(InputError, kit.directory, "new directory"):
        make_kit(kit.directory)
    with refused(InputError, tmp_path, "kit.json"):
        open_kit(tmp_path)
    with refused(InputError, tmp_path, "nemo-short.safetensors"):
        check(kit, tmp_path)
    (tmp_path / "nemo-short.safetensors").write_bytes(b"nothing")
    with refused(CheckpointError, tmp_path / "nemo-short.safetensors"):
        check(kit, tmp_path)


def test_a_dump_of_another_text_is_refused(kit: Kit, tmp_path: Path) -> None:
    model = mistral_ref.load(kit.directory / "nemo" / "mistral", dtype="float64")
    path = tmp_path / "nemo-short.safetensors"
    model.trace([1, 2, 3, 4, 5], keep="logits").save(path)
    with refused(InputError, path, "tokens"):
        check(kit, tmp_path)
    model.trace([1, 2, 3, 4, 5, 6, 7], keep="logits").save(path)
    with refused(InputError, path, "tokens", 7, 5):
        check(kit, tmp_path)
    save_file({"layers.9.v": np.zeros((5, 2, 16), np.float32)}, path)
    with refused(InputError, path, "nemo", "layers.9.v"):
        check(kit, tmp_path)


def test_a_kit_that_has_changed_is_refused(tmp_path: Path) -> None:
    made = make_kit(tmp_path / "kit", cases=[BY_NAME["multi_query"]])
    weights = tmp_path / "kit" / "multi_query" / "mistral" / "consolidated.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with refused(InputError, tmp_path / "kit" / "kit.json", "sha256"):
        open_kit(made.directory)


@pytest.mark.slow
def test_the_whole_kit_is_small_and_its_table_has_every_bug(tmp_path: Path) -> None:
    kit = make_kit(tmp_path / "kit")
    assert sum(file.stat().st_size for file in kit.directory.rglob("*") if file.is_file()) < 10 * 2**20
    shows = json.loads((kit.directory / "kit.json").read_text())["shows"]
    for bug in BUGS:
        assert any(shows[case.name].get(bug) for case in CASES), bug
        in_16_bits = any(letter.isupper() for case in CASES for letter in shows[case.name].get(bug, ""))
        assert in_16_bits == (bug not in ("temperature-early", "norm-cast"))
    assert "no two bugs" in (kit.directory / "README.md").read_text()


# ------------------------------------------------------------------------------------------------------------- reports


def test_a_report_says_what_is_known(kit: Kit, tmp_path: Path) -> None:
    verdicts = [*check(kit, write_dumps(kit, tmp_path / "dumps", "theta"))]
    verdicts += [Verdict("full", "no dump"), Verdict("window", "agrees", ("short",), "float32", 1e-6)]
    text = report.as_text(verdicts)
    for fact in (
        "theta",
        BUGS["theta"].cure,
        "litgpt#2217",
        "3 models",
        "1 agrees",
        "1 departs",
        "1 has no dump",
        "logits",
    ):
        assert fact in text
    found = json.loads(report.as_json(verdicts))
    assert found["models"][0]["causes"] == [["theta"]]
    assert found["bugs"]["theta"]["seen_in"][0] == "litgpt#2217"
    page = report.as_page(verdicts)
    assert html.escape(BUGS["theta"].cure) in page
    assert "default-src 'none'" in page
    assert re.search(r"<script|src=|url\(|@import|https?:", page) is None


def test_another_value_under_the_name_of_a_step_is_suspected(hypotheses: dict[str, Hypotheses]) -> None:
    case, found = BY_NAME["nemo"], hypotheses["nemo"]
    text = case.texts()[0]
    trace = run(found.model, text)
    q_THK = trace.steps["layers.0.q"]
    renamed = Trace([Step("layers.0.q_rotated", q_THK.kind, q_THK.value), trace.steps["logits"]], [], [])
    result = verdict(case, found, [Evidence(text, renamed)])
    assert (result.outcome, result.causes) == ("departs", ())
    assert "another value" in report.as_text([result])
    assert "another value" not in report.as_text([verdict(case, found, dumps_of(case, broken(found.model, "theta")))])


def test_compare_says_the_same(hypotheses: dict[str, Hypotheses]) -> None:
    """What the kit calls the first departure is that of `compare`."""
    model, text = hypotheses["full"].model, BY_NAME["full"].texts()[2]
    first = compare_walks(broken(model, "eps-outside").steps(text.tokens), model.steps(text.tokens)).first
    result = verdict(BY_NAME["full"], hypotheses["full"], [Evidence(text, run(broken(model, "eps-outside"), text))])
    assert first is not None
    assert result.departure is not None
    assert result.departure.step == first.name
