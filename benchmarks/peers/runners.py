"""What runs which weights, ours and each peer's, and the files that they read, written if necessary.

compare_peers.py and batches.py choose among them.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from common import notice, status
from peers.process import Runner

from mistral_ref.errors import InputError
from mistral_ref.files.build_weights import open_model
from mistral_ref.files.quantized_copy import quantize
from mistral_ref.measure.machine import work_folder
from mistral_ref.measure.shapes import SHAPES, shape
from mistral_ref.measure.synthetic import checkpoint_folder, make_checkpoint
from mistral_ref.weights import matrices

OURS = "mistral_ref"
NEEDS = {"llama.cpp": ("llama_cpp", "gguf"), "transformers": ("transformers", "torch")}
LLAMA_TYPES = {8: ["Q8_0"], 4: ["Q4_0", "Q4_K_M"]}


def add_weights_options(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """Add the options of which weights are measured, and how often; return the group of how they are rounded."""
    parser.add_argument("--model", metavar="DIR", help="take these weights, in Mistral's own layout")
    parser.add_argument("--shape", default="mistral-7b", help=f"{', '.join(SHAPES)} (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=8, metavar="N", help="of that shape (default: %(default)s)")
    parser.add_argument("--dtype", choices=["bf16", "f16", "f32"], default="bf16", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="default: one for each performance core")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=512, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--work-dir", metavar="DIR", help="for weights (default: in the user's cache folder)")
    rounded = parser.add_mutually_exclusive_group()
    rounded.add_argument(
        "--quantize", type=int, choices=[8, 4], metavar="BITS", help="round the weights to 8 or 4 bits"
    )
    return rounded


def installed_peers(asked: Sequence[str]) -> list[str]:
    """Return the peers that can be imported; say which cannot."""
    found = []
    for peer in asked:
        missing = [module for module in NEEDS[peer] if importlib.util.find_spec(module) is None]
        if missing:
            notice(f"{peer} is left out: {', '.join(missing)} is not installed")
        else:
            found.append(peer)
    return found


def checkpoint_of(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """Return the model's directory, made if necessary, and the one for what is written from it."""
    work = work_folder(arguments.work_dir)
    if arguments.model is not None:
        directory = Path(arguments.model).resolve()
        return directory, work / f"{directory.name}-{zlib.crc32(os.fsencode(directory)):08x}"
    config = shape(arguments.shape, layers=arguments.layers)
    directory = checkpoint_folder(arguments.shape, config, arguments.dtype, work)
    notice(f"weights: {directory}")
    return make_checkpoint(directory, config, kind=arguments.dtype), directory


def converted(source: Path, target: Path, convert: Callable[[], object]) -> None:
    """Write `target` unless it is there and newer than the weights."""
    weights = source / "consolidated.safetensors"
    if not target.exists() or (weights.exists() and target.stat().st_mtime < weights.stat().st_mtime):
        status(f"writing {target}")
        target.parent.mkdir(parents=True, exist_ok=True)
        convert()


def peer_file(peer: str, directory: Path, work: Path) -> Path:
    """Return the model as a peer reads it, written if necessary."""
    if peer == "llama.cpp":
        from peers.gguf_writer import write_gguf  # noqa: PLC0415 (needs the package gguf)

        path = work / "model.gguf"
        converted(directory, path, lambda: write_gguf(directory, path))
        return path
    from peers.hf_writer import write_huggingface  # noqa: PLC0415 (like the other one)

    path = work / "huggingface"
    converted(directory, path / "model.safetensors", lambda: write_huggingface(directory, path))
    return path


def matrix_bytes(directory: Path) -> tuple[int, float]:
    """Return the bytes of weights that a token reads, all but an embedding of its own, and the bits a weight."""
    _, weights = open_model(directory)
    every, read = (matrices(part) for part in (weights, (weights.layers, weights.output)))
    n_weights = sum(matrix.size for matrix in every)
    return sum(matrix.nbytes for matrix in read), 8 * sum(matrix.nbytes for matrix in every) / n_weights


def float_runners(arguments: argparse.Namespace, directory: Path, work: Path) -> list[Runner]:
    """Return what runs the weights as they are, ours first."""
    size = matrix_bytes(directory)
    runners = [Runner(OURS, OURS, directory, (), *size)]
    if any(matrix.kind == "bf16" for matrix in matrices(open_model(directory)[1])):
        runners.append(Runner(f"{OURS} bfloat16", OURS, directory, ["--bf16-inputs=bfloat16"], *size))
    if arguments.window:
        options = [f"--window={arguments.window}"]
        runners.append(Runner(f"{OURS} window {arguments.window}", OURS, directory, options, *size))
    peers = installed_peers(arguments.peers)
    return runners + [Runner(peer, peer, peer_file(peer, directory, work), (), *size) for peer in peers]


def gguf_runners(arguments: argparse.Namespace, directory: Path, work: Path) -> list[Runner]:
    """Return what reads the same GGUF files of packed types: ours with each kind of inputs, then llama.cpp."""
    if not installed_peers(["llama.cpp"]):
        raise InputError("--gguf needs llama.cpp, which writes the files: pip install llama-cpp-python gguf")
    runners = []
    for name in arguments.gguf:
        path = llama_file(directory, work, name, arguments.threads)
        ours = {name: path}
        if arguments.tile_order:
            tiles = work / f"{path.stem}-tiles"
            converted(path, tiles, partial(quantize, path, tiles))
            ours[f"{name} in tile order"] = tiles
        for label, where in ours.items():
            for inputs in ("int16", "int8"):
                options = [f"--quantized-inputs={inputs}"]
                runners.append(Runner(f"{OURS} {label}, {inputs}", OURS, where, options, *matrix_bytes(where)))
        runners.append(Runner(f"llama.cpp {name}", "llama.cpp", path, (), *matrix_bytes(path)))
    return runners


def llama_file(directory: Path, work: Path, name: str, threads: int) -> Path:
    """Return the weights as a GGUF file of one of llama.cpp's types, written if necessary."""
    from peers.gguf_writer import quantize_gguf  # noqa: PLC0415 (needs the package gguf)

    source, path = peer_file("llama.cpp", directory, work), work / f"model-{name}.gguf"
    converted(source, path, lambda: quantize_gguf(source, path, name, threads))
    return path


def quantized_runners(arguments: argparse.Namespace, directory: Path, work: Path) -> list[Runner]:
    """Return what runs the weights in 8 or 4 bits, ours first."""
    bits = arguments.quantize
    ours = work / f"int{bits}-head{arguments.head}"
    if ours.exists() and ours.stat().st_mtime < (directory / "consolidated.safetensors").stat().st_mtime:
        shutil.rmtree(ours)
    if not ours.exists():
        status(f"writing {ours}")
        quantize(directory, ours, bits, head=arguments.head)
    runners = [
        Runner(f"{OURS} int{bits}, {name}", OURS, ours, [f"--quantized-inputs={name}"], *matrix_bytes(ours))
        for name in ("int16", "int8")
    ]
    if "llama.cpp" not in installed_peers([peer for peer in arguments.peers if peer == "llama.cpp"]):
        return runners
    from peers.gguf_writer import gguf_bytes  # noqa: PLC0415 (needs the package gguf)

    plain = gguf_bytes(peer_file("llama.cpp", directory, work))
    n_weights = sum(n_bytes for name, n_bytes in plain.items() if "norm" not in name) * 8 / matrix_bytes(directory)[1]
    for name in LLAMA_TYPES[bits]:
        path = llama_file(directory, work, name, arguments.threads)
        sizes = {tensor: n_bytes for tensor, n_bytes in gguf_bytes(path).items() if "norm" not in tensor}
        unread = sizes["token_embd.weight"] if "output.weight" in sizes else 0
        total = sum(sizes.values())
        runners.append(Runner(f"llama.cpp {name}", "llama.cpp", path, (), total - unread, 8 * total / n_weights))
    return runners
