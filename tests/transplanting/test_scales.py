"""A student that `pkt shrink` made has larger norm gains (and Gemma a larger table); what is transplanted has their scale."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo

from pkt.matching import Cutter, Lineage, Matrices, Shape, choose_units, shape_of, shrink_to
from pkt.transplanting.content import Delta, Difference, OwnLora, open_content

KINDS = ("llama", "qwen3", "gemma2", "phi3", "gpt2")


def family(kind: str, *, rescale: bool, tied: bool = False) -> tuple[Any, Any, Any, Lineage]:
    """(base, teacher with another weight everywhere, student cut from the base, whose units)."""
    base = zoo.trained_like(kind, tied=tied)
    scores = {name: p.detach().abs() for name, p in base.named_parameters()}
    old = Matrices(base)
    whole = shape_of(old)
    units = choose_units(old, scores, Shape(40, whole.neurons, 5 if kind == "gpt2" else whole.groups, whole.layers))
    teacher = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.2 * p.abs().mean() * torch.randn(p.shape, generator=generator))
    return base, teacher, shrink_to(base, copy.deepcopy(units), rescale=rescale), units


@pytest.mark.parametrize("rescale", [True, False], ids=["shrunk", "as they were"])
@pytest.mark.parametrize("kind", [*KINDS, "gemma2 tied"])
def test_a_part_of_the_base_becomes_that_part_of_the_teacher(kind: str, rescale: bool) -> None:
    base, teacher, student, units = family(kind.split()[0], rescale=rescale, tied="tied" in kind)
    expected = shrink_to(teacher, copy.deepcopy(units), rescale=rescale)
    cutter = Cutter(units, Matrices(teacher), Matrices(student))
    targets = {t.parameter: t for t in (*cutter.new.spec.targets, *cutter.new.others)}
    for content in (Delta(cutter, Matrices(base)), Difference(cutter)):
        for name, parameter in student.named_parameters():
            change = content.whole(targets[name]) if name in targets else content.vector(name)
            assert change is not None
            change = change.mT if name in targets and targets[name].kind == "conv1d" else change
            wanted = expected.get_parameter(name) - parameter
            assert torch.allclose(change, wanted, atol=2e-6), (content.kind, name)


def test_a_gain_has_moved_by_the_root_of_the_widths() -> None:
    base, teacher, student, units = family("llama", rescale=True)
    name = "model.layers.1.input_layernorm.weight"
    moved = teacher.get_parameter(name) - base.get_parameter(name)
    found = Delta(Cutter(units, Matrices(teacher), Matrices(student)), Matrices(base)).vector(name)
    assert found is not None
    assert torch.allclose(found, math.sqrt(64 / 40) * moved[units.hidden].detach(), atol=1e-6)
    # Healing that moves the gains a little does not hide it.
    with torch.no_grad():
        student.get_parameter(name).mul_(0.95).add_(0.02 * torch.randn(40, generator=torch.Generator().manual_seed(1)))
    again = Delta(Cutter(units, Matrices(teacher), Matrices(student)), Matrices(base)).vector(name)
    assert torch.equal(found, again)


def test_an_adapter_of_a_table_has_its_scale(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base, _, student, units = family("gemma2", rescale=True, tied=True)
    torch.manual_seed(0)
    tuned = get_peft_model(copy.deepcopy(base), LoraConfig(r=3, target_modules=["embed_tokens"]))
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_embedding" in name:
                p.copy_(0.1 * torch.randn_like(p))
    tuned.save_pretrained(tmp_path / "lora")
    content = open_content(Cutter(units, Matrices(base), Matrices(student)), adapter=tmp_path / "lora")
    assert isinstance(content, OwnLora)
    merged = tuned.merge_and_unload()
    expected = shrink_to(merged, copy.deepcopy(units)).get_input_embeddings().weight
    target = content.cutter.new.index["embed", None][0]
    pair = content.pair(target)
    assert pair is not None
    wanted = expected - student.get_input_embeddings().weight
    assert wanted.abs().max() > 0.01
    assert torch.allclose(pair.delta(), wanted, atol=1e-5)
    assert torch.allclose(content.whole(target), wanted, atol=1e-5)
