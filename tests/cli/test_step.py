"""mistral-ref step: over a pipe, and in a terminal as a reader would type."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from support.command import COMMAND, heed_signals, run, start
from support.errors import assert_complains, refused

import mistral_ref
from mistral_ref.cli.walker.walker import Walker
from mistral_ref.errors import InputError
from mistral_ref.study import lens
from mistral_ref.study.stepper import Stepper

TEXT = "Once upon a time"
LONG_TEXT = "Lily and Tom went to the park. They saw a big red ball. " * 8  # longer than the window


def walk(*commands: str, text: str = TEXT, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Return what commands over a pipe print."""
    return run("step", *options, text, stdin="".join(f"{command}\n" for command in commands))


@pytest.fixture(scope="module")
def model() -> mistral_ref.Model:
    return mistral_ref.load(backend="numpy")


@pytest.fixture
def walker(model: mistral_ref.Model) -> Walker:
    return Walker(Stepper(model, TEXT))


def said(walker: Walker, capsys: pytest.CaptureFixture[str], *commands: str) -> str:
    """Return what a walker prints for the last of some commands."""
    for command in commands:
        capsys.readouterr()
        walker.view.console.file = sys.stdout
        walker.onecmd(command)
    return capsys.readouterr().out


def test_a_whole_walk_over_a_pipe(model: mistral_ref.Model) -> None:
    done = walk("next", "into", "", "jump heads", "zero head 3", "predict", "quit")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert "5 tokens from position 0: <s> ▁Once ▁upon ▁a ▁time" in lines
    places = [match[1] for line in lines if (match := re.match(r"\((\S+)\) ", line))]
    assert places == ["embedding", "layers.0", *["layers.0." + name for name in ("attention_norm", "q")], *[
        "layers.0.heads"] * 3]  # fmt: skip

    def without_head_3(heads_THK: np.ndarray) -> np.ndarray:
        return np.where(np.arange(8)[:, np.newaxis] == 3, 0, heads_THK).astype(np.float32)

    for edits in ({}, {"layers.0.heads": without_head_3}):
        logits_V = model.forward(TEXT, edits=edits, last_only=True)[0]
        piece, chance = model.piece(int(logits_V.argmax())), np.exp(logits_V - np.logaddexp.reduce(logits_V)).max()
        assert f"  {chance:>8.1%}  {piece}" in lines


def test_next_back_into_and_out(walker: Walker, capsys: pytest.CaptureFixture[str]) -> None:
    def place(*commands: str) -> str:
        said(walker, capsys, *commands)
        return f"{walker.place()} {walker.stepper.step.name.rpartition('.')[2]}"

    assert place("next") == "layers.0 residual_after_ffn"
    assert place("next", "n") == "layers.2 residual_after_ffn"
    assert place("back") == "layers.1 residual_after_ffn"
    assert place("into") == "layers.1.attention_norm attention_norm"
    assert place("", "") == "layers.1.k k"
    assert place("back", "back", "back") == "layers.0.residual_after_ffn residual_after_ffn"
    assert place("out") == "layers.0 residual_after_ffn"
    assert place("back") == "embedding embedding"
    assert place("jump logits") == "logits logits"
    assert "last step" in said(walker, capsys, "next")
    assert place("out", "back") == "norm norm"
    assert place("back") == "layers.4 residual_after_ffn"
    with refused(InputError, "first step"):
        said(walker, capsys, "jump embedding", "back")
    assert place("into") == "layers.0.attention_norm attention_norm"
    assert place("next 5") == "layers.0.k_rotated k_rotated"
    assert place("back 2") == "layers.0.v v"
    assert place("out", "next 2") == "layers.2 residual_after_ffn"
    assert place("back 2") == "layers.0 residual_after_ffn"
    assert place("back 9") == "embedding embedding"
    assert place("next 99") == "logits logits"
    assert place("back") == "norm norm"
    with refused(InputError, "norm", "nothing", "into"):
        said(walker, capsys, "into")


def test_a_layer_is_summed_up(walker: Walker, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(walker, capsys, "jump 1", "out")
    trace = walker.stepper.trace(["layers.*"])
    for name in ("0.residual_after_ffn", "1.attention_out", "1.ffn_out", "1.residual_after_ffn"):
        assert f"rms {np.sqrt(np.mean(np.square(trace[f'layers.{name}'], dtype=np.float64))):.3g}" in text


def test_what_is_shown_is_the_value(walker: Walker, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(walker, capsys, "jump layers.2.q", "show token 1 head 2 head_dim 0:4")
    assert text.splitlines()[0] == "layers.2.q token 1, head 2, head_dim 0:4, head_dim 4"
    shown = [float(number) for number in text.splitlines()[1].strip("[] ").split()]
    np.testing.assert_allclose(shown, walker.stepper.step.value[1, 2, :4], atol=1e-4)
    assert "head 7, " in said(walker, capsys, "show head -1 token 0:2")
    assert len(said(walker, capsys, "show token 0 head 0 head_dim 0").splitlines()) == 2
    for command in ("map", "map token 2", "map token 0 head 0 head_dim 0", "top token 0 head 0 head_dim 0"):
        assert said(walker, capsys, command)


def test_a_map_shows_the_window_and_who_attends(walker: Walker, capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(walker, capsys, "jump attention_weights", "jump scores", "map head 1").splitlines()
    assert [line.split()[0] for line in lines[1:6]] == ["<s>", "▁Once", "▁upon", "▁a", "▁time"]
    assert [line.count("·") for line in lines[1:6]] == [4, 3, 2, 1, 0]
    assert lines[6:8] == ["      0", "0 <s>  1 ▁Once  2 ▁upon  3 ▁a  4 ▁time"]
    assert "out of sight" in lines[8]
    assert "square-root scale" in said(walker, capsys, "jump attention_weights", "map").splitlines()[-1]


@pytest.mark.parametrize("n_tokens", [30, 512, 600])
def test_rows_of_a_map_have_labels_and_are_not_merged_up_to_512(
    model: mistral_ref.Model, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, n_tokens: int
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    walker = Walker(Stepper(model, [1, *range(300, 299 + n_tokens)]))
    heading, *lines = said(walker, capsys, "map").splitlines()
    assert heading.startswith(f"embedding token {n_tokens}, dim 224, each cell the largest of ")
    assert heading.count("each cell") == (2 if n_tokens > 512 else 1)
    rows, (ruler, legend) = lines[:-2], lines[-2:]
    assert len(rows) == min(n_tokens, 512)
    labels = [model.piece(token) for token in walker.stepper.tokens]
    assert rows[0].split()[0] == labels[0]
    assert rows[-1].lstrip().startswith("598 to 599 " if n_tokens > 512 else f"{labels[-1]} ")
    assert all(len(row) < 60 for row in rows)
    ticks = ruler.split()
    assert (ticks[0], ruler.index("0")) == ("0", len(rows[0]) - len(rows[0].lstrip()) + len(labels[0]) + 1)
    assert int(ticks[1]) == 10 * 224 // (60 - ruler.index("0") - 1)
    assert "up to" in legend


def test_where_three_axes_are_too_many_the_last_token_and_head_0_are_taken(
    walker: Walker, capsys: pytest.CaptureFixture[str]
) -> None:
    headings = {
        "q": ("token 4, head 8, head_dim 32",) * 2 + ("token 4, largest values",),
        "scores": ("head 0, query 5, key 5",) * 2 + ("head 0, query 4, strongest keys",),
        "attention_weights": ("head 0, query 5, key 5",) * 2 + ("head 0, query 4, strongest keys",),
        "ffn_out": ("token 5, dim 224",) * 2 + ("largest values",),
    }
    for step, expected in headings.items():
        said(walker, capsys, f"jump layers.0.{step}")
        for command, words in zip(("show", "map", "top"), expected, strict=True):
            assert said(walker, capsys, command).startswith(f"layers.0.{step} {words}")
    said(walker, capsys, "jump layers.0.q")
    for words, heading in {
        "show token :": "token 0:, head 0, token 5, head_dim 32",
        "show token : head :": "token 0:, head 0:, token 5, head 8, head_dim 32",
        "map token 1:3 head : head_dim :": "token 2, head 0:, head_dim 0:, head 8, head_dim 32",
        "map head 2:4 token 1:3": "head 2:4, token 2, head 2, head_dim 32",
    }.items():
        assert said(walker, capsys, words).startswith(f"layers.0.q {heading}\n")
    top = said(walker, capsys, "top token 2:4 head 1").splitlines()[1].split()
    value = walker.stepper.step.value
    assert float(top[0]) == pytest.approx(float(value[int(top[2]), 1, int(top[4])]), abs=1e-3)
    with refused(InputError, "top", "whole tokens", "'vocabulary 3'"):
        said(walker, capsys, "jump logits", "top vocabulary 3")


def test_a_query_head_means_the_key_value_head_that_it_reads(
    walker: Walker, capsys: pytest.CaptureFixture[str]
) -> None:
    said(walker, capsys, "jump layers.0.k")
    for words, head in (("head 5", "1 (read by heads 4 to 7)"), ("kv_head 0", "0 (read by heads 0 to 3)")):
        text = said(walker, capsys, f"show {words} token 0")
        assert text.startswith(f"layers.0.k kv_head {head}, token 0, head_dim 32")
    focused = said(walker, capsys, "head 5", "show token 0")
    assert focused.splitlines()[1:] == said(walker, capsys, "all", "show token 0 head 5").splitlines()[1:]
    assert "zero head 2, that is kv_head 0 (read by heads 0 to 3); now" in said(walker, capsys, "zero head 2")
    assert [bool(head.any()) for head in walker.stepper.step.value.transpose(1, 0, 2)] == [False, True]
    before = walker.stepper.step.value
    said(walker, capsys, "swap head 1 6")
    np.testing.assert_array_equal(walker.stepper.step.value, before[:, ::-1])
    with refused(InputError, "both", "kv_head 0"):
        said(walker, capsys, "swap head 1 2")


def test_top_of_attention_tells_repeated_pieces_apart_and_leaves_out_what_is_not_seen(
    model: mistral_ref.Model, capsys: pytest.CaptureFixture[str]
) -> None:
    walker = Walker(Stepper(model, "a cat and a dog"))
    text = said(walker, capsys, "jump attention_weights", "top token 4")
    assert sorted(line.split(maxsplit=1)[1] for line in text.splitlines()[1:]) == sorted(
        [*(f"{piece} @{at}" if piece == "▁a" else piece for at, piece in enumerate(walker.view.pieces[:5]))]
    )
    assert len(said(walker, capsys, "zero", "top token 4").splitlines()) == 6  # weights of 0, but in sight
    walker = Walker(Stepper(model, LONG_TEXT))
    _, *lines = said(
        walker, capsys, "jump attention_weights", "zero", "set 0.5 token 100 key 3", "top token 100"
    ).splitlines()
    assert lines[0].split()[0] == "0.5"  # out of sight, but not 0: a bug is seen
    keys = [int(line.rpartition("@")[2]) for line in lines[1:]]
    assert all(100 - 64 < key <= 100 for key in keys)


def test_what_cannot_be_predicted_is_said_in_one_line(walker: Walker, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "infinite" in said(walker, capsys, "next", "scale 1e40")
        for command in ("top", "predict"):
            assert "  the logits hold NaN, so nothing is likeliest\n" in said(walker, capsys, command)
        assert "nothing is likeliest" in said(walker, capsys, "next")
        with refused(InputError, "NaN"):
            said(walker, capsys, "generate 2")
    assert "the logits hold infinity" in said(walker, capsys, "undo", "jump logits", "set inf vocabulary 3", "predict")
    text = said(walker, capsys, "undo", "predict")
    assert "nan" not in text
    assert " 0.0%" not in text


def test_why_of_what_does_not_add_up_is_one_line(
    walker: Walker, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: object) -> None:
        raise InputError("the parts do not add up")

    monkeypatch.setattr(lens, "attribution", failing)
    with refused(InputError, "the parts do not add up"):
        said(walker, capsys, "why")
    monkeypatch.setattr(walker, "is_terminal", True)
    assert said(walker, capsys, "why") == "the parts do not add up\n"


def test_a_text_goes_on_with_the_edits_and_without(
    walker: Walker, capsys: pytest.CaptureFixture[str], model: mistral_ref.Model
) -> None:
    plain = model.complete(TEXT, max_tokens=6)
    assert said(walker, capsys, "generate 6") == f"goes on: {plain}\n"
    assert said(walker, capsys, "gen").startswith(f"goes on: {plain}")
    said(walker, capsys, "jump layers.0.heads", "zero", "swap token 1 2", "scale 0.5 token 3:", "set 1 head 2 token -1")
    with_edits, without = said(walker, capsys, "generate 6").splitlines()
    assert without == f"without:        {plain}"
    heading, _, text = with_edits.partition(": ")
    assert heading == "with the edits"

    def edited(heads_THK: np.ndarray) -> np.ndarray:
        heads_THK = np.zeros_like(heads_THK)
        heads_THK[4, 2] = 1
        return heads_THK

    ids = model.token_ids(TEXT)
    for _ in range(6):
        ids.append(int(model.forward(ids, edits={"layers.0.heads": edited})[-1].argmax()))
    assert text.replace("\\n", "\n") == model.tokenizer.decode(ids)[len(TEXT) :]
    assert text != plain


def test_how_a_word_was_merged(walker: Walker, capsys: pytest.CaptureFixture[str]) -> None:
    at = next(n for n, piece in enumerate(walker.view.pieces) if len(piece) > 3)
    word = walker.view.model.tokenizer.word_of(walker.stepper.tokens, at)
    lines = said(walker, capsys, f"merges {at}").splitlines()
    assert lines[0].split() == [*word]
    assert walker.view.pieces[at] in lines[-1].split()


def test_names_are_completed(walker: Walker, capsys: pytest.CaptureFixture[str]) -> None:
    assert walker.completenames("ne") == ["next "]
    assert "layers.0.q_rotated" in walker.complete_jump("layers.0.q", "jump layers.0.q", 5, 15)
    assert walker.complete_jump("q_r", "jump q_r", 5, 8) == []
    said(walker, capsys, "next")
    assert walker.complete_jump("q_r", "jump q_r", 5, 8) == ["q_rotated"]


def test_a_long_prompt_is_not_printed_whole(model: mistral_ref.Model, capsys: pytest.CaptureFixture[str]) -> None:
    walker = Walker(Stepper(model, [1, *range(300, 400)]))
    walker.view.console.file = sys.stdout
    walker.begin()
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith("101 tokens from position 0: <s> ")
    assert f"{model.piece(318)} ... 61 more ... {model.piece(380)}" in line
    assert line.endswith(model.piece(399))


def test_an_interrupted_command_leaves_one_where_one_was(
    walker: Walker, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    said(walker, capsys, "next", "zero")
    monkeypatch.setattr(walker.stepper, "go", interrupted)
    for command in ("next", "into", "jump logits", "undo"):
        with pytest.raises(KeyboardInterrupt):
            said(walker, capsys, command)
    monkeypatch.setattr(walker, "is_terminal", True)
    for command in ("next", "into", "jump logits", "undo"):
        assert said(walker, capsys, command) == "\ninterrupted\n"
    assert (walker.place(), len(walker.stepper.edits)) == ("layers.0", 1)


def test_focus_narrows_what_is_looked_at_and_not_what_is_changed(
    walker: Walker, capsys: pytest.CaptureFixture[str]
) -> None:
    text = said(walker, capsys, "jump layers.0.attention_weights", "token 3", "head 2", "show")
    assert text.startswith("layers.0.attention_weights query 3, head 2, key 5")
    weights = walker.stepper.step.value[2, 3]
    top = said(walker, capsys, "top").splitlines()[1:]
    assert top[0].split() == [f"{weights.max():.4g}", walker.view.pieces[int(weights.argmax())]]
    assert said(walker, capsys, "jump layers.0.k", "show").startswith(
        "layers.0.k token 3, kv_head 2" * 0 + "layers.0.k"
    )
    said(walker, capsys, "jump layers.0.ffn_out", "zero")
    assert not walker.stepper.step.value.any()
    assert said(walker, capsys, "all", "show").startswith("layers.0.ffn_out token 5, dim 224")


def test_edits_do_what_they_say(walker: Walker, capsys: pytest.CaptureFixture[str]) -> None:
    said(walker, capsys, "jump layers.1.heads")
    before = walker.stepper.step.value
    said(walker, capsys, "swap token 1 -1")
    np.testing.assert_array_equal(walker.stepper.step.value, before[[0, 4, 2, 3, 1]])
    said(walker, capsys, "scale 0.5 token 1:3", "set -2 head 0 token 0")
    expected = before[[0, 4, 2, 3, 1]]
    expected[1:3] *= 0.5
    expected[0, 0] = -2
    np.testing.assert_array_equal(walker.stepper.step.value, expected)
    assert "   edited" in said(walker, capsys, "where")
    listed = said(walker, capsys, "edits").splitlines()
    assert listed == [
        f"  layers.1.heads: {words}" for words in ("swap token 1 -1", "scale 0.5 token 1:3", "set -2 head 0 token 0")
    ]
    said(walker, capsys, "undo", "undo", "undo")
    np.testing.assert_array_equal(walker.stepper.step.value, before)


def test_what_a_step_costs_and_why_a_token_is_likely(walker: Walker, capsys: pytest.CaptureFixture[str]) -> None:
    # w1 is (512, 224) in bf16; 5 tokens: 2 * 5 * 512 * 224 operations
    assert "1,146,880 operations, 229,376 bytes of weights" in said(walker, capsys, "jump gate", "cost")
    with refused(InputError, "`heads`"):
        said(walker, capsys, "jump scores", "cost")
    table = said(walker, capsys, "cost all")
    assert "GFLOP/s" in table
    assert re.search(r"^\| total", table, re.MULTILINE)
    assert "logit of" in said(walker, capsys, "why")
    assert "> " in said(walker, capsys, "source")
    assert said(walker, capsys, "compare") == "nothing has been edited\n"


@pytest.mark.parametrize(
    ("command", "facts"),
    [
        ("jump nowhere", ("step", "'nowhere'")),
        ("jump", ("name of a step",)),
        ("frobnicate", ("'frobnicate'", "no command", "help")),
        ("!ls", ("'!ls'", "no command")),
        ("show head 3", ("'head'", "no axis", "token, dim")),
        ("show token", ("axis", "number")),
        ("show token 99", ("token 99", "-5 to 4")),
        ("show token x", ("'x'", "number or range")),
        ("show token 3:3", ("token 3:3", "empty")),
        ("show token :", ()),
        ("zero dim 9999999999999", ("'9999999999999'", "number or range")),
        ("scale", ("factor",)),
        ("scale two", ("factor", "'two'")),
        ("swap token 1", ("swap", "axis", "two numbers")),
        ("swap token 1 0:2", ("swap", "two numbers", "ranges")),
        ("swap head 1 2", ("'head'", "no axis")),
        ("undo", ("nothing", "edited")),
        ("token", ("number of a token",)),
        ("token 77", ("token 77", "-5 to 4")),
        ("token 1:99", ()),
        ("head 8", ("head 8", "-8 to 7")),
        ("head abc", ("'abc'", "number or range")),
        ("next 0", ("count", 0, "whole number", 1)),
        ("next two", ("count", "'two'", "whole number", 1)),
        ("back 1.5", ("count", "'1.5'")),
        ("generate -1", ("count", -1)),
        ("into 3", ("into", "nothing", "'3'")),
        ("quit now", ("quit", "nothing", "'now'")),
        ("e 1", ("edits", "nothing", "'1'")),
        ("jump layers.9.q", ("'layers.9.q'", "layers 0 to 4")),
        ("jump hedas", ("'hedas'", "'heads'")),
        ("cost everything", ("cost", "nothing", "`all`")),
        ("merges 0", ("token 0", "<s>", "word")),
        ("merges 0:2", ("merges", "one token")),
        ("merges 99", ("token 99",)),
        ("help nonsense", ("'nonsense'", "no command")),
        ("\x1b[2J", (r"'\x1b[2J'", "no command")),
    ],
)
def test_a_mistake_is_one_line(
    walker: Walker, capsys: pytest.CaptureFixture[str], command: str, facts: tuple[object, ...]
) -> None:
    if not facts:
        said(walker, capsys, command)
        return
    with refused(InputError, *facts):
        said(walker, capsys, command)
    assert not walker.stepper.edits


def test_over_a_pipe_a_mistake_is_the_end() -> None:
    done = walk("next", "jump nowhere", "next")
    assert done.returncode == 2
    assert_complains(done.stderr, "step", "'nowhere'")
    assert done.stdout.rstrip().endswith("(layers.0) jump nowhere")


def test_every_command_has_its_line_in_the_help(walker: Walker, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(walker, capsys, "help")
    commands = {name.removeprefix("do_") for name in dir(Walker) if name.startswith("do_")} - {"EOF"}
    assert {line.split()[0] for line in text.splitlines()[:-1]} == commands
    for command in commands:
        assert said(walker, capsys, f"help {command}").startswith(command)


def test_the_ring_is_walked_over_a_cache() -> None:
    done = walk("jump layers.0.attention_weights", "map head 0", "top", options=("--last", "2"), text=LONG_TEXT)
    assert done.returncode == 0
    match = re.search(r"2 tokens from position (\d+)", done.stdout)
    assert match is not None
    first = int(match[1])
    assert f"head 8, query 2, key {64 + 1}" in done.stdout  # the window of 64, seen by either of two queries
    assert first > 64
    assert f"0 to 62 @{first - 63} to @{first - 1}  63 " in done.stdout  # what each column of the map is
    assert re.search(r"@\d+$", done.stdout, re.MULTILINE)  # keys from before the pass have positions


def test_keys_and_values_may_be_rounded(model: mistral_ref.Model) -> None:
    for options in ((), ("--last", "1")):
        plain, rounded = (
            walk("jump logits", "top", options=(*options, *more)).stdout for more in ((), ("--cache-dtype", "int8"))
        )
        assert plain != rounded, options


def test_a_planted_bug_shows(model: mistral_ref.Model) -> None:
    done = walk("jump layers.0.scores", "top head 6", options=("--broken", "tiled-heads"))
    assert "broken: tiled-heads" in done.stdout
    right = model.trace(TEXT, keep="layers.0.scores")["layers.0.scores"]
    assert f"{right[6].max():.4g}" not in done.stdout


# ---- in a terminal


class Terminal:
    """A process in a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            heed_signals()
            os.environ |= {"TERM": "dumb", "COLUMNS": "100"}
            os.execv(sys.executable, [sys.executable, "-m", "mistral_ref", *arguments])
        self.seen = ""

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """Return what was printed up to and with a text."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            if not select.select([self.fd], [], [], max(0, end - time.monotonic()))[0]:
                raise AssertionError(f"{text!r} was not printed, but {self.seen!r}")
            self.seen += os.read(self.fd, 65536).decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def interrupt_until(self, text: str) -> str:
        """Type Ctrl-C, and again after some seconds without the text; return what was printed up to and with it."""
        for _ in range(20):
            self.type("\x03")
            try:
                return self.wait_for(text, seconds=3)
            except AssertionError:
                pass
        raise AssertionError(f"{text!r} was not printed")

    def exit_status(self) -> int:
        """Return the exit status of a process that is about to end."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:  # what is left unread would keep it from ending
                if select.select([self.fd], [], [], 0.1)[0]:
                    os.read(self.fd, 65536)
            except OSError:
                pass
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
        raise AssertionError("it has not ended")


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal("step", TEXT)
    terminal.wait_for("(embedding) ")
    yield terminal
    if terminal.pid:
        os.kill(terminal.pid, signal.SIGKILL)
        os.waitpid(terminal.pid, 0)
    os.close(terminal.fd)


def test_a_walk_in_a_terminal(terminal: Terminal) -> None:
    terminal.type("\r")
    assert "feed-forward, rms" in terminal.wait_for("(layers.0) ")
    terminal.type("into\r")
    terminal.wait_for("(layers.0.attention_norm) ")
    terminal.type("nonsense\r")  # a mistake does not end the walk
    assert "is no command" in terminal.wait_for("(layers.0.attention_norm) ")
    terminal.type("jump scores\rmap head 1\r")
    assert "out of sight" in terminal.wait_for("out of sight")
    terminal.type("quit\r")
    assert terminal.exit_status() == 0


def test_ctrl_c_keeps_place_and_edits_in_a_terminal_and_ctrl_d_leaves(terminal: Terminal) -> None:
    terminal.type("\rzero\rgarbage")
    terminal.wait_for("garbage")
    terminal.interrupt_until("(layers.0) ")
    terminal.type("generate 9999\r")  # no "garbage" before it
    terminal.wait_for("generate 9999")
    time.sleep(0.5)
    assert "is no command" not in terminal.interrupt_until("interrupted")
    terminal.wait_for("(layers.0) ")
    terminal.type("edits\r")
    terminal.wait_for("layers.0.residual_after_ffn: zero")
    terminal.wait_for("(layers.0) ")
    terminal.type("\x04")
    assert terminal.exit_status() == 0


def test_commands_may_come_from_a_file_as_windows_stores_it() -> None:
    plain = run("step", TEXT, stdin="next\nquit\n")
    assert run("step", TEXT, stdin=b"\xef\xbb\xbfnext\r\nquit\r\n").stdout == plain.stdout


def test_ctrl_c_over_a_pipe_ends_it() -> None:
    with start(*COMMAND, "step", TEXT, stdin=subprocess.PIPE, encoding="utf-8") as process:
        assert process.stdout is not None
        while "rms" not in process.stdout.readline():
            pass
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "\n")


def test_a_reader_that_has_seen_enough_is_no_mistake() -> None:
    commands = "jump logits\n" + "show token 0\n" * 200
    with start(*COMMAND, "step", TEXT, stdin=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stdin is not None
        process.stdin.write(commands.encode())
        process.stdin.close()
        assert process.wait(timeout=60) == 0
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_closed_standard_input_is_one_line() -> None:
    done = subprocess.run(
        ["sh", "-c", f"'{sys.executable}' -m mistral_ref step x <&-"],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert_complains(done.stderr, "standard input", "closed")


def test_hostile_text_is_shown_and_not_obeyed() -> None:
    hostile = "\x1b[2J\x07 <script>alert(1)</script> \u202eevil\u202c שלום 🙂 $x_1$ [bold]"
    done = walk("into", "", "jump attention_weights", "map", "top", "predict", text=hostile)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "\x07" not in done.stdout
    assert "\u202e" not in done.stdout
    pieces = done.stdout.splitlines()[1].partition(": ")[2].split()
    assert "".join(pieces).startswith("<s>▁<0x1B><0x5B>2J<0x07>▁<0x3C>script<0x3E>alert")  # each byte by its name
