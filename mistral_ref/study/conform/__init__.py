"""The conformance kit: with what another engine proves that it computes the same.

`make` (make.py) writes tiny models in three layouts, texts of token ids, and what the oracle computes at every step.
`check` (check.py) reads what another engine computed, and says of each model whether it agrees, and if not, where it
departs and which known bug would explain it. `cases.py` has the models and the texts.
"""
