"""`pkt train STUDENT DATA`: PEFT's own initialisations, A times its scale, in an ordinary run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import fails, run
from conftest import ASSETS

import pkt
from pkt.adapters import read_adapter
from pkt.extraction import Start
from pkt.files import MANIFEST
from pkt.lora import draw_pairs, inject, mode_of
from pkt.models import load_model, spec_of
from pkt.options import Lora
from pkt.planning import adapted
from pkt.seeds import Seeds, load_seeds

INITS = ("default", "gaussian", "orthogonal", "eva", "pissa", "pissa_niter_8", "olora", "corda", "lora_ga")
IDS = torch.tensor([[5, 9, 17, 30, 2, 8]])


@pytest.fixture(scope="module")
def rows(tokenizer: Any) -> Seeds:
    return load_seeds(ASSETS / "data" / "train.jsonl", tokenizer, limit=10)


def drawn(student: Path, lora: Lora, scale: float = 1.0, rows: Seeds | None = None) -> tuple[Any, dict[str, Any]]:
    model = load_model(student)
    torch.manual_seed(3)
    return model, draw_pairs(model, adapted(spec_of(student), lora.modules), lora, scale, rows=rows)


def by_peft(student: Path, modules: Any, **settings: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    model = load_model(student)
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(target_modules=list(modules), **settings)).get_base_model()


@pytest.mark.parametrize(("init", "theirs"), [("default", True), ("gaussian", "gaussian")])
def test_the_factors_are_pefts_with_a_larger_a(student_dir: Path, init: str, theirs: Any) -> None:
    _, pairs = drawn(student_dir, Lora(init, rank=4, alpha=8.0), 3.0)
    assert len(pairs) == 2 * 7 + 2
    peft = by_peft(student_dir, pairs, r=4, lora_alpha=8, init_lora_weights=theirs)
    for module, pair in pairs.items():
        layer = peft.get_submodule(module)
        if pair.kind == "embedding":
            assert torch.equal(pair.A, torch.zeros_like(pair.A))
            assert torch.equal(pair.B, 2 * layer.lora_embedding_B["default"])
        else:
            assert torch.equal(pair.A, 3 * layer.lora_A["default"].weight)
            assert not pair.B.any()


@pytest.mark.parametrize("init", ["pissa_niter_8", "olora", "orthogonal"])
def test_factors_that_peft_computes_are_its_own(student_dir: Path, init: str) -> None:
    _, pairs = drawn(student_dir, Lora(init, rank=4, modules="attention,ffn"))
    peft = by_peft(student_dir, pairs, r=4, lora_alpha=4, init_lora_weights=init)
    for module, pair in pairs.items():
        layer = peft.get_submodule(module)
        torch.testing.assert_close(pair.A, layer.lora_A["default"].weight)
        torch.testing.assert_close(pair.B, layer.lora_B["default"].weight)


@torch.no_grad()
@pytest.mark.parametrize("init", INITS)
def test_every_initialisation_leaves_the_student_as_it_is(student_dir: Path, rows: Seeds, init: str) -> None:
    student = load_model(student_dir)
    lora = Lora(init, rank=4, modules="attention,ffn")
    model, pairs = drawn(student_dir, lora, rows=rows)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), student.parameters(), strict=True))
    assert mode_of(lora) == ("add" if init in INITS[:4] else "residual")
    moved = max(float(pair.delta().abs().max()) for pair in pairs.values())
    assert (moved > 1e-3) == (mode_of(lora) == "residual")
    assert all(pair.A.abs().max() > 0 for pair in pairs.values())
    started = inject(model, Start("start", pairs, {}), mode=mode_of(lora))
    torch.testing.assert_close(started(IDS).logits, student(IDS).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_pissa_has_the_leading_directions_and_a_scale_of_a_keeps_the_product(student_dir: Path) -> None:
    model, pairs = drawn(student_dir, Lora("pissa", rank=4, modules="q"))
    _, scaled = drawn(student_dir, Lora("pissa", rank=4, modules="q"), 8.0)
    for module, pair in pairs.items():
        best = float(torch.linalg.svdvals(model.get_submodule(module).weight)[4:].norm())
        assert float((model.get_submodule(module).weight - pair.delta()).norm()) <= 1.02 * best
        torch.testing.assert_close(scaled[module].A, 8 * pair.A)
        torch.testing.assert_close(scaled[module].delta(), pair.delta(), atol=1e-6, rtol=1e-5)


def test_eva_looks_at_the_rows(student_dir: Path, rows: Seeds) -> None:
    _, one = drawn(student_dir, Lora("eva", rank=4, modules="q"), rows=rows)
    others = Seeds(list(rows[5:]), rows.source, rows.pad_id)
    _, two = drawn(student_dir, Lora("eva", rank=4, modules="q"), rows=others)
    for module, pair in one.items():
        assert not torch.equal(pair.A, two[module].A)
        torch.testing.assert_close(pair.A @ pair.A.t(), torch.eye(4), atol=1e-4, rtol=1e-4)


def test_a_tied_student(tied_student_dir: Path, rows: Seeds, tmp_path: Path) -> None:
    settings: Any = {"max_steps": 2, "batch_size": 2, "micro_batch": 2, "rank": 4, "quietly": True}
    for init in ("default", "pissa"):
        pkt.train(tied_student_dir, None, rows, tmp_path / init, init=init, **settings)
        done = pkt.finalize(tmp_path / init, tmp_path / f"{init}-adapter")
        assert done.check is not None
        assert done.check.gap < 1e-4 * done.check.scale


def test_the_command_says_the_scale_and_its_run_is_an_ordinary_one(
    student_dir: Path, tmp_path: Path, capfd: Any
) -> None:
    data, out = ASSETS / "data" / "train.jsonl", tmp_path / "run"
    few = ("--rank", 4, "--max-steps", 2, "--batch-size", 2, "--micro-batch", 2)
    text = run("train", student_dir, data, "--out", out, *few)
    assert f"pkt finalize {out}" in text
    told = "A starts at 3 times PEFT's initialisation (--a-scale 1 is PEFT's own)"
    assert told in text + capfd.readouterr().err
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["settings"]["lora"] == {
        "init": "default",
        "rank": 4,
        "alpha": None,
        "modules": "all",
        "a_scale": 3.0,
    }
    assert manifest["start"]["kind"] == "start"
    assert "extraction" not in manifest["settings"]
    run("finalize", out, "--out", tmp_path / "adapter")
    adapter, _ = read_adapter(tmp_path / "adapter")
    assert {p.rank for p in adapter.pairs.values()} == {4}
    before, after = (
        json.loads(run("evaluate", student_dir, data, "--limit", 8, "--json", *extra))["nll"]
        for extra in ((), ("--adapter", tmp_path / "adapter"))
    )
    assert after < before
    assert "a training run (add, finished)" in run("inspect", out)
    text = run(
        "train", student_dir, data, "--out", tmp_path / "one", *few, "--a-scale", 1, "--modules", "q,v", "--alpha", 8
    )
    assert told not in text + capfd.readouterr().err
    adapter, config = read_adapter(tmp_path / "one")
    assert {m.rpartition(".")[2] for m in adapter.pairs} == {"q_proj", "v_proj"}
    assert (config["r"], config["lora_alpha"]) == (4, 8)


def test_what_no_plain_lora_can_be_is_refused_before_the_model(
    student_dir: Path, extraction_dir: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from pkt.training import run as training

    monkeypatch.setattr(training, "load_model", lambda *args: pytest.fail("the model was loaded"))
    data, out = ASSETS / "data" / "train.jsonl", tmp_path / "run"
    for flags, words in (
        (("--init", "peft"), "init='peft' is none of PEFT's initialisations; choose one of default, gaussian"),
        (("--init", "loftq"), "it replaces the base by a quantized one"),
        (("--init", "orthogonal", "--rank", 3), "needs an even rank"),
        (("--rank", 0), "rank=0 must be"),
        (("--alpha", -1), "alpha=-1.0 must be positive"),
        (("--a-scale", "nan"), "a_scale=nan must be positive"),
        (("--modules", "nothing"), "modules='nothing' chooses none"),
        (("--train-modules", "all"), "train_modules concerns an extraction"),
    ):
        assert words in fails("train", student_dir, data, "--out", out, *flags)
    assert "is a folder, not rows; after an extraction" in fails("train", student_dir, extraction_dir, "--out", out)
    for flags, words in (
        (("--rank", 16), "rank: the extraction has settled it"),
        (("--init", "pissa", "--modules", "q"), "init, modules: the extraction has settled it"),
        (("--a-scale", 3), "a_scale concerns factors that are drawn"),
    ):
        assert words in fails("train", student_dir, extraction_dir, data, "--out", out, *flags)
    assert list(tmp_path.iterdir()) == []
