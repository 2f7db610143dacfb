"""Name -> object tables with refusal: duplicates are an error, an unknown name lists what exists."""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from flowerbed.errors import ConfigError, unknown_name

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of named things of one kind (models, strategies, data sets, partitions).

    Besides the names registered here, ``get`` understands ``package.module:Attribute`` and the names that
    installed packages announce under the entry-point group ``flowerbed.<kind>s``, so that a user's own
    thing needs no change to this code.
    """

    def __init__(self, kind: str) -> None:
        """``kind`` is the singular noun used in messages, for example ``"strategy"``."""
        self.kind = kind
        self.group = "flowerbed.strategies" if kind == "strategy" else f"flowerbed.{kind}s"
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> T:
        """Register ``entry`` as ``name``; raises ``ConfigError`` if the name is taken by another entry."""
        if name in self._entries and self._entries[name] is not entry:
            raise ConfigError(f"The {self.kind} name '{name}' is already registered; choose another name.")
        self._entries[name] = entry
        return entry

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers the decorated object as ``name``."""
        return lambda entry: self.add(name, entry)

    def get(self, name: str) -> T:
        """Return the entry called ``name``; raises ``ConfigError`` naming the nearest and all known names."""
        if name in self._entries:
            return self._entries[name]
        if ":" in name:
            entry: T = import_attribute(name, self.kind)
            return entry
        for point in entry_points(group=self.group):
            if point.name == name:
                loaded: T = point.load()
                return loaded
        raise ConfigError(
            unknown_name(self.kind, name, self.names())
            + f" Your own {self.kind} is named by import path, package.module:Name."
        )

    def names(self, pattern: str = "*") -> list[str]:
        """Return the known names (registered and announced by entry points) that match the glob, sorted."""
        announced = {point.name for point in entry_points(group=self.group)}
        return sorted(n for n in announced | set(self._entries) if fnmatch.fnmatchcase(n, pattern))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self._entries


def import_attribute(path: str, kind: str) -> T:  # type: ignore[type-var]
    """Import ``package.module:Attribute``; raises ``ConfigError`` that says which half is wrong."""
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"The {kind} '{path}' cannot be imported: {error}. Is the module on the Python path?"
        ) from error
    try:
        found: T = getattr(module, attribute)
    except AttributeError as error:
        public = [n for n in vars(module) if not n.startswith("_")]
        raise ConfigError(unknown_name(f"attribute of module {module_name}", attribute, public)) from error
    return found
