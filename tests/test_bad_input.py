"""Inputs that a newcomer tried and that stopped torch, safetensors or transformers instead of pkt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from conftest import save

import pkt
from pkt.models import Model, load_tokenizer, spec_of


@pytest.fixture(scope="module")
def scored(teacher_dir: Path, seed_file: Path, tokenizer: Any) -> Any:
    from pkt.models import load_model
    from pkt.scoring import score_seeds

    return score_seeds(load_model(teacher_dir), pkt.load_seeds(seed_file, tokenizer, limit=2), progress=False)


def test_scores_and_plans_of_another_teacher(
    scored: Any, teacher_dir: Path, student_dir: Path, tmp_path: Path, tokenizer: Any
) -> None:
    made = pkt.plan(scored, teacher_dir, student_dir)
    with pytest.raises(
        pkt.PktError, match=r"the plan was made from another model .* num_layers: 4 there, 2 here, shapes changed"
    ):
        pkt.extract(student_dir, made, rank=4, progress=False)
    other = oracle.llama(hidden=48, layers=4, heads=6, kv=3, ffn=96, vocab=len(tokenizer) // 2)
    with pytest.raises(pkt.PktError, match=r"the scores was made|the scores were made|another model .* vocab_size"):
        pkt.plan(scored, save(other, tmp_path / "other", tokenizer), student_dir)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 5}, "layers=5: give one of"),
        ({"layers": [0.5, 1]}, "a list of the teacher's layers"),
        ({"layer_map": {0: 1, 1: 2}}, "a list of the teacher's layers"),
        ({"seed": 2**64}, "seed=.* must be a whole number"),
        ({"modules": ["q"]}, "must be a string"),
    ],
)
def test_options_of_a_plan(scored: Any, teacher_dir: Path, student_dir: Path, options: Any, message: str) -> None:
    with pytest.raises(pkt.PktError, match=message):
        pkt.plan(scored, teacher_dir, student_dir, **options)


def test_one_layer_may_feed_several(teacher_dir: Path, student_dir: Path, seed_file: Path, tmp_path: Path) -> None:
    ext = pkt.transfer(teacher_dir, student_dir, seed_file, out=tmp_path / "out", layers=[1, 1], rank=2, progress=False)
    assert ext.plan.layer_map == [1, 1]
    pkt.Extraction.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float32"}, "is not a torch.dtype"),
        ({"device": "nonsense"}, "is not a device"),
        ({"device": "meta"}, "pkt runs on cpu and cuda"),
        ({"rank": 4.5}, "must be whole numbers"),
        ({"scratch": "/proc/nope"}, "making the folder /proc/nope"),
        ({"host_memory": "1KB", "device_memory": "1GB"}, "allow more with --host-memory"),
    ],
)
def test_options_of_a_transfer(
    teacher_dir: Path, student_dir: Path, seed_file: Path, tmp_path: Path, options: Any, message: str
) -> None:
    with pytest.raises(pkt.PktError, match=message):
        pkt.transfer(teacher_dir, student_dir, seed_file, out=tmp_path / "out", progress=False, **options)
    assert list(tmp_path.iterdir()) == []


def test_tokenizers_that_number_tokens_differently(
    teacher_dir: Path, student_dir: Path, seed_file: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(student_dir, tmp_path / "student"))
    file = other / "tokenizer.json"
    value = json.loads(file.read_text())
    vocab = value["model"]["vocab"]
    names = [n for n in vocab if n.isalpha()][:2]
    vocab[names[0]], vocab[names[1]] = vocab[names[1]], vocab[names[0]]
    file.write_text(json.dumps(value))
    plain, swapped = (pkt.transfer(teacher_dir, s, seed_file, rank=2, progress=False) for s in (student_dir, other))
    assert not any("other ids" in note for note in plain.plan.notes)
    assert any("gives 2 tokens other ids" in note for note in swapped.plan.notes)


@pytest.mark.parametrize(
    ("file", "value", "message"),
    [
        ("config.json", {"hidden_size": "big"}, "not a model transformers can read|no model can be built"),
        ("config.json", {"num_attention_heads": 0}, "not a model transformers can read|no model can be built"),
        ("model.safetensors.index.json", [], "does not say which file holds which weight"),
        ("model.safetensors.index.json", {}, "does not say which file holds which weight"),
    ],
)
def test_damaged_model_folders(
    teacher_dir: Path, student_dir: Path, seed_file: Path, tmp_path: Path, file: str, value: Any, message: str
) -> None:
    folder = Path(shutil.copytree(teacher_dir, tmp_path / "teacher"))
    if file == "config.json":
        value = json.loads((folder / file).read_text()) | value
    else:
        (folder / "model.safetensors").unlink()
    (folder / file).write_text(json.dumps(value))
    with pytest.raises(pkt.PktError, match=message):
        pkt.transfer(folder, student_dir, seed_file, progress=False)


def test_a_folder_that_is_not_there_and_no_hub() -> None:
    for name in ("models/techer", "owner/nope"):
        with pytest.raises(pkt.PktError, match="there is no such folder here, and the Hub does not give it either"):
            Model.of(name).config  # noqa: B018
        with pytest.raises(pkt.PktError, match=name):
            load_tokenizer(name)


def test_a_damaged_record_of_a_run_keeps_what_is_finished(
    teacher_dir: Path, student_dir: Path, seed_file: Path, tmp_path: Path
) -> None:
    def stop(tick: Any) -> None:
        if tick.phase == "backward":
            raise KeyboardInterrupt

    arguments: Any = (teacher_dir, student_dir, seed_file)
    with pytest.raises(KeyboardInterrupt):
        pkt.transfer(*arguments, out=tmp_path / "out", rank=2, progress=False, on_tick=stop)
    run = tmp_path / ".out.run"
    steps = sorted(p.name for p in run.glob("step-*"))
    assert steps
    (run / "run.json").write_text("{oops")
    with pytest.raises(pkt.PktError, match="start over with --force, or delete"):
        pkt.transfer(*arguments, out=tmp_path / "out", rank=2, progress=False)
    assert sorted(p.name for p in run.glob("step-*")) == steps


def test_a_meta_model_has_a_spec_but_no_weights() -> None:
    model = oracle.llama().to("meta")
    assert spec_of(model).num_layers
    with pytest.raises(pkt.PktError, match="meta"):
        pkt.sensitivity(model, [{"input_ids": torch.ones(1, 3, dtype=torch.int64), "labels": torch.ones(1, 3)}])
