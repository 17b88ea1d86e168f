"""Every setting of `pkt train`: what it does to the run, that a resumed run ends the same, and what is refused."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import fails
from conftest import ASSETS, write_rows
from safetensors.torch import load_file

import pkt
from pkt.adapters import WEIGHTS, read_adapter
from pkt.extraction import Extraction
from pkt.files import MANIFEST
from pkt.lora import load_with_adapter
from pkt.models import load_model
from pkt.options import RECIPES, Lora, Recipe, Training
from pkt.seeds import Seeds, load_seeds
from pkt.training import evaluate, fit
from pkt.training import run as training
from pkt.training.finite import ByLength, FiniteTrainer

FEW: Any = {"max_steps": 6, "batch_size": 2, "micro_batch": 2, "save_steps": 2, "lr": 1e-3, "quietly": True}


@pytest.fixture(scope="module")
def rows(tokenizer: Any) -> Seeds:
    return load_seeds(ASSETS / "data" / "train.jsonl", tokenizer, limit=10)


@pytest.fixture(scope="module")
def others(tokenizer: Any) -> Seeds:
    return load_seeds(ASSETS / "data" / "test.jsonl", tokenizer, limit=4)


@pytest.fixture(scope="module")
def attention(extraction_dir: Path) -> Extraction:
    """The extraction's pairs of q and v alone."""
    whole = Extraction.load(extraction_dir)
    whole.pairs = {m: p for m, p in whole.pairs.items() if m.endswith(("q_proj", "v_proj"))}
    return whole


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(run / WEIGHTS)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"extraction": None, "rank": 4},
        {"extraction": None, "rank": 4, "init": "pissa"},
        {"extraction": None, "rank": 4, "init": "eva", "dropout": 0.0},
        {"recipe": "paper"},
        {"train_modules": "all"},
        {"group_by_length": True, "report_to": "none"},
        {"held_out": True, "eval_steps": 1, "lr": 0.05},
        {"held_out": True, "eval_steps": 3, "micro_batch": 1},
    ],
    ids=str,
)
def test_a_stopped_run_ends_as_an_undisturbed_one(
    student_dir: Path,
    attention: Extraction,
    rows: Seeds,
    others: Seeds,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:
    def run(name: str) -> Path:
        given = {"extraction": attention, **FEW, **options}
        if "held_out" in given:
            given["held_out"] = others
        pkt.train(student_dir, given.pop("extraction"), rows, tmp_path / name, **given)
        return tmp_path / name

    whole, plain = run("whole"), FiniteTrainer.training_step

    def step(self: Any, *args: Any, **more: Any) -> Any:
        if self.state.global_step == 4 and not monkeypatch_done:
            monkeypatch_done.append(True)
            raise KeyboardInterrupt
        return plain(self, *args, **more)

    monkeypatch_done: list[bool] = []
    monkeypatch.setattr(FiniteTrainer, "training_step", step)
    with pytest.raises(KeyboardInterrupt):
        run("stopped")
    stopped = run("stopped")
    assert (whole / WEIGHTS).read_bytes() == (stopped / WEIGHTS).read_bytes()
    assert (whole / MANIFEST).read_text() == (stopped / MANIFEST).read_text()
    assert not list(stopped.glob("best-*"))


def test_what_a_default_run_records_is_what_it_was(
    student_dir: Path, extraction_dir: Path, rows: Seeds, tmp_path: Path
) -> None:
    pkt.train(student_dir, extraction_dir, rows, tmp_path / "run", **FEW)
    manifest = json.loads((tmp_path / "run" / MANIFEST).read_text())
    names = "mode epochs batch_size lr dropout warmup scheduler max_steps seed data extraction student"
    assert list(manifest["settings"]) == names.split()
    names = "format kind mode student settings plan given versions finished train_loss"
    assert list(manifest) == names.split()
    assert manifest["settings"]["warmup"] == 0.0
    assert manifest["mode"] == "paired"


def test_flags_and_arguments_are_the_options_fields() -> None:
    parameters = inspect.signature(pkt.train).parameters
    for subject, said in ((Training, True), (Recipe, False), (Lora, False)):
        for name, field in subject.__dataclass_fields__.items():
            if subject is Training and name in Recipe.__dataclass_fields__:
                continue
            assert parameters[name].default == (field.default if said else None), name


def test_gradient_checkpointing_computes_layers_twice_and_changes_nothing(
    student_dir: Path, extraction_dir: Path, rows: Seeds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls: list[int] = []
    plain = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: calls.append(1) or plain(self, x))
    counts = []
    for wanted in (False, True):
        calls.clear()
        pkt.train(student_dir, extraction_dir, rows, tmp_path / f"{wanted}", gradient_checkpointing=wanted, **FEW)
        counts.append(len(calls))
    assert counts[1] == 2 * counts[0]
    one, two = (adapter_of(tmp_path / f"{wanted}") for wanted in (False, True))
    assert all(torch.allclose(one[key], two[key], atol=1e-6) for key in one)


def test_rows_of_like_lengths_come_together(student_dir: Path, tokenizer: Any, tmp_path: Path) -> None:
    words = [" ".join(["stones"] * n) for n in (1, 9, 2, 8, 3, 7, 4, 6)]
    texts = load_seeds(write_rows(tmp_path / "rows.jsonl", *({"text": text} for text in words)), tokenizer)
    lengths = [len(e.input_ids) for e in texts]
    seen: dict[bool, list[int]] = {}
    for together in (False, True):
        model, widths = load_model(student_dir), []
        model.register_forward_pre_hook(
            lambda _, args, given, w=widths: w.append(given["input_ids"].shape[1]), with_kwargs=True
        )
        options = Training(2.0, 4, 2, lr=1e-4, save_steps=None, group_by_length=together)
        fit(model, texts, tmp_path / f"{together}", options, quietly=True)
        seen[together] = widths
    assert len(seen[True]) == len(seen[False]) == 8
    assert sum(seen[True]) < sum(seen[False])
    sampler = ByLength(lengths, 4, seed=1)
    first = list(sampler)
    sampler.set_epoch(1)
    assert sorted(first) == sorted(sampler) == list(range(8))
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_the_best_weights_are_what_a_run_ends_with(
    student_dir: Path, rows: Seeds, others: Seeds, tmp_path: Path
) -> None:
    # At this rate the second step is better than the start, and the last ones are worse.
    options = {**FEW, "lr": 0.3, "scheduler": "constant", "rank": 4}
    pkt.train(student_dir, None, rows, tmp_path / "run", held_out=others, eval_steps=2, **options)
    found = json.loads((tmp_path / "run" / MANIFEST).read_text())["held_out"]
    looks, best = dict(found["looks"]), found["best"]
    assert list(looks) == [0, 2, 4, 6]
    assert best["nll"] == min(looks.values()) == looks[best["step"]]
    assert best["step"] == 2
    assert looks[0] == pytest.approx(evaluate(load_model(student_dir), others).nll, rel=1e-5)
    pkt.finalize(tmp_path / "run", tmp_path / "adapter")
    for folder in (tmp_path / "adapter", tmp_path / "run"):
        assert evaluate(load_with_adapter(student_dir, folder), others).nll == pytest.approx(best["nll"], rel=1e-5)
    # Looking changes nothing: without it the same steps give the weights of the last one.
    pkt.train(student_dir, None, rows, tmp_path / "blind", **options)
    assert evaluate(load_with_adapter(student_dir, tmp_path / "blind"), others).nll == pytest.approx(looks[6], rel=1e-5)


def test_all_modules_learn_beside_the_extracted_ones(
    student_dir: Path, attention: Extraction, rows: Seeds, tmp_path: Path
) -> None:
    pkt.train(student_dir, attention, rows, tmp_path / "two", **FEW)
    pkt.train(student_dir, attention, rows, tmp_path / "nine", train_modules="all", a_scale=1.0, **FEW)
    two, nine = (read_adapter(tmp_path / name)[0].pairs for name in ("two", "nine"))
    assert set(two) == set(attention.pairs)
    assert {m.rpartition(".")[2] for m in nine} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head")
    }
    for module, pair in nine.items():
        # Each pair is [B, −B₀][A; A₀]: what was extracted starts where it did, the others from B₀A₀ = 0.
        assert pair.rank == 2 * attention.rank
        if module in attention.pairs:
            torch.testing.assert_close(pair.A[4:], attention.pairs[module].A)
        else:
            assert not (pair.B[:, 4:] @ pair.A[4:]).any()
        assert float(pair.delta().abs().max()) > 0
    done = pkt.finalize(tmp_path / "nine", tmp_path / "adapter")
    assert set(done.pairs) == set(nine)


def test_the_papers_recipe(student_dir: Path, attention: Extraction, tmp_path: Path, tokenizer: Any) -> None:
    turns = [("user", " How many? "), ("assistant", "3"), ("user", "Sure?"), ("assistant", " 4\n")]
    file = write_rows(tmp_path / "rows.jsonl", {"messages": [{"role": r, "content": c} for r, c in turns]})
    (example,) = load_seeds(file, tokenizer, loss="last", template="paper")
    end = tokenizer.eos_token
    text = f"<|user|>\nHow many?\n\n<|assistant|>\n3\n\n<|user|>\nSure?\n\n<|assistant|>\n4\n\n{end}"
    assert tokenizer.decode(example.input_ids, skip_special_tokens=False).endswith(text)
    learnt = [token for token in example.labels if token != -100]
    assert tokenizer.decode(learnt, skip_special_tokens=False) == f"4\n\n{end}"
    (both,) = load_seeds(file, tokenizer, template="paper")
    assert tokenizer.decode([t for t in both.labels if t != -100], skip_special_tokens=False) == f"3\n\n4\n\n{end}"
    few = {name: value for name, value in FEW.items() if name != "lr"}
    pkt.train(student_dir, attention, file, tmp_path / "run", recipe="paper", **few)
    manifest = json.loads((tmp_path / "run" / MANIFEST).read_text())
    settings = manifest["settings"]
    assert (manifest["recipe"], manifest["mode"]) == ("paper", "residual")
    theirs = {
        "lr": 3e-4,
        "dropout": 0.05,
        "warmup": 0.03,
        "train_modules": "all",
        "a_scale": 1.0,
        "scheduler": "linear",
    }
    assert {name: settings[name] for name in theirs} == theirs
    assert settings["data"] == Seeds([example], "", 0).fingerprint
    assert len(read_adapter(tmp_path / "run")[0].pairs) == 16
    assert len(pkt.finalize(tmp_path / "run", tmp_path / "adapter").pairs) == 16
    said: Any = {"mode": "paired", "warmup": 0.0, "train_modules": "extracted", "loss": "answer", "lr": 1e-3}
    pkt.train(student_dir, attention, file, tmp_path / "said", recipe="paper", **few, **said)
    settings = json.loads((tmp_path / "said" / MANIFEST).read_text())["settings"]
    assert (settings["mode"], settings["warmup"], settings["lr"]) == ("paired", 0.0, 1e-3)
    assert "train_modules" not in settings
    assert settings["data"] == Seeds([both], "", 0).fingerprint


@torch.no_grad()
def test_only_the_papers_start_moves_under_dropout(student_dir: Path, extraction_dir: Path) -> None:
    ids = torch.tensor([[5, 9, 17, 30, 2, 8]])
    student = load_model(student_dir)(ids).logits
    gaps = {}
    for mode in ("paired", "residual"):
        torch.manual_seed(0)
        model = pkt.inject(load_model(student_dir), extraction_dir, mode=mode, dropout=0.05)
        gaps[mode] = float((model.train()(ids).logits - student).abs().max())
    assert gaps["paired"] < 1e-4
    assert gaps["residual"] > 1e-2


def test_every_recipe_settles_what_it_must() -> None:
    for name, recipe in RECIPES.items():
        unsettled = {field for field, value in vars(recipe).items() if value is None}
        assert unsettled == ({"mode", "lr"} if name == "pkt" else set())
    assert Recipe(warmup=0.5).over("paper") == Recipe("residual", 3e-4, 0.5, True, "all", 1.0, "last", "paper")


def test_where_it_reports_to(student_dir: Path, extraction_dir: Path, rows: Seeds, tmp_path: Path) -> None:
    pkt.train(student_dir, extraction_dir, rows, tmp_path / "none", report_to="none", **FEW)
    assert not (tmp_path / "none" / "logs").exists()
    pkt.train(student_dir, extraction_dir, rows, tmp_path / "logs", report_to="tensorboard", **FEW)
    assert list((tmp_path / "logs" / "logs").rglob("events.*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU does")
def test_a_cpu_trains_in_bf16(student_dir: Path, extraction_dir: Path, rows: Seeds, tmp_path: Path) -> None:
    """With other weights than in fp32, near them."""
    found = []
    for precision in ("bf16", "fp32"):
        model = pkt.train(student_dir, extraction_dir, rows, tmp_path / precision, **FEW, precision=precision)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
    assert found[0].dtype == torch.float32
    assert not torch.equal(*found)
    assert torch.allclose(*found, atol=1e-2)


def test_impossible_settings_are_refused_before_the_model(
    student_dir: Path, extraction_dir: Path, rows: Seeds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "load_model", lambda *args: pytest.fail("the model was loaded"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    data = shutil.copy(ASSETS / "data" / "train.jsonl", tmp_path / "rows.jsonl")
    for flags, words in (
        (("--report-to", "papyrus"), "report_to='papyrus' is unknown; choose of"),
        (("--report-to", "tensorboard,wandb"), "report_to='wandb': its package cannot be imported; pip install wandb"),
        (("--precision", "fp16"), "precision='fp16' needs a GPU"),
        (("--held-out", data), "every row of"),
        (("--held-out", tmp_path / "no.jsonl"), "no.jsonl does not exist"),
        (("--eval-steps", 5), "eval_steps concerns held-out rows"),
        (("--held-out", ASSETS / "data" / "test.jsonl", "--eval-steps", 0), "eval_steps=0 must be at least 1"),
        (("--a-scale", 0, "--train-modules", "all"), "a_scale=0.0 must be positive"),
    ):
        assert words in fails("train", student_dir, extraction_dir, data, "--out", tmp_path / "run", *flags)
    for options, words in (
        ({"recipe": "mine"}, "recipe='mine' is unknown; choose one of pkt, paper"),
        ({"loss": "first"}, "loss='first' is unknown"),
        ({"template": "none"}, "template='none' is unknown"),
        ({"train_modules": "some"}, "train_modules='some' is unknown"),
        ({"precision": "fp8"}, "precision='fp8' is unknown"),
    ):
        with pytest.raises(pkt.PktError, match=words):
            pkt.train(student_dir, extraction_dir, rows, tmp_path / "run", **FEW, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]
