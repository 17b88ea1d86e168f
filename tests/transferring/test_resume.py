"""Interrupted transfers: kill -9, signals, full disks, damaged and foreign checkpoints, shards that change."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from oracle import seeds

import pkt
from pkt import streaming
from pkt.streaming import Engine
from pkt.streaming.parts import LayeredModel

# Processes are forked from one that has imported everything and computed nothing: they start at once.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["transformers.models.llama.modeling_llama", "pkt.transferring", "oracle"])


def work(folder: Path, out: str, slow: float, limit: int, hold: str, tell: Any) -> None:
    """A transfer in a process of its own: tells of every finished part, and at `hold` waits for what will end it."""
    torch.set_num_threads(1)
    # What a shell starts in the background ignores Ctrl-C, and so does all that starts from there.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    plain = LayeredModel.call

    def call(self: LayeredModel, *args: Any) -> Any:
        time.sleep(slow)
        return plain(self, *args)

    LayeredModel.call = call  # type: ignore[method-assign]
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    def tick(now: Any) -> None:
        line = f"{now.phase} {now.layer}"
        tell.send(line)
        if hold and line.startswith(hold):
            time.sleep(600)

    tell.send("ready")
    try:
        pkt.transfer(
            folder / "teacher",
            folder / "student",
            seeds(),
            out=folder / out,
            rank=4,
            batch_size=3,
            progress=False,
            host_memory="1100kB",
            keep_scores="full",
            on_tick=tick,
        )
    except pkt.PktError as error:
        tell.send(f"refused: {error}")
        sys.exit(3)


class Run:
    def __init__(self, folder: Path, out: str, slow: float, limit: int, hold: str) -> None:
        self.ear, tell = SERVER.Pipe(duplex=False)
        # A test that fails halfway leaves a run that ends with pytest.
        self.process = SERVER.Process(target=work, args=(folder, out, slow, limit, hold, tell), daemon=True)
        self.process.start()
        tell.close()
        self.heard: list[str] = []

    def until(self, line: str) -> None:
        while not self.heard or not self.heard[-1].startswith(line):
            self.heard.append(self.ear.recv())

    def end(self) -> int:
        """The exit code, when everything was heard."""
        with contextlib.suppress(EOFError):
            while True:
                self.heard.append(self.ear.recv())
        self.ear.close()
        self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode

    def signal(self, number: int) -> int:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)
        return self.end()


class Case:
    """A teacher and a student on disk, and the bytes of a run that nothing disturbed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        zoo.llama(True, layers=5).save_pretrained(folder / "teacher", max_shard_size="60KB")
        zoo.llama(True, hidden=36, layers=2, heads=3, kv=1, ffn=48).save_pretrained(folder / "student")
        assert self.start("calm").end() == 0
        self.bytes = self.read("calm")

    def start(self, out: str, slow: float = 0.0, limit: int = 0, hold: str = "") -> Run:
        return Run(self.folder, out, slow, limit, hold)

    def read(self, out: str) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in (self.folder / out).iterdir()}

    def leftovers(self, out: str) -> list[str]:
        return [p.name for p in self.folder.iterdir() if p.name.startswith((f".{out}", ".pkt-"))]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("resume"))


def test_kill_and_signals_leave_what_continues_to_the_same_bytes(case: Case) -> None:
    for number, line, code in (
        (signal.SIGKILL, "head", -9),
        (signal.SIGTERM, "backward 3", 143),
        (signal.SIGINT, "backward 1", 1),
    ):
        run = case.start("stopped", hold=line)
        run.until(line)
        assert run.signal(number) == code
        assert not (case.folder / "stopped").exists()
        assert case.leftovers("stopped") == [".stopped.run"]
    (case.folder / ".pkt-a_killed").mkdir()  # as a kill while the folder itself is written leaves it
    last = case.start("stopped")
    assert last.end() == 0
    # It went on where it was: the layers done before are not done again.
    assert "backward 4" not in last.heard
    assert "backward 0" in last.heard
    assert case.read("stopped") == case.bytes
    assert case.leftovers("stopped") == []


def kills(case: Case, count: int, out: str) -> None:
    """Kill at random moments until `count` have hit; every run that gets through must have the undisturbed bytes."""
    rng, hits = random.Random(0), 0
    while hits < count:
        shutil.rmtree(case.folder / out, ignore_errors=True)
        for _ in range(60):
            run = case.start(out, 0.005)
            run.until("ready")
            run.process.join(rng.uniform(0.0, 0.6))
            # It may end by itself between the look and the kill.
            code = run.signal(signal.SIGKILL) if run.process.exitcode is None else run.end()
            if code == -9:
                hits += 1
                continue
            assert code == 0, run.heard
            break
        else:
            assert case.start(out).end() == 0
        assert case.read(out) == case.bytes
        assert case.leftovers(out) == []


def test_kills_at_random_moments_end_in_the_same_bytes(case: Case) -> None:
    kills(case, 4, "killed")


@pytest.mark.long
def test_many_kills_at_random_moments_end_in_the_same_bytes(case: Case) -> None:
    kills(case, 60, "hunted")


def test_a_second_run_on_the_same_folder_is_refused(case: Case) -> None:
    first = case.start("shared", hold="forward")
    first.until("forward")
    second = case.start("shared")
    assert second.end() == 3
    assert "another run is writing" in second.heard[-1]
    assert first.signal(signal.SIGKILL) == -9
    # The lock died with its process.
    assert case.start("shared").end() == 0
    assert case.read("shared") == case.bytes


def test_a_full_disk_in_the_middle_can_be_continued(case: Case) -> None:
    run = case.start("full", limit=25_000)
    assert run.end() == 3
    assert "file-size limit" in run.heard[-1]
    assert not (case.folder / "full").exists()
    assert case.start("full").end() == 0
    assert case.read("full") == case.bytes


class StopError(Exception):
    """The interruption that a test makes."""


def interrupted(case: Case, out: Path, layer: int = 2, **options: Any) -> None:
    """A run in this process that stops when it has finished `layer`."""

    def tick(now: Any) -> None:
        if now.phase == "backward" and now.layer == layer:
            raise StopError

    with pytest.raises(StopError):
        transfer(case, out, on_tick=tick, **options)


def transfer(case: Case, out: Path, **options: Any) -> Any:
    settings: Any = {"rank": 4, "batch_size": 3, "progress": False, "host_memory": "1100kB", **options}
    rows = settings.pop("rows", None) or seeds()
    return pkt.transfer(
        settings.pop("teacher", case.folder / "teacher"), case.folder / "student", rows, out=out, **settings
    )


def test_other_inputs_are_refused_and_named(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(case, out)
    for change, named in (
        ({"rank": 3}, "rank: 4 there"),
        ({"select": "blocks"}, "select"),
        ({"rows": seeds(6)}, "seeds"),
        ({"batch_size": 2}, "batch_size"),
    ):
        with pytest.raises(pkt.PktError, match=f"other inputs.*{named}"):
            transfer(case, out, **change)
    assert transfer(case, out, rank=3, force=True).rank == 3


def test_a_damaged_checkpoint_is_refused(case: Case, tmp_path: Path) -> None:
    interrupted(case, tmp_path / "out")
    run = tmp_path / ".out.run"
    for pattern in ("step-0001*", "grad-*", "tied*"):
        (file,) = run.glob(pattern)
        whole = file.read_bytes()
        for broken in (
            whole[:-7],
            whole[:-7] + bytes(7 - len(b"")) if whole[-7:] != bytes(7) else whole[:-7] + b"damaged",
        ):
            file.write_bytes(broken)
            with pytest.raises(pkt.PktError, match=rf"{file.name} is damaged.*--force"):
                transfer(case, tmp_path / "out")
        file.write_bytes(whole)
    value = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**value, "format": "pkt-run-1"}))
    with pytest.raises(pkt.PktError, match="unfinished run of an older pkt; start over with --force"):
        transfer(case, tmp_path / "out")
    (run / "run.json").write_text("{")
    with pytest.raises(pkt.PktError, match=r"run\.json"):
        transfer(case, tmp_path / "out")
    assert transfer(case, tmp_path / "out", force=True).rank == 4


@pytest.mark.parametrize("how", ["shrinks", "changes"])
def test_a_shard_that_changes_between_the_passes(case: Case, how: str, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(case.folder / "teacher", teacher)
    index = json.loads((teacher / "model.safetensors.index.json").read_text())
    shard = teacher / index["weight_map"]["model.layers.2.mlp.up_proj.weight"]

    def tick(now: Any) -> None:
        if now.phase == "head":
            size = shard.stat().st_size
            if how == "shrinks":
                os.truncate(shard, size - 100)
            else:
                with open(shard, "r+b") as file:
                    file.seek(size - 8)
                    file.write(b"\1\2\3\4")

    with pytest.raises(pkt.PktError, match=rf"{shard.name} changed while it was read"):
        transfer(case, tmp_path / "out", teacher=teacher, on_tick=tick)
    # What is finished is bound to the checkpoint as it was.
    with pytest.raises(pkt.PktError, match=r"truncated|teacher's weights"):
        transfer(case, tmp_path / "out", teacher=teacher)


def test_halvings_are_recorded_and_a_resumed_run_keeps_them(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = LayeredModel.call

    def call(self: LayeredModel, index: int, hidden: Any, recorded: Any) -> Any:
        if hidden.requires_grad and index == 3 and hidden.shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, index, hidden, recorded)

    monkeypatch.setattr(LayeredModel, "call", call)
    interrupted(case, tmp_path / "out")
    monkeypatch.undo()
    execution = json.loads((tmp_path / ".out.run" / "run.json").read_text())["execution"]
    assert execution["micro_batches"] == [[2, 1, 2, 1, 1]]
    assert execution["halvings"] == [{"why": "out of memory", "after": 2}]
    widths: list[int] = []
    monkeypatch.setattr(
        streaming.Engine,
        "_forward",
        lambda self, i, chunks, *rest: widths.append(len(chunks)) or FORWARD(self, i, chunks, *rest),
    )
    transfer(case, tmp_path / "out")
    assert set(widths) == {5}


FORWARD = Engine._forward


def test_several_tasks_stopped_between_their_folders(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = {"math": seeds(5), "code": seeds(4, seed=1)}
    calm = tmp_path / "calm"
    transfer(case, calm, rows=tasks, keep_scores="full")
    plain = pkt.Extraction.save

    def save(self: Any, folder: Any, **options: Any) -> None:
        if Path(folder).name == "code":
            raise StopError
        plain(self, folder, **options)

    monkeypatch.setattr(pkt.Extraction, "save", save)
    with pytest.raises(StopError):
        transfer(case, tmp_path / "out", rows=tasks, keep_scores="full")
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["math"]
    transfer(case, tmp_path / "out", rows=tasks, keep_scores="full")
    for file in calm.rglob("*.*"):
        assert file.read_bytes() == (tmp_path / "out" / file.relative_to(calm)).read_bytes()
    assert not (tmp_path / ".out.run").exists()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(pkt.PktError, match="did not write"):
        transfer(case, tmp_path / "out", rows={**tasks, "more": seeds(2)}, force=True)
    assert (tmp_path / "out" / "notes.txt").is_file()


def test_stopped_between_the_folder_and_its_scores(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target).name == "scores.safetensors":
            raise StopError
        plain(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(StopError):
        transfer(case, tmp_path / "out", keep_scores="full")
    monkeypatch.undo()
    transfer(case, tmp_path / "out", keep_scores="full")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == case.bytes
    assert not (tmp_path / ".out.run").exists()


def test_the_command_line(case: Case, tmp_path: Path) -> None:
    from conftest import ASSETS
    from typer.testing import CliRunner

    from pkt import cli

    models = [str(ASSETS / name) for name in ("teacher", "student")]
    lines = (ASSETS / "data" / "train.jsonl").read_text(encoding="utf-8").split("\n")
    for name, part in (("a", lines[:3]), ("b", lines[3:6])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")
    tasks = [f"--seeds={name}={tmp_path / name}.jsonl" for name in ("a", "b")]
    command = ["transfer", *models, "--out", str(tmp_path / "out"), "--rank", "4", "--device-memory", "1GB"]
    shown = CliRunner().invoke(cli.app, [*command, *tasks, "--json"])
    assert shown.exit_code == 0, shown.output
    result = json.loads(shown.stdout)
    assert [Path(row["out"]).name for row in result] == ["a", "b"]
    events = [json.loads(line) for line in shown.stderr.splitlines() if line.startswith("{")]
    assert [e["layer"] for e in events if e["phase"] == "backward"] == sorted(
        (e["layer"] for e in events if e["phase"] == "forward"), reverse=True
    )
    assert {"tokens_per_s", "bytes_per_s", "waiting", "seconds_left"} <= set(events[0])
    assert events[-1]["done"] == events[-1]["total"]
    for wrong, message in (
        ([*command, *tasks, str(tmp_path / "a.jsonl")], "name the seeds once"),
        (command, "name the seeds once"),
        ([*command, "--seeds", "a.jsonl"], "NAME=FILE"),
        ([*command, *tasks, "--host-memory", "much"], "is not a size"),
        ([*command[:3], "--out", str(tmp_path / "x"), *tasks, "--device-memory", "1kB"], "--device-memory"),
    ):
        failed = CliRunner().invoke(cli.app, wrong)
        assert isinstance(failed.exception, pkt.PktError)
        assert message in str(failed.exception)


def test_nothing_is_left_when_nothing_was_finished(case: Case, tmp_path: Path) -> None:
    def tick(now: Any) -> None:
        raise StopError

    begin = time.time()
    with pytest.raises(StopError):
        transfer(case, tmp_path / "out", on_tick=tick)
    assert list(tmp_path.iterdir()) == []
    assert time.time() >= begin
