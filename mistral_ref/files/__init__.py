"""What lies on a disk: configurations, weights, quantized models, dumps. Nothing here computes with a model.

Of the ground floor this room imports only what it fills: config, weights, *_matrix, steps, display, errors
(tests/test_imports.py).
"""
