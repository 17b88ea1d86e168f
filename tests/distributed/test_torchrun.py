"""Commands under torchrun: what they print, and how they end when one of their processes does."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import processes
import pytest
from commands import empty_beside, run
from conftest import ASSETS

import pkt

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pkt"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# What torchrun says itself when one of its processes ends.
ITS_OWN = re.compile(
    r"^(Traceback|  File|    |torch\.|[EWI]\d{4} |=|-|Failures|Root|\[\d+\]|  \w+ +:|\S+ FAILED|<NO)|^\s*$"
)


def torchrun(*words: Any) -> subprocess.CompletedProcess[str]:
    return processes.run([*TORCHRUN, *words], seconds=120, env=ENVIRONMENT)


def said(text: str) -> list[str]:
    """The lines that are pkt's."""
    return [line for line in text.splitlines() if not ITS_OWN.match(line)]


class Case:
    """A transfer by two ranks, and the bytes of one that nothing disturbed."""

    def __init__(self, folder: Path, *words: Any) -> None:
        self.words, self.calm = ["transfer", *words, "--rank", "4"], folder / "calm"
        self.shown = torchrun(*self.words, "--out", self.calm)
        assert self.shown.returncode == 0, self.shown.stderr

    def bytes(self, out: Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in out.iterdir()}


@pytest.fixture(scope="module")
def case(teacher_dir: Path, student_dir: Path, seed_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("torchrun"), teacher_dir, student_dir, seed_file, "--batch-size", "2")


def test_the_command_by_two_ranks_is_that_of_one(case: Case, tmp_path: Path) -> None:
    shown = run(*case.words, "--out", tmp_path / "one")
    plans = [pkt.Extraction.load(out).plan for out in (case.calm, tmp_path / "one")]
    assert [e.region for e in plans[0].entries] == [e.region for e in plans[1].entries]
    # One of them speaks.
    assert case.shown.stdout.count("next: pkt train") == shown.count("next: pkt train") == 1
    assert case.shown.stderr.count("memory:") == 1
    told = case.shown.stderr.replace("\n", " ")
    assert re.search(r"2 ranks, each with its share of the seeds: each holds [\d.]+ [kM]B", told)
    assert "the weights are read once on each machine" in told
    assert empty_beside(case.calm.parent / "none")


def start(*words: Any) -> subprocess.Popen[str]:
    words = (*TORCHRUN, *words)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(list(map(str, words)), start_new_session=True, env=ENVIRONMENT, **pipes)


def workers(agent: int) -> list[int]:
    """The ranks, in order, once all are there."""
    found: list[int] = []
    begin = time.monotonic()
    while len(found) < 2 and time.monotonic() - begin < 60:
        children = Path(f"/proc/{agent}/task/{agent}/children")
        found = [int(pid) for pid in children.read_text().split()] if children.exists() else []
        found = [pid for pid in found if b"LOCAL_RANK=" in Path(f"/proc/{pid}/environ").read_bytes()]
        time.sleep(0.05)
    return found


def left(group: int) -> list[str]:
    """The processes of a session that live."""
    names = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = entry.read_text().rpartition(")")
        except OSError:
            continue
        state, _, pgrp = rest.split()[:3]
        if int(pgrp) == group and state not in "ZX":
            names.append(name)
    return names


def end(process: subprocess.Popen[str], within: float = 30) -> list[str]:
    """What was said until the end, which comes within so many seconds and leaves no process."""
    begin = time.monotonic()
    try:
        _, err = process.communicate(timeout=within + 30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    took = time.monotonic() - begin
    assert took < within, (took, err)
    assert left(process.pid) == []
    return said(err)


def goes_on(case: Case, out: Path) -> None:
    """The same command gives the bytes of the calm run."""
    again = torchrun(*case.words, "--out", out)
    assert again.returncode == 0, again.stderr
    assert case.bytes(out) == case.bytes(case.calm)
    assert empty_beside(out.parent / "none")


ENDS = "error: another rank ended without a word|stopped"


def until(out: Path, part: int, process: subprocess.Popen[str]) -> None:
    """Wait until so many parts of the transfer are finished, or it is."""
    run_folder = out.parent / f".{out.name}.run"
    file = run_folder / ("run.json" if part == 0 else f"step-{part - 1:04d}.safetensors")
    while not file.exists() and not out.exists() and process.poll() is None:
        time.sleep(0.002)


@pytest.fixture(scope="module")
def long(teacher_dir: Path, student_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """One of some seconds: sixty samples, one at a time."""
    folder = tmp_path_factory.mktemp("long")
    lines = (ASSETS / "data" / "train.jsonl").read_text().splitlines()[:60]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return Case(folder, teacher_dir, student_dir, folder / "rows.jsonl", "--batch-size", "1")


@pytest.mark.long
@pytest.mark.parametrize("number", range(10))
def test_a_killed_rank_ends_all_and_the_same_command_goes_on(long: Case, number: int, tmp_path: Path) -> None:
    moment, out = random.Random(number), tmp_path / "out"
    process = start(*long.words, "--out", out)
    pids = workers(process.pid)
    if number:
        until(out, moment.randrange(6), process)
        time.sleep(moment.uniform(0, 0.5))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pids[number % 2], signal.SIGKILL)
    told = [line for line in end(process) if re.match(ENDS, line)]
    # Killed before there were two, or when all was done, nobody has anything to say.
    assert len(told) <= 1, told
    goes_on(long, out)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_says_so_once(long: Case, number: int, tmp_path: Path) -> None:
    process = start(*long.words, "--out", tmp_path / "out")
    workers(process.pid)
    until(tmp_path / "out", 2, process)
    # As a terminal does, to all of the group.
    os.killpg(process.pid, number)
    lines = [line for line in end(process) if line.startswith("stopped")]
    assert lines == ["stopped; the same command continues"]
    goes_on(long, tmp_path / "out")


@pytest.mark.slow
def test_an_error_is_one_line_and_other_commands_are_refused(case: Case, tmp_path: Path) -> None:
    missing = torchrun(*case.words[:3], tmp_path / "none.jsonl", "--out", tmp_path / "out")
    assert missing.returncode == 1
    (line,) = [line for line in said(missing.stderr) if "error:" in line]
    assert "none.jsonl does not exist" in line
    refused = torchrun("inspect", case.calm)
    (line,) = [line for line in said(refused.stderr) if "error:" in line]
    assert "pkt inspect is the work of one process" in line


@pytest.mark.slow
def test_what_one_rank_does_the_others_wait_for(student_dir: Path, tmp_path: Path) -> None:
    done = torchrun("start", student_dir, "--out", tmp_path / "start", "--rank", "4")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("rank 0 does it, and the others wait") == 1
    run("start", student_dir, "--out", tmp_path / "one", "--rank", "4")
    theirs, own = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("start", "one"))
    assert theirs == own


@pytest.mark.long
def test_a_killed_rank_ends_a_training_and_the_same_command_goes_on(
    case: Case, student_dir: Path, tmp_path: Path
) -> None:
    rows, out = ASSETS / "data" / "train.jsonl", tmp_path / "run"
    words = ["train", student_dir, case.calm, rows, "--out", out, "--batch-size", "5", "--report-to", "none"]
    words += ["--save-steps", "20", "--max-steps"]
    process = start(*words, "400")
    pids = workers(process.pid)
    begin = time.monotonic()
    while not list(out.glob("checkpoint-*/trainer_state.json")) and time.monotonic() - begin < 120:
        time.sleep(0.1)
    os.kill(pids[1], signal.SIGKILL)
    lines = [line for line in end(process) if re.match(ENDS, line)]
    assert len(lines) <= 1
    other = torchrun(*words, "30")
    assert "max_steps: 400 there, 30 here" in other.stderr.replace("\n", " ")
    again = torchrun(*words, "400")
    assert again.returncode == 0, again.stderr
    assert json.loads((out / "pkt.json").read_text())["finished"]
