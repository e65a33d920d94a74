"""The changes of a model: another window, another theta, a planted bug."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mistral_ref.config import MAX_VALUES, ModelConfig, tensor_shapes
from mistral_ref.errors import ConfigError, InputError, checked_choice, checked_float, checked_int
from mistral_ref.model import Model
from mistral_ref.study.broken import BUGS, BrokenModel
from mistral_ref.study.changes.of_steps import LARGEST, Change
from mistral_ref.study.edited import refuse_edits


def with_config(model: Model, **fields: object) -> Model:
    """Return a model of the same weights, in whose configuration some fields are others.

    Raises InputError if a field cannot have the value, if the weights do not fit it, or for a broken model.
    """
    if isinstance(model, BrokenModel):
        raise InputError(f"{model!r} has a bug; expected a model without a bug, which may get one afterwards")
    refuse_edits(model)
    try:
        config = model.config.replace(**fields)
    except ConfigError as error:
        raise InputError(str(error)) from None
    except TypeError:
        raise InputError(f"{', '.join(fields)}: expected names of fields of ModelConfig") from None
    if list(tensor_shapes(config)) != list(tensor_shapes(model.config)):
        raise InputError(f"{', '.join(fields)}: the model's weights have other shapes than this needs")
    return Model(
        config,
        model.weights,
        model.ops,
        tokenizer=model.tokenizer,
        eos_ids=tuple(model.eos_ids),
        check_memory=model.check_memory,
    )


@dataclass(frozen=True)
class ConfigChange(Change):
    """A change of the configuration, with the weights as they are."""

    def fields(self, config: ModelConfig) -> dict[str, object]:
        """Return the fields of the configuration that change, for `with_config`."""
        raise NotImplementedError

    @property
    def source(self) -> str:
        """Return the same as arguments in Python, of the name `model`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Window(ConfigChange):
    """Give every layer another sliding window.

    window      how many keys a query sees, itself included; None: all
    """

    window: int | None
    kind: ClassVar[str] = "window"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None:
            self._keep("window", checked_int("window", self.window, least=1, most=MAX_VALUES["sliding_window"]))

    def fields(self, config: ModelConfig) -> dict[str, object]:
        """Return the window of each layer."""
        return {"sliding_window": (self.window,) * config.n_layers}

    @property
    def source(self) -> str:
        """Return the same in Python."""
        return f"sliding_window=({self.window},) * model.config.n_layers"

    def __str__(self) -> str:
        return f"let a query see {'all keys' if self.window is None else f'{self.window} keys, itself included'}"


@dataclass(frozen=True)
class Theta(ConfigChange):
    """Let RoPE turn queries and keys with another theta.

    theta   base of RoPE's frequencies, above 1
    """

    theta: float
    kind: ClassVar[str] = "theta"

    def __post_init__(self) -> None:
        super().__post_init__()
        theta = checked_float("theta", self.theta, 1, LARGEST)
        if theta == 1:
            raise InputError("theta is 1; expected more, so that later pairs turn slower")
        self._keep("theta", theta)

    def fields(self, config: ModelConfig) -> dict[str, object]:
        """Return the base of RoPE's frequencies."""
        return {"rope_theta": self.theta}

    @property
    def source(self) -> str:
        """Return the same in Python."""
        return f"rope_theta={self.theta}"

    def __str__(self) -> str:
        return f"let RoPE turn with theta {self.theta:g}"


@dataclass(frozen=True)
class PlantedBug(Change):
    """Plant a bug in the model.

    bug     a key of `mistral_ref.study.broken.BUGS`
    """

    bug: str
    kind: ClassVar[str] = "bug"

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_choice("bug", self.bug, BUGS)

    def __str__(self) -> str:
        return f"plant the bug {self.bug}: {BUGS[self.bug].sentence}"
