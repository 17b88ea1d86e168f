"""The ops in plain torch: what each of them means, and what runs where neither pkt._C nor Triton does, on any device."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Elements of one block of a gradient on the CPU: 1 MiB of fp32 stays in a core's L2 while it is folded into the scores.
_BLOCK_ELEMENTS = 1 << 18
# And while products make it: smaller blocks leave the second thread waiting (2^18: a third slower on two).
GRADIENT_ELEMENTS = 1 << 20
# Sums in fp64 copy a block to that type: one that stays in the first caches.
_SUM_ELEMENTS = 1 << 14
# What `best_window` and sums in fp64 need besides the scores on a CPU.
SEARCH_BYTES = 48 * _BLOCK_ELEMENTS

# Elements of a half type that are there in fp32 at once, on a CPU and elsewhere, where launches cost.
WIDENED = {"cpu": 1 << 20}
_WIDENED_DEFAULT = 1 << 24


def widened_elements(device: torch.device) -> int:
    return WIDENED.get(device.type, _WIDENED_DEFAULT)


def fetched(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one dtype and device on the CPU, by one copy: each by its own would wait for the device again."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return list(tensors)
    flat = torch.cat([tensor.flatten() for tensor in tensors]).cpu()
    parts = zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True)
    # Each with memory of its own, so that one can be kept, or sent, without the others.
    return [part.clone().view(tensor.shape) for tensor, part in parts]


def _working(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _spans(seq_starts: Tensor, seq_lens: Tensor) -> list[tuple[int, int]]:
    return [(s, s + n) for s, n in zip(seq_starts.tolist(), seq_lens.tolist(), strict=True) if n]


class Measure(NamedTuple):
    """What is summed over the samples: |θ^weighted · g_j|^power."""

    power: int
    weighted: bool


# Name -> what it sums; `ops.linear_sensitivity_(..., *MEASURES[name])`. Who uses them: the sensitivity; GBLM-Pruner;
# the empirical Fisher's diagonal (EWC, Fisher merging); first-order Taylor pruning.
MEASURES = {
    "theta_grad": Measure(1, True),
    "grad": Measure(1, False),
    "fisher": Measure(2, False),
    "theta_grad_squared": Measure(2, True),
}


def _raised_(values: Tensor, power: int) -> Tensor:
    """|values|^power in place, power 1 or 2."""
    return values.abs_() if power == 1 else values.square_()


def abs_accumulate_(acc: Tensor, theta: Tensor, grad: Tensor, power: int = 1, weighted: bool = True) -> None:
    work = _working(theta, grad)

    def contribution(theta: Tensor, grad: Tensor) -> Tensor:
        return _raised_(theta.to(work) * grad.to(work) if weighted else grad.to(work, copy=True), power)

    if acc.ndim == 0:
        acc += contribution(theta, grad)
        return
    rows = max(1, _BLOCK_ELEMENTS * acc.shape[0] // max(1, acc.numel()))
    for a, t, g in zip(acc.split(rows), theta.split(rows), grad.split(rows), strict=True):
        a += contribution(t, g)


def abs_accumulate_many_(
    acc: list[Tensor], theta: list[Tensor], grad: list[Tensor], power: int = 1, weighted: bool = True
) -> None:
    for one in zip(acc, theta, grad, strict=True):
        abs_accumulate_(*one, power, weighted)


def _gradient_blocks(
    x: Tensor, dy: Tensor, seq_starts: Tensor, seq_lens: Tensor, row_multiple: int, power: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, Σ_j |dY_jᵀ X_j|^power of those rows), one cache-sized block of rows at a time."""
    n, m = dy.shape[1], x.shape[1]
    work = _working(x, dy)
    samples = [(x[a:b].to(work), dy[a:b].to(work)) for a, b in _spans(seq_starts, seq_lens)]
    block = GRADIENT_ELEMENTS if x.device.type == "cpu" else n * m
    rows = max(1, min(n, block // max(1, m)))
    rows = -(-rows // row_multiple) * row_multiple
    grad = torch.empty(min(rows, n), m, dtype=work, device=x.device)
    total = torch.empty_like(grad)
    for top in range(0, n if samples and m else 0, rows):
        part = slice(top, min(top + rows, n))
        height = part.stop - top
        for j, (x_j, dy_j) in enumerate(samples):
            out = (grad if j else total)[:height]
            torch.mm(dy_j[:, part].t(), x_j, out=out)
            _raised_(out, power)
            if j:
                total[:height] += out
        yield part, total[:height]


def _weight(w: Tensor, dtype: torch.dtype, power: int) -> Tensor:
    """|w|^power."""
    return _raised_(w.to(dtype, copy=True), power)


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
    for part, total in _gradient_blocks(x, dy, seq_starts, seq_lens, 1, power):
        if weighted:
            acc[part].addcmul_(total.to(acc.dtype), _weight(w[part], acc.dtype, power))
        else:
            acc[part] += total


def tile_sums(values: Tensor, tile: int) -> Tensor:
    """Sums over tile x tile blocks of the last two dims (over `tile` elements of a vector); ragged edges are kept.

    values [..., n, m] -> [..., ceil(n/tile), ceil(m/tile)], fp32.
    """
    pads = [0, -values.shape[-1] % tile]
    if values.ndim > 1:
        pads += [0, -values.shape[-2] % tile]
    padded = torch.nn.functional.pad(values, pads)
    if values.ndim == 1:
        return padded.view(-1, tile).sum(1, dtype=torch.float32)
    *lead, n, m = padded.shape
    return padded.view(*lead, n // tile, tile, m // tile, tile).sum((-3, -1), dtype=torch.float32)


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
    for part, total in _gradient_blocks(x, dy, seq_starts, seq_lens, tile, power):
        if weighted:
            total *= _weight(w[part], total.dtype, power)
        tiles[part.start // tile : -(-part.stop // tile)] += tile_sums(total, tile)


def double_sum(values: Tensor, dim: int | None = None) -> Tensor:
    """Σ in fp64 of all values, or of a matrix along `dim`. Torch's own would first make an fp64 copy of the whole.

    Beside a CPU, Σ of all in fp64 is of rows summed in fp32, whose roundings cancel (`rows_first`).
    """
    if values.ndim == 0 or values.device.type != "cpu":
        return rows_first(values) if dim is None else values.sum(dim, dtype=torch.float64)
    rows = max(1, _SUM_ELEMENTS * values.shape[0] // max(1, values.numel()))
    parts = (p.sum(dtype=torch.float64) if dim is None else p.sum(dim, dtype=torch.float64) for p in values.split(rows))
    return torch.cat(list(parts)) if dim == 1 else functools.reduce(Tensor.add_, parts)


def rows_first(values: Tensor) -> Tensor:
    """Σ of all values, each row's in their own type and the rows' in fp64: of fp32 rows to about 1e-9 of it, with one read."""
    return (values.sum(-1) if values.ndim > 1 else values).sum(dtype=torch.float64)


def add_rows_(to: Tensor, index: Tensor, rows: Tensor) -> None:
    """to[index[i]] += rows[i], in an order that does not change from run to run; rows of `to`'s dtype."""
    if to.is_cuda:
        # index_add_ adds by atomics there; this sorts the indices first.
        to.index_put_((index,), rows, accumulate=True)
    else:
        to.index_add_(0, index, rows)


def embedding_rows(
    ids: Tensor, dy: Tensor, seq_starts: Tensor, seq_lens: Tensor, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """The gradient rows an embedding gets, one per (sample, token id): ids [U], rows [U, d], summed over positions."""
    work = _working(dy)
    spans = _spans(seq_starts, seq_lens)
    if not spans:
        return ids.new_empty(0), dy.new_empty(0, dy.shape[1], dtype=work)
    keys = torch.cat([ids[a:b] + j * vocabulary for j, (a, b) in enumerate(spans)])
    rows = torch.cat([dy[a:b] for a, b in spans]).to(work)
    unique, inverse = keys.unique(return_inverse=True)
    summed = torch.zeros(len(unique), dy.shape[1], dtype=work, device=dy.device)
    add_rows_(summed, inverse, rows)
    return unique % vocabulary, summed


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
    touched, rows = embedding_rows(ids, dy, seq_starts, seq_lens, w.shape[0])
    if weighted:
        rows *= w[touched].to(rows.dtype)
    add_rows_(acc, touched, _raised_(rows, power).to(acc.dtype))


def window_bits(rows: int, cols: int) -> int:
    """Bits of max(S) kept when S is quantized: 36, less where a window's exact sum would not fit in 62."""
    return min(36, 62 - math.ceil(math.log2(max(1, rows * cols))))


def best_window(score: Tensor, rows: int, cols: int, row_step: int = 1, col_step: int = 1) -> tuple[Tensor, Tensor]:
    """Exact integer sums of every window, by prefix sums (their wrap-around cancels in the differences)."""
    exponent = torch.frexp(score.max().double()).exponent
    scale = torch.ldexp(torch.ones((), dtype=torch.float64, device=score.device), window_bits(rows, cols) - exponent)

    def quantized(part: Tensor) -> Tensor:
        return (part.double() * scale).add_(0.5).floor_().long()

    # A block of rows at a time, so that no copy of the scores exists; on a GPU, where launches cost, a larger one.
    block = _BLOCK_ELEMENTS if score.device.type == "cpu" else 64 * _BLOCK_ELEMENTS
    height = max(1, block // score.shape[1])
    # Sums over rows top .. top + rows of each column, for the last row of the block before.
    column = torch.zeros(1, score.shape[1], dtype=torch.int64, device=score.device)
    for part in score[: rows - 1].split(height):
        column += quantized(part).sum(0)
    best: list[tuple[Tensor, Tensor]] = []
    for top in range(0, score.shape[0] - rows + 1, height):
        stop = min(top + height, score.shape[0] - rows + 1)
        change = quantized(score[top + rows - 1 : stop + rows - 1])
        change[1:] -= quantized(score[top : stop - 1])
        sums = change.cumsum_(0).add_(column)
        column = sums[-1:] - quantized(score[stop - 1 : stop])
        sums = _sliding(sums[-top % row_step :: row_step], cols)[:, ::col_step]
        if not sums.numel():
            continue
        flat = sums.flatten()
        total = flat.max()
        # argmax does not promise the first of equal maxima.
        first = (
            (flat == total).to(torch.uint8).argmax() if flat.device.type == "cpu" else (flat == total).nonzero()[0, 0]
        )
        row = top + -top % row_step + first // sums.shape[1] * row_step
        best.append((total, torch.stack([row, first % sums.shape[1] * col_step])))
    totals = torch.stack([total for total, _ in best])
    # The first block of those that share the largest sum.
    found = int((totals == totals.max()).to(torch.uint8).argmax())
    return best[found][1], best[found][0]


def best_blocks(score: Tensor, rows: int, cols: int, row_block: int = 1, col_block: int = 1) -> tuple[Tensor, Tensor]:
    """Sums of integers that doubles hold exactly, so that their order does not matter."""
    n, m = score.shape
    bits = min(36, 53 - (max(row_block * m, col_block * n) - 1).bit_length())
    exponent = torch.frexp(score.max().double()).exponent
    scale = torch.ldexp(torch.ones((), dtype=torch.float64, device=score.device), bits - exponent)
    height = max(1, (2 if score.device.type == "cpu" else 1024) * _SUM_ELEMENTS // m)
    row_sums, column_sums = (torch.zeros(size, dtype=torch.float64, device=score.device) for size in (n, m))
    quantized = torch.empty(min(height, n), m, dtype=torch.float64, device=score.device)
    for top in range(0, n, height):
        part = quantized[: min(height, n - top)]
        part.copy_(score[top : top + height]).mul_(scale).add_(0.5).floor_()
        torch.sum(part, 1, out=row_sums[top : top + height])
        column_sums += part.sum(0)
    return _best(row_sums, rows, row_block), _best(column_sums, cols, col_block)


def _best(sums: Tensor, count: int, block: int) -> Tensor:
    """The `count` blocks with the largest sums, ascending; the first wins a tie, and a ragged last one is none."""
    whole = sums[: len(sums) // block * block].view(-1, block).sum(1)
    return whole.sort(descending=True, stable=True).indices[:count].sort().values


def _sliding(values: Tensor, width: int) -> Tensor:
    """Sums of `width` neighbours in each row."""
    prefix = values.cumsum(1)
    sums = prefix[:, width - 1 :].clone()
    sums[:, 1:] -= prefix[:, : values.shape[1] - width]
    return sums
