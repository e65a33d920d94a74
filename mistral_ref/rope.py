"""Rotary position embedding (RoPE), with or without YaRN: the angle of each pair of a head at each position.

At position p, pair j of a head of width K is turned by the angle p * theta^(-2j/K) (RoFormer, arXiv:2104.09864). The
dot product of a turned query and a turned key then depends on their distance, not on their positions. All operations
take their cosines and sines from this module.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from mistral_ref.config import ModelConfig, QueryTemperature, Yarn

AnglePrecision = Literal["float64", "float32"]


class Rotation(NamedTuple):
    """Cosines and sines (T, K/2) for the positions of one pass. The queries' are multiplied by their temperature."""

    query_cos: np.ndarray
    query_sin: np.ndarray
    key_cos: np.ndarray
    key_sin: np.ndarray


@cache
def inverse_frequencies(theta: float, head_dim: int, yarn: Yarn | None = None) -> np.ndarray:
    """Return the angle by which each pair turns from one position to the next: radians, float64 (K/2,), read-only.

    It is theta^(-2j/K) for pair j. YaRN divides the angles of slow pairs by its factor.

    >>> inverse_frequencies(10000.0, 4).tolist()
    [1.0, 0.01]
    """
    pair = np.arange(head_dim // 2)
    plain = frequencies = theta ** (-2.0 * pair / head_dim)
    if yarn is not None:
        low, high = yarn_ramp(theta, head_dim, yarn)
        share = np.clip((pair - low) / (high - low), 0.0, 1.0)
        frequencies = plain / yarn.factor * share + plain * (1.0 - share)
    frequencies.flags.writeable = False
    return frequencies


def yarn_ramp(theta: float, head_dim: int, yarn: Yarn) -> tuple[float, float]:
    """Return the two ends of YaRN's ramp, as numbers of pairs (arXiv:2309.00071, section 3.2).

    Pairs up to the first end keep their frequency. From the second end on the frequency is divided by the factor.

    Within L0 = original_max_position_embeddings positions pair j turns L0 theta^(-2j/K) / 2 pi times. This is r at
    j = K ln(L0 / (2 pi r)) / (2 ln theta). The ends are the j for r = beta_fast and r = beta_slow.

    Ministral 3 keeps the frequencies of pairs up to 20 and divides those from pair 37 on:

    >>> yarn_ramp(1e6, 128, Yarn(factor=16, original_max_position_embeddings=16384, beta_fast=32, beta_slow=1,
    ...     attention_factor=1))
    (20, 37)
    """

    def pair_that_turns(times: float) -> float:
        turns = yarn.original_max_position_embeddings / (times * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(theta))

    low, high = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return low, high if high != low else low + 0.001  # a ramp of no width would divide by zero


def query_temperature(positions_T: np.ndarray, temperature: QueryTemperature) -> np.ndarray:
    """Return the scale (T,) of each query: 1 + beta * ln(1 + floor(p / L0)), L0 = original_max_position_embeddings.

    >>> query_temperature(np.array([0, 16384]), QueryTemperature(beta=0.1, original_max_position_embeddings=16384))
    array([1.        , 1.06931472])
    """
    multiple = positions_T // temperature.original_max_position_embeddings
    return 1.0 + temperature.beta * np.log1p(multiple)


def rotation(
    positions_T: np.ndarray, config: ModelConfig, dtype: DTypeLike, angles: AnglePrecision = "float64"
) -> Rotation:
    """Return the cosines and sines (T, K/2) of a pass, rounded once to `dtype`.

    Angles are float64. `angles="float32"` rounds frequencies and angles to float32 as the published implementations
    do. The angle is then wrong by up to 3e-4 radians at position 4095 and by 2e-2 at 262143.
    """
    frequencies = inverse_frequencies(config.rope_theta, config.head_dim, config.yarn).astype(angles)
    angle = (positions_T[:, np.newaxis].astype(angles) * frequencies).astype(np.float64)
    key_scale = 1.0 if config.yarn is None else config.yarn.attention_factor
    cos, sin = np.cos(angle), np.sin(angle)
    key_cos, key_sin = ((key_scale * part).astype(dtype) for part in (cos, sin))
    if config.query_temperature is None:
        return Rotation(key_cos, key_sin, key_cos, key_sin)
    query_scale = key_scale * query_temperature(positions_T, config.query_temperature)[:, np.newaxis]
    return Rotation((query_scale * cos).astype(dtype), (query_scale * sin).astype(dtype), key_cos, key_sin)
