"""Read and write files: configurations, weights, quantized models, caches, dumps. Nothing here computes with a model.

From the top folder the modules here import only config, weights, quantized_matrix, steps, display and errors
(tests/test_imports.py checks this).
"""
