"""Results appear whole or not at all, where a link leads, and a killed writer's scratch does not stay."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pkt
from pkt.files import MANIFEST, atomic_file, atomic_folder, check_output_file, check_output_folder

WRITER = """
import sys, time
from pkt.files import atomic_{0}
with atomic_{0}(sys.argv[1]) as scratch:
    (scratch / "half" if "{0}" == "folder" else scratch).write_text("half")
    print("ready", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def writer(kind: str, out: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process in the middle of writing `out`."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER.format(kind), str(out)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def hidden(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_scratch_of_a_killed_writer_goes_with_the_next_one(tmp_path: Path, kind: str, how: signal.Signals) -> None:
    with writer(kind, tmp_path / "killed") as process:
        process.send_signal(how)
        process.wait()
    assert len(hidden(tmp_path)) == 1
    with atomic_folder(tmp_path / "other") as scratch:
        (scratch / "whole").write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


def test_the_scratch_of_a_living_writer_stays(tmp_path: Path) -> None:
    with writer("folder", tmp_path / "living"):
        mine = hidden(tmp_path)
        with atomic_file(tmp_path / "other") as scratch:
            scratch.write_text("whole")
        assert hidden(tmp_path) == mine
        assert (tmp_path / mine[0] / "made" / "half").is_file()


def test_what_a_user_keeps_hidden_is_left_alone(tmp_path: Path) -> None:
    for name in (".out.12345678", ".pkt-notes", ".pkt-12345678"):
        (tmp_path / name).mkdir()
    (tmp_path / ".pkt-abcdefgh").write_text("a file")
    (tmp_path / ".pkt-linklink").symlink_to(tmp_path / ".pkt-notes")
    with atomic_folder(tmp_path / "out"):
        pass
    assert hidden(tmp_path) == [".out.12345678", ".pkt-abcdefgh", ".pkt-linklink", ".pkt-notes"]


def test_a_result_that_was_being_replaced_comes_back(tmp_path: Path) -> None:
    old = tmp_path / ".pkt-abcdefgh" / "old" / "out"
    old.mkdir(parents=True)
    (old / MANIFEST).write_text("{}")
    with pytest.raises(pkt.PktError, match="already holds a result"), atomic_folder(tmp_path / "out"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_replacement_that_fails_leaves_the_old_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    out, replace = tmp_path / "out", os.replace
    with atomic_folder(out) as scratch:
        (scratch / MANIFEST).write_text("{}")

    def failing(source: Any, target: Any) -> None:
        if Path(source).name == "made":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(pkt.PktError, match="free some space"), atomic_folder(out, force=True):
        pass
    assert [p.name for p in tmp_path.rglob("*")] == ["out", MANIFEST]


@pytest.mark.parametrize("there", [True, False])
def test_links_are_followed_and_stay(tmp_path: Path, there: bool) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if there:
        (disk / "folder").mkdir()
    (tmp_path / "folder").symlink_to(disk / "folder")
    (tmp_path / "file").symlink_to(disk / "file")
    with atomic_folder(tmp_path / "folder") as scratch:
        assert disk in scratch.parents
        (scratch / MANIFEST).write_text("{}")
    with atomic_file(tmp_path / "file") as scratch:
        scratch.write_text("whole")
    assert (tmp_path / "folder").is_symlink()
    assert (tmp_path / "file").is_symlink()
    assert (disk / "folder" / MANIFEST).is_file()
    assert (disk / "file").read_text() == "whole"
    assert not hidden(tmp_path) + hidden(disk)


@pytest.mark.parametrize("check", [check_output_folder, lambda out: check_output_file(out, "pkt-plan")])
def test_an_output_that_cannot_be_is_refused(tmp_path: Path, check: Any) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for out, why in (
        ("file", "is a file|something else"),
        ("file/below", "cannot be created"),
        ("x" * 300, "File name too long"),
        ("loop", "leads back to itself"),
    ):
        with pytest.raises(pkt.PktError, match=why):
            check(tmp_path / out)
    with pytest.raises(pkt.PktError, match=r"is a file|something else"):
        check(Path("/dev/null"))


def test_only_files_of_the_same_command_are_replaced(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text('{"format": "pkt-plan-2"}')
    with pytest.raises(pkt.PktError, match="is there already"):
        check_output_file(plan, "pkt-plan")
    check_output_file(plan, "pkt-plan", force=True)
    for content in ("{}", "[1]", "\x00\x01", "<!doctype html><title>mine</title>"):
        plan.write_text(content)
        for form in ("pkt-plan", "pkt-sensitivity", "<!"):
            with pytest.raises(pkt.PktError, match="something else"):
                check_output_file(plan, form, force=True)
