"""The command line as a user meets it: good and bad input, Ctrl-C, a closed pipe."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from rich.cells import cell_len
from support.checkpoints import FAMILIES, write_consolidated, write_hf
from support.command import COMMAND, run, run_process, start
from support.errors import assert_complains
from support.marks import slow
from support.paths import ROOT
from support.tiny_tokenizers import tiny_tokenizer

import mistral_ref
from mistral_ref.cli import _COMMANDS
from mistral_ref.cli.common import read_prompt
from mistral_ref.text.sentencepiece import SentencePieceTokenizer

TOKENIZER = SentencePieceTokenizer(tiny_tokenizer())


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a tiny windowed model and a tokenizer, as Hugging Face would publish it."""
    directory = tmp_path_factory.mktemp("models") / "tiny model"
    directory.mkdir()
    family = FAMILIES["dense_windowed"]
    config = family.config.replace(vocab_size=TOKENIZER.vocab_size, max_seq_len=100_000)
    write_hf(directory, replace(family, config=config))
    (directory / "tokenizer.model").write_bytes(tiny_tokenizer())
    return directory


@pytest.fixture(scope="session", autouse=True)
def compiled_kernels(model_dir: Path) -> None:
    """Compile what the commands need, so that none of them has to say that it does."""
    for model in (mistral_ref.load(model_dir), mistral_ref.load()):
        model.complete("The mill", max_tokens=2)


def test_without_a_model_the_demonstration_model_answers() -> None:
    done = run_process("generate", "--temperature", 0, "--max-tokens", 20, "Once upon a time")
    text = mistral_ref.load().complete("Once upon a time", max_tokens=20)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", f"Once upon a time{text}\n")
    assert "bf16" in run("info", "--model", "demo").stdout.lower()


def test_generate_prints_the_prompt_and_what_the_library_generates(model_dir: Path) -> None:
    done = run("generate", "--model", model_dir, "--temperature", 0, "--max-tokens", 30, "The mill stood")
    text = mistral_ref.load(model_dir).complete("The mill stood", max_tokens=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"The mill stood{text}\n"
    options = ("--model", model_dir, "--temperature", 0, "--max-tokens", 30, "--no-echo")
    quiet = run("generate", *options, stdin="The mill stood\n")
    assert quiet.stdout == f"{text}\n"


@pytest.mark.parametrize(
    ("stored", "text"),
    [
        (b"\xef\xbb\xbfThe mill\r\n", "The mill"),
        (b"The\r\nmill\n\r\n", "The\r\nmill\n"),
        (b"The mill\r", "The mill\r"),
        (b"The mill\n\n", "The mill\n"),
        (b"\xef\xbb\xbf\r\n", ""),
        (b"\xef\xbb\xbf\xef\xbb\xbfThe", "\ufeffThe"),
    ],
)
def test_how_a_text_is_stored_is_not_part_of_the_prompt(stored: bytes, text: str) -> None:
    with mock.patch("sys.stdin", io.TextIOWrapper(io.BytesIO(stored))):
        assert read_prompt(argparse.Namespace(prompt=None, ids=None)) == text


def test_escapes_in_a_stop_text_are_a_newline_and_a_tab(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def generate(
        model: mistral_ref.Model, ids: list[int], *, stop: list[str], **_: object
    ) -> Iterator[mistral_ref.Token]:
        asked.append(stop)
        yield mistral_ref.Token(1, "", 0.0, "length")

    monkeypatch.setattr(mistral_ref.Model, "generate", generate)
    assert run("generate", "--stop", r"\n", "--stop", r"a\tb", "--stop", r"\\n\d", "A").returncode == 0
    assert asked == [["\n", "a\tb", r"\n\d"]]


def test_every_sampling_option_reaches_the_library(model_dir: Path) -> None:
    options = {"temperature": 1.5, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 5}
    text = mistral_ref.load(model_dir).complete("A", max_tokens=20, stop=["q"], **options)
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    done = run("generate", "--model", model_dir, *flags, "--max-tokens", 20, "--stop", "q", "--threads", 1, "A")
    assert done.stdout == f"A{text}\n"


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "--temperature", 0, "--max-tokens", 6),
        ("trace",),
        ("step",),
        ("compare", "MODEL", "MODEL"),
    ],
)
def test_token_ids_are_a_prompt(model_dir: Path, command: tuple[object, ...]) -> None:
    ids = mistral_ref.load(model_dir).token_ids("The mill")
    options = [model_dir if word == "MODEL" else word for word in command]
    options += [] if "compare" in command else ["--backend", "numpy", "--model", model_dir]
    by_text = run(*options, "The mill", stdin="next\n")
    for separator in (",", " ", ", "):
        by_ids = run(*options, "--ids", separator.join(map(str, ids)), stdin="next\n")
        assert (by_ids.returncode, by_ids.stdout) == (by_text.returncode, by_text.stdout)


def test_stats_go_to_standard_error(model_dir: Path) -> None:
    done = run("generate", "--model", model_dir, "--temperature", 0, "--max-tokens", 5, "--stats", "A mill")
    assert re.search(r"first token +\d+\.\d+ s after loading, \d+ prompt tokens", done.stderr)
    assert re.search(r"then +4 tokens in \d+\.\d+ s, \d+\.\d tokens/s", done.stderr)
    assert "tokens/s" not in done.stdout
    stopped = run("generate", "--temperature", 0, "--stop", "zzz", "--stop", ".", "--stats", "Once upon a time")
    assert re.search(r"ended by +stop '\.'$", stopped.stderr, re.MULTILINE)
    late = run("generate", "--max-seconds", 1e-9, "--stats", "Once upon a time")
    assert re.search(r"ended by +time$", late.stderr, re.MULTILINE)


@pytest.mark.parametrize("draft", [["--lookup"], ["--draft", "MODEL"]])
def test_a_draft_changes_no_text_and_its_success_is_told(model_dir: Path, draft: list[str]) -> None:
    prompt = "The mill stood. The mill stood. The mill"
    options = ("generate", "--model", model_dir, "--seed", 3, "--max-tokens", 60, "--stats", prompt)
    plain = run(*options)
    done = run(*options, *(model_dir if word == "MODEL" else word for word in draft), "--mark-accepted")
    assert (done.returncode, done.stdout) == (0, plain.stdout)
    if "drafts" in done.stderr:  # a draft that takes too long is not written
        accepted, drafted = re.search(r"drafts +(\d+) of (\d+) drafted tokens accepted", done.stderr).groups()
        assert 0 <= int(accepted) <= int(drafted)
    assert "drafts" not in plain.stderr


def test_a_prompt_cache_is_read_and_written(model_dir: Path, tmp_path: Path) -> None:
    path, prompt = tmp_path / "kept", "The mill stood by the river. "
    for text in (prompt, f"{prompt}The wheel", f"{prompt}The miller"):
        options = ("generate", "--model", model_dir, "--temperature", 0, "--max-tokens", 8, text)
        done = run(*options, "--prompt-cache", path)
        assert (done.returncode, done.stderr, done.stdout) == (0, "", run(*options).stdout)
        model = mistral_ref.load(model_dir)
        ids = model.token_ids(text)
        assert model.load_cache(path).tokens[: len(ids)] == ids
    for command in (("generate", "A"), ("chat",)):
        one_line_error(run(*command, "--prompt-cache", path, stdin="A\n"), path, "another configuration")
        missing = tmp_path / "none" / "kept"
        one_line_error(run(*command, "--prompt-cache", missing, stdin="A\n"), missing, "no such folder")
    chatted = tmp_path / "chatted"
    talked = run(
        "chat", "--model", model_dir, "--temperature", 0, "--max-tokens", 4, "--prompt-cache", chatted, stdin="A mill\n"
    )
    assert talked.returncode == 0
    assert model.load_cache(chatted).length > 3


def test_mistakes_in_options_of_drafts(model_dir: Path, tmp_path: Path) -> None:
    one_line_error(run("generate", "--draft-sampling", "A"), "--draft-sampling", "--draft MODEL")
    one_line_error(run("generate", "--lookup", "--draft", "demo", "A"), "--lookup", "--draft")
    one_line_error(run("generate", "--draft", tmp_path / "none", "A"), "none", "no such")
    one_line_error(run("generate", "--model", model_dir, "--draft", "demo", "A"), "draft", "vocabulary")
    one_line_error(run("generate", "--batch", "-", "--draft", "demo", stdin="A"), "--batch", "draft")


def test_top_logprobs_are_a_table_on_standard_error(model_dir: Path) -> None:
    model = mistral_ref.load(model_dir)
    options = {"max_tokens": 3, "top_logprobs": 2}
    tokens = list(model.generate("A mill", **options))
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    done = run("generate", "--model", model_dir, "--temperature", 0, *flags, "A mill")
    rows = [line.strip("|").split(" | ") for line in done.stderr.splitlines()[2:]]
    assert len(rows) == 3
    for row, token in zip(rows, tokens, strict=True):
        likely = [(token.id, token.logprob), *token.top_logprobs]
        assert [cell.strip() for cell in row] == [f"{model.piece(i)} {np.exp(p):.1%}" for i, p in likely]


def test_without_a_tokenizer_ids_are_printed(tmp_path: Path) -> None:
    write_consolidated(tmp_path, FAMILIES["dense_windowed"])
    ids = [token.id for token in mistral_ref.load(tmp_path).generate([1, 2], max_tokens=4)]
    options = ("--model", tmp_path, "--temperature", 0, "--max-tokens", 4)
    assert run("generate", *options, "--ids", "1,2").stdout.split() == list(map(str, [1, 2, *ids]))
    done = run("compare", tmp_path, tmp_path, "--ids", "1,2", "--continue", "4")
    assert done.stdout.splitlines()[-1].split()[-4:] == list(map(str, ids))
    one_line_error(run("generate", *options, "A"), "tokenizer", "--ids")


def test_info_shows_the_model(model_dir: Path) -> None:
    done = run("info", "--model", model_dir, "--tensors")
    config = mistral_ref.load(model_dir).config
    assert done.returncode == 0
    for line in (
        f"{config.n_heads} query heads over {config.n_kv_heads} key/value heads, each {config.head_dim} wide",
        "5 keys in every layer",
        f"{config.n_parameters:,}",
        "huggingface",
        "SentencePiece",
        "cache at 32768",
        "100,000 tokens, beside the weights",
    ):
        assert line in done.stdout
    row = next(line.split() for line in done.stdout.splitlines() if "layers.1.attention.wq.weight" in line)
    assert row[1:] == ["model.layers.1.self_attn.q_proj.weight", "F32", "48x40", "model.safetensors"]


def test_info_shows_every_switch(tmp_path: Path) -> None:
    write_consolidated(tmp_path, FAMILIES["ministral3"])
    done = run("info", "--model", tmp_path)
    for words in ("16 times 48 positions, attention factor 1", "beta 0.1, every 48 positions", "none; prompts are"):
        assert words in done.stdout
    mixtral = tmp_path / "mixtral"
    mixtral.mkdir()
    write_hf(mixtral, FAMILIES["mixtral"])
    assert "2 of 8 for each token" in run("info", "--model", mixtral).stdout


def test_info_counts_and_names_what_is_in_the_files(tmp_path: Path) -> None:
    for folder in ("single", "fused", "wrapped"):
        (tmp_path / folder).mkdir()
    write_hf(tmp_path / "single", FAMILIES["mixtral"])
    write_hf(tmp_path / "fused", FAMILIES["mixtral"], fused_experts=True)
    for folder in ("single", "fused"):
        shown = run("info", "--model", tmp_path / folder, "--tensors").stdout
        assert f"{FAMILIES['mixtral'].config.n_parameters:,}" in shown
    assert "model.layers.0.mlp.experts.gate_up_proj" in shown
    write_hf(tmp_path / "wrapped", FAMILIES["ministral3"], wrapper="v5")
    done = run("info", "--model", tmp_path / "wrapped", "--tensors")
    assert_complains(done.stderr, tmp_path / "wrapped", "vision_tower")
    assert "(ignored)" in done.stdout
    assert "model.language_model.layers.0.self_attn.q_proj.weight" in done.stdout


def test_info_names_added_tokens_and_ends_that_no_tokenizer_knows(tmp_path: Path) -> None:
    n_pieces = TOKENIZER.n_pieces
    family = FAMILIES["dense_windowed"]
    write_hf(tmp_path, replace(family, config=family.config.replace(vocab_size=n_pieces + 4)))
    (tmp_path / "tokenizer.model").write_bytes(tiny_tokenizer())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": n_pieces, "\x1b[2J": n_pieces + 1}))
    ends = [2, n_pieces, n_pieces + 3]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    rows = dict(re.findall(r"^  (\w.{17}) (.*)$", run("info", "--model", tmp_path).stdout, re.MULTILINE))
    rows = {name.strip(): value.strip() for name, value in rows.items()}
    assert rows["pieces"] == str(n_pieces)
    assert rows["added tokens"] == f"{n_pieces} <|im_end|>, {n_pieces + 1} \\x1b[2J"
    assert rows["ends with"] == f"2 </s>, {n_pieces} <|im_end|>, {n_pieces + 3} (unknown to the tokenizer)"


@pytest.mark.parametrize("command", [[], ["--help"], ["generate", "--help"], ["info", "--help"]])
def test_help_teaches(command: list[str]) -> None:
    done = run(*command)
    assert done.returncode == 0
    assert "usage: mistral-ref" in done.stdout


WALK = "help\nhelp show\nnext\ninto\nshow\njump scores\nmap\ntop\nsource\nzero head 3\npredict\nwhy\ncompare\n"
HELPS = ["", *_COMMANDS]


def without_blanks(text: str) -> str:
    """Return a text without blanks, and without what is added where a line is broken."""
    return re.sub(r"\\\n|\s|#", "", text)


@pytest.mark.parametrize("command", [*(f"{name} --help" for name in HELPS), "step --broken list", "info -m demo"])
def test_a_narrow_terminal_shows_the_same_words(command: str) -> None:
    wide, narrow = (run(*command.split(), columns=columns) for columns in (None, 40))
    assert max(map(cell_len, narrow.stdout.splitlines())) <= 40
    assert without_blanks(narrow.stdout) == without_blanks(wide.stdout)


@pytest.mark.parametrize(
    "command",
    [
        "info -m demo --tensors",
        "trace --backend numpy A",
        "compare demo demo --backend numpy --broken tiled-heads A",
        "perplexity --backend numpy --context 8 --stride 4",
        "bench --backend numpy -p 2 -n 2 -r 1",
        "step A",
    ],
)
def test_a_narrow_terminal_has_no_wide_tables(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setattr("mistral_ref.measure.machine.uncached_bytes", lambda _: 2**20)  # bench is quicker
    stdin = WALK if command == "step A" else "Once upon a time there was a red ball."
    done = run(*command.split(), stdin=stdin, columns=40)
    assert done.stdout
    assert [line for line in done.stdout.splitlines() if cell_len(line) > 40 and not line.startswith("(layers.")] == []


def one_line_error(done: subprocess.CompletedProcess[str], *facts: object) -> None:
    assert done.returncode == 2
    assert_complains(done.stderr, *facts)
    assert done.stdout == ""


def test_a_users_mistake_is_one_line_and_status_2(model_dir: Path, tmp_path: Path) -> None:
    one_line_error(run("no-such-command"), "'no-such-command'", "generate, chat, step")
    one_line_error(run("genrate", "A"), "'genrate'", "'generate'")
    one_line_error(run("generate", "--tempreature", "1", "A"), "--tempreature", "'--temperature'")
    one_line_error(run("generate", "--model", tmp_path / "absent", "A"), "absent", "no such directory")
    one_line_error(run("generate", "--model", model_dir / "config.json", "A"), "config.json", "not a directory")
    one_line_error(run("generate", "--model", tmp_path, "A"), tmp_path, "params.json")
    one_line_error(run("generate", "--model", model_dir, "--max-tokens", "many", "A"), "--max-tokens", "'many'")
    one_line_error(run("generate", "--model", model_dir, "--max-tokens", 0, "A"), "max_tokens", 0)
    one_line_error(run("generate", "--model", model_dir, "--temperature", "nan", "A"), "temperature", "nan")
    one_line_error(run("generate", "--model", model_dir, "--threads", 0, "A"), "threads", 0)
    one_line_error(run("generate", "--model", model_dir, "--no-such-option", "A"), "--no-such-option", "--help")
    one_line_error(run("generate", "Once", "upon", "a"), "upon a", "quotes", "--help")
    one_line_error(run("info", "nope"), "nope", "--model", "--help")
    one_line_error(run("generate", "--at-once", 2, "a"), "at-once", "--batch")
    one_line_error(run("generate", "--ids", "1,x"), "--ids", "'1,x'")
    one_line_error(run("generate", "--ids", "99999"), "99999", "2047")
    one_line_error(run("step", "--ids", "1,2", "A"), "--ids", "text")
    one_line_error(run("step"), "--ids", "no text")
    one_line_error(run("generate", "--model", model_dir, stdin=b"\xff"), "standard input", "UTF-8", 0)
    one_line_error(run("generate", "--model", model_dir, stdin="A".encode("utf-16")), "standard input", "UTF-16")


def test_a_truncated_file_is_one_line(model_dir: Path, tmp_path: Path) -> None:
    for file in model_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    n_bytes = weights.stat().st_size
    one_line_error(run("generate", "--model", tmp_path, "A"), weights, "truncated", f"{n_bytes} bytes")


@pytest.mark.parametrize(
    "locale", [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"LC_ALL": "C.UTF-8"}]
)
def test_text_is_utf8_whatever_the_locale(model_dir: Path, locale: dict[str, str]) -> None:
    text = mistral_ref.load(model_dir).complete("caf\N{LATIN SMALL LETTER E WITH ACUTE}", max_tokens=4)
    environment = os.environ | locale | {"PYTHONIOENCODING": "ascii"}
    options = ("--model", model_dir, "--temperature", 0, "--max-tokens", 4, "--no-echo", b"caf\xc3\xa9".decode())
    done = run_process("generate", *options, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == text.encode("ascii", "replace").decode() + "\n"


def test_a_full_disk_is_one_line(model_dir: Path) -> None:
    command = [*COMMAND, "info", "--model", str(model_dir)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert_complains(done.stderr, "standard output", "No space left")


def test_closed_standard_streams_are_no_traceback(model_dir: Path) -> None:
    arguments = f"{sys.executable} -m mistral_ref generate --max-tokens 2 --model '{model_dir}'"
    for shell in (f"{arguments} A >&-", f"{arguments} <&-", f"{arguments} A 2>&-"):
        done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, timeout=60, check=False)
        assert "Traceback" not in done.stderr
        assert done.returncode == (2 if "<&-" in shell else 0)


def test_an_empty_prompt_begins_with_bos_alone(model_dir: Path) -> None:
    done = run("generate", "--model", model_dir, "--temperature", 0, "--max-tokens", 4, "")
    assert done.stdout == mistral_ref.load(model_dir).complete([1], max_tokens=4) + "\n"


def test_ctrl_c_leaves_what_was_printed_and_exits_130(model_dir: Path) -> None:
    with start(*COMMAND, "generate", "--model", model_dir, "--max-tokens", 99000, "The mill") as process:
        assert process.stdout is not None
        printed = os.read(process.stdout.fileno(), 100)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert (printed + rest).startswith(b"The mill")
    assert errors.strip() == b""


# Runs the command, and presses Ctrl-C at the N-th import: counted from the first import of __main__, or counting only
# those that are made while a compiled module of PACKAGE is imported. Such a module may turn this into an error.
PRESSING = """
import os, runpy, sys
n = 0
def importing():
    frame = sys._getframe()
    while frame := frame.f_back:
        loader = frame.f_locals.get("self")
        if type(loader).__name__ == "ExtensionFileLoader":
            yield loader.name
def press(event, details):
    global n
    if event == "import" and (n or details[0] == "signal" or PACKAGE):
        n += not PACKAGE or any(name.startswith(PACKAGE) for name in importing())
        if n == N:
            os.kill(os.getpid(), 2)
sys.addaudithook(press)
"""
ENTRIES = {
    "python -m": "runpy.run_module('mistral_ref', run_name='__main__', alter_sys=True)",
    "mistral-ref": "from mistral_ref.__main__ import main; sys.exit(main())",
}


MOMENTS = [("", 1), ("", 60), *slow([*(("", n) for n in range(2, 600, 75)), *(("numba", n) for n in range(1, 6))])]


@pytest.mark.parametrize("moment", MOMENTS, ids=str)
@pytest.mark.parametrize("entry", ENTRIES)
def test_ctrl_c_while_modules_are_imported_is_no_traceback(
    model_dir: Path, entry: str, moment: tuple[str, int]
) -> None:
    code = f"PACKAGE, N = {moment!r}{PRESSING}{ENTRIES[entry]}"
    with start(sys.executable, "-c", code, "generate", "--model", model_dir, "--max-tokens", 99000, "A") as process:
        printed, errors = process.communicate(timeout=60)
    assert (process.returncode, printed, errors.strip()) == (130, b"", b"")


# Presses Ctrl-C in a function of llvmlite's that C calls when it has made code.
PRESSING_IN_C = """
import signal, time
from mistral_ref.__main__ import _interrupt
signal.signal(signal.SIGINT, _interrupt)
import numba
from llvmlite.binding.executionengine import ExecutionEngine
numba.njit(lambda x: x)(1)  # imports what compiling needs; an interrupted import would end the process
find = ExecutionEngine._find_module_ptr
def press(engine, pointer):
    ExecutionEngine._find_module_ptr = find
    signal.raise_signal(signal.SIGINT)
    return find(engine, pointer)
ExecutionEngine._find_module_ptr = press
try:
    numba.njit(lambda x: x + 1)(1)
    time.sleep(20)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.slow
def test_ctrl_c_in_a_function_that_c_calls_is_not_lost() -> None:
    with start(sys.executable, "-c", PRESSING_IN_C) as process:
        assert process.communicate(timeout=60) == (b"interrupted\n", b"")


def test_the_command_is_what_python_m_runs() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert scripts == {"mistral-ref": "mistral_ref.__main__:main"}


def test_a_reader_that_leaves_early_is_no_error(model_dir: Path) -> None:
    with start(*COMMAND, "generate", "--model", model_dir, "--max-tokens", 99000, "The mill") as process:
        assert process.stdout is not None
        os.read(process.stdout.fileno(), 20)
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait(timeout=30) == 0


@pytest.mark.slow
def test_commands_do_the_same_without_docstrings_and_assertions(model_dir: Path) -> None:
    options = ("--model", model_dir, "--backend", "numpy")
    walk = "".join(f"{line}\n" for line in ("help", "help show", "into", "source", "why", "quit"))
    for command, stdin in {
        ("generate", "--temperature", 0, "--max-tokens", 3, "A mill"): "",  # compiled
        ("info", "--model", model_dir): "",
        ("step", *options, "A mill"): walk,
        ("trace", *options, "A mill"): "",
        ("compare", model_dir, model_dir, "--broken", "tiled-heads", "A mill"): "",
        ("compare", "--help"): "",
    }.items():
        whole = run_process(*command, stdin=stdin)
        bare = run_process(*command, stdin=stdin, env=os.environ | {"PYTHONOPTIMIZE": "2"})
        assert (bare.returncode, bare.stdout) == (whole.returncode, whole.stdout)
        assert whole.stdout


def test_a_working_directory_that_is_gone_is_said(tmp_path: Path) -> None:
    code = """
import os, sys
from mistral_ref.cli import info, main
info.run = lambda arguments: os.getcwd()  # as Numba does when it compiles
os.chdir(sys.argv[1])
os.rmdir(sys.argv[1])
sys.exit(main(["info"]))
"""
    (tmp_path / "gone").mkdir()
    with start(sys.executable, "-c", code, tmp_path / "gone", text=True) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert_complains(errors, "working directory", "removed")


# -------------------------------------------------------------------------------------------------------------- memory


def test_keys_and_values_of_another_type(model_dir: Path) -> None:
    """They are what the library stores, and a type that does not exist is refused."""
    model = mistral_ref.load(model_dir)
    cache = model.new_cache(dtype="int8")
    text = model.complete("The mill", max_tokens=8, cache=cache)
    options = ("--model", model_dir, "--temperature", 0, "--max-tokens", 8)
    assert run("generate", *options, "--cache-dtype", "int8", "The mill").stdout == f"The mill{text}\n"
    said = run("chat", *options, "--cache-dtype", "int8", "--no-history", stdin="The mill\n")
    assert (said.returncode, text.strip() in said.stdout) == (0, True)
    one_line_error(run("generate", "--cache-dtype", "int4", "The mill"), "--cache-dtype", "int4")


def test_a_text_that_does_not_fit_is_refused_unless_one_insists(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mistral_ref.host._MUCH", 1)
    monkeypatch.setattr("mistral_ref.host.available_memory", lambda: 1000)
    monkeypatch.setattr("mistral_ref.memory.available_memory", lambda: 10**6)
    options = ("--model", model_dir, "--max-tokens", 2, "The mill")
    one_line_error(run("generate", *options), "memory", "1000 bytes", "--no-memory-check")
    assert run("generate", "--no-memory-check", *options).returncode == 0
    rows = [line for line in run("info", "--model", model_dir).stdout.splitlines() if "longest that fits" in line]
    assert [row.count(" as ") for row in rows] == [3]  # a figure for each type of cache


def test_generate_batch_continues_every_line_of_a_file(tmp_path: Path) -> None:
    prompts = ["Once upon a time", "The dog", "A bird", "Tom"]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    options = ("--max-tokens", 9, "--temperature", 0.7, "--top-p", 1, "--seed", 3, "--stop", ".")
    lines = run("generate", "--batch", file, "--at-once", 2, *options).stdout.splitlines()
    found = [json.loads(line) for line in lines]
    model = mistral_ref.load()
    for number, (line, prompt) in enumerate(zip(found, prompts, strict=True)):
        tokens = list(model.generate(prompt, max_tokens=9, temperature=0.7, seed=3 + number, stop="."))
        text = "".join(token.text for token in tokens)
        reason = tokens[-1].finish_reason
        assert line == {"prompt": prompt, "text": text, "tokens": len(tokens), "finish_reason": reason}
    piped = run("generate", "--batch", "-", *options, "--lookup", stdin="Once upon a time\n").stdout
    assert json.loads(piped) == found[0]
    line = json.loads(run("generate", "--batch", "-", *options, "--top-logprobs", 2, stdin="A bird\n").stdout)
    assert len(line["logprobs"]) == line["tokens"]
    first = next(model.generate("A bird", temperature=0.7, seed=3, top_logprobs=2))
    (piece, logprob), top = (model.piece(first.id), first.logprob), first.top_logprobs
    expected = [{"piece": model.piece(token), "logprob": value} for token, value in top]
    assert line["logprobs"][0] == {"piece": piece, "logprob": logprob, "top": expected}
    file.write_text("A\n\nB\n", encoding="utf-8")
    one_line_error(run("generate", "--batch", file), "line", 2, file)
    one_line_error(run("generate", "--batch", tmp_path / "none"), tmp_path / "none")
    one_line_error(run("generate", "--batch", "-", "--stats", stdin="A"), "--batch", "stats")
    one_line_error(run("generate", "--batch", "-", "A", stdin="A"), "--batch", "prompt")
