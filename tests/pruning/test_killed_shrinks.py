"""A shrink that is killed begins again cleanly and ends with the same bytes; a full disk loses nothing that is there."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from conftest import save
from oracle import seeds

import pkt
from pkt.pruning import run

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["transformers.models.llama.modeling_llama", "pkt.pruning", "oracle"])


def shrink(folder: Path, out: str, **options: Any) -> None:
    small = pkt.models.Model.of(folder / "teacher").config
    small.update({"hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 3})
    pkt.shrink(folder / "teacher", seeds(6), like=small, out=folder / out, batch_size=2, progress=False, **options)


def work(folder: Path, out: str, where: str, tell: Any) -> None:
    """A shrink in a process of its own that waits, in the named function, for what will end it."""
    torch.set_num_threads(1)
    plain = getattr(run, where) if where else None

    def held(*args: Any, **options: Any) -> Any:
        found = plain(*args, **options)  # type: ignore[misc]
        tell.send(where)
        time.sleep(600)
        return found

    if where:
        setattr(run, where, held)
    shrink(folder, out)


def begin(folder: Path, out: str, where: str = "") -> tuple[Any, Any]:
    ear, tell = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=work, args=(folder, out, where, tell), daemon=True)
    process.start()
    tell.close()
    return process, ear


def files(folder: Path) -> dict[str, bytes]:
    """Of each file its bytes; the output's own name, which the records hold, is the same word everywhere."""
    return {p.name: p.read_bytes().replace(str(folder).encode(), b"OUT") for p in folder.iterdir()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    at: Path = tmp_path_factory.mktemp("shrinks")
    save(zoo.trained_like("llama", vocab_size=len(tokenizer)), at / "teacher", tokenizer)
    process, _ = begin(at, "calm")
    process.join()
    assert process.exitcode == 0
    return at


@pytest.mark.parametrize("where", ["read_scores", "shrink_to", "save_model"])
def test_a_killed_shrink_ends_with_the_same_bytes(folder: Path, where: str) -> None:
    process, ear = begin(folder, where, where)
    assert ear.recv() == where
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (folder / where).exists()
    again, _ = begin(folder, where)
    again.join()
    assert again.exitcode == 0
    assert files(folder / where) == files(folder / "calm")
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_a_full_disk_loses_nothing_that_is_there(folder: Path) -> None:
    shrink(folder, "there")
    there = files(folder / "there")
    before, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        for out, options in (("there", {"force": True}), ("new", {})):
            with pytest.raises(pkt.PktError, match="limit") as caught:
                shrink(folder, out, **options)
            assert "\n" not in str(caught.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert files(folder / "there") == there
    assert not (folder / "new").exists()
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]
    shrink(folder, "new")
    assert files(folder / "new") == files(folder / "there")
