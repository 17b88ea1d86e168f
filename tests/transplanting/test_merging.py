"""A whole student with the change added: what is in it, exactly, and what the folder says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from commands import fails, run
from conftest import ASSETS, save
from transformers import AutoModelForCausalLM, AutoTokenizer

import pkt
from pkt.files import MANIFEST
from pkt.manifest import read_manifest
from pkt.matching import Lineage, Matrices
from pkt.matching.shrinking import Shape, choose_units, shrink_to

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def kin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Any]:
    """Folders of a base, a teacher with another weight everywhere, norms too, and a student that is exactly a part of the base."""
    base = zoo.llama(request.param, hidden=32, layers=4, heads=8, kv=4, ffn=48, vocab=len(tokenizer))
    torch.manual_seed(4)
    teacher, scores = copy.deepcopy(base), {n: p.detach().abs() for n, p in base.named_parameters()}
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.02 * torch.randn_like(p))
    units = choose_units(Matrices(base), scores, Shape(hidden=20, neurons=24, groups=2, layers=3))
    student = shrink_to(base, units, rescale=False)
    student.generation_config.max_new_tokens = 17
    expected = shrink_to(teacher, copy.deepcopy(units), rescale=False)
    folder = tmp_path_factory.mktemp("kin")
    for name, model in (("base", base), ("teacher", teacher), ("student", student)):
        save(model, folder / name, tokenizer)
    units.save(folder / "lineage.json")
    rows = "".join((ASSETS / "data" / "seeds.jsonl").read_text().splitlines(True)[:4])
    (folder / "seeds.jsonl").write_text(rows)
    return {"folder": folder, "base": base, "teacher": teacher, "student": student, "expected": expected}


def words(kin: dict[str, Any], *more: Any) -> tuple[Any, ...]:
    at = kin["folder"]
    given = (at / "teacher", at / "student", at / "seeds.jsonl", "--lineage", at / "lineage.json", "--anyway")
    return ("transplant", *given, *more)


def test_at_full_rank_a_part_of_the_base_becomes_that_part_of_the_teacher(kin: dict[str, Any], tmp_path: Path) -> None:
    told = run(*words(kin, "--base", kin["folder"] / "base", "--rank", "full", "--alpha", 1, "--merge", tmp_path / "m"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    state = dict(merged.named_parameters())
    for name, parameter in kin["expected"].named_parameters():
        assert torch.allclose(state[name], parameter, atol=1e-5), name
        assert not torch.allclose(state[name], kin["student"].get_parameter(name), atol=1e-3), name
    assert merged.generation_config.max_new_tokens == 17
    assert len(AutoTokenizer.from_pretrained(tmp_path / "m")) == merged.config.vocab_size
    manifest = read_manifest(tmp_path / "m")
    assert (manifest["kind"], manifest["content"], manifest["alpha"]) == ("model", "delta", 1.0)
    assert manifest["lineage"]["verdict"] == "descends"
    assert Lineage.load(tmp_path / "m" / "lineage.json").hidden == Lineage.load(kin["folder"] / "lineage.json").hidden
    assert NORM in manifest["added"]
    assert manifest["left_out"] == {}
    assert "the whole student with the change added" in told
    assert "what a teacher learnt added" in run("inspect", tmp_path / "m")
    # The loss that the scale is chosen by is that of what was written.
    seen = pkt.load_seeds(kin["folder"] / "seeds.jsonl", AutoTokenizer.from_pretrained(tmp_path / "m"))
    with torch.no_grad():
        losses = [float(merged(**batch).loss) for batch in seen.batches(1)]
    assert sum(losses) / len(losses) == pytest.approx(manifest["losses"]["1"], rel=1e-5)


def test_a_lora_and_the_student_with_it_and_the_norms(kin: dict[str, Any], tmp_path: Path) -> None:
    options = ("--base", kin["folder"] / "base", "--rank", 4, "--alpha", 0.5)
    told = run(*words(kin, *options, "--out", tmp_path / "lora", "--merge", tmp_path / "m"))
    assert "alone: the change of " in told
    alone = run(*words(kin, *options, "--out", tmp_path / "alone"))
    assert "not in a LoRA: the change of " in alone
    names = ("adapter_model.safetensors", MANIFEST)
    assert all((tmp_path / "lora" / n).read_bytes() == (tmp_path / "alone" / n).read_bytes() for n in names)
    start, merged = pkt.Start.load(tmp_path / "lora"), AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    student = kin["student"]
    delta = start.pairs[UP.removesuffix(".weight")].delta()
    assert torch.allclose(merged.get_parameter(UP), student.get_parameter(UP) + delta, atol=1e-6)
    half = (student.get_parameter(NORM) + kin["expected"].get_parameter(NORM)) / 2
    assert torch.allclose(merged.get_parameter(NORM), half, atol=1e-6)


def test_a_repruned_teacher_is_that_model(kin: dict[str, Any], tmp_path: Path) -> None:
    run(*words(kin, "--control", "repruned", "--merge", tmp_path / "m"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    for name, parameter in kin["expected"].named_parameters():
        assert torch.allclose(merged.get_parameter(name), parameter, atol=1e-5), name


def test_what_is_refused(kin: dict[str, Any], tmp_path: Path) -> None:
    at = kin["folder"]
    assert "name what to write" in fails(*words(kin))
    assert "--rank 'half'" in fails(*words(kin, "--rank", "half", "--merge", tmp_path / "m"))
    assert "rank=0" in fails(*words(kin, "--rank", 0, "--merge", tmp_path / "m"))
    assert "name an output folder apart" in fails(*words(kin, "--merge", at / "student" / "m"))
    both = ("--out", tmp_path / "m", "--merge", tmp_path / "m")
    assert "are the same folder" in fails(*words(kin, *both))
    assert "control='noise' is a LoRA" in fails(*words(kin, "--control", "noise", "--merge", tmp_path / "m"))
    with pytest.raises(pkt.PktError, match="pass that, not the model in memory"):
        pkt.transplant(at / "teacher", kin["student"], at / "seeds.jsonl", merge=tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
