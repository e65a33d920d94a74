"""What a pass costs: counted, predicted and measured; how surprised a model is by a text.

It may import the model, files/ and text/, not study/ (tests/test_imports.py).
"""
