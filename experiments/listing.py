"""What can be chosen: ``flowerbed list``."""

from __future__ import annotations

import fnmatch
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from flowerbed.experiments.options import REQUIRED, Option, Thing, registry, thing

LONG_NAME = 24
"""The summary of a longer name begins further right than the others."""
PLURALS = {
    "models": "model",
    "strategies": "strategy",
    "datasets": "dataset",
    "partitions": "partition",
    "encoders": "encoder",
    "defences": "defence",
    "tamperings": "tampering",
}


def things(kind: str, pattern: str = "*") -> list[Thing]:
    """Return the things of a kind whose name matches the glob, by name.

    Beside what is registered or announced by packages these are Flower's own strategies (``flower:NAME``)
    and, asked for as ``timm:*``, timm's models.
    """
    if kind == "model" and pattern.startswith("timm:"):
        from flowerbed.models.zoo import list_models

        return [thing(kind, name) for name in list_models(pattern)]
    names = set(registry(kind).names())
    if kind == "strategy":
        from flowerbed.strategies.flower import flower_names

        names |= {f"flower:{name}" for name in flower_names()}
    if kind == "model":
        names.add("auto")
    return [thing(kind, name) for name in sorted(fnmatch.filter(names, pattern))]


def plain(found: Sequence[Thing]) -> list[dict[str, Any]]:
    """Return the list as JSON values: name, summary, and options with their defaults."""
    return [
        {
            "name": t.name,
            "summary": t.summary,
            "options": {o.name: None if o.default is REQUIRED else _jsonable(o.default) for o in _free(t)},
        }
        for t in found
    ]


def text(kind: str, found: Sequence[Thing]) -> str:
    """Return the list as a table of names and summaries with the options below, and how to use it."""
    if not found:
        return f"No {kind} matches."
    column = min(max(len(t.name) for t in found), LONG_NAME) + 2
    width = max(shutil.get_terminal_size((100, 24)).columns, 60)
    lines = []
    for t in found:
        lines.append(f"{t.name.ljust(column - 2)}  {t.summary}".rstrip())
        options = " ".join(f"{o.name}={shown(o.default)}" for o in _free(t)) + (" ..." if t.open else "")
        indent = " " * 4
        lines += textwrap.wrap(options.strip(), width, initial_indent=indent, subsequent_indent=indent,
                               break_long_words=False, break_on_hyphens=False)  # fmt: skip
    example = next((t for t in found if _free(t)), found[0])
    use = f"{kind}={example.name}"
    if _free(example):
        first = _free(example)[0]
        use += f" {kind}.{first.name}={shown(first.default)}"
    return "\n".join([*lines, "", f"Use one with: flowerbed simulate {use}"])


def shown(default: Any) -> str:
    """Return a default as it is written on the command line."""
    if default is REQUIRED:
        return "?"
    if default is None:
        return "null"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, list | tuple):
        return f"[{','.join(shown(item) for item in default)}]"
    if isinstance(default, Mapping):
        return "{" + ",".join(f"{key}:{shown(value)}" for key, value in default.items()) + "}"
    return str(default)


def option_lines(section: str, options: Sequence[Option]) -> list[tuple[str, str]]:
    """Return ``section.key=default`` and its explanation, for every option."""
    return [(f"{section}.{o.name}={shown(o.default)}", o.doc) for o in options]


def _free(described: Thing) -> list[Option]:
    """Return the options that the choice of the name leaves open."""
    return [o for o in described.options if o.name not in described.preset]


def _jsonable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
