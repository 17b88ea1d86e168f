"""The line on a folder's page, given to a shell, makes the folder again."""

from __future__ import annotations

import html
import inspect
import re
import shlex
from pathlib import Path

import pytest
from commands import run
from conftest import ASSETS

from pkt.manifest import call_of, manifest_of
from pkt.models.adapter_files import WEIGHTS
from pkt.reporting.again import command_of
from pkt.training import train

FOLDERS = {
    "extraction": "transfer {teacher} {student} {rows} --layers 0,1,3,4 --select rows_cols --modules q --rank 2 --seed 3",
    "transplant": "transplant {teacher} {descendant} {rows} --base {base} --rank 2 --control noise --alpha 0.5 --seed 3",
    "merged": "transplant {teacher} {descendant} {rows} --base {base} --rank full --alpha 0.5",
    "start": "start {student} {rows} --how eva --rank 2",
    "injected": "inject {student} {home}/start --mode residual --dropout 0",
    "run": "train {student} {home}/start {rows} --epochs 0.5 --batch-size 4 --lr 0.001 --no-gradient-checkpointing "
    "--held-out {held} --report-to none --micro-batch 2",
    "plain": "train {student} {rows} --init gaussian --modules q --rank 2 --max-steps 1 --report-to none",
    "adapter": "finalize {home}/run --rank 2 --no-check --dtype bfloat16",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of each kind, under a name that a shell would take apart."""
    home = tmp_path_factory.mktemp("made") / "it's here"
    home.mkdir()
    rows = (ASSETS / "data" / "seeds.jsonl").read_text().splitlines(keepends=True)[:8]
    (home / "rows.jsonl").write_text("".join(rows[:6]))
    (home / "held.jsonl").write_text("".join(rows[6:]))
    places = {name: ASSETS / name for name in ("teacher", "student", "base", "descendant")}
    places |= {"home": home, "rows": home / "rows.jsonl", "held": home / "held.jsonl"}
    for name, line in FOLDERS.items():
        words = [word.format(**places) for word in line.split()]
        run(*words, "--merge" if name == "merged" else "--out", home / name)
    return home


def line_of(folder: Path) -> list[str]:
    """The words of the line on its page."""
    page = Path(run("report", folder).strip()).read_text(encoding="utf-8")
    (cell,) = re.findall(r"<td[^>]*>again</td>\s*<td[^>]*>(.*?)</td>", page)
    return shlex.split(html.unescape(cell))


@pytest.mark.parametrize("name", FOLDERS)
def test_the_line_makes_the_same_again(name: str, home: Path, tmp_path: Path) -> None:
    program, *words = line_of(home / name)
    assert program == "pkt"
    run(*[str(tmp_path / "again") if word == "DIR" else word for word in words])
    weights = "model.safetensors" if name == "merged" else WEIGHTS
    assert (tmp_path / "again" / weights).read_bytes() == (home / name / weights).read_bytes()
    assert line_of(tmp_path / "again") == [program, *words]


@pytest.mark.parametrize("kind", ["run", "adapter", "model"])
def test_an_older_folder_has_no_line(kind: str) -> None:
    entries = {"mode": "paired", "student": "student", "base": "student", "settings": {"epochs": 3}}
    assert command_of(manifest_of(kind, entries)) is None
    assert command_of(manifest_of(kind, {**entries, "given": None})) is None


def test_what_no_command_can_say_is_not_said() -> None:
    """Rows in memory are no file, and a scheduler has no flag."""
    given = {name: parameter.default for name, parameter in inspect.signature(train).parameters.items()}
    given |= {
        "student": Path("student"),
        "extraction": None,
        "data": "rows.jsonl",
        "out": "run",
        "epochs": 3,
        "lr": 1e-3,
    }
    assert call_of(train, given, "out") == {"student": "student", "data": "rows.jsonl", "lr": 1e-3}
    assert call_of(train, {**given, "data": [[1, 2]]}, "out") is None
    told = call_of(train, {**given, "scheduler": "cosine"}, "out")
    assert command_of(manifest_of("run", {"settings": {"epochs": 3}, "given": told})) is None
