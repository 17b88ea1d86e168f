"""The formulas of docs/method.md in plain torch and fp64, and random samples to run them on."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pkt.scoring import default_loss
from pkt.seeds import Example, Seeds

# Floors of the relative Frobenius error by dtype of the weights (docs/design.md §7).
FLOOR = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 1e-2}


def sensitivity(
    model: nn.Module, batches: list[Any], loss_fn: Any = None, measure: str = "theta_grad"
) -> dict[str, Tensor]:
    """Σ_j |θ·g_j|, or another measure, with one backward pass per sample, in fp64."""
    model = copy.deepcopy(model).double().eval()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    scores = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for batch in batches:
        for j in range(len(batch["labels"])):
            sample = {k: v[j : j + 1] for k, v in batch.items()}
            sample = {k: v.double() if v.is_floating_point() else v for k, v in sample.items()}
            model.zero_grad(set_to_none=True)
            loss = token_mean(model, sample) if loss_fn is None else loss_fn(model, sample).sum()
            loss.backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    weight, grad = parameter.detach(), parameter.grad
                    scores[name] += {
                        "theta_grad": (weight * grad).abs(),
                        "grad": grad.abs(),
                        "fisher": grad**2,
                        "theta_grad_squared": (weight * grad) ** 2,
                    }[measure]
    return scores


def token_mean(model: nn.Module, sample: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=sample["input_ids"], attention_mask=sample["attention_mask"], use_cache=False).logits
    return F.cross_entropy(logits[0, :-1], sample["labels"][0, 1:])


def token_mean_of_labels(model: nn.Module, sample: dict[str, Tensor]) -> Tensor:
    """The mean over one sample's target tokens only."""
    logits = model(input_ids=sample["input_ids"], attention_mask=sample["attention_mask"], use_cache=False).logits
    return F.cross_entropy(logits[0, :-1], sample["labels"][0, 1:], ignore_index=-100)


def checkpointed(model: Any, batch: Any) -> Tensor:
    """The default loss, every decoder layer recomputed in backward."""
    inner = [layer.forward for layer in model.model.layers]
    try:
        for layer, forward in zip(model.model.layers, inner, strict=True):
            layer.forward = functools.partial(checkpoint, forward, use_reentrant=False)
        return default_loss(model, batch)
    finally:
        for layer in model.model.layers:
            del layer.forward


def relative_error(value: Tensor, truth: Tensor) -> float:
    difference = (value.double() - truth.double()).norm().item()
    return difference / (truth.double().norm().item() or 1.0)


def token_samples(count: int, vocab: int = 67, seed: int = 0, longest: int = 20) -> list[tuple[list[int], int]]:
    """(ids, where the answer starts) of random lengths."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        size = int(torch.randint(6, longest + 1, (), generator=generator))
        ids = torch.randint(0, vocab, (size,), generator=generator).tolist()
        samples.append((ids, int(torch.randint(1, size - 2, (), generator=generator))))
    return samples


def seeds(count: int = 7, longest: int = 20, seed: int = 0) -> Seeds:
    rows = []
    for line, (ids, start) in enumerate(token_samples(count, seed=seed, longest=longest), 1):
        rows.append(Example(ids, [-100] * start + ids[start:], ids[:start], "", line))
    return Seeds(rows, "seeds.jsonl", 3)


def padded(samples: list[tuple[list[int], int]], pad: int = 3) -> dict[str, Tensor]:
    longest = max(len(ids) for ids, _ in samples)
    ids = torch.full((len(samples), longest), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (tokens, start) in enumerate(samples):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, start : len(tokens)] = torch.tensor(tokens[start:])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def batched(samples: list[tuple[list[int], int]], size: int) -> list[dict[str, Tensor]]:
    return [padded(samples[i : i + size]) for i in range(0, len(samples), size)]
