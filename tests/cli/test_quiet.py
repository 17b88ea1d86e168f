"""Every command can be silent, and can say its result as JSON; training says its steps as everything else does."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import lifecycle
import pytest
from conftest import ASSETS
from typer.main import get_command
from typer.testing import CliRunner

import pkt
from pkt.cli import app
from pkt.progress import bar, silence, tell


def cli(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


COMMANDS = sorted(get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_two_flags(name: str) -> None:
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    flags = {flag for parameter in command.params for flag in parameter.opts}
    assert {"--quiet", "--json"} <= flags


class AtOnce:
    """Instead of `threading.Timer`: what is to come after two seconds comes now."""

    def __init__(self, seconds: float, function: Any) -> None:
        self.function = function

    def start(self) -> None:
        self.function()

    def cancel(self) -> None:
        pass

    join = cancel


@pytest.fixture
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pkt.progress.threading.Timer", AtOnce)


@pytest.mark.usefixtures("no_delay")
def test_silence_is_of_what_is_going_on(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> str:
        tell("reading", "writing")
        with bar("working", 3) as advance:
            for done in range(4):
                advance(done)
        return capsys.readouterr().err

    assert "reading\nwriting\n" in work()
    assert "working" in work()
    silence()
    try:
        assert work() == ""
    finally:
        silence(False)


def test_a_first_step_that_takes_long_is_seen_and_quick_work_is_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with bar("quick", 1) as advance:
        advance(1)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("pkt.progress.DELAY", 0.01)
    with bar("long", 1), bar("a part of it", 1):
        time.sleep(0.2)
    told = capsys.readouterr().err
    assert "long" in told
    assert "part" not in told


@pytest.mark.usefixtures("no_delay")
def test_loading_and_finalizing_show_bars_and_transformers_own_do_not(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    student_dir = tmp_path / "student"
    lifecycle.student().save_pretrained(student_dir)
    ext = lifecycle.extraction(rank=2)
    capfd.readouterr()
    count = len(lifecycle.student().state_dict())
    model = pkt.inject(str(student_dir), ext, mode="add")
    assert re.findall(r"^(.*?) ━.* (\d+/\d+) (\S+)", capfd.readouterr().err, re.M) == [
        ("loading student", f"{count}/{count}", "tensors")
    ]
    lifecycle.save_quietly(model, tmp_path / "run")
    capfd.readouterr()
    run = [tmp_path / "run", "--student", student_dir, "--rank", "1", "--merge"]
    told = cli("finalize", *run, tmp_path / "merged", "--out", tmp_path / "adapter")
    assert told.exit_code == 0, told.output
    assert re.findall(r"^(.*?) ━", told.stderr, re.M) == [
        "finalizing",
        "loading student",
        *2 * ["checking the logits"],
        "loading student",
        "changing the weights",
        "writing the model",
    ]
    assert "\x1b" not in told.stderr  # no terminal: no colours, and each bar once, as it was when it ended
    silent = cli("finalize", *run, tmp_path / "more", "--out", tmp_path / "second", "--quiet", "--json")
    assert silent.exit_code == 0, silent.output
    assert silent.stderr == ""
    json.loads(silent.stdout)
    assert capfd.readouterr().err == ""


def test_a_training_is_a_line_a_log_and_quiet_nothing_but_its_result(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join((ASSETS / "data" / "train.jsonl").read_text().splitlines(keepends=True)[:4]))
    train = [
        "train",
        ASSETS / "student",
        rows,
        "--batch-size",
        "2",
        "--max-steps",
        "2",
        "--rank",
        "2",
        "--modules",
        "attention",
    ]
    told = cli(*train, "--out", tmp_path / "one")
    assert told.exit_code == 0, told.output
    assert "step 1 of 2: loss " in told.stderr
    assert "next: pkt finalize" in told.stdout
    silent = cli(*train, "--out", tmp_path / "two", "--quiet")
    assert silent.exit_code == 0, silent.output
    assert silent.stderr == ""
    assert silent.stdout == f"{tmp_path / 'two'}: trained; logs for TensorBoard in {tmp_path / 'two' / 'logs'}\n"
    value = cli(*train, "--out", tmp_path / "three", "--json", "--quiet")
    found = json.loads(value.stdout)
    assert found["out"] == str(tmp_path / "three")
    assert found["train_loss"] > 0
    assert value.stderr == ""
