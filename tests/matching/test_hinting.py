"""The cheap question whether a student descends: yes for descendants, never for strangers, and from few bytes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from commands import run
from conftest import ASSETS, save
from transformers import AutoModelForCausalLM

from pkt.matching import Matrices, looks_kin
from pkt.matching.shrinking import Shape, choose_units, shrink_to
from pkt.models import Model

SHAPE = Shape(hidden=40, neurons=48, groups=2, layers=3)


def descendant(teacher: Any, noise: float = 0.3) -> Any:
    scores = {name: p.detach().abs() for name, p in teacher.named_parameters()}
    student = shrink_to(teacher, choose_units(Matrices(teacher), scores, SHAPE))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(noise * p.std() * torch.randn_like(p) if p.ndim > 1 else 0)
    return student


def test_the_demos_students() -> None:
    found = looks_kin(ASSETS / "teacher", ASSETS / "descendant")
    assert found is not None
    assert found.closeness > 0.5
    assert looks_kin(ASSETS / "teacher", ASSETS / "student") is None


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_descendant_looks_like_one(kind: str) -> None:
    teacher = zoo.trained_like(kind)
    assert looks_kin(teacher, descendant(teacher)) is not None
    assert looks_kin(teacher, copy.deepcopy(teacher)) is not None


def test_no_stranger_does() -> None:
    """Trained apart, from the teacher's seed at another shape, or with a table of the teacher's alone."""
    teacher = zoo.trained_like("llama")
    config = transformers.LlamaConfig(
        vocab_size=400, hidden_size=40, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    assert config.vocab_size == teacher.config.vocab_size
    for seed in range(12):
        torch.manual_seed(seed)
        student = AutoModelForCausalLM.from_config(config).float()
        if seed % 2:
            student.model.embed_tokens.weight.data = teacher.model.embed_tokens.weight.data[:, 8:48].clone()
        assert looks_kin(teacher, student) is None


def test_what_it_is_not_asked_of(tmp_path: Path, tokenizer: Any) -> None:
    teacher = zoo.trained_like("llama")
    assert looks_kin(teacher, zoo.gpt2(vocab=400)) is None
    assert looks_kin(teacher, zoo.llama(vocab=401)) is None
    save(teacher, tmp_path / "pickle", tokenizer)
    state = teacher.state_dict()
    (tmp_path / "pickle" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pickle" / "pytorch_model.bin")
    assert looks_kin(tmp_path / "pickle", teacher) is None


def test_it_reads_little(monkeypatch: pytest.MonkeyPatch) -> None:
    whole: list[str] = []
    plain = Model.tensor

    def tensor(self: Model, name: str) -> Any:
        whole.append(name)
        return plain(self, name)

    monkeypatch.setattr(Model, "tensor", tensor)
    looks_kin(ASSETS / "teacher", ASSETS / "descendant")
    matrices = {name for name in whole if "norm" not in name}
    assert matrices == {f"model.layers.{i}.mlp.{role}_proj.weight" for i in (0, 4) for role in ("gate", "up")}


def test_rows_are_those_of_the_tensor() -> None:
    model = Model.of(ASSETS / "teacher")
    table = model.tensor("lm_head.weight")
    for count in (1, 7, 512, 600):
        assert torch.equal(model.rows("lm_head.weight", count), table[:count])
        assert torch.equal(Model.of(model.load()).rows("lm_head.weight", count), table[:count])


def test_transfer_says_so(tmp_path: Path, tokenizer: Any) -> None:
    teacher = zoo.llama(hidden=64, layers=4, heads=8, kv=4, ffn=96, vocab=len(tokenizer))
    save(teacher, tmp_path / "teacher", tokenizer)
    save(descendant(teacher), tmp_path / "kin", tokenizer)
    torch.manual_seed(9)
    save(AutoModelForCausalLM.from_config(descendant(teacher).config).float(), tmp_path / "stranger", tokenizer)
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text("".join((ASSETS / "data" / "seeds.jsonl").read_text().splitlines(True)[:2]))
    for name in ("kin", "stranger"):
        told = run(
            "transfer", tmp_path / "teacher", tmp_path / name, seeds, "--rank", 2, "--out", tmp_path / f"{name}-ext"
        )
        assert (f"pkt transplant {tmp_path / 'teacher'} {tmp_path / name} {seeds} --base BASE" in told) == (
            name == "kin"
        )
