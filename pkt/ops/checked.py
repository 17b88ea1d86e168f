"""What callers use: each op behind checks that name the argument which does not fit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pkt.errors import PktError

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _require(condition: bool, op: str, message: str) -> None:
    if not condition:
        raise PktError(f"pkt::{op}: {message}")


def _shape(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def _check_scores(op: str, acc: Tensor, **others: Tensor) -> None:
    _require(acc.dtype in (torch.float32, torch.float64), op, f"the scores must be fp32, not {_shape(acc)}")
    for name, tensor in others.items():
        _require(tensor.device == acc.device, op, f"{name} is {_shape(tensor)}, the scores are on {acc.device}")
        _require(tensor.dtype in _FLOATS, op, f"{name} must be floating point, not {_shape(tensor)}")


def _check_samples(op: str, length: int, seq_starts: Tensor, seq_lens: Tensor) -> None:
    same = seq_starts.shape == seq_lens.shape and seq_starts.ndim == 1
    _require(same, op, f"seq_starts {_shape(seq_starts)} and seq_lens {_shape(seq_lens)} must be vectors of one length")
    _require(
        seq_starts.dtype == torch.int64 and seq_lens.dtype == torch.int64, op, "seq_starts and seq_lens must be int64"
    )
    if seq_starts.device.type != "cpu":
        # Read on the device, without waiting for it: a violation stops the stream with this message. The same tensors
        # come back for every layer of a batch; they are checked once.
        if getattr(seq_lens, "_pkt_checked", None) == (length, id(seq_starts), seq_starts._version, seq_lens._version):
            return
        order = seq_starts.argsort()
        ends = seq_starts + seq_lens
        good = (seq_lens >= 0).all() & (seq_starts >= 0).all() & (ends <= length).all()
        good &= (ends[order][:-1] <= seq_starts[order][1:]).all()
        torch._assert_async(good, f"pkt::{op}: seq_starts and seq_lens overlap or run past the {length} rows")
        seq_lens._pkt_checked = (length, id(seq_starts), seq_starts._version, seq_lens._version)  # type: ignore[attr-defined]
        return
    end = 0
    for start, size in sorted(zip(seq_starts.tolist(), seq_lens.tolist(), strict=True)):
        if size < 0 or start < 0 or start + size > length:
            raise PktError(f"pkt::{op}: sample rows {start}..{start + size} run past the {length} rows of the batch")
        if size and start < end:
            raise PktError(f"pkt::{op}: sample rows {start}..{start + size} overlap the sample that ends at row {end}")
        end = max(end, start + size)


def _check_power(op: str, power: int) -> None:
    _require(power in (1, 2), op, f"power is {power}; it must be 1 or 2")


def abs_accumulate_(acc: Tensor, theta: Tensor, grad: Tensor, power: int = 1, weighted: bool = True) -> None:
    """acc += |theta * grad| in fp32, in place; any shape and strides, all three of one shape (docs/method.md §1).

    Here and below, other measures (`MEASURES`) add |grad|, grad² or (theta * grad)²: |theta^weighted * grad|^power.
    """
    _check_scores("abs_accumulate_", acc, theta=theta, grad=grad)
    _check_power("abs_accumulate_", power)
    same = acc.shape == theta.shape == grad.shape
    _require(same, "abs_accumulate_", f"shapes differ: acc {_shape(acc)}, theta {_shape(theta)}, grad {_shape(grad)}")
    torch.ops.pkt.abs_accumulate_(acc, theta, grad, power, weighted)


def abs_accumulate_many_(
    acc: Sequence[Tensor], theta: Sequence[Tensor], grad: Sequence[Tensor], power: int = 1, weighted: bool = True
) -> None:
    """`abs_accumulate_` for every (acc, theta, grad): on a GPU one launch for a list of small parameters."""
    op = "abs_accumulate_many_"
    _require(
        len(acc) == len(theta) == len(grad), op, f"lists of {len(acc)}, {len(theta)} and {len(grad)} tensors differ"
    )
    _check_power(op, power)
    for a, t, g in zip(acc, theta, grad, strict=True):
        _check_scores(op, a, theta=t, grad=g)
        same = a.shape == t.shape == g.shape and a.device == acc[0].device
        _require(same, op, f"shapes or devices differ: acc {_shape(a)}, theta {_shape(t)}, grad {_shape(g)}")
    if acc:
        torch.ops.pkt.abs_accumulate_many_(list(acc), list(theta), list(grad), power, weighted)


def _check_linear(
    op: str, shape: Sequence[int], w: Tensor, x: Tensor, dy: Tensor, seq_starts: Tensor, seq_lens: Tensor
) -> None:
    _require(
        w.ndim == 2 and x.ndim == 2 and dy.ndim == 2, op, f"w {_shape(w)}, x {_shape(x)}, dy {_shape(dy)}: not 2-D"
    )
    good = x.shape[0] == dy.shape[0] and tuple(w.shape) == (dy.shape[1], x.shape[1])
    _require(good, op, f"w {_shape(w)} must be [out, in], x {_shape(x)} [rows, in] and dy {_shape(dy)} [rows, out]")
    _require(tuple(shape) == tuple(w.shape), op, f"the scores' shape does not fit w {_shape(w)}")
    _check_samples(op, x.shape[0], seq_starts, seq_lens)


def linear_sensitivity_(
    acc: Tensor,
    w: Tensor,
    x: Tensor,
    dy: Tensor,
    seq_starts: Tensor,
    seq_lens: Tensor,
    power: int = 1,
    weighted: bool = True,
) -> None:
    """acc += |w| * sum_j |dy_jᵀ x_j|, per sample before the absolute value (docs/method.md §1).

    acc [out, in] fp32; w [out, in]; x [rows, in]; dy [rows, out]; sample j is rows seq_starts[j] .. + seq_lens[j] (int64).
    Rows of no sample are never read.
    """
    _check_scores("linear_sensitivity_", acc, w=w, x=x, dy=dy)
    _check_linear("linear_sensitivity_", acc.shape, w, x, dy, seq_starts, seq_lens)
    _check_power("linear_sensitivity_", power)
    torch.ops.pkt.linear_sensitivity_(acc, w, x, dy, seq_starts, seq_lens, power, weighted)


def linear_sensitivity_tiles_(
    tiles: Tensor,
    w: Tensor,
    x: Tensor,
    dy: Tensor,
    seq_starts: Tensor,
    seq_lens: Tensor,
    tile: int,
    power: int = 1,
    weighted: bool = True,
) -> None:
    """tiles += the tile x tile sums of what `linear_sensitivity_` adds; tiles [ceil(out/tile), ceil(in/tile)] fp32."""
    op = "linear_sensitivity_tiles_"
    _check_scores(op, tiles, w=w, x=x, dy=dy)
    _require(tile >= 1, op, f"tile is {tile}; it must be at least 1")
    grid = (-(-w.shape[0] // tile), -(-w.shape[1] // tile))
    _require(tuple(tiles.shape) == grid, op, f"tiles {_shape(tiles)} must be {list(grid)} for w {_shape(w)}")
    _check_linear(op, w.shape, w, x, dy, seq_starts, seq_lens)
    _check_power(op, power)
    torch.ops.pkt.linear_sensitivity_tiles_(tiles, w, x, dy, seq_starts, seq_lens, tile, power, weighted)


def embedding_sensitivity_(
    acc: Tensor,
    w: Tensor,
    ids: Tensor,
    dy: Tensor,
    seq_starts: Tensor,
    seq_lens: Tensor,
    power: int = 1,
    weighted: bool = True,
) -> None:
    """acc += |w| * sum_j |scatter_j(dy)|: a token's positions are summed within its sample before the absolute value.

    acc, w [vocabulary, d]; ids [rows] int64; dy [rows, d]; samples as in `linear_sensitivity_`.
    """
    op = "embedding_sensitivity_"
    _check_scores(op, acc, w=w, dy=dy)
    good = w.ndim == 2 and acc.shape == w.shape and dy.ndim == 2 and dy.shape[1] == w.shape[1]
    _require(good, op, f"acc {_shape(acc)}, w {_shape(w)}, dy {_shape(dy)} do not fit together")
    _require(ids.shape == dy.shape[:1] and ids.dtype == torch.int64, op, f"ids {_shape(ids)} must be int64 [rows]")
    _require(ids.device == acc.device, op, f"ids is {_shape(ids)}, the scores are on {acc.device}")
    _check_samples(op, ids.shape[0], seq_starts, seq_lens)
    _check_power(op, power)
    torch.ops.pkt.embedding_sensitivity_(acc, w, ids, dy, seq_starts, seq_lens, power, weighted)


def best_window(score: Tensor, rows: int, cols: int, row_step: int = 1, col_step: int = 1) -> tuple[Tensor, Tensor]:
    """The rows x cols window of `score` [n, m] with the largest sum (docs/method.md §3).

    Returns (offset int64 [2], its sum in quantized units int64 []). Offsets are multiples of the steps; the first in
    row-major order wins a tie. S is quantized once (`window_bits`), so sums are exact and every device agrees.
    """
    op = "best_window"
    _require(
        score.ndim == 2 and score.dtype in _FLOATS, op, f"the scores must be a floating-point matrix: {_shape(score)}"
    )
    n, m = score.shape
    _require(0 < rows <= n and 0 < cols <= m, op, f"a {rows} x {cols} window does not fit in {n} x {m}")
    _require(row_step > 0 and col_step > 0, op, f"steps must be positive, not {row_step} and {col_step}")
    offset, total = torch.ops.pkt.best_window(score.float(), rows, cols, row_step, col_step)
    return offset, total


def best_blocks(score: Tensor, rows: int, cols: int, row_block: int = 1, col_block: int = 1) -> tuple[Tensor, Tensor]:
    """The `rows` blocks of row_block rows and the `cols` blocks of col_block columns of `score` with the largest sums.

    Returns their numbers, ascending, int64 [rows] and [cols]. Of a ragged last block nothing is chosen; the first wins a tie.
    S is quantized so that sums are exact: every device chooses the same.
    """
    op = "best_blocks"
    _require(
        score.ndim == 2 and score.dtype in _FLOATS, op, f"the scores must be a floating-point matrix: {_shape(score)}"
    )
    n, m = score.shape
    _require(row_block > 0 and col_block > 0, op, f"blocks must be positive, not {row_block} and {col_block}")
    fits = 0 < rows <= n // row_block and 0 < cols <= m // col_block
    _require(fits, op, f"{rows} x {cols} blocks of {row_block} x {col_block} do not fit in {n} x {m}")
    chosen_rows, chosen_cols = torch.ops.pkt.best_blocks(score.float(), rows, cols, row_block, col_block)
    return chosen_rows, chosen_cols


def _check_rsvd(op: str, name: str, a: Tensor, rank: int, oversample: int, iters: int) -> None:
    _require(a.ndim == 2, op, f"{name} must be a matrix, not {_shape(a)}")
    _require(a.dtype in _FLOATS[:3], op, f"{name} must be bf16, fp16 or fp32, not {_shape(a)}")
    _require(0 < rank <= min(a.shape), op, f"rank {rank} is not between 1 and min{tuple(a.shape)}, the shape of {name}")
    good = 0 <= oversample < 2**31 and 0 <= iters < 2**31
    _require(good, op, f"oversample {oversample} and iters {iters} must be between 0 and 2**31 - 1")


def rsvd(
    a: Tensor, rank: int, oversample: int = 16, iters: int = 4, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The `rank` leading singular triplets of `a` [n, m] by a randomized SVD (Halko, Martinsson, Tropp 2011).

    bf16, fp16 or fp32, any strides: a view is neither copied nor widened as a whole. Returns fp32 U [n, rank], S [rank],
    V [m, rank] and stats [4] (`pkt.ops.rsvd_reference` gives its layout), all on `a`'s device, the same bytes for the same seed.
    """
    _check_rsvd("rsvd", "a", a, rank, oversample, iters)
    u, s, v, stats = torch.ops.pkt.rsvd(a, rank, oversample, iters, seed)
    return u, s, v, stats


def rsvd_batch(
    a: Sequence[Tensor], rank: int, oversample: int = 16, iters: int = 4, seed: int = 0
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """`rsvd` of each matrix, of whatever shapes and dtypes, on one device: lists of U, S and V, and stats [len(a), 4].

    On the CPU the bytes of `rsvd` one by one; on a GPU the matrices share the small kernels' launches.
    """
    op = "rsvd_batch"
    for i, matrix in enumerate(a):
        _check_rsvd(op, f"a[{i}]", matrix, rank, oversample, iters)
        _require(
            matrix.device == a[0].device, op, f"a[{i}] is on {matrix.device}, a[0] on {a[0].device}; move them to one"
        )
    if not a:
        return [], [], [], torch.empty(0, 4)
    u, s, v, stats = torch.ops.pkt.rsvd_batch(list(a), rank, oversample, iters, seed)
    return u, s, v, stats
