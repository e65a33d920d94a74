"""mistral-ref perplexity: options, figures, standard input, mistakes."""

from __future__ import annotations

import io
import json
import math
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.checkpoints import FAMILIES, write_consolidated
from support.errors import assert_complains
from support.tiny_tokenizers import PARAGRAPH, tiny_tokenizer

import mistral_ref
from mistral_ref import passes
from mistral_ref.cli import main
from mistral_ref.measure.perplexity import perplexity
from mistral_ref.text.sentencepiece import SentencePieceTokenizer

TOKENIZER = SentencePieceTokenizer(tiny_tokenizer())


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a tiny windowed model, meant for 100 tokens, and a tokenizer."""
    directory = tmp_path_factory.mktemp("models")
    family = FAMILIES["dense_windowed"]
    config = family.config.replace(vocab_size=TOKENIZER.vocab_size, max_seq_len=100)
    write_consolidated(directory, replace(family, config=config))
    (directory / "tokenizer.model").write_bytes(tiny_tokenizer())
    return directory


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "a text.txt"
    path.write_bytes(PARAGRAPH.encode())
    return path


def command(directory: Path, *arguments: object) -> int:
    return main(["perplexity", "--model", str(directory), "--backend", "numpy", *map(str, arguments)])


def figures(capsys: pytest.CaptureFixture[str], directory: Path, *arguments: object) -> dict[str, object]:
    assert command(directory, "--json", *arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


def test_json_holds_what_the_library_finds(
    model_dir: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = mistral_ref.load(model_dir, backend="numpy")
    found = perplexity(model, PARAGRAPH, context=40, stride=20)
    shown = figures(capsys, model_dir, text_file, "--context", 40, "--stride", 20)
    assert shown["tokens_per_second"] == pytest.approx(shown["tokens_evaluated"] / shown.pop("seconds"))
    assert shown == {
        "method": "strided",
        "context": 40,
        "stride": 20,
        "tokens": len(TOKENIZER.encode(PARAGRAPH)),
        "tokens_scored": found.n_scored,
        "tokens_evaluated": found.n_evaluated,
        "perplexity": found.perplexity,
        "perplexity_error": found.error,
        "nats_per_token": found.nll,
        "nats_per_token_error": found.nll_error,
        "bits_per_byte": found.nlls.sum() / math.log(2) / len(PARAGRAPH.encode()),
        "tokens_per_second": shown["tokens_per_second"],
        "backend": "numpy",
        "dtype": "float32",
        "threads": None,
    }


def test_by_default_halves_of_512_or_of_what_the_model_is_meant_for(
    model_dir: Path, text_file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shown = figures(capsys, model_dir, text_file)
    assert (shown["method"], shown["context"], shown["stride"], shown["bits_per_byte"]) == ("halves", 100, None, None)
    assert (
        shown["perplexity"]
        == perplexity(mistral_ref.load(model_dir, backend="numpy"), PARAGRAPH, context=100).perplexity
    )
    text_file.write_text(PARAGRAPH * 4)
    assert main(["perplexity", "--backend", "numpy", "--json", str(text_file)]) == 0
    assert json.loads(capsys.readouterr().out)["context"] == 512


def test_bits_per_byte_are_told_where_all_is_scored(
    model_dir: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    windows = (model_dir, text_file, "--context", 40, "--stride")
    assert figures(capsys, *windows, 39)["bits_per_byte"] > 0
    assert figures(capsys, *windows, 40)["bits_per_byte"] is None
    assert figures(capsys, *windows, 39, "--max-tokens", 100)["bits_per_byte"] is None
    assert figures(capsys, *windows, 39, "--max-tokens", 10_000)["bits_per_byte"] > 0
    assert command(*windows, 40) == 0
    assert "bits per byte" not in capsys.readouterr().out


def test_max_tokens_takes_the_beginning(model_dir: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = figures(capsys, model_dir, text_file, "--max-tokens", 50, "--context", 20)
    ids = TOKENIZER.encode(PARAGRAPH)[:50]
    assert (shown["tokens"], shown["tokens_scored"]) == (50, 18)
    assert shown["nats_per_token"] == perplexity(mistral_ref.load(model_dir, backend="numpy"), ids, context=20).nll


def test_float64_and_threads_reach_the_model(
    model_dir: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["perplexity", "--model", str(model_dir), "--dtype", "float64", "--json", str(text_file)]) == 0
    shown = json.loads(capsys.readouterr().out)
    model = mistral_ref.load(model_dir, dtype="float64")
    assert (shown["backend"], shown["dtype"]) == ("numpy", "float64")
    assert shown["nats_per_token"] == perplexity(model, PARAGRAPH, context=100).nll
    assert figures(capsys, model_dir, text_file, "--threads", 1)["threads"] == 1
    assert main(["perplexity", "--model", str(model_dir), "--threads", "1", str(text_file)]) == 0
    assert "numba, float32, 1 thread\n" in capsys.readouterr().out


def test_what_is_printed(model_dir: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = perplexity(mistral_ref.load(model_dir, backend="numpy"), PARAGRAPH, context=40, stride=20)
    assert command(model_dir, text_file, "--context", 40, "--stride", 20) == 0
    captured = capsys.readouterr()
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in captured.out.splitlines())
    n_tokens = len(TOKENIZER.encode(PARAGRAPH))
    assert rows["method"].startswith("windows of 40 tokens, 20 apart")
    assert rows["tokens"] == f"{n_tokens} in the text, {n_tokens - 1} scored"
    assert rows["perplexity"] == f"{found.perplexity:.6g} ± {found.error:.2g}"
    assert rows["nats per token"] == f"{found.nll:.6g} ± {found.nll_error:.2g}"
    assert float(rows["bits per byte"]) == pytest.approx(found.bits_per_byte(len(PARAGRAPH.encode())), rel=1e-5)
    assert re.fullmatch(rf"[\d,.]+ tokens/s, {found.n_evaluated:,} evaluated in \d+\.\d+ s", rows["speed"])
    assert rows["computed by"] == "numpy, float32"
    assert captured.err == ""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a directory with three texts, one of them in a directory of its own, and a hidden file."""
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    for name, text in {"b.txt": PARAGRAPH, "a.txt": PARAGRAPH[::-1], "more/c": PARAGRAPH * 2}.items():
        (folder / name).write_text(text)
    (folder / ".hidden").write_bytes(b"\xff")
    return folder


def test_several_files_have_a_row_each_and_one_together(
    model_dir: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [str(folder / name) for name in ("a.txt", "b.txt", "more/c")]
    alone = [figures(capsys, model_dir, name, "--stride", 50) for name in names]
    together = figures(capsys, model_dir, folder, "--stride", 50)
    assert [row.pop("file") for row in together["files"]] == names
    for row, one in zip(together["files"], alone, strict=True):
        assert row == {name: one[name] for name in row}
    scored = [one["tokens_scored"] for one in alone]
    assert len({*scored}) > 1  # a mean of the files would be another one
    mean = sum(one["nats_per_token"] * n for one, n in zip(alone, scored, strict=True)) / sum(scored)
    assert together["nats_per_token"] == pytest.approx(mean, rel=1e-12)
    assert together["perplexity"] == pytest.approx(math.exp(mean), rel=1e-12)
    bits = mean * sum(scored) / math.log(2) / sum(len(Path(name).read_bytes()) for name in names)
    assert together["bits_per_byte"] == pytest.approx(bits, rel=1e-12)
    for total in ("tokens", "tokens_scored", "tokens_evaluated"):
        assert together[total] == sum(one[total] for one in alone)
    again = figures(capsys, model_dir, *reversed(names), "--stride", 50)
    assert [row["file"] for row in again["files"]] == names[::-1]
    assert again["perplexity"] == pytest.approx(together["perplexity"], rel=1e-12)


def test_the_table_of_several_files(model_dir: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = figures(capsys, model_dir, folder, "--context", 40, "--stride", 40)
    assert shown["bits_per_byte"] is None
    assert command(model_dir, folder, "--context", 40, "--stride", 40) == 0
    table, _, rest = capsys.readouterr().out.partition("\n\n")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert rows[0] == ["file", "tokens", "scored", "perplexity", "nats per token"]
    assert [row[0] for row in rows[2:]] == [str(folder / name) for name in ("a.txt", "b.txt", "more/c")] + ["all"]
    for row, found in zip(rows[2:], [*shown["files"], shown], strict=True):
        assert row[2] == f"{found['tokens_scored']:,}"
        assert row[3] == f"{found['perplexity']:.6g} ± {found['perplexity_error']:.2g}"
    assert [line.split("  ")[0] for line in rest.splitlines()] == ["method", "speed", "computed by"]


def test_a_text_that_is_too_short_is_named_before_any_is_scored(
    model_dir: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "z.txt").write_text("the mill")
    monkeypatch.setattr(passes, "scores", None)
    assert_one_error(capsys, command(model_dir, folder), folder / "z.txt", "tokens", 100, "stride")
    (folder / "z.txt").write_bytes(b"\xff")
    assert_one_error(capsys, command(model_dir, folder), folder / "z.txt", "UTF-8")


def standard_input(data: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(data))


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_standard_input_is_the_same_text(
    arguments: list[str],
    model_dir: Path,
    text_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from_file = figures(capsys, model_dir, text_file)
    monkeypatch.setattr(sys, "stdin", standard_input(PARAGRAPH.encode()))
    piped = figures(capsys, model_dir, *arguments)
    assert piped["nats_per_token"] == from_file["nats_per_token"]


def test_how_a_text_is_stored_is_not_measured(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, windows = tmp_path / "plain.txt", tmp_path / "windows.txt"
    plain.write_bytes(PARAGRAPH.encode())
    windows.write_bytes(b"\xef\xbb\xbf" + PARAGRAPH.encode()[:-1] + b"\r\n")
    measured = ("tokens", "perplexity", "bits_per_byte")
    of_plain, of_windows = (figures(capsys, model_dir, file, "--stride", 50) for file in (plain, windows))
    assert [of_windows[name] for name in measured] == [of_plain[name] for name in measured]


def test_what_is_no_number_is_null(model_dir: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = figures(capsys, model_dir, text_file, "--max-tokens", 3, "--context", 3)
    assert (shown["tokens_scored"], shown["perplexity_error"], shown["nats_per_token_error"]) == (1, None, None)
    assert shown["perplexity"] > 1


def assert_one_error(capsys: pytest.CaptureFixture[str], status: int, *facts: object) -> None:
    captured = capsys.readouterr()
    assert (status, captured.out) == (2, "")
    assert_complains(captured.err, *facts)


def test_a_users_mistake_is_one_line_and_status_2(
    model_dir: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert_one_error(capsys, command(model_dir, tmp_path / "absent.txt"), "absent.txt", "No such file")
    (tmp_path / "nothing").mkdir()
    assert_one_error(capsys, command(model_dir, tmp_path / "nothing"), tmp_path / "nothing", "no file")
    for options, facts in {
        ("--context", 101): ("context", 101, "whole number", "3 to 100"),
        ("--context", 40, "--stride", 41): ("stride", 41, "whole number", "1 to 40"),
        ("--max-tokens", 1): ("--max-tokens", 1),
        ("--max-tokens", 50): ("text", "50 tokens", 100, "context", "stride"),
    }.items():
        assert_one_error(capsys, command(model_dir, text_file, *options), *facts)
    broken, empty = tmp_path / "broken.txt", tmp_path / "empty.txt"
    broken.write_bytes(b"caf\xe9 au lait")
    empty.touch()
    assert_one_error(capsys, command(model_dir, broken), "broken.txt", "UTF-8", "invalid continuation byte", 3)
    assert_one_error(capsys, command(model_dir, empty), "empty.txt", "is empty", "text")
    monkeypatch.setattr(sys, "stdin", standard_input(b"\xff"))
    assert_one_error(capsys, command(model_dir), "standard input", "UTF-8")
    monkeypatch.setattr(sys, "stdin", None)
    assert_one_error(capsys, command(model_dir), "no text", "file")
    without = tmp_path / "no tokenizer"
    without.mkdir()
    write_consolidated(without, FAMILIES["dense_windowed"])
    assert_one_error(capsys, command(without, text_file), without, "no tokenizer")


def test_ctrl_c_leaves_nothing_behind(
    model_dir: Path, text_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(passes, "scores", interrupted)
    assert command(model_dir, text_file) == 130
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "\n")


def test_a_bar_is_shown_for_long_texts_on_a_terminal(
    model_dir: Path, text_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert command(model_dir, text_file, "--context", 40) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("mistral_ref.cli.perplexity._LONG", 100)
    assert command(model_dir, text_file, "--context", 40) == 0
    captured = capsys.readouterr()
    assert "scoring" in captured.err
    assert "scoring" not in captured.out


@pytest.mark.slow
def test_the_examples_of_the_help_run_as_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main(["perplexity", "--help"])
    examples = [line for line in capsys.readouterr().out.splitlines() if " | mistral-ref perplexity" in line]
    assert len(examples) == 2
    for example in examples:
        generate, score = (shlex.split(part)[1:] for part in example.split(" | "))
        assert main(generate) == 0
        monkeypatch.setattr(sys, "stdin", standard_input(capsys.readouterr().out.encode()))
        assert main(score) == 0
        found = re.search(r"perplexity +(\S+) ± ", capsys.readouterr().out)
        assert found is not None
        assert 1 < float(found[1]) < 10


def test_token_ids_are_scored_as_the_text_is(
    model_dir: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = ",".join(map(str, TOKENIZER.encode(PARAGRAPH)))
    options = ("--context", 8, "--stride", 4)
    by_text = figures(capsys, model_dir, *options, text_file)
    by_ids = figures(capsys, model_dir, *options, "--ids", ids)
    assert by_ids["perplexity"] == by_text["perplexity"]
    assert by_text["bits_per_byte"]
    assert by_ids["bits_per_byte"] is None
    assert_one_error(capsys, command(model_dir, "--ids", ids, text_file), "file", "--ids")
