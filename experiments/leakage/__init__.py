"""How much a federated run gives away: attacks on what was observed of it, scored against what clients had.

Here alone the truth is known (``flowerbed.experiments.leakage.truth``). Attacks live in
``flowerbed.strategies.attacks``, which cannot import it.
"""
