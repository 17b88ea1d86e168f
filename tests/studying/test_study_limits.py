"""What a study does without rows held out, with rates at the end of the grid, with few seeds, with starts by PEFT's names."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import processes
import pytest

import pkt
from pkt import PktError
from pkt.studying import Job, Layout, Store, open_study, study, work
from pkt.studying.layout import Setting
from pkt.studying.results import write_results
from pkt.studying.store import Cell

DATA = Path(pkt.__file__).parent / "demo" / "assets" / "data"
STUDY = """student: demo:student
tasks:
  sums:
    train: demo:data/train.jsonl
    rows: 8
    held_out: 4
    tests: {problems: {data: demo:data/test.jsonl, limit: 6}}
    decides: problems.nll
starts:
  pissa: {kind: start, how: pissa}
  lora: {kind: lora}
training: {rank: 2, epochs: 1, batch_size: 8, micro_batch: 8, max_length: 256}
rates: {lr: [1e-3, 2e-3, 4e-3], a_scale: [1], seeds: [7], epochs: 1, extend: 1}
seeds: 3
compare: {of: pissa}
"""


def opened(folder: Path, *changes: tuple[str, str]) -> Layout:
    text = STUDY
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    (folder / "s.yaml").write_text(text, encoding="utf-8")
    return Layout(open_study(folder / "s.yaml"))


class MadeUp:
    """A study whose cells hold what a test says: `tuned` gives held-out losses by start and rate, no model is trained."""

    def __init__(self, layout: Layout, out: Path) -> None:
        self.layout, self.store = layout, Store(out)

    def put(self, cell: Cell, value: Any) -> None:
        self.store.put(cell, lambda: value)

    def tuned(self, losses: dict[str, dict[float, float]]) -> None:
        for name, curve in losses.items():
            for lr, nll in curve.items():
                value = {"nll": None if math.isinf(nll) else nll}
                self.put(self.layout.tune("sums", name, Setting(lr, 1.0), 7), value)

    def trained(self, after: dict[str, float]) -> None:
        """Every training, each test item's loss that of the start and a little of its own."""
        for name, nll in after.items():
            setting = self.layout.chosen("sums", name, self.store)
            assert setting is not None
            for seed in self.layout.study.training_seeds:
                *tests, train = self.layout.of_training("sums", name, setting, seed)
                for cell in tests:
                    self.put(cell, {"nll": [[nll + 0.001 * ((i * 7 + seed * 3) % 5), 1] for i in range(6)]})
                told = {
                    "trainable": 1,
                    "norm": 0.0,
                    "diverged": False,
                    "loss": nll,
                    "seconds": 1.0,
                    "losses": [nll],
                    "clipped": 0.0,
                }
                self.put(train, told)

    def grid(self) -> list[float]:
        return [setting.lr for setting in self.layout.grid("sums", self.store)]


def test_a_best_rate_at_an_end_extends_the_grid_of_all_and_is_said(tmp_path: Path) -> None:
    made = MadeUp(opened(tmp_path), tmp_path / "out")
    made.tuned({"pissa": {1e-3: 3.0, 2e-3: 2.0, 4e-3: 1.0}, "lora": {1e-3: 2.0, 2e-3: 1.0, 4e-3: 2.0}})
    assert made.grid() == [1e-3, 2e-3, 4e-3, 8e-3]
    starts, others = ([job for job in made.layout.jobs(made.store) if job.kind == kind] for kind in ("start", "tune"))
    assert [job.start for job in starts] == ["pissa"]  # which is not made, and tuned then
    assert [(job.start, job.setting) for job in others] == [("lora", Setting(8e-3, 1.0))]
    assert made.layout.chosen("sums", "lora", made.store) is None
    made.tuned({"pissa": {8e-3: 0.5}, "lora": {8e-3: math.inf}})
    assert made.grid() == [1e-3, 2e-3, 4e-3, 8e-3]  # once, as `extend` says
    assert made.layout.chosen("sums", "pissa", made.store) == Setting(8e-3, 1.0)
    assert made.layout.chosen("sums", "lora", made.store) == Setting(2e-3, 1.0)
    (made.store.folder).mkdir(exist_ok=True)
    found = write_results(made.layout, made.store, made.store.folder)
    starts = found["tasks"]["sums"]["starts"]
    assert [starts[name]["at_the_end"] for name in ("pissa", "lora")] == [True, False]


def test_where_nothing_tells_what_is_forgotten_the_command_says_so(tmp_path: Path) -> None:
    opened(tmp_path)
    told = processes.run(
        [sys.executable, "-m", "pkt", "study", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out"), "--report"]
    )
    assert told.returncode == 0, told.stderr[-2000:]
    assert "no general text was measured" in " ".join(told.stdout.split())


def test_a_best_rate_at_the_lower_end_extends_downwards(tmp_path: Path) -> None:
    made = MadeUp(opened(tmp_path), tmp_path / "out")
    made.tuned({"pissa": {1e-3: 1.0, 2e-3: 2.0, 4e-3: 3.0}, "lora": {1e-3: 1.0, 2e-3: 1.0, 4e-3: 0.5}})
    assert made.grid() == [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]


def test_a_start_that_diverges_everywhere_is_a_result(tmp_path: Path) -> None:
    """Smaller rates are tried, for all; if they diverge as well it is trained at the smallest, and the others are reported."""
    made = MadeUp(opened(tmp_path), tmp_path / "out")
    gone = dict.fromkeys((0.001, 0.002, 0.004), math.inf)
    made.tuned({"pissa": gone, "lora": {1e-3: 2.0, 2e-3: 1.0, 4e-3: 2.0}})
    assert made.grid() == [5e-4, 1e-3, 2e-3, 4e-3]
    made.tuned({"pissa": {5e-4: math.inf}, "lora": {5e-4: 2.0}})
    assert made.layout.chosen("sums", "pissa", made.store) == Setting(5e-4, 1.0)
    assert made.layout.chosen("sums", "lora", made.store) == Setting(2e-3, 1.0)


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_fewer_than_three_seeds_give_no_verdict(seeds: int, tmp_path: Path) -> None:
    made = MadeUp(opened(tmp_path, ("seeds: 3", f"seeds: {seeds}")), tmp_path / "out")
    made.tuned({name: {1e-3: 2.0, 2e-3: 1.0, 4e-3: 2.0} for name in ("pissa", "lora")})
    made.trained({"pissa": 1.0, "lora": 2.0})
    found = write_results(made.layout, made.store, made.store.folder)
    assert not [job for job in made.layout.jobs(made.store) if job.kind == "train"]
    words = [c["word"] for c in found["comparisons"] if c["family"] == "deciding"]
    assert words == {1: [], 2: ["not yet"], 3: ["better"]}[seeds]
    assert found["verdict"].startswith(
        "Better than every control" if seeds == 3 else "Not yet: the study is unfinished, or has"
    )


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("    held_out: 4\n", "", "s.yaml:4: tasks.sums.held_out is missing"),
        (
            "held_out: 4",
            "held_out: 0",
            "tasks.sums.held_out must be at least one row: rates are chosen by rows not learnt",
        ),
        ("held_out: 4", "held_out: nowhere.jsonl", "nowhere.jsonl is not a file"),
        ("held_out: 4", "held_out: empty.jsonl", "empty.jsonl"),
        ("held_out: 4", "held_out: same.jsonl", "same.jsonl: 3 of its 3 rows are learnt from too"),
    ],
)
def test_a_task_without_rows_held_out_is_refused(old: str, new: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    lines = (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "same.jsonl").write_text("".join(lines[:3]), encoding="utf-8")

    def run() -> None:
        opened(tmp_path, (old, new))
        study(tmp_path / "s.yaml", tmp_path / "out", told=lambda job, error: pytest.fail(f"{job} ran"))

    with pytest.raises(PktError, match=said) as caught:
        run()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("init", ["olora", "eva", "pissa_niter_4"])
def test_an_initialisation_of_pefts_is_a_start_by_its_name(init: str, tmp_path: Path) -> None:
    """Another training than the default's, from the same student."""
    layout = opened(tmp_path, ("lora: {kind: lora}", f"lora: {{kind: lora}}\n  other: {{kind: lora, init: {init}}}"))
    store, setting = Store(tmp_path / "out"), Setting(1e-3, 1.0)
    losses = []
    for name in ("lora", "other"):
        job = Job("tune", (layout.tune("sums", name, setting, 7),), "sums", name, 7, setting)
        work.run_job(layout, job, store)
        losses.append(store.value(job.cells[0])["nll"])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
