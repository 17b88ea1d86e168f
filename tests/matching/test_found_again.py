"""Units of pruned and shuffled students of every family, found again by weights alone, after training and in experts too."""

from __future__ import annotations

import pytest
import torch
import zoo
from descent import KINDS, cut, drawn, trained

from pkt.matching import lineage

FAMILIES = [
    ("llama", False),
    ("llama", True),
    ("qwen3", False),
    ("gemma2", True),
    ("gemma3", True),
    ("phi3", False),
    ("gpt2", True),
    ("mixtral", False),
]


@pytest.mark.parametrize(("kind", "tied"), FAMILIES)
def test_all_units_are_found_again_after_training(kind: str, tied: bool) -> None:
    teacher = zoo.trained_like(kind, tied=tied)
    true = drawn(teacher)
    student = cut(teacher, true)
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    found = lineage(teacher, trained(student), progress=False)
    assert all(not torch.equal(p, before[n]) for n, p in student.named_parameters() if p.ndim > 1)
    assert found.verdict == "descends", str(found)
    for name in KINDS:
        assert getattr(found, name) == getattr(true, name), name
    assert all(e.matched == e.total for e in found.evidence)


@pytest.mark.parametrize(("kind", "tied"), FAMILIES)
def test_all_of_a_models_units_in_another_order_are_the_same_model(kind: str, tied: bool) -> None:
    """Rows, columns, biases, positions, experts and their router: each is cut to where it belongs."""
    teacher = zoo.trained_like(kind, tied=tied)
    true = drawn(teacher, hidden=64, neurons=96, layers=6, groups=4, experts=4)
    student = cut(teacher, true)
    assert true.hidden != sorted(true.hidden)
    ids = torch.arange(2, 42)[None]
    with torch.no_grad():
        assert (student(ids).logits - teacher(ids).logits).abs().max() <= 2e-4 * teacher(ids).logits.abs().max()
