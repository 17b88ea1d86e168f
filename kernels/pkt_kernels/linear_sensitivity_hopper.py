"""`linear_sensitivity` on Hopper with warps that have jobs: one fetches, eight multiply. A candidate: `pkt` uses it on a GPU on
which it was checked and timed against the kernel of `linear_sensitivity.py`, which says what is computed.

A block of threads stays on its multiprocessor and takes tile after tile (128 × 128 of the weight, in bands as there). Its
producer warp issues the tensor copies of x and dy, STAGES steps of BLOCK_T rows ahead, over the ends of samples and tiles, with
the bound that moves with the sample. Two warpgroups multiply, 64 × 128 each: the product's sum and the running Σ_j |g_j|^p are
64 registers a thread each, of 232.

What that saves over one group of warps that does everything: nobody waits at a step but for its data (a barrier in shared memory
per stage and direction, none for the block); a sample's first product overwrites the sum, so no zeros are written; and while one
warpgroup adds |g_j| the other's products keep the tensor cores busy, as do the copies of the next sample and tile.

Flops, bytes and limit: those of `linear_sensitivity.py`. Written in Gluon, whose names differ between Triton 3.6 and 3.9.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from pkt_kernels import launch
from pkt_kernels.linear_sensitivity import BAND, Problem, ragged

BLOCK = 128
HALF = gl.constexpr(64)  # rows of the tile that a warpgroup has
STEP = 64
STAGES = 6
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 232, 24
# Tile sums are put together within a warpgroup's rows.
TILES = (0, 16, 32, 64)

BOUND = gl.constexpr(1 << 30)  # of the descriptor's rows: see `linear_sensitivity.ragged`
_fetch = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_RENAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def _sample_rows(starts_ptr, lens_ptr, sample, num_samples, R):
    """First row and number of rows of a sample, kept inside the R rows there are; past the last sample nothing is read."""
    start = gl.load(starts_ptr + sample, mask=sample < num_samples, other=0)
    length = gl.load(lens_ptr + sample, mask=sample < num_samples, other=0)
    start = gl.minimum(gl.maximum(start, 0), R)
    return start.to(gl.int32), gl.minimum(length, R - start).to(gl.int32)


@gluon.jit
def _place(tile, N, M, BLOCK: gl.constexpr, BAND: gl.constexpr):
    """First row and column of a tile; tiles are visited in bands, so that blocks running together share rows in L2."""
    tiles_n = gl.cdiv(N, BLOCK)
    tiles_m = gl.cdiv(M, BLOCK)
    band_start = tile // (BAND * tiles_m) * BAND
    height = gl.minimum(tiles_n - band_start, BAND)
    inside = tile % (BAND * tiles_m)
    return (band_start + inside % height) * BLOCK, inside // height * BLOCK


@gluon.jit
def _matrix(stage, DTYPE: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """A stage's [1, 1, rows, columns] as a matrix."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    if _RENAMED:
        return stage.reinterpret(DTYPE, [ROWS, COLUMNS], LAYOUT)
    else:
        return stage._reinterpret(DTYPE, [ROWS, COLUMNS], LAYOUT)


@gluon.jit
def _produce(
    x_desc, dy_desc, x_stages, dy_stages, full, empty, starts_ptr, lens_ptr, R, N, M, num_samples,
    BLOCK: gl.constexpr, BLOCK_T: gl.constexpr, BAND: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fills the stages, each as soon as both warpgroups have left it."""
    step = 0
    for tile in range(gl.program_id(0), gl.cdiv(N, BLOCK) * gl.cdiv(M, BLOCK), gl.num_programs(0)):
        first_n, first_m = _place(tile, N, M, BLOCK, BAND)
        next_start, next_length = _sample_rows(starts_ptr, lens_ptr, 0, num_samples, R)
        for sample in range(num_samples):
            start, length = next_start, next_length
            next_start, next_length = _sample_rows(starts_ptr, lens_ptr, sample + 1, num_samples, R)
            # Even an empty sample takes one step, on zeros, so that the product's sum is overwritten.
            for t in range(0, gl.maximum(length, 1), BLOCK_T):
                stage = step % STAGES
                mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
                ready = full.index(stage)
                mbarrier.expect(ready, x_desc.block_type.nbytes + 2 * dy_desc.block_type.nbytes)
                row = BOUND - length + t
                end = start + length
                _fetch(dy_desc, [BOUND, end, row, first_n], ready, dy_stages.index(2 * stage))
                _fetch(dy_desc, [BOUND, end, row, first_n + HALF], ready, dy_stages.index(2 * stage + 1))
                _fetch(x_desc, [BOUND, end, row, first_m], ready, x_stages.index(stage))
                step += 1


@gluon.jit
def _add_raised(running, product, POWER: gl.constexpr):
    """running + |product|^POWER, one instruction an element."""
    if POWER == 1:
        magnitude = gl.inline_asm_elementwise("abs.f32 $0, $1;", "=f,f", [product], gl.float32, is_pure=True, pack=1)
        return running + magnitude
    else:
        return gl.inline_asm_elementwise(
            "fma.rn.f32 $0, $1, $1, $2;", "=f,f,f", [product, running], gl.float32, is_pure=True, pack=1
        )


@gluon.jit
def _add_scaled(
    out_ptr, w_ptr, running, first_n, first_m, N, M, stride_on, stride_om, stride_wn, stride_wm,
    TILE: gl.constexpr, POWER: gl.constexpr, WEIGHTED: gl.constexpr, BLOCK: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """out += |w|^POWER · running for a warpgroup's part of the tile, or (TILE > 0) the sums of its TILE × TILE squares."""
    offs_n = first_n + gl.arange(0, HALF, gl.SliceLayout(1, LAYOUT))
    offs_m = first_m + gl.arange(0, BLOCK, gl.SliceLayout(0, LAYOUT))
    mask = (offs_n < N)[:, None] & (offs_m < M)[None, :]
    value = running
    if WEIGHTED:
        w_ptrs = w_ptr + offs_n.to(gl.int64)[:, None] * stride_wn + offs_m.to(gl.int64)[None, :] * stride_wm
        w = gl.load(w_ptrs, mask=mask, other=0.0).to(gl.float32)
        if POWER == 1:
            value *= gl.abs(w)
        else:
            value *= w * w
    if TILE == 0:
        out_ptrs = out_ptr + offs_n.to(gl.int64)[:, None] * stride_on + offs_m.to(gl.int64)[None, :] * stride_om
        gl.store(out_ptrs, gl.load(out_ptrs, mask=mask, other=0.0) + value, mask=mask)
    else:
        # Past the weight |g| is zero where a dimension ends, for the copies write zeros there.
        value = gl.reshape(value, [HALF // TILE, TILE, BLOCK // TILE, TILE])
        SUMS: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
        sums = gl.convert_layout(gl.sum(gl.sum(value, axis=3), axis=1), SUMS)
        tiles_n = first_n // TILE + gl.arange(0, HALF // TILE, gl.SliceLayout(1, SUMS))
        tiles_m = first_m // TILE + gl.arange(0, BLOCK // TILE, gl.SliceLayout(0, SUMS))
        there = (tiles_n < gl.cdiv(N, TILE))[:, None] & (tiles_m < gl.cdiv(M, TILE))[None, :]
        sum_ptrs = out_ptr + tiles_n.to(gl.int64)[:, None] * stride_on + tiles_m.to(gl.int64)[None, :] * stride_om
        gl.store(sum_ptrs, gl.load(sum_ptrs, mask=there, other=0.0) + sums, mask=there)


@gluon.jit
def _consume(
    x_stages, dy_stages, full, empty, out_ptr, w_ptr, starts_ptr, lens_ptr, R, N, M, num_samples,
    stride_on, stride_om, stride_wn, stride_wm,
    WHICH: gl.constexpr, DTYPE: gl.constexpr, TILE: gl.constexpr, POWER: gl.constexpr, WEIGHTED: gl.constexpr,
    BLOCK: gl.constexpr, BLOCK_T: gl.constexpr, BAND: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup: rows WHICH · 64 .. of each tile."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16])
    product = warpgroup_mma_init(gl.zeros([HALF, BLOCK], gl.float32, LAYOUT))
    step = 0
    for tile in range(gl.program_id(0), gl.cdiv(N, BLOCK) * gl.cdiv(M, BLOCK), gl.num_programs(0)):
        running = gl.zeros([HALF, BLOCK], gl.float32, LAYOUT)  # Σ_j |g_j|^POWER
        for sample in range(num_samples):
            # Not carried from the turn before, which Triton 3.6 makes the first sample's length of every turn.
            _, length = _sample_rows(starts_ptr, lens_ptr, sample, num_samples, R)
            for t in range(0, gl.maximum(length, 1), BLOCK_T):
                stage = step % STAGES
                mbarrier.wait(full.index(stage), (step // STAGES) & 1)
                dy_t = _matrix(dy_stages.index(2 * stage + WHICH), DTYPE, BLOCK_T, HALF).permute((1, 0))
                x_t = _matrix(x_stages.index(stage), DTYPE, BLOCK_T, BLOCK)
                product = warpgroup_mma(dy_t, x_t, product, use_acc=t > 0, is_async=True)
                # The product before this one is done, so its stage may be filled again.
                product = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[product]))
                mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=t > 0)
                step += 1
            gradient = warpgroup_mma_wait(0, deps=[product])
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
            running = _add_raised(running, gradient, POWER)
            product = warpgroup_mma_init(gradient)
        first_n, first_m = _place(tile, N, M, BLOCK, BAND)
        _add_scaled(out_ptr, w_ptr, running, first_n + WHICH * HALF, first_m, N, M,
                    stride_on, stride_om, stride_wn, stride_wm, TILE, POWER, WEIGHTED, BLOCK, LAYOUT)  # fmt: skip


@gluon.jit
def _linear_sensitivity_hopper_kernel(
    out_ptr, w_ptr, x_desc, dy_desc, starts_ptr, lens_ptr, R, N, M, num_samples,
    stride_on, stride_om, stride_wn, stride_wm,
    TILE: gl.constexpr, POWER: gl.constexpr, WEIGHTED: gl.constexpr,
    BLOCK: gl.constexpr, BLOCK_T: gl.constexpr, BAND: gl.constexpr, STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = x_desc.dtype
    x_stages = gl.allocate_shared_memory(DTYPE, [STAGES] + x_desc.block_type.shape, x_desc.layout)  # noqa: RUF005
    dy_stages = gl.allocate_shared_memory(DTYPE, [2 * STAGES] + dy_desc.block_type.shape, dy_desc.layout)  # noqa: RUF005
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    gl.warp_specialize([
        (_consume, (x_stages, dy_stages, full, empty, out_ptr, w_ptr, starts_ptr, lens_ptr, R, N, M, num_samples,
                    stride_on, stride_om, stride_wn, stride_wm, 0, DTYPE, TILE, POWER, WEIGHTED,
                    BLOCK, BLOCK_T, BAND, STAGES)),
        (_consume, (x_stages, dy_stages, full, empty, out_ptr, w_ptr, starts_ptr, lens_ptr, R, N, M, num_samples,
                    stride_on, stride_om, stride_wn, stride_wm, 1, DTYPE, TILE, POWER, WEIGHTED,
                    BLOCK, BLOCK_T, BAND, STAGES)),
        (_produce, (x_desc, dy_desc, x_stages, dy_stages, full, empty, starts_ptr, lens_ptr, R, N, M, num_samples,
                    BLOCK, BLOCK_T, BAND, STAGES)),
    ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


def obstacle(device: torch.device) -> str | None:
    """Why it cannot run there, or None."""
    major, minor = launch.capability(device)
    return None if major == 9 else f"the GPU's compute capability is {major}.{minor}, not 9.0"


def serves(dtype: torch.dtype, tile: int) -> bool:
    return dtype in (torch.bfloat16, torch.float16) and tile in TILES


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
    """acc [n, m] += |w|^power ⊙ Σ_j |dy_jᵀ x_j|^power, in place; x and dy of 16 bits, otherwise NoFormError."""
    linear_sensitivity_tiles(acc, w, x, dy, seq_starts, seq_lens, 0, power, weighted)


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
    """tiles += the tile × tile sums of the same (tile 0: the scores themselves); a tile of `TILES`, otherwise NoFormError."""
    dtype = torch.promote_types(x.dtype, dy.dtype)
    if not serves(dtype, tile) or len(x) > 1 << 30:
        raise launch.NoFormError(f"rows of {dtype}, tile={tile}: the kernel takes 16-bit rows and tiles of {TILES[1:]}")
    problem = Problem.of(tiles, w, x, dy, seq_starts, seq_lens)
    if problem is None:
        return
    out, w, x, dy, seq_starts, seq_lens = problem
    n, m = w.shape
    programs = min(triton.cdiv(n, BLOCK) * triton.cdiv(m, BLOCK), launch.multiprocessors(x.device))
    with launch.on_device(x):
        _linear_sensitivity_hopper_kernel[(programs,)](
            out, w, _descriptor(x, BLOCK), _descriptor(dy, 64), seq_starts, seq_lens,
            len(x), n, m, seq_starts.numel(), *out.stride(), *w.stride(),
            TILE=tile, POWER=power, WEIGHTED=weighted, BLOCK=BLOCK, BLOCK_T=STEP, BAND=BAND, STAGES=STAGES,
            CONSUMER_REGISTERS=CONSUMER_REGISTERS, PRODUCER_REGISTERS=PRODUCER_REGISTERS,
            num_warps=4, **launch.OPTIONS,
        )  # fmt: skip


def _descriptor(rows: torch.Tensor, columns: int) -> TensorDescriptor:
    shape, strides = ragged(rows)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(rows, shape, strides, [1, 1, STEP, columns], layout)
