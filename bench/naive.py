"""The straightforward algorithm of docs/method.md, as its authors run it; written anew, to measure pkt against.

fp32, one sample at a time, all gradients stored; a window search that visits every offset in a Python loop over a
summed-area table; full singular value decompositions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def scores(model: nn.Module, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Σ_j |θ·g_j|, one whole backward pass per sample."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for sample in samples:
        model.zero_grad()
        model(**sample, use_cache=False).loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] += (parameter.detach() * parameter.grad).abs()
    model.zero_grad()
    return total


def layer_ranking(total: dict[str, Tensor], layers: int, keep: int) -> list[int]:
    sums = [sum(float(s.double().sum()) for n, s in total.items() if f".layers.{i}." in n) for i in range(layers)]
    return sorted(sorted(range(layers), key=lambda i: -sums[i])[:keep])


def best_window(score: Tensor, rows: int, cols: int, over_numpy: bool = False) -> tuple[int, int]:
    """Every offset in a Python double loop over a summed-area table; the first in row-major order wins.

    The authors index a torch table; `over_numpy` indexes the same table as NumPy scalars, some fifteen times faster.
    """
    table: Any = torch.zeros(score.shape[0] + 1, score.shape[1] + 1, dtype=torch.float64)
    table[1:, 1:] = score.double().cumsum(0).cumsum(1)
    table = table.numpy() if over_numpy else table
    best, where = float("-inf"), (0, 0)
    for r in range(score.shape[0] - rows + 1):
        for c in range(score.shape[1] - cols + 1):
            value = table[r + rows, c + cols] - table[r, c + cols] - table[r + rows, c] + table[r, c]
            if value > best:
                best, where = value, (r, c)
    return where


def windows(
    total: dict[str, Tensor], pairs: list[tuple[str, tuple[int, int]]], over_numpy: bool = False
) -> list[tuple[int, int]]:
    return [best_window(total[name], *shape, over_numpy) for name, shape in pairs]


def factors(
    weights: dict[str, Tensor], pairs: list[Any], offsets: list[tuple[int, int]], rank: int
) -> list[tuple[Tensor, Tensor]]:
    """Full U and V of every region, of which `rank` directions are kept."""
    out = []
    for (name, (rows, cols)), (r, c) in zip(pairs, offsets, strict=True):
        u, s, vt = torch.linalg.svd(weights[name][r : r + rows, c : c + cols].float(), full_matrices=True)
        out.append((u[:, :rank] * s[:rank], vt[:rank]))
    return out
