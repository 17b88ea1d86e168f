"""Training on a teacher's targets: the exact loss, by blocks of the head; and training of all weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from commands import fails, run
from conftest import ASSETS, save
from oracle import seeds
from safetensors.torch import load_file
from torch import Tensor

import pkt
from pkt.adapters import WEIGHTS
from pkt.files import MANIFEST
from pkt.models import load_model
from pkt.seeds import IGNORE, Seeds, load_seeds
from pkt.targets import FILE, Targets, file_digest
from pkt.training import run as training
from pkt.training import targets as losses
from pkt.training.targets import Distillation, SplitModel, mixed_loss, token_losses


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def rows(tokenizer: Any) -> Seeds:
    return load_seeds(ASSETS / "data" / "train.jsonl", tokenizer, limit=8)


@pytest.fixture(scope="module")
def taught(rows: Seeds, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("taught") / "targets"
    # The base is unsure of the task, so that its distributions say more than the rows do.
    pkt.teach(ASSETS / "base", rows, out=out, dtype=torch.float32, progress=False)
    return out


@pytest.fixture(scope="module")
def train(student_dir: Path, rows: Seeds) -> Any:
    def go(out: Path, extraction: Any = None, data: Any = rows, **options: Any) -> Any:
        settings: Any = {"max_steps": 4, "batch_size": 4, "micro_batch": 2, "save_steps": 2, "lr": 1e-3, **options}
        student = settings.pop("student", student_dir)
        return training.train(student, extraction, data, out, quietly=True, **settings)

    return go


def adapter(out: Path) -> dict[str, Tensor]:
    return load_file(out / WEIGHTS)


def first_loss(out: Path) -> float:
    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
    return float(state["log_history"][0]["loss"])


# -- the loss


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_the_gradient_is_exact_for_draws(mix: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 20, dtype=torch.float64, requires_grad=True)
    ids = torch.stack([torch.randperm(20)[:5] for _ in range(6)])
    counts = torch.tensor([40.0, 12.0, 8.0, 4.0, 0.0]).repeat(6, 1) / 64
    wanted = torch.randint(0, 20, (6,))
    loss = token_losses(logits, wanted, ids, counts, None, mix)
    dense = torch.zeros(6, 20, dtype=torch.float64).scatter_add_(1, ids, counts.double())
    q, one_hot = logits.softmax(1), torch.nn.functional.one_hot(wanted, 20).double()
    expected = -((1 - mix) * one_hot + mix * dense).mul(q.log()).sum(1)
    assert float((loss - expected).detach().abs().max()) < 1e-12
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert float((grad - (q - (1 - mix) * one_hot - mix * dense)).detach().abs().max()) < 1e-12


def test_the_rests_mass_is_one_bucket() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 20, dtype=torch.float64, requires_grad=True)
    p = torch.randn(6, 20, dtype=torch.float64).softmax(1)
    best = p.topk(4)
    rest = 1 - best.values.sum(1)
    loss = token_losses(logits, torch.zeros(6, dtype=torch.int64), best.indices, best.values, rest, 1.0)
    q = logits.softmax(1).gather(1, best.indices)
    expected = -(best.values * q.log()).sum(1) - rest * (1 - q.sum(1)).log()
    assert float((loss - expected).detach().abs().max()) < 1e-12
    grads = [torch.autograd.grad(value.sum(), logits, retain_graph=True)[0] for value in (loss, expected)]
    assert float((grads[0] - grads[1]).abs().max()) < 1e-12
    # Where the student is the teacher, nothing pulls it away.
    same = p.log().requires_grad_()
    loss = token_losses(same, torch.zeros(6, dtype=torch.int64), best.indices, best.values, rest, 1.0)
    assert float(torch.autograd.grad(loss.sum(), same)[0].abs().max()) < 1e-12


@pytest.mark.parametrize("top", [None, 9])
def test_a_models_gradient_is_that_of_the_whole_logits_in_fp64(
    top: int | None, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(losses.BLOCK, "cpu", 3 * zoo.VOCAB)
    given = seeds(4)
    targets = pkt.teach(zoo.gpt2_without_dropout(False), given, tokenizer=tokenizer, top=top, progress=False)
    model = zoo.llama().double().train()
    batch = Distillation(targets, 0.4, targets.places(given)).collate([(given[i], i) for i in range(4)], 3)
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.shape[-2]))
    loss = mixed_loss(model, batch, 0.4)
    found = torch.autograd.grad(loss, list(model.parameters()))
    # Every block twice: in the backward pass its logits are computed again.
    assert max(seen) <= 3
    assert len(seen) > 8

    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(2)
    mask = batch["labels"][:, 1:] != IGNORE
    q, want = logits[mask], batch["labels"][:, 1:][mask]
    taught = (batch["teacher_weights"].double() * q.gather(1, batch["teacher_ids"])).sum(1)
    if top is not None:
        named = q.exp().gather(1, batch["teacher_ids"]).sum(1)
        taught = taught + batch["teacher_rest"].double() * (1 - named).log()
    whole = -(0.6 * q.gather(1, want[:, None])[:, 0] + 0.4 * taught).sum()
    assert float(loss.detach()) == pytest.approx(float(whole.detach()), rel=1e-10)
    for mine, theirs in zip(found, torch.autograd.grad(whole, list(model.parameters())), strict=True):
        assert float((mine - theirs).abs().max()) < 1e-9 * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_every_family_is_parted_into_what_lies_below_its_head_and_the_rest(family: str) -> None:
    model, ids = zoo.model(family), torch.randint(1, 60, (2, 9))
    parted = SplitModel(model)
    hidden = parted.hidden({"input_ids": ids})
    found = parted.logits(hidden.flatten(0, 1)).view(2, 9, -1)
    assert float((found - model(input_ids=ids, use_cache=False).logits).detach().abs().max()) < 1e-5
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_a_model_that_cannot_be_parted_is_refused() -> None:
    model = zoo.llama()
    parted = SplitModel(model)
    hidden = parted.hidden({"input_ids": torch.ones(1, 3, dtype=torch.int64)})
    model.forward = lambda **given: model.lm_head(given["inputs_embeds"])
    with pytest.raises(pkt.PktError, match="cannot be parted into its head"):
        parted.logits(hidden[0])
    with pytest.raises(pkt.PktError, match="cannot be parted into its head"):
        SplitModel(zoo.MLP())


# -- runs


def test_without_a_share_of_the_teachers_the_training_is_the_usual_one(
    train: Any, taught: Path, tmp_path: Path
) -> None:
    train(tmp_path / "plain", dropout=0.0)
    train(tmp_path / "taught", dropout=0.0, teacher_targets=taught, mix=0.0)
    one, two = adapter(tmp_path / "plain"), adapter(tmp_path / "taught")
    assert all(torch.allclose(one[name], two[name], atol=2e-5) for name in one)
    train(tmp_path / "half", dropout=0.0, teacher_targets=taught, mix=0.5)
    half = adapter(tmp_path / "half")
    assert any(not torch.allclose(one[name], half[name], atol=1e-4) for name in one)


def test_step_0_is_the_student_in_every_mode_that_says_so(
    train: Any, rows: Seeds, taught: Path, extraction_dir: Path, student_dir: Path, tmp_path: Path
) -> None:
    told = Targets.load(taught)
    kept = Distillation(told, 0.5, told.places(rows))
    model, found = load_model(student_dir), {}
    order = list(range(8))
    total = float(mixed_loss(model, kept.collate([(rows[i], i) for i in order], 0), 0.5).detach()) / told.tokens
    for mode in ("paired", "residual", "add"):
        out = tmp_path / mode
        train(
            out, extraction_dir, mode=mode, dropout=0.0, teacher_targets=taught, mix=0.5, batch_size=8, micro_batch=4,
            max_steps=2, save_steps=2,
        )  # fmt: skip
        found[mode] = first_loss(out)
    assert found["paired"] == pytest.approx(total, abs=1e-3)
    assert found["residual"] == pytest.approx(total, abs=1e-3)
    assert found["add"] != pytest.approx(total, abs=1e-3)


def test_a_run_on_targets_is_resumed_and_no_other_run_goes_on_in_its_folder(
    train: Any, taught: Path, tmp_path: Path
) -> None:
    given = {"teacher_targets": taught, "mix": 0.5}
    train(tmp_path / "one", **given)
    out = tmp_path / "two"
    shutil.copytree(tmp_path / "one", out)
    manifest = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(json.dumps({**manifest, "finished": False}))
    shutil.rmtree(out / "checkpoint-4")
    with pytest.raises(pkt.PktError, match=r"is another run \(mix: 0.5 there, 0.25 here\)"):
        train(out, teacher_targets=taught, mix=0.25)
    with pytest.raises(pkt.PktError, match="is another run"):
        train(out)
    train(out, **given)
    one, two = adapter(tmp_path / "one"), adapter(out)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_does_not_belong_together_is_refused_in_one_line(
    train: Any, rows: Seeds, taught: Path, tokenizer: Any, tmp_path: Path, student_dir: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    for options, words in (
        ({"teacher_targets": taught}, "need their share of the loss"),
        ({"mix": 0.5}, r"name them too \(--teacher-targets"),
        ({"teacher_targets": taught, "mix": 1.5}, r"mix=1.5 must be from 0"),
        ({"teacher_targets": taught, "mix": -0.1}, r"mix=-0.1 must be from 0"),
        ({"teacher_targets": taught, "mix": float("nan")}, r"mix=nan must be from 0"),
        ({"teacher_targets": student_dir, "mix": 0.5}, "has no pkt.json"),
    ):
        with pytest.raises(pkt.PktError, match=words) as refused:
            train(out, **options)
        assert len(str(refused.value).splitlines()) == 1
        assert not out.exists()
    more = load_seeds(ASSETS / "data" / "train.jsonl", tokenizer, limit=9)
    with pytest.raises(pkt.PktError, match=r"train.jsonl:9: the row changed since"):
        train(out, data=more, teacher_targets=taught, mix=0.5)
    with pytest.raises(pkt.PktError, match="are of other rows"):
        train(out, data=load_seeds(ASSETS / "data" / "test.jsonl", tokenizer, limit=4), teacher_targets=taught, mix=0.5)


def changed(taught: Path, out: Path, **entries: Any) -> Path:
    shutil.copytree(taught, out)
    manifest = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(json.dumps({**manifest, **entries}))
    return out


def test_targets_of_another_tokenizer_or_a_larger_table_are_refused(
    train: Any, rows: Seeds, taught: Path, tokenizer: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    other = changed(taught, tmp_path / "other", tokenizer="another")
    with pytest.raises(pkt.PktError, match=r"another tokenizer's tokens.*pkt teach --generate"):
        train(out, teacher_targets=other, mix=0.5)
    # A student of fewer rows than the ids that were drawn.
    most = max(max(row.input_ids) for row in rows) + 1
    small = save(zoo.llama(hidden=32, layers=1, ffn=32, vocab=most), tmp_path / "small", tokenizer)
    assert Targets.load(taught).top_id >= most
    with pytest.raises(pkt.PktError, match=r"which .*small does not have"):
        train(out, student=small, teacher_targets=taught, mix=0.5)
    assert not out.exists()


def test_damaged_targets_are_refused(train: Any, taught: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(taught, bad)
    data = bytearray((bad / FILE).read_bytes())
    data[-4] ^= 1
    (bad / FILE).write_bytes(bytes(data))
    with pytest.raises(pkt.PktError, match="is damaged"):
        train(tmp_path / "out", teacher_targets=bad, mix=0.5)
    # With a checksum to match, the counts no longer sum.
    manifest = json.loads((bad / MANIFEST).read_text())
    words = bytearray((taught / FILE).read_bytes())
    words[-2] ^= 3
    (bad / FILE).write_bytes(bytes(words))
    (bad / MANIFEST).write_text(json.dumps({**manifest, "sha256": file_digest(bad / FILE)}))
    with pytest.raises(pkt.PktError, match=r"do not sum to one|beyond the vocabulary"):
        train(tmp_path / "out", teacher_targets=bad, mix=0.5)


# -- all weights


def test_full_training_learns_and_writes_a_whole_model(train: Any, rows: Seeds, taught: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "full"
    model = train(
        out,
        student=ASSETS / "descendant",
        full=True,
        teacher_targets=taught,
        mix=0.5,
        max_steps=12,
        save_steps=6,
        lr=2e-3,
    )
    manifest = json.loads((out / MANIFEST).read_text())
    assert (manifest["kind"], manifest["mode"], manifest["finished"]) == ("run", "full", True)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    # In the student's own type, though trained in fp32.
    assert loaded.dtype == torch.bfloat16
    assert load_file(out / "checkpoint-6" / "model.safetensors")["lm_head.weight"].dtype == torch.float32
    assert AutoTokenizer.from_pretrained(out).get_vocab()
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters(), strict=True))
    before, after = (pkt.training.evaluate(load_model(m), rows).nll for m in (ASSETS / "descendant", out))
    assert after < 0.7 * before
    told = json.loads(run("inspect", out, "--json"))
    assert "all weights" in told["is"]
    assert "is a model, not an adapter folder" in fails("finalize", out, "--out", tmp_path / "adapter")
    with pytest.raises(pkt.PktError, match="is a finished run"):
        train(
            out,
            student=ASSETS / "descendant",
            full=True,
            teacher_targets=taught,
            mix=0.5,
            max_steps=12,
            save_steps=6,
            lr=2e-3,
        )


def test_full_training_is_resumed_to_the_same_weights(train: Any, tmp_path: Path, capsys: Any) -> None:
    train(tmp_path / "one", full=True)
    out = tmp_path / "two"
    shutil.copytree(tmp_path / "one", out)
    manifest = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(json.dumps({**manifest, "finished": False}))
    (out / "model.safetensors").unlink()
    weights = out / "checkpoint-4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    train(out, full=True)
    assert "checkpoint-4 is incomplete and left aside" in capsys.readouterr().err
    one, two = (load_file(folder / "model.safetensors") for folder in (tmp_path / "one", out))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_full_training_keeps_the_best_of_held_out_rows(train: Any, rows: Seeds, tokenizer: Any, tmp_path: Path) -> None:
    held_out = load_seeds(ASSETS / "data" / "test.jsonl", tokenizer, limit=4)
    model = train(tmp_path / "out", full=True, held_out=held_out, eval_steps=2)
    best = json.loads((tmp_path / "out" / MANIFEST).read_text())["held_out"]["best"]
    assert pkt.training.evaluate(model, held_out).nll == pytest.approx(best["nll"], abs=1e-4)
    assert not list((tmp_path / "out").glob("best-*"))


def test_full_training_takes_nothing_that_concerns_a_lora(train: Any, extraction_dir: Path, tmp_path: Path) -> None:
    for options in (
        {"mode": "add"}, {"dropout": 0.1}, {"rank": 4}, {"alpha": 2.0}, {"init": "pissa"}, {"modules": "ffn"}, {"a_scale": 3.0},
        {"train_modules": "all"},
    ):  # fmt: skip
        with pytest.raises(pkt.PktError, match=f"{next(iter(options))}: of a LoRA; full training has none"):
            train(tmp_path / "out", full=True, **options)
    with pytest.raises(pkt.PktError, match="full training takes no extraction or start"):
        train(tmp_path / "out", extraction_dir, full=True)
    assert list(tmp_path.iterdir()) == []


def test_the_command_from_teacher_to_model_on_the_demos_models(tmp_path: Path) -> None:
    rows = tmp_path / "train.jsonl"
    rows.write_text("\n".join((ASSETS / "data" / "train.jsonl").read_text().splitlines()[:12]) + "\n")
    run("teach", ASSETS / "teacher", rows, "--out", tmp_path / "targets", "--device", "cpu")
    common = ["--max-steps", 2, "--batch-size", 6, "--report-to", "none"]
    taught = ["--teacher-targets", tmp_path / "targets", "--mix", 0.5]
    said = run("train", ASSETS / "descendant", rows, "--out", tmp_path / "lora", *taught, *common)
    assert "pkt finalize" in said
    said = run("train", ASSETS / "descendant", rows, "--full", "--out", tmp_path / "full", *taught, *common)
    assert "pkt evaluate" in said
    assert "NLL" in run("evaluate", tmp_path / "full", rows, "--device", "cpu")
    # The stranger has the same tokenizer.
    run("train", ASSETS / "student", rows, "--out", tmp_path / "stranger", *taught, *common)
    assert "--mix 0.5 is usual" in fails("train", ASSETS / "student", rows, "--out", tmp_path / "x", *taught[:2])
