"""The contiguous window of a score matrix with the largest sum, its best rows and columns, and row, column and block sums, in
exact integers.

score [n, m], non-negative, is read as integers q = ⌊score · 2^(bits - e) + ½⌋ with max(score) = f · 2^e, ½ ≤ f < 1
(docs/method.md §3). bits is 36 or as many as keep a window's sum below 2^62, so that sums are exact in int64 in any order,
and every device finds the same window, ties included (the first in row-major order).

best_window is separable and never stores a summed-area table. Pass 1 finds max(score). Pass 2 slides the window's
width along every row: P[i, c] = Σ_k q[i, c + k], by a scan over q[i, c + cols - 1] - q[i, c - 1]. It writes P only for
the rows that pass 3 adds or drops, and for the others their sums by chunks of rows, of which a scan down the columns makes
running sums. Pass 3 slides its height down P in the same way and keeps the largest sum of every piece; pass 4 takes the
best of those.
Bytes: score twice, P of about 2(n - rows) rows and m - cols + 1 columns written and read once; 2.3 reads of score
for 13824 × 5120 → 11008 × 4096. Limit: memory bandwidth.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pkt_kernels import launch

# Rows that a program has, and columns it holds at a time. Those that slide a window have fewer rows and warps, so that more of
# them run beside each other: the quickest of seven choices on an H200.
CHUNK = 16
WINDOW_CHUNK, WINDOW_WARPS = 8, 2
BLOCK_C = 128
AXIS_CHUNKS = 16
# Rows and columns of a block of the scan: a row of it is a sector of memory or two.
SCAN_R, SCAN_C = 256, 8

LOWEST = tl.constexpr(-(2**63))
HIGHEST = tl.constexpr(2**63 - 1)


def quantization_bits(count: int) -> int:
    """Bits of the largest score that leave the sum of `count` scores below 2^62."""
    return min(36, 62 - (count - 1).bit_length())


@triton.jit
def _scale_exponent(largest_ptr, BITS):
    """bits - e, or a very small number where all scores are zero."""
    largest = tl.load(largest_ptr).to(tl.float64)
    exponent = ((largest.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 1022
    return tl.where(largest > 0, BITS - exponent, -1000)


@triton.jit
def _quantize(score, scale_exponent):
    """⌊score · 2^scale_exponent + ½⌋ as int64; the power of two is built from its bits, which is exact everywhere."""
    scale = ((scale_exponent + 1023) << 52).to(tl.float64, bitcast=True)
    value = score.to(tl.float64) * scale + 0.5
    # Converting between 64-bit types is slow. Above 2^52 a double's last bit is worth 1, so adding 1.5 · 2^52 leaves
    # the nearest integer in the low bits; where that is the one above, take the one below.
    shifted = value + 6755399441055744.0
    nearest = shifted.to(tl.int64, bitcast=True) - 0x4338000000000000
    return nearest - (shifted - 6755399441055744.0 > value).to(tl.int64)


@triton.jit
def _row_windows_kernel(
    score_ptr, largest_ptr, sums_ptr, chunk_sums_ptr,
    N, M, COLS, COL_STEP, NUM_C, LOW_END, HIGH_START,
    stride_n, stride_m, BITS,
    CHUNK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """P[i, c] and its sums over a chunk of rows, for one chunk and all columns."""
    scale_exponent = _scale_exponent(largest_ptr, BITS)
    chunk = tl.program_id(0).to(tl.int64)
    offs_i = chunk * CHUNK + tl.arange(0, CHUNK)
    mask_i = offs_i < N
    row_ptrs = score_ptr + offs_i[:, None] * stride_n

    first_window = tl.zeros((CHUNK, BLOCK_C), dtype=tl.int64)
    for first in tl.range(0, COLS, BLOCK_C, num_stages=4):
        offs_c = first + tl.arange(0, BLOCK_C)
        mask = mask_i[:, None] & (offs_c < COLS)[None, :]
        score = tl.load(row_ptrs + offs_c.to(tl.int64)[None, :] * stride_m, mask=mask, other=0.0)
        first_window += _quantize(score, scale_exponent)
    window = tl.sum(first_window, axis=1)  # of the last column seen, [CHUNK]

    # Rows from LOW_END to HIGH_START are needed in chunk sums only, and have no place in P.
    place = tl.where(offs_i < LOW_END, offs_i, offs_i - tl.maximum(HIGH_START - LOW_END, 0))
    stored = mask_i & ((offs_i < LOW_END) | (offs_i >= HIGH_START))
    for first in range(0, M - COLS + 1, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        moves = mask_i[:, None] & ((offs_c > 0) & (offs_c <= M - COLS))[None, :]
        columns = offs_c.to(tl.int64)[None, :] - 1
        entering = tl.load(row_ptrs + (columns + COLS) * stride_m, mask=moves, other=0.0)
        leaving = tl.load(row_ptrs + columns * stride_m, mask=moves, other=0.0)
        change = _quantize(entering, scale_exponent) - _quantize(leaving, scale_exponent)
        windows = window[:, None] + tl.cumsum(change, axis=1)
        window += tl.sum(change, axis=1)
        kept = (offs_c % COL_STEP == 0) & (offs_c <= M - COLS)
        slot = (offs_c // COL_STEP).to(tl.int64)
        tl.store(sums_ptr + place[:, None] * NUM_C + slot[None, :], windows, mask=stored[:, None] & kept[None, :])
        chunk_sum = tl.sum(tl.where(mask_i[:, None], windows, 0), axis=0)
        tl.store(chunk_sums_ptr + (chunk + 1) * NUM_C + slot, chunk_sum, mask=kept)


@triton.jit
def _column_scan_kernel(sums_ptr, rows, columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Running sums down BLOCK_C columns, in place: BLOCK_R rows at a time, so that their loads are in flight together."""
    offs_c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    before = tl.zeros((BLOCK_C,), dtype=tl.int64)
    for first in range(0, rows, BLOCK_R):
        offs_r = first + tl.arange(0, BLOCK_R)
        mask = (offs_r < rows)[:, None] & (offs_c < columns)[None, :]
        pointers = sums_ptr + offs_r.to(tl.int64)[:, None] * columns + offs_c[None, :]
        values = tl.load(pointers, mask=mask, other=0)
        tl.store(pointers, before[None, :] + tl.cumsum(values, axis=0), mask=mask)
        before += tl.sum(values, axis=0)


@triton.jit
def _column_windows_kernel(
    sums_ptr, chunk_totals_ptr, best_ptr, index_ptr,
    N, ROWS, ROW_STEP, NUM_C, LOW_END, HIGH_START,
    CHUNK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The best of CHUNK row offsets × BLOCK_C column offsets: its sum, and its place among all offsets."""
    chunk = tl.program_id(0).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < NUM_C
    offs_c = offs_c.to(tl.int64)
    shift = tl.maximum(HIGH_START - LOW_END, 0)

    # The window at the chunk's first offset: whole chunks, then the rows that are left.
    whole = ROWS // CHUNK
    window = tl.load(chunk_totals_ptr + (chunk + whole) * NUM_C + offs_c, mask=mask_c, other=0)
    window -= tl.load(chunk_totals_ptr + chunk * NUM_C + offs_c, mask=mask_c, other=0)
    left = (chunk + whole) * CHUNK + tl.arange(0, CHUNK)
    mask = (tl.arange(0, CHUNK) < ROWS % CHUNK)[:, None] & mask_c[None, :]
    places = tl.where(left < LOW_END, left, left - shift)
    window += tl.sum(tl.load(sums_ptr + places[:, None] * NUM_C + offs_c[None, :], mask=mask, other=0), axis=0)

    offs_r = chunk * CHUNK + tl.arange(0, CHUNK)
    moves = ((tl.arange(0, CHUNK) > 0) & (offs_r <= N - ROWS))[:, None] & mask_c[None, :]
    leaving = offs_r - 1
    entering = leaving + ROWS
    entering = tl.where(entering < LOW_END, entering, entering - shift)
    change = tl.load(sums_ptr + entering[:, None] * NUM_C + offs_c[None, :], mask=moves, other=0)
    change -= tl.load(sums_ptr + leaving[:, None] * NUM_C + offs_c[None, :], mask=moves, other=0)
    windows = window[None, :] + tl.cumsum(change, axis=0)

    valid = ((offs_r % ROW_STEP == 0) & (offs_r <= N - ROWS))[:, None] & mask_c[None, :]
    windows = tl.where(valid, windows, LOWEST)
    best = tl.max(tl.max(windows, axis=1), axis=0)
    index = (offs_r // ROW_STEP)[:, None] * NUM_C + offs_c[None, :]
    index = tl.where(valid & (windows == best), index, HIGHEST)
    piece = chunk * tl.num_programs(1) + tl.program_id(1)
    tl.store(best_ptr + piece, best)
    tl.store(index_ptr + piece, tl.min(tl.min(index, axis=1), axis=0))


@triton.jit
def _best_piece_kernel(
    best_ptr, index_ptr, offset_ptr, total_ptr,
    num_pieces, NUM_C, ROW_STEP, COL_STEP,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest sum of all pieces, the first in row-major order among equals."""
    best = tl.full((BLOCK,), LOWEST, dtype=tl.int64)
    index = tl.full((BLOCK,), HIGHEST, dtype=tl.int64)
    for first in range(0, num_pieces, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        mask = offs < num_pieces
        sums = tl.load(best_ptr + offs, mask=mask, other=LOWEST)
        places = tl.load(index_ptr + offs, mask=mask, other=HIGHEST)
        better = (sums > best) | ((sums == best) & (places < index))
        best = tl.where(better, sums, best)
        index = tl.where(better, places, index)
    total = tl.max(best, axis=0)
    place = tl.min(tl.where(best == total, index, HIGHEST), axis=0)
    tl.store(offset_ptr, place // NUM_C * ROW_STEP)
    tl.store(offset_ptr + 1, place % NUM_C * COL_STEP)
    tl.store(total_ptr, total)


@triton.jit
def _axis_sums_kernel(
    score_ptr, largest_ptr, row_sums_ptr, column_sums_ptr,
    N, M, stride_n, stride_m, BITS,
    CHUNK: tl.constexpr, BLOCK_C: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Integer row sums of BLOCK_C columns and column sums of CHUNKS · CHUNK rows."""
    scale_exponent = _scale_exponent(largest_ptr, BITS)
    piece_n = tl.program_id(0).to(tl.int64)
    piece_m = tl.program_id(1).to(tl.int64)
    offs_m = piece_m * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m = offs_m < M
    column_sums = tl.zeros((BLOCK_C,), dtype=tl.int64)
    for i in range(CHUNKS):
        offs_n = (piece_n * CHUNKS + i) * CHUNK + tl.arange(0, CHUNK)
        mask_n = offs_n < N
        score_ptrs = score_ptr + offs_n[:, None] * stride_n + offs_m[None, :] * stride_m
        q = _quantize(tl.load(score_ptrs, mask=mask_n[:, None] & mask_m[None, :], other=0.0), scale_exponent)
        column_sums += tl.sum(q, axis=0)
        tl.store(row_sums_ptr + piece_m * N + offs_n, tl.sum(q, axis=1), mask=mask_n)
    tl.store(column_sums_ptr + piece_n * M + offs_m, column_sums, mask=mask_m)


@triton.jit
def _block_sums_kernel(
    score_ptr, largest_ptr, sums_ptr,
    N, M, BLOCK, blocks_m, stride_n, stride_m, BITS,
    CHUNK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The integer sum of one BLOCK × BLOCK square."""
    scale_exponent = _scale_exponent(largest_ptr, BITS)
    block = tl.program_id(0).to(tl.int64)
    block_n = block // blocks_m
    block_m = block % blocks_m
    total = tl.zeros((CHUNK, BLOCK_C), dtype=tl.int64)
    for i in range(0, BLOCK, CHUNK):
        offs_i = i + tl.arange(0, CHUNK)
        offs_n = block_n * BLOCK + offs_i
        mask_n = (offs_i < BLOCK) & (offs_n < N)
        for c in range(0, BLOCK, BLOCK_C):
            offs_c = c + tl.arange(0, BLOCK_C)
            offs_m = block_m * BLOCK + offs_c
            mask_m = (offs_c < BLOCK) & (offs_m < M)
            score_ptrs = score_ptr + offs_n[:, None] * stride_n + offs_m[None, :] * stride_m
            total += _quantize(tl.load(score_ptrs, mask=mask_n[:, None] & mask_m[None, :], other=0.0), scale_exponent)
    tl.store(sums_ptr + block, tl.sum(tl.sum(total, axis=1), axis=0))


def best_window(
    score: torch.Tensor, rows: int, cols: int, row_step: int = 1, col_step: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Offset int64[2] and integer sum int64[] of the best rows × cols window, at multiples of the steps."""
    n, m = score.shape
    num_c = (m - cols) // col_step + 1
    # P is kept for the rows that leave a window and for those that enter one or are left over from whole chunks.
    low_end, high_start = n - rows, rows - rows % WINDOW_CHUNK
    kept_rows = n - max(high_start - low_end, 0)
    chunks, row_pieces = triton.cdiv(n, WINDOW_CHUNK), triton.cdiv(n - rows + 1, WINDOW_CHUNK)
    column_pieces = triton.cdiv(num_c, BLOCK_C)
    with launch.on_device(score):
        largest = score.amax()
        sums = score.new_empty((kept_rows, num_c), dtype=torch.int64)
        chunk_sums = score.new_zeros((chunks + 1, num_c), dtype=torch.int64)
        _row_windows_kernel[(chunks,)](
            score, largest, sums, chunk_sums,
            n, m, cols, col_step, num_c, low_end, high_start, *score.stride(), quantization_bits(rows * cols),
            CHUNK=WINDOW_CHUNK, BLOCK_C=BLOCK_C, num_warps=WINDOW_WARPS, **launch.OPTIONS,
        )  # fmt: skip
        # torch's cumsum(0) gives a column to one thread, whose loads follow one another.
        _column_scan_kernel[(triton.cdiv(num_c, SCAN_C),)](
            chunk_sums, chunks + 1, num_c, BLOCK_R=SCAN_R, BLOCK_C=SCAN_C, num_warps=8, **launch.OPTIONS
        )
        best = score.new_empty(row_pieces * column_pieces, dtype=torch.int64)
        index = torch.empty_like(best)
        _column_windows_kernel[(row_pieces, column_pieces)](
            sums, chunk_sums, best, index,
            n, rows, row_step, num_c, low_end, high_start,
            CHUNK=WINDOW_CHUNK, BLOCK_C=BLOCK_C, num_warps=4, **launch.OPTIONS,
        )  # fmt: skip
        offset = score.new_empty(2, dtype=torch.int64)
        total = score.new_empty((), dtype=torch.int64)
        _best_piece_kernel[(1,)](best, index, offset, total, best.numel(), num_c, row_step, col_step,
                                 BLOCK=1024, num_warps=4, **launch.OPTIONS)  # fmt: skip
    return offset, total


def _axis_totals(score: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integer row sums [n] and column sums [m] from one pass, and the largest score, which took another."""
    n, m = score.shape
    pieces = triton.cdiv(n, CHUNK * AXIS_CHUNKS), triton.cdiv(m, BLOCK_C)
    with launch.on_device(score):
        largest = score.amax()
        row_sums = score.new_empty((pieces[1], n), dtype=torch.int64)
        column_sums = score.new_empty((pieces[0], m), dtype=torch.int64)
        _axis_sums_kernel[pieces](
            score, largest, row_sums, column_sums,
            n, m, *score.stride(), bits,
            CHUNK=CHUNK, BLOCK_C=BLOCK_C, CHUNKS=AXIS_CHUNKS, num_warps=4, **launch.OPTIONS,
        )  # fmt: skip
    return row_sums.sum(0), column_sums.sum(0), largest


def axis_sums(score: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row sums [n] and column sums [m] in fp64, from one pass; exact integers scaled back, the same on every device."""
    bits = quantization_bits(max(score.shape))
    row_sums, column_sums, largest = _axis_totals(score, bits)
    return _scale_back(row_sums, largest, bits), _scale_back(column_sums, largest, bits)


def block_bits(n: int, m: int, row_block: int, col_block: int) -> int:
    """Bits of the largest score that leave a block's sum below 2^53, so that doubles hold it exactly too."""
    return min(36, 53 - (max(row_block * m, col_block * n) - 1).bit_length())


def best_blocks(
    score: torch.Tensor, rows: int, cols: int, row_block: int = 1, col_block: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `rows` blocks of row_block rows and the `cols` blocks of columns with the largest sums, each ascending, int64."""
    n, m = score.shape
    row_sums, column_sums, _ = _axis_totals(score, block_bits(n, m, row_block, col_block))
    return _best(row_sums, rows, row_block), _best(column_sums, cols, col_block)


def _best(sums: torch.Tensor, count: int, block: int) -> torch.Tensor:
    whole = sums[: len(sums) // block * block].view(-1, block).sum(1)
    return whole.sort(descending=True, stable=True).indices[:count].sort().values


def block_sums(score: torch.Tensor, block: int) -> torch.Tensor:
    """Sums of the block × block squares, [⌈n/block⌉, ⌈m/block⌉] in fp64; exact integers scaled back."""
    n, m = score.shape
    bits = quantization_bits(block * block)
    with launch.on_device(score):
        largest = score.amax()
        sums = score.new_empty((triton.cdiv(n, block), triton.cdiv(m, block)), dtype=torch.int64)
        _block_sums_kernel[(sums.numel(),)](
            score, largest, sums,
            n, m, block, sums.shape[1], *score.stride(), bits,
            CHUNK=CHUNK, BLOCK_C=launch.power_of_two(block, 16, BLOCK_C), num_warps=4, **launch.OPTIONS,
        )  # fmt: skip
    return _scale_back(sums, largest, bits)


def _scale_back(sums: torch.Tensor, largest: torch.Tensor, bits: int) -> torch.Tensor:
    """sums · 2^(e - bits), exact up to fp64's 53 bits."""
    return torch.ldexp(sums.double(), torch.frexp(largest).exponent - bits)
