"""Starts of a LoRA that need no teacher, each with its authors' formulas.

All are for W [out, in] and rank r, and give the factors of ΔW = B A; what is neutral is subtracted again, so that step 0 is the
student.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pkt.adapters import Pair
from pkt.extraction.factorization import factorize_all
from pkt.files import sha256
from pkt.models import Target
from pkt.options import Factorization

STABLE_GAMMA = 16.0
# The share of the loss that a first step of 1 would take away if the model were linear, which is about the best step's size.
FIRST_STEP = 1.5
STEPS = (0.0, 0.25, 0.5, 1.0, 2.0)
BEYOND = (3.0, 4.0)

Pairs = dict[str, Pair]


def plain(targets: Sequence[Target], rank: int, a_scale: float, seed: int) -> Pairs:
    """LoRA (Hu et al., 2021): A uniform in ±1/√in, as PEFT draws it, times `a_scale`; B = 0."""
    found = {}
    for target in targets:
        out, width = target.shape
        generator = torch.Generator().manual_seed(int(sha256(f"{seed} {target.module}")[:15], 16))
        bound = a_scale / math.sqrt(width)
        a = torch.empty(min(rank, *target.shape), width).uniform_(-bound, bound, generator=generator)
        found[target.module] = Pair(a, torch.zeros(out, a.shape[0]), target.kind)
    return found


def pissa(model: nn.Module, targets: Sequence[Target], rank: int, seed: int) -> Pairs:
    """PiSSA (Meng et al., 2024): B = U√Σ, A = √ΣVᵀ of W's own r leading directions; neutral."""
    weights = {t.module: t.oriented(model.get_parameter(t.parameter).detach()) for t in targets}
    return _factors(targets, weights, rank, Factorization(split="sqrt", seed=seed))


def lora_ga(gradients: Mapping[str, Tensor], targets: Sequence[Target], rank: int, seed: int) -> Pairs:
    """LoRA-GA (Wang et al., 2024) as its authors' code does it: A = c·V₁..ᵣᵀ and B = c·Uᵣ₊₁..₂ᵣ of the gradient; neutral.

    c = out^¼ / √γ with γ = 16, the authors' "stable" scale. A matrix with fewer than 2r directions gets half of what it has.
    """
    double = _factors(targets, gradients, 2 * rank, Factorization(split="b", seed=seed))
    found = {}
    for name, both in double.items():
        r, c = both.rank // 2, both.B.shape[0] ** 0.25 / math.sqrt(STABLE_GAMMA)
        u = both.B / both.B.norm(dim=0).clamp_min(torch.finfo(both.B.dtype).tiny)
        found[name] = Pair(c * both.A[:r], (c * u[:, r : 2 * r]).contiguous(), both.kind)
    return found


def eva(covariances: Mapping[str, Tensor], targets: Sequence[Target], rank: int, a_scale: float) -> Pairs:
    """EVA (Paischer et al., 2024) at one rank: A's rows are the r leading principal axes of the inputs × `a_scale`; B = 0."""
    found = {}
    for target in targets:
        r = min(rank, *target.shape)
        _, axes = torch.linalg.eigh(covariances[target.module])
        a = axes[:, -r:].flip(1).t()
        # An eigenvector has two signs: the largest entry is positive.
        a = a * a.gather(1, a.abs().argmax(1, keepdim=True)).sign()
        found[target.module] = Pair((a_scale * a).float().contiguous(), torch.zeros(target.shape[0], r), target.kind)
    return found


def spectral(
    gradients: Mapping[str, Tensor], loss: float, targets: Sequence[Target], rank: int, a_scale: float, seed: int
) -> tuple[Pairs, float]:
    """(pairs, α₀) of a step of equal size in the gradient's r leading directions: ΔW = −α √max(1, out/in) U Vᵀ; kept.

    α₀ = 1.5 · loss / Σ √max(1, out/in) σ₁..ᵣ over all matrices; the pairs are those at α = 1, A × `a_scale` and B ÷ it.
    """
    found: Pairs = {}
    fall = 0.0
    for name, pair in _factors(targets, gradients, rank, Factorization(split="b", seed=seed)).items():
        sizes = pair.B.norm(dim=0)
        c = math.sqrt(max(1.0, pair.B.shape[0] / pair.A.shape[1]))
        fall += c * float(sizes.sum())
        u = pair.B / sizes.clamp_min(torch.finfo(pair.B.dtype).tiny)
        found[name] = Pair(a_scale * pair.A, -c / a_scale * u, pair.kind)
    return found, FIRST_STEP * loss / fall if fall else 0.0


def _factors(targets: Sequence[Target], matrices: Mapping[str, Tensor], rank: int, options: Factorization) -> Pairs:
    by_rank: dict[int, list[Target]] = {}
    for target in targets:
        by_rank.setdefault(min(rank, *target.shape), []).append(target)
    found: Pairs = {}
    for each, some in by_rank.items():
        names = [t.module for t in some]
        made = factorize_all(
            [matrices[n] for n in names], names, Factorization(each, split=options.split, seed=options.seed)
        )
        found |= {t.module: Pair(f.A, f.B, t.kind) for t, f in zip(some, made, strict=True)}
    return {t.module: found[t.module] for t in targets}
