"""Factorization, the extraction folder, and what plain PEFT makes of it."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import zoo
from torch import Tensor

import pkt
from pkt import ops
from pkt.adapters import WEIGHTS, read_adapter
from pkt.extraction.factorization import factorize_all
from pkt.files import MANIFEST
from pkt.models import load_model
from pkt.options import Factorization


def spectrum(name: str, n: int = 160, m: int = 120) -> Tensor:
    g = torch.Generator().manual_seed(0)
    if name == "flat":
        return torch.randn(n, m, generator=g)
    u = torch.linalg.qr(torch.randn(n, m, generator=g))[0]
    v = torch.linalg.qr(torch.randn(m, m, generator=g))[0]
    s = 1 / torch.arange(1, m + 1) if name == "decaying" else 0.7 ** torch.arange(m)
    return (u * s) @ v.t()


@pytest.mark.parametrize("name", ["flat", "decaying", "exponential"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("split", ["b", "sqrt"])
def test_factors_are_within_a_percent_of_the_optimum(name: str, dtype: torch.dtype, split: Any) -> None:
    x = spectrum(name).to(dtype)
    factors = pkt.factorize(x, 16, split=split)
    s = torch.linalg.svdvals(x.double())
    best = float((s[16:] ** 2).sum())
    residual = float((x.double() - factors.B.double() @ factors.A.double()).norm() ** 2)
    assert residual <= 1.01 * best + 1e-12 * float((s**2).sum())
    assert factors.energy == pytest.approx(1 - residual / float((s**2).sum()), abs=1e-5)
    if split == "sqrt":
        torch.testing.assert_close(factors.A.norm(dim=1), factors.B.norm(dim=0), rtol=1e-4, atol=0)


def test_energy_takes_the_smallest_rank_that_catches_it() -> None:
    x = spectrum("exponential")
    shares = (torch.linalg.svdvals(x.double()) ** 2).cumsum(0)
    shares /= shares[-1].clone()
    for wanted in (0.3, 0.9, 0.99):
        factors = pkt.factorize(x, energy=wanted)
        assert factors.rank == int((shares < wanted).sum()) + 1
        assert factors.energy >= wanted
    assert pkt.factorize(x, energy=0.9999, max_rank=4).rank == 4
    assert pkt.factorize(torch.zeros(8, 9), energy=0.9).rank == 1


def test_the_same_seed_gives_the_same_bytes() -> None:
    x = spectrum("flat", 400, 300)
    one, two, other = (pkt.factorize(x, 8, seed=s) for s in (0, 0, 1))
    assert torch.equal(one.A, two.A)
    assert torch.equal(one.B, two.B)
    assert not torch.equal(one.A, other.A)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "must be at least 1"),
        ({"rank": 200}, "rank 200 is above its 120"),
        ({"energy": 1.5}, "energy=1.5"),
        ({"split": "half"}, "split='half'"),
    ],
)
def test_impossible_options_are_refused(options: Any, message: str) -> None:
    with pytest.raises(pkt.PktError, match=message):
        pkt.factorize(spectrum("flat"), **options)


def test_bad_matrices_are_named() -> None:
    bad = spectrum("flat")
    bad[3, 4] = float("nan")
    with pytest.raises(pkt.PktError, match="layer 3 contains NaN or Inf"):
        pkt.factorize(bad, 4, name="layer 3")
    for matrix, message in (
        (torch.zeros(3), "only a matrix"),
        (torch.zeros(2, 3, 4), "only a matrix"),
        (torch.zeros(3, 3, dtype=torch.int64), "int64"),
        (torch.zeros(3, 3, dtype=torch.complex64), "complex64"),
    ):
        with pytest.raises(pkt.PktError, match=f"layer 3 is .*{message}"):
            pkt.factorize(matrix, 1, name="layer 3")


@pytest.mark.parametrize("options", [{"rank": 5}, {"energy": 0.9, "max_rank": 40}])
def test_all_at_once_are_the_bytes_of_one_by_one(options: Any) -> None:
    matrices = [spectrum("flat", 90, 70), spectrum("exponential", 30, 8).bfloat16().t(), spectrum("decaying").t()]
    found = factorize_all(matrices, ["x", "y", "z"], Factorization(**options))
    for matrix, factors in zip(matrices, found, strict=True):
        alone = pkt.factorize(matrix, **options)
        assert torch.equal(factors.A, alone.A)
        assert torch.equal(factors.B, alone.B)
        assert factors.energy == alone.energy
    if "energy" in options:
        assert len({f.rank for f in found}) == 3
    matrices[2][4, 5] = float("-inf")
    with pytest.raises(pkt.PktError, match="z contains NaN or Inf"):
        factorize_all(matrices, ["x", "y", "z"], Factorization(**options))


@pytest.fixture(scope="module")
def made(teacher_dir: Path, student_dir: Path, seed_file: Path, extraction_dir: Path) -> pkt.Extraction:
    return pkt.Extraction.load(extraction_dir)


def test_each_pair_is_the_best_of_its_region(made: pkt.Extraction, teacher_dir: Path) -> None:
    teacher = load_model(teacher_dir)
    for entry in made.plan.entries:
        region = entry.region.cut(teacher.get_parameter(f"{entry.source}.weight").detach()).double()
        pair = made.pairs[entry.target]
        product = (pair.B @ pair.A).double()
        if entry.kind == "embedding":
            product = product.t()
        best = float((torch.linalg.svdvals(region)[4:] ** 2).sum())
        assert float((region - product).norm() ** 2) <= 1.01 * best, entry.target


def test_the_folder_holds_what_a_user_needs(extraction_dir: Path, made: pkt.Extraction, seed_file: Path) -> None:
    assert {p.name for p in extraction_dir.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        MANIFEST,
        "README.md",
    }
    manifest = json.loads((extraction_dir / MANIFEST).read_text())
    assert manifest["seeds"]["count"] == 6
    assert len(manifest["seeds"]["fingerprint"]) == 64
    assert manifest["teacher"]["fingerprint"]
    assert set(manifest["energies"]) == set(made.pairs)
    assert {"pkt", "torch", "peft"} <= set(manifest["versions"])
    card = (extraction_dir / "README.md").read_text()
    assert "changes the student at once" in card


@pytest.mark.parametrize("which", ["student_dir", "tied_student_dir"])
def test_plain_peft_loads_the_folder_without_a_warning(
    request: pytest.FixtureRequest, teacher_dir: Path, seed_file: Path, tmp_path: Path, which: str
) -> None:
    from peft import PeftModel

    student: Path = request.getfixturevalue(which)
    ext = pkt.transfer(teacher_dir, student, seed_file, out=tmp_path / "ext", rank=4, progress=False)
    base = load_model(student)
    ids = torch.randint(0, 500, (2, 9), generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Raised inside PEFT for any adapter: it reads an attribute that transformers renames in its next version.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        model = PeftModel.from_pretrained(base, str(tmp_path / "ext")).eval()
        loaded = model(ids).logits
    changed = load_model(student)
    with torch.no_grad():
        for module, pair in ext.pairs.items():
            changed.get_submodule(module).weight += pair.delta()
    torch.testing.assert_close(loaded, changed(ids).logits, rtol=1e-4, atol=1e-4)


def test_ranks_by_energy_reach_the_configuration(
    teacher_dir: Path, student_dir: Path, seed_file: Path, tmp_path: Path
) -> None:
    ext = pkt.transfer(
        teacher_dir, student_dir, seed_file, out=tmp_path / "ext", energy=0.5, max_rank=12, progress=False
    )
    ranks = {m: p.rank for m, p in ext.pairs.items()}
    assert len(set(ranks.values())) > 1
    config = json.loads((tmp_path / "ext" / "adapter_config.json").read_text())
    for module, rank in ranks.items():
        assert config["rank_pattern"].get(module, config["r"]) == rank
        assert config["alpha_pattern"].get(module, config["lora_alpha"]) == rank
    again = pkt.Extraction.load(tmp_path / "ext")
    for module, pair in ext.pairs.items():
        torch.testing.assert_close(again.pairs[module].B, pair.B)
    adapter, _ = read_adapter(tmp_path / "ext")
    assert set(adapter.pairs) == set(ranks)


def test_a_teacher_on_disk_and_one_in_memory_give_the_same(teacher_dir: Path, made: pkt.Extraction) -> None:
    for teacher in (teacher_dir, load_model(teacher_dir)):
        ext = pkt.extract(teacher, made.plan, rank=4, progress=False)
        for module, pair in ext.pairs.items():
            assert torch.equal(pair.A, made.pairs[module].A)
            assert torch.equal(pair.B, made.pairs[module].B)


def test_a_layer_waits_for_its_factors_once(
    teacher_dir: Path, made: pkt.Extraction, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []
    rsvd_batch = ops.rsvd_batch
    monkeypatch.setattr(ops, "rsvd_batch", lambda a, *args, **kw: batches.append(len(a)) or rsvd_batch(a, *args, **kw))
    pkt.extract(teacher_dir, made.plan, rank=4, progress=False)
    assert sorted(batches) == [1, 1, 7, 7]


def test_ranks_no_matrix_has_are_refused_together(teacher_dir: Path, made: pkt.Extraction) -> None:
    with pytest.raises(pkt.PktError) as caught:
        pkt.extract(teacher_dir, made.plan, rank=20, progress=False)
    assert "k_proj" in str(caught.value)
    assert "v_proj" in str(caught.value)
    assert "q_proj" not in str(caught.value)


def test_weights_that_are_not_finite_name_the_module(made: pkt.Extraction, teacher_dir: Path) -> None:
    teacher = load_model(teacher_dir)
    source = made.plan.entries[3].source
    with torch.no_grad():
        teacher.get_parameter(f"{source}.weight").fill_(float("inf"))
    with pytest.raises(pkt.PktError, match=f"{source} contains NaN or Inf"):
        pkt.extract(teacher, made.plan, rank=4, progress=False)


def test_gpt2_round_trip_through_conv1d(tmp_path: Path) -> None:
    teacher, student = zoo.gpt2(hidden=48, layers=3, heads=4), zoo.gpt2(hidden=32, layers=2, heads=4)
    sens = pkt.sensitivity(teacher, oracle.batched(oracle.token_samples(4), 4), progress=False)
    plan = pkt.plan(sens, teacher, student, modules="ffn")
    ext = pkt.extract(teacher, plan, rank=4, progress=False)
    for entry in plan.entries:
        weight = teacher.get_parameter(f"{entry.source}.weight").detach().t()
        region = entry.region.cut(weight).double()
        pair = ext.pairs[entry.target]
        best = float((torch.linalg.svdvals(region)[4:] ** 2).sum())
        assert float((region - (pair.B @ pair.A).double()).norm() ** 2) <= 1.01 * best


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda m: [1], "not a manifest of pkt's"),
        (lambda m: {"kind": "run"}, "a training run without mode, student, settings"),
        (lambda m: {"kind": "adapter", "mode": 5}, "a finalized adapter without mode, base"),
        (lambda m: {k: v for k, v in m.items() if k != "energies"}, "an extraction without energies"),
        (lambda m: {k: v for k, v in m.items() if k != "plan"}, "an extraction without plan"),
        (lambda m: {**m, "plan": {**m["plan"], "student": {}}}, "is damaged: the plan is incomplete"),
        (lambda m: {**m, "plan": {**m["plan"], "entries": m["plan"]["entries"][:3]}}, "list different modules"),
        (lambda m: {**m, "energies": {}}, "list different modules"),
    ],
)
def test_a_damaged_manifest_is_one_error_everywhere(
    extraction_dir: Path, student_dir: Path, tmp_path: Path, damage: Any, words: str
) -> None:
    from pkt.reporting import inspect_folder, write_report

    folder = tmp_path / "damaged"
    shutil.copytree(extraction_dir, folder)
    manifest = damage(json.loads((folder / MANIFEST).read_text()))
    (folder / MANIFEST).write_text(json.dumps(manifest))
    for use in (inspect_folder, write_report, lambda f: pkt.inject(student_dir, f)):
        with pytest.raises(pkt.PktError, match=words):
            use(folder)
    with pytest.raises(pkt.PktError, match=f"{words}|is an extraction, not a trained adapter"):
        pkt.finalize(folder, tmp_path / "out")


def test_arguments_of_other_types(made: pkt.Extraction, teacher_dir: Path) -> None:
    for wrong in (None, 5, "plan.json"):
        with pytest.raises(pkt.PktError, match=f"a plan is needed, not {type(wrong).__name__}"):
            pkt.extract(teacher_dir, wrong)
    for teacher in (None, 5, made):
        with pytest.raises(pkt.PktError, match=f"a teacher .* is needed, not {type(teacher).__name__}"):
            pkt.extract(teacher, made.plan)


def test_the_report_says_each_option_once(extraction_dir: Path, tmp_path: Path) -> None:
    from pkt.reporting import write_report

    html = write_report(extraction_dir, tmp_path / "report.html").read_text(encoding="utf-8")
    assert html.count("<td>seed</td>") == 1
    assert "<td>rank</td>" in html
    assert "<td>energy</td>" not in html
    assert "energy" not in re.findall("factorization.*", (extraction_dir / "README.md").read_text())[-1]
    assert (extraction_dir / WEIGHTS).stat().st_mode == (extraction_dir / MANIFEST).stat().st_mode
