"""Every code block of the README and of the documentation does what the page says."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import LANGUAGES, Block, PageError, Reader, blocks, own_modules

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if "_generated" not in p.parts)]
SLOW = [page for page in PAGES if any(block.mark("slow") is not None for block in blocks(page, ROOT))]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    monkeypatch.chdir(tmp_path)
    return Reader()


def read(page: Path, reader: Reader, folder: Path, subtests: pytest.Subtests, slow: bool) -> None:
    with own_modules(folder):
        for block in blocks(page, ROOT):
            reason = block.skipped()
            if reason is None and block.mark("slow") is not None and not slow:
                reason = f"slow: {block.mark('slow')}"
            if reason is None:
                reader.read(block)
                continue
            reader.check(block)
            with subtests.test(block.where):
                pytest.skip(f"{block.where}: {reason}")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES, ids=named)
def test_a_page(page: Path, reader: Reader, tmp_path: Path, subtests: pytest.Subtests) -> None:
    read(page, reader, tmp_path, subtests, slow=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", SLOW, ids=named)
def test_a_page_with_its_slow_blocks(
    page: Path, reader: Reader, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    read(page, reader, tmp_path, subtests, slow=True)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_block_is_of_a_language_that_is_run_or_shown(page: Path) -> None:
    for block in blocks(page, ROOT):
        assert block.language in ("", *LANGUAGES), f"{block.where}: unknown language '{block.language}'"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=named)
def test_a_notebook(notebook: Path, tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed (extra docs)")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed (extra docs)")
    book = nbformat.read(notebook, as_version=4)
    nbclient.NotebookClient(book, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = {kind for cell in book.cells for out in cell.get("outputs", ()) for kind in out.get("data", ())}
    assert "image/png" in shown


def test_the_notebooks_are_small() -> None:
    assert sum(path.stat().st_size for path in NOTEBOOKS) < 400_000


class TestTheReader:
    """A runner that lets everything pass would be worse than none."""

    def read(self, reader: Reader, *found: Block) -> None:
        for block in found:
            reader.read(block)

    def test_names_are_shared_and_mistakes_are_found(self, reader: Reader) -> None:
        self.read(reader, Block("p:1", "python", "x = 2\n"), Block("p:2", "python", "assert x == 2\n"))
        with pytest.raises(PageError, match="p:3: AssertionError"):
            reader.read(Block("p:3", "python", "assert x == 3\n"))

    def test_commands_must_end_as_the_page_says(self, reader: Reader) -> None:
        with pytest.raises(PageError, match="'false' exited with 1"):
            reader.read(Block("p:1", "bash", "true\nfalse\n"))
        reader.read(Block("p:2", "bash", "false\n", ("fails",)))
        with pytest.raises(PageError, match="'flowerbed nonsense' exited with 2"):
            reader.read(Block("p:3", "bash", "flowerbed nonsense\n"))

    def test_output_is_compared_but_for_numbers(self, reader: Reader) -> None:
        reader.read(Block("p:1", "python", 'print("loss 0.25\\nand more,  say")\n'))
        reader.read(Block("p:2", "text", "loss 0.31\nand ...\n", ("output",)))
        with pytest.raises(PageError, match="p:3 shows"):
            reader.read(Block("p:3", "text", "gain 0.31\nand ...\n", ("output",)))

    def test_files_marks_and_places(self, reader: Reader, tmp_path: Path) -> None:
        page = tmp_path / "page.md"
        page.write_text(
            "text\n```python\n# mine.py\nVALUE = 3\n```\n\n<!-- not run: needs a network -->\n```bash\n"
            "flowerbed simulate seeed=1\n```\n<!-- needs module no_such -->\n```python\nraise\n```\n"
            "```{toctree}\nx\n```\n"
        )
        page.write_text(page.read_text() + "```\nflowerbed simulate grid=spark\n```\n")
        saved, network, module, bare = blocks(page, tmp_path)
        assert (saved.where, saved.language) == ("page.md:2", "python")
        reader.read(saved)
        assert (tmp_path / "mine.py").read_text().endswith("VALUE = 3\n")
        assert network.skipped() == "needs a network"
        assert module.skipped() == "no_such is not installed"
        with pytest.raises(Exception, match="Did you mean 'seed'"):
            reader.check(network)
        assert bare.skipped() == "commands in a block without a language"
        with pytest.raises(Exception, match="Unknown grid 'spark'"):
            reader.check(bare)
