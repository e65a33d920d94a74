"""Compiled kernels of mistral_ref: one operation a file. They know nothing of mistral_ref.

simd.py has vectors as Numba values, made of value.py's arithmetic and pairs.py; rows.py and tile.py the inner loops of
products; compiling.py how kernels are compiled and kept, threads.py what runs them, pool.py memory that is used again,
caches.py and limits.py what the machine has and can do. Kernels check nothing: their callers do.
"""


class KernelWarning(UserWarning):
    """Kernels are being compiled, cannot be kept, or cannot use all threads."""
