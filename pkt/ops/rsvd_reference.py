"""Randomized SVD in plain torch: what `pkt::rsvd` means, and what runs where the compiled extension does not.

    a ≈ U diag(S) Vᵀ,  a [n, m] in bf16, fp16 or fp32 with any strides,  U [n, r], S [r], V [m, r] in fp32

Block Krylov (Musco & Musco, 2015), on the side of `a` that has the smaller basis (n ≥ m below; otherwise aᵀ is meant):

    Q₀ = orth(Ω), Ω [m, b] random signs
    Qⱼ₊₁ = orth(aᵀ a Qⱼ, against Q₀ … Qⱼ)            `iters` times
    Y = a K, K = [Q₀ … Q_iters];  the r best directions of a inside span(K) come from the eigenvectors of YᵀY.

b is `rank`, or what gives K rank + oversample columns if that is more, rounded up to a multiple of 16: the earlier
blocks are the oversampling, so a reading costs half of what subspace iteration's does, for a smaller error.

One row block of `a` at a time is widened to fp32 and serves both products (Yⱼ = a Qⱼ and aᵀ Yⱼ), so an iteration reads
`a` once; Y is kept, so choosing the directions reads it no more. Where K would be as wide as `a` itself
(m ≤ b · (iters + 1)), K is the identity and the result exact.
The CUDA extension keeps the last block alone, K = Q_iters with rank + oversample columns, or 8/5 of the rank where that is
more: the same readings, and no eigenproblem as wide as K, which on a GPU would take longer than the readings.
Columns that turn out dependent (rank-deficient, zero or flat matrices) are replaced by new random ones: U and V are
orthonormal always, and S is zero where there is nothing.

`stats`, fp32 [4]:

    0  total energy ‖a‖²_F          1  captured energy Σ S²
    2  relative error ‖a − U S Vᵀ‖_F / ‖a‖_F = √(1 − captured / total), 0 for a zero matrix; below 3e-4 it is rounding
       (below 2e-3 for the half types in the CUDA extension)
    3  1 if every entry of `a` is finite, else 0, and then U, S, V and stats are all zero

Same inputs, same device, same number of threads: same bytes. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

ROW_BLOCK = 256
DEPENDENT = 1e-7  # a column that keeps less than this of its block's largest is rounding noise

_MASK = 0xFFFFFFFF


def philox_signs(rows: int, columns: int, seed: int, stream: int, device: torch.device) -> Tensor:
    """Random signs ±1 [rows, columns], fp32, the same on every device and in the compiled extension.

    Philox-4x32-10 (Salmon et al., 2011): key = seed, counter = (row, row >> 32, stream, column // 128); of the
    128 bits, column j reads bit j % 32 of word j // 32 % 4.
    """
    row = torch.arange(rows, device=device)[:, None]
    group = torch.arange((columns + 127) // 128, device=device)[None, :]
    zero = torch.zeros(rows, group.shape[1], dtype=torch.int64, device=device)
    c0, c1, c2, c3 = zero + (row & _MASK), zero + (row >> 32), zero + stream, zero + group
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    words = torch.stack((c0, c1, c2, c3), dim=-1)  # [rows, groups, 4]
    bits = words[..., None] >> torch.arange(32, device=device) & 1
    return 1.0 - 2.0 * bits.reshape(rows, -1)[:, :columns].to(torch.float32)


def rsvd(
    a: Tensor, rank: int, oversample: int = 16, iters: int = 4, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U [n, rank], S [rank], V [m, rank], stats [4] of the module's docstring; 1 ≤ rank ≤ min(n, m)."""
    if a.shape[0] < a.shape[1]:
        V, S, U, stats = rsvd(a.T, rank, oversample, iters, seed)
        return U, S, V, stats
    m = a.shape[1]
    width = min(block_width(rank, oversample, iters), m)
    energy, scale = _energy_and_scale(a)
    if m <= width * (iters + 1):
        K = torch.eye(m, device=a.device)
        Y = torch.cat([block for _, block in _row_blocks(a, scale)]).nan_to_num(0.0, 0.0, 0.0)
    else:
        K, Y = _krylov(a, scale, width, iters, seed)
    U, S, V = _best_directions(K, Y, rank, width)

    finite = energy.isfinite()
    unscaled = S / scale[0]
    captured = unscaled.double().square().sum()
    error = (1 - captured / energy).clamp_min(0).sqrt().where(energy > 0, 0.0)
    stats = torch.stack((energy, captured, error, torch.ones_like(energy))).float()
    U, S, V, stats = (torch.where(finite, x, 0.0) for x in (U, unscaled, V, stats))
    return U.contiguous(), S, V.contiguous(), stats


def rsvd_batch(
    a: Sequence[Tensor], rank: int, oversample: int = 16, iters: int = 4, seed: int = 0
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """`rsvd` of each matrix; stats [len(a), 4]."""
    results = [rsvd(x, rank, oversample, iters, seed) for x in a]
    U, S, V, stats = ([result[i] for result in results] for i in range(4))
    return U, S, V, torch.stack(stats) if stats else torch.empty(0, 4)


def block_width(rank: int, oversample: int = 16, iters: int = 4) -> int:
    """Columns of a block of the basis: enough for `rank` at every step, and for rank + oversample in all."""
    least = max(rank, -(-(rank + oversample) // (iters + 1)))
    return -(-least // 16) * 16


def _row_blocks(a: Tensor, scale: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Row blocks of a · scale, widened by `scale` being an fp32 matrix [1, 1]."""
    for start in range(0, a.shape[0], ROW_BLOCK):
        rows = slice(start, start + ROW_BLOCK)
        yield rows, a[rows] * scale


def _energy_and_scale(a: Tensor) -> tuple[Tensor, Tensor]:
    """‖a‖²_F in fp64, and the power of two that brings ‖a‖_F to [1, 2), so that no product leaves fp32's range."""
    energy = torch.zeros((), dtype=torch.float64, device=a.device)
    for start in range(0, a.shape[0], ROW_BLOCK):
        energy += a[start : start + ROW_BLOCK].double().square().sum()
    usable = energy.isfinite() & (energy > 0)
    exponent = torch.where(usable, energy, 1.0).sqrt().log2().floor().clamp(-120, 120)
    return energy, torch.exp2(-exponent).float().view(1, 1)


def _krylov(a: Tensor, scale: Tensor, width: int, iters: int, seed: int) -> tuple[Tensor, Tensor]:
    """An orthonormal K [m, width · (iters + 1)] and Y = a K · scale [n, width · (iters + 1)]."""
    n, m = a.shape
    K = torch.empty(m, 0, device=a.device)
    Y = torch.empty(n, width * (iters + 1), device=a.device)
    Z = philox_signs(m, width, seed, 0, a.device)
    for step in range(iters + 1):
        Q = _orthonormal(Z, K, seed, step + 1)
        K = torch.cat((K, Q), dim=1)
        Z = torch.zeros_like(Z)
        columns = slice(step * width, (step + 1) * width)
        for rows, block in _row_blocks(a, scale):
            y = block @ Q
            Y[rows, columns] = y.nan_to_num(0.0, 0.0, 0.0)
            if step < iters:
                Z += block.T @ y
    return K, Y


def _orthonormal(Z: Tensor, K: Tensor, seed: int, stream: int) -> Tensor:
    """An orthonormal basis of Z's columns [m, l], orthogonal to K; dependent columns become new random directions."""
    Z = Z.nan_to_num(0.0, 0.0, 0.0)  # LAPACK refuses what the finite flag will report
    fresh = philox_signs(Z.shape[0], Z.shape[1], seed, stream, Z.device)
    for attempt in range(3):
        norm = torch.linalg.vector_norm(Z, dim=0)
        Z = Z - K @ (K.T @ Z)
        Q, R = torch.linalg.qr(Z)
        if attempt == 0:
            kept = R.diagonal().abs() > DEPENDENT * norm.max().clamp_min(torch.finfo(torch.float32).tiny)
            Q = torch.where(kept, Q, fresh / Z.shape[0] ** 0.5)
        Z = Q
    return Z


def _best_directions(K: Tensor, Y: Tensor, rank: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V of the `rank` largest singular values of Y Kᵀ, for an orthonormal K."""
    gram = torch.zeros(K.shape[1], K.shape[1], dtype=torch.float64, device=Y.device)
    for start in range(0, Y.shape[0], ROW_BLOCK):
        y = Y[start : start + ROW_BLOCK].double()
        gram += y.T @ y
    W = torch.linalg.eigh(gram).eigenvectors[:, -width:].flip(1).float()
    # The Gram matrix squares the singular values: the l chosen directions are settled on Y itself.
    Q, R = torch.linalg.qr(Y @ W)
    left, S, right = torch.linalg.svd(R.double())
    U = Q @ left[:, :rank].float()
    V = K @ (W.double() @ right[:rank].T).float()
    return U, S[:rank].float(), V
