"""What a transplant is held against, by exact values on tiny models: each control is what its name says and nothing else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from commands import run
from conftest import ASSETS, save

import pkt
from pkt.matching import Matrices
from pkt.matching.shrinking import Shape, choose_units, shrink_to
from pkt.seeds import load_seeds
from pkt.transplanting import control_of
from pkt.transplanting.controls import CONTROLS, shuffled

UP = "model.layers.1.mlp.up_proj"
WHOLE = 64  # a rank at which nothing is truncated


@pytest.fixture(scope="module")
def kin(tokenizer: Any) -> dict[str, Any]:
    """A base, a teacher with another weight everywhere, and a student cut from the base and moved a little."""
    base = zoo.llama(hidden=32, layers=4, heads=8, kv=4, ffn=48, vocab=len(tokenizer))
    torch.manual_seed(4)
    teacher, scores = copy.deepcopy(base), {n: p.detach().abs() for n, p in base.named_parameters()}
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.02 * torch.randn_like(p))
    true = choose_units(Matrices(base), scores, Shape(hidden=20, neurons=24, groups=2, layers=3))
    student = shrink_to(base, true, rescale=False)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.01 * torch.randn_like(p))
    rows = load_seeds(ASSETS / "data" / "seeds.jsonl", tokenizer, limit=4)
    return {"base": base, "teacher": teacher, "student": student, "true": true, "rows": rows}


def moved(kin: dict[str, Any], **options: Any) -> Any:
    given = {"base": kin["base"], "lineage": kin["true"], "rank": WHOLE, "alpha": 0.5, "progress": False, **options}
    return pkt.transplant(kin["teacher"], kin["student"], kin["rows"], **given)


def change(kin: dict[str, Any], units: Any) -> torch.Tensor:
    """What the teacher's matrix learnt, on these units of the student's layer 1."""
    name = f"model.layers.{units.layers[1]}.mlp.up_proj.weight"
    whole = kin["teacher"].get_parameter(name) - kin["base"].get_parameter(name)
    return whole.detach()[units.neurons[1]][:, units.hidden]


def test_the_scale_can_be_fixed(kin: dict[str, Any]) -> None:
    start = moved(kin)
    assert (start.provenance["alpha"], "control" in start.provenance) == (0.5, False)
    assert torch.allclose(start.pairs[UP].delta(), 0.5 * change(kin, kin["true"]), atol=1e-5)
    other = moved(kin, alpha=0.3).provenance
    assert set(other["losses"]) - {"2", "3", "4"} == {"0", "0.25", "0.3", "0.5", "0.75", "1", "1.5"}
    assert other["own_alpha"] == min((loss, float(a)) for a, loss in other["losses"].items())[1]


def test_wrong_units_are_the_same_change_elsewhere(kin: dict[str, Any]) -> None:
    true, start = kin["true"], moved(kin, control="wrong-units", seed=2)
    wrong = shuffled(true, 2)
    assert wrong.hidden != true.hidden
    assert sorted(wrong.hidden) == sorted(true.hidden)
    assert [sorted(n) for n in wrong.neurons] == [sorted(n) for n in true.neurons]
    assert [sorted(q) for q in wrong.queries] == [sorted(q) for q in true.queries]
    assert wrong.layers == true.layers
    found = start.pairs[UP].delta()
    assert torch.allclose(found, 0.5 * change(kin, wrong), atol=1e-5)
    assert torch.allclose(torch.linalg.svdvals(found), torch.linalg.svdvals(0.5 * change(kin, true)), atol=1e-5)


def test_noise_has_the_singular_values_and_nothing_else(kin: dict[str, Any]) -> None:
    start, plain = moved(kin, control="noise", rank=8), moved(kin, rank=8)
    assert set(start.pairs) == set(plain.pairs)
    for name, pair in plain.pairs.items():
        noise = start.pairs[name]
        assert (noise.kind, noise.A.shape, noise.B.shape) == (pair.kind, pair.A.shape, pair.B.shape)
        sizes = [torch.linalg.svdvals(p.delta())[:8] for p in (noise, pair)]
        assert torch.allclose(*sizes, rtol=1e-4, atol=1e-6), name
        overlap = (noise.delta() * pair.delta()).sum() / (noise.delta().norm() * pair.delta().norm())
        assert abs(overlap) < 0.3, name
        # Both factors carry the root of each value.
        assert torch.allclose(noise.A.norm(dim=1), noise.B.norm(dim=0), rtol=1e-4)


@pytest.mark.parametrize("kind", ["wrong-units", "noise"])
def test_a_control_drawn_anew_is_the_same(kin: dict[str, Any], kind: Any) -> None:
    whole = moved(kin, control=kind, rank=8, seed=3)
    given = {"base": kin["base"], "lineage": kin["true"]}
    drawn = control_of(moved(kin, rank=8), kind, 3, kin["teacher"], kin["student"], **given)
    assert set(drawn.pairs) == set(whole.pairs)
    for name, pair in whole.pairs.items():
        assert torch.allclose(drawn.pairs[name].delta(), pair.delta(), atol=1e-5), name


def test_neutral_leaves_the_student_as_it_is(kin: dict[str, Any], tmp_path: Path) -> None:
    start, plain = moved(kin, control="neutral", out=tmp_path / "n", rank=8), moved(kin, rank=8)
    assert (start.mode, plain.mode) == ("paired", "add")
    assert all(
        torch.equal(start.pairs[n].A, p.A) and torch.equal(start.pairs[n].B, p.B) for n, p in plain.pairs.items()
    )
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        before = kin["student"](ids).logits
        model = pkt.inject(copy.deepcopy(kin["student"]), tmp_path / "n").eval()
        assert (model(ids).logits - before).abs().max() <= 1e-5
        kept = pkt.inject(copy.deepcopy(kin["student"]), plain).eval()
        assert (kept(ids).logits - before).abs().max() > 1e-2


def test_repruned_is_the_teacher_on_the_students_units(kin: dict[str, Any]) -> None:
    start = moved(kin, control="repruned", alpha=None, anyway=True)
    assert start.provenance["alpha"] == 1.0
    cut, student = shrink_to(kin["teacher"], copy.deepcopy(kin["true"]), rescale=False), kin["student"]
    for name, pair in start.pairs.items():
        whole = student.get_submodule(name).weight + pair.delta()
        assert torch.allclose(whole, cut.get_submodule(name).weight, atol=1e-6), name
    assert set(start.provenance["left_out"]) == {n for n, p in student.named_parameters() if p.ndim == 1}


@pytest.mark.parametrize("control", CONTROLS)
def test_a_control_is_recorded_as_one(
    kin: dict[str, Any], control: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the command line: the α of the transplant and the control's own, in words and in the folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "teacher", "student"):
        save(kin[name], tmp_path / name, tokenizer)
    kin["true"].save("lineage.json")
    (tmp_path / "seeds.jsonl").write_text("".join((ASSETS / "data" / "seeds.jsonl").read_text().splitlines(True)[:4]))
    words = (
        "teacher",
        "student",
        "seeds.jsonl",
        "--base",
        "base",
        "--lineage",
        "lineage.json",
        "--rank",
        8,
        "--anyway",
    )
    shown = run("transplant", *words, "--control", control, "--out", "c")
    assert f"control: {control}: " in shown
    assert "best α by the seeds: the control's own " in shown
    found = pkt.Start.load("c")
    assert found.provenance["control"] == control
    assert found.provenance["transplant"].keys() == {"alpha", "own_alpha", "losses"}
    assert f"a control of one, {control}" in run("inspect", "c")
    assert ("neutral: the student is as it was" in run("inspect", "c")) == (control == "neutral")


def test_what_a_control_refuses(kin: dict[str, Any]) -> None:
    with pytest.raises(pkt.PktError, match="control='random' is unknown; choose one of wrong-units, noise"):
        moved(kin, control="random")
    for alpha in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(pkt.PktError, match="must be above 0"):
            moved(kin, alpha=alpha)
