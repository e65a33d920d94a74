"""Read one adapter: the small matrices that a fine-tuning with LoRA has learned (arXiv:2106.09685).

An adapter adds scale (x · Aᵀ) · Bᵀ to products x · Wᵀ of a model. A is (R, I) and B is (O, R), where R is the rank.
Three programs write adapters, each in its own way. These are their files, and their names of A and B for a wq:

    PEFT                adapter_model.safetensors   base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
                                                    ...lora_B.weight
    mlx-lm              adapters.safetensors        model.layers.0.self_attn.q_proj.lora_a, (I, R): transposed
                                                    ...lora_b, (R, O): transposed
    mistral-finetune    lora.safetensors            layers.0.attention.wq.lora_A.weight
                                                    ...lora_B.weight

The scale stands in a file beside them. PEFT: lora_alpha in adapter_config.json, divided by R, or by sqrt(R) with
use_rslora. mlx-lm: lora_parameters.scale in adapter_config.json. mistral-finetune: lora.scaling in params.json.

The rows of B for wq and wk are in the order of the model that was trained. What would be computed wrongly is refused by
name: DoRA, biases, whole weights, and all other things that are no such sum.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mistral_ref.config import MAX_VALUES
from mistral_ref.errors import CheckpointError, printable, short_repr, warn
from mistral_ref.files.adapter_settings import FINETUNE, MLX, PEFT, Format, Said, described, said_by_finetune
from mistral_ref.files.paths import model_path
from mistral_ref.files.tensor_file import Tensor, open_tensor_file
from mistral_ref.files.tensor_names import experts_of_mlx, mistral_name, other_component
from mistral_ref.weights import Matrix

_PICKLES = ("adapter_model.bin", "adapters.npz", "lora.pt", "lora.pth")
# What the ends of names say of tensors that are no A and no B.
_OTHER_TENSORS = {
    "lora_magnitude_vector": "of DoRA",
    "lora_magnitude_vector.weight": "of DoRA",
    "m": "of DoRA",
    "lora_embedding_A": "of an embedding",
    "lora_embedding_B": "of an embedding",
    "bias": "a bias",
    "weight": "a whole weight",
}


class Pair(NamedTuple):
    """What an adapter adds to one matrix: scale b · a. The matrices have the names of their tensors.

    a, b    (R, I) and (O, R)
    """

    a: Matrix
    b: Matrix
    scale: float


@dataclass(frozen=True, eq=False)
class Adapter:
    """The contents of an adapter's files.

    path    the file with the matrices
    form    the program that made it, and how it writes
    pairs   what is added to each matrix, by Mistral's own name without ".weight"
    """

    path: Path
    form: Format
    pairs: dict[str, Pair]


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Return the adapter in a directory or a file; `path` may be the name of a directory in the hub's cache, too.

    Raises CheckpointError for what is no adapter, is damaged, or would be computed wrongly. Warns if a scale is
    assumed, or if parts outside the text model are ignored.
    """
    path = model_path(path, CheckpointError)
    if not os.path.exists(path):
        raise CheckpointError(f"{path}: no such directory or file")
    directory = path if path.is_dir() else path.parent
    about = directory / "adapter_config.json"
    is_described = path.name != FINETUNE.file and about.exists()
    form, said = described(about) if is_described else (FINETUNE, None)
    file = directory / form.file if path == directory else path
    if not file.name.endswith(".safetensors") or not os.path.lexists(file):
        found = [name for name in (path.name, *_PICKLES) if os.path.isfile(directory / name)]
        names = form.file if is_described else f"{FINETUNE.file} or adapter_config.json"
        raise CheckpointError(
            f"{path}: {f'found {short_repr(found)}' if found else 'holds no adapter'}; expected a directory with "
            f"{names} (pickles can run code and are never opened)"
        )
    said = said or said_by_finetune(directory / "params.json")
    return Adapter(file, form, _pairs(file, form, said))


def _pairs(file: Path, form: Format, said: Said) -> dict[str, Pair]:
    """Return what the tensors of a file add to each matrix."""
    halves: dict[str, dict[str, Tensor]] = {}
    ignored = set()
    for tensor in open_tensor_file(file):
        module, end = _split_name(tensor, form)
        if part := other_component(module):
            ignored.add(part)
        else:
            halves.setdefault(module, {})[end] = tensor
    if ignored:
        warn(f"{file}: only the text model is read, not {', '.join(sorted(ignored))}")
    pairs: dict[str, Pair] = {}
    for module, found in halves.items():
        if missing := [end for end in form.ends if end not in found]:
            (other,) = found.values()
            raise CheckpointError(f"{file}: {printable(other.name)} is there without its {missing[0]}")
        for name, pair in _pairs_of_module(module, [found[end] for end in form.ends], form, said).items():
            if name in pairs:
                raise CheckpointError(f"{file}: {pair.a.name} occurs twice, also as {pairs[name].a.name}")
            pairs[name] = pair
    if not pairs:
        raise CheckpointError(f"{file}: adapts no matrix of the text model")
    return pairs


def _split_name(tensor: Tensor, form: Format) -> tuple[str, str]:
    """Return the module that a tensor adapts, and which end its name has. Raises CheckpointError if it is no A or B."""
    name, prefix = tensor.name, "base_model.model." if form is PEFT else ""
    for end in form.ends:
        if name.startswith(prefix) and name.endswith(f".{end}"):
            return name.removesuffix(f".{end}").removeprefix(prefix), end
    what = next((f"is {what}, and " for end, what in _OTHER_TENSORS.items() if name.endswith(f".{end}")), "")
    raise CheckpointError(
        f"{tensor.path}: {printable(name)} {what}has no place in an adapter of {form.made_by}; expected names "
        f"that end in {' or '.join(form.ends)}"
    )


def _pairs_of_module(module: str, tensors: Sequence[Tensor], form: Format, said: Said) -> dict[str, Pair]:
    """Return the pair of a module by the name of its matrix; of a module that holds all experts the pair of each."""
    a, b = tensors
    if form is MLX and (name := experts_of_mlx(module)):
        n_experts = (a.shape or (0,))[0]
        if not len(a.shape) == len(b.shape) == 3 or not 0 < n_experts == b.shape[0] <= MAX_VALUES["num_experts"]:
            raise CheckpointError(
                f"{a.path}: {printable(a.name)} and {printable(b.name)} have shapes {short_repr(a.shape)} and "
                f"{short_repr(b.shape)}; expected (experts, R, I) and (experts, O, R)"
            )
        names = [name.replace(".experts.", f".experts.{expert}.") for expert in range(n_experts)]
        parts = [[_matrix(tensor, expert) for tensor in tensors] for expert in range(n_experts)]
    else:
        names, parts = [_matrix_name(module, a, form)], [[_matrix(tensor) for tensor in tensors]]
        if form is MLX:
            parts = [[Matrix(half.name, half.kind, half.data.T) for half in parts[0]]]
    pairs = {}
    for name, (a_RI, b_OR) in zip(names, parts, strict=True):
        rank = a_RI.shape[0]
        if not rank or b_OR.shape[1] != rank:
            raise CheckpointError(
                f"{a.path}: {a_RI.name} has rank {rank}, and {b_OR.name} has {b_OR.shape[1]}; expected the same, "
                "above 0"
            )
        if said.ranks and rank not in said.ranks:
            expected = f"one of {short_repr(sorted(said.ranks))}, as in {said.path}"
            raise CheckpointError(f"{a.path}: {a_RI.name} has rank {rank}; expected {expected}")
        pairs[name] = Pair(a_RI, b_OR, said.scale_of(module, rank))
    return pairs


def _matrix_name(module: str, tensor: Tensor, form: Format) -> str:
    """Return Mistral's own name of the matrix that a module holds. Raises CheckpointError if it holds none of a layer.

    Names of the other layout are refused, because they leave the order of rows open.
    """
    name = mistral_name(f"{module}.weight")
    if name is None or (name == f"{module}.weight") != (form is FINETUNE):
        raise CheckpointError(f"{tensor.path}: {printable(tensor.name)} belongs to no model that is known here")
    if not name.startswith("layers."):
        raise CheckpointError(
            f"{tensor.path}: {printable(tensor.name)} adapts {name.removesuffix('.weight')}; expected matrices of the "
            "layers alone"
        )
    return name.removesuffix(".weight")


def _matrix(tensor: Tensor, expert: int | None = None) -> Matrix:
    """Return a tensor as a matrix, with the name of the tensor; of a tensor for all experts that of one."""
    name = printable(tensor.name)
    if tensor.dtype not in ("F32", "F16", "BF16") or len(tensor.shape) != (2 if expert is None else 3):
        raise CheckpointError(
            f"{tensor.path}: {name} is {tensor.dtype} of shape {short_repr(tensor.shape)}; expected a matrix of F32, "
            "F16 or BF16"
        )
    kind, data = tensor.mapped()
    matrix = Matrix(name, kind, data if expert is None else data[expert])
    if not np.isfinite(matrix.rows(slice(None), np.float32)).all():
        raise CheckpointError(f"{tensor.path}: {name} holds NaN or infinity")
    return matrix
