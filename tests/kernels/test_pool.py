"""ArrayPool: memory is used again, and never while anybody holds an array that lies in it."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral_kernels.pool import LINE, MAX_KEPT_BYTES, MIN_BYTES, ArrayPool

LARGE = MIN_BYTES // 4  # float32 numbers


def place(array: np.ndarray) -> int:
    return array.ctypes.data


def kept_bytes(pool: ArrayPool) -> int:
    return sum(map(len, pool._free))


@given(st.data())
@settings(max_examples=100)
def test_arrays_that_live_at_the_same_time_share_nothing(data: st.DataObject) -> None:
    """Any order of taking and letting go: each still holds the number that was written into it alone."""
    pool, held = ArrayPool(), {}
    for number in range(data.draw(st.integers(1, 25))):
        if held and data.draw(st.booleans()):
            del held[data.draw(st.sampled_from(sorted(held)))]
        array = pool.empty((data.draw(st.integers(1, 5 * LARGE)),))
        array[:] = number
        held[number] = array[data.draw(st.integers(0, len(array) - 1)) :: 3]  # a view keeps the memory
    for number, array in held.items():
        assert (array == number).all()


@pytest.mark.parametrize("dtype", ["float32", "int16", "int8"])
def test_an_array_is_like_any_other(dtype: str) -> None:
    array = ArrayPool().empty((3, MIN_BYTES, 5), dtype)
    assert (array.shape, array.dtype) == ((3, MIN_BYTES, 5), np.dtype(dtype))
    assert array.flags.c_contiguous
    assert array.flags.writeable
    assert place(array) % LINE == 0


@pytest.mark.parametrize("shape", [(), (0,), (0, LARGE), (1,), (LARGE - 1,), (2, 3)])
def test_small_arrays_are_left_to_numpy(shape: tuple[int, ...]) -> None:
    pool = ArrayPool()
    array = pool.empty(shape)
    assert array.shape == shape
    del array
    assert kept_bytes(pool) == 0


def test_memory_comes_back_with_the_last_view_and_not_before() -> None:
    pool = ArrayPool()
    array = pool.empty((LARGE, 2))
    first, row = place(array), array.reshape(2, LARGE)[1].view(np.int32)
    del array
    assert kept_bytes(pool) == 0
    assert place(pool.empty((LARGE, 2))) != first
    del row
    gc.collect()
    assert place(pool.empty((LARGE, 2))) == first


def test_the_smallest_that_is_large_enough_is_taken_and_none_twice_as_large() -> None:
    pool = ArrayPool()
    sizes = (4, 3, 2)
    arrays = [pool.empty((size * LARGE,)) for size in sizes]
    places = dict(zip(sizes, map(place, arrays), strict=True))
    del arrays
    assert place(pool.empty((2 * LARGE - 9,))) == places[2]
    assert place(pool.empty((2 * LARGE + 9,))) == places[3]
    assert place(pool.empty((LARGE,))) not in places.values()


def test_an_array_that_grows_from_one_time_to_the_next_seldom_takes_new_memory() -> None:
    pool = ArrayPool()
    places = {place(pool.empty((LARGE + size,))) for size in range(0, 7 * LARGE, 99)}
    assert len(places) <= 4 * 3 + 1


def test_what_nobody_holds_stays_within_bounds() -> None:
    """Prompts of ever new lengths leave memory of ever new sizes behind: the oldest goes back to the system."""
    pool = ArrayPool()
    for size in range(16, 1, -1):
        several = [pool.empty((size * 2**20,)) for _ in range(8)]
        del several
    held = pool.empty((MAX_KEPT_BYTES // 4,))
    assert kept_bytes(pool) <= MAX_KEPT_BYTES < kept_bytes(pool) + held.nbytes


def test_threads_may_take_and_let_go_at_once() -> None:
    pool, failed = ArrayPool(), []

    def work(number: int) -> None:
        for turn in range(300):
            array = pool.empty((LARGE + turn,))
            array[:] = number
            if not (array == number).all():
                failed.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(pool._free) <= 8  # for each thread one of two sizes
