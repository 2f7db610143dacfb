"""Reports of real runs in a real Chromium: nothing is fetched, all is drawn, sorted and filtered, for every reader."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from browser import NEEDS_BROWSER, Opened, Page, accessibility_issues, chromium

from flowerbed.experiments.compare import compare
from flowerbed.experiments.leakage import matrix_report, report
from flowerbed.experiments.leakage.attacking import attack_run
from flowerbed.experiments.leakage.matrix import OBLIVIOUS, Cell
from flowerbed.experiments.reports import command
from flowerbed.experiments.simulation import simulate

pytest.importorskip("plotly", reason="the report's charts need plotly: pip install 'flowerbed[report]'")
pytestmark = NEEDS_BROWSER
__all__ = ["chromium"]

KINDS = ("run", "sweep", "comparison", "attack", "matrix", "papers")
SMALL = {"model": {"name": "mlp", "hidden": [16]}, "local": {"batch_size": 64}}


def settings(folder: Path, rounds: int = 3, **more: Any) -> dict[str, Any]:
    federation = {"clients": 6, "rounds": rounds}
    return {
        **SMALL,
        "federation": federation,
        "run": {"dir": str(folder), "progress": False, "figures": False},
        **more,
    }


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report of each kind, of runs that were really made."""
    root = tmp_path_factory.mktemp("reports")
    partition = {"name": "dirichlet", "alpha": 0.3}
    simulate(**settings(root / "run", 4, partition=partition, evaluation={"clients_every": 1}))
    for place, (lr, epochs) in enumerate([(0.01, 1), (0.01, 2), (0.3, 1), (0.3, 2)]):
        local = {"batch_size": 64, "lr": lr, "epochs": epochs}
        simulate(**settings(root / "sweep" / str(place), 2, local=local))
    common = {**SMALL, "federation": {"clients": 4, "rounds": 3}}
    compare(["fedavg", "fedprox"], [0, 1], common, root / "comparison")
    observed = {"rounds": [1], "clients": [0, 1]}
    local = {"steps": 1, "batch_size": 2}
    simulate(**settings(root / "attacked", 1, local=local, observe=observed))
    made = attack_run(root / "attacked", "ig", {"steps": 20})
    report.write(made, root / "attacked" / "attacks" / "ig", {})
    summary = made.summary()
    cells = [
        Cell(name, "IG", 1, OBLIVIOUS, summary, 21, 1.0, 0.5 + 0.1 * i, 10.0)
        for i, name in enumerate(("none", "clip"))
    ]
    (root / "matrix" / "runs").mkdir(parents=True)
    matrix_report.write(cells, root / "matrix")
    shutil.copytree(
        root / "attacked" / "attacks" / "ig",
        root / "matrix" / "runs" / "none" / "attacks" / "IG-round-1-oblivious",
    )
    inputs = {kind: [root / kind] for kind in KINDS} | {"attack": [root / "attacked"], "papers": []}
    files = {}
    for kind in KINDS:
        files[kind] = root / f"{kind}.html"
        command.write(command.make_page(inputs[kind], papers=kind == "papers"), files[kind])
    return files


def opened(chromium: Any, path: Path, **context: Any) -> Opened:
    found = Opened.new(chromium, **context)
    found.page.goto(path.as_uri())
    found.page.wait_for_selector("html[data-ready]")
    return found


def draw_everything(page: Page) -> None:
    """Open every fold, so that each chart is drawn as a reader would see it; of alike papers the first two."""
    page.evaluate(
        """all("details").filter((fold) => !fold.matches("[id^=paper] ~ [id^=paper] ~ [id^=paper]"))
          .forEach((fold) => { fold.open = true; })"""
    )
    page.evaluate("Promise.all(figures.filter(visible).map((figure) => draw(figure, theme())))")


DRAWN = """figures.filter(visible).map((figure) => ({
  title: figure.querySelector("h4").textContent,
  marks: figure.querySelectorAll(".plot .trace, .plot .hm, .plot .point").length,
  wide: figure.querySelector(".plot svg.main-svg")?.getBoundingClientRect().width ?? 0,
  name: figure.querySelector(".plot").getAttribute("aria-label"),
}))"""


@pytest.mark.parametrize("kind", KINDS)
def test_a_report_is_whole_in_a_browser(reports: dict[str, Path], chromium: Any, kind: str) -> None:
    """No complaint, nothing fetched, every chart drawn and named, no serious accessibility issue in light or dark."""
    found = opened(chromium, reports[kind], color_scheme="dark" if kind in ("run", "papers") else "light")
    page = found.page
    assert page.locator("html").get_attribute("data-theme") == (
        "dark" if kind in ("run", "papers") else "light"
    )
    draw_everything(page)
    figures = page.evaluate(DRAWN)
    assert (
        len(figures) >= {"run": 8, "sweep": 4, "comparison": 2, "attack": 8, "matrix": 2, "papers": 4}[kind]
    )
    for figure in figures:
        assert figure["marks"] > 0, f"{figure['title']} is empty"
        assert figure["wide"] > 150, f"{figure['title']} has no width"
        assert len(figure["name"]) > len(figure["title"]) + 20, "what it shows is said in words"
    assert page.evaluate("figures.filter(visible).every((f) => f.querySelector('.plot').textContent !== '')")
    numbered = page.evaluate("all('[id]').map((one) => one.id)")
    assert len(numbered) == len(set(numbered))
    levels = page.evaluate("all('h1, h2, h3, h4').map((one) => Number(one.tagName[1]))")
    assert all(after <= before + 1 for before, after in pairwise(levels))
    for theme in ("Light", "Dark"):
        page.get_by_role("button", name=theme).click()
        draw_everything(page)
        assert accessibility_issues(page) == [], theme
    assert found.complaints == []
    assert all(url.startswith(("file:", "data:", "blob:")) for url in found.fetched)
    page.context.close()


def column(page: Page, table: str, name: str) -> list[str]:
    return page.evaluate(  # type: ignore[no-any-return]
        """([table, name]) => {
          const heads = all(`#${table} thead th`).map((head) => head.textContent);
          const rows = all(`#${table} tbody tr`).filter((row) => !row.hidden);
          return rows.map((row) => row.cells[heads.indexOf(name)].textContent);
        }""",
        [table, name],
    )


def test_a_table_is_sorted_and_filtered_and_its_charts_follow(
    reports: dict[str, Path], chromium: Any
) -> None:
    found = opened(chromium, reports["sweep"])
    page = found.page
    draw_everything(page)
    before = column(page, "settings", "accuracy")
    assert len(before) == 4

    head = page.locator("#settings th", has_text="accuracy")
    head.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    largest = column(page, "settings", "accuracy")
    shares = [float(text.split(" ")[0]) for text in largest]
    assert shares == sorted(shares, reverse=True)
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert column(page, "settings", "accuracy") == largest[::-1]

    box = page.locator("#settings input")
    box.fill("local.lr>0.1")
    assert column(page, "settings", "local.lr") == ["0.3", "0.3"]
    assert page.locator("#settings output").text_content() == "2 of 4 rows"
    # The curves of the rows that are left, and no others.
    shown = """figures.filter((figure) => figure.dataset.follows === "settings").map((figure) => {
      const traces = figure.querySelector(".plot").data.filter((trace) => trace.visible !== false && trace.meta.row);
      return new Set(traces.map((trace) => trace.meta.row)).size;
    })"""
    assert set(page.evaluate(shown)) == {2}
    best, second = (float(text.split(" ")[0]) for text in column(page, "settings", "accuracy")[::-1])
    box.fill(f"local.lr=0.3 accuracy<{(best + second) / 2}%")
    assert column(page, "settings", "rank") == ["2"]
    box.fill("nothing like this")
    assert column(page, "settings", "rank") == []
    box.fill("")
    assert set(page.evaluate(shown)) == {4}
    assert found.complaints == []
    page.context.close()


def test_colours_follow_the_switch_and_a_legend_answers_to_the_keyboard(
    reports: dict[str, Path], chromium: Any
) -> None:
    found = opened(chromium, reports["run"])
    page = found.page
    draw_everything(page)
    ink = "getComputedStyle(figures[0].querySelector('.xtick text')).fill"
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(f"[{ink}, {ground}]")
    page.get_by_role("button", name="Dark").click()
    dark = page.evaluate(f"[{ink}, {ground}]")
    assert light[0] != dark[0]
    assert light[1] != dark[1]
    assert page.get_by_role("button", name="Dark").get_attribute("aria-pressed") == "true"
    page.reload()
    page.wait_for_selector("html[data-ready][data-theme=dark]")
    page.get_by_role("button", name="Auto").click()
    assert page.locator("html").get_attribute("data-theme") == "light"

    draw_everything(page)
    entry = page.get_by_role("button", name="worst client").first
    visible = "figures[0].querySelector('.plot').data.filter((t) => t.visible !== false).map((t) => t.name)"
    assert "worst client" in page.evaluate(visible)
    entry.focus()
    page.keyboard.press("Space")
    assert "worst client" not in page.evaluate(visible)
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "false", "the focus stays"

    # What is saved stands alone: title and legend are in it, and what was hidden is not.
    with page.expect_download() as download:
        page.get_by_role("button", name="Save Accuracy as a picture").click()
    saved = Path(download.value.path()).read_text()
    assert download.value.suggested_filename == "Accuracy.svg"
    assert ">Accuracy</text>" in saved
    assert "server's test set" in saved
    assert found.complaints == []
    page.context.close()


def test_nothing_is_wider_than_a_phone_and_paper_gets_everything(
    reports: dict[str, Path], chromium: Any
) -> None:
    for kind in ("run", "papers"):
        page = opened(
            chromium, reports[kind], viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True
        ).page
        draw_everything(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.context.close()
    page = opened(chromium, reports["run"], color_scheme="dark").page
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("html").get_attribute("data-theme") == "light"
    widths = page.evaluate(
        "figures.map((f) => f.querySelector('svg.main-svg').getBoundingClientRect().width)"
    )
    assert all(0 < width <= 700 for width in widths), "on A4, in full"
    assert not page.locator("nav.contents").is_visible()
    assert len(page.pdf(format="A4")) > 20_000
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("html").get_attribute("data-theme") == "dark"
    page.context.close()


def test_without_a_way_to_unpack_the_charts_their_numbers_are_left(
    reports: dict[str, Path], chromium: Any
) -> None:
    page = chromium.new_context().new_page()
    page.add_init_script("delete globalThis.DecompressionStream")
    page.goto(reports["run"].as_uri())
    page.wait_for_function("document.querySelector('.plot').textContent.includes('cannot draw')")
    page.locator("figure details.data > summary").first.click()
    assert page.locator("figure details.data table").first.is_visible()
    page.context.close()
