"""ARM processors, in another root: an emulator of one is enough. docs/contributing.md says how to set it up.

MISTRAL_REF_ARM is what stands before a command that runs there, such as "ROOT/run".
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import pytest

ARM = os.environ.get("MISTRAL_REF_ARM")
pytestmark = [pytest.mark.soak, pytest.mark.skipif(not ARM, reason="MISTRAL_REF_ARM is not set")]

PYTHON = "python3.11"
each_processor = pytest.mark.parametrize("cpu", ["generic", "apple-m1", "apple-m2"])  # NEON; dotprod; i8mm as well


def output_of(cpu: str, *arguments: str) -> str:
    """Return what a Python program prints whose kernels are compiled for an ARM processor; its tests have to pass."""
    environment = os.environ | {"NUMBA_CPU_NAME": cpu, "MISTRAL_REF_EXAMPLES": "5"}
    command = [*shlex.split(ARM or ""), PYTHON, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def run_tests(cpu: str, *chosen: str) -> None:
    """Run tests without pytest-xdist and its settings."""
    options = ["-p", "no:cacheprovider", "--rootdir", "/src", "-c", "/src/pyproject.toml"]
    options += ["-o", "addopts=--import-mode=importlib", "-o", "filterwarnings="]
    printed = output_of(cpu, "-m", "pytest", *options, *chosen)
    assert " passed" in printed


@each_processor
def test_sums_of_integers(cpu: str) -> None:
    run_tests(cpu, "/src/tests/kernels/test_dots.py")


@each_processor
@pytest.mark.parametrize("chosen", ["one", "many"])
def test_quantized_products(cpu: str, chosen: str) -> None:
    tests = f"{chosen} and (test_quantized_products or largest_sums)"
    run_tests(cpu, "/src/tests/kernels/test_quantized_products.py", "-k", tests)


@each_processor
@pytest.mark.parametrize("kind", ["q4_k", "q6_k"])
def test_products_in_tile_order(cpu: str, kind: str) -> None:
    run_tests(cpu, "/src/tests/kernels/test_packed_products.py", "-k", f"{kind} and tiles and (agree or largest_sums)")


@pytest.mark.parametrize("file", ["value", "team", "elementwise"])
def test_other_kernels(file: str) -> None:
    run_tests("apple-m2", f"/src/tests/kernels/test_{file}.py")


def test_the_demonstration_model_gives_the_logits_of_transformers_and_its_first_words() -> None:
    run_tests("apple-m2", "/src/tests/test_demo_model.py", "-k", "numba and (100 or first_words)")


def test_the_demonstration_story_is_the_same() -> None:
    """Written by two threads."""
    code = 'import mistral_ref; print(mistral_ref.load(threads=2).complete("Once upon a time", max_tokens=24))'
    here = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output_of("apple-m2", "-c", code) == here.stdout
