"""What a transplant is held against: the same change on wrong units, noise of its size, neutral, or the re-pruned teacher."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from pkt.adapters import Pair
from pkt.matching import Lineage

Control = Literal["wrong-units", "noise", "neutral", "repruned"]
CONTROLS: tuple[Control, ...] = get_args(Control)
MEANS: dict[Control, str] = {
    "wrong-units": "the same change on units drawn at random among the student's own",
    "noise": "random directions with the singular values of the change",
    "neutral": "the change as a start that leaves the student as it is",
    "repruned": "the teacher itself on the student's units, whole: what the student learnt since it was cut is gone",
}


def shuffled(found: Lineage, seed: int) -> Lineage:
    """The lineage with the units of each kind in a random order; layers and tokens stay."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(found)

    def order(count: int) -> list[int]:
        return torch.randperm(count, generator=generator).tolist()

    other.hidden = [found.hidden[i] for i in order(len(found.hidden))]
    other.neurons = [[layer[i] for i in order(len(layer))] for layer in found.neurons]
    other.experts = [[layer[i] for i in order(len(layer))] for layer in found.experts]
    other.groups = [[layer[i] for i in order(len(layer))] for layer in found.groups]
    other.queries = [[layer[i] for i in order(len(layer))] for layer in found.queries]
    return other


def noise_like(pairs: Mapping[str, Pair], seed: int) -> dict[str, Pair]:
    """Random orthonormal directions with the singular values of each pair's product, √Σ on each side."""
    generator = torch.Generator().manual_seed(seed)

    def directions(*shape: int) -> Tensor:
        found: Tensor = torch.linalg.qr(torch.randn(*shape, generator=generator))[0]
        return found

    made = {}
    for name, pair in pairs.items():
        left, right = (torch.linalg.qr(side.float())[1] for side in (pair.B, pair.A.mT))
        root = torch.linalg.svdvals(left @ right.mT).sqrt()
        u, v = (directions(*side.shape[:-1], root.shape[-1]) for side in (pair.B, pair.A.mT))
        made[name] = Pair((v * root[..., None, :]).mT.contiguous(), u * root[..., None, :], pair.kind)
    return made
