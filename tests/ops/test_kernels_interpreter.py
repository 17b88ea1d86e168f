"""The Triton kernels' numbers, on the CPU: Triton's interpreter against the formulas in fp64.

Triton interprets only if told so before it is imported, and other tests import it. So the cases run in a process of
their own, `python test_kernels_interpreter.py RESULTS CASE...`, and each test here reports one of them.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from torch import Tensor

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAN = float("nan")
# On top of twice the error of plain torch in the working dtype: the kernels' products and sums are fp32 throughout.
FLOOR = 1e-6

CASES: dict[str, Callable[[], None]] = {}

# (power, weighted): Σ|g|, Σg², Σ(θg)²; every other case is the default, Σ|θg|.
MEASURES = [(1, False), (2, False), (2, True)]


def cases(*rows: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a check once a row of arguments; a row is a value or a tuple."""

    def register(check: Callable[..., None]) -> Callable[..., None]:
        for row in rows:
            arguments = row if isinstance(row, tuple) else (row,)
            name = f"{check.__name__}[{'-'.join(map(_name, arguments))}]"
            CASES[name] = lambda arguments=arguments: check(*arguments)
        return check

    return register


def _name(argument: Any) -> str:
    return str(argument).replace("torch.", "").replace(" ", "")


def relative(value: Tensor, truth: Tensor) -> float:
    assert bool(value.isfinite().all())
    return float((value.double() - truth).norm() / truth.norm().clamp_min(1e-30))


def summand(theta: Tensor, grad: Tensor, power: int = 1, weighted: bool = True) -> Tensor:
    """|θ^weighted · g|^power, the definition."""
    return (theta * grad if weighted else grad).abs() ** power


# --- linear sensitivity ---------------------------------------------------------------------------------------------


def packed(lens: list[int], gap: int, *widths: int, dtype: torch.dtype = FP32) -> tuple[Tensor, Tensor, list[Tensor]]:
    """seq_starts, seq_lens and a random matrix a width; the rows between samples hold NaN."""
    starts, rows = [], gap
    for length in lens:
        starts.append(rows)
        rows += length + gap
    matrices = [torch.full((rows, width), NAN, dtype=dtype) for width in widths]
    for matrix in matrices:
        for start, length in zip(starts, lens, strict=True):
            matrix[start : start + length] = torch.randn(length, matrix.shape[1]).to(dtype)
    return torch.tensor(starts, dtype=torch.int64), torch.tensor(lens, dtype=torch.int64), matrices


def linear_reference(
    w: Tensor, x: Tensor, dy: Tensor, starts: Tensor, lens: Tensor, work: torch.dtype, *measure: Any
) -> Tensor:
    total = torch.zeros_like(w, dtype=torch.promote_types(work, FP32))
    for start, length in zip(starts.tolist(), lens.tolist(), strict=True):
        x_j, dy_j = x[start : start + length].to(work), dy[start : start + length].to(work)
        total += summand(w.to(total.dtype), (dy_j.T @ x_j).to(total.dtype), *measure)
    return total


def check_linear(
    w: Tensor, x: Tensor, dy: Tensor, starts: Tensor, lens: Tensor, acc: Tensor | None = None, measure: Any = ()
) -> None:
    from pkt_kernels.linear_sensitivity import linear_sensitivity

    work = torch.promote_types(x.dtype, dy.dtype)
    truth = linear_reference(w, x, dy, starts, lens, torch.float64, *measure)
    plain = relative(linear_reference(w, x, dy, starts, lens, work, *measure), truth)
    acc = torch.empty_like(w, dtype=FP32) if acc is None else acc
    acc.fill_(0.0)
    linear_sensitivity(acc, w, x, dy, starts, lens, *measure)
    error = relative(acc, truth)
    assert error <= 2 * plain + FLOOR, (error, plain)
    first = acc.clone()
    acc.fill_(1.0)
    linear_sensitivity(acc, w, x, dy, starts, lens, *measure)
    assert torch.equal(acc, 1.0 + first), "it adds, and twice the same"


def use(capability: tuple[int, int], blocks: int | None = None) -> None:
    """Run as on that GPU; `blocks` picks a row of the tuned table."""
    from pkt_kernels import launch, linear_sensitivity

    launch.capability = lambda device: capability
    if blocks is not None:
        table = {key: (rows[min(blocks, len(rows) - 1)],) for key, rows in linear_sensitivity.TUNED.items()}
        linear_sensitivity.TUNED = table


DESCRIPTORS, POINTERS = (9, 0), (8, 0)
SHAPES = [
    (1, 1, [1]),
    (1, 131, [63, 64, 65]),
    (127, 65, [1, 0, 130]),
    (129, 257, [7, 33]),
    (64, 192, [0]),
]


@cases(*((n, m, lens, FP32, blocks, DESCRIPTORS) for (n, m, lens), blocks in itertools.product(SHAPES, (0, 1))),
       *((n, m, lens, BF16, blocks, DESCRIPTORS) for (n, m, lens), blocks in itertools.product(SHAPES, (0, 1))),
       *((n, m, lens, dtype, 0, POINTERS) for (n, m, lens), dtype in itertools.product(SHAPES, (BF16, FP32))),
       (127, 65, [1, 0, 130], FP16, 0, DESCRIPTORS), (129, 257, [7, 33], FP16, 1, POINTERS))  # fmt: skip
def linear(n: int, m: int, lens: list[int], dtype: torch.dtype, blocks: int, capability: tuple[int, int]) -> None:
    use(capability, blocks)
    starts, lens_, (x, dy) = packed(lens, 3, m, n, dtype=dtype)
    check_linear(torch.randn(n, m).to(dtype), x, dy, starts, lens_)


@cases(*((capability, dtype, *measure) for (capability, dtype), measure in itertools.product(
           [(DESCRIPTORS, BF16), (DESCRIPTORS, FP32), (POINTERS, FP16)], MEASURES)))  # fmt: skip
def linear_measures(capability: tuple[int, int], dtype: torch.dtype, *measure: Any) -> None:
    use(capability)
    starts, lens, (x, dy) = packed([7, 0, 33], 3, 257, 129, dtype=dtype)
    w = torch.randn(129, 257).to(dtype)
    if not measure[1]:  # the weight must not be read
        w.fill_(NAN)
    check_linear(w, x, dy, starts, lens, measure=measure)


@cases((DESCRIPTORS,), (POINTERS,))
def linear_many_samples(capability: tuple[int, int]) -> None:
    use(capability)
    starts, lens, (x, dy) = packed([i % 5 for i in range(70)], 1, 40, 24, dtype=BF16)
    check_linear(torch.randn(24, 40), x, dy, starts, lens)


@cases(*itertools.product(["shifted", "transposed rows", "transposed weight", "slice of scores", "every other column"],
                          [DESCRIPTORS, POINTERS]))  # fmt: skip
def linear_strided(layout: str, capability: tuple[int, int]) -> None:
    use(capability)
    n, m = 72, 40
    starts, lens, (x, dy) = packed([9, 30], 2, m + 8, n + 8)
    x[:, m:], dy[:, n:] = NAN, NAN
    x, dy, w, acc = x[:, :m], dy[:, :n], torch.randn(n, m), torch.empty(n, m)
    if layout == "shifted":
        x = torch.full((1 + x.numel(),), NAN)[1:].view(x.shape).copy_(x)
        dy = torch.full((1 + dy.numel(),), NAN)[1:].view(dy.shape).copy_(dy)
    elif layout == "transposed rows":
        x, dy = x.T.contiguous().T, dy.T.contiguous().T
    elif layout == "transposed weight":
        w, acc = torch.randn(m, n).T, torch.empty(m, n).T
    elif layout == "slice of scores":
        whole = torch.full((n + 2, m + 3), NAN)
        acc = whole[1:-1, 2:-1]
        check_linear(w, x, dy, starts, lens, acc)
        acc.fill_(NAN)
        assert bool(whole.isnan().all()), "its neighbours are untouched"
        return
    else:
        wide = torch.full((len(x), 2 * m), NAN)
        wide[:, ::2] = x
        x = wide[:, ::2]
    check_linear(w, x, dy, starts, lens, acc)


@cases((FP32, BF16, BF16), (BF16, BF16, FP32), (BF16, FP16, BF16), (FP16, FP32, FP32))
def linear_mixed_dtypes(w_dtype: torch.dtype, x_dtype: torch.dtype, dy_dtype: torch.dtype) -> None:
    starts, lens, (x, dy) = packed([20, 13], 2, 24, 16)
    check_linear(torch.randn(16, 24).to(w_dtype), x.to(x_dtype), dy.to(dy_dtype), starts, lens)


@cases("no samples", "no rows", "empty weight", "past the end")
def linear_edges(what: str) -> None:
    from pkt_kernels.linear_sensitivity import linear_sensitivity

    n, m, rows = 8, 0 if what == "empty weight" else 16, 0 if what == "no rows" else 12
    starts = torch.zeros(0 if what == "no samples" else 1, dtype=torch.int64)
    lens = torch.full_like(starts, 99)
    x, dy, w, acc = torch.randn(rows, m), torch.randn(rows, n), torch.randn(n, m), torch.zeros(n, m)
    linear_sensitivity(acc, w, x, dy, starts, lens)
    truth = w.abs() * (dy.T @ x).abs() if what == "past the end" else torch.zeros(n, m)
    torch.testing.assert_close(acc, truth)


@cases(*itertools.product([1, 16, 64], [(70, 200), (1, 1)], [DESCRIPTORS], [BF16]), (32, (70, 200), POINTERS, FP32),
       *itertools.product([128, 48, 192], [(130, 129)], [DESCRIPTORS], [BF16, FP32]), (64, (0, 8), DESCRIPTORS, BF16),
       *((tile, (130, 129), DESCRIPTORS, BF16, *measure) for tile, measure in itertools.product([16, 48], MEASURES)))  # fmt: skip
def linear_tiles(
    tile: int, shape: tuple[int, int], capability: tuple[int, int], dtype: torch.dtype, *measure: Any
) -> None:
    from pkt_kernels.linear_sensitivity import linear_sensitivity_tiles

    use(capability)
    n, m = shape
    starts, lens, (x, dy) = packed([9, 0, 70], 2, m, n, dtype=dtype)
    w = torch.randn(n, m).to(dtype)
    whole = torch.zeros(-(-n // tile) * tile, -(-m // tile) * tile, dtype=torch.float64)
    whole[:n, :m] = linear_reference(w, x, dy, starts, lens, torch.float64, *measure)
    truth = whole.view(-(-n // tile), tile, -(-m // tile), tile).sum((1, 3))
    tiles = torch.zeros(truth.shape)
    linear_sensitivity_tiles(tiles, w, x, dy, starts, lens, tile, *measure)
    assert relative(tiles, truth) <= FLOOR


@cases(0, -16, 7, 72)
def linear_tiles_refused(tile: int) -> None:
    from pkt_kernels.launch import NoFormError
    from pkt_kernels.linear_sensitivity import linear_sensitivity_tiles

    empty = torch.empty(0, dtype=torch.int64)
    with pytest.raises(NoFormError, match="powers of two up to 128 and multiples of 16"):
        linear_sensitivity_tiles(*[torch.empty(8, 8)] * 4, empty, empty, tile)


@cases((9, 2, 132), (9, 4, 132), (10, 2, 148), (8, 2, 108), (12, 2, 170))
def linear_blocks(major: int, itemsize: int, multiprocessors: int) -> None:
    from pkt_kernels.linear_sensitivity import choose_blocks

    dtype = BF16 if itemsize == 2 else FP32
    small = choose_blocks(256, 256, dtype, (major, 0), multiprocessors)
    large = choose_blocks(13824, 5120, dtype, (major, 0), multiprocessors)
    assert small.n * small.m < large.n * large.m
    for tile in (1, 64):
        assert choose_blocks(13824, 5120, dtype, (major, 0), multiprocessors, tile).m % tile == 0


# --- |theta * grad| -------------------------------------------------------------------------------------------------


def check_abs_accumulate(acc: Tensor, theta: Tensor, grad: Tensor, *measure: Any) -> None:
    from pkt_kernels.abs_accumulate import abs_accumulate

    truth = acc.double() + summand(theta.double(), grad.double(), *measure)
    abs_accumulate(acc, theta, grad, *measure)
    assert relative(acc, truth) <= FLOOR


@cases(*itertools.product([(), (1,), (4095,), (4097,), (3, 5, 7), (0, 4)], [(BF16, BF16), (FP32, BF16), (FP16, FP32)]))
def accumulate(shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check_abs_accumulate(torch.rand(shape), torch.randn(shape).to(dtypes[0]), torch.randn(shape).to(dtypes[1]))


@cases(*MEASURES)
def accumulate_measures(*measure: Any) -> None:
    for theta, grad in ((torch.randn(4097), torch.randn(4097)), (torch.randn(33, 17).to(BF16), torch.randn(17, 33).T)):
        unread = theta if measure[1] else torch.full_like(theta, NAN)
        check_abs_accumulate(torch.rand(theta.shape), unread, grad, *measure)


@cases("transposed", "shifted", "expanded", "channels last", "steps", "six dimensions")
def accumulate_strided(layout: str) -> None:
    if layout == "transposed":
        check_abs_accumulate(torch.rand(33, 17), torch.randn(17, 33).T, torch.randn(33, 17))
        check_abs_accumulate(torch.rand(17, 33).T, torch.randn(17, 33).T, torch.randn(17, 33).T)
    elif layout == "shifted":
        check_abs_accumulate(torch.rand(100)[1:], torch.randn(101)[2:], torch.randn(99))
    elif layout == "expanded":
        check_abs_accumulate(torch.rand(5, 7), torch.randn(7).expand(5, 7), torch.randn(5, 1).expand(5, 7))
    elif layout == "channels last":
        grad = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
        check_abs_accumulate(torch.rand(2, 3, 4, 5), torch.randn(2, 3, 4, 5), grad)
    elif layout == "steps":
        whole = torch.full((9, 14), NAN)
        acc = whole[::2, 1::3]
        acc.fill_(1.0)
        check_abs_accumulate(acc, torch.randn(5, 5), torch.randn(5, 5))
        acc.fill_(NAN)
        assert bool(whole.isnan().all())
    else:
        shape, order = (2, 3, 2, 3, 2, 3), (5, 1, 3, 2, 0, 4)
        back = [order.index(i) for i in range(6)]
        theta = torch.randn([shape[i] for i in order]).permute(back)
        check_abs_accumulate(torch.rand(shape), theta, torch.randn(shape))


@cases("aligned", "unaligned", "mixed", "none", *(("mixed", *measure) for measure in MEASURES))
def accumulate_many(kind: str, *measure: Any) -> None:
    from pkt_kernels.abs_accumulate import abs_accumulate_many

    shapes = [] if kind == "none" else [(5,), (64, 130), (0,), (1,), (7, 3)]
    dtypes = itertools.cycle([BF16, FP32] if kind == "mixed" else [BF16])
    shift = 1 if kind == "unaligned" else 0
    accs = [torch.rand(shape) for shape in shapes]
    thetas = [torch.randn(torch.Size(shape).numel() + shift)[shift:].view(shape).to(next(dtypes)) for shape in shapes]
    grads = [torch.randn(shape).to(BF16) for shape in shapes]
    if kind == "mixed":
        grads[1] = torch.randn(130, 64).to(BF16).T
    wide = zip(accs, thetas, grads, strict=True)
    truths = [a.double() + summand(t.double(), g.double(), *measure) for a, t, g in wide]
    abs_accumulate_many(accs, thetas, grads, *measure)
    for acc, truth in zip(accs, truths, strict=True):
        torch.testing.assert_close(acc.double(), truth, rtol=1e-6, atol=1e-6)


# --- embeddings -----------------------------------------------------------------------------------------------------


@cases(*itertools.product([(11, 37), (1, 1)], [[8, 0, 30], [1], [140, 3]], [FP32, BF16]),
       ((300, 1025), [8, 0, 30], BF16), ((300, 1025), [1], FP32),
       *(((11, 37), [8, 0, 30], dtype, *measure) for dtype, measure in itertools.product([BF16, FP32], MEASURES)))  # fmt: skip
def embedding(shape: tuple[int, int], lens: list[int], dtype: torch.dtype, *measure: Any) -> None:
    from pkt_kernels.embedding_sensitivity import embedding_sensitivity

    vocabulary, width = shape
    starts, lens_, (dy,) = packed(lens, 2, width, dtype=dtype)
    ids = torch.randint(0, vocabulary, (len(dy),))
    ids[0] = -1
    ids[starts[0]] = vocabulary - 1
    w = torch.randn(vocabulary, width).to(dtype)
    truth = torch.zeros(vocabulary, width, dtype=torch.float64)
    for start, length in zip(starts.tolist(), lens, strict=True):
        rows = slice(start, start + length)
        gradient = torch.zeros_like(truth).index_add_(0, ids[rows], dy[rows].double())
        truth += summand(w.double(), gradient, *measure)
    first = torch.zeros(vocabulary, width)
    embedding_sensitivity(first, w, ids, dy, starts, lens_, *measure)
    assert relative(first, truth) <= FLOOR
    acc = torch.ones(width, vocabulary).T
    embedding_sensitivity(acc, w, ids, dy, starts, lens_, *measure)
    assert torch.equal(acc, 1.0 + first)


@cases("no samples", "no rows")
def embedding_edges(what: str) -> None:
    from pkt_kernels.embedding_sensitivity import embedding_sensitivity

    count = torch.zeros(0 if what == "no samples" else 2, dtype=torch.int64)
    rows = 0 if what == "no rows" else 3
    acc = torch.zeros(4, 8)
    embedding_sensitivity(
        acc, torch.randn(4, 8), torch.zeros(rows, dtype=torch.int64), torch.randn(rows, 8), count, count
    )
    assert not acc.any()


# --- windows --------------------------------------------------------------------------------------------------------


def quantized(score: Tensor, count: int) -> Tensor:
    """The window search's integers, in Python's own arithmetic."""
    import math

    exponent = math.frexp(float(score.max()))[1]
    bits = min(36, 62 - (count - 1).bit_length())
    scaled = [math.floor(math.ldexp(value, bits - exponent) + 0.5) for value in score.double().flatten().tolist()]
    return torch.tensor(scaled, dtype=torch.int64).view(score.shape)


def brute_force(score: Tensor, rows: int, cols: int, row_step: int, col_step: int) -> tuple[int, int, int]:
    sums = torch.nn.functional.pad(quantized(score, rows * cols).cumsum(0).cumsum(1), (1, 0, 1, 0))
    windows = sums[rows:, cols:] - sums[rows:, :-cols] - sums[:-rows, cols:] + sums[:-rows, :-cols]
    windows = windows[::row_step, ::col_step]
    total = int(windows.max())
    place = windows.flatten().tolist().index(total)
    return place // windows.shape[1] * row_step, place % windows.shape[1] * col_step, total


WINDOWS = [
    ((1, 1), (1, 1), (1, 1)),
    ((5, 7), (2, 3), (1, 1)),
    ((70, 33), (33, 5), (1, 1)),
    ((70, 33), (32, 33), (1, 1)),
    ((33, 9), (33, 9), (1, 1)),
    ((65, 40), (64, 7), (1, 2)),
    ((100, 300), (40, 150), (4, 3)),
    ((130, 290), (96, 1), (32, 64)),
    ((64, 257), (1, 129), (1, 1)),
    ((31, 400), (7, 130), (5, 1)),
]


def scores(shape: tuple[int, int], values: str) -> Tensor:
    score = torch.rand(shape)
    if values == "ties":
        score = (score > 0.5).float()
    elif values == "zeros":
        score.zero_()
    elif values == "tiny":
        score *= 1e-43
    elif values == "huge":
        score *= 3e38
    elif values == "spikes":
        score = score**40
    return score


@cases(*itertools.product(WINDOWS, ["uniform", "ties", "zeros", "tiny", "huge", "spikes"]))
def window(shapes: tuple[tuple[int, int], ...], values: str) -> None:
    from pkt_kernels.window_search import best_window

    shape, size, steps = shapes
    score = scores(shape, values)
    offset, total = best_window(score, *size, *steps)
    assert (*offset.tolist(), int(total)) == brute_force(score, *size, *steps)
    assert offset.dtype == total.dtype == torch.int64


@cases((4500, 2100, 1), (4500, 33, 3))
def window_of_many_rows(n: int, rows: int, cols: int) -> None:
    """More chunks of rows than the scan takes at a time."""
    from pkt_kernels.window_search import SCAN_R, WINDOW_CHUNK, best_window

    assert n // WINDOW_CHUNK > SCAN_R
    score = (torch.rand(n, 4) > 0.5).float()
    offset, total = best_window(score, rows, cols)
    assert (*offset.tolist(), int(total)) == brute_force(score, rows, cols, 1, 1)


@cases("transposed", "bfloat16", "slice")
def window_views(layout: str) -> None:
    from pkt_kernels.window_search import best_window

    score = torch.rand(90, 70)
    if layout == "transposed":
        score = torch.rand(70, 90).T
    elif layout == "bfloat16":
        score = score.to(BF16)
    else:
        whole = torch.full((95, 80), NAN)
        whole[2:92, 5:75] = score
        score = whole[2:92, 5:75]
    offset, total = best_window(score, 20, 30, 1, 1)
    assert (*offset.tolist(), int(total)) == brute_force(score, 20, 30, 1, 1)


@cases(*itertools.product([((1, 1), (1, 1), (1, 1)), ((300, 190), (40, 17), (5, 8)), ((257, 129), (100, 129), (2, 1))],
                          ["uniform", "ties", "zeros", "tiny", "huge", "spikes"]))  # fmt: skip
def best_blocks(shapes: tuple[tuple[int, int], ...], values: str) -> None:
    """What the op in torch chooses, ties included."""
    from pkt_kernels import window_search

    from pkt.ops import reference

    shape, counts, blocks = shapes
    score = scores(shape, values)
    found = window_search.best_blocks(score, *counts, *blocks)
    wanted = reference.best_blocks(score, *counts, *blocks)
    assert [f.tolist() for f in found] == [w.tolist() for w in wanted]
    assert [len(f) for f in found] == list(counts)


@cases((1, 1), (300, 190), (257, 129))
def axis_sums(n: int, m: int) -> None:
    from pkt_kernels.window_search import axis_sums

    score = torch.rand(n, m)
    rows, columns = axis_sums(score)
    torch.testing.assert_close(rows, score.double().sum(1), rtol=1e-9, atol=0)
    torch.testing.assert_close(columns, score.double().sum(0), rtol=1e-9, atol=0)
    rows, columns = axis_sums(torch.zeros(n, m))
    assert not rows.any()
    assert not columns.any()


@cases(*itertools.product([7, 64, 200], [(130, 70), (1, 1)]), (1, (9, 7)))
def block_sums(block: int, shape: tuple[int, int]) -> None:
    from pkt_kernels.window_search import block_sums

    score = torch.rand(shape)
    whole = torch.nn.functional.pad(score.double(), (0, -shape[1] % block, 0, -shape[0] % block))
    truth = whole.view(whole.shape[0] // block, block, whole.shape[1] // block, block).sum((1, 3))
    torch.testing.assert_close(block_sums(score, block), truth, rtol=1e-9, atol=0)


# --- running them ---------------------------------------------------------------------------------------------------


def main(results: str, *names: str) -> None:
    """Run the named cases, writing a line of JSON as each ends, so that a crash loses only what follows it."""
    from pkt_kernels import launch, linear_sensitivity

    assert launch.INTERPRETED
    kept = launch.capability, linear_sensitivity.TUNED
    torch.set_num_threads(1)
    with open(results, "w") as file:
        for name in names:
            launch.capability, linear_sensitivity.TUNED = kept
            torch.manual_seed(0)
            try:
                CASES[name]()
                failure = ""
            except Exception:
                failure = traceback.format_exc()
            print(json.dumps([name, failure]), file=file, flush=True)


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each selected case said: nothing, or its traceback."""
    pytest.importorskip("triton")
    names = [item.callspec.params["name"] for item in request.session.items if item.path == Path(__file__)]
    results = tmp_path_factory.mktemp("interpreter") / "results.jsonl"
    path = [
        str(Path(__file__).parents[1]),
        str(Path(__file__).parents[2]),
        str(Path(__file__).parents[2] / "kernels"),
        *filter(None, [os.environ.get("PYTHONPATH")]),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(path)}
    ran = processes.run([sys.executable, __file__, results, *names], env=environment)
    said = dict(json.loads(line) for line in results.read_text().splitlines()) if results.exists() else {}
    for name in names:
        said.setdefault(name, f"not reached: the process ended with {ran.returncode}\n{ran.stderr}")
    return said


@pytest.mark.parametrize("name", CASES)
def test_kernel(name: str, outcomes: dict[str, str]) -> None:
    if outcomes[name]:
        pytest.fail(outcomes[name], pytrace=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
