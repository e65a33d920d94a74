"""What the files beside an adapter's matrices say of them: who made it, the scale, and what is not computed here.

The formats are described in adapter_file.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mistral_ref.config import RowOrder
from mistral_ref.errors import CheckpointError, printable, short_repr, warn
from mistral_ref.files.json_file import read_json

_DEFAULT_SCALE = 2.0  # that of mistral-finetune
# Fields of PEFT's configuration that are read, or that say how the adapter was trained and change nothing in what it
# computes; and those that change nothing with these values. Any other field must be false or empty.
_KNOWN = {
    "alora_invocation_string", "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config",
    "eva_config", "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size",
    "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
_PLAIN_VALUES: dict[str, tuple[object, ...]] = {
    "bias": (None, "none"),
    "use_rslora": (None, True, False),
    # Other ways to begin move a part of the model's own weights to the adapter.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}
_PLAIN_NAME = re.compile(r"\^?\w[\w.-]*")  # of a module, as a key of alpha_pattern; other keys are regular expressions


class Format(NamedTuple):
    """How a program writes adapters.

    made_by     the program
    file        the name of the file with the matrices
    ends        of the names of A and B
    row_order   the order of the rows of B for wq and wk
    """

    made_by: str
    file: str
    ends: tuple[str, str]
    row_order: RowOrder


PEFT = Format("PEFT", "adapter_model.safetensors", ("lora_A.weight", "lora_B.weight"), "halves")
MLX = Format("mlx-lm", "adapters.safetensors", ("lora_a", "lora_b"), "halves")
FINETUNE = Format("mistral-finetune", "lora.safetensors", ("lora_A.weight", "lora_B.weight"), "interleaved")


class Said(NamedTuple):
    """What the file beside the matrices says of them.

    ranks       the ranks that they may have; empty: any
    scale_of    a function from the name of a module and its rank to the scale
    """

    path: Path
    ranks: frozenset[int]
    scale_of: Callable[[str, int], float]


def described(about: Path) -> tuple[Format, Said]:
    """Return what adapter_config.json says, and whose it is: two programs write a file of this name."""
    fields = read_json(about, CheckpointError)
    is_peft, is_mlx = "peft_type" in fields, "fine_tune_type" in fields or "lora_parameters" in fields
    if is_peft == is_mlx:
        raise CheckpointError(
            f"{about}: has {'both' if is_peft else 'neither'} peft_type and fine_tune_type; expected one of them"
        )
    return (PEFT, _said_by_peft(about, fields)) if is_peft else (MLX, _said_by_mlx(about, fields))


def _said_by_peft(about: Path, fields: Mapping[str, Any]) -> Said:
    if fields["peft_type"] != "LORA":
        raise CheckpointError(f"{about}: peft_type is {short_repr(fields['peft_type'])}; expected 'LORA'")
    for name, value in fields.items():
        if value not in _PLAIN_VALUES[name] if name in _PLAIN_VALUES else value and name not in _KNOWN:
            raise CheckpointError(
                f"{about}: {printable(name)} is {short_repr(value)}; expected an adapter without it, as it may change "
                "what is computed"
            )
    by_root, alpha = fields.get("use_rslora"), _number(about, "lora_alpha", fields.get("lora_alpha"))
    ranks, alphas = (fields.get(name) or {} for name in ("rank_pattern", "alpha_pattern"))
    for name, pattern in {"rank_pattern": ranks, "alpha_pattern": alphas}.items():
        if not isinstance(pattern, dict):
            raise CheckpointError(f"{about}: {name} is {short_repr(pattern)}; expected an object")
    if unknown := [key for key in alphas if not _PLAIN_NAME.fullmatch(key)]:
        raise CheckpointError(
            f"{about}: alpha_pattern holds {short_repr(unknown[0])}; expected names of modules, no regular expressions"
        )
    alpha_of = {key: _number(about, f"alpha_pattern.{key}", value) for key, value in alphas.items()}
    places = {key: place for place, key in enumerate(alpha_of)}

    def scale_of(module: str, rank: int) -> float:
        # A key is the end of a module's name, or with ^ before it the whole. The first one that fits is taken.
        parts = module.split(".")
        keys = {f"^{module}", *(".".join(parts[at:]) for at in range(len(parts)))} & alpha_of.keys()
        own = alpha_of[min(keys, key=places.__getitem__)] if keys else alpha
        return own / (math.sqrt(rank) if by_root else rank)

    return Said(about, _ranks(fields.get("r"), *ranks.values()), scale_of)


def _said_by_mlx(about: Path, fields: Mapping[str, Any]) -> Said:
    kind, settings = fields.get("fine_tune_type", "lora"), fields.get("lora_parameters")
    if kind != "lora":
        raise CheckpointError(f"{about}: fine_tune_type is {short_repr(kind)}; expected 'lora'")
    if not isinstance(settings, dict):
        raise CheckpointError(f"{about}: lora_parameters is {short_repr(settings)}; expected an object with a scale")
    scale = _number(about, "lora_parameters.scale", settings.get("scale"))
    return Said(about, _ranks(settings.get("rank")), lambda module, rank: scale)


def said_by_finetune(params: Path) -> Said:
    """Return what params.json says of an adapter of mistral-finetune. Warns if it does not say the scale."""
    lora = read_json(params, CheckpointError).get("lora") if params.exists() else None
    if not isinstance(lora, dict):
        warn(f"{params}: does not say lora.scaling; {_DEFAULT_SCALE}, the default of mistral-finetune, is taken")
        return Said(params, frozenset(), lambda module, rank: _DEFAULT_SCALE)
    scale = _number(params, "lora.scaling", lora.get("scaling"))
    return Said(params, _ranks(lora.get("rank")), lambda module, rank: scale)


def _ranks(usual: object, *others: object) -> frozenset[int]:
    """Return the ranks that a file says; none if it does not say the usual one."""
    ranks = [rank for rank in (usual, *others) if type(rank) is int]
    return frozenset(ranks if usual in ranks else [])


def _number(path: Path, field: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e30:
        raise CheckpointError(f"{path}: {field} is {short_repr(value)}; expected a number")
    return float(value)
