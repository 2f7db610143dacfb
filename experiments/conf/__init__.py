"""Hydra finds this folder as a package of configurations by exactly this file."""
