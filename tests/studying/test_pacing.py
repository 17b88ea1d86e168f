"""What a study says while it runs; and what its plan counts: α is chosen once for all that share it, and GGUF is slow to load."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import fails
from conftest import ASSETS
from typer.testing import CliRunner

import pkt
from pkt.cli import app
from pkt.studying import Job, Layout, Pace, Store, estimating, open_study, pacing, plan_of, work
from pkt.studying.estimating import GGUF, Sizes
from pkt.studying.layout import UNTRAINED

STUDY = """student: demo:descendant
teachers: {tuned: demo:teacher}
tasks:
  sums:
    seeds: demo:data/seeds.jsonl
    train: demo:data/train.jsonl
    rows: 4
    held_out: 4
    tests: {problems: {data: demo:data/test.jsonl, limit: 2}}
    decides: problems.nll
starts:
  transplant: {kind: transplant, teacher: tuned, base: demo:base, seeds: 4}
  wrong units: {like: transplant, control: wrong-units}
  noise: {like: transplant, control: noise}
training: {rank: 2, epochs: 1, batch_size: 4}
rates: {lr: [1e-3], a_scale: [1], seeds: [7], epochs: 1, extend: 0}
seeds: 1
compare: {of: transplant}
"""


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    (tmp_path / "s.yaml").write_text(STUDY)
    return Layout(open_study(tmp_path / "s.yaml"))


def made(layout: Layout, out: Path) -> dict[str, pkt.Start]:
    """The starts of a study, by name and draw."""
    store, found = Store(out), {}
    for job in [job for job in layout.jobs(store) if job.kind == "start"]:
        work.run_job(layout, job, store)
        found[f"{job.start} {job.seed}"] = pkt.Start.load(store.path(job.cells[0]) / work.BEGUN)
    return found


def test_controls_have_the_transplants_scale_which_is_chosen_once(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pkt.transplanting import run as transplanting

    tried: list[Any] = []
    once = transplanting.best_scale
    monkeypatch.setattr(transplanting, "best_scale", lambda *a, **o: tried.append(1) or once(*a, **o))
    starts = made(layout, tmp_path / "out")
    assert set(starts) == {"transplant 0", *(f"{name} {seed}" for name in ("wrong units", "noise") for seed in (7, 0))}
    assert len(tried) == 1
    kept = starts["transplant 0"]
    start = layout.starts["transplant"]
    for control in ("wrong units", "noise"):
        by_itself = pkt.transplant(
            ASSETS / "teacher", ASSETS / "descendant", layout.seeds("sums", start), base=ASSETS / "base", rank=2, seed=7,
            control=control.replace(" ", "-"), lineage=layout.lineage(str(ASSETS / "base")), progress=False,
        )  # fmt: skip
        here = starts[f"{control} 7"]
        assert here.provenance["control"] == control.replace(" ", "-")
        assert here.provenance["alpha"] == kept.provenance["alpha"] == by_itself.provenance["alpha"]
        for name, pair in by_itself.pairs.items():
            torch.testing.assert_close(here.pairs[name].delta(), pair.delta(), rtol=1e-3, atol=1e-5)


def test_a_comparisons_controls_have_the_scale_that_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pkt.transplanting import run as transplanting

    pair = (ASSETS / "teacher", ASSETS / "descendant", ASSETS / "data" / "seeds.jsonl")
    kept = pkt.transplant(*pair, base=ASSETS / "base", rank=2, alpha=0.3, out=tmp_path / "moved", progress=False)
    data = ASSETS / "data"
    content, _ = pkt.studying.comparison(
        ASSETS / "descendant", tmp_path / "moved", data / "train.jsonl", data / "test.jsonl", seeds=1
    )
    layout = Layout(pkt.studying.as_study(content))
    searched = plan_of(layout, tmp_path / "out")["seconds"]["start"]
    monkeypatch.setattr(transplanting, "best_scale", lambda *a, **o: pytest.fail("α is known"))
    starts = made(layout, tmp_path / "out")
    noise = starts["noise 0"]
    assert noise.provenance["alpha"] == 0.3
    for name, one in kept.pairs.items():
        assert noise.pairs[name].delta().norm() == pytest.approx(float(one.delta().norm()), rel=1e-3)
    # The same, if each chose its own: the plan has the passes that this takes.
    for name in ("wrong units", "noise"):
        content["starts"][name].pop("kept")
    again = plan_of(Layout(pkt.studying.as_study(content)), tmp_path / "other")["seconds"]["start"]
    assert again > searched


def test_loading_is_counted(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, name = Sizes(layout), layout.study.student
    plain = sizes.loading(name)
    assert plain == sizes.loading(name, None) > 0
    monkeypatch.setattr(estimating, "_is_gguf", lambda name: True)
    assert sizes.loading(name) == pytest.approx(plain + estimating.size(sizes.spec(name)) / GGUF)


def test_a_plan_refuses_the_folder_that_the_study_would(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    (tmp_path / "s.yaml").write_text(STUDY)
    words = ("study", tmp_path / "s.yaml", "--out", taken)
    assert fails(*words, "--plan") == fails(*words)
    assert fails("study", tmp_path / "s.yaml", "--out", taken / "mine.txt", "--plan") == fails(
        "study", tmp_path / "s.yaml", "--out", taken / "mine.txt"
    )


def test_a_study_says_how_far_it_is(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(STUDY.replace("  wrong units: {like: transplant, control: wrong-units}\n", ""))
    words = ["study", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out")]
    first = CliRunner().invoke(app, [*words, "--only", "transplant", "--quiet"])
    assert "left" not in first.stderr
    done = CliRunner().invoke(app, words)
    lines = re.findall(r"^ *\d+ s  job (\d+) of (\d+), about .+ left: (\w+)", done.stderr, re.M)
    # Both untrained models, two draws of the noise, its tuning and training and the charged LoRA's, the transplant's training.
    assert done.stderr.startswith("9 jobs, about ")
    assert [(n, total) for n, total, _ in lines] == [(str(n), "9") for n in range(1, 10)]
    assert {kind for _, _, kind in lines} == {UNTRAINED, "start", "tune", "train"}
    again = CliRunner().invoke(app, [*words, "--json"])
    assert json.loads(again.stdout)["study"] == "s"
    assert again.stderr == ""


def test_the_pace_is_that_of_jobs_of_the_kind(layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pace = Pace(layout, Store(tmp_path))
    pace.doubt, before = 0.0, pace.seconds()
    job = next(job for job in layout.jobs(pace.store) if job.kind == "start")
    given = pace.left[job.cells[0].key].seconds(pace.rate)
    # It took three times as long.
    monkeypatch.setattr(pacing.time, "monotonic", lambda: pace.last + 3 * given)
    told = pace.told(Job("start", job.cells))
    assert told.startswith("job 1 of ")
    assert pace.seconds() == pytest.approx(3 * (before - given))
