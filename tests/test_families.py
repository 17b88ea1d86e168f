"""Every family end to end on tiny random models of its own class; families feeding each other; and what nobody listed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import lifecycle
import oracle
import pytest
import torch
from torch import Tensor, nn

import pkt
from pkt.injection import load_with_adapter
from pkt.models import load_model, spec_of
from pkt.seeds import Example, Seeds
from pkt.streaming import open_teacher

SAMPLES = oracle.token_samples(3, longest=12)
BATCHES = oracle.batched(SAMPLES, 2)


def seeds() -> Seeds:
    examples = [Example(ids, [-100] * n + ids[n:], ids[:n], "", i) for i, (ids, n) in enumerate(SAMPLES, 1)]
    return Seeds(examples, "seeds.jsonl", 3)


def worst_error(found: Any, truth: dict[str, Tensor]) -> float:
    """The largest relative error of a parameter; below 1e-9 of the whole S is rounding (OPT's k biases get no gradient)."""
    floor = 1e-9 * sum(float(t.double().norm()) for t in truth.values())
    assert set(found) == set(truth)
    return max(
        float((found[n].double() - t.double()).norm()) / max(float(t.double().norm()), floor * 1e5) for n, t in truth.items()
    )


def places(plan: pkt.TransferPlan) -> list[Any]:
    return [(e.source, e.expert, e.target, e.region, e.place) for e in plan.entries]


def full_circle(student_dir: Path, ext: pkt.Extraction, out: Path) -> None:
    """Inject (step 0 is the student), three steps of training, finalize, and the adapter on the student on disk."""
    plain = load_model(student_dir)
    start = lifecycle.logits(plain)
    model = pkt.inject(plain, ext)
    assert float((lifecycle.logits(model) - start).abs().max()) <= 1e-5
    losses = lifecycle.steps(model, 3)
    assert losses[-1] < losses[0]
    trained = lifecycle.logits(model)
    pkt.finalize(model, out, student=student_dir)
    final = lifecycle.logits(load_with_adapter(student_dir, out))
    assert float((final - trained).abs().max()) <= 1e-4 * float(trained.abs().max())


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_family(family: str, tmp_path: Path, families_table: dict[str, Any]) -> None:
    teacher, student = families.model(family), families.model(family, "student")
    families_table[family] = row = {"class": type(teacher).__name__, "error": None, "passed": False}
    sens = pkt.sensitivity(teacher, BATCHES, progress=False)
    row["error"] = error = worst_error(sens, oracle.sensitivity(teacher, oracle.batched(SAMPLES, 1)))
    assert error <= 1e-5

    for model, size in ((teacher, "teacher"), (student, "student")):
        model.save_pretrained(tmp_path / size)
    ext = pkt.transfer(
        tmp_path / "teacher",
        tmp_path / "student",
        seeds(),
        out=tmp_path / "extraction",
        rank=4,
        keep_scores="full",
        progress=False,
    )
    row["read"] = open_teacher(tmp_path / "teacher", torch.device("cpu")).note or "a layer at a time"
    row["read"] = row["read"].removeprefix(f"{tmp_path / 'teacher'} is ")
    kept = pkt.Sensitivity.load(tmp_path / "extraction" / "scores.safetensors")
    assert worst_error(kept, dict(sens)) <= 1e-5
    resident = pkt.plan(sens, teacher, student)
    assert places(ext.plan) == places(resident)
    assert ext.plan.notes == resident.notes
    whole = pkt.extract(teacher, resident, rank=4, progress=False)
    assert ext.energies == pytest.approx(whole.energies, rel=1e-4)

    full_circle(tmp_path / "student", ext, tmp_path / "adapter")
    row["notes"] = ext.plan.notes
    row["fed"] = sorted({role for t in spec_of(student).targets if t.module in ext.pairs for role, _ in t.roles()})
    row["passed"] = True
