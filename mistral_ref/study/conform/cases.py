"""The models and the texts of the conformance kit. Every weight and every token id is the same on every machine.

A weight of a matrix is code * 2^-exponent; a code is a whole number of at most 7 bits and a sign. F32, BF16, F16 and
Q8_0 hold such numbers exactly, and so does fp8 with codes of 4 bits. So all files of a model hold the same weights. The
random bits are those of Philox, whose key is made of the seed and of the tensor's name: nothing depends on a version
of NumPy, and no function of a mathematical library is used.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mistral_ref.config import MixtureOfExperts, ModelConfig, QueryTemperature, Yarn, tensor_shapes

BOS = 1
WINDOW = 8
_STREAM = 2.0**-6  # size of what is added to the residual stream: so small that norm_eps matters
# Size of a matrix's outputs for inputs of size 1. Queries and keys are large, so attention is peaked: with flat
# attention a wrong key, angle or scale hardly moves the logits.
_GAIN = {"wq": 1.7, "wk": 1.7, "wv": 1.0, "wo": 1.2, "w1": 1.5, "w2": 1.5, "w3": 1.0, "gate": 2.0, "output": 2.0}
_TO_STREAM = ("wo", "w2", "tok_embeddings")


class Text(NamedTuple):
    """Token ids to compute.

    n_first     how many of them a first pass reads; the pass to be checked reads the others, over the cache that the
                first one has filled. 0: one pass reads all tokens
    """

    name: str
    tokens: tuple[int, ...]
    n_first: int


class Codes(NamedTuple):
    """The weights of a tensor: codes (int32) times 2^-exponent."""

    codes: np.ndarray
    exponent: int

    def values(self) -> np.ndarray:
        """Return the weights as float32, exactly."""
        return np.ldexp(self.codes.astype(np.float32), -self.exponent)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model of the kit.

    name        its folder
    says        what it is like
    model_type  in config.json
    architecture    in a GGUF file; None: a GGUF file cannot say what the model is like
    is_fp8      whether the matrices of the blocks are fp8
    seed        of the weights and texts; chosen so that rounding to 16 bits is magnified little
    """

    name: str
    says: str
    config: ModelConfig
    model_type: str = "mistral"
    architecture: str | None = "llama"
    is_fp8: bool = False
    seed: int = 0

    def codes(self) -> dict[str, Codes]:
        """Return the weights by Mistral's own names."""
        return {name: self._tensor(name, shape) for name, shape in tensor_shapes(self.config)}

    def is_stored_as_fp8(self, name: str) -> bool:
        """Return whether a tensor is fp8 in files that can hold it."""
        return self.is_fp8 and name.rpartition(".")[0].rpartition(".")[2] in ("wq", "wk", "wv", "wo", "w1", "w2", "w3")

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Codes:
        n = math.prod(shape)
        bits = random_bits(f"{self.name} {self.seed} {name}", n)
        if len(shape) == 1:  # a norm's weights: 1/2 to 2
            return Codes((32 + _below(bits, 97)).reshape(shape), 6)
        kind = name.removesuffix(".weight").rpartition(".")[2]
        tied_embedding = kind == "tok_embeddings" and self.config.tied_embeddings
        size = 1.0 if kind == "tok_embeddings" and not tied_embedding else _GAIN.get(kind, 2.0) / math.sqrt(shape[1])
        size *= _STREAM if kind in _TO_STREAM else 1.0
        most_bits = 4 if self.is_stored_as_fp8(name) else 7
        largest = size * math.sqrt(3.0)  # of uniform numbers whose root mean square is `size`
        exponent = most_bits - math.frexp(largest)[1]
        most = int(math.ldexp(largest, exponent))
        return Codes((_below(bits, 2 * most + 1) - most).reshape(shape), exponent)

    def texts(self) -> list[Text]:
        """Return the texts: short, as long as the window, far past it, and in two passes over a cache."""
        lengths = {"short": 5, "window": WINDOW, "past": 5 * WINDOW, "chunks": 6 * WINDOW}
        return [Text(name, self._tokens(name, n), n // 2 if name == "chunks" else 0) for name, n in lengths.items()]

    def _tokens(self, name: str, n: int) -> tuple[int, ...]:
        bits = random_bits(f"{self.name} {self.seed} text {name}", n - 1)
        return (BOS, *(2 + _below(bits, self.config.vocab_size - 2)).tolist())


def random_bits(key: str, n: int) -> np.ndarray:
    """Return n random numbers of 64 bits (uint64): the raw output of Philox 4x64-10 with a key made of a text.

    >>> [hex(bits) for bits in random_bits("conform", 2)]
    ['0x718b80bde311991e', '0x93552db42d0bfb10']
    """
    digest = hashlib.sha256(key.encode()).digest()[:16]
    return np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(n)


def _below(bits: np.ndarray, limit: int) -> np.ndarray:
    """Return whole numbers from 0 to limit - 1 (int32): the upper 32 bits times the limit, divided by 2^32."""
    return ((bits >> np.uint64(32)) * np.uint64(limit) >> np.uint64(32)).astype(np.int32)


def _config(
    heads: tuple[int, int, int], theta: float, windows: tuple[int | None, ...] = (None, None), **more: Any
) -> ModelConfig:
    """Return a configuration from heads (H, G, K), theta and the window of each layer."""
    n_heads, n_kv_heads, head_dim = heads
    widths: Mapping[str, Any] = {"dim": 32, "hidden_dim": 64, "vocab_size": 64} | more
    return ModelConfig(
        n_layers=len(windows),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        norm_eps=1e-5,
        rope_theta=theta,
        sliding_window=windows,
        rope_row_order="interleaved",
        max_seq_len=2048,
        **widths,
    )


# Of the 8 pairs of a head the ramp goes over 3 in `yarn`, which has YaRN's own betas, and over 2 in `ministral3`.
_MAGNITUDE = 0.1 * math.log(8) + 1
CASES = (
    Case(name="full", seed=6, says="full attention, as in Mistral 7B v0.3", config=_config((4, 2, 8), 1e6)),
    Case(name="window", says="a sliding window of 8, as in Mistral 7B v0.1",
         config=_config((4, 2, 8), 1e4, (WINDOW, WINDOW))),
    Case(name="interleaved", seed=1, says="one layer with full attention, two with a window, as in Ministral 8B",
         config=_config((4, 2, 8), 1e8, (None, WINDOW, WINDOW)), model_type="ministral", architecture=None),
    Case(name="nemo", seed=11, says="heads of a width of their own, as in Mistral Nemo",
         config=_config((4, 2, 16), 1e6)),
    Case(name="multi_query", seed=7, says="one key/value head, tied embeddings, and a window",
         config=_config((4, 1, 8), 1e4, (WINDOW, WINDOW), tied_embeddings=True)),
    Case(name="yarn", seed=12, says="YaRN whose magnitude is 0.1 ln 8 + 1, as in Yarn-Mistral",
         config=_config((4, 2, 16), 1e4,
                        yarn=Yarn(factor=8, original_max_position_embeddings=256, beta_fast=32, beta_slow=1,
                                  attention_factor=_MAGNITUDE))),
    Case(name="ministral3", seed=3, says="YaRN of magnitude 1, a query temperature, tied embeddings, as in Ministral 3",
         config=_config((4, 2, 16), 1e6, tied_embeddings=True,
                        yarn=Yarn(factor=16, original_max_position_embeddings=10, beta_fast=1, beta_slow=0.03125,
                                  attention_factor=1),
                        query_temperature=QueryTemperature(beta=0.4, original_max_position_embeddings=10)),
         model_type="ministral3", architecture="mistral3"),
    Case(name="mixtral", says="two experts of six, as in Mixtral",
         config=_config((4, 2, 8), 1e6, hidden_dim=32, moe=MixtureOfExperts(num_experts=6, num_experts_per_tok=2)),
         model_type="mixtral"),
    Case(name="fp8", seed=2, says="weights in fp8 with scales, as in Devstral 2", config=_config((4, 2, 16), 1e6),
         architecture=None, is_fp8=True),
)  # fmt: skip
