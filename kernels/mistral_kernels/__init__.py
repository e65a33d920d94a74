"""Compiled kernels for the operations of mistral_ref. They know nothing of it: arrays in, arrays out."""
