"""A Sphinx extension: what can be chosen, every setting and every command as pages, read from the code itself.

The pages are written into ``_generated/`` before each build, so they cannot fall behind. Docstrings are prose with
``literals``, lists and tables; what reStructuredText would take for markup of its own (``w_t``, ``|x|``, ``2 * x``) is
escaped.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flowerbed.errors import ConfigError
from flowerbed.experiments import cli
from flowerbed.experiments.config import SECTIONS, Simulation
from flowerbed.experiments.listing import shown, things
from flowerbed.experiments.options import (
    KINDS,
    REQUIRED,
    Option,
    Thing,
    field_docs,
    first_line,
    options_of,
    thing,
)
from flowerbed.experiments.reproduction import ledger, report
from flowerbed.experiments.reproduction.catalogue import catalogue
from flowerbed.experiments.reproduction.ledger import Record, Standing
from flowerbed.experiments.reproduction.paper import built
from flowerbed.experiments.text import duration
from flowerbed.strategies.attacks.presets import ATTACKS

BORDER = re.compile(r"=+( +=+)*$")
ITEM = re.compile(r"\s*((?:-|\d+\.) +)")
# Literals and emphasis are meant; of everything else the characters that would start markup are not.
MARKUP = re.compile(
    r"(?P<kept>``.+?``|(?<![\w*])\*{1,2}[^\s*](?:[^*\n]*[^\s*])?\*{1,2}(?![\w*]))|[\\*`|]|_(?!\w)", re.DOTALL
)
MARKER = "<!-- further pages -->"
PAPERS = """\
The {count} papers that `flowerbed reproduce` has run, with every claim as it came out. A claim is an inequality over
arms, stated before the runs and judged by the mean over all seeds: *reproduced* if it holds, *direction only* if the
effect has the right sign but not the size, *mechanism only* if just a weaker statement holds.
[Reproduce a paper](../reproduce-a-paper.md) says how to run one, or to add one.
"""
PREFIXED = {"dataset": ("hf:NAME", "npz:PATH"), "model": ("timm:NAME",)}
"""Names that no registry lists, as they are written."""
API = {
    "Running": ("flowerbed.experiments.simulation", "flowerbed.experiments.config", "flowerbed.errors"),
    "Strategies": (
        *("flowerbed.strategies.base", "flowerbed.strategies.fedavg", "flowerbed.strategies.aggregation"),
        *("flowerbed.pooling", "flowerbed.strategies.server_side", "flowerbed.experiments.conformance"),
    ),
    "Clients": (
        *("flowerbed.clients.half", "flowerbed.clients.local_round", "flowerbed.clients.training"),
        *(
            "flowerbed.clients.data",
            "flowerbed.clients.params",
            "flowerbed.clients.store",
            "flowerbed.clients.updates",
        ),
    ),
    "Server and grids": (
        *("flowerbed.server.loop", "flowerbed.server.callbacks", "flowerbed.server.params"),
        *("flowerbed.server.sampling", "flowerbed.server.checkpoint", "flowerbed.server.grids.base"),
    ),
    "Models": (
        *("flowerbed.models.base", "flowerbed.models.zoo", "flowerbed.models.info", "flowerbed.models.parts"),
        *("flowerbed.models.tasks", "flowerbed.models.evaluation"),
    ),
    "Data sets": (
        *("flowerbed.datasets.sources", "flowerbed.datasets.dataset", "flowerbed.datasets.source"),
        *("flowerbed.datasets.hugging_face", "flowerbed.datasets.npz", "flowerbed.datasets.partitions"),
    ),
    "Attacks": (
        *("flowerbed.strategies.attacks.presets", "flowerbed.strategies.attacks.observation"),
        *("flowerbed.strategies.attacks.inversion", "flowerbed.strategies.attacks.descents"),
        *("flowerbed.experiments.leakage.attacking", "flowerbed.experiments.leakage.matrix"),
    ),
    "Results": (
        *("flowerbed.experiments.measures", "flowerbed.experiments.export", "flowerbed.experiments.compare"),
        *("flowerbed.experiments.papers", "flowerbed.experiments.reproduction.paper"),
        *(
            "flowerbed.experiments.reproduction.claims",
            "flowerbed.storage",
            "flowerbed.seeds",
            "flowerbed.messages",
        ),
    ),
}
"""The modules whose docstrings are shown, by page: the seams, and what a user calls."""


def setup(app: Any) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("builder-inited", lambda app: write(Path(app.srcdir)))
    app.connect("source-read", further_pages)
    app.connect("autodoc-process-docstring", lambda app, what, name, thing, options, lines: escape(lines))
    return {"version": "1", "parallel_read_safe": True}


def write(source: Path) -> None:
    """Write all generated pages; those that are as they were keep their time."""
    folder = source / "_generated"
    folder.mkdir(exist_ok=True)
    for name, text in pages().items():
        path = folder / f"{name}.md"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def pages() -> dict[str, str]:
    """Return every generated page by name."""
    found = {plural(kind): choices(kind) for kind in KINDS}
    found["attacks"] = attacks()
    found["settings"] = settings()
    found["commands"] = commands()
    found["papers"] = papers()
    for title, modules in API.items():
        found[f"api-{title.lower().replace(' ', '-')}"] = api(title, modules)
    return found


def plural(kind: str) -> str:
    """Return the name of the page of a kind of things."""
    return "strategies" if kind == "strategy" else f"{kind}s"


def choices(kind: str) -> str:
    """Return the page of everything that ``kind=NAME`` chooses, with the options of each."""
    lines = [
        f"# {plural(kind).capitalize()}",
        "",
        f"Chosen with `{kind}=NAME`, options with `{kind}.OPTION=VALUE`.",
    ]
    prefixed = [thing(kind, name) for name in PREFIXED.get(kind, ())]
    for found in (*things(kind), *prefixed):
        lines += ["", f"## {found.name}", "", _sentence(found.summary), *_table(found)]
    return "\n".join([*lines, ""])


def attacks() -> str:
    """Return the page of the gradient-inversion attacks: their constants, which ``attack.OPTION`` replaces."""
    module = importlib.import_module("flowerbed.strategies.attacks.presets")
    lines = ["# Attacks", "", _sentence(first_line(module)), "", "Chosen with `attack=NAME`."]
    for name in ATTACKS:
        try:
            attack = ATTACKS.get(name)(None)
        except ConfigError as refusal:
            lines += ["", f"## {name}", "", _sentence(str(refusal))]
            continue
        lines += ["", f"## {name}", "", "| part | value |", "|---|---|"]
        for option in options_of(type(attack))[0]:
            if option.name != "name":
                lines.append(f"| `{option.name}` | `{_cell(repr(getattr(attack, option.name)))}` |")
    return "\n".join([*lines, ""])


def settings() -> str:
    """Return the page of every key of a run that no choice by name brings."""
    lines = ["# Settings", "", "Every key of `config.yaml`, beside the options of what is chosen by name."]
    plain = [option for option in options_of(Simulation)[0] if option.name not in SECTIONS]
    docs = field_docs(Simulation)
    lines += ["", "| key | default | meaning |", "|---|---|---|"]
    for option in plain:
        default = option.default.name if hasattr(option.default, "name") else shown(option.default)
        lines.append(
            f"| `{option.name}` | `{default}` | {_cell(docs.get(option.name, '')) or _choice(option)} |"
        )
    for section, cls in SECTIONS.items():
        described = Thing(section, first_line(cls), options_of(cls)[0])
        lines += ["", f"## {section}", "", _sentence(described.summary), *_table(described, f"{section}.")]
    return "\n".join([*lines, ""])


def commands() -> str:
    """Return the page of the commands with their help."""
    lines = ["# Commands"]
    benchmarks = [["bench", name] for name in cli.BENCHMARKS]
    for words in ([], *([name] for name in subcommands() if name != "bench"), *benchmarks):
        title, arguments = " ".join(["flowerbed", *words]), [*words, "--help"]
        lines += ["", f"## {title}", "", "```text", help_text(arguments).rstrip(), "```"]
    return "\n".join([*lines, ""])


def papers() -> str:
    """Return the page of the papers that have a record: what they claim, and what came of it here."""
    standings = [ledger.standing(slug, slug in built()) for slug in catalogue()]
    found = [(standing, standing.record) for standing in standings if standing.record]
    lines = ["# Papers and verdicts", "", PAPERS.format(count=len(found))]
    lines += ["| paper | reproduced | otherwise | scale | one run after the other |", "|---|---|---|---|---|"]
    for standing, record in found:
        lines.append(
            f"| [{standing.slug}](#{standing.slug}) | {standing.passed} | {standing.failed} | {record['scale']} | "
            f"{duration(record['seconds'])} |"
        )
    passed, failed = (sum(getattr(s, name) for s, _ in found) for name in ("passed", "failed"))
    lines.append(f"| all | {passed} | {failed} | | {duration(sum(r['seconds'] for _, r in found))} |")
    for standing, record in found:
        lines += _paper(standing, record)
    return "\n".join([*lines, ""])


def _paper(standing: Standing, record: Record) -> Iterator[str]:
    seeds = ", ".join(map(str, record["seeds"]))
    yield from ("", f"## {standing.slug}", "", f"*{record['title']}*", "")
    where = record["hardware"]["processor"]
    yield f"{record['scale'].capitalize()} scale, seeds {seeds}, on {where}, {standing.status}."
    yield from (
        "",
        "| claim | verdict | gap, at least 0 to hold: mean, 95 % interval, by seed |",
        "|---|---|---|",
    )
    for verdict in map(ledger.verdict_of, record["claims"]):
        said = verdict.verdict + (f": {verdict.reason}" if verdict.reason else "")
        inequalities, gaps = (text.split("\n") for text in report.numbers(verdict))
        shown = "<br>".join(
            f"`{_cell(i)}`: {_cell(gap)}" for i, gap in zip(inequalities, gaps, strict=True) if i
        )
        yield f"| *{_cell(verdict.claim)}*: {_cell(verdict.text)} | {_cell(said)} | {shown} |"


def subcommands() -> list[str]:
    """Return the names of the commands, as the help lists them."""
    return re.findall(r"^    ([a-z]+)\s", help_text(["--help"]), re.MULTILINE)


def help_text(arguments: list[str]) -> str:
    """Return what a command prints for ``arguments``, at a fixed width."""
    printed = io.StringIO()
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            cli.main(arguments)
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    return printed.getvalue()


def api(title: str, modules: Sequence[str]) -> str:
    """Return the page of some modules' docstrings."""
    lines = [f"# {title}"]
    for module in modules:
        lines += ["", f"## {module}", "", "```{eval-rst}", f".. automodule:: {module}", "```"]
    return "\n".join([*lines, ""])


def further_pages(app: Any, docname: str, source: list[str]) -> None:
    """List, where the front page has the marker, the pages that it does not name: they need no entry of their own."""
    if docname != "index" or MARKER not in source[0]:
        return
    named = set(re.findall(r"^[\w./-]+$", source[0], re.MULTILINE))
    rest = sorted(found for found in app.env.found_docs if found not in named and found != "index")
    source[0] = source[0].replace(
        MARKER, "\n".join(["```{toctree}", ":maxdepth: 1", ":caption: Further", "", *rest, "```"])
    )


def escape(lines: list[str]) -> None:
    """Make the lines of a docstring valid reStructuredText, in place."""
    made: list[str] = []
    table, example = False, -1
    for block in _blocks(lines):
        indent = _indent(block[0])
        if example >= 0 and indent <= example:
            example = -1
        # Within tables and examples every character counts.
        table = table or bool(BORDER.match(block[0]))
        made += _widened(block) if table else block if example >= 0 else _prose(block)
        made.append("")
        table = table and not BORDER.match(block[-1])
        if example < 0 and block[-1].endswith("::"):
            example = indent
    lines[:] = made


def _blocks(lines: Sequence[str]) -> Iterator[list[str]]:
    """Yield the runs of lines between empty ones."""
    for empty, block in itertools.groupby(lines, lambda line: not line.strip()):
        if not empty:
            yield [line.rstrip() for line in block]


def _prose(block: Sequence[str]) -> list[str]:
    """Return a paragraph or list without accidental markup, an empty line wherever the indentation breaks."""
    text = MARKUP.sub(_unmarked, "\n".join(block))
    made: list[str] = []
    expected = {_indent(block[0])}
    for line in text.split("\n"):
        indent = _indent(line)
        if made and indent not in expected:
            made.append("")
        item = ITEM.match(line)
        expected = (
            {indent, indent + len(item[1])}
            if item
            else {indent} | (expected if indent in expected else set())
        )
        made.append(line)
    return made


def _widened(block: Sequence[str]) -> list[str]:
    """Return a table of two columns with a wider first one: a text may reach into the gap, which is an error."""
    second = block[0].rfind(" ") + 1
    columns = [(line[:second].rstrip(), line[second:]) for line in block]
    return [
        f"{'=' * second if BORDER.match(left) else left.ljust(second)}  {right}" for left, right in columns
    ]


def _unmarked(found: re.Match[str]) -> str:
    if not found["kept"]:
        return f"\\{found[0]}"
    # A literal that a word follows at once (a plural) is none otherwise.
    return f"{found[0]}\\ " if found.string[found.end() : found.end() + 1].isalnum() else found[0]


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _table(found: Thing, prefix: str = "") -> Iterator[str]:
    free = [option for option in found.options if option.name not in found.preset]
    if free:
        yield from ("", "| option | default | meaning |", "|---|---|---|")
    for option in free:
        default = "*must be given*"
        if option.default is not REQUIRED:
            # An empty text would be no literal.
            default = f"`{_cell(shown(option.default)) or '(empty)'}`"
        yield f"| `{prefix}{option.name}` | {default} | {_cell(option.doc)} |"
    if found.open:
        yield from ("", "Takes further options.")


def _choice(option: Option) -> str:
    if option.name in KINDS:
        return f"See [{plural(option.name)}]({plural(option.name)}.md)."
    return "Seed of every random decision of the run." if option.name == "seed" else ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _sentence(text: str) -> str:
    return text if not text or text.endswith(".") else f"{text}."
