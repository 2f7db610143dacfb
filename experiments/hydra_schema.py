"""Structured Hydra schemas, generated from the frozen dataclasses and registries that the platform uses anyway.

OmegaConf makes instances of frozen dataclasses read-only, and it knows fewer types than Python. So each
class gets a twin: the same keys and defaults, unfrozen, in types that OmegaConf checks.
"""

from __future__ import annotations

import copy
import copyreg
import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, Optional, Union

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from flowerbed.experiments.config import CHOICES, SECTIONS, Simulation
from flowerbed.experiments.options import KINDS, REQUIRED, Option, Thing, options_of, registry, thing

PLAIN = (int, float, str, bool)
CONF = Path(__file__).parent / "conf"
NAMED = ("grid", "tracking")
"""Sections that are also groups: ``grid=ray`` sets ``grid.name``."""
# Launchers with processes of their own get the twins by value, and give them back with their jobs' results. The mark
# of a field without a default is compared by identity, so it has to stay the one object.
copyreg.pickle(type(dataclasses.MISSING), lambda _: "MISSING")


def register(chosen: Mapping[str, Iterable[str]]) -> None:
    """Put the schemas into Hydra's store: all registered things, and those ``chosen`` by kind.

    ``chosen`` matters for names that no registry lists: import paths, ``flower:``, ``timm:`` and ``npz:``
    names, and names that installed packages announce.
    """
    _store("schema", "simulation", OmegaConf.structured(root_schema()))
    for section in NAMED:
        _store("schema", section, OmegaConf.structured(twin(SECTIONS[section])))
    for kind in KINDS:
        table = registry(kind)
        names = {name for name in table if name in table}
        names |= {"auto"} if kind == "model" else set()
        for name in sorted(names | set(chosen.get(kind, ()))):
            _register_thing(kind, name)


@cache
def _register_thing(kind: str, name: str) -> None:
    node = schema(thing(kind, name))
    if kind == "strategy":
        _store("schema/strategy", name, node)
    if not (CONF / kind / f"{name}.yaml").exists():
        _store(kind, name, node)


@cache
def root_schema() -> type:
    """Return the twin of ``Simulation``; what is chosen by name may hold anything, its own schema checks it."""
    fields: list[tuple[str, Any, Any]] = []
    for option in options_of(Simulation)[0]:
        if option.name in CHOICES:
            fields.append((option.name, Any, dataclasses.field(default=None)))
        elif option.name in SECTIONS:
            section = twin(SECTIONS[option.name])
            fields.append((option.name, section, dataclasses.field(default_factory=section)))
        else:
            fields.append(_field(option))
    return dataclasses.make_dataclass("simulation", fields)


@cache
def twin(cls: type) -> type:
    """Return the unfrozen twin of a dataclass."""
    return dataclasses.make_dataclass(cls.__name__, [_field(option) for option in options_of(cls)[0]])


def schema(described: Thing) -> DictConfig:
    """Return the node that ``kind=name`` puts into the configuration."""
    options = [Option("name", str, described.name), *described.options]
    made = dataclasses.make_dataclass("options", [_field(option) for option in options])
    node = OmegaConf.structured(made)
    node.merge_with(described.preset)
    for option in described.options:
        if isinstance(option.default, dict):
            # A dictionary of options takes new keys without Hydra's "+".
            OmegaConf.set_struct(node[option.name], False)
    if described.open:
        node = OmegaConf.create(OmegaConf.to_container(node))
        OmegaConf.set_struct(node, False)
    assert isinstance(node, DictConfig)
    return node


def _store(group: str, name: str, node: Any) -> None:
    # A name may hold slashes (npz:/data/set.npz); for Hydra these are folders of the group.
    *folders, last = name.split("/")
    ConfigStore.instance().store(group="/".join([group, *folders]), name=last, node=node)


def _field(option: Option) -> tuple[str, Any, Any]:
    kind = storable(option.type)
    if option.default is REQUIRED:
        return option.name, kind, dataclasses.field(default=MISSING)
    default = _storable_value(option.default)
    if isinstance(default, list | dict):
        return option.name, kind, dataclasses.field(default_factory=lambda: copy.deepcopy(default))
    return option.name, kind, dataclasses.field(default=default)


def storable(kind: Any) -> Any:
    """Return the type that OmegaConf checks for values of ``kind``; ``Any`` where it knows none."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind in PLAIN:
        return kind
    if kind is Path:
        return str
    if origin is Literal:
        kinds = {type(value) for value in arguments}
        return kinds.pop() if len(kinds) == 1 and kinds <= set(PLAIN) else Any
    if origin in (Union, types.UnionType):
        rest = [a for a in arguments if a is not type(None)]
        return Optional[storable(rest[0])] if len(rest) == 1 else Any  # noqa: UP045
    if origin in (tuple, list, Sequence):
        item = storable(arguments[0]) if arguments else Any
        return list[item]  # type: ignore[valid-type]
    if origin in (dict, Mapping) or kind is dict:
        return dict[str, Any]
    return Any


def _storable_value(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_storable_value(item) for item in value]
    if isinstance(value, Mapping):
        return dict(value)
    return str(value) if isinstance(value, Path) else value
