"""A transplant killed while it cuts goes on to the same bytes; streamed from files it is what it is in memory."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from descent import cut, drawn, noisy
from oracle import seeds

import pkt
from pkt.models import load_model
from pkt.transplanting import run

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["transformers.models.llama.modeling_llama", "pkt.transplanting", "oracle"])
MODELS = ("base", "teacher", "student")


def transplant(given: dict[str, Any], **options: Any) -> pkt.Start:
    return pkt.transplant(
        given["teacher"], given["student"], seeds(), base=given["base"], rank=4, anyway=True, progress=False, **options
    )


def work(folder: Path, out: str, hold: int, tell: Any) -> None:
    """A transplant in a process of its own: tells of every part that it begins, and waits in one for what will end it."""
    torch.set_num_threads(1)
    plain, begun = run.pairs_of, []

    def pairs_of(*args: Any) -> Any:
        begun.append(1)
        tell.send(len(begun))
        if len(begun) == hold:
            time.sleep(600)
        return plain(*args)

    run.pairs_of = pairs_of
    transplant({name: folder / name for name in MODELS}, out=folder / out)


def begin(folder: Path, out: str, hold: int = 0) -> tuple[Any, Any]:
    ear, tell = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=work, args=(folder, out, hold, tell), daemon=True)
    process.start()
    tell.close()
    return process, ear


def parts(process: Any, ear: Any) -> int:
    """How many parts it began by its end."""
    last = 0
    with contextlib.suppress(EOFError):
        while True:
            last = ear.recv()
    process.join()
    assert process.exitcode == 0
    return last


@pytest.fixture(scope="module")
def kin(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("transplants")
    base = zoo.trained_like("llama", vocab_size=67)
    models = {"base": base, "teacher": noisy(base, 0.2), "student": noisy(cut(base, drawn(base)), 0.2, seed=2)}
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return folder, models


def test_a_killed_transplant_goes_on_to_the_same_bytes(kin: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = kin
    read = lambda out: {p.name: p.read_bytes() for p in (folder / out).iterdir()}  # noqa: E731
    assert parts(*begin(folder, "calm")) == 4  # the tables and three layers
    process, ear = begin(folder, "killed", hold=3)
    while ear.recv() != 3:
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (folder / "killed").exists()
    assert parts(*begin(folder, "killed")) == 2  # those that were whole are not made again
    assert read("killed") == read("calm")
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_streamed_is_in_memory(kin: tuple[Path, dict[str, Any]]) -> None:
    folder, models = kin
    streamed, whole = transplant({name: folder / name for name in MODELS}), transplant(models)
    assert streamed.provenance["alpha"] == whole.provenance["alpha"]
    assert set(streamed.pairs) == set(whole.pairs)
    for name, pair in whole.pairs.items():
        assert torch.equal(streamed.pairs[name].A, pair.A), name
        assert torch.equal(streamed.pairs[name].B, pair.B), name


def test_an_adapter_is_its_delta_at_full_rank(kin: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """A LoRA on every linear layer of the base, cut, and the merged teacher's delta: to 1e-5 of each change."""
    from peft import LoraConfig, get_peft_model

    folder, _ = kin
    torch.manual_seed(1)
    wrapped = get_peft_model(
        load_model(folder / "base", dtype=torch.float32), LoraConfig(r=4, target_modules="all-linear")
    )
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.05)
    wrapped.save_pretrained(tmp_path / "lora")
    wrapped.merge_and_unload().save_pretrained(tmp_path / "tuned")
    options = {"rank": 64, "alpha": 1.0, "anyway": True, "progress": False}
    by_base = pkt.transplant(tmp_path / "tuned", folder / "student", seeds(), base=folder / "base", **options)
    by_lora = pkt.transplant(folder / "base", folder / "student", seeds(), adapter=tmp_path / "lora", **options)
    assert set(by_base.pairs) == set(by_lora.pairs)
    for name, pair in by_base.pairs.items():
        assert (by_lora.pairs[name].delta() - pair.delta()).norm() <= 1e-5 * pair.delta().norm(), name
