"""Folders as the method's authors' released code writes them are imported, injected, trained and finalized."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import commands
import lifecycle
import pytest
import torch
import zoo
from torch import Tensor

import pkt
from pkt.extraction import import_released
from pkt.lora import load_with_adapter
from pkt.models import load_model

RANK = 4
CONFIG = {
    "base_model_name_or_path": "meta-llama/Llama-2-7b-hf",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 16,
    "target_modules": ["q_proj", "down_proj", "embed_tokens", "lm_head"],
    "task_type": "CAUSAL_LM",
}


def written(folder: Path, state: dict[str, Tensor]) -> Path:
    folder.mkdir()
    torch.save(state, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def student(tmp_path: Path) -> Path:
    zoo.llama().save_pretrained(tmp_path / "student")
    return tmp_path / "student"


@pytest.fixture
def state(student: Path) -> dict[str, Tensor]:
    """UΣ and Vᵀ in fp16, under PEFT's names: an embedding is decomposed as [d, vocabulary]."""
    torch.manual_seed(0)
    found = {}
    for name, weight in load_model(student).named_parameters():
        if not any(part in name for part in ("q_proj", "down_proj", "embed_tokens", "lm_head")):
            continue
        table = "embed_tokens" in name
        region = torch.randn(weight.shape[::-1] if table else weight.shape)
        u, s, vh = torch.linalg.svd(region)
        stem = "base_model.model." + name.removesuffix(".weight")
        key = f"{stem}.lora_embedding_{{}}" if table else f"{stem}.lora_{{}}.weight"
        found[key.format("A")] = vh[:RANK].half()
        found[key.format("B")] = (u[:, :RANK] * s[:RANK]).half()
    return found


def negated(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: -t if "lora_A" in k or "lora_embedding_A" in k else t for k, t in state.items()}


def test_a_released_folder_goes_full_circle(tmp_path: Path, student: Path, state: dict[str, Tensor]) -> None:
    folder = written(tmp_path / "13b-to-7b-gsm", state)
    written(tmp_path / "13b-to-7b-gsm-delta", negated(state))
    start = import_released(folder, tmp_path / "start", student=student)
    for module, pair in start.pairs.items():
        stem = f"base_model.model.{module}."
        names = (
            ("lora_embedding_A", "lora_embedding_B") if pair.kind == "embedding" else ("lora_A.weight", "lora_B.weight")
        )
        a, b = (state[stem + name].float() for name in names)
        assert torch.equal(pair.B @ pair.A, b @ a), module  # the copied r and alpha do not scale it
    before = lifecycle.logits(load_model(student))
    model = pkt.inject(student, tmp_path / "start")
    assert float((lifecycle.logits(model) - before).abs().max()) <= 1e-5 * float(before.abs().max())
    losses = lifecycle.steps(model, 3)
    assert losses[-1] < losses[0]
    pkt.finalize(model, tmp_path / "adapter", student=student)
    final = lifecycle.logits(load_with_adapter(student, tmp_path / "adapter"))
    assert float((final - lifecycle.logits(model)).abs().max()) <= 1e-3 * float(final.abs().max())


def test_the_command(tmp_path: Path, student: Path, state: dict[str, Tensor]) -> None:
    folder, out = written(tmp_path / "lora", state), tmp_path / "start"
    said = commands.run("import", folder, "--out", out, "--student", student)
    assert "8 pairs of rank up to 4, neutral" in " ".join(said.split())
    assert "already holds a result" in commands.fails("import", folder, "--out", out, "--student", student)


@pytest.mark.parametrize("named", ["lora-delta", "begun"])
def test_a_trained_folder_with_what_it_was_trained_from(
    tmp_path: Path, student: Path, state: dict[str, Tensor], named: str
) -> None:
    """Their trained student is (W − B₀A₀) + BA: two merges of theirs, one LoRA here."""
    torch.manual_seed(1)
    trained = {k: (t + 0.3 * t.float().std() * torch.randn(t.shape)).half() for k, t in state.items()}
    extra = "base_model.model.model.layers.0.self_attn.k_proj.lora_{}.weight"
    rows, cols = load_model(student).model.layers[0].self_attn.k_proj.weight.shape
    trained |= {extra.format("A"): torch.randn(RANK, cols).half(), extra.format("B"): torch.randn(rows, RANK).half()}
    folder, out = written(tmp_path / "lora", trained), tmp_path / "out"
    written(tmp_path / "begun", state)
    written(tmp_path / "lora-delta", negated(state))
    told = commands.fails("import", folder, "--out", out, "--student", student)
    assert f"--trained-from {tmp_path / 'lora-delta'}" in told
    said = commands.run("import", folder, "--out", out, "--student", student, "--trained-from", tmp_path / named)
    assert "kept: the student is changed" in " ".join(said.split())
    theirs = load_model(student)
    for name, weight in theirs.named_parameters():
        stem = "base_model.model." + name.removesuffix(".weight")
        for factors, sign in ((trained, 1), (state, -1)):
            if f"{stem}.lora_A.weight" in factors:
                change = factors[f"{stem}.lora_B.weight"].float() @ factors[f"{stem}.lora_A.weight"].float()
            elif f"{stem}.lora_embedding_A" in factors:
                change = (factors[f"{stem}.lora_embedding_B"].float() @ factors[f"{stem}.lora_embedding_A"].float()).t()
            else:
                continue
            weight.data += sign * change
    wanted, found = lifecycle.logits(theirs), lifecycle.logits(load_with_adapter(student, out))
    assert float((found - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())
    torch.save({k: t for k, t in trained.items() if "lm_head" not in k}, folder / "adapter_model.bin")
    with pytest.raises(pkt.PktError, match=r"begun holds lm_head, which was not trained"):
        import_released(folder, tmp_path / "o2", student=student, trained_from=tmp_path / "begun")


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/pkt-evil"),))


def test_what_is_no_released_folder_is_refused(tmp_path: Path, student: Path, state: dict[str, Tensor]) -> None:
    folder, out = written(tmp_path / "lora", state), tmp_path / "out"
    twin = written(tmp_path / "lora-delta", negated(state))
    with pytest.raises(pkt.PktError, match=r"negated factors of .*lora; import that one"):
        import_released(twin, out, student=student)
    with pytest.raises(pkt.PktError, match=r"Llama-2-7b-hf, which is not here; name it \(--student"):
        import_released(folder, out)
    torch.save(state, twin / "adapter_model.bin")
    with pytest.raises(pkt.PktError, match="does not negate the factors"):
        import_released(folder, out, student=student)
    (twin / "adapter_model.bin").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(pkt.PktError, match="cannot be loaded safely"):
        import_released(folder, out, student=student)
    torch.save([1], folder / "adapter_model.bin")
    with pytest.raises(pkt.PktError, match="does not hold an adapter's tensors"):
        import_released(folder, out, student=student)
    zoo.llama(hidden=32).save_pretrained(tmp_path / "other")
    torch.save(state, folder / "adapter_model.bin")
    with pytest.raises(pkt.PktError, match="does not fit"):
        import_released(folder, out, student=tmp_path / "other")
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(pkt.PktError, match=r"has no adapter_model\.bin"):
        import_released(folder, out, student=student)
    assert not out.exists()
