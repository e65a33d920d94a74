"""What a server does in hours: memory and speed stay flat, and texts the same. And the oldest dependencies."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import tomllib
from itertools import islice
from pathlib import Path

import pytest
from support.paths import ROOT

import mistral_ref
from mistral_ref.host import process_memory

pytestmark = pytest.mark.soak

MIB = 2**20
PROMPT = "Once upon a time there was a little girl"


def own_memory() -> int:
    """Return the bytes of this process that are not mapped from a file; skip where the system does not tell."""
    gc.collect()
    found = process_memory(os.getpid())["anonymous"]
    if found is None:
        pytest.skip("the system does not tell this process's memory")
    return found


def test_a_text_far_past_its_window_takes_no_more_memory_or_time() -> None:
    """20,000 tokens over windows of 64."""
    model = mistral_ref.load(threads=1)
    model.eos_ids = frozenset()  # the text goes on where the model would end it
    tokens = model.generate(PROMPT, max_tokens=20_000, temperature=1.0, seed=1)
    seconds, memory = [], []
    for _ in range(20):
        started = time.process_time()
        assert len(list(islice(tokens, 1000))) == 1000
        seconds.append(time.process_time() - started)
        memory.append(own_memory())
    assert memory[-1] - memory[1] < 4 * MIB, memory
    assert min(seconds[-5:]) < 1.2 * min(seconds[:5]), seconds  # the least: other programs may be running


def test_models_that_are_loaded_and_dropped_leave_nothing_behind() -> None:
    texts, memory = set(), []
    for number in range(200):
        model = mistral_ref.load(threads=1)
        texts.add(model.complete(PROMPT, max_tokens=8))
        del model
        if number % 20 == 19:
            memory.append(own_memory())
    assert len(texts) == 1
    assert memory[-1] - memory[1] < 4 * MIB, memory
    if sys.platform == "linux":
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
        assert maps.count("consolidated.safetensors") == 0


@pytest.mark.parametrize("n_models", [1, 3])
def test_eight_threads_write_what_one_writes(n_models: int) -> None:
    models = [mistral_ref.load(threads=2) for _ in range(n_models)]
    prompts = [PROMPT, "Tom had a red ball.", "Lily saw a", "One day"]
    expected = {prompt: models[0].complete(prompt, max_tokens=100) for prompt in prompts}
    wrong: list[str] = []

    def write(thread: int) -> None:
        for turn in range(10):
            prompt = prompts[(thread + turn) % len(prompts)]
            found = models[thread % n_models].complete(prompt, max_tokens=100)
            if found != expected[prompt]:
                wrong.append(found)

    memory = []
    for _ in range(3):
        threads = [threading.Thread(target=write, args=[thread]) for thread in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        memory.append(own_memory())
    assert wrong == []
    assert memory[-1] - memory[0] < 16 * MIB, memory  # arrays that are kept for all eight


def test_the_suite_passes_with_the_oldest_versions_that_are_allowed(tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", *(package.replace(">=", "==") for package in wanted)]
    installed = subprocess.run([*install, "-e", ROOT], capture_output=True, text=True, check=False)
    if "from versions: none" in installed.stderr:  # no package index can be reached
        pytest.skip("the oldest versions cannot be downloaded")
    assert installed.returncode == 0, installed.stderr
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTEST_ADDOPTS")}
    tested = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert tested.returncode == 0, tested.stdout[-3000:]
