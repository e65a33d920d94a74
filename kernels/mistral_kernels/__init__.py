"""Compiled kernels of mistral_ref: one operation a file. They know nothing of mistral_ref.

simd.py has vectors as Numba values, tile.py the inner loop of products and attention, compiling.py how kernels are
compiled and kept, threads.py what runs them. Kernels check nothing; whoever calls them does.
"""


class KernelWarning(UserWarning):
    """Kernels are being compiled, cannot be kept, or cannot use all threads."""
