"""mistral-ref info: show what a model's directory or GGUF file holds; nothing is computed."""

from __future__ import annotations

import argparse
import math
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import numpy as np

import mistral_ref
from mistral_ref.cache import CACHE_DTYPES
from mistral_ref.cli.common import add_adapter_option, add_model_option, add_window_option
from mistral_ref.cli.output import say
from mistral_ref.cli.width import fitted, terminal_width
from mistral_ref.config import ModelConfig
from mistral_ref.display import list_of_rows
from mistral_ref.errors import InputError, escaped, size
from mistral_ref.files.adapter_file import read_adapter
from mistral_ref.files.adapters import with_adapters
from mistral_ref.files.build_weights import checkpoint_of, open_gguf_of, open_model
from mistral_ref.files.checkpoint import Checkpoint, open_checkpoint
from mistral_ref.files.gguf import Texts
from mistral_ref.files.hub import cache_folder, models
from mistral_ref.files.paths import begins_gguf_model, checked_model, is_gguf
from mistral_ref.files.tensor_file import DTYPES, Tensor
from mistral_ref.files.tensor_names import huggingface_name
from mistral_ref.memory import longest_context
from mistral_ref.weights import matrices

_LENGTHS = (1024, 4096, 32768, 131072)


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the command line."""
    parser = commands.add_parser(
        "info",
        help="show what a model's files hold",
        description="Show a model's architecture, its files and the types of its weights, the memory that it needs, "
        "and its tokenizer; of a GGUF file all that it says. Without --model: list the models in the cache of the "
        "Hugging Face Hub that can be loaded. With --adapter: show what an adapter holds. Nothing is computed.",
    )
    add_model_option(parser, None, "list the models in the cache; --model demo is the demonstration model")
    add_window_option(parser)
    add_adapter_option(parser)
    parser.add_argument(
        "--tensors", action="store_true", help="also list every tensor with its names, dtype, shape and file"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print what a model's files hold; without a model, which models the hub's cache holds."""
    if arguments.model is None:
        given = {"--tensors": arguments.tensors, "--window": arguments.window is not None}
        if found := [name for name, is_given in given.items() if is_given]:
            raise InputError(f"{found[0]} is for one model; expected --model, too")
        print_adapters(arguments.adapter)
        if not arguments.adapter:
            print_cached()
        return
    model = mistral_ref.load(arguments.model, backend="numpy", window=arguments.window)
    path = checked_model(arguments.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mistral_ref.MistralRefWarning)  # they are shown elsewhere
        with_adapters(model.config, model.weights, arguments.adapter)  # raises an error if one does not fit
        gguf = open_gguf_of(path)
        metadata = {} if gguf is None else gguf.metadata
        checkpoint = checkpoint_of(path, gguf)
    print_rows("architecture", architecture(model.config))
    print_rows("checkpoint", files(checkpoint, model))
    print_rows("memory", memory(model, checkpoint))
    print_rows("tokenizer", tokenizer(model))
    print_adapters(arguments.adapter)
    if metadata:
        print_rows("metadata", {escaped(name): shortened(value) for name, value in metadata.items()})
    if arguments.tensors:
        print_tensors(checkpoint)


def print_cached() -> None:
    """Print the name, the layout and the size of each model in the hub's cache that can be loaded."""
    rows: dict[str, object] = {}
    others: dict[str, object] = {}
    for name in cached_names():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", mistral_ref.MistralRefWarning)  # load gives them
            try:
                path = checked_model(name)
                weights = open_model(path)[1]
                layout = "gguf" if is_gguf(path) else open_checkpoint(path).layout
            except mistral_ref.MistralRefError:
                others[escaped(name)] = f"mistral-ref doctor {escaped(name)} says why"
                continue
        rows[escaped(name)] = f"{layout}, {size(sum(matrix.nbytes for matrix in matrices(weights)))}"
    print_rows(f"models in the hub's cache, {escaped(str(cache_folder()))}", rows or {"none": "that can be loaded"})
    if others:
        print_rows("cannot be loaded", others)
    say(fitted("mistral-ref info --model demo shows the demonstration model"))


def cached_names() -> Iterator[str]:
    """Yield the name of each model in the hub's cache: of GGUF files each, if no safetensors files are beside them."""
    for name, snapshot in models():
        files = [] if any(snapshot.glob("*.safetensors*")) else sorted(snapshot.rglob("*.gguf"))
        ggufs = [file.relative_to(snapshot).as_posix() for file in files if begins_gguf_model(file.name)]
        yield from [f"{name}/{file}" for file in ggufs] or [name]


def print_adapters(adapters: Sequence[tuple[str, float]]) -> None:
    """Print what each of these adapters holds; the numbers are what their scales are multiplied by."""
    for path, factor in adapters:
        adapter = read_adapter(path)
        pairs = adapter.pairs.values()
        matrices_of = Counter(name.rpartition(".")[2] for name in adapter.pairs)
        rows: dict[str, object] = {
            "made by": adapter.form.made_by,
            "file": escaped(str(adapter.path)),
            "matrices": ", ".join(f"{n} {name}" for name, n in matrices_of.items()),
            "layers": len({name.split(".")[1] for name in adapter.pairs}),
            "rank": span(pair.a.shape[0] for pair in pairs),
            "scale": span(pair.scale * factor for pair in pairs),
            "stored as": ", ".join(sorted({DTYPES[pair.a.kind] for pair in pairs})),
            "size in memory": size(sum(pair.a.nbytes + pair.b.nbytes for pair in pairs)),
        }
        print_rows("adapter", rows)


def span(numbers: Iterable[float]) -> str:
    """Return the least and the largest of some numbers in words, or the one that all of them are.

    >>> span([2.0, 0.5]), span([16, 16])
    ('0.5 to 2', '16')
    """
    least, *_, largest = sorted([*numbers] * 2)
    return f"{least:g}" if least == largest else f"{least:g} to {largest:g}"


def print_rows(title: str, rows: dict[str, object]) -> None:
    """Print a title, and below it rows of names and values; the values are aligned."""
    say(fitted(title))
    width = max(20, *(len(name) + 2 for name in rows))
    for name, value in rows.items():
        say(fitted(f"  {name:<{width}}{value}"))


def shortened(value: object) -> str:
    """Return a value of a GGUF file's metadata in at most 100 characters; of an array its number of members."""
    if isinstance(value, np.ndarray | Texts):
        return f"{len(value):,} {'texts' if isinstance(value, Texts) else 'numbers'}"
    text = escaped(value[:200]) if isinstance(value, str) else str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def architecture(config: ModelConfig) -> dict[str, object]:
    """Return the rows about the configuration, the most important first."""
    rows: dict[str, object] = {
        "layers": config.n_layers,
        "width": f"{config.dim}, feed-forward {config.hidden_dim}",
        "heads": f"{config.n_heads} query heads over {config.n_kv_heads} key/value heads, each {config.head_dim} wide",
        "vocabulary": config.vocab_size,
        "window": windows(config),
        "RoPE": f"theta {config.rope_theta:g}, pairs {config.rope_row_order} in the rows of wq and wk",
        "norm eps": f"{config.norm_eps:g}",
        "longest sequence": config.max_seq_len or "not given",
    }
    if config.yarn:
        rows["YaRN"] = (
            f"{config.yarn.factor:g} times {config.yarn.original_max_position_embeddings} positions, "
            f"attention factor {config.yarn.attention_factor:.4g}"
        )
    if config.query_temperature:
        temperature = config.query_temperature
        rows["query temperature"] = (
            f"beta {temperature.beta:g}, every {temperature.original_max_position_embeddings} positions"
        )
    if config.moe:
        rows["experts"] = f"{config.moe.num_experts_per_tok} of {config.moe.num_experts} for each token"
    return rows


def windows(config: ModelConfig) -> str:
    """Return the windows in words, such as "4096 keys in every layer" or "all keys in 1, 32768 keys in 3 layers"."""
    runs = [(window, len(list(layers))) for window, layers in groupby(config.sliding_window)]
    words = [("all keys" if window is None else f"{window} keys", n) for window, n in runs]
    if len(words) == 1:
        return f"{words[0][0]} in every layer"
    return ", ".join(f"{keys} in {n}" for keys, n in words[:4]) + (
        " layers, and so on" if len(words) > 4 else " layers"
    )


def files(checkpoint: Checkpoint, model: mistral_ref.Model) -> dict[str, object]:
    """Return the rows about the files: their layout, their sizes, and the parameters in them."""
    every, names = matrices(model.weights), [escaped(file.path.name) for file in checkpoint.files]
    n_bits, n_weights = 8 * sum(matrix.nbytes for matrix in every), sum(matrix.size for matrix in every)
    stored = Counter[str]()
    for matrix in every:
        stored[DTYPES.get(matrix.kind, matrix.kind)] += matrix.size
    for tensor in checkpoint.tensors.values():
        stored[tensor.dtype] += tensor.shape[0] if len(tensor.shape) == 1 and "norm." in tensor.name else 0
    return {
        "layout": checkpoint.layout,
        "files": names[0] if len(names) == 1 else f"{len(names)}, {names[0]} to {names[-1]}",
        "size on disk": size(sum(len(file.bytes) for file in checkpoint.files)),
        "parameters": f"{sum(stored.values()):,}",
        "stored as": ", ".join(f"{dtype} ({n:,})" for dtype, n in stored.most_common() if n),
        "bits a weight": f"{n_bits / n_weights:.2f}",
        "tied embeddings": "no" if "output.weight" in checkpoint.tensors else "yes",
        "ignored": f"{len(checkpoint.ignored)} tensors",
    }


def memory(model: mistral_ref.Model, checkpoint: Checkpoint) -> dict[str, object]:
    """Return the rows about memory: what the weights take, the cache at several lengths, and the longest that fits."""
    longest = model.config.max_seq_len or _LENGTHS[-1]
    lengths = sorted({n for n in _LENGTHS if n < longest} | {min(longest, _LENGTHS[-1])})
    cache = model.new_cache()
    weights = sum(tensor.raw.nbytes for tensor in checkpoint.tensors.values())
    rows: dict[str, object] = {"weights": f"{size(weights)}, mapped from the files and shared with the page cache"}
    rows |= {f"cache at {n}": f"{size(cache.bytes_for(n))} as {cache.dtype}" for n in lengths}
    fitting = {dtype: longest_context(model.config, model.weights, cache_dtype=dtype) for dtype in CACHE_DTYPES}
    words = [f"{n:,} tokens as {dtype}" for dtype, n in fitting.items() if n is not None]
    if len({*fitting.values()}) == 1:  # the model's own longest text
        words = [word.partition(" as ")[0] for word in words[:1]]
    return rows | ({"longest that fits": f"{', '.join(words)}, beside the weights"} if words else {})


def tokenizer(model: mistral_ref.Model) -> dict[str, object]:
    """Return the rows about the tokenizer; without a tokenizer there is one row that says so."""
    if model.tokenizer is None:
        return {"kind": "none; prompts are token ids"}
    rows: dict[str, object] = {"kind": model.tokenizer.kind, "pieces": model.tokenizer.n_pieces}
    if added := sorted(model.tokenizer.added.by_id):
        rows["added tokens"] = ids_with_names(model, added)
    if model.tokenizer.bos_id is not None:
        rows["begins with"] = ids_with_names(model, [model.tokenizer.bos_id])
    return rows | {"ends with": ids_with_names(model, sorted(model.eos_ids)) or "no id that the files name"}


def ids_with_names(model: mistral_ref.Model, ids: Sequence[int]) -> str:
    """Return ids and their names, such as "2 </s>, 32000 <|im_end|>"; of more than eight ids the first ones."""
    n_ids = model.tokenizer.vocab_size if model.tokenizer else 0
    names = [f"{token} {model.piece(token) if token < n_ids else '(unknown to the tokenizer)'}" for token in ids[:8]]
    return ", ".join(names) + (f", and {len(ids) - 8} more" if len(ids) > 8 else "")


def other_name(name: str, tensor: Tensor, checkpoint: Checkpoint) -> str:
    """Return the name of a tensor in its file, and Hugging Face's if its file has Mistral's own name."""
    return huggingface_name(name) if checkpoint.layout == "consolidated" else tensor.name


def print_tensors(checkpoint: Checkpoint) -> None:
    """Print every tensor: both names, dtype, shape and file."""
    named = [(name, other_name(name, tensor, checkpoint), tensor) for name, tensor in checkpoint.tensors.items()]
    named += [("(ignored)", tensor.name, tensor) for tensor in checkpoint.ignored]
    rows = [
        [escaped(cell) for cell in (own, theirs, tensor.dtype, "x".join(map(str, tensor.shape)), tensor.path.name)]
        for own, theirs, tensor in named
    ]
    others = "GGUF's name" if checkpoint.layout == "gguf" else "Hugging Face's name"
    header = ("Mistral's name", others, "dtype", "shape", "file")
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    say("tensors")
    if sum(widths) + 2 * len(widths) > (terminal_width() or math.inf):
        say(fitted(textwrap.indent(list_of_rows(header, rows), "  ")))
        return
    for row in [header, *rows]:
        say("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
