"""What a result was made from, as hashes: so that a record knows when it is out of date.

The code of a paper counts without comments, docstrings and its ``PAPER = ...`` statement: rewording a claim or a
comment repeats no run. In a package the modules of claims, plain twins and picture do not count either. Settings count
as the paper states them, at one scale; where a run is computed does not.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import io
import json
import tokenize
from collections.abc import Iterator, Mapping
from typing import Any

from flowerbed.experiments.reproduction.paper import Arm, Paper, Scale

NEUTRAL_SECTIONS = ("grid", "run", "tracking")
NEUTRAL_DATA = ("dir", "cache", "download")
LENGTH = 16


def digest(value: Any) -> str:
    """Return the hash of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:LENGTH]


def deciding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that decide a result; where and how it is computed does not."""
    kept = {section: value for section, value in settings.items() if section not in NEUTRAL_SECTIONS}
    data = {key: value for key, value in kept.pop("data", {}).items() if key not in NEUTRAL_DATA}
    return {**kept, "data": data} if data else kept


def config(scale: Scale) -> str:
    """Return the hash of all arms and seeds of a scale."""
    arms = {name: deciding(arm.settings) for name, arm in scale.arms.items()}
    return digest({"seeds": list(scale.seeds), "arms": arms})


def claims(paper: Paper) -> str:
    """Return the hash of what the paper claims."""
    return digest(
        [[c.name, list(map(str, c.conditions)), list(map(str, c.weaker)), c.seeds] for c in paper.claims]
    )


def module(paper: Paper) -> str:
    """Return the hash of the paper's own code and of the modules that it uses."""
    sources = [inspect.getsource(importlib.import_module(name)) for name in paper.sources()]
    return digest([code_of(source) for source in sources])


def run(code: str, arm: Arm, seed: int, models: Mapping[str, str]) -> str:
    """Return the hash of one run of the paper whose code has the hash ``code``.

    ``models`` say, by reference, from which runs it starts.
    """
    return digest([code, deciding(arm.filled(seed, models))])


def code_of(source: str) -> str:
    """Return Python source without comments, docstrings, blank lines and the top-level ``PAPER = ...``."""
    lines = [bytearray(line, "utf-8") for line in source.splitlines()]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            start = len(token.line[:column].encode())
            del lines[row - 1][start:]
    tree = ast.parse(source)
    for node in (*_docstrings(tree), *_definitions(tree)):
        for row in range(node.lineno, (node.end_lineno or node.lineno) + 1):
            lines[row - 1].clear()
    kept = (line.decode().rstrip() for line in lines)
    return "\n".join(line for line in kept if line)


def _docstrings(tree: ast.AST) -> Iterator[ast.stmt]:
    """Yield statements that are nothing but a text: docstrings, also those under the fields of a class."""
    for node in ast.walk(tree):
        for statement in getattr(node, "body", ()) if isinstance(getattr(node, "body", ()), list) else ():
            if (
                isinstance(statement, ast.Expr)
                and isinstance(statement.value, ast.Constant)
                and isinstance(statement.value.value, str)
            ):
                yield statement


def _definitions(tree: ast.Module) -> Iterator[ast.stmt]:
    for statement in tree.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else ()
        if any(isinstance(target, ast.Name) and target.id == "PAPER" for target in targets):
            yield statement
