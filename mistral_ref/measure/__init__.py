"""What a pass costs (counted, predicted and measured), and how surprised a model is by a text.

This package may import the model, files/ and text/. It may not import study/ (tests/test_imports.py checks it).
"""
