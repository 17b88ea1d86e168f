"""A chat template that prints the date is told the day on which the run began: the same command goes on after midnight."""

from __future__ import annotations

import copy
import datetime
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo
from commands import run as cli
from conftest import ASSETS, save

import pkt
from pkt.files import MANIFEST
from pkt.lora import finalize
from pkt.manifest import recorded_day
from pkt.models import load_tokenizer
from pkt.streaming import Forward
from pkt.training import run as training
from pkt.transferring import extractor
from pkt.transplanting import run as transplanting

FIRST, NEXT = datetime.date(2026, 1, 1), datetime.date(2026, 1, 2)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """clock.day is today."""
    found = SimpleNamespace(day=FIRST)

    class Date(datetime.date):
        @classmethod
        def today(cls) -> Any:
            return found.day

    monkeypatch.setattr("pkt.seeds.datetime", SimpleNamespace(date=Date))
    return found


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    found = load_tokenizer(ASSETS / "teacher")
    found.chat_template = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\\n' }}" + found.chat_template
    return found


@pytest.fixture
def teacher(tmp_path: Path, tokenizer: Any) -> Path:
    return save(zoo.llama(hidden=32, layers=3, vocab=len(tokenizer)), tmp_path / "teacher", tokenizer)


@pytest.fixture
def student(tmp_path: Path, tokenizer: Any) -> Path:
    return save(zoo.llama(hidden=24, layers=2, ffn=40, vocab=len(tokenizer)), tmp_path / "student", tokenizer)


@pytest.fixture
def seeds(tmp_path: Path) -> Path:
    lines = (ASSETS / "data" / "seeds.jsonl").read_text().splitlines()[:4]
    (tmp_path / "seeds.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "seeds.jsonl"


def stopped_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: int) -> None:
    """The function is interrupted at one of its calls, and runs as ever afterwards."""
    plain, count = getattr(owner, name), [0]

    def once(*args: Any, **options: Any) -> Any:
        count[0] += 1
        if count[0] == calls:
            raise KeyboardInterrupt
        return plain(*args, **options)

    monkeypatch.setattr(owner, name, once)


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_a_transfer_goes_on_and_is_found_finished_on_the_next_day(
    clock: Any, teacher: Path, student: Path, seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def transfer(out: str, **options: Any) -> Any:
        return pkt.transfer(teacher, student, seeds, out=tmp_path / out, rank=2, progress=False, **options)

    whole = transfer("whole")
    assert whole.provenance["seeds"]["today"] == "2026-01-01"
    stopped_once(monkeypatch, extractor.Extractor, "take", 3)
    with pytest.raises(KeyboardInterrupt):
        transfer("parts")
    clock.day = NEXT
    transfer("parts")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert transfer("parts").provenance["seeds"]["today"] == "2026-01-01"
    with pytest.raises(pkt.PktError, match="already holds a result"):
        transfer("parts", resume=False)
    assert transfer("parts", force=True).provenance["seeds"]["today"] == "2026-01-02"
    two = {"a": seeds, "b": seeds}
    found = pkt.transfer(teacher, student, two, out=tmp_path / "two", rank=2, progress=False)
    clock.day = FIRST
    again = pkt.transfer(teacher, student, two, out=tmp_path / "two", rank=2, progress=False)
    assert again["b"].provenance["seeds"] == found["b"].provenance["seeds"]


def test_training_goes_on_and_evaluation_reads_the_days_rows(
    clock: Any, teacher: Path, student: Path, seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pkt.training.finite import FiniteTrainer

    pkt.transfer(teacher, student, seeds, out=tmp_path / "ext", rank=2, progress=False)

    def train(out: str) -> Any:
        options: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "batch_size": 2, "lr": 1e-3, "quietly": True}
        return training.train(student, tmp_path / "ext", seeds, tmp_path / out, **options)

    train("whole")
    stopped_once(monkeypatch, FiniteTrainer, "training_step", 4)
    with pytest.raises(KeyboardInterrupt):
        train("parts")
    clock.day = NEXT
    train("parts")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    with pytest.raises(pkt.PktError, match="is a finished run"):
        train("parts")
    finalize(tmp_path / "parts", tmp_path / "adapter", check=False)
    for folder in ("parts", "adapter"):
        assert recorded_day(tmp_path / folder / MANIFEST) == FIRST
        told = cli("evaluate", student, seeds, "--adapter", tmp_path / folder, "--json")
        assert json.loads(told.splitlines()[-1])["today"] == "2026-01-01"
    assert json.loads(cli("evaluate", student, seeds, "--json").splitlines()[-1])["today"] == "2026-01-02"


def test_a_transplant_goes_on_the_next_day(
    clock: Any, teacher: Path, seeds: Path, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = copy.deepcopy(zoo.llama(hidden=32, layers=3, vocab=len(tokenizer)))
    torch.manual_seed(1)
    for parameter in tuned.parameters():
        parameter.data.add_(0.01 * torch.randn_like(parameter))
    save(tuned, tmp_path / "tuned", tokenizer)

    def transplant(out: str) -> Any:
        options: dict[str, Any] = {"base": teacher, "rank": 2, "anyway": True, "progress": False}
        return pkt.transplant(tmp_path / "tuned", teacher, seeds, out=tmp_path / out, **options)

    transplant("whole")
    stopped_once(monkeypatch, transplanting, "best_scale", 1)
    with pytest.raises(KeyboardInterrupt):
        transplant("parts")
    clock.day = NEXT
    start = transplant("parts")
    assert start.provenance["seeds"]["today"] == "2026-01-01"
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"today": 3}', '{"today": "yesterday"}', '{"settings": []}'])
def test_a_record_without_a_day_tells_none(text: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(text)
    assert recorded_day(tmp_path / MANIFEST) is None
    assert recorded_day(tmp_path / "none.json") is None


def test_rows_without_a_date_record_none(seeds: Path) -> None:
    assert "today" not in pkt.load_seeds(seeds, load_tokenizer(ASSETS / "teacher")).describe()


def test_rows_are_read_as_on_the_day_that_the_teachers_targets_are_of(
    teacher: Path, student: Path, seeds: Path, clock: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pkt.streaming.passes.PASS_TOKENS", {"cpu": 60})
    calm = pkt.teach(teacher, seeds, out=tmp_path / "calm", progress=False)
    stopped_once(monkeypatch, Forward, "run", 2)
    with pytest.raises(KeyboardInterrupt):
        pkt.teach(teacher, seeds, out=tmp_path / "targets", progress=False)
    clock.day = NEXT
    again = pkt.teach(teacher, seeds, out=tmp_path / "targets", progress=False)
    assert all(torch.equal(calm.tensors[name], again.tensors[name]) for name in calm.tensors)
    assert recorded_day(tmp_path / "targets" / MANIFEST) == FIRST
    options: Any = {
        "teacher_targets": tmp_path / "targets",
        "mix": 0.5,
        "max_steps": 1,
        "batch_size": 4,
        "quietly": True,
    }
    training.train(student, None, seeds, tmp_path / "run", **options)
    assert json.loads((tmp_path / "run" / MANIFEST).read_text())["settings"]["today"] == FIRST.isoformat()
