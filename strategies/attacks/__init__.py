"""Attacks on what clients send: gradient inversion, from observation to reconstruction.

An attack is given an ``Observation`` (what any server sees of one client in one round) and a ``SideInfo`` (what the
threat model grants beside it), and returns a ``Reconstruction``. What the client really had, ``Truth``, is a type of
``flowerbed.strategies.attacks.scoring`` that no attack imports; ``tests/strategies/test_attacks.py`` holds them to it.

An optimisation attack is a composition: search space x objective x priors x optimiser x label restorer
(``flowerbed.strategies.attacks.inversion``); the published ones are presets (``flowerbed.strategies.attacks.presets``).
"""
