"""The pages of runs, adapters, scores and several tasks, and all pages as a browser shows them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import pytest
from commands import fails, run
from conftest import ASSETS

import pkt
from pkt.training import train

ROWS = ASSETS / "data"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each, of the bundled pair."""
    home = tmp_path_factory.mktemp("made")
    pair = (ASSETS / "teacher", ASSETS / "student")
    few, held = home / "few.jsonl", home / "held.jsonl"
    few.write_text("".join((ROWS / "train.jsonl").read_text().splitlines(keepends=True)[:8]))
    held.write_text("".join((ROWS / "test.jsonl").read_text().splitlines(keepends=True)[:4]))
    options: dict[str, Any] = {"rank": 2, "modules": "attention", "progress": False}
    pkt.transfer(*pair, ROWS / "seeds.jsonl", out=home / "extraction", **options)
    pkt.transfer(*pair, {"one": ROWS / "seeds.jsonl", "two": few}, out=home / "tasks", **options)
    run("sensitivity", pair[0], few, "--out", home / "scores.safetensors", "--dtype", "float32")
    steps: dict[str, Any] = {"max_steps": 4, "batch_size": 4, "held_out": held, "eval_steps": 2}
    train(pair[1], home / "extraction", few, home / "run", quietly=True, report_to="none", **steps)
    run("finalize", home / "run", "--out", home / "adapter")
    return {name: home / name for name in ("extraction", "tasks", "scores.safetensors", "run", "adapter")}


@pytest.fixture(scope="module")
def pages(made: dict[str, Path]) -> dict[str, Path]:
    return {name: Path(run("report", place).strip()) for name, place in made.items()}


HEADINGS = {
    "extraction": (
        "What was done",
        "Layers",
        "Where S lies",
        "What the regions catch",
        "Regions",
        "Versions",
        "Written",
    ),
    "tasks": ("What this is", "Tasks"),
    "scores.safetensors": ("What was scored", "Where S lies", "By kind", "Losses of the samples"),
    "run": ("What this is", "As it learnt", "Settings", "Versions"),
    "adapter": ("What this is", "Checked", "Matrices"),
}
FIGURES = {"extraction": 3, "tasks": 0, "scores.safetensors": 1, "run": 1, "adapter": 0}


@pytest.mark.parametrize("name", HEADINGS)
def test_a_page_has_its_sections(name: str, pages: dict[str, Path]) -> None:
    text = pages[name].read_text(encoding="utf-8")
    for heading in HEADINGS[name]:
        assert f">{heading}<" in text, heading
    assert text.count("<svg role=") == FIGURES[name]
    assert "<script" not in text
    assert "http://" not in text.replace("http://www.w3.org/", "")


def test_what_the_pages_say(made: dict[str, Path], pages: dict[str, Path]) -> None:
    text = {name: page.read_text(encoding="utf-8") for name, page in pages.items()}
    assert "pkt transfer" in text["extraction"]
    assert "--layers sensitivity --select window --modules attention --rank 2" in text["extraction"]
    # Teacher 5 layers of 168 hidden units, student 4 of 128: a window of q holds a fixed share of the weights.
    spec = pkt.Extraction.load(made["extraction"]).plan
    assert all(0 < e.share < 1 for e in spec.entries)
    assert "held-out rows: " in text["run"]
    assert "the same next token at" in text["adapter"]
    assert "pkt report " in text["tasks"]
    sens = pkt.Sensitivity.load(made["scores.safetensors"])
    for row in sens.table()[1:]:
        assert all(f">{cell}</td>" in text["scores.safetensors"] for cell in row)


def test_what_has_no_page(tmp_path: Path) -> None:
    assert "pkt knows nothing about it" in fails("report", tmp_path)
    (tmp_path / "x.txt").write_text("no scores")
    assert "x.txt" in fails("report", tmp_path / "x.txt")
    assert "does not exist" in fails("report", tmp_path / "nothing") or "not a folder" in fails(
        "report", tmp_path / "nothing"
    )


@pytest.fixture(scope="module")
def shown() -> Iterator[Any]:
    if browser.found() is None:
        pytest.skip("no chromium or google-chrome on PATH to look at the page with")
    with browser.browser() as page:
        yield page


@pytest.mark.parametrize("width", [400, 800, 1400])
def test_nothing_is_blank_or_cut_on_any_page(width: int, shown: Any, pages: dict[str, Path], tmp_path: Path) -> None:
    for name, page in pages.items():
        figures = browser.look(shown, page, width, tmp_path / "page.png", dark=width == 800)
        assert len(figures) == FIGURES[name]
