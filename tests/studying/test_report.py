"""A study's page as a browser shows it, and its figures and tables as files."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import made_up
import numpy as np
import pytest

from pkt.studying import summing
from pkt.studying.details import item_counts, share
from pkt.studying.figures import figures
from pkt.studying.page import write_page
from pkt.studying.tables import Table, latex, made_of

PROGRAM = browser.found()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A whole study's page and that of one that was killed on the way."""
    found = {}
    for name, stats in (("whole", made_up.stats()), ("half", made_up.half())):
        found[name] = write_page(stats, tmp_path_factory.mktemp(name))
    return found


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    if PROGRAM is None:
        pytest.skip("no chromium or google-chrome on PATH to look at the page with")
    with browser.browser() as shown:
        yield shown


@pytest.mark.parametrize("which", ["whole", "half"])
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 800, 1400])
def test_nothing_is_blank_or_cut(
    width: int, dark: bool, which: str, page: Any, pages: dict[str, Path], tmp_path: Path
) -> None:
    figures = browser.look(page, pages[which], width, tmp_path / "page.png", dark=dark)
    assert len(figures) > (8 if which == "whole" else 4)


def test_a_fault_would_be_seen(page: Any, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    wide = '<div style="width: 900px">wide</div><script>nothing()</script><img src="http://127.0.0.1:9999/x.png">'
    bad.write_text(f"<!doctype html><meta name=viewport content='width=device-width'>{wide}")
    page.open(bad, 400)
    assert not page.value("document.documentElement.scrollWidth <= innerWidth")
    assert page.value(browser.CUT) == ["DIV wide"]
    assert any("nothing is not defined" in message for message in page.messages)
    assert any("127.0.0.1" in message for message in page.messages)
    page.messages.clear()


def test_what_a_page_holds(pages: dict[str, Path]) -> None:
    text = pages["whole"].read_text(encoding="utf-8")
    for heading in (
        "Verdict", "What the gain is made of", "Comparisons: deciding", "Each comparison in words", "Every start, all tasks",
        "gsm: before, after and what it costs", "Panel layers", "Panel samples",
        "Panel cross: seeds of another task", "Items won and lost", "Training loss by step",
        "Is it all the size of the start?", "gsm: how rates were chosen", "How it was measured", "What it cost",
    ):  # fmt: skip
        assert f">{heading}" in text, heading
    assert "made up &amp; &lt;odd&gt;" in text
    assert "<odd>" not in text
    # No network: no script, nothing loaded, every address a name of the SVG's own.
    assert "<script" not in text
    assert not re.search(r'(src|href)="(?!#|data:)', text)
    assert "Mixed: torch 2.13/2.14" in text
    assert "66% [40, 90]" in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    assert used <= set(ids)


def test_half_a_study_says_what_is_missing(pages: dict[str, Path]) -> None:
    text = pages["half"].read_text(encoding="utf-8")
    assert "<td>gsm: pissa</td><td>2 of 3 seeds</td>" in text
    assert "<td>mmlu: pkt</td><td>not tuned yet</td>" in text
    assert "<td>train mmlu noise</td><td>its worker ended</td>" in text
    assert "Comparisons: deciding" in text
    assert 'aria-label="gsm: every start"' in text
    assert 'aria-label="mmlu: every start"' not in text


def test_nothing_leaves_its_figure() -> None:
    for name, _, _, draw in figures(made_up.stats()):
        figure = draw()
        figure.canvas.draw()
        used, whole = figure.get_tightbbox(figure.canvas.get_renderer()), figure.bbox_inches
        assert used.x0 >= -0.01, name
        assert used.y0 >= -0.01, name
        assert used.x1 <= whole.width + 0.01, name
        assert used.y1 <= whole.height + 0.01, name


def test_figures_and_tables_are_files_too(pages: dict[str, Path]) -> None:
    from matplotlib.image import imread

    out = pages["whole"].parent
    svgs, pngs = (sorted(f.stem for f in (out / "figures").glob(f"*.{kind}")) for kind in ("svg", "png"))
    assert svgs == pngs
    assert {
        "forest_deciding",
        "scores_gsm",
        "panel_layers_mmlu",
        "rates_gsm",
        "losses_mmlu",
        "scale_gsm",
        "items",
    } <= set(svgs)
    for name in svgs:
        assert ET.parse(out / "figures" / f"{name}.svg").getroot().tag.endswith("svg")
        assert len(np.unique(imread(out / "figures" / f"{name}.png")[::4, ::4, 0])) > 5
    assert {"made_of", "scores", "comparisons_deciding", "fairness_gsm", "crossed_cross", "costs"} <= {
        f.stem for f in (out / "tables").glob("*.tex")
    }
    tex = (out / "tables" / "scores.tex").read_text(encoding="utf-8")
    assert tex.count(r" \\") == 1 + 2 + 6
    assert r"$\pm$" in tex
    # What is not drawn any more goes; what is not pkt's stays.
    (out / "figures" / "mine.pdf").write_text("mine")
    (out / "figures" / "old.svg").write_text("old")
    before = (out / "figures" / "items.svg").read_bytes()
    write_page(made_up.stats(), out)
    assert not (out / "figures" / "old.svg").exists()
    assert (out / "figures" / "mine.pdf").exists()
    assert (out / "figures" / "items.svg").read_bytes() == before


def test_latex_is_what_latex_reads() -> None:
    table = Table("t", "T", ["", "a_b"], [["50% & more #1", "{x} ± 1"]], ["said"])
    assert latex(table).splitlines() == [
        r"% \usepackage{booktabs}", r"\begin{tabular}{lr}", r"\toprule", r" & a\_b \\", r"\midrule",
        r"50\% \& more \#1 & \{x\} $\pm$ 1 \\", r"\bottomrule", r"\end{tabular}", "% said",
    ]  # fmt: skip


def test_what_a_gain_is_made_of() -> None:
    """In the order of what the controls lack, and ruled out only where every task says better."""
    found = made_up.stats()
    for c in found["comparisons"]:
        c["word"] = "better" if c["control"] != "pissa" or c["task"] == "gsm" else "cannot tell"
    table = made_of(found)
    assert table is not None
    assert [row[1] for row in table.rows] == ["lora", "noise of the same size", "random window", "next task", "pissa"]
    assert [row[-1] for row in table.rows] == ["ruled out"] * 4 + ["not ruled out: cannot tell"]


def test_figures_over_seeds_are_told_in_one_way() -> None:
    found = made_up.stats()
    start = found["tasks"]["gsm"]["starts"]["pkt"]
    start["after"] = [{"zero": {"nll": v, "choice": v}} for v in (0.1, 0.2, 0.6)]
    assert summing.mean_text(found, start, "zero.nll") == "0.300 ± 0.265"
    assert summing.mean_text(found, start, "zero.choice") == "30.0 ± 26.5%"
    assert summing.mean_text(found, start, "zero.choice", spread=False) == "30.0%"
    assert summing.mean_text(found, start, "zero.bleu") == ""
    start["diverged"] = 1
    assert summing.mean_text(found, start, "zero.nll") == "diverged in 1 of 3"
    start["trained"] = 2
    assert summing.mean_text(found, start, "zero.nll") == "2 of 3 seeds"


def test_items_won_and_lost() -> None:
    ours, control = np.array([[1.0, 1, 0, 0]]), np.array([[1.0, 0, 1, 0]])
    assert item_counts(ours, control, "exact_match") == {
        "count": 4, "won": 0.25, "lost": 0.25, "both": 0.25, "neither": 0.25,
    }  # fmt: skip
    losses = np.array([[0.5, 0.1, 0.3]])
    assert item_counts(losses, losses[:, ::-1], "nll") == {"count": 3, "won": 1 / 3, "lost": 1 / 3, "even": 1 / 3}


def test_a_share_of_a_gain_has_fiellers_interval() -> None:
    """The interval covers the true share as often as it says; of a gain that may be nothing there is no share."""
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(40):
        whole = 1.0 + draw.normal(0, 0.1, (5, 1)) + draw.normal(0, 1, (5, 50))
        part = 0.6 + draw.normal(0, 0.1, (5, 1)) + draw.normal(0, 1, (5, 50))
        found = share(part, whole, 0.95)
        assert found is not None
        assert found["low"] <= found["share"] <= found["high"]
        covered += found["low"] <= 0.6 <= found["high"]
    assert 35 <= covered <= 40
    nothing = draw.normal(0, 1, (5, 50))
    assert share(nothing, nothing - nothing.mean(), 0.95) is None
