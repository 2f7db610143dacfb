"""From a paper's arms and claims to a verdict: the engine behind ``flowerbed reproduce`` and ``flowerbed papers``.

``paper``      what a paper is made of: arms (overrides of a simulation), claims, optional functions of its own.
``claims``     an inequality with a margin, and what the runs say about it.
``running``    one arm with one seed through the ordinary simulation, kept in a directory of its own.
``schedule``   all of them, resumed or reused, side by side where cores allow.
``ledger``     the record that is left, what it was made of, and whether it still holds.
``report``     the same for a person: Markdown and pictures.
"""
