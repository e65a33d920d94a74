"""What one sees in a pass: lenses, figures, the page, the stepper, planted bugs.

It may import everything but the commands; only commands, benchmarks, docs and tests import it (tests/test_imports.py).
"""
