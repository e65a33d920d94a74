"""Ways to study a pass: lenses, figures, the page, the stepper, planted bugs.

This package may import everything but the commands. Only commands, benchmarks, docs and tests may import it
(tests/test_imports.py checks it).
"""
