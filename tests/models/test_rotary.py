"""Rotary frequencies that follow the row's length: each row has the loss that it has alone in a model that has read nothing."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save

import pkt
from pkt.models import rows_apart, spec_of
from pkt.options import Training
from pkt.seeds import Seeds
from pkt.starting.run import linear_layers
from pkt.starting.statistics import mean_gradients
from pkt.training import evaluate, fit
from pkt.training.evaluation import generate

ROPES: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [2.0, 3.0, 5.0, 9.0],
        "original_max_position_embeddings": 16,
        "factor": 4.0,
    },
}


@pytest.fixture(params=ROPES)
def model(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        rope_parameters={"rope_theta": 100.0, **ROPES[request.param]},
    )
    made = LlamaForCausalLM(config).eval()
    for parameter in made.parameters():
        parameter.data.add_(0.4 * torch.randn_like(parameter))
    return made


@pytest.fixture
def rows(tmp_path: Path, tokenizer: Any) -> Seeds:
    """Rows of other lengths, on both sides of what the frequencies were made for: the longest comes first."""
    texts = ["1 2 3 4 5 6 7 8 9 " * 4, "9 8 7 6 5 4 3 2 1 " * 2, "1 2 3 4 5 6", "7 7 7 7"]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n")
    found = pkt.load_seeds(tmp_path / "rows.jsonl", tokenizer)
    lengths = [len(row.input_ids) for row in found]
    assert lengths[0] > lengths[1] > 16 > lengths[2]
    return found


def alone(model: Any, rows: Seeds) -> list[float]:
    """The loss of each row in a model of its own."""
    return [float(copy.deepcopy(model)(**batch).loss.detach()) for batch in rows.batches(1)]


def test_a_loss_is_the_rows_own_whatever_came_before(model: Any, rows: Seeds, tokenizer: Any, tmp_path: Path) -> None:
    expected = alone(model, rows)
    plain = [float(model(**batch).loss.detach()) for batch in rows.batches(1)]
    if model.config.rope_parameters["rope_type"] == "dynamic":
        assert plain != pytest.approx(expected, rel=2e-5), "transformers' own state is no fault any more"
    for size in (1, 2, 4):
        assert pkt.sensitivity(model, rows.batches(size), progress=False).losses == pytest.approx(expected, rel=1e-5)
    tokens = [len(row.input_ids) - 1 for row in rows]
    mean = sum(loss * n for loss, n in zip(expected, tokens, strict=True)) / sum(tokens)
    assert evaluate(model, rows).nll == pytest.approx(mean, rel=1e-5)
    folder = save(model, tmp_path / "model", tokenizer)
    ext = pkt.transfer(folder, folder, rows, out=tmp_path / "ext", rank=2, keep_scores="full", progress=False)
    assert ext.provenance["losses"] == pytest.approx(expected, rel=1e-5)
    streamed = pkt.Sensitivity.load(tmp_path / "ext" / "scores.safetensors")
    resident = pkt.sensitivity(model, rows.batches(1), progress=False)
    for name in resident:
        torch.testing.assert_close(streamed[name], resident[name], rtol=1e-3, atol=1e-6)


def test_the_scores_are_those_of_plain_autograd_row_by_row(model: Any, rows: Seeds) -> None:
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in rows.batches(1):
        one = copy.deepcopy(model)
        one(**batch).loss.backward()
        for name, parameter in one.named_parameters():
            total[name] += (parameter * parameter.grad).abs().detach()
    found = pkt.sensitivity(model, rows.batches(4), progress=False)
    for name, expected in total.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-6)


def test_training_reads_each_row_as_it_is_alone(model: Any, rows: Seeds, tmp_path: Path) -> None:
    expected = alone(model, rows)
    tokens = [len(row.input_ids) - 1 for row in rows]
    mean = sum(loss * n for loss, n in zip(expected, tokens, strict=True)) / sum(tokens)
    options = Training(max_steps=1, batch_size=4, micro_batch=4, save_steps=None)
    assert fit(model, rows, tmp_path, options, quietly=True) == pytest.approx(mean, rel=1e-3)


def test_generation_is_each_prompts_own(model: Any, rows: Seeds, tokenizer: Any) -> None:
    from dataclasses import replace

    prompts = [replace(row, prompt_ids=row.input_ids) for row in rows]
    together = generate(model, tokenizer, prompts, batch_size=4, max_new_tokens=6)
    each = [generate(copy.deepcopy(model), tokenizer, [p], batch_size=1, max_new_tokens=6)[0] for p in prompts]
    assert together == each


def test_the_model_is_left_as_it_was(model: Any, rows: Seeds) -> None:
    rotary = model.model.rotary_emb
    before = dict(vars(rotary)), {name: buffer.clone() for name, buffer in rotary._buffers.items()}
    with rows_apart(model), rows_apart(model):
        model(**rows.batches(4)[0])
    assert "forward" not in vars(rotary)
    assert rotary.max_seq_len_cached == before[0]["max_seq_len_cached"]
    assert all(torch.equal(rotary._buffers[name], buffer) for name, buffer in before[1].items())
    assert not model._forward_pre_hooks
    assert not model.model._forward_pre_hooks


def test_the_gradient_of_a_start_is_of_rows_apart(model: Any, rows: Seeds) -> None:
    targets = linear_layers(spec_of(model))
    together, loss = mean_gradients(model, targets, rows, batch_size=4, progress=False)
    alone = [mean_gradients(copy.deepcopy(model), targets, Seeds([row], "", 0), progress=False) for row in rows]
    assert loss == pytest.approx(sum(each for _, each in alone) / len(rows), rel=1e-5)
    for name, found in together.items():
        expected = sum(gradients[name] for gradients, _ in alone) / len(rows)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
