"""A small study from its file to its results: what is there is not made again, however it ended."""

from __future__ import annotations

import dataclasses
import html
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import processes
import pytest

import pkt
from pkt import PktError
from pkt.errors import DivergedError
from pkt.studying import Job, Layout, Store, open_study, plan_of, study, work
from pkt.studying.layout import Setting

SMALL = """student: demo:student
general: demo:data/general.jsonl
tasks:
  sums:
    seeds: demo:data/seeds.jsonl
    train: demo:data/train.jsonl
    rows: 8
    held_out: 4
    tests:
      problems: {data: demo:data/test.jsonl, metrics: [nll, exact_match], limit: 6, max_new_tokens: 4}
    decides: problems.nll
starts:
  pissa: {kind: start, how: pissa}
  spectral: {kind: start, how: spectral, seeds: 4}
  lora: {kind: lora, extra_steps: 1.0}
training: {rank: 4, epochs: 1, batch_size: 4, micro_batch: 4, max_length: 256}
rates: {lr: [1e-3, 4e-3], a_scale: [1], seeds: [7], epochs: 1, extend: 1}
seeds: 3
compare: {of: pissa}
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    general = folder / "general.jsonl"
    text = SMALL.replace("demo:data/general.jsonl", str(general))
    source = open_study_folder() / "general.jsonl"
    general.write_text("".join(source.read_text(encoding="utf-8").splitlines(keepends=True)[:4]), encoding="utf-8")
    (folder / "small.yaml").write_text(text, encoding="utf-8")
    return folder


def open_study_folder() -> Path:
    return Path(pkt.__file__).parent / "demo" / "assets" / "data"


@pytest.fixture(scope="module")
def done(small: Path) -> Path:
    study(small / "small.yaml", small / "out")
    return small / "out"


def timeless(value: Any) -> Any:
    """Without what a clock says."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if not k.startswith("seconds_to") and k != "costs"}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def products(out: Path) -> dict[str, Any]:
    """All that a study says, times aside; of each cell, the hashes of its files that hold no time."""
    cells = {}
    for file in sorted((out / "cells").rglob("cell.json")):
        record = json.loads(file.read_text())
        result = file.parent / "result.json"
        value = json.loads(result.read_text()) if result.is_file() else {}
        value = {k: v for k, v in value.items() if k != "seconds"} if isinstance(value, dict) else value
        hashes = {n: h for n, h in record["files"].items() if n.endswith(".safetensors")}
        cells[file.parent.name] = (record["kind"], record["inputs"], value, hashes)
    return {
        "cells": cells,
        "stats": timeless(json.loads((out / "stats.json").read_text())),
        "results": (out / "results.csv").read_text(),
        "rows": (out / "rows.csv.gz").read_bytes(),
    }


def test_a_study_says_what_it_found(done: Path, small: Path) -> None:
    found = json.loads((done / "stats.json").read_text())
    task = found["tasks"]["sums"]
    assert set(task["starts"]) == {"pissa", "spectral", "lora"}
    for name, start in task["starts"].items():
        assert start["trained"] == 3, name
        assert len(start["after"]) == 3
        assert all({"nll", "exact_match"} == set(run["problems"]) for run in start["after"])
        best = min(start["curve"], key=lambda p: (p["nll"], p["lr"]))
        assert start["chosen"] == {"lr": best["lr"], "a_scale": best["a_scale"]}
        # 8 rows, 4 a step; a plain LoRA makes as many again.
        assert [len(losses) for losses in start["losses"]] == [4 if name == "lora" else 2] * 3, name
        assert (start["norm"] > 0) == (name != "lora")
        assert 0 <= start["clipped"] <= 1
    # Where the best rate is an end the grid has grown, for all starts alike.
    grids = {tuple(p["lr"] for p in start["curve"]) for start in task["starts"].values()}
    assert len(grids) == 1
    assert len(grids.pop()) in (3, 4)
    # Neutral starts are the student at step 0; the spectral one is not.
    untrained = task["untrained"]["student"]["problems"]["nll"]
    assert task["starts"]["lora"]["before"]["problems"]["nll"] == pytest.approx(untrained, abs=1e-4)
    assert task["starts"]["pissa"]["before"]["problems"]["nll"] == pytest.approx(untrained, abs=1e-4)
    assert task["starts"]["spectral"]["before"]["problems"]["nll"] < untrained - 1e-3
    deciding = [c for c in found["comparisons"] if c["family"] == "deciding"]
    assert {c["control"] for c in deciding} == {"spectral", "lora"}
    for c in deciding:
        means = [sum(run["problems"]["nll"] for run in task["starts"][n]["after"]) / 3 for n in ("pissa", c["control"])]
        assert c["mean"] == pytest.approx(means[0] - means[1], abs=1e-6)
        assert c["low"] <= c["mean"] <= c["high"]
        assert c["adjusted"] >= c["p"]
        assert c["word"] in ("better", "worse", "the same", "cannot tell")
    assert len({start["trainable"] for start in task["starts"].values() if start is not task["starts"]["lora"]}) == 1
    page = (done / "report.html").read_text()
    # Three families of comparisons, the scores, items, losses, norms and rates.
    assert page.count("<svg ") == 3 + 5
    assert all(c["items"]["won"] + c["items"]["lost"] <= 1 + 1e-9 for c in found["comparisons"])
    flipped = deciding[0]["items"]["flipped"]
    assert len(flipped) == 6
    assert all(row["question"] and row["answer"] for row in flipped)
    assert {kind: v["cells"] for kind, v in found["costs"]["kinds"].items()}["train"] == 9
    assert all(f"<td>{name}</td>" in page for name in ("pissa", "spectral", "lora", "untrained student"))
    assert html.escape(found["verdict"]).replace("&#x27;", "&#39;") in page
    assert {c["family"] for c in found["comparisons"]} == {"deciding", "problems.exact_match", "general.nll"}
    rows = (done / "results.csv").read_text().splitlines()
    assert rows[0] == "task,start,seed,when,test,metric,value"
    assert len(rows) == 1 + 3 * (3 + 1) * 3


def test_nothing_is_made_twice(done: Path, small: Path) -> None:
    before, made = products(done), []
    study(small / "small.yaml", done, told=lambda job, error: made.append(job))
    assert not made
    assert products(done) == before


def test_what_a_cell_is_known_by(small: Path) -> None:
    """A changed option or file is another cell; a changed name, or an option at its default, is not."""

    def keys(text: str, folder: Path = small) -> list[str]:
        (folder / "other.yaml").write_text(text, encoding="utf-8")
        layout = Layout(open_study(folder / "other.yaml"))
        setting = Setting(1e-3, 1.0)
        cells = [layout.start("sums", "pissa", 0), layout.train("sums", "pissa", setting, 0)]
        train = cells[1]
        assert train is not None
        return [c.key for c in (*cells, layout.test(train, "problems", "sums")) if c is not None]

    text = (small / "small.yaml").read_text()
    plain = keys(text)
    assert keys(text + "study: another name\n") == plain
    assert keys(text.replace("how: pissa}", "how: pissa, extra_steps: 0.0}")) == plain
    assert [a == b for a, b in zip(keys(text.replace("max_new_tokens: 4", "max_new_tokens: 5")), plain, strict=True)] == [
        True, True, False,
    ]  # fmt: skip
    assert [a == b for a, b in zip(keys(text.replace("epochs: 1, batch", "epochs: 2, batch")), plain, strict=True)] == [
        True, False, False,
    ]  # fmt: skip
    assert [a == b for a, b in zip(keys(text.replace("rank: 4", "rank: 5")), plain, strict=True)] == [False] * 3
    rows = small / "rows.jsonl"
    lines = (open_study_folder() / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    rows.write_text("".join(lines), encoding="utf-8")
    moved = text.replace("demo:data/train.jsonl", "rows.jsonl")
    assert keys(moved) == plain
    rows.write_text("".join([lines[1], lines[0], *lines[2:]]), encoding="utf-8")
    assert [a == b for a, b in zip(keys(moved), plain, strict=True)] == [True, False, False]


def test_what_two_starts_share_is_made_once(small: Path) -> None:
    """A start made of another task's seeds is that task's own, and the general text of two tasks is one test."""
    text = (small / "small.yaml").read_text()
    head, task, rest = re.split(r"(  sums:\n.*?decides: problems.nll\n)", text, flags=re.S)
    panel = "panels: {cross: {of: spectral, vary: seeds_of, over: [sums, again]}}\ntraining:"
    both = head + task + task.replace("sums:", "again:") + rest.replace("training:", panel)
    (small / "crossed.yaml").write_text(both, encoding="utf-8")
    layout = Layout(open_study(small / "crossed.yaml"))
    jobs = list(layout.jobs(Store(small / "nothing")))
    keys = [cell.key for job in jobs for cell in job.cells]
    assert len(keys) == len(set(keys))
    # Both tasks have the same seeds: one spectral start, one of PiSSA; one student tested.
    assert sum(job.kind == "start" for job in jobs) == 2
    assert sum(job.kind == "untrained" for job in jobs) == 1


def test_half_a_study_says_so(done: Path, small: Path, tmp_path: Path) -> None:
    """No mean of some of the seeds, no verdict; `--report` makes nothing new."""
    shutil.copytree(done, tmp_path / "out")
    layout, store = Layout(open_study(small / "small.yaml")), Store(tmp_path / "out")
    setting = layout.chosen("sums", "lora", store)
    assert setting is not None
    for cell in layout.of_training("sums", "lora", setting, 2):
        shutil.rmtree(store.path(cell))
    cells = len(list((tmp_path / "out" / "cells").rglob("cell.json")))
    command = [
        sys.executable,
        "-m",
        "pkt",
        "study",
        str(small / "small.yaml"),
        "--out",
        str(tmp_path / "out"),
        "--report",
    ]
    told = processes.run(command, env={**os.environ, "COLUMNS": "200"})
    assert told.returncode == 0, told.stderr[-2000:]
    assert "2 of 3 seeds" in told.stdout
    assert "Not yet: the study is unfinished" in told.stdout
    assert "<td>2 of 3 seeds</td>" in (tmp_path / "out" / "report.html").read_text()
    found = json.loads((tmp_path / "out" / "stats.json").read_text())
    assert {c["control"] for c in found["comparisons"] if c["family"] == "deciding"} == {"spectral"}
    assert len(list((tmp_path / "out" / "cells").rglob("cell.json"))) == cells


def test_a_cell_that_was_changed_is_refused(done: Path, small: Path, tmp_path: Path) -> None:
    shutil.copytree(done, tmp_path / "out")
    store = Store(tmp_path / "out")
    layout = Layout(open_study(small / "small.yaml"))
    cell = layout.test(layout.study.student, "problems", "sums")
    file = store.path(cell) / "result.json"
    file.write_text(file.read_text().replace("1", "2", 1))
    with pytest.raises(PktError, match="was changed since it was written"):
        study(small / "small.yaml", tmp_path / "out")


def test_a_job_that_fails_costs_itself(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A divergence is a result; any other fault leaves its cells out, everything else goes on, and the next run makes them."""
    real = work.begin

    def begin(layout: Any, task: str, name: str, *rest: Any) -> Any:
        if name == "spectral":
            raise RuntimeError("no such device")
        return real(layout, task, name, *rest)

    def diverge(layout: Any, model: Any, rows: Any, setting: Setting, *rest: Any) -> float:
        if setting.lr == 4e-3:
            raise DivergedError("training diverged")
        return 0.0

    told: list[tuple[str, str | None]] = []
    monkeypatch.setattr(work, "begin", begin)
    monkeypatch.setattr(work, "_learn", diverge)
    found = study(small / "small.yaml", tmp_path / "out", told=lambda job, error: told.append((str(job), error)))
    failed = [line for line, error in told if error is not None]
    assert failed
    assert all("spectral" in line for line in failed)
    assert found["failures"][0]["error"] == "RuntimeError: no such device"
    assert found["verdict"].startswith("Not yet")
    curve = {p["lr"]: p["nll"] for p in found["tasks"]["sums"]["starts"]["lora"]["curve"]}
    assert curve[4e-3] is None
    assert curve[1e-3] is not None
    monkeypatch.undo()
    assert not study(small / "small.yaml", tmp_path / "out")["failures"]


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_any_moment_it_ends_in_the_same(kills: int, done: Path, small: Path, tmp_path: Path) -> None:
    draw = random.Random(kills)
    command = [sys.executable, "-m", "pkt", "study", str(small / "small.yaml"), "--out", str(tmp_path / "out")]
    for _ in range(kills):
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(draw.uniform(4, 9) if kills < 5 else draw.uniform(2, 12))
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    ended = processes.run(command)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert products(tmp_path / "out") == products(done)
    assert not (tmp_path / "out" / "lock").exists()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "held_out: 4\n",
            "held_out: 4000\n",
            "4000 of them are to choose rates by, so that none is left to learn from; give more",
        ),
        ("rows: 8", "rows: 8000", "rows; 8000 to learn from and 4 to choose rates by are more"),
        ("seeds: 4}", "seeds: 4000}", "a start asks for the first 4000"),
        ("max_length: 256", "max_length: 2", "answer"),
    ],
)
def test_what_would_fail_later_is_refused_at_once(old: str, new: str, said: str, small: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text((small / "small.yaml").read_text().replace(old, new, 1), encoding="utf-8")
    with pytest.raises(PktError, match=said):
        study(tmp_path / "bad.yaml", tmp_path / "out")
    assert not (tmp_path / "out" / "cells").exists()


def test_the_distillation_arm(small: Path, tmp_path: Path) -> None:
    """A start learns from a teacher's targets too; targets of other rows are refused before anything runs."""
    assets = open_study_folder().parent
    targets = pkt.teach(
        assets / "teacher", open_study_folder() / "train.jsonl", draws=4, out=tmp_path / "targets", progress=False
    )
    text = (small / "small.yaml").read_text()
    arm = "  lora taught: {like: lora, teacher_targets: targets, mix: 0.5}\ntraining:"
    (tmp_path / "arm.yaml").write_text(text.replace("training:", arm, 1), encoding="utf-8")
    layout, store = Layout(open_study(tmp_path / "arm.yaml")), Store(tmp_path / "out")
    setting = Setting(4e-3, 1.0)
    cells = [layout.tune("sums", name, setting, 7) for name in ("lora", "lora taught")]
    assert cells[0].inputs.keys() ^ cells[1].inputs.keys() == {"teacher_targets", "mix"}
    for name, cell in zip(("lora", "lora taught"), cells, strict=True):
        work.run_job(layout, Job("tune", (cell,), "sums", name, 7, setting), store)
    plain, taught = (store.value(cell)["nll"] for cell in cells)
    assert plain != taught
    assert taught == pytest.approx(plain, rel=0.3)
    assert len(targets) > 8
    few = tmp_path / "few.jsonl"
    few.write_text("".join((open_study_folder() / "test.jsonl").read_text().splitlines(keepends=True)[:4]))
    pkt.teach(assets / "teacher", few, draws=4, out=tmp_path / "targets", force=True, progress=False)
    with pytest.raises(PktError, match="are of other rows than"):
        study(tmp_path / "arm.yaml", tmp_path / "whole")


def test_another_folder_is_not_taken(small: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(PktError, match="mine"):
        study(small / "small.yaml", tmp_path / "mine")
    with pytest.raises(PktError, match=r"thesis\.txt is a file; name a folder"):
        study(small / "small.yaml", tmp_path / "mine" / "thesis.txt")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"


def test_the_command(done: Path, small: Path) -> None:
    command = [sys.executable, "-m", "pkt", "study", str(small / "small.yaml"), "--out", str(done)]
    told = processes.run(command, env={**os.environ, "COLUMNS": "200"})
    assert told.returncode == 0, told.stderr[-2000:]
    assert "no general text was measured" not in told.stdout
    for word in ("pissa", "spectral", "lora", "problems.nll", "→", "pissa minus it", "better than", "stats.json"):
        assert word in told.stdout
    planned = processes.run([*command, "--plan"])
    assert "2 starts, " in planned.stdout
    assert "9 trainings, " in planned.stdout
    everything = re.search(r"(\d+) starts, (\d+) tunings, (\d+) trainings, (\d+) tests", planned.stdout)
    assert everything is not None
    assert f"{sum(map(int, everything.groups()))} of them are there" in planned.stdout
    assert "about" not in planned.stdout


def test_a_plan_counts_what_is_there(done: Path, small: Path, tmp_path: Path) -> None:
    """Before: all cells, and their disk as they turn out; after: none is left; in between, times as they were measured."""
    file = small / "small.yaml"
    before = plan_of(Layout(open_study(file)), tmp_path / "nothing")
    assert before["there"] == dict.fromkeys(before["cells"], 0)
    after = plan_of(Layout(open_study(file)), done)
    assert after["there"] == after["cells"]
    assert after["seconds"] == {}
    assert after["next"] == []
    made = [json.loads(f.read_text())["kind"] for f in (done / "cells").rglob("cell.json")]
    assert after["cells"] == {kind: made.count(kind) for kind in after["cells"]}
    grown = after["cells"]["tune"] - before["cells"]["tune"]
    assert {**before["cells"], "tune": before["cells"]["tune"] + grown} == after["cells"]
    size = sum(f.stat().st_size for f in (done / "cells").rglob("*") if f.is_file())
    assert before["disk_bytes"] == pytest.approx(size, rel=0.35)

    shutil.copytree(done, tmp_path / "out")
    layout, store = Layout(open_study(file)), Store(tmp_path / "out")
    seconds = {}
    for name in ("pissa", "spectral"):
        setting = layout.chosen("sums", name, store)
        assert setting is not None
        trains = [layout.train("sums", name, setting, seed) for seed in layout.study.training_seeds]
        seconds[name] = [store.value(cell)["seconds"] for cell in trains]
        shutil.rmtree(store.path(trains[2]))
    between = plan_of(Layout(open_study(file)), tmp_path / "out")
    assert between["there"]["train"] == 7
    # Both do the same work: as long as the mean of those that are there, some of which do more.
    mean = sum(sum(each[:2]) for each in seconds.values()) / 4
    assert between["seconds"]["train"] == pytest.approx(2 * mean, rel=0.8)


def test_a_plan_of_some_of_it(small: Path, tmp_path: Path) -> None:
    layout = Layout(open_study(small / "small.yaml"), ["spectral"])
    found = plan_of(layout, tmp_path / "nothing")
    assert found["cells"] == {"start": 1, "tune": 2, "train": 3, "test": 8}
    assert found["next"] == ["start sums spectral"]


def test_only_what_is_named_is_made(small: Path, tmp_path: Path) -> None:
    """Some starts of the study; what hangs on the others waits, and the same command without --only goes on."""
    file = small / "small.yaml"
    with pytest.raises(PktError, match="--only pisa names no task, start or task/start; tasks are sums, starts pissa"):
        study(file, tmp_path / "out", only=["pisa"])
    made: list[Job] = []
    found = study(file, tmp_path / "out", only=["sums/p*", "untrained"], told=lambda job, error: made.append(job))
    assert {job.start for job in made if job.kind != "untrained"} == {"pissa"}
    assert {job.kind for job in made} == {"untrained", "start", "tune"}
    assert found["verdict"].startswith("Not yet")
    assert json.loads((tmp_path / "out" / "pkt.json").read_text())["finished"] is False
    layout, store = Layout(open_study(file)), Store(tmp_path / "out")
    left = {(job.kind, job.start) for job in layout.jobs(store)}
    assert left == {("start", "spectral"), ("tune", "lora")}


def test_a_new_option_with_a_default_is_in_no_key(small: Path) -> None:
    """Of a training and of a start: an option that a later version adds leaves the cells where they are, unless it is used."""
    plain = Layout(open_study(small / "small.yaml"))
    setting = Setting(1e-3, 1.0)

    def keys(layout: Layout) -> list[str]:
        cells = [layout.start("sums", "spectral", 0), layout.train("sums", "spectral", setting, 0)]
        return [c.key for c in (*cells, layout.tune("sums", "spectral", setting, 7)) if c is not None]

    def with_option(of: Any, name: str, default: Any, value: Any) -> Any:
        later = dataclasses.make_dataclass(type(of).__name__, [(name, Any, default)], bases=(type(of),), frozen=True)
        return later(**{f.name: getattr(of, f.name) for f in dataclasses.fields(of)}, **{name: value})

    for value, same in ((0.0, True), (0.1, False)):
        layout = Layout(
            dataclasses.replace(plain.study, training=with_option(plain.study.training, "dropout", 0.0, value))
        )
        assert [a == b for a, b in zip(keys(layout), keys(plain), strict=True)] == [True, same, same]
        spectral = with_option(plain.study.starts["spectral"], "damping", 0.0, value)
        layout = Layout(dataclasses.replace(plain.study, starts={**plain.study.starts, "spectral": spectral}))
        assert [a == b for a, b in zip(keys(layout), keys(plain), strict=True)] == [same] * 3
