"""Every command can be silent, and can say its result as JSON; training says its steps as everything else does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ASSETS
from typer.main import get_command
from typer.testing import CliRunner

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


def test_silence_is_of_what_is_going_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pkt.progress.DELAY", 0.0)

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
