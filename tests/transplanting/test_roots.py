"""Whose units a student's are is asked of what it was cut from: the base where there is one, not the teacher that moved away."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import descent
import oracle
import pytest
import torch
import zoo

import pkt
from pkt import PktError


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A base, a student cut out of it, and a teacher whose tuning exchanged half of two of those hidden units."""
    folder = tmp_path_factory.mktemp("family")
    torch.manual_seed(5)
    base = zoo.llama(hidden=64, ffn=96, layers=4)
    units = descent.drawn(base, hidden=48, neurons=64, layers=3)
    student = descent.cut(base, units)
    teacher = copy.deepcopy(base)
    a, b = units.hidden[:2]
    with torch.no_grad():
        for table in (teacher.get_input_embeddings(), teacher.get_output_embeddings()):
            mixed = table.weight[:, [b, a]] * 0.8 + table.weight[:, [a, b]] * 0.6
            table.weight[:, [a, b]] = mixed
    for name, model in (("base", base), ("student", student), ("teacher", teacher)):
        model.save_pretrained(folder / name)
    return {"folder": folder, "units": units}


def test_the_student_is_matched_to_the_base(family: dict[str, Any], tmp_path: Path) -> None:
    folder, units = family["folder"], family["units"]
    teacher, student, base = (folder / name for name in ("teacher", "student", "base"))
    seeds = oracle.seeds(4, 12)
    assert pkt.lineage(teacher, student, progress=False).hidden != units.hidden
    pkt.transplant(teacher, student, seeds, base=base, rank=4, alpha=1.0, out=tmp_path / "moved", progress=False)
    found = pkt.Lineage.load(tmp_path / "moved" / "lineage.json")
    assert found.hidden == units.hidden
    assert found.layers == units.layers
    for given in (pkt.lineage(teacher, student, progress=False), pkt.lineage(base, student, progress=False)):
        pkt.transplant(teacher, student, seeds, base=base, lineage=given, rank=4, alpha=1.0, progress=False)
    with pytest.raises(PktError, match="teacher side"):
        pkt.transplant(
            teacher, student, seeds, base=base, lineage=pkt.lineage(student, student, progress=False), progress=False
        )
