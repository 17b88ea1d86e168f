"""A matrix as a product of two thin ones: the leading singular directions, at a fixed rank or by energy (docs/method.md §4)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pkt import ops
from pkt.errors import PktError
from pkt.options import Factorization, Split

# Matrices factorized at a time: what the GPU's kernels take in one launch.
BATCH = 16


@dataclass(frozen=True)
class Factors:
    """X ≈ B A with A [rank, m], B [n, rank], fp32; energy is Σσ² over ‖X‖² of what was kept."""

    A: Tensor
    B: Tensor
    energy: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]


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

    Raises `PktError` naming the matrix for a rank it does not have, for NaN or Inf in it, and for memory that does not suffice.
    """
    with enough_memory(name):
        return factorize_all([matrix], [name], Factorization(rank, max_rank, energy, split, seed))[0]


@contextlib.contextmanager
def enough_memory(name: str) -> Iterator[None]:
    """Turn an allocation that fails into one `PktError`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ops.out_of_memory(error):
            raise
        raise PktError(f"{name}: not enough memory to factorize it; use a smaller rank, or free some") from error


def factorize_all(matrices: Sequence[Tensor], names: Sequence[str], options: Factorization) -> list[Factors]:
    """`factorize` of each matrix, in batches of one rank and device, each waiting for its device once.

    Everything is checked before any work; `PktError` names the first matrix that cannot be factorized.
    """
    inputs: list[Tensor] = []
    batches: dict[tuple[int, torch.device], list[int]] = {}
    for i, (matrix, name) in enumerate(zip(matrices, names, strict=True)):
        inputs.append(_checked(matrix, name))
        smaller = min(matrix.shape)
        wanted = options.rank if options.energy is None else min(options.max_rank, smaller)
        if not 0 < wanted <= smaller:
            raise PktError(f"{name} is {list(matrix.shape)}: rank {wanted} is above its {smaller}; use a smaller rank")
        batches.setdefault((wanted, matrix.device), []).append(i)
    found: dict[int, Factors] = {}
    for (wanted, _), batch in batches.items():
        U, S, V, stats = ops.rsvd_batch([inputs[i] for i in batch], wanted, seed=options.seed)
        facts = torch.cat((stats, torch.stack(S)), 1).cpu().double()
        for i, u, s, v, (total, _, _, finite, *values) in zip(batch, U, S, V, facts.tolist(), strict=True):
            if not finite:
                raise PktError(f"{names[i]} contains NaN or Inf; the checkpoint is damaged")
            kept = wanted if options.energy is None else _rank_for(options.energy * total, values)
            caught = sum(x * x for x in values[:kept]) / total if total > 0 else 1.0
            found[i] = _factors(u[:, :kept], s[:kept], v[:, :kept], options.split, caught)
    return [found[i] for i in range(len(inputs))]


def _checked(matrix: Tensor, name: str) -> Tensor:
    if matrix.ndim != 2:
        raise PktError(f"{name} is {list(matrix.shape)}; only a matrix can be factorized")
    if matrix.dtype in (torch.bfloat16, torch.float16, torch.float32):
        return matrix
    if matrix.dtype != torch.float64:
        raise PktError(f"{name} is {matrix.dtype}; bf16, fp16, fp32 or fp64 is needed")
    return matrix.float()


def _rank_for(wanted: float, values: Sequence[float]) -> int:
    """The smallest rank whose σ² reach `wanted`, at least 1; all of them where none does."""
    caught = 0.0
    for rank, value in enumerate(values, 1):
        caught += value * value
        if caught >= wanted:
            return rank
    return len(values)


def _factors(u: Tensor, s: Tensor, v: Tensor, split: Split, energy: float) -> Factors:
    left, right = (s, torch.ones_like(s)) if split == "b" else (s.sqrt(), s.sqrt())
    return Factors((v * right).t().contiguous(), (u * left).contiguous(), energy)
