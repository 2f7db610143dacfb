"""What a configurable thing can be told: its options with type, default and one line of explanation.

Read from the things themselves (dataclass fields with the docstrings under them, keyword parameters), so
that the configuration, the help and the lists never say anything else than the code.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any, Final

from flowerbed.errors import ConfigError, unknown_name
from flowerbed.registry import Registry

REQUIRED: Final = dataclasses.MISSING
"""The default of an option that must be given."""
KINDS: Final = ("strategy", "dataset", "partition", "encoder", "model", "defence", "tampering")
"""The kinds of things that are chosen by name."""


@dataclass(frozen=True)
class Option:
    """One option: a key under its section."""

    name: str
    type: Any
    default: Any
    doc: str = ""


@dataclass(frozen=True)
class Thing:
    """A thing that can be chosen, as it appears in the configuration."""

    name: str
    summary: str = ""
    options: tuple[Option, ...] = ()
    open: bool = False
    """Whether it takes further options that are not listed here."""
    preset: dict[str, Any] = field(default_factory=dict)
    """Values that the choice of this name sets; ``name`` is what the configuration stores."""


def registry(kind: str) -> Registry[Any]:
    """Return the filled registry of a kind; imports torch."""
    if kind == "strategy":
        from flowerbed.strategies.base import STRATEGIES
        from flowerbed.strategies.loader import load_all

        load_all()
        return STRATEGIES
    if kind == "dataset":
        from flowerbed.datasets.sources import DATASETS

        return DATASETS
    if kind == "partition":
        from flowerbed.datasets.partitions import PARTITIONS

        return PARTITIONS
    if kind == "encoder":
        from flowerbed.experiments.encoders import ENCODERS

        return ENCODERS
    if kind == "model":
        from flowerbed.models.zoo import MODELS

        return MODELS
    if kind == "defence":
        from flowerbed.clients.defences import DEFENCES

        return DEFENCES
    if kind == "tampering":
        from flowerbed.strategies.attacks.tampering import TAMPERINGS

        return TAMPERINGS
    raise ConfigError(unknown_name("kind of thing", kind, KINDS))


def thing(kind: str, name: str) -> Thing:
    """Describe what ``kind=name`` chooses; raises ``ConfigError`` for an unknown name or a failed import."""
    if kind == "strategy":
        return _strategy(name)
    if kind == "dataset" and name.startswith(("npz:", "hf:")):
        from flowerbed.datasets.hugging_face import HuggingFace
        from flowerbed.datasets.npz import NpzFile

        # The first field is what the name says.
        source = NpzFile if name.startswith("npz:") else HuggingFace
        return Thing(name, first_line(source), options_of(source)[0][1:], preset={"name": name})
    if kind == "model" and name == "auto":
        return Thing(name, "The default model of the data set.", preset={"name": name})
    if kind == "model" and name.startswith("timm:"):
        return Thing(name, "A model of the timm library.", open=True, preset={"name": name})
    entry = registry(kind).get(name)
    options, is_open = options_of(entry, skip=2 if kind == "model" else 0)
    return Thing(name, first_line(entry), options, is_open, {"name": name})


def complete(kind: str, name: str, given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the stored name and all options of a choice: those given, and the defaults of the others.

    So that the same run has the same description however it was asked for, and keeps it when a default
    changes later. An option that does not exist is left for the thing itself to refuse.
    """
    found = thing(kind, name)
    values = {o.name: _as_stored(o.default) for o in found.options if o.default is not REQUIRED}
    preset = dict(found.preset)
    stored = preset.pop("name", name)
    given = dict(given)
    if kind == "strategy" and name.startswith("flower:"):
        # Short form: what is no setting of the wrapper is a keyword argument of the Flower class.
        extra = {key: given.pop(key) for key in list(given) if key not in values}
        given["options"] = {**given.get("options", {}), **extra}
    return stored, {**values, **preset, **given}


def _as_stored(value: Any) -> Any:
    return [_as_stored(item) for item in value] if isinstance(value, tuple) else value


def _strategy(name: str) -> Thing:
    from flowerbed.strategies.base import FederatedStrategy
    from flowerbed.strategies.flower import FlowerParams, flower_names

    if name.startswith("flower:"):
        import flwr.serverapp.strategy as flower

        stock = name.removeprefix("flower:")
        if ":" not in stock and stock not in flower_names():
            raise ConfigError(unknown_name("Flower strategy", stock, flower_names()))
        summary = first_line(getattr(flower, stock, None))
        return Thing(name, summary, options_of(FlowerParams)[0], preset={"name": "flower", "flower": stock})
    entry = registry("strategy").get(name)
    if isinstance(entry, type) and issubclass(entry, FederatedStrategy):
        # An algorithm file says in its first line what it is; the class says how it is written.
        summary = first_line(inspect.getmodule(entry)) or first_line(entry)
        return Thing(name, summary, options_of(entry.Params)[0], preset={"name": name})
    # Somebody's plain Flower strategy: its options are its own keyword arguments, checked when it is built.
    return Thing(name, first_line(entry), open=True, preset={"name": name})


def options_of(source: Any, skip: int = 0) -> tuple[tuple[Option, ...], bool]:
    """Return the options of a dataclass or callable, without its first ``skip`` parameters.

    The second value says whether it takes any other keywords as well.
    """
    if dataclasses.is_dataclass(source):
        owner = source if isinstance(source, type) else type(source)
        return _fields(owner), False
    hints = _hints(source)
    found, is_open = [], False
    for parameter in list(inspect.signature(source).parameters.values())[skip:]:
        if parameter.kind is parameter.VAR_KEYWORD:
            is_open = True
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            default = REQUIRED if parameter.default is parameter.empty else parameter.default
            kind = hints.get(parameter.name, Any if default in (None, REQUIRED) else type(default))
            found.append(Option(parameter.name, kind, default))
    return tuple(found), is_open


@cache
def _fields(cls: type) -> tuple[Option, ...]:
    hints, docs = _hints(cls), field_docs(cls)
    options = []
    for f in dataclasses.fields(cls):
        if not f.init:
            continue
        made = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        options.append(Option(f.name, hints.get(f.name, Any), made, docs.get(f.name, "")))
    return tuple(options)


def field_docs(cls: type) -> dict[str, str]:
    """Return the docstrings written under the fields of a class and its bases; {} without source."""
    docs: dict[str, str] = {}
    for owner in reversed(cls.__mro__[:-1]):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
        except (OSError, TypeError, SyntaxError):
            continue
        definition = tree.body[0]
        if not isinstance(definition, ast.ClassDef):
            continue
        for target, text in pairwise(definition.body):
            if (
                isinstance(target, ast.AnnAssign)
                and isinstance(target.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                docs[target.target.id] = _plain(text.value.value)
    return docs


def first_line(source: Any) -> str:
    """Return the first line of an object's own docstring, without markup; "" if there is none."""
    text = inspect.getdoc(source) if source is not None else None
    name = getattr(source, "__name__", "")
    # Dataclasses without a docstring get one that repeats their signature.
    if not text or text.startswith(f"{name}("):
        return ""
    return _plain(text.strip().splitlines()[0]).removeprefix("Return ")


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("``", "")


def _hints(source: type | Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(source)
    except (NameError, TypeError):
        # A name that is only imported for type checkers; the option is then of any type.
        return {}
