"""A matrix as a product of two thin ones: the leading singular directions, at a fixed rank or by energy (docs/method.md §4)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from pkt import ops
from pkt.errors import PktError
from pkt.options import Factorization, Split, Svd

# Matrices factorized at a time: what the GPU's kernels take in one launch.
BATCH = 16
STEPS = 4  # of "fast"
_MOST_STEPS = 64
# Residuals up to this go with 99.8% of the best energy and of the leading directions (Gaussian and power-law spectra).
SETTLED = 0.03


@dataclass(frozen=True)
class Factors:
    """X ≈ B A with A [rank, m], B [n, rank], fp32; energy is Σσ² over ‖X‖² of what was kept.

    unsettled: the relative residual ‖XᵀU − VΣ‖ / ‖XᵀU‖ of what the iteration found, 0 for the leading directions themselves.
    """

    A: Tensor
    B: Tensor
    energy: float
    unsettled: float = 0.0

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
    svd: Svd = "fast",
    name: str = "the matrix",
) -> Factors:
    """Factorize `matrix` [n, m] (bf16, fp16 or fp32, any strides; never copied or widened as a whole, but for svd="exact").

    With `energy`, the smallest rank that catches that share of ‖X‖² is taken, up to `max_rank`; `rank` is then not used.
    split "b": B = UΣ, A = Vᵀ; "sqrt": √Σ on each side. The same seed gives the same bytes.

    Raises `PktError` naming the matrix for a rank it does not have, for NaN or Inf in it, and for memory that does not suffice.
    """
    with enough_memory(name):
        return factorize_all([matrix], [name], Factorization(rank, max_rank, energy, split, seed, svd))[0]


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
        inputs.append(_checked(matrix.detach(), name))
        smaller = min(matrix.shape)
        wanted = options.rank if options.energy is None else min(options.max_rank, smaller)
        if not 0 < wanted <= smaller:
            raise PktError(f"{name} is {list(matrix.shape)}: rank {wanted} is above its {smaller}; use a smaller rank")
        batches.setdefault((wanted, matrix.device), []).append(i)
    found: dict[int, Factors] = {}
    for (wanted, _), batch in batches.items():
        U, S, V, stats = _SVD[options.svd]([inputs[i] for i in batch], wanted, options.seed)
        moving = _unsettled([inputs[i] for i in batch], U, S)
        facts = torch.cat((moving[:, None], stats, torch.stack(list(S))), 1).cpu().double()
        for i, u, s, v, (left, total, _, _, finite, *values) in zip(batch, U, S, V, facts.tolist(), strict=True):
            if not finite:
                raise PktError(f"{names[i]} contains NaN or Inf; the checkpoint is damaged")
            kept = wanted if options.energy is None else _rank_for(options.energy * total, values)
            caught = sum(x * x for x in values[:kept]) / total if total > 0 else 1.0
            found[i] = _factors(u[:, :kept], s[:kept], v[:, :kept], options.split, caught, left)
    return [found[i] for i in range(len(inputs))]


_Decomposed: TypeAlias = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Tensor]


def _fast(matrices: Sequence[Tensor], rank: int, seed: int) -> _Decomposed:
    return ops.rsvd_batch(matrices, rank, iters=STEPS, seed=seed)


def _adaptive(matrices: Sequence[Tensor], rank: int, seed: int) -> _Decomposed:
    """As many steps as settle the directions of each matrix; what is not settled by then is decomposed exactly."""
    found = [[*one] for one in zip(*_fast(matrices, rank, seed), strict=True)]
    steps = STEPS
    while True:
        moving = _unsettled(matrices, [u for u, *_ in found], [s for _, s, *_ in found]).cpu()
        left = [i for i, share in enumerate(moving.tolist()) if share > SETTLED]
        if not left:
            return *([f[k] for f in found] for k in range(3)), torch.stack([f[3] for f in found])  # type: ignore[return-value]
        steps *= 2
        some = [matrices[i] for i in left]
        again = ops.rsvd_batch(some, rank, iters=steps, seed=seed) if steps <= _MOST_STEPS else _exact(some, rank, seed)
        for i, one in zip(left, zip(*again, strict=True), strict=True):
            found[i] = [*one]


def _exact(matrices: Sequence[Tensor], rank: int, seed: int) -> _Decomposed:
    """LAPACK's SVD in fp32, with the stats of `pkt.ops.rsvd`; a matrix is widened as a whole."""
    found = []
    for matrix in matrices:
        energy = sum(
            (block.double().square().sum() for block in matrix.split(max(1, ops.WIDENED["cpu"] // matrix.shape[1]))),
            torch.zeros((), dtype=torch.float64),
        )
        finite = energy.isfinite()
        u, s, vh = torch.linalg.svd(torch.where(finite, matrix.float(), 0.0), full_matrices=False)
        caught = s[:rank].double().square().sum()
        error = (1 - caught / energy).clamp_min(0).sqrt().where(energy > 0, 0.0)
        stats = torch.stack((energy, caught, error, torch.ones_like(energy))).float() * finite
        found.append((u[:, :rank], s[:rank], vh[:rank].t(), torch.where(finite, stats, 0.0)))
    U, S, V, stats_of = zip(*found, strict=True)
    return U, S, V, torch.stack(stats_of)


_SVD: dict[Svd, Callable[[Sequence[Tensor], int, int], _Decomposed]] = {
    "fast": _fast,
    "adaptive": _adaptive,
    "exact": _exact,
}


def _unsettled(matrices: Sequence[Tensor], U: Sequence[Tensor], S: Sequence[Tensor]) -> Tensor:
    """For each matrix ‖XᵀU − VΣ‖ / ‖XᵀU‖, which is √(1 − Σσ² / ‖XᵀU‖²) since XV = UΣ: what one more half step would turn."""
    sizes = torch.stack(list(S)).double().square().sum(1)
    # In units of the directions' own size, so that no product leaves fp32's range.
    scales = sizes.sqrt().clamp_min(torch.finfo(torch.float32).tiny).float().split(1)
    products = (_product(matrix, u, scale[None]) for matrix, u, scale in zip(matrices, U, scales, strict=True))
    after = torch.stack([torch.linalg.vector_norm(product, dtype=torch.float64) for product in products]).square()
    return (1 - 1 / after).clamp(0, 1).sqrt().where(sizes > 0, 0.0).nan_to_num(0.0).float()


def _product(matrix: Tensor, u: Tensor, scale: Tensor) -> Tensor:
    """Xᵀ U / scale [m, rank], a few rows or columns of X [n, m] widened at a time, by the scale being an fp32 matrix [1, 1]."""
    n, m = matrix.shape
    product = torch.zeros(m, u.shape[1], device=u.device)
    step = max(1, ops.widened_elements(u.device) // min(n, m))
    if n <= m:
        for part, columns in zip(product.split(step), matrix.split(step, 1), strict=True):
            torch.mm((columns / scale).t(), u, out=part)
    else:
        for rows, left in zip(matrix.split(step), u.split(step), strict=True):
            product.addmm_((rows / scale).t(), left)
    return product


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


def _factors(u: Tensor, s: Tensor, v: Tensor, split: Split, energy: float, unsettled: float) -> Factors:
    left = s if split == "b" else s.sqrt()
    return Factors((v if split == "b" else v * left).t().contiguous(), (u * left).contiguous(), energy, unsettled)
