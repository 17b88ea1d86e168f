"""Students of other shapes than "smaller everywhere": as wide, deeper, wider in places, nested, in bf16, or the teacher itself."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from descent import KINDS, cut, drawn, trained
from test_families import seeds
from torch import nn

import pkt
from pkt.matching import Cutter, Lineage, Matrices, lineage
from pkt.matching.layers import increasing
from pkt.transplanting.content import Delta

DECODER = "model.layers"


def whole_of(teacher: Any, layers: list[int]) -> Lineage:
    """All units in their order, of these layers."""
    found = drawn(teacher, hidden=64, neurons=96, layers=6, groups=4)
    return Lineage(
        found.teacher,
        {},
        list(range(64)),
        layers,
        [list(range(96)) for _ in layers],
        [list(range(8)) for _ in layers],
        [[[g] for g in range(4)] for _ in layers],
        [[] for _ in layers],
        verdict="descends",
    )


def stacked(teacher: Any, layers: list[int]) -> Any:
    """A model of copies of these of the teacher's layers, trained on a little."""
    return trained(cut(teacher, whole_of(teacher, layers)), steps=20)


def moved(teacher: Any, seed: int = 2) -> Any:
    other = copy.deepcopy(teacher)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return other


def test_pruned_in_depth_alone() -> None:
    teacher = zoo.trained_like("llama")
    true = whole_of(teacher, [0, 2, 5])
    found = lineage(teacher, stacked(teacher, [0, 2, 5]), progress=False)
    for name in KINDS:
        assert getattr(found, name) == getattr(true, name), name


def test_stretched_by_repeating_layers() -> None:
    """As SOLAR does; both copies of a layer get what it learnt."""
    base = zoo.trained_like("llama")
    order = [0, 1, 2, 3, 2, 3, 4, 5]
    student, teacher = stacked(base, order), moved(base)
    found = lineage(teacher, student, progress=False)
    assert found.verdict == "descends"
    for name in KINDS:
        assert getattr(found, name) == getattr(whole_of(base, order), name), name
    content = Delta(Cutter(found, Matrices(teacher), Matrices(student)), Matrices(base))
    name = "mlp.down_proj.weight"
    change = (teacher.get_parameter(f"{DECODER}.3.{name}") - base.get_parameter(f"{DECODER}.3.{name}")).detach()
    for copied in (3, 5):
        target = content.cutter.new.index["down", copied][0]
        assert torch.equal(content.whole(target), change)


def test_stretched_by_layers_that_begin_as_nothing() -> None:
    """As LLaMA-Pro does: copies whose output projections are zero, and what they learn."""
    teacher = zoo.trained_like("llama")
    order = [0, 1, 1, 2, 3, 3, 4, 5, 5]
    student = cut(teacher, whole_of(teacher, order))
    with torch.no_grad():
        for j in (2, 5, 8):
            student.model.layers[j].self_attn.o_proj.weight.zero_()
            student.model.layers[j].mlp.down_proj.weight.zero_()
    found = lineage(teacher, trained(student, steps=20), progress=False)
    assert (found.verdict, found.layers, found.hidden) == ("descends", order, list(range(64)))
    assert found.neurons == [list(range(96))] * 9


@pytest.mark.parametrize("at", [0, 2, 5])
def test_a_layer_of_the_students_own_has_none(at: int) -> None:
    """As many layers as the teacher: one dropped, one new, so that no increasing choice fits all of them."""
    base = zoo.trained_like("llama")
    student, teacher = cut(base, whole_of(base, [0, 1, 2, 3, 4])), moved(base)
    fresh = zoo.trained_like("llama", seed=9)
    student.model.layers.insert(at, copy.deepcopy(fresh.model.layers[0]))
    for index, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = index
    student.config.num_hidden_layers = 6
    found = lineage(teacher, student, progress=False)
    assert found.layers == [*range(at), -1, *range(at, 5)]
    assert "5 of its 6 layers are the teacher's" in found.reason
    assert f"{', '.join(map(str, range(at)))}{', ' if at else ''}none" in str(found)
    start = pkt.transplant(teacher, student, seeds(), base=base, rank=8, alpha=0.5, anyway=True, progress=False)
    changed = {int(name.split(".")[2]) for name in start.pairs if name.startswith(DECODER)}
    assert changed == set(range(6)) - {at}


def test_layers_are_chosen_as_all_choices_tried_would() -> None:
    generator = torch.Generator().manual_seed(0)
    for deep, layers in itertools.product(range(1, 6), range(1, 6)):
        if layers > deep:
            continue
        scores = torch.rand(deep, layers, generator=generator, dtype=torch.float64)
        every = itertools.combinations(range(deep), layers)
        assert increasing(scores) == list(max(every, key=lambda c: sum(float(scores[i, j]) for j, i in enumerate(c))))

        def worth(chosen: Any) -> float:
            return sum(float(scores[i, j]) - 0.5 for j, i in enumerate(chosen) if i >= 0)  # noqa: B023

        some = [
            c
            for c in itertools.product(range(-1, deep), repeat=layers)
            if all(a < b for a, b in itertools.pairwise(i for i in c if i >= 0))
        ]
        assert worth(increasing(scores, 0.5)) == pytest.approx(max(map(worth, some)))


def test_units_that_the_teacher_lacks_get_nothing() -> None:
    """Half as many hidden units and neurons again as the teacher has, of the student's own, in a random order."""
    base = zoo.trained_like("llama")
    true = whole_of(base, list(range(6)))
    wide, teacher = zoo.trained_like("llama", seed=4, hidden_size=96, intermediate_size=144), moved(base)
    small = cut(base, true)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    rows = torch.randperm(144, generator=torch.Generator().manual_seed(2))
    hidden, neurons = order[:64], rows[:96]
    with torch.no_grad():
        for name, p in wide.named_parameters():
            kept = small.get_parameter(name)
            first = neurons if "gate" in name or "up_proj" in name else hidden
            if p.ndim == 1:
                p[hidden] = kept
            elif name.startswith(("model.embed", "lm_head")):
                p[:, hidden] = kept
            elif "down_proj" in name:
                p[hidden[:, None], neurons] = kept
            elif "o_proj" in name:
                p[hidden] = kept
            else:
                place = first if "mlp" in name else torch.arange(len(kept))
                p[place[:, None], hidden] = kept
    found = lineage(teacher, wide, progress=False)
    assert found.verdict == "descends"
    places = [-1] * 96
    for i, at in enumerate(hidden.tolist()):
        places[at] = i
    assert found.hidden == places
    content = Delta(Cutter(found, Matrices(teacher), Matrices(wide)), Matrices(base))
    change = content.whole(content.cutter.new.index["up", 3][0])
    wanted = (teacher.model.layers[3].mlp.up_proj.weight - base.model.layers[3].mlp.up_proj.weight).detach()
    assert torch.equal(change[neurons][:, hidden], wanted)
    assert not change[rows[96:]].any()
    assert not change[:, order[64:]].any()


def test_nested_students_are_prefixes() -> None:
    teacher = zoo.trained_like("llama")
    layers = list(range(6))
    true = Lineage(
        {}, {}, list(range(40)), layers, [list(range(48))] * 6, [list(range(4))] * 6, [[[0], [1]]] * 6, [[]] * 6
    )
    found = lineage(teacher, trained(cut(teacher, true), steps=20), progress=False)
    for name in KINDS:
        assert getattr(found, name) == getattr(true, name), name


def test_checkpoints_in_bf16(tmp_path: Path) -> None:
    """Differences of bf16 weights are taken in fp32, without rounding."""
    base = zoo.trained_like("llama", vocab_size=67)
    true = drawn(base)
    models = {"base": base, "teacher": moved(base), "student": moved(cut(base, true), 3)}
    for name, model in models.items():
        model.bfloat16().save_pretrained(tmp_path / name)
    found = lineage(tmp_path / "teacher", tmp_path / "student", progress=False)
    for name in KINDS:
        assert getattr(found, name) == getattr(true, name), name
    content = Delta(
        Cutter(found, Matrices(tmp_path / "teacher"), Matrices(tmp_path / "student")), Matrices(tmp_path / "base")
    )
    teacher, before = (
        m.get_parameter(f"{DECODER}.{true.layers[1]}.mlp.up_proj.weight") for m in (models["teacher"], base)
    )
    change = (teacher.float() - before.float()).detach()[true.neurons[1]][:, true.hidden]
    assert torch.equal(content.whole(content.cutter.new.index["up", 1][0]), change)
    start = pkt.transplant(
        tmp_path / "teacher", tmp_path / "student", seeds(), base=tmp_path / "base", rank=64, alpha=1.0, anyway=True,
        progress=False,
    )  # fmt: skip
    pair = start.pairs[f"{DECODER}.1.mlp.up_proj"]
    assert pair.A.dtype == torch.float32
    assert torch.allclose(pair.delta(), change, atol=1e-5)


def test_a_teacher_that_is_the_student() -> None:
    teacher = zoo.trained_like("llama", vocab_size=67)
    found = lineage(teacher, copy.deepcopy(teacher), progress=False)
    assert (found.verdict, found.hidden, found.layers) == ("descends", list(range(64)), list(range(6)))
    for given in ({}, {"base": moved(teacher)}):
        with pytest.raises(pkt.PktError, match="has the teacher's own weights: there is nothing to transplant"):
            pkt.transplant(teacher, copy.deepcopy(teacher), seeds(), progress=False, **given)


def test_a_student_that_is_the_teacher_on_fewer_units() -> None:
    """Nothing differs, so without a base there is nothing to take."""
    teacher = zoo.trained_like("llama", vocab_size=67)
    with pytest.raises(pkt.PktError, match="is the teacher on its own units already: there is nothing to transplant"):
        pkt.transplant(teacher, cut(teacher, drawn(teacher)), seeds(), progress=False)


@pytest.mark.parametrize("where", ["embed", "up", "o"])
def test_damaged_weights_are_told(where: str) -> None:
    teacher = zoo.trained_like("llama")
    student = cut(teacher, drawn(teacher))
    tables = {"embed": student.model.embed_tokens, "up": student.model.layers[1].mlp.up_proj,
              "o": student.model.layers[2].self_attn.o_proj}  # fmt: skip
    nn.init.constant_(tables[where].weight[3], float("nan"))
    with pytest.raises(pkt.PktError, match="NaN or Inf"):
        lineage(teacher, student, progress=False)
