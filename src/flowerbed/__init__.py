"""flowerbed: a federated-learning simulation platform.

An algorithm is written once, as a server half and a client half that exchange Flower messages, and runs
unchanged in this process, on a Ray cluster, or on real devices.
"""

__version__ = "0.1.0"
