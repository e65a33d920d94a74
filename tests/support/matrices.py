"""Small matrices of any numbers, with many that are special."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import strategies as st

SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.0, -2.0, math.inf, -math.inf, math.nan]


@st.composite
def matrices(draw: st.DrawFn) -> np.ndarray:
    shape = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    values = st.sampled_from(SPECIAL) | st.floats(-1e6, 1e6, width=32)
    flat = draw(st.lists(values, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    return np.array(flat, draw(st.sampled_from([np.float32, np.float64]))).reshape(shape)
