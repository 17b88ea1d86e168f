"""A matrix as a product of two thin ones: the leading singular directions, at a fixed rank or by energy (METHOD, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from pkt import ops
from pkt.errors import PktError

Split: TypeAlias = Literal["b", "sqrt"]


@dataclass(frozen=True)
class Factors:
    """X ≈ B A with A [rank, m], B [n, rank], fp32; energy is Σσ² over ‖X‖² of what was kept."""

    A: Tensor
    B: Tensor
    energy: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]


def check_rank(rank: int, max_rank: int, energy: float | None, split: str) -> None:
    """Refuse impossible factorization options before any work."""
    if rank < 1 or max_rank < 1:
        raise PktError(f"rank={rank} and max_rank={max_rank} must be at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise PktError(f"energy={energy} must be in (0, 1]: the share of each matrix's squared norm to catch")
    if split not in ("b", "sqrt"):
        raise PktError(f"split={split!r} is unknown; choose 'b' (the paper's) or 'sqrt' (PiSSA's)")


def factorize(
    matrix: Tensor,
    rank: int = 16,
    *,
    max_rank: int = 64,
    energy: float | None = None,
    split: Split = "b",
    seed: int = 0,
    name: str = "the matrix",
) -> Factors:
    """Factorize `matrix` [n, m] (bf16, fp16 or fp32, any strides; never copied or widened as a whole).

    With `energy`, the smallest rank that catches that share of ‖X‖² is taken, up to `max_rank`; `rank` is then not used.
    split "b": B = UΣ, A = Vᵀ; "sqrt": √Σ on each side. The same seed gives the same bytes.

    Raises `PktError` naming the matrix for a rank it does not have and for NaN or Inf in it.
    """
    check_rank(rank, max_rank, energy, split)
    if matrix.ndim != 2:
        raise PktError(f"{name} is {list(matrix.shape)}; only a matrix can be factorized")
    if matrix.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        if matrix.dtype != torch.float64:
            raise PktError(f"{name} is {matrix.dtype}; bf16, fp16, fp32 or fp64 is needed")
        matrix = matrix.float()
    smaller = min(matrix.shape)
    if energy is not None:
        rank = min(max_rank, smaller)
    if rank > smaller:
        raise PktError(f"{name} is {list(matrix.shape)}: rank {rank} is above its {smaller}; use a smaller rank")
    u, s, v, stats = ops.rsvd(matrix, rank, seed=seed)
    total, finite = float(stats[0]), bool(stats[3])
    if not finite:
        raise PktError(f"{name} contains NaN or Inf; the checkpoint is damaged")
    squares = s.double() ** 2
    if energy is not None and total > 0:
        reached = (squares.cumsum(0) >= energy * total).nonzero()
        rank = int(reached[0]) + 1 if len(reached) else rank
    elif energy is not None:
        rank = 1
    u, s, v = u[:, :rank], s[:rank], v[:, :rank]
    caught = float(squares[:rank].sum()) / total if total > 0 else 1.0
    left, right = (s, torch.ones_like(s)) if split == "b" else (s.sqrt(), s.sqrt())
    return Factors((v * right).t().contiguous(), (u * left).contiguous(), caught)
