"""What a plan says before anything runs: cells, readings, time and disk, of presets too whose models and rows are not here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import run

from pkt.studying import Layout, open_study, plan_of


@pytest.mark.parametrize("name", ["demo", "quick", "paper-teachers", pytest.param("paper", marks=pytest.mark.slow)])
def test_every_preset_plans(name: str, tmp_path: Path) -> None:
    """Without models, rows or anything else: what is not here is assumed, and said."""
    told = run("study", name, "--plan", "--out", str(tmp_path / "out"))
    assert "if no grid grows; 0 of them are there" in told
    assert "one reading of" in told
    assert "one after another" in told
    assert "MB on disk" in told
    assert ("assumed, since it is not here" in told) == (name != "demo")
    assert ("on an H100 about" in told) == name.startswith("paper")
    assert not (tmp_path / "out").exists()


def test_readings_are_shared(tmp_path: Path) -> None:
    """Two transfers of a teacher, one of them drawn for each of six seeds, on a task: one reading makes all seven."""
    text = """student: demo:descendant
teachers: {tuned: demo:teacher}
tasks:
  sums:
    seeds: demo:data/seeds.jsonl
    train: demo:data/train.jsonl
    held_out: 8
    tests: {problems: {data: demo:data/test.jsonl}}
    decides: problems.nll
starts:
  window: {kind: transfer, teacher: tuned}
  random: {like: window, layers: random}
  off: {like: window, seeds_of: sums}
compare: {of: window}
"""
    (tmp_path / "two.yaml").write_text(text)
    found: dict[str, Any] = plan_of(Layout(open_study(tmp_path / "two.yaml")), tmp_path / "out")
    # "off" is of the task's own seeds, so it is the window itself.
    assert found["readings"] == [{"teacher": "tuned", "starts": 7}]
    assert found["cells"]["start"] == 7
