"""Sensitivity of a linear layer's weight, fused with the product that makes its gradient.

    acc[n, m] += |w[n, m]|^p · Σ_j | Σ_t dy_j[t, n] · x_j[t, m] |^p    (docs/method.md §1: Σ_j |θ·g_j|^p with g_j = dy_jᵀ x_j)

p is 1 or 2; unweighted, |w|^p is left out.
x [R, m] and dy [R, n] hold the rows of all samples; sample j owns rows seq_starts[j] .. + seq_lens[j]. Rows that belong
to no sample are never read. The tile-summed twin adds up each tile × tile square of the right-hand side instead.

Flops: 2·n·m·ΣT_j, those of one product dyᵀx over all rows; |·| and the sums add n·m·(2·samples + 3).
Bytes: x and dy (mostly from L2, (1/BLOCK_N + 1/BLOCK_M)·ΣT_j·n·m elements), w once, acc read and written once:
10 bytes a weight in bf16. The unfused way also writes a gradient, reads it back and updates acc for every sample:
about 20 bytes a weight *and sample*.
Limit: the tensor cores, from some 800 rows on (fewer, and it is reading and writing acc). A program keeps two fp32
tiles in registers, the sample's product and the running sum of |·|; that is what bounds a tile at 128 × 128.

How it runs: the (sample, block of rows) pairs are one flat loop, so that the loads for the next sample are already in
flight while the last product of this one drains. On Hopper and later the loads are bulk tensor copies whose bounds
end with the sample (zeros beyond), elsewhere masked asynchronous copies. fp32 inputs are multiplied as three
TF32 products ("tf32x3"), which keeps fp32's accuracy.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from pkt_kernels import launch
from pkt_kernels.measure import raised


class Blocks(NamedTuple):
    """How the work is cut: a tile of the weight is n × m, t rows are multiplied at a time.

    `speed` is what a multiprocessor makes of such a tile, relative to the other rows of its table.
    """

    n: int
    m: int
    t: int
    num_warps: int
    num_stages: int
    speed: float


# (capability major, bytes of an element) -> what compiles there without spills and with products in flight (the compile
# test looks). The speeds are estimates from the L2 traffic of a tile, until measured (bench_kernels.py --sweep).
TUNED: dict[tuple[int, int], tuple[Blocks, ...]] = {
    (8, 2): (Blocks(128, 128, 32, 8, 4, 1.0), Blocks(64, 64, 32, 4, 4, 0.6)),
    (8, 4): (Blocks(128, 64, 16, 8, 3, 1.0), Blocks(64, 64, 16, 4, 3, 0.8)),
    (9, 2): (Blocks(128, 128, 64, 8, 4, 1.0), Blocks(64, 64, 64, 4, 4, 0.5)),
    (9, 4): (Blocks(128, 64, 32, 8, 3, 1.0), Blocks(64, 64, 32, 4, 3, 0.8)),
    (10, 2): (Blocks(128, 128, 64, 8, 4, 1.0), Blocks(64, 64, 64, 4, 4, 0.4)),
    (10, 4): (Blocks(128, 64, 32, 8, 3, 1.0), Blocks(64, 64, 32, 4, 3, 0.6)),
}

# Tiles are visited in bands this many tiles high, so that programs running together share rows of x and dy in L2.
BAND = 8

# A tile the kernel cannot sum itself is put together from smaller ones, which must not be many.
SMALLEST_PART = 16


@triton.jit
def _sample_rows(starts_ptr, lens_ptr, sample, mask, R):
    """First row and number of rows of a sample, kept inside the R rows there are."""
    start = tl.load(starts_ptr + sample, mask=mask, other=0)
    length = tl.load(lens_ptr + sample, mask=mask, other=0)
    start = tl.minimum(tl.maximum(start, 0), R)
    return start, tl.minimum(length, R - start).to(tl.int32)


@triton.jit
def _load_rows(
    source, start, length, t, first, width, stride_r, stride_c,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, TRANSPOSED: tl.constexpr, DESCRIPTORS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Rows start + t.. of a sample, columns first..: [BLOCK_T, BLOCK_C], zeros past the sample.

    Without descriptors and TRANSPOSED, its transpose: where the pointers are, so that the copies stay asynchronous.
    """
    if DESCRIPTORS:
        # The sample's last row is the descriptor's row 2**30 - 1: see _ragged_descriptor.
        bound = 0x40000000
        block = source.load([bound, (start + length).to(tl.int32), bound - length + t, first])
        block = tl.reshape(block, [BLOCK_T, BLOCK_C])
    else:
        offs_t = t + tl.arange(0, BLOCK_T)
        offs_c = first + tl.arange(0, BLOCK_C)
        mask_t = offs_t < length
        mask_c = offs_c < width
        rows = (start + offs_t) * stride_r
        columns = offs_c.to(tl.int64) * stride_c
        if TRANSPOSED:
            pointers = source + columns[:, None] + rows[None, :]
            block = tl.load(pointers, mask=mask_c[:, None] & mask_t[None, :], other=0.0)
        else:
            pointers = source + rows[:, None] + columns[None, :]
            block = tl.load(pointers, mask=mask_t[:, None] & mask_c[None, :], other=0.0)
    if INTERPRETED:
        # The interpreter would multiply the bit patterns of bfloat16; products of 16-bit floats are exact in fp32.
        block = block.to(tl.float32)
    return block


@triton.jit
def _add_raised(running, x, POWER: tl.constexpr, INTERPRETED: tl.constexpr):
    """running + |x|^POWER, in PTX so that it is one instruction an element: Triton's |x| clears the sign bit in the
    integer unit, PTX's becomes a modifier of the addition; and Triton's square spills (fp32, 64 × 64, sm_100)."""
    if INTERPRETED:
        total = running + raised(x, POWER)
    elif POWER == 1:
        total = running + tl.inline_asm_elementwise("abs.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        total = tl.inline_asm_elementwise(
            "fma.rn.f32 $0, $1, $1, $2;", "=f,f,f", [x, running], tl.float32, is_pure=True, pack=1
        )
    return total


@triton.jit
def _add_scaled(
    out_ptr, w_ptr, running, first_n, first_m, N, M,
    stride_on, stride_om, stride_wn, stride_wm,
    TILE: tl.constexpr, POWER: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """out += |w|^POWER · running for a block of the weight, or (TILE > 0) the sums of its TILE × TILE squares."""
    offs_n = first_n + tl.arange(0, BLOCK_N)
    offs_m = first_m + tl.arange(0, BLOCK_M)
    mask = (offs_n < N)[:, None] & (offs_m < M)[None, :]
    value = running
    if WEIGHTED:
        w_ptrs = w_ptr + offs_n.to(tl.int64)[:, None] * stride_wn + offs_m.to(tl.int64)[None, :] * stride_wm
        value *= raised(tl.load(w_ptrs, mask=mask, other=0.0).to(tl.float32), POWER)
    if TILE > 0:
        value = tl.reshape(value, [BLOCK_N // TILE, TILE, BLOCK_M // TILE, TILE])
        value = tl.sum(tl.sum(value, axis=3), axis=1)
        offs_n = first_n // TILE + tl.arange(0, BLOCK_N // TILE)
        offs_m = first_m // TILE + tl.arange(0, BLOCK_M // TILE)
        mask = (offs_n < tl.cdiv(N, TILE))[:, None] & (offs_m < tl.cdiv(M, TILE))[None, :]
    out_ptrs = out_ptr + offs_n.to(tl.int64)[:, None] * stride_on + offs_m.to(tl.int64)[None, :] * stride_om
    tl.store(out_ptrs, tl.load(out_ptrs, mask=mask, other=0.0) + value, mask=mask)


@triton.jit
def _linear_sensitivity_kernel(
    out_ptr, w_ptr, x, dy, seq_starts_ptr, seq_lens_ptr,
    R, N, M, width_x, width_dy, num_samples,
    stride_on, stride_om, stride_wn, stride_wm, stride_xr, stride_xm, stride_dr, stride_dn,
    TILE: tl.constexpr, POWER: tl.constexpr, WEIGHTED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BAND: tl.constexpr,
    STAGES: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    band_start = pid // (BAND * tiles_m) * BAND
    height = tl.minimum(tiles_n - band_start, BAND)
    first_n = (band_start + pid % (BAND * tiles_m) % height) * BLOCK_N
    first_m = pid % (BAND * tiles_m) // height * BLOCK_M

    # Even an empty sample takes one step, on zeros, so that the loop below need not skip.
    steps = 0
    for first in range(0, num_samples, 32):
        offs_s = first + tl.arange(0, 32)
        _, lengths = _sample_rows(seq_starts_ptr, seq_lens_ptr, offs_s, offs_s < num_samples, R)
        steps += tl.sum(tl.where(offs_s < num_samples, tl.maximum(tl.cdiv(lengths, BLOCK_T), 1), 0))

    running = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)  # Σ_j |g_j|^POWER
    partial = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)  # g_j so far
    sample = -1
    start = tl.load(seq_starts_ptr)
    length = 0
    t = 0
    for _ in tl.range(0, steps, num_stages=STAGES):
        # The next block is found from this one's values alone, never from anything after the product:
        # otherwise Triton puts the loads behind the product and nothing is in flight (the compile test looks).
        t += BLOCK_T
        if t >= length:
            sample += 1
            t = 0
            start, length = _sample_rows(seq_starts_ptr, seq_lens_ptr, sample, True, R)
        dy_t = _load_rows(dy, start, length, t, first_n, width_dy, stride_dr, stride_dn,
                          BLOCK_T, BLOCK_N, True, DESCRIPTORS, INTERPRETED)  # [BLOCK_N, BLOCK_T]  # fmt: skip
        x_t = _load_rows(x, start, length, t, first_m, width_x, stride_xr, stride_xm,
                         BLOCK_T, BLOCK_M, False, DESCRIPTORS, INTERPRETED)  # [BLOCK_T, BLOCK_M]  # fmt: skip
        if DESCRIPTORS:
            # Only now: two loads with one first use share a barrier.
            dy_t = tl.trans(dy_t)
        partial = tl.dot(dy_t, x_t, partial, input_precision=PRECISION)
        if t + BLOCK_T >= length:
            running = _add_raised(running, partial, POWER, INTERPRETED)
            partial = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)

    _add_scaled(out_ptr, w_ptr, running, first_n, first_m, N, M,
                stride_on, stride_om, stride_wn, stride_wm, TILE, POWER, WEIGHTED, BLOCK_N, BLOCK_M)  # fmt: skip


def choose_blocks(
    n: int, m: int, dtype: torch.dtype, capability: tuple[int, int], multiprocessors: int, tile: int = 0
) -> Blocks:
    """The tuned blocks that would finish an n × m weight first: rounds over the multiprocessors × time of a tile."""
    # Consumer Blackwell (12) has neither Hopper's products nor datacentre Blackwell's, and little shared memory.
    major = capability[0] if capability[0] in (9, 10) else 8

    def cost(blocks: Blocks) -> float:
        tiles = triton.cdiv(n, blocks.n) * triton.cdiv(m, blocks.m)
        rounds: int = triton.cdiv(tiles, multiprocessors)
        return rounds * blocks.n * blocks.m / blocks.speed

    fitting = [b for b in TUNED[major, dtype.itemsize] if not tile or (b.n % tile == 0 and b.m % tile == 0)]
    return min(fitting, key=cost)


def ragged(rows: torch.Tensor) -> tuple[list[int], list[int]]:
    """Shape and strides of a descriptor whose bound moves with the sample, so that the hardware writes zeros past its end.

    Two leading dimensions of strides 2**34 - s and s are walked 2**30 and (start + length) steps. With the row index
    counted down from the bound 2**30, the three offsets add up to start + t modulo 2**64, and rows past the sample's
    end are past the bound. (The idea is that of triton.tools.ragged_tma.)
    """
    stride = rows.stride(0)
    return [0x7FFF0000, 0x7FFF0000, 1 << 30, rows.shape[1]], [2**34 - stride, stride, stride, 1]


def _ragged_descriptor(rows: torch.Tensor, block_rows: int, block_columns: int) -> TensorDescriptor:
    return TensorDescriptor(rows, *ragged(rows), [1, 1, block_rows, block_columns])


def _aligned(rows: torch.Tensor) -> torch.Tensor:
    """`rows` as wide loads and descriptors need them: contiguous rows on 16-byte boundaries, else a padded copy."""
    steps = rows.stride(0) * rows.element_size()
    if rows.stride(1) == 1 and steps > 0 and steps % 16 == 0 and rows.data_ptr() % 16 == 0:
        return rows
    width = rows.shape[1]
    padded = rows.new_zeros(len(rows), width + -width % 16)
    padded[:, :width] = rows
    return padded


class Problem(NamedTuple):
    """The tensors as the kernels take them: out and w along their rows, x and dy of one type, aligned."""

    out: torch.Tensor
    w: torch.Tensor
    x: torch.Tensor
    dy: torch.Tensor
    seq_starts: torch.Tensor
    seq_lens: torch.Tensor

    @classmethod
    def of(
        cls,
        out: torch.Tensor,
        w: torch.Tensor,
        x: torch.Tensor,
        dy: torch.Tensor,
        seq_starts: torch.Tensor,
        seq_lens: torch.Tensor,
    ) -> Problem | None:
        """None where there is nothing to add."""
        if w.numel() == 0 or seq_starts.numel() == 0 or len(x) == 0:
            return None
        if w.stride(0) < w.stride(1):
            # A transposed weight: the transposed problem reads and writes it along its rows.
            out, w, x, dy = out.T, w.T, dy, x
        dtype = torch.promote_types(x.dtype, dy.dtype)
        x, dy = _aligned(x.to(dtype)), _aligned(dy.to(dtype))
        return cls(out, w, x, dy, seq_starts.contiguous(), seq_lens.contiguous())


def linear_sensitivity(
    acc: torch.Tensor,
    w: torch.Tensor,
    x: torch.Tensor,
    dy: torch.Tensor,
    seq_starts: torch.Tensor,
    seq_lens: torch.Tensor,
    power: int = 1,
    weighted: bool = True,
) -> None:
    """acc [n, m] += |w|^power ⊙ Σ_j |dy_jᵀ x_j|^power, in place; acc fp32, w, x and dy floating point of at most 32 bits."""
    _accumulate(acc, w, x, dy, seq_starts, seq_lens, 0, power, weighted)


def linear_sensitivity_tiles(
    tiles: torch.Tensor,
    w: torch.Tensor,
    x: torch.Tensor,
    dy: torch.Tensor,
    seq_starts: torch.Tensor,
    seq_lens: torch.Tensor,
    tile: int,
    power: int = 1,
    weighted: bool = True,
) -> None:
    """tiles [⌈n/tile⌉, ⌈m/tile⌉] += the tile × tile sums of what `linear_sensitivity` adds, which is never stored.

    tile: a power of two up to 128, or a multiple of 16 (summed from parts of 16 to 64); otherwise NoFormError.
    """
    if tile in (1, 2, 4, 8, 16, 32, 64) or (tile == 128 and torch.promote_types(x.dtype, dy.dtype).itemsize == 2):
        _accumulate(tiles, w, x, dy, seq_starts, seq_lens, tile, power, weighted)
        return
    part = math.gcd(tile, 64)
    if part < SMALLEST_PART or tile < 1:
        raise launch.NoFormError(
            f"tile={tile}: the kernel takes powers of two up to 128 and multiples of {SMALLEST_PART}"
        )
    ratio = tile // part
    parts = tiles.new_zeros(tiles.shape[0] * ratio, tiles.shape[1] * ratio)
    _accumulate(parts, w, x, dy, seq_starts, seq_lens, part, power, weighted)
    tiles += parts.view(tiles.shape[0], ratio, tiles.shape[1], ratio).sum((1, 3))


def _accumulate(
    out: torch.Tensor,
    w: torch.Tensor,
    x: torch.Tensor,
    dy: torch.Tensor,
    seq_starts: torch.Tensor,
    seq_lens: torch.Tensor,
    tile: int,
    power: int,
    weighted: bool,
) -> None:
    problem = Problem.of(out, w, x, dy, seq_starts, seq_lens)
    if problem is None:
        return
    out, w, x, dy, seq_starts, seq_lens = problem
    n, m = w.shape
    capability = launch.capability(x.device)
    blocks = choose_blocks(n, m, x.dtype, capability, launch.multiprocessors(x.device), tile)
    descriptors = capability[0] in (9, 10) and len(x) <= 1 << 30
    grid = (triton.cdiv(n, blocks.n) * triton.cdiv(m, blocks.m),)
    with launch.on_device(x):
        _linear_sensitivity_kernel[grid](
            out, w,
            _ragged_descriptor(x, blocks.t, blocks.m) if descriptors else x,
            _ragged_descriptor(dy, blocks.t, blocks.n) if descriptors else dy,
            seq_starts, seq_lens,
            len(x), n, m, x.shape[1], dy.shape[1], seq_starts.numel(),
            *out.stride(), *w.stride(), *x.stride(), *dy.stride(),
            TILE=tile, POWER=power, WEIGHTED=weighted, BLOCK_N=blocks.n, BLOCK_M=blocks.m, BLOCK_T=blocks.t, BAND=BAND,
            STAGES=blocks.num_stages, DESCRIPTORS=descriptors,
            PRECISION="tf32x3" if x.dtype == torch.float32 else "tf32", INTERPRETED=launch.INTERPRETED,
            num_warps=blocks.num_warps, num_stages=blocks.num_stages, **launch.OPTIONS,
        )  # fmt: skip
