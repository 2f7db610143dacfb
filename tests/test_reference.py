"""The reference names everything there is, and docstrings come out as they were meant."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from flowerbed.experiments.config import SECTIONS
from flowerbed.experiments.options import KINDS, options_of, registry
from flowerbed.experiments.reproduction import ledger
from flowerbed.strategies.attacks.presets import ATTACKS

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_everything_that_can_be_chosen_or_set_has_its_entry(reference: ModuleType) -> None:
    pages = reference.pages()
    for kind in KINDS:
        for name in registry(kind).names():
            assert f"\n## {name}\n" in pages[reference.plural(kind)], f"{kind} {name}"
    for name in ATTACKS:
        assert f"\n## {name}\n" in pages["attacks"]
    for section, cls in SECTIONS.items():
        for option in options_of(cls)[0]:
            assert f"| `{section}.{option.name}` |" in pages["settings"]
    for command in ("simulate", "export", "bench scale"):
        assert f"\n## flowerbed {command}\n" in pages["commands"]
    assert "usage: flowerbed export" in pages["commands"]


def test_every_claim_on_record_stands_with_its_verdict(reference: ModuleType) -> None:
    page = reference.pages()["papers"]
    for path in ledger.LEDGER.glob("*.json"):
        record = next(iter(ledger.read(path).values()))
        section = page.partition(f"\n## {record['slug']}\n")[2].partition("\n## ")[0]
        rows = [line for line in section.splitlines() if line.startswith("| *")]
        assert [row.split("|")[2].strip() for row in rows] == [claim["verdict"] for claim in record["claims"]]
        reproduced = sum(claim["verdict"] == "reproduced" for claim in record["claims"])
        assert f"](#{record['slug']}) | {reproduced} | {len(rows) - reproduced} |" in page


def test_docstrings_are_freed_of_accidental_markup(reference: ModuleType) -> None:
    lines = [
        "Steps on F(w) + mu/2 |w - w_t| for 2 * x_ and ``**options``, of several ``Net``s.",
        "- an item that",
        "  goes on",
        "- *another*",
        "",
        "====  =====",
        "a b c ``x``",
        "====  =====",
        "",
        "For example::",
        "",
        "    class A(B):  # * kept",
        "",
        "The end:",
        "    and more",
    ]
    reference.escape(lines)
    assert lines == [
        r"Steps on F(w) + mu/2 \|w - w_t\| for 2 \* x\_ and ``**options``, of several ``Net``\ s.",
        "- an item that",
        "  goes on",
        "- *another*",
        "",
        "======  =====",
        "a b c   ``x``",
        "======  =====",
        "",
        "For example::",
        "",
        "    class A(B):  # * kept",
        "",
        "The end:",
        "",
        "    and more",
        "",
    ]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="Sphinx is not installed (extra docs)")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-b",
        "html",
        "docs",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    front = (tmp_path / "index.html").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        if "_generated" not in page.parts and page.stem != "index":
            assert str(page.relative_to(ROOT / "docs").with_suffix(".html")) in front
