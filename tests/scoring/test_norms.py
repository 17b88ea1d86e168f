"""Norms that take no batch of vectors (Nemotron's LayerNorm1P, torch's RMSNorm); settings that differ by layer (Gemma 4)."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save
from torch import Tensor, nn

import pkt
from pkt.models import spec_of

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def nemotron(layers: int, vocab: int) -> Any:
    from transformers import NemotronConfig

    return shaken(NemotronConfig(vocab_size=vocab, num_hidden_layers=layers, head_dim=8, **SIZES))


def gemma4(layers: int, vocab: int) -> Any:
    from transformers import Gemma4TextConfig

    config = Gemma4TextConfig(
        vocab_size=vocab,
        num_hidden_layers=layers,
        head_dim=8,
        global_head_dim=16,
        vocab_size_per_layer_input=vocab,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * (layers // 2),
        sliding_window=16,
        **SIZES,
    )
    return shaken(config)


def shaken(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def by_autograd(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for batch in batches:
        model.zero_grad(set_to_none=True)
        model(**batch).loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] = total.get(name, 0) + (parameter * parameter.grad).abs().detach()
    model.zero_grad(set_to_none=True)
    return total


@pytest.mark.parametrize("made", [nemotron, gemma4])
def test_scores_are_those_of_autograd(made: Any, tokenizer: Any, seed_file: Path, tmp_path: Path) -> None:
    model = made(4, len(tokenizer))
    rows = pkt.load_seeds(seed_file, tokenizer, limit=3)
    expected = by_autograd(model, rows.batches(1))
    in_memory = pkt.sensitivity(model, rows.batches(3), progress=False)
    folder = save(model, tmp_path / "model", tokenizer)
    # Gemma 4's layers share keys and values, and take inputs of their own.
    whole = pytest.warns(pkt.PktWarning, match="is scored whole") if made is gemma4 else contextlib.nullcontext()
    with whole:
        pkt.transfer(
            folder, folder, rows, out=tmp_path / "ext", rank=2, modules="ffn", keep_scores="full", progress=False
        )
    streamed = pkt.Sensitivity.load(tmp_path / "ext" / "scores.safetensors")
    for found in (in_memory, streamed):
        for name, score in expected.items():
            torch.testing.assert_close(found[name], score, rtol=2e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_layers_that_differ_have_no_head_size(tokenizer: Any, tmp_path: Path) -> None:
    spec = spec_of(save(gemma4(4, len(tokenizer)), tmp_path / "model", tokenizer))
    assert (spec.num_layers, spec.heads, spec.head_dim) == (4, 4, None)
    assert {t.role for t in spec.targets} >= {"q", "o", "gate", "up", "down", "embed"}


class Net(nn.Module):
    """torch's own norms between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rms, self.last = nn.Linear(6, 8), nn.RMSNorm(8), nn.Linear(8, 3)
        self.norm = Plus(8)

    def forward(self, x: Tensor) -> Any:
        out: Tensor = self.last(self.norm(self.rms(self.first(x))))
        return out


class Plus(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.layer_norm(input, self.normalized_shape, self.weight + 1, self.bias, self.eps)


def test_norms_of_torchs_that_insist_on_one_vector() -> None:
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(4, 5, 6, dtype=torch.float64)

    def loss(model: Any, batch: Any) -> Tensor:
        return model(batch["x"]).square().sum((1, 2))

    found = pkt.sensitivity(model, [{"x": x}], loss_fn=loss, progress=False)
    for name, parameter in model.named_parameters():
        total = torch.zeros_like(parameter)
        for row in x.split(1):
            (gradient,) = torch.autograd.grad(loss(model, {"x": row}).sum(), parameter)
            total += (parameter * gradient).abs()
        torch.testing.assert_close(found[name].double(), total, rtol=1e-5, atol=1e-7)
