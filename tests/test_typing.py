"""What a type checker makes of a program that uses this package: right uses pass, and wrong ones are found."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

import mistral_kernels
import mistral_ref
from mistral_ref import Model
from mistral_ref.generation import GenerationSettings

# Each comment hides an error. mypy complains of a comment that hides none, so a wrong use that passes fails, too.
PROGRAM = """
import asyncio
import copy
from pathlib import Path

import numpy as np

import mistral_ref
from mistral_ref import KVCache, Model, Token, lens
from mistral_ref.generation import GenerationSettings


def forbid(ids: list[int], logits_V: np.ndarray) -> np.ndarray:
    logits_V[ids[-1]] = -np.inf
    return logits_V


def use(model: Model) -> str:
    cache: KVCache = model.new_cache(max_tokens=100, dtype="float16")
    tokens: list[Token] = list(model.generate("Once", stop=["END", 2], prompt_cache=cache, top_logprobs=5))
    first = next(model.generate([1, 2], logits_processor=forbid, max_seconds=1.5, top_k=None, seed=3))
    first_id: int = first.id
    likeliest: list[tuple[int, float]] = list(first.top_logprobs)
    stop: str | int | None = first.stop
    if first.finish_reason == "time" and first.kind == "text":
        cache.truncate(cache.length - 1)
    ids: list[int] = cache.tokens
    settings: GenerationSettings = {"temperature": 0.7, "cache": copy.deepcopy(cache)}
    text: str = model.complete(np.array(ids), **settings) + model.complete("Once", stop="END", seed=None)
    logprobs: np.ndarray = model.score(text)
    best: np.ndarray = model.score(text, top=5).top_ids
    vector: np.ndarray = model.embed(text) + logprobs.sum() + best.sum()
    lens.attention(model.trace(text), layer=0, head=first_id)
    cache.save(Path("cache"))
    return text + str((tokens, likeliest, stop, vector))


async def read(model: Model) -> str:
    return "".join([token.text async for token in model.generate("Once")])


def misuse(model: Model, token: Token) -> None:
    model.complete("Once", max_token=3)  # type: ignore[call-arg]
    model.complete("Once", max_tokens="3")  # type: ignore[arg-type]
    model.complete("Once", 3)  # type: ignore[call-arg]
    model.complete("Once", stop=1.5)  # type: ignore[arg-type]
    model.complete("Once", logits_processor=lambda logits: logits)  # type: ignore[misc, arg-type]
    model.generate("Once", temprature=1)  # type: ignore[call-arg]
    model.generate("Once", cache="cache")  # type: ignore[arg-type]
    model.generate(3)  # type: ignore[arg-type]
    settings: GenerationSettings = {"max_tokens": None}  # type: ignore[typeddict-item]
    model.score("Once", top=5).sum()  # type: ignore[attr-defined]
    model.score("Once").top_ids  # type: ignore[attr-defined]
    token.finish_reason == "tiem"  # type: ignore[comparison-overlap]
    token.id = 3  # type: ignore[misc]
    len(token.id)  # type: ignore[arg-type]
    mistral_ref.laod()  # type: ignore[attr-defined]


print(use(mistral_ref.load()), asyncio.run(read(mistral_ref.load(backend="numpy"))))
"""


@pytest.mark.parametrize("package", [mistral_ref, mistral_kernels], ids=lambda package: package.__name__)
def test_type_checkers_are_told_that_a_package_is_typed(package: object) -> None:
    assert (Path(inspect.getfile(package)).parent / "py.typed").is_file()


@pytest.mark.slow
def test_a_strict_type_checker_takes_right_uses_and_finds_wrong_ones(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is not installed")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent", program]
    where = {"MYPYPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=where, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout


def test_the_settings_that_are_handed_on_are_those_of_generate() -> None:
    parameters = inspect.signature(Model.generate).parameters.values()
    expected = {one.name: one.annotation for one in parameters if one.kind is one.KEYWORD_ONLY}
    assert {name: type_.__forward_arg__ for name, type_ in GenerationSettings.__annotations__.items()} == expected
