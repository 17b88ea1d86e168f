"""What `pkt compare` asks of a start that is there, and what it advises."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from commands import fails, run
from conftest import ASSETS
from typer.main import get_command

import pkt
from pkt.cli import app
from pkt.studying import as_study, comparison, recommended
from pkt.studying.comparing import OURS, TASK

ROWS = ASSETS / "data"


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "few.jsonl"
    file.write_text("".join((ROWS / "train.jsonl").read_text().splitlines(keepends=True)[:12]))
    return file


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("made")
    options: dict[str, Any] = {"rank": 2, "modules": "attention", "progress": False}
    pkt.transfer(ASSETS / "teacher", ASSETS / "student", ROWS / "seeds.jsonl", out=home / "extraction", **options)
    pair = (ASSETS / "teacher", ASSETS / "descendant", ROWS / "seeds.jsonl")
    pkt.transplant(*pair, base=ASSETS / "base", rank=2, alpha=1.0, out=home / "transplant", progress=False)
    return {"extraction": home / "extraction", "transplant": home / "transplant"}


@pytest.mark.parametrize(
    ("kind", "student", "controls"),
    [("extraction", "student", {"random window"}), ("transplant", "descendant", {"wrong units", "noise"})],
)
def test_each_kind_is_held_against_its_own_controls(
    kind: str, student: str, controls: set[str], made: dict[str, Path], few: Path
) -> None:
    content, left_out = comparison(ASSETS / student, made[kind], few, ROWS / "test.jsonl")
    assert left_out == []
    study = as_study(content)
    assert set(study.starts) == {OURS, "lora", "lora, longer", "pissa"} | controls
    assert study.compare.of == OURS
    assert study.training.rank == 2
    assert study.tasks[TASK].held_out == 3
    if kind == "extraction":
        window = study.starts["random window"]
        assert (window.layers, window.select, window.modules) == ("random", "random", "attention")  # type: ignore[attr-defined]
    else:
        noise = study.starts["noise"]
        assert (noise.base, noise.control) == (str(ASSETS / "base"), "noise")  # type: ignore[attr-defined]


def test_what_is_not_here_is_left_out_in_words(made: dict[str, Path], few: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ext"
    shutil.copytree(made["extraction"], folder)
    manifest = json.loads((folder / "pkt.json").read_text())
    manifest["plan"]["teacher"]["name"] = str(tmp_path / "gone")
    (folder / "pkt.json").write_text(json.dumps(manifest))
    content, left_out = comparison(ASSETS / "student", folder, few, ROWS / "test.jsonl")
    assert left_out == ["left out: random window: the teacher they need is not here"]
    assert set(as_study(content).starts) == {OURS, "lora", "lora, longer", "pissa"}


def stats(words: dict[str, str], values: dict[str, float]) -> dict[str, Any]:
    """As stats.json has it, of what `recommended` reads."""
    starts = {
        name: {
            "chosen": {"lr": 0.001, "a_scale": 3.0},
            "seeds": [{"test": {"nll": value}}],
            "after": {"test.nll": [value]},
        }
        for name, value in values.items()
    }
    return {
        "tasks": {TASK: {"decides": "test.nll", "starts": starts}},
        "comparisons": [{"family": "deciding", "task": TASK, "control": n, "word": w} for n, w in words.items()],
    }


def test_advice_follows_the_verdicts(made: dict[str, Path], few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, _ = comparison(ASSETS / "student", made["extraction"], few, ROWS / "test.jsonl")
    values = {OURS: 1.0, "lora": 0.9, "lora, longer": 0.8, "pissa": 0.7, "random window": 1.1}
    from pkt.studying import summing

    monkeypatch.setattr(summing, "values", lambda found, start, name: start["after"][name])
    known = {p for c in ("train", "start") for o in get_command(app).commands[c].params for p in o.opts}  # type: ignore[attr-defined]

    def advice(**words: str) -> tuple[str, str]:
        named = {name.replace("_", " ").replace("longer", "lora, longer"): word for name, word in words.items()}
        sentence, command = recommended(stats(named, values), content)
        assert {w for w in shlex.split(command) if w.startswith("--")} <= known
        return sentence, command

    sentence, command = advice(lora="better", longer="better", pissa="better", random_window="better")
    assert sentence == "Your start does better than every control on these rows."
    assert command.startswith(f"pkt train {ASSETS / 'student'} {made['extraction']} ")
    assert "--lr 0.001" in command
    sentence, command = advice(lora="worse", longer="worse", pissa="worse", random_window="better")
    assert sentence.startswith("pissa does better than your start")
    assert command.startswith("pkt start ")
    assert " && pkt train " in command
    sentence, command = advice(lora="better", longer="worse", pissa="better", random_window="better")
    assert sentence.startswith("lora, longer does better")
    assert "--epochs 3.75" in command
    assert "--a-scale 3" in command
    sentence, _ = advice(lora="better", longer="cannot tell", pissa="the same", random_window="better")
    assert sentence.endswith("not shown to: lora, longer (cannot tell), pissa (the same).")
    sentence, _ = advice(lora="cannot tell", longer="cannot tell", pissa="cannot tell", random_window="cannot tell")
    assert sentence.startswith("Nothing shows that your start helps")


def test_a_plan_makes_nothing_and_bad_input_is_one_line(made: dict[str, Path], few: Path, tmp_path: Path) -> None:
    words = ("compare", ASSETS / "student", made["extraction"], few, ROWS / "test.jsonl", "--out", tmp_path / "out")
    assert "compare: " in run(*words, "--plan")
    assert not (tmp_path / "out").exists()
    three = tmp_path / "three.jsonl"
    three.write_text("".join(few.read_text().splitlines(keepends=True)[:3]))
    gone = tmp_path / "gone.jsonl"
    assert f"{gone} does not exist; name a JSONL file" in fails(*words[:4], gone)
    assert "give 8 or more" in fails("compare", ASSETS / "student", made["extraction"], three, ROWS / "test.jsonl")
    assert "pkt" in fails("compare", ASSETS / "student", tmp_path, few, ROWS / "test.jsonl")
    another = ("compare", ASSETS / "base", made["extraction"], few, ROWS / "test.jsonl", "--out", tmp_path / "out")
    assert f"does not fit {ASSETS / 'base'}" in fails(*another)
    assert not (tmp_path / "out" / "cells").exists()


@pytest.mark.slow
def test_a_comparison_from_end_to_end(made: dict[str, Path], few: Path, tmp_path: Path) -> None:
    test = tmp_path / "test.jsonl"
    test.write_text("".join((ROWS / "test.jsonl").read_text().splitlines(keepends=True)[:6]))
    words = (
        "compare",
        ASSETS / "student",
        made["extraction"],
        few,
        test,
        "--out",
        tmp_path / "out",
        "--epochs",
        1,
        "--seeds",
        3,
    )
    said = run(*words, "--batch-size", 4)
    assert "next: pkt " in said
    assert (tmp_path / "out" / "report.html").is_file()
    found = json.loads((tmp_path / "out" / "stats.json").read_text())
    assert set(found["tasks"][TASK]["starts"]) >= {OURS, "lora", "lora, longer", "pissa", "random window"}
    again = json.loads(run(*words, "--batch-size", 4, "--json"))
    assert again["tasks"] == found["tasks"]
    plan = json.loads(run("study", tmp_path / "out" / "compare.yaml", "--out", tmp_path / "out", "--plan", "--json"))
    assert plan["next"] == []  # it is the same study
