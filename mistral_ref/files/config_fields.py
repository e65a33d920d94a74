"""The names of a model's fields in params.json and config.json, and the reading of fields under our own names.

The code reads the fields of both files under our own names. If a field is wrong, an error names it: here, or in
ModelConfig. `spelled_as` replaces the name in the error by the name that the file uses.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mistral_ref.config import MixtureOfExperts, ModelConfig, QueryTemperature, checked_count, checked_number
from mistral_ref.errors import ConfigError, Field, short_repr

ORIGINAL = "original_max_position_embeddings"

# A dot leads into a nested object. A field may have several names in a file; the first that holds a value counts.
# fmt: off
NAMES = {
    # ours                            params.json                            config.json
    "model_type":                    ("model_type",                         "model_type"),
    "dim":                           ("dim",                                "hidden_size"),
    "n_layers":                      ("n_layers",                           "num_hidden_layers"),
    "n_heads":                       ("n_heads",                            "num_attention_heads"),
    "n_kv_heads":                    ("n_kv_heads",                         "num_key_value_heads"),
    "head_dim":                      ("head_dim",                           "head_dim"),
    "hidden_dim":                    ("hidden_dim",                         "intermediate_size"),
    "vocab_size":                    ("vocab_size",                         "vocab_size"),
    "norm_eps":                      ("norm_eps",                           "rms_norm_eps"),
    "max_seq_len":                   ("max_seq_len max_position_embeddings", "max_position_embeddings"),
    "tied_embeddings":               ("tied_embeddings",                    "tie_word_embeddings"),
    "sliding_window":                ("sliding_window _sliding_window",     "sliding_window"),
    "layer_types":                   ("",                                   "layer_types"),
    "num_experts":                   ("moe.num_experts",                    "num_local_experts"),
    "num_experts_per_tok":           ("moe.num_experts_per_tok",            "num_experts_per_tok"),
    "rope_theta":                    ("rope_theta",                         "rope_parameters.rope_theta rope_theta"),
    "rope_type":                     ("",                  "rope_parameters.rope_type rope_parameters.type"),
    "yarn.factor":                   ("yarn.factor",                        "rope_parameters.factor"),
    "yarn.beta_fast":                ("yarn.beta",                          "rope_parameters.beta_fast"),
    "yarn.beta_slow":                ("yarn.alpha",                         "rope_parameters.beta_slow"),
    "yarn.apply_scale":              ("yarn.apply_scale",                   ""),
    "yarn.attention_factor":         ("",                                   "rope_parameters.attention_factor"),
    "yarn.mscale":                   ("",                                   "rope_parameters.mscale"),
    "yarn.mscale_all_dim":           ("",                                   "rope_parameters.mscale_all_dim"),
    "yarn.truncate":                 ("",                                   "rope_parameters.truncate"),
    f"yarn.{ORIGINAL}":             (f"yarn.{ORIGINAL}",
                                      f"{ORIGINAL} rope_parameters.{ORIGINAL} max_position_embeddings"),
    "query_temperature.beta":        ("llama_4_scaling.beta",               "rope_parameters.llama_4_scaling_beta"),
    f"query_temperature.{ORIGINAL}": (f"llama_4_scaling.{ORIGINAL}",      f"rope_parameters.{ORIGINAL}"),
}
# fmt: on


def value_at(file: object, dotted: str, default: object = None) -> Any:
    """Return the value in `file` under a dotted name; `default` if it is absent.

    Raises ConfigError if a part of the name before the last one leads to a value that is not an object.

    >>> value_at({"yarn": {"factor": 16}}, "yarn.factor")
    16
    """
    path = dotted.split(".")
    for depth, name in enumerate(path):
        if file is None:
            return default
        if not isinstance(file, dict):
            raise ConfigError(Field(".".join(path[:depth])), f" is {short_repr(file)}; expected an object")
        if name not in file:
            return default
        file = file[name]
    return file


@contextmanager
def spelled_as(names: Mapping[str, str]) -> Iterator[None]:
    """Change a ConfigError that is raised inside: `names` maps our names of fields to the file's names."""
    try:
        yield
    except ConfigError as error:
        raise error.spelled_as(names) from None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Change a ConfigError that is raised inside: put the path of the file in front of its message."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: ", *error.parts) from None


class Fields:
    """The fields of a file under our own names.

    values  the value of each field that the file holds
    names   the file's name of each field

    `value_at` finds a value: by default a dot in a name leads into a nested object.
    """

    def __init__(self, file: dict[str, Any], names: Mapping[str, str], value_at: Callable[..., Any] = value_at) -> None:
        absent = object()
        self.names = {}
        for field, alternatives in ((field, several.split()) for field, several in names.items() if several):
            given = [name for name in alternatives if value_at(file, name) is not None]
            self.names[field] = (given or alternatives)[0]
        found = {field: value_at(file, name, absent) for field, name in self.names.items()}
        self.values = {field: value for field, value in found.items() if value is not absent}

    def required(self, field: str) -> Any:
        """Return the value of a field; raise ConfigError if the file does not hold it."""
        if field not in self.values:
            raise ConfigError(Field(field), " is missing")
        return self.values[field]

    def count(self, field: str) -> int:
        """Return the value of a field; raise ConfigError unless it is a whole number of at least 1."""
        return checked_count(field, self.required(field))

    def number_or(self, default: float, field: str) -> float:
        """Return a number above 0; `default` if it is absent, null or 0, as transformers does it."""
        value = self.values.get(field)
        return checked_number(field, default if value is None else value, zero=True) or default

    def flag(self, field: str, default: bool | None = None) -> bool:
        """Return a field that must be true or false. If it is absent: `default`, or a ConfigError if that is None."""
        value = self.required(field) if default is None else self.values.get(field, default)
        if not isinstance(value, bool):
            raise ConfigError(Field(field), f" is {short_repr(value)}; expected true or false")
        return value

    def query_temperature(self, block: str) -> QueryTemperature | None:
        """Return the QueryTemperature of `beta` and the length in `block`; None if beta is 0, which changes nothing."""
        beta = checked_number("query_temperature.beta", self.required("query_temperature.beta"), zero=True)
        return QueryTemperature(beta=beta, **{ORIGINAL: self.count(f"{block}.{ORIGINAL}")}) if beta else None

    def model_config(self, *, moe: bool, **others: Any) -> ModelConfig:
        """Return a ModelConfig. `others` are the fields that the two files give in different ways."""
        alike = ("dim", "n_layers", "n_heads", "hidden_dim", "vocab_size", "norm_eps", "rope_theta")
        experts = ("num_experts", "num_experts_per_tok")
        n_kv_heads = self.values.get("n_kv_heads")
        return ModelConfig(
            **{field: self.required(field) for field in alike},
            n_kv_heads=self.required("n_heads") if n_kv_heads is None else n_kv_heads,
            max_seq_len=self.values.get("max_seq_len"),
            moe=MixtureOfExperts(**{field: self.required(field) for field in experts}) if moe else None,
            **others,
        )


def differences(config: ModelConfig, other: ModelConfig) -> Iterator[tuple[str, object, object]]:
    """Yield each field in which params.json (`config`) and config.json (`other`) differ, and its values in the two.

    Fields of a part that both have are named as "yarn.factor". Two fields are not compared. The row order follows from
    the layout. `tied_embeddings` is often absent, and only matters if there is no output matrix. `max_seq_len` is
    compared only if both files hold it.
    """
    for field in (field.name for field in dataclasses.fields(ModelConfig)):
        ours, theirs = getattr(config, field), getattr(other, field)
        is_ignored = field in ("rope_row_order", "tied_embeddings") or (
            field == "max_seq_len" and None in (ours, theirs)
        )
        if ours == theirs or is_ignored:
            continue
        if None in (ours, theirs) or not dataclasses.is_dataclass(ours):
            yield field, ours, theirs
            continue
        pairs = ((part.name, getattr(ours, part.name), getattr(theirs, part.name)) for part in dataclasses.fields(ours))
        yield from ((f"{field}.{part}", one, another) for part, one, another in pairs if one != another)


def difference_text(field: str, ours: object, theirs: object, whose: str = "params.json") -> str:
    """Return a difference from the file `whose` as a text. Of the windows of all layers it is one, if all are equal.

    >>> difference_text("sliding_window", (64, 64), (None, 64))
    'sliding_window is (None, 64), in params.json 64'
    """
    shown = [value[0] if isinstance(value, tuple) and len({*value}) == 1 else value for value in (theirs, ours)]
    theirs, ours = (short_repr(value) if isinstance(value, tuple) else repr(value) for value in shown)
    return f"{field} is {theirs}, in {whose} {ours}"


def check_only(file: dict[str, Any], accepted: Mapping[str, object], level: str = "") -> None:
    """Raise ConfigError if a field has another value than in `accepted`. Absent fields and null are accepted too.

    level   prefix of the names, for example "text_config."
    """
    for name, only in accepted.items():
        value = value_at(file, level + name)
        if value is not None and value != only:
            raise ConfigError(Field(level + name), f" is {short_repr(value)}; only {json.dumps(only)} is supported")
