"""The page of a pass: what it holds. How it behaves in a browser is test_page_in_browser.py's business."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.errors import assert_complains, refused
from support.tiny import configs, model_of, tokens_for

import mistral_ref
from mistral_ref.cli import main
from mistral_ref.display import statistics
from mistral_ref.errors import InputError
from mistral_ref.steps import count_values, step_names
from mistral_ref.study import lens, page_data, report
from mistral_ref.walk import matching_steps

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked=1'> {{data}} <!--"


@pytest.fixture(scope="module")
def model() -> mistral_ref.Model:
    return mistral_ref.load(backend="numpy")


class Parsed(HTMLParser):
    """A page as a browser takes it apart: its tags, and the contents of its style and scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("style", "script"):
            self.raw.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem is not None:
            self.raw[-1] += data


def data_of(text: str) -> dict[str, Any]:
    return json.loads(Parsed(text).raw[1])


def unpacked(whole: dict[str, Any], shape: list[int]) -> np.ndarray:
    planes = np.frombuffer(zlib.decompress(base64.b64decode(whole["data"])), np.uint8).reshape(2, -1)
    halves = np.ascontiguousarray(planes.T).view("<f2").astype(np.float64)
    return np.ldexp(halves, whole["exponent"]).reshape(shape)


def test_every_step_is_there_with_its_values(model: mistral_ref.Model) -> None:
    prompt = "Once upon a time there was a little girl"
    about, trace = data_of(report.page(model, prompt, with_cost=False)), model.trace(prompt)
    assert [step["name"] for step in about["steps"]] == list(step_names(model.config)) == list(trace)
    n_pairs = len(trace.tokens) * (len(trace.tokens) + 1) // 2  # of a query and a key that it sees
    for entry in about["steps"]:
        step = trace.steps[entry["name"]]
        assert entry["shape"] == list(step.value.shape)
        assert entry["source"] == step.source
        assert f'"{entry["kind"]}"' in entry["code"]
        assert tuple(about["kinds"][entry["kind"]]["axes"]) == step.axes
        assert about["kinds"][entry["kind"]]["formula"] == step.formula
        if step.key_positions is None:
            assert tuple(entry["statistics"].values()) == tuple(step.statistics)
        elif entry["kind"] == "attention_weights":
            assert entry["statistics"]["mean"] == pytest.approx(
                len(trace.tokens) / n_pairs, rel=1e-5
            )  # rows add up to 1
        n_visible = step.value.size if step.key_positions is None else model.config.n_heads * n_pairs
        assert sum(entry["histogram"]) == n_visible
        largest = np.abs(step.value[np.isfinite(step.value)]).max()
        np.testing.assert_allclose(
            unpacked(entry["whole"], entry["shape"]), step.value, rtol=2**-11, atol=largest / 2**30
        )
    assert about["tokens"] == [{"id": i, "piece": p} for i, p in zip(trace.tokens, trace.pieces, strict=True)]


@given(
    hnp.arrays(
        st.sampled_from([np.float32, np.float64]),
        st.integers(1, 40),
        elements=st.floats(width=32) | st.sampled_from([np.inf, -np.inf, np.nan, 2.0**127, 2.0**-140, -0.0]),
    )
)
def test_numbers_of_any_size_keep_eleven_bits(values: np.ndarray) -> None:
    found = unpacked(page_data.packed(values), list(values.shape))
    largest = np.abs(values[np.isfinite(values)].astype(np.float64)).max(initial=0.0)
    np.testing.assert_allclose(found, values, rtol=2**-11, atol=largest / 2**38)


@given(st.data())
def test_a_page_of_any_model(data: st.DataObject) -> None:
    config = data.draw(configs())
    small = model_of(config, seed=3)
    tokens = tokens_for(config, data.draw(st.integers(1, 12)))
    cache = small.new_cache(chunk=len(tokens))
    before = data.draw(st.integers(0, 3))
    for _ in range(before):
        small.forward(tokens, cache)
    about = data_of(report.page(small, tokens, cache=cache, with_cost=False))
    assert about["start"] == before * len(tokens)
    assert cache.length == (before + 1) * len(tokens)
    assert [step["name"] for step in about["steps"]] == list(step_names(config))
    n_values = sum(int(np.prod(step["shape"])) for step in about["steps"])
    bound = count_values(config, len(tokens), about["start"], step_names(config))
    assert n_values <= bound  # layers with a window have fewer keys than the widest


def test_the_logit_lens_ends_with_the_models_own_prediction(model: mistral_ref.Model) -> None:
    about, trace = data_of(report.page(model, "Once upon a time", with_cost=False)), model.trace("Once upon a time")
    names = ["embedding", *(f"layers.{layer}.residual_after_ffn" for layer in range(model.config.n_layers))]
    assert about["lens"]["names"] == names
    best = [about["lens"]["pieces"][str(ids[0])] for ids in about["lens"]["ids"][-1]]
    assert best == [model.piece(int(token)) for token in trace["logits"].argmax(-1)]
    pieces = lens.likeliest(model, trace["logits"][-1])
    assert about["lens"]["probabilities"][-1][-1] == pytest.approx([p for _, p in pieces], abs=1e-5)


def test_costs_are_measured_for_every_step(model: mistral_ref.Model) -> None:
    cost = data_of(report.page(model, "Once"))["cost"]
    assert cost["bandwidth"] > 1e8
    assert cost["kinds"][-1]["name"] == "total"
    seconds = [row["seconds"] for name, row in cost["steps"].items() if name != "total"]
    assert len(seconds) == len(list(step_names(model.config))) - 2 * model.config.n_layers  # those inside attention
    assert min(seconds) > 0


def test_what_is_not_kept_is_a_picture(model: mistral_ref.Model) -> None:
    about = data_of(report.page(model, "Once upon a time", keep=["layers.1.*", "logits"], with_cost=False))
    kept = set(matching_steps(["layers.1.*", "logits"], model.config))
    for step in about["steps"]:
        assert (step["whole"] is not None) == (step["name"] in kept)
        inside_attention = step["kind"] in ("scores", "attention_weights")
        assert (step["picture"] is not None) == (step["name"] not in kept and not inside_attention)
    gate = next(step for step in about["steps"] if step["name"] == "layers.0.gate")["picture"]
    levels = np.frombuffer(zlib.decompress(base64.b64decode(gate["data"])), np.int8).reshape(gate["shape"])
    values = model.trace("Once upon a time", keep="layers.0.gate")["layers.0.gate"]
    assert gate["shape"] == [5, 96]
    assert gate["scale"] == pytest.approx(np.abs(values).max())
    assert np.abs(levels).max() == 126
    row, column = np.unravel_index(np.abs(values).argmax(), values.shape)
    assert abs(int(levels[row, column * 96 // 512])) == 126


@pytest.mark.parametrize(
    ("n_tokens", "expected"),
    [(64, ["*"]), (250, ["*.attention_weights", "embedding", "*.residual_after_*", "norm"]), (2000, [])],
)
def test_by_default_what_has_room_is_kept(model: mistral_ref.Model, n_tokens: int, expected: list[str]) -> None:
    assert report._kept(model.config, n_tokens, 0, None) == set(matching_steps(expected, model.config))


def test_more_than_a_browser_opens_is_refused(model: mistral_ref.Model) -> None:
    with refused(InputError, "keep", "3,010,176,000", "67,108,864"):
        report.page(model, [5] * 6000, keep="*")
    with refused(InputError, "step", "'nothing'"):
        report.page(model, "Once", keep="nothing")


@pytest.mark.slow
def test_64_tokens_of_the_demonstration_model_are_less_than_5_mb(model: mistral_ref.Model) -> None:
    text = "Once upon a time there was a little girl named Lily. She had a red ball and a big dog. " * 4
    page = report.page(model, model.token_ids(text)[:64])
    assert all(step["whole"] for step in data_of(page)["steps"])
    assert len(page.encode()) < 5_000_000


def test_hostile_text_stays_text(model: mistral_ref.Model) -> None:
    parsed = Parsed(report.page(model, HOSTILE, title=HOSTILE, with_cost=False))
    assert [tag for tag, _ in parsed.tags] == [
        "html", "head", "meta", "meta", "meta", "meta", "title", "style", "body", "noscript", "script", "script",
    ]  # fmt: skip
    about = json.loads(parsed.raw[1])
    assert about["title"] == HOSTILE
    assert model.tokenizer is not None
    assert model.tokenizer.decode([token["id"] for token in about["tokens"]]) == HOSTILE


def test_a_browser_is_told_to_load_nothing_and_to_run_this_script_alone(model: mistral_ref.Model) -> None:
    text = report.page(model, "Once", with_cost=False)
    parsed = Parsed(text)
    style, _, script = parsed.raw
    policy = next(attributes["content"] for _, attributes in parsed.tags if "http-equiv" in attributes)
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    for kind, content in (("script-src", script), ("style-src", style)):
        assert rules[kind] == f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert not re.search(r"(src|href)=|@import|url\((?!#)|innerHTML|outerHTML|insertAdjacent|eval\(", style + script)
    assert set(re.findall(r"https?://[^\"'\s]+", style + script)) == {
        "http://www.w3.org/2000/svg"
    }  # a name, not a place


def test_numbers_that_are_none_are_shown(model: mistral_ref.Model) -> None:
    def spoilt(x_TD: np.ndarray) -> np.ndarray:
        x_TD = x_TD.copy()
        x_TD[0, :3] = np.nan, np.inf, -np.inf
        return x_TD

    about = data_of(report.page(model, "Once", edits={"layers.1.ffn_out": spoilt}, with_cost=False))
    entry = next(step for step in about["steps"] if step["name"] == "layers.1.ffn_out")
    assert (entry["statistics"]["n_nan"], entry["statistics"]["n_infinite"]) == (1, 2)
    np.testing.assert_array_equal(unpacked(entry["whole"], entry["shape"])[0, :3], [np.nan, np.inf, -np.inf])
    after = next(step for step in about["steps"] if step["name"] == "layers.1.residual_after_ffn")
    assert after["statistics"]["n_nan"] >= 1


def test_edits_are_what_is_shown(model: mistral_ref.Model) -> None:
    about = data_of(report.page(model, "Once", edits={"layers.2.heads": np.zeros_like}, with_cost=False))
    entry = next(step for step in about["steps"] if step["name"] == "layers.2.attention_out")
    assert entry["statistics"]["rms"] == 0
    assert statistics(unpacked(entry["whole"], entry["shape"])).high == 0


def test_progress_counts_passes_and_then_steps(model: mistral_ref.Model) -> None:
    calls: list[tuple[int, int]] = []
    report.page(model, "Once", progress=lambda done, total: calls.append((done, total)))
    n_steps = len(list(step_names(model.config)))
    assert calls[0] == (0, 6)
    assert calls[-1] == (n_steps, n_steps)


def test_the_command_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.html"
    assert (
        main(["trace", "--backend", "numpy", "--no-cost", "--keep", "*.q", "--last", "2", "Once upon", "-o", str(path)])
        == 0
    )
    assert capsys.readouterr().out.startswith(f"{path}: 2 tokens, ")
    about = data_of(path.read_text(encoding="utf-8"))
    assert about["title"] == "the demonstration model"
    assert (about["start"], about["cost"]) == (1, None)
    assert main(["trace", "--no-cost", "--broken", "tiled-heads", "Once", "-o", str(path)]) == 0
    assert data_of(path.read_text(encoding="utf-8"))["title"] == "the demonstration model, broken: tiled-heads"


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["-o", "x.htm"], ("-o", Path("x.htm"), ".html", ".safetensors")),
        (["-o", "nowhere/x.html"], (Path("nowhere/x.html"), "no directory", "nowhere")),
        (["--no-cost"], ("--no-cost", "-o", ".html")),
        (["--no-cost", "--keep", "layers.9.q", "-o", "x.html"], ("step", "'layers.9.q'")),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    arguments: list[str],
    facts: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["trace", "--backend", "numpy", "Once", *arguments]) == 2
    assert_complains(capsys.readouterr().err, *facts)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_page_leaves_nothing(model: mistral_ref.Model, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report.write(model, "Once", tmp_path / "x.html", with_cost=False, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_the_parts_of_the_page_are_in_the_package() -> None:
    names = {*report._SCRIPTS, *(f"live/{name}" for name in report._LIVE_SCRIPTS), report._LAST_SCRIPT}
    code = f"from mistral_ref import report; assert all((report._FOLDER / f'{{n}}.js').is_file() for n in {names})"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    on_disk = {str(path.relative_to(report._FOLDER).with_suffix("")) for path in report._FOLDER.rglob("*.js")}
    assert on_disk == names


def test_no_two_scripts_of_the_page_define_the_same_function() -> None:
    scripts = Path(report.__file__).with_name("page").rglob("*.js")
    names = [name for path in scripts for name in re.findall(r"^(?:async )?function (\w+)", path.read_text(), re.M)]
    assert len(names) > 50
    assert sorted(names) == sorted(set(names))
