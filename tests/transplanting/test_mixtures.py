"""A mixture's experts in a transplant: cut expert by expert, held by the LoRA, the router told of."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from descent import cut, drawn
from test_families import seeds

import pkt
from pkt.matching import lineage

EXPERTS = ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj")


def moved_a_little(model: Any, seed: int) -> Any:
    other = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return other


@pytest.fixture(scope="module")
def kin() -> dict[str, Any]:
    """A mixture, a teacher with another weight everywhere, a student of three of its four experts that went on by itself."""
    base = zoo.trained_like("mixtral", vocab_size=67)
    base.set_experts_implementation("eager")
    true = drawn(base)
    student = moved_a_little(cut(base, true), 3)
    student.set_experts_implementation("eager")
    return {"base": base, "teacher": moved_a_little(base, 2), "student": student, "true": true}


def transplant(kin: dict[str, Any], teacher: Any = None, **given: Any) -> pkt.Start:
    options = {"base": kin["base"], "rank": 64, "alpha": 1.0, "progress": False, **given}
    return pkt.transplant(teacher or kin["teacher"], kin["student"], seeds(), **options)


def test_experts_and_router_get_the_change_of_their_own(kin: dict[str, Any]) -> None:
    """The lineage is found here, not given."""
    start, true, student = transplant(kin), kin["true"], kin["student"]
    delta = {
        n: (p - kin["base"].get_parameter(n)).detach()
        for n, p in kin["teacher"].named_parameters()
        if f"layers.{true.layers[1]}.mlp" in n
    }
    gate_up, down = (next(d for n, d in delta.items() if n.endswith(name)) for name in ("gate_up_proj", "down_proj"))
    for e, theirs in enumerate(true.experts[1]):
        neurons = torch.tensor(true.neurons[1][e * 48 : (e + 1) * 48])
        rows = torch.cat([neurons, neurons + 96])
        expected = gate_up[theirs][rows][:, true.hidden], down[theirs][true.hidden][:, neurons]
        for name, wanted in zip(EXPERTS, expected, strict=True):
            assert torch.allclose(start.pairs[name].delta()[e], wanted, atol=1e-5)
    router = next(d for n, d in delta.items() if n.endswith("gate.weight"))
    left = start.provenance["left_out"]["model.layers.1.mlp.gate.weight"]
    assert left == pytest.approx(float(router[true.experts[1]][:, true.hidden].norm()), rel=1e-5)
    assert set(start.pairs) == {t.module for t in pkt.models.spec_of(student).targets}


def test_the_folder_is_a_lora_that_peft_loads(kin: dict[str, Any], tmp_path: Path) -> None:
    from pkt.lora import load_with_adapter
    from pkt.models import load_model

    kin["student"].save_pretrained(tmp_path / "student")
    start = transplant(kin, rank=4, out=tmp_path / "out", alpha=0.5)
    plain = load_model(tmp_path / "student", dtype=torch.float32)
    with torch.no_grad():
        for name, pair in start.pairs.items():
            plain.get_parameter(name if pair.experts else f"{name}.weight").add_(pair.delta())
    ids = torch.arange(2, 42)[None]
    with torch.no_grad():
        found = load_with_adapter(tmp_path / "student", tmp_path / "out")(ids).logits
        assert (found - plain(ids).logits).abs().max() <= 1e-4


def test_choosing_the_scale_leaves_the_experts_as_they_were(kin: dict[str, Any]) -> None:
    before = {n: p.detach().clone() for n, p in kin["student"].named_parameters()}
    losses = transplant(kin).provenance["losses"]
    assert len(set(losses.values())) == len(losses)
    assert all(torch.equal(p, before[n]) for n, p in kin["student"].named_parameters())


def test_a_mixtures_own_lora_is_its_delta(kin: dict[str, Any], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )  # fmt: skip
    wrapped = get_peft_model(copy.deepcopy(kin["base"]), config)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.02)
    wrapped.save_pretrained(tmp_path / "lora")
    given = {"lineage": kin["true"], "anyway": True}
    by_base = transplant(kin, teacher=wrapped.merge_and_unload(), **given)
    by_lora = transplant(kin, teacher=kin["base"], base=None, adapter=tmp_path / "lora", **given)
    assert set(by_base.pairs) == set(by_lora.pairs) >= set(EXPERTS)
    for name, pair in by_base.pairs.items():
        assert (by_lora.pairs[name].delta() - pair.delta()).norm() <= 1e-5 * pair.delta().norm(), name


def test_controls_know_experts(kin: dict[str, Any]) -> None:
    plain, noise = (transplant(kin, rank=8, control=control, anyway=True) for control in (None, "noise"))
    whole, wrong = (transplant(kin, control=control, anyway=True) for control in ("repruned", "wrong-units"))
    teacher = cut(kin["teacher"], copy.deepcopy(kin["true"]))
    for name in EXPERTS:
        ours, theirs = (torch.linalg.svdvals(s.pairs[name].delta())[:, :8] for s in (noise, plain))
        assert torch.allclose(ours, theirs, atol=1e-4)
        assert not torch.allclose(noise.pairs[name].delta(), plain.pairs[name].delta(), atol=1e-2)
        found = kin["student"].get_parameter(name) + whole.pairs[name].delta()
        assert torch.allclose(found, teacher.get_parameter(name), atol=1e-5)
        assert not torch.allclose(wrong.pairs[name].delta(), plain.pairs[name].delta(), atol=1e-2)


def test_a_dense_student_of_a_mixture_is_told() -> None:
    found = lineage(zoo.trained_like("mixtral"), zoo.trained_like("llama"), progress=False)
    assert found.verdict == "no lineage"
    assert "the teacher's FFNs are experts and the student's are not" in found.reason
    found = lineage(zoo.trained_like("llama"), zoo.trained_like("mixtral"), progress=False)
    assert "the student's FFNs are experts and the teacher's are not" in found.reason


def test_a_merged_mixture_holds_the_whole_change(kin: dict[str, Any], tmp_path: Path) -> None:
    """Routers and norms too: the student with all that the teacher learnt on its units."""
    from pkt.models import load_model

    kin["student"].save_pretrained(tmp_path / "student")
    pkt.transplant(
        kin["teacher"], tmp_path / "student", seeds(), base=kin["base"], rank="full", alpha=1.0,
        merge=tmp_path / "whole", progress=False,
    )  # fmt: skip
    whole = load_model(tmp_path / "whole", dtype=torch.float32)
    teacher, base = (cut(kin[name], copy.deepcopy(kin["true"])) for name in ("teacher", "base"))
    for name, p in kin["student"].named_parameters():
        wanted = p + teacher.get_parameter(name) - base.get_parameter(name)
        assert torch.allclose(whole.get_parameter(name), wanted, atol=1e-5), name
