"""What the commands print: text from outside is shown and cannot act as a command of the terminal."""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
from support.checkpoints import FAMILIES, write_hf
from support.command import run
from support.errors import assert_complains
from support.hostile import header_of, tensor_file
from support.tiny_tokenizers import tiny_tokenizer

import mistral_ref

ERASE = "\x1b[2J"  # a terminal that gets this erases what it shows
SHOWN = r"\x1b[2J"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a model that says random bytes. Its name and a tensor's would erase a terminal."""
    directory = tmp_path_factory.mktemp("models") / f"{ERASE}\nmodel"
    directory.mkdir()
    family = FAMILIES["dense_windowed"]
    write_hf(directory, replace(family, config=family.config.replace(vocab_size=384)))
    (directory / "tokenizer.model").write_bytes(tiny_tokenizer())
    weights = directory / "model.safetensors"
    header, data = header_of(weights.read_bytes())
    ignored = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    weights.write_bytes(tensor_file(header | {f"vision_tower.{ERASE}\n": ignored}, data))
    return directory


def controls(text: str) -> set[str]:
    return {char for char in text if unicodedata.category(char) == "Cc"} - {"\n"}


@pytest.mark.filterwarnings("ignore:.*vision_tower")
def test_generated_text_is_exact_in_a_pipe_and_safe_on_a_terminal(model_dir: Path) -> None:
    prompt, drawing = f"{ERASE}\ta\n", {"temperature": 2.0, "top_p": 1.0, "seed": 4, "max_tokens": 60}
    options = [part for name, value in drawing.items() for part in (f"--{name.replace('_', '-')}", value)]
    command = ("generate", "--model", model_dir, "--backend", "numpy", *options, prompt)
    text = prompt + mistral_ref.load(model_dir, backend="numpy").complete(prompt, **drawing) + "\n"
    assert len(controls(text)) > 3
    assert run(*command).stdout == text
    on_terminal = run(*command, columns=400).stdout
    assert on_terminal == "".join(char if char in "\n\t" or not controls(char) else ascii(char)[1:-1] for char in text)


@pytest.mark.filterwarnings("ignore:.*vision_tower")
def test_a_continuation_of_compare_is_safe_on_a_terminal(model_dir: Path) -> None:
    command = ("compare", model_dir, model_dir, "--backend", "numpy", "--continue", 40, ERASE)
    text = mistral_ref.load(model_dir, backend="numpy").complete(ERASE, max_tokens=40)
    assert controls(text)
    assert f"A goes on: {text}\nB goes on: {text}\n" in run(*command).stdout
    assert controls(run(*command, columns=400).stdout) <= {"\t"}


def test_names_and_paths_are_shown_on_one_line(model_dir: Path, tmp_path: Path) -> None:
    model = ("--model", model_dir, "--backend", "numpy")
    page, values, small = (tmp_path / f"{ERASE}\n{name}" for name in ("page.html", "values.safetensors", "small"))
    for command, shown in {
        ("info", "--model", model_dir, "--tensors"): f"vision_tower.{SHOWN}\\n ",
        ("trace", *model, "a", "--no-cost", "-o", page): f"{SHOWN}\\npage.html: ",
        ("trace", *model, "a", "-o", values): f"{SHOWN}\\nvalues.safetensors: ",
        ("quantize", model_dir, small): f"{SHOWN}\\nsmall: ",
    }.items():
        done = run(*command)
        assert done.returncode == 0
        assert shown in done.stdout
        assert not controls(done.stdout + done.stderr)
        assert all(line.startswith("mistral-ref: note: ") for line in done.stderr.splitlines())


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "--model", f"{ERASE}\n", "a"),
        ("generate", "a", f"{ERASE}\n"),
        ("generate", f"--{ERASE}\n", "a"),
        ("trace", "a", "-o", f"{ERASE}\n"),
        ("trace", "--keep", f"{ERASE}\n", "a"),
        ("compare", "demo", f"{ERASE}\n.safetensors"),
        ("perplexity", f"{ERASE}\n.txt"),
        ("bench", "--model", f"{ERASE}\n"),
        (f"{ERASE}\n",),
    ],
)
def test_a_complaint_is_one_line_whatever_was_typed(command: tuple[str, ...]) -> None:
    done = run(*command, columns=400)
    assert (done.returncode, done.stdout) == (2, "")
    assert_complains(done.stderr, SHOWN)


def test_commands_of_a_walk_are_safe_on_a_terminal() -> None:
    done = run("step", "a", stdin=f"{ERASE}\n", columns=400)
    assert f"(embedding) {SHOWN}\n" in done.stdout
    assert not controls(done.stdout)
    assert_complains(done.stderr, SHOWN)


def test_a_message_of_the_library_is_one_line_whatever_the_path(tmp_path: Path) -> None:
    with pytest.raises(mistral_ref.MistralRefError) as caught:
        mistral_ref.load(tmp_path / f"{ERASE}\n\u202e")
    assert str(caught.value).isprintable()
    assert f"{SHOWN}\\n\\u202e" in str(caught.value)


def test_an_accepted_token_is_underlined_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mistral_ref.pace.Pace.length", lambda self, times, most: min(3, most))
    command = ("generate", "--backend", "numpy", "--temperature", 0, "--max-tokens", 20, "--lookup", "--mark-accepted")
    prompt = "Tom had a red ball. Tom had a red ball. Tom"
    shown, plain = run(*command, prompt, columns=400).stdout, run(*command, prompt).stdout
    assert shown.count("\x1b[4m") == shown.count("\x1b[24m") > 0
    assert shown.replace("\x1b[4m", "").replace("\x1b[24m", "") == plain
