"""Folders that an older pkt wrote still load, or are refused in one line that says what to do (tests/data/old tells which)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run

import pkt
from pkt.adapters import read_adapter
from pkt.models import load_model, load_tokenizer

OLD = Path(__file__).parent / "data" / "old"
TRANSFER: dict[str, Any] = {"rank": 2, "modules": "attention,-v", "batch_size": 2, "progress": False}
IDS = torch.tensor([[13, 14, 4, 11, 5, 15]])


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folders, named as they were then, with a teacher of the same shapes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    config = json.loads(Path("student/config.json").read_text(encoding="utf-8"))
    wider = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    wider |= {"num_key_value_heads": 2, "head_dim": 8}
    LlamaForCausalLM(LlamaConfig(**{**config, **wider})).save_pretrained("teacher")
    load_tokenizer("student").save_pretrained("teacher")
    return tmp_path


def test_an_extraction(old: Path) -> None:
    ext = pkt.Extraction.load("extraction")
    assert (len(ext.pairs), ext.rank, ext.plan.layer_map) == (3, 2, [0])
    said = " ".join(run("inspect", "extraction", "--student", "student").split())
    assert "an extraction: the start of a student's LoRA" in said
    assert "yes: every module has its place in student" in said
    student = load_model("student")
    logits = student(IDS).logits
    model = pkt.inject(student, ext)
    torch.testing.assert_close(model(IDS).logits, logits, atol=1e-5, rtol=1e-5)
    pkt.finalize(model, "plain", student="student")
    assert set(read_adapter(Path("plain"))[0].pairs) == set(ext.pairs)


def test_a_transfer_that_was_finished_is_taken_as_it_is(old: Path) -> None:
    before = {path.name: path.read_bytes() for path in Path("extraction").iterdir()}
    found = pkt.transfer("teacher", "student", "data.jsonl", out="extraction", **TRANSFER)
    assert found.plan == pkt.Extraction.load("extraction").plan
    assert before == {path.name: path.read_bytes() for path in Path("extraction").iterdir()}
    with pytest.raises(pkt.PktError, match="rank: 2 there, 3 here"):
        pkt.transfer("teacher", "student", "data.jsonl", out="extraction", **{**TRANSFER, "rank": 3})


def test_an_unfinished_transfer_is_refused_and_begun_again(old: Path) -> None:
    Path("unfinished").rename(".ext.run")
    assert "an unfinished transfer: 1 of 4 parts" in run("inspect", "ext")
    with pytest.raises(pkt.PktError, match=r"unfinished run of other inputs .*teacher's weights changed.*--force$"):
        pkt.transfer("teacher", "student", "data.jsonl", out="ext", **TRANSFER)
    assert len(list(Path(".ext.run").glob("step-*"))) == 1
    pkt.transfer("teacher", "student", "data.jsonl", out="ext", force=True, **TRANSFER)
    assert not Path(".ext.run").exists()


def test_a_training_run_goes_on_from_its_checkpoint(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Trainer

    assert "a training run (paired, unfinished)" in run("inspect", "run")
    begun: list[str] = []
    plain = Trainer.train

    def train(self: Any, resume_from_checkpoint: Any = None, **options: Any) -> Any:
        begun.append(str(resume_from_checkpoint))
        return plain(self, resume_from_checkpoint=resume_from_checkpoint, **options)

    monkeypatch.setattr(Trainer, "train", train)
    options = ("--epochs", 2, "--batch-size", 1, "--save-steps", 2)
    run("train", "student", "extraction", "data.jsonl", "--out", "run", *options)
    assert [Path(folder).name for folder in begun] == ["checkpoint-2"]
    assert json.loads(Path("run/pkt.json").read_text(encoding="utf-8"))["finished"]
    assert json.loads(Path("run/checkpoint-8/trainer_state.json").read_text(encoding="utf-8"))["global_step"] == 8
    run("finalize", "run", "--out", "plain", "--student", "student")


def test_a_residual_run_is_finalized(old: Path) -> None:
    assert "a training run (residual, finished)" in run("inspect", "residual")
    run("finalize", "residual", "--out", "plain", "--student", "student")
    trained, initial = (read_adapter(Path(folder))[0].pairs for folder in ("residual", "residual/pkt_initial"))
    plain = read_adapter(Path("plain"))[0].pairs
    for name, pair in plain.items():
        change = trained[name].B @ trained[name].A - initial[name].B @ initial[name].A
        torch.testing.assert_close(pair.B @ pair.A, change, atol=1e-6, rtol=1e-4)
