"""The page of a transplant or a start: what its folder says, all of it, and nothing that it does not."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from commands import run
from conftest import ASSETS

import pkt
from pkt.matching import Matrices
from pkt.matching.shrinking import Shape, choose_units, shrink_to
from pkt.reporting import new_figure
from pkt.reporting.plots import plot_scales
from pkt.seeds import load_seeds


@pytest.fixture(scope="module")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = zoo.llama(hidden=32, layers=4, heads=8, kv=4, ffn=48, vocab=len(tokenizer))
    torch.manual_seed(4)
    teacher, scores = copy.deepcopy(base), {n: p.detach().abs() for n, p in base.named_parameters()}
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.02 * torch.randn_like(p))
    student = shrink_to(base, choose_units(Matrices(base), scores, Shape(hidden=20, neurons=24, groups=2, layers=3)))
    rows, out = (
        load_seeds(ASSETS / "data" / "seeds.jsonl", tokenizer, limit=3),
        tmp_path_factory.mktemp("page") / "moved",
    )
    pkt.transplant(teacher, student, rows, base=base, rank=4, alpha=0.5, out=out, anyway=True, progress=False)
    return out


def cells(html: str) -> list[list[str]]:
    return [
        re.findall("<t[dh](?: class=.long.)?>(.*?)</t[dh]>", row) for row in re.findall("<tr>(.*?)</tr>", html, re.S)
    ]


def test_a_transplants_page_says_what_its_folder_does(folder: Path) -> None:
    html = Path(run("report", folder).strip()).read_text(encoding="utf-8")
    found, rows = pkt.Start.load(folder), cells(html)
    evidence = found.provenance["lineage"]["evidence"]
    assert {e["kind"] for e in evidence} == {"hidden units", "layers", "FFN neurons", "attention heads"}
    for e in evidence:
        assert [e["kind"], f"{e['matched']} of {e['total']}", f"{e['cosine']:.3f}", f"{e['chance']:.3f}"] in rows
    for alpha, loss in found.provenance["losses"].items():
        assert [alpha, f"{loss:.3f}"] in rows
    assert "Kept at α = 0.5; the best of those tried by the seeds: " in html
    for name, pair in found.pairs.items():
        assert [name, str(pair.rank), f"{100 * found.energies[name]:.1f}%"] in rows
    for name, size in found.provenance["left_out"].items():
        assert [name, f"{size:.3g}"] in rows
    for key, value in found.provenance["seeds"].items():
        assert [key, str(value)] in rows
    assert ["content", "what the teacher learnt since its base"] in rows
    assert html.count("<svg role=") == 2


def test_a_starts_page(student_dir: Path, tmp_path: Path) -> None:
    run("start", student_dir, "--how", "pissa", "--rank", 4, "--out", tmp_path / "start")
    html = Path(run("report", tmp_path / "start").strip()).read_text(encoding="utf-8")
    assert ["start", "pissa"] in cells(html)
    assert "<h2>Matrices</h2>" in html
    for heading in ("Lineage", "How much is kept", "Rows it was tuned on", "Left out"):
        assert f"<h2>{heading}</h2>" not in html


def test_the_curve_has_every_scale() -> None:
    _, (axes,) = new_figure(4, 3, 1)
    plot_scales(axes, {0.0: 3.0, 0.5: 2.0, 1.0: 2.5}, 0.5)
    curve, kept, before = axes.lines
    assert (list(curve.get_xdata()), list(curve.get_ydata())) == ([0.0, 0.5, 1.0], [3.0, 2.0, 2.5])
    assert (list(kept.get_xdata()), list(kept.get_ydata())) == ([0.5], [2.0])
    assert set(before.get_ydata()) == {3.0}
