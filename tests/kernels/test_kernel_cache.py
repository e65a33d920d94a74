"""Kernels are compiled once for a machine and kept, and nothing that can befall what is kept does more than cost time.

Each test starts processes of its own, over a copy of the kernels with a cache of its own.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.errors import assert_says, unsaid

import mistral_kernels

pytestmark = pytest.mark.slow

KERNELS = Path(mistral_kernels.__file__).parent
NOBODY = 65534  # the number of a user who owns nothing

# Compiles one small kernel; prints every warning's category and message, and at last whether the kernel is right.
RUN = """
import warnings
import numpy as np
from mistral_kernels import panels

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    store = panels.new_store(3, 1, 2, np.dtype(np.float32))
    panels.write("float32")(store.k, store.v, np.array([1]), *np.full((2, 1, 1, 2), 7, np.float32))
for warning in caught:
    print(f"{warning.category.__name__}: {warning.message}")
print((panels.read(store, slice(0, 3))[0][:, 0, 0] == [0, 7, 0]).all())
"""


def compiles(lines: list[str]) -> bool:
    """Whether a run printed a warning that it compiles, once, and a right kernel."""
    return len(lines) == 2 and not unsaid(lines[0], "KernelWarning", "compiling") and lines[1] == "True"


class Package:
    """A copy of the kernels in a folder, whose processes keep what they compile beside it."""

    def __init__(self, folder: Path) -> None:
        self.sources = folder / "lib" / "mistral_kernels"
        self.cache = folder / "cache"
        shutil.copytree(KERNELS, self.sources, ignore=shutil.ignore_patterns("__pycache__"))
        self.environment = os.environ | {"PYTHONPATH": str(self.sources.parent), "NUMBA_CACHE_DIR": str(self.cache)}

    def run(self, code: str = RUN, **environment: str) -> list[str]:
        """Return the lines that a process prints."""
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=self.environment | {"PYTHONDONTWRITEBYTECODE": "1"} | environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    def kept(self) -> list[Path]:
        """Return the files that are kept."""
        return sorted(path for path in self.cache.rglob("*") if path.is_file())


@pytest.fixture
def package(tmp_path: Path) -> Package:
    return Package(tmp_path)


def test_a_second_process_compiles_nothing(package: Package) -> None:
    assert compiles(package.run())
    before = {path: path.read_bytes() for path in package.kept()}
    assert before
    assert package.run() == ["True"]
    assert {path: path.read_bytes() for path in package.kept()} == before


def test_a_second_process_compiles_nothing_through_the_public_face() -> None:
    """With the cache that users have: every kernel that a prompt and a token of the demonstration model need."""
    code = """
import warnings
import mistral_ref, mistral_kernels
warnings.simplefilter("error" if {strict} else "ignore", mistral_kernels.KernelWarning)
model = mistral_ref.load(backend="numba", threads=1)
cache = model.new_cache()
model.forward([1, 5, 6, 7, 8], cache)
model.forward([9], cache)
"""
    for strict in (False, True):
        command = [sys.executable, "-c", code.format(strict=strict)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr


def test_a_change_of_any_source_is_noticed(package: Package) -> None:
    """Not only of the file that the kernel stands in, which is all that Numba looks at by itself."""
    package.run()
    with open(package.sources / "simd.py", "a", encoding="utf-8") as source:
        source.write("# changed\n")
    assert compiles(package.run())
    assert package.run() == ["True"]


def test_kernels_of_another_width_are_others(package: Package) -> None:
    package.run(MISTRAL_KERNELS_LANES="4")
    assert compiles(package.run(MISTRAL_KERNELS_LANES="8"))
    assert package.run(MISTRAL_KERNELS_LANES="4") == ["True"]


def flip(content: bytes, bit: int) -> bytes:
    return content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "longer": lambda content: content + b"\0",
    "zeros": lambda content: bytes(len(content)),
    "text": lambda content: b"<html>no space left</html>\n" * 9,
    "another pickle": lambda content: b"\x80\x04K\x01.",
    "a pickle that fits its checksum": lambda content: hashlib.sha256(b"\x80\x04K\x01.").digest() + b"\x80\x04K\x01.",
    "first bit": lambda content: flip(content, 0),
    "a bit in the code": lambda content: flip(content, 4 * len(content)),
    "last bit": lambda content: flip(content, 8 * len(content) - 1),
}


def test_damaged_files_are_compiled_again(package: Package) -> None:
    package.run()
    for name, damage in DAMAGES.items():
        (path,) = package.kept()
        path.write_bytes(damage(path.read_bytes()))
        assert compiles(package.run()), name


def test_a_missing_file_is_compiled_again(package: Package) -> None:
    package.run()
    (path,) = package.kept()
    path.unlink()
    assert compiles(package.run())
    assert package.run() == ["True"]


def test_without_a_folder_to_write_in_kernels_work_and_a_warning_says_so(package: Package, tmp_path: Path) -> None:
    """Beside the sources, where NUMBA_CACHE_DIR points and where a home would be there are files in place of folders,
    which stop even root.
    """
    (package.sources / "__pycache__").touch()
    blocked = tmp_path / "blocked"
    blocked.touch()
    homes = dict.fromkeys(["HOME", "XDG_CACHE_HOME", "LOCALAPPDATA", "USERPROFILE"], str(blocked / "home"))
    for cache in ("", str(blocked), str(blocked / "deeper")):
        *messages, right = package.run(NUMBA_CACHE_DIR=cache, **homes)
        assert right == "True"
        assert [not unsaid(message, "KernelWarning", "kernels", "kept") for message in messages] == [False, True]


TWO_KERNELS = """
import warnings
from mistral_kernels import panels
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    panels.write("float32"), panels.write("uint16")
print(*[str(warning.message).split(":")[0] for warning in caught], sep="; ")
"""


def test_each_notice_is_given_once(package: Package) -> None:
    package.cache.touch()  # a file where the folder should be
    (said,) = package.run(TWO_KERNELS)
    assert [not unsaid(message, "kept") for message in said.split("; ")].count(True) == 1
    assert_says(said, "write_float32", "write_uint16")


# Imports come first: the other user may not be allowed to read the files of this Python.
BECOME_ANOTHER = f"""
import os
from numba.core.registry import cpu_target
from mistral_kernels import panels
cpu_target.target_context.refresh()
os.setuid({NOBODY})
"""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user")
def test_kernels_beside_the_sources_serve_a_user_who_has_no_home() -> None:
    """As in a container whose image an administrator made."""
    nowhere = {"NUMBA_CACHE_DIR": "", "HOME": "/nonexistent", "XDG_CACHE_HOME": ""}
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to others
        os.chmod(folder, 0o755)
        package = Package(Path(folder))
        assert compiles(package.run(**nowhere))
        assert [path.suffix for path in (package.sources / "__pycache__").iterdir()] == [".kernel"]
        assert package.run(f"{BECOME_ANOTHER}\n{RUN}", **nowhere) == ["True"]


def test_a_folder_that_vanishes_while_kernels_are_compiled_is_a_warning(package: Package) -> None:
    code = f"""
from mistral_kernels import kept
import shutil
save = kept.save
def vanishing(*arguments):
    shutil.rmtree({str(package.cache)!r}, ignore_errors=True)
    open({str(package.cache)!r}, "w").close()
    save(*arguments)
kept.save = vanishing
"""
    *messages, right = package.run(code + RUN)
    assert right == "True"
    assert any(not unsaid(message, "KernelWarning", "kernels", "kept") for message in messages)


# What two processes do to one cache. Numba numbers the functions that it compiles, process by process, and one number
# may mean two functions.

CHECK = """
import numpy as np
from mistral_kernels.matvec import ONE, matvec

def check(kind):
    W = np.array([[1, 2, 3]] * 9, np.float32)
    W = W.astype(np.float16) if kind == "f16" else (W.view(np.uint32) >> 16).astype(np.uint16)
    y = np.zeros((1, 9), np.float32)
    matvec(kind, ONE)(W.view(np.uint8).ravel(), np.ones((1, 1), np.float32), np.ones((1, 3), np.float32), y, 1)
    print(kind, y[0, 0])
"""


def test_kernels_that_separate_processes_compiled_do_not_mix_in_a_third(package: Package) -> None:
    for kind in ("f16", "bf16"):
        assert package.run(f"{CHECK}\ncheck({kind!r})")[-1] == f"{kind} 6.0"
    for order in (["f16", "bf16"], ["bf16", "f16"]):
        assert package.run(f"{CHECK}\nfor kind in {order}: check(kind)") == [f"{kind} 6.0" for kind in order]


def test_processes_that_compile_one_kernel_at_once_leave_one_whole_file(package: Package) -> None:
    with ThreadPoolExecutor(2) as at_once:
        for lines in at_once.map(lambda _: package.run(), range(2)):
            assert lines[-1] == "True"
    assert len(package.kept()) == 1
    assert package.run() == ["True"]


# ----------------------------------------------------------------------------------------------------- without Numba


def run_library(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_numpy_alone_goes_without_numba() -> None:
    code = """
import sys
import mistral_ref
mistral_ref.load(backend="numpy").forward([1, 2])
mistral_ref.load(dtype="float64").forward([1, 2])
assert not {"numba", "llvmlite"} & {name.partition(".")[0] for name in sys.modules}
"""
    done = run_library(code)
    assert done.returncode == 0, done.stderr


ERROR = """
import mistral_ref
try:
    mistral_ref.load()
except mistral_ref.InputError as error:
    print(error)
"""


@pytest.mark.parametrize("variable", [{"NUMBA_DISABLE_JIT": "1"}, {"MISTRAL_KERNELS_LANES": "5"}], ids=str)
def test_where_kernels_cannot_be_compiled_one_line_names_the_other_backend(variable: dict[str, str]) -> None:
    done = run_library(ERROR, **variable)
    assert done.returncode == 0, done.stderr
    assert_says(done.stdout.removesuffix("\n"), *variable, "backend='numpy'")
    plain = run_library("import mistral_ref; print(len(mistral_ref.load(backend='numpy').forward([1])))", **variable)
    assert plain.stdout == "1\n", plain.stderr


def test_without_numba_one_line_names_the_other_backend(tmp_path: Path) -> None:
    """As on a machine for which there is no Numba: a module of that name that cannot be imported."""
    (tmp_path / "numba.py").write_text("raise ImportError('No module named numba')\n", encoding="utf-8")
    done = run_library(ERROR, PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    assert done.returncode == 0, done.stderr
    assert_says(done.stdout.removesuffix("\n"), "numba", "backend='numpy'")
