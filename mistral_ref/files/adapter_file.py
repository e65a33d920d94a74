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

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mistral_ref.config import RowOrder
from mistral_ref.errors import CheckpointError, printable, short_repr, warn
from mistral_ref.files.json_file import read_json
from mistral_ref.files.paths import model_path
from mistral_ref.files.tensor_file import Tensor, open_tensor_file
from mistral_ref.files.tensor_names import experts_of_mlx, mistral_name, other_component
from mistral_ref.weights import Matrix

_PICKLES = ("adapter_model.bin", "adapters.npz", "lora.pt", "lora.pth")
_DEFAULT_SCALE = 2.0  # that of mistral-finetune
# Fields of PEFT's configuration that are read; those that say how the adapter was trained, and change nothing in what
# it computes; and those that change nothing with these values. Any other field must be false or empty.
_READ = {"alpha_pattern", "lora_alpha", "peft_type", "r", "rank_pattern", "use_rslora"}
_OF_TRAINING = {
    "alora_invocation_string", "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config",
    "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout",
    "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "target_modules", "task_type",
}  # fmt: skip
_PLAIN_VALUES: dict[str, tuple[object, ...]] = {
    "bias": (None, "none"),
    # Other ways to begin move a part of the model's own weights to the adapter.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}
_PLAIN_NAME = re.compile(r"\^?\w[\w.-]*")  # of a module, as a key of alpha_pattern; other keys are regular expressions
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

    path        the file with the matrices
    made_by     "PEFT", "mlx-lm" or "mistral-finetune"
    row_order   the order of the rows of b for wq and wk
    pairs       what is added to each matrix, by Mistral's own name without ".weight"
    """

    path: Path
    made_by: str
    row_order: RowOrder
    pairs: dict[str, Pair]


class _Format(NamedTuple):
    made_by: str
    file: str
    ends: tuple[str, str]  # of the names of A and B
    row_order: RowOrder


_PEFT = _Format("PEFT", "adapter_model.safetensors", ("lora_A.weight", "lora_B.weight"), "halves")
_MLX = _Format("mlx-lm", "adapters.safetensors", ("lora_a", "lora_b"), "halves")
_FINETUNE = _Format("mistral-finetune", "lora.safetensors", ("lora_A.weight", "lora_B.weight"), "interleaved")


class _Said(NamedTuple):
    """What the file beside the matrices says of them.

    ranks       the ranks that they may have; None among them: any
    scale_of    a function from the name of a module and its rank to the scale
    """

    path: Path
    ranks: tuple[object, ...]
    scale_of: Callable[[str, int], float]


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
    is_described = path.name != _FINETUNE.file and about.exists()
    form, said = _described(about) if is_described else (_FINETUNE, _said_by_finetune(directory / "params.json"))
    file = directory / form.file if path == directory else path
    if not file.name.endswith(".safetensors") or not os.path.lexists(file):
        found = [name for name in (path.name, *_PICKLES) if os.path.isfile(directory / name)]
        names = form.file if is_described else f"{_FINETUNE.file} or adapter_config.json"
        raise CheckpointError(
            f"{path}: {f'found {short_repr(found)}' if found else 'holds no adapter'}; expected a directory with "
            f"{names} (pickles can run code and are never opened)"
        )
    pairs = _pairs(file, form, said)
    if form is _FINETUNE and said.ranks == ():
        warn(f"{file}: no params.json beside it says lora.scaling; {_DEFAULT_SCALE}, the program's default, is used")
    return Adapter(file, form.made_by, form.row_order, pairs)


def _described(about: Path) -> tuple[_Format, _Said]:
    """Return what adapter_config.json says, and whose it is: two programs write a file of this name."""
    fields = read_json(about, CheckpointError)
    is_peft, is_mlx = "peft_type" in fields, "fine_tune_type" in fields or "lora_parameters" in fields
    if is_peft == is_mlx:
        raise CheckpointError(
            f"{about}: has {'both' if is_peft else 'neither'} peft_type and fine_tune_type; expected one of them"
        )
    return (_PEFT, _said_by_peft(about, fields)) if is_peft else (_MLX, _said_by_mlx(about, fields))


def _said_by_peft(about: Path, fields: Mapping[str, Any]) -> _Said:
    if fields["peft_type"] != "LORA":
        raise CheckpointError(f"{about}: peft_type is {short_repr(fields['peft_type'])}; expected 'LORA'")
    for name, value in fields.items():
        is_harmless = name in _READ or name in _OF_TRAINING or not value
        if value not in _PLAIN_VALUES[name] if name in _PLAIN_VALUES else not is_harmless:
            raise CheckpointError(
                f"{about}: {printable(name)} is {short_repr(value)}; expected an adapter without it, as it may change "
                "what is computed"
            )
    by_root, alpha = bool(fields.get("use_rslora")), _number(about, "lora_alpha", fields.get("lora_alpha"))
    ranks, alphas = (fields.get(name) or {} for name in ("rank_pattern", "alpha_pattern"))
    for name, pattern in {"rank_pattern": ranks, "alpha_pattern": alphas}.items():
        if not isinstance(pattern, dict):
            raise CheckpointError(f"{about}: {name} is {short_repr(pattern)}; expected an object")
    if unknown := [key for key in alphas if not _PLAIN_NAME.fullmatch(key)]:
        raise CheckpointError(
            f"{about}: alpha_pattern holds {short_repr(unknown[0])}; expected names of modules, no regular expressions"
        )
    alpha_of = {key: _number(about, f"alpha_pattern.{key}", value) for key, value in alphas.items()}

    def scale_of(module: str, rank: int) -> float:
        # A name is that of a module, or of the end of one; with ^ before it, of the whole.
        own = (a for key, a in alpha_of.items() if f"^{module}" == key or f".{module}".endswith(f".{key}"))
        return next(own, alpha) / (math.sqrt(rank) if by_root else rank)

    return _Said(about, (fields.get("r"), *ranks.values()), scale_of)


def _said_by_mlx(about: Path, fields: Mapping[str, Any]) -> _Said:
    kind, settings = fields.get("fine_tune_type", "lora"), fields.get("lora_parameters")
    if kind != "lora":
        raise CheckpointError(f"{about}: fine_tune_type is {short_repr(kind)}; expected 'lora'")
    if not isinstance(settings, dict):
        raise CheckpointError(f"{about}: lora_parameters is {short_repr(settings)}; expected an object with a scale")
    scale = _number(about, "lora_parameters.scale", settings.get("scale"))
    return _Said(about, (settings.get("rank"),), lambda module, rank: scale)


def _said_by_finetune(params: Path) -> _Said:
    lora = read_json(params, CheckpointError).get("lora") if params.exists() else None
    if not isinstance(lora, dict):
        return _Said(params, (), lambda module, rank: _DEFAULT_SCALE)
    scale = _number(params, "lora.scaling", lora.get("scaling"))
    return _Said(params, (lora.get("rank"),), lambda module, rank: scale)


def _number(path: Path, field: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e30:
        raise CheckpointError(f"{path}: {field} is {short_repr(value)}; expected a number")
    return float(value)


def _pairs(file: Path, form: _Format, said: _Said) -> dict[str, Pair]:
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


def _split_name(tensor: Tensor, form: _Format) -> tuple[str, str]:
    """Return the module that a tensor adapts, and which end its name has. Raises CheckpointError if it is no A or B."""
    name, prefix = tensor.name, "base_model.model." if form is _PEFT else ""
    for end in form.ends:
        if name.startswith(prefix) and name.endswith(f".{end}"):
            return name.removesuffix(f".{end}").removeprefix(prefix), end
    what = next((f"is {what}, and " for end, what in _OTHER_TENSORS.items() if name.endswith(f".{end}")), "")
    raise CheckpointError(
        f"{tensor.path}: {printable(name)} {what}has no place in an adapter of {form.made_by}; expected names "
        f"that end in {' or '.join(form.ends)}"
    )


def _pairs_of_module(module: str, tensors: Sequence[Tensor], form: _Format, said: _Said) -> dict[str, Pair]:
    """Return the pair of a module by the name of its matrix; of a module that holds all experts the pair of each."""
    a, b = tensors
    if form is _MLX and (name := experts_of_mlx(module)):
        if not len(a.shape) == len(b.shape) == 3 or a.shape[0] != b.shape[0]:
            raise CheckpointError(
                f"{a.path}: {printable(a.name)} and {printable(b.name)} have shapes {short_repr(a.shape)} and "
                f"{short_repr(b.shape)}; expected (experts, R, I) and (experts, O, R)"
            )
        names = [name.replace(".experts.", f".experts.{expert}.") for expert in range(a.shape[0])]
        parts = [[_matrix(tensor, expert) for tensor in tensors] for expert in range(len(names))]
    else:
        names, parts = [_matrix_name(module, a, form)], [[_matrix(tensor) for tensor in tensors]]
        if form is _MLX:
            parts = [[Matrix(half.name, half.kind, half.data.T) for half in parts[0]]]
    pairs = {}
    for name, (a_RI, b_OR) in zip(names, parts, strict=True):
        rank = a_RI.shape[0]
        if not rank or b_OR.shape[1] != rank:
            raise CheckpointError(
                f"{a.path}: {a_RI.name} has rank {rank}, and {b_OR.name} has {b_OR.shape[1]}; expected the same, "
                "above 0"
            )
        if said.ranks and None not in said.ranks and rank not in said.ranks:
            raise CheckpointError(
                f"{a.path}: {a_RI.name} has rank {rank}; expected {short_repr(said.ranks[0])}, as in {said.path}"
            )
        pairs[name] = Pair(a_RI, b_OR, said.scale_of(module, rank))
    return pairs


def _matrix_name(module: str, tensor: Tensor, form: _Format) -> str:
    """Return Mistral's own name of the matrix that a module holds. Raises CheckpointError if it holds none of a layer.

    Names of the other layout are refused, because they leave the order of rows open.
    """
    name = mistral_name(f"{module}.weight")
    if name is None or (name == f"{module}.weight") != (form is _FINETUNE):
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
