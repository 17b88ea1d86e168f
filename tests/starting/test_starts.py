"""Starts that need no teacher: each against its formula in plain torch, and what a folder of one is good for."""

from __future__ import annotations

import contextlib
import copy
import math
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import zoo
from commands import fails, run
from conftest import write_rows
from torch import Tensor, nn

import pkt
from pkt.models import load_model, load_tokenizer, spec_of
from pkt.starting import best_scale, rows_for, scale, tried
from pkt.starting.run import linear_layers
from pkt.starting.statistics import input_covariances, mean_gradients

HOWS = ("lora", "pissa", "lora-ga", "eva", "spectral")


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> pkt.Seeds:
    """Short rows of several lengths."""
    words = [
        "the",
        "boy",
        "has",
        "three",
        "apples",
        "and",
        "buys",
        "two",
        "more",
        "so",
        "now",
        "he",
        "has",
        "five",
        "of",
        "them",
    ]
    given = [
        {"prompt": " ".join(words[: 3 + i]), "completion": " " + " ".join(words[3 + i : 5 + 2 * i])} for i in range(5)
    ]
    return pkt.load_seeds(write_rows(tmp_path_factory.mktemp("rows") / "few.jsonl", *given), tokenizer, max_length=60)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    if request.param == "llama":
        return zoo.llama(hidden=32, layers=2, heads=4, kv=2, ffn=64, vocab=len(tokenizer))
    return zoo.gpt2(vocab=len(tokenizer))


def layers_of(model: Any) -> Any:
    return linear_layers(spec_of(model))


def weight(model: Any, target: Any) -> Tensor:
    return target.oriented(model.get_parameter(target.parameter).detach())


def gradients(model: Any, few: pkt.Seeds) -> tuple[dict[str, Tensor], float]:
    """By autograd, one sample at a time, in fp64."""
    twin = copy.deepcopy(model).double()
    losses = []
    for batch in few.batches(1):
        losses.append(oracle.token_mean_of_labels(twin, batch))
        (losses[-1] / len(few)).backward()
    found = {t.module: t.oriented(twin.get_parameter(t.parameter).grad) for t in layers_of(twin)}
    return found, float(sum(losses) / len(losses))


def test_gradients_and_covariances(model: Any, few: pkt.Seeds) -> None:
    before = {n: (p.requires_grad, p.grad, p.detach().clone()) for n, p in model.named_parameters()}
    expected, loss = gradients(model, few)
    found, mean = mean_gradients(model, layers_of(model), few, batch_size=3, progress=False)
    assert mean == pytest.approx(loss, rel=1e-5)
    assert all(oracle.relative_error(found[n], g) <= 1e-5 for n, g in expected.items())
    target = layers_of(model)[0]
    seen: list[Tensor] = []
    handle = model.get_submodule(target.module).register_forward_pre_hook(
        lambda _, args: seen.append(args[0][0].double())
    )
    with torch.no_grad():
        for batch in few.batches(1):
            model(input_ids=batch["input_ids"])
    handle.remove()
    covariance = input_covariances(model, layers_of(model), few, batch_size=3, progress=False)[target.module]
    assert oracle.relative_error(covariance, torch.cov(torch.cat(seen).t(), correction=0)) <= 1e-5
    for n, p in model.named_parameters():
        assert (p.requires_grad, p.grad) == before[n][:2]
        assert torch.equal(p, before[n][2])


@pytest.mark.parametrize("how", HOWS)
def test_each_by_its_formula(model: Any, few: pkt.Seeds, how: Any) -> None:
    rank = 4
    made = pkt.start(model, few, how=how, rank=rank, a_scale=3.0, progress=False)
    again = pkt.start(model, few, how=how, rank=rank, a_scale=3.0, progress=False)
    targets = layers_of(model)
    assert list(made.pairs) == [t.module for t in targets]
    steps = set()
    for target in targets:
        pair, w = made.pairs[target.module], weight(model, target).double()
        assert torch.equal(pair.A, again.pairs[target.module].A)
        assert torch.equal(pair.B, again.pairs[target.module].B)
        out, width = target.shape
        delta = pair.B.double() @ pair.A.double()
        if how == "lora":
            assert not pair.B.any()
            assert float(pair.A.abs().max()) <= 3 / math.sqrt(width)
            assert float(pair.A.std()) == pytest.approx(3 / math.sqrt(3 * width), rel=0.25)
        elif how == "pissa":
            u, s, vh = torch.linalg.svd(w)
            best = (u[:, :rank] * s[:rank]) @ vh[:rank]
            # The same energy as the best of this rank, whose directions a flat spectrum leaves open.
            assert float((w - delta).norm()) <= 1.01 * float((w - best).norm())
        elif how == "eva":
            axes = pair.A.double() / 3
            assert torch.allclose(axes @ axes.t(), torch.eye(rank, dtype=torch.float64), atol=1e-5)
            covariance = input_covariances(model, [target], few, progress=False)[target.module]
            held = float((axes @ covariance @ axes.t()).trace())
            assert held == pytest.approx(float(torch.linalg.eigvalsh(covariance)[-rank:].sum()), rel=1e-5)
        else:
            grad = gradients(model, few)[0][target.module]
            u, _, vh = torch.linalg.svd(grad)
            if how == "lora-ga":
                c = out**0.25 / 4
                # Of the gradient's 2r leading directions, up to what separates two that are nearly as large.
                assert pair.A.shape[0] == rank
                assert oracle.relative_error(pair.A.double() @ pair.A.double().t(), c * c * torch.eye(rank)) <= 1e-4
                assert oracle.relative_error(pair.B.double().t() @ pair.B.double(), c * c * torch.eye(rank)) <= 1e-4
                assert float((pair.A.double() @ vh[: 2 * rank].t()).norm() / pair.A.norm()) >= 0.98
                assert float((pair.B.double().t() @ u[:, : 2 * rank]).norm() / pair.B.norm()) >= 0.98
                # A takes the leading ones and B those after them: together they hold none of each other.
                energy = (grad @ pair.A.double().t()).norm() / c
                assert float(energy) >= float((pair.B.double().t() @ grad).norm() / c)
            else:
                sizes = torch.linalg.svdvals(delta)[:rank]
                assert float(sizes[-1]) == pytest.approx(float(sizes[0]), rel=1e-4)
                steps.add(round(float(sizes[0]) / math.sqrt(max(1.0, out / width)), 7))
                assert float((delta * grad).sum()) < 0
                assert -float((delta * grad).sum()) >= 0.97 * float(sizes[0] * torch.linalg.svdvals(grad)[:rank].sum())
    if how == "spectral":
        assert max(steps) - min(steps) <= 1e-4 * max(steps)  # one α for all


@pytest.mark.parametrize(
    ("lowest", "more", "end"),
    [(0.0, "", False), (1.0, "", False), (1.4, " 2", False), (2.9, " 2 3 4", False), (9, " 2 3 4", True)],
)
def test_the_scale_is_sought_as_far_as_the_loss_falls(
    lowest: float, more: str, end: bool, few: pkt.Seeds, monkeypatch: pytest.MonkeyPatch
) -> None:
    at: list[float] = []

    def added(model: Any, pairs: Any, alpha: float, vectors: Any) -> Any:
        at.append(alpha)
        return contextlib.nullcontext()

    monkeypatch.setattr(scale, "added", added)
    monkeypatch.setattr(scale, "mean_loss", lambda *_: (at[-1] - lowest) ** 2)
    best, losses = best_scale(zoo.gpt2(), {}, few, also=0.3, progress=False)
    assert best == min(at, key=lambda a: abs(a - lowest))
    assert list(losses) == f"0 0.25 0.3 0.5 0.75 1 1.5{more}".split()
    assert all(losses[a] == (float(a) - lowest) ** 2 for a in losses)
    assert ("the largest is the best" in tried(losses)) == end


@pytest.mark.parametrize("how", HOWS)
def test_a_folder_is_trained_and_finalized_as_any(how: Any, student_dir: Path, seed_file: Path, tmp_path: Path) -> None:
    text = run("start", student_dir, seed_file, "--how", how, "--rank", 4, "--out", tmp_path / "start")
    assert "pkt train" in text
    made = pkt.Start.load(tmp_path / "start")
    plain, model = load_model(student_dir), pkt.inject(student_dir, tmp_path / "start")
    batch = rows_for(seed_file, student_dir, None).batches(2)[0]
    with torch.no_grad():
        apart = (model(**batch).logits - plain(**batch).logits).abs().max()
        lower = model(**batch).loss < plain(**batch).loss
    if how == "spectral":
        assert made.mode == "add"
        assert "kept" in text
        assert "; tried 0, " in text
        assert lower
    else:
        assert apart <= 1e-4
        assert "neutral" in text
    pkt.finalize(model, tmp_path / "adapter")
    assert "a start" in run("inspect", tmp_path / "start")


def test_what_is_refused(student_dir: Path, seed_file: Path, tmp_path: Path, tokenizer: Any) -> None:
    out = tmp_path / "out"
    for how in ("lora-ga", "eva", "spectral"):
        assert "give the seeds" in fails("start", student_dir, "--how", how, "--out", out)
    assert "rank=0" in fails("start", student_dir, "--rank", 0, "--out", out)
    assert "a_scale" in fails("start", student_dir, "--a-scale", "nan", "--out", out)
    with pytest.raises(pkt.PktError, match="how='lorax' is unknown"):
        pkt.start(student_dir, how="lorax")  # type: ignore[arg-type]
    with pytest.raises(pkt.PktError, match="needs its tokenizer"):
        pkt.start(load_model(student_dir), seed_file, how="eva")
    with pytest.raises(pkt.PktError, match="no linear layer"):
        pkt.start(nn.Linear(4, 4))
    broken = load_model(student_dir)
    broken.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(pkt.PktError, match="not finite"):
        pkt.start(broken, seed_file, how="spectral", tokenizer=load_tokenizer(student_dir))
    assert not out.exists()
