"""The kernels on a GPU: numbers at real sizes and past 2³¹ elements, the same bytes twice, and the memory they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton")

from pkt_kernels import launch, linear_sensitivity  # noqa: E402
from pkt_kernels.abs_accumulate import abs_accumulate, abs_accumulate_many  # noqa: E402
from pkt_kernels.embedding_sensitivity import embedding_sensitivity  # noqa: E402
from pkt_kernels.window_search import axis_sums, best_blocks, best_window, block_sums  # noqa: E402

from pkt.ops import candidates  # noqa: E402
from pkt.ops import reference as reference_ops  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Relative Frobenius error against fp64; the inputs are taken as they are, so 16-bit ones cost nothing.
TOLERANCE = {FP32: 1e-5, BF16: 1e-5, FP16: 1e-5}
GIB = 2**30


@pytest.fixture(autouse=True)
def device() -> Any:
    torch.manual_seed(0)
    with torch.device("cuda"):
        yield
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def needs(gigabytes: float) -> None:
    if torch.cuda.mem_get_info()[0] < gigabytes * GIB:
        pytest.skip(f"needs {gigabytes} GiB of device memory")


def relative(value: Tensor, truth: Tensor) -> float:
    assert bool(value.isfinite().all())
    return float((value.double() - truth).norm() / truth.norm())


def packed(lens: list[int], gap: int, *widths: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    """seq_starts, seq_lens and a random matrix a width; the rows between samples hold NaN."""
    starts = [gap + sum(lens[:j]) + j * gap for j in range(len(lens))]
    owned = torch.zeros(sum(lens) + gap * (len(lens) + 1), 1, dtype=torch.bool)
    for start, length in zip(starts, lens, strict=True):
        owned[start : start + length] = True
    matrices = [torch.randn(len(owned), width, dtype=dtype).masked_fill_(~owned, float("nan")) for width in widths]
    return torch.tensor(starts), torch.tensor(lens), matrices


def reference(w: Tensor, x: Tensor, dy: Tensor, starts: Tensor, lens: Tensor) -> Tensor:
    total = torch.zeros(w.shape, dtype=torch.float64)
    for start, length in zip(starts.tolist(), lens.tolist(), strict=True):
        total += (dy[start : start + length].double().T @ x[start : start + length].double()).abs()
    return total * w.double().abs()


def twice(run: Callable[[Tensor], None], shape: tuple[int, ...]) -> Tensor:
    """What the run adds to zeros, after a second run gave the same bytes."""
    first, second = torch.zeros(shape), torch.zeros(shape)
    run(first)
    run(second)
    assert torch.equal(first, second)
    return first


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 4096), (11008, 4096), (4099, 2055)], ids=str)
def test_linear_sensitivity(shape: tuple[int, int], dtype: torch.dtype) -> None:
    n, m = shape
    lens = [512] * 4 + [1, 0, 63, 64, 65, 300]
    starts, lengths, (x, dy) = packed(lens, 5, m, n, dtype=dtype)
    w = torch.randn(n, m, dtype=dtype)
    found = twice(lambda acc: linear_sensitivity.linear_sensitivity(acc, w, x, dy, starts, lengths), shape)
    assert relative(found, reference(w, x, dy, starts, lengths)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", [(4096, 4096), (11008, 4096), (4099, 2055), (130, 72)], ids=str)
@pytest.mark.parametrize("tile", [0, 16, 64])
def test_candidates(shape: tuple[int, int], dtype: torch.dtype, tile: int) -> None:
    """Each against fp64, whether or not it was chosen here."""
    n, m = shape
    names = [name for name in candidates.MODULES if name != candidates.STANDARD]
    device = torch.device("cuda", torch.cuda.current_device())
    able = [name for name in names if candidates.obstacle(name, device) is None]
    able = [name for name in able if candidates.kernel(name).serves(dtype, tile)]
    if not able:
        pytest.skip("no candidate runs here")
    starts, lengths, (x, dy) = packed([512] * 4 + [1, 0, 63, 64, 65, 300], 5, m, n, dtype=dtype)
    w = torch.randn(n, m, dtype=dtype)
    truth = reference(w, x, dy, starts, lengths)
    if tile:
        truth = torch.nn.functional.pad(truth, (0, -m % tile, 0, -n % tile))
        truth = truth.view(-(-n // tile), tile, -(-m // tile), tile).sum((1, 3))
    for name in able:
        kind = candidates.Kind(tile, dtype, 1, True)
        try:
            found = twice(
                lambda out, name=name, kind=kind: candidates.run(name, kind, out, w, x, dy, starts, lengths),
                truth.shape,
            )
        except launch.NoFormError:
            continue
        assert relative(found, truth) <= TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("tile", [0, 64])
def test_every_tuned_block(row: int, dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    major = launch.capability(torch.device("cuda", torch.cuda.current_device()))[0]
    table = linear_sensitivity.TUNED[major if major in (9, 10) else 8, dtype.itemsize]
    if row >= len(table):
        pytest.skip("no such row")
    monkeypatch.setattr(linear_sensitivity, "choose_blocks", lambda *_: table[row])
    n, m = 330, 520
    starts, lengths, (x, dy) = packed([100, 0, 257, 64], 3, m, n, dtype=dtype)
    w = torch.randn(n, m, dtype=dtype)
    truth = reference(w, x, dy, starts, lengths)
    if tile:
        truth = torch.nn.functional.pad(truth, (0, -m % tile, 0, -n % tile))
        truth = truth.view(-(-n // tile), tile, -(-m // tile), tile).sum((1, 3))
        found = twice(
            lambda acc: linear_sensitivity.linear_sensitivity_tiles(acc, w, x, dy, starts, lengths, tile), truth.shape
        )
    else:
        found = twice(lambda acc: linear_sensitivity.linear_sensitivity(acc, w, x, dy, starts, lengths), (n, m))
    assert relative(found, truth) <= TOLERANCE[dtype]


@pytest.mark.parametrize("major", [8, 9], ids=["pointers", "descriptors"])
def test_linear_sensitivity_views(major: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if launch.capability(torch.device("cuda", 0))[0] < major:
        pytest.skip("an older GPU")
    monkeypatch.setattr(launch, "capability", lambda device: (major, 0))
    n, m = 264, 392
    starts, lengths, (x, dy) = packed([100, 40], 3, m + 8, n + 8, dtype=BF16)
    w = torch.randn(m, n, dtype=BF16).T
    for x_view, dy_view in ((x[:, 8:], dy[:, 8:]), (x[:, 3 : m + 3], dy.T.contiguous().T[:, :n])):
        acc = torch.zeros(m, n).T
        linear_sensitivity.linear_sensitivity(acc, w, x_view, dy_view, starts, lengths)
        assert relative(acc, reference(w, x_view, dy_view, starts, lengths)) <= TOLERANCE[BF16]


def test_linear_sensitivity_allocates_nothing_of_the_weights_size() -> None:
    n, m, rows = 8192, 8192, 1024
    starts, lengths = torch.arange(0, rows, 256), torch.full((4,), 256)
    x, dy = torch.randn(rows, m, dtype=BF16), torch.randn(rows, n, dtype=BF16)
    w, acc, tiles = torch.randn(n, m, dtype=BF16), torch.zeros(n, m), torch.zeros(n // 64, m // 64)
    for run in (
        lambda: linear_sensitivity.linear_sensitivity(acc, w, x, dy, starts, lengths),
        lambda: linear_sensitivity.linear_sensitivity_tiles(tiles, w, x, dy, starts, lengths, 64),
    ):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        assert torch.cuda.max_memory_allocated() - before < 2**20


def test_linear_sensitivity_of_more_than_2_31_weights() -> None:
    needs(20)
    n, m = 65536 + 64, 32768 + 64
    starts, lengths, (x, dy) = packed([40, 70], 2, m, n, dtype=BF16)
    w = torch.ones(1, m, dtype=BF16).expand(n, m)
    acc = torch.zeros(n, m)
    linear_sensitivity.linear_sensitivity(acc, w, x, dy, starts, lengths)
    for rows in (slice(0, 100), slice(n - 100, n)):
        truth = reference(w[rows], x, dy[:, rows], starts, lengths)
        assert relative(acc[rows], truth) <= TOLERANCE[BF16]


def test_linear_sensitivity_of_more_than_2_31_inputs() -> None:
    needs(16)
    n, m = 64, 32768
    starts, lengths, (x, dy) = packed([33000, 35000], 2, m, n, dtype=BF16)
    w, acc = torch.ones(n, m, dtype=BF16), torch.zeros(n, m)
    linear_sensitivity.linear_sensitivity(acc, w, x, dy, starts, lengths)
    columns = slice(m - 512, m)
    truth = reference(w[:, columns], x[:, columns], dy, starts, lengths)
    # Sums of 35 000 products in fp32.
    assert relative(acc[:, columns], truth) <= 1e-4


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_abs_accumulate(dtype: torch.dtype) -> None:
    for shape, transposed in (((4096, 11008), False), ((4097, 333), True), ((5,), False)):
        theta, grad = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
        if transposed:
            grad = grad.T.contiguous().T
        found = twice(lambda acc, theta=theta, grad=grad: abs_accumulate(acc, theta, grad), shape)
        assert relative(found, (theta.double() * grad.double()).abs()) <= 1e-6


def test_abs_accumulate_many() -> None:
    shapes = [(4096,), (5,), (1,), (128, 64), (100_000,)] * 30
    thetas = [torch.randn(shape, dtype=BF16) for shape in shapes]
    grads = [torch.randn(shape, dtype=BF16) for shape in shapes]
    accs = [torch.zeros(shape) for shape in shapes]
    abs_accumulate_many(accs, thetas, grads)
    for acc, theta, grad in zip(accs, thetas, grads, strict=True):
        torch.testing.assert_close(acc, (theta.float() * grad.float()).abs())


def test_abs_accumulate_of_more_than_2_31_elements() -> None:
    needs(20)
    size = 2**31 + 4097
    theta, grad, acc = torch.full((size,), 3, dtype=BF16), torch.full((size,), -2, dtype=BF16), torch.ones(size)
    abs_accumulate(acc, theta, grad)
    assert bool((acc == 7).all())


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_embedding_sensitivity(dtype: torch.dtype) -> None:
    vocabulary, width = 32000, 4096
    starts, lengths, (dy,) = packed([512] * 8 + [0, 1, 100], 4, width, dtype=dtype)
    ids = torch.randint(0, vocabulary, (len(dy),))
    ids[::3] = 7
    w = torch.randn(vocabulary, width, dtype=dtype)
    found = twice(lambda acc: embedding_sensitivity(acc, w, ids, dy, starts, lengths), (vocabulary, width))
    truth = torch.zeros(vocabulary, width, dtype=torch.float64)
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        rows = slice(start, start + length)
        gradient = torch.zeros_like(truth).index_add_(0, ids[rows], dy[rows].double())
        truth += (w.double() * gradient).abs_()
    assert relative(found, truth) <= TOLERANCE[dtype]


def prefix_window(score: Tensor, rows: int, cols: int, row_step: int, col_step: int) -> tuple[int, int, int]:
    """The same integers through a summed-area table, whose wrap-around cancels."""
    bits = min(36, 62 - (rows * cols - 1).bit_length())
    scale = 2.0 ** (bits - int(torch.frexp(score.max()).exponent))
    table = torch.zeros(score.shape[0] + 1, score.shape[1] + 1, dtype=torch.int64)
    table[1:, 1:] = (score.double() * scale + 0.5).floor_().long().cumsum(0).cumsum(1)
    sums = table[rows:, cols:] - table[rows:, :-cols] - table[:-rows, cols:] + table[:-rows, :-cols]
    sums = sums[::row_step, ::col_step].contiguous()
    total = sums.max()
    place = int((sums.flatten() == total).nonzero()[0])
    return place // sums.shape[1] * row_step, place % sums.shape[1] * col_step, int(total)


@pytest.mark.parametrize("steps", [(1, 1), (128, 64)], ids=str)
@pytest.mark.parametrize(
    ("shape", "size"),
    [((13824, 5120), (11008, 4096)), ((4097, 3001), (100, 2999)), ((2000, 3000), (1, 7)), ((64, 64), (64, 64))],
    ids=str,
)
@pytest.mark.parametrize("ties", [False, True])
def test_best_window(shape: tuple[int, int], size: tuple[int, int], steps: tuple[int, int], ties: bool) -> None:
    score = torch.randint(0, 2, shape).float() if ties else torch.rand(shape) ** 4
    offset, total = best_window(score, *size, *steps)
    assert (*offset.tolist(), int(total)) == prefix_window(score, *size, *steps)


def test_best_window_of_more_than_2_31_scores() -> None:
    needs(16)
    n, m = 65536, 32768 + 300
    score = torch.zeros(n, m)
    score[n - 5 : n - 2, m - 7 : m - 3] = 1.0
    offset, total = best_window(score, n - 3, m - 30)
    assert offset.tolist() == [1, 27]
    assert int(total) == 12 * 2 ** (min(36, 62 - ((n - 3) * (m - 30) - 1).bit_length()) - 1)


def test_sums() -> None:
    score = torch.rand(13824, 5120) ** 4
    rows, columns = axis_sums(score)
    torch.testing.assert_close(rows, score.double().sum(1), rtol=1e-7, atol=0)
    torch.testing.assert_close(columns, score.double().sum(0), rtol=1e-7, atol=0)
    torch.testing.assert_close(
        block_sums(score, 64), score.double().view(216, 64, 80, 64).sum((1, 3)), rtol=1e-7, atol=0
    )


@pytest.mark.parametrize("ties", [False, True])
def test_best_blocks(ties: bool) -> None:
    """What the op in torch chooses on the CPU."""
    score = torch.rand(13824, 5120)
    if ties:
        score = (score > 0.5).float()
    found = best_blocks(score, 86, 40, 128, 64)
    wanted = reference_ops.best_blocks(score.cpu(), 86, 40, 128, 64)
    assert [f.tolist() for f in found] == [w.tolist() for w in wanted]


def test_small_case_of_each_kernel() -> None:
    """Small enough for compute-sanitizer."""
    starts, lengths, (x, dy) = packed([30, 0, 70], 3, 72, 136, dtype=BF16)
    w = torch.randn(136, 72, dtype=BF16)
    acc, tiles = torch.zeros(136, 72), torch.zeros(9, 5)
    linear_sensitivity.linear_sensitivity(acc, w, x, dy, starts, lengths)
    linear_sensitivity.linear_sensitivity_tiles(tiles, w, x, dy, starts, lengths, 16)
    assert relative(acc, reference(w, x, dy, starts, lengths)) <= TOLERANCE[BF16]
    abs_accumulate(acc, w, w)
    abs_accumulate(acc, w, w.T.contiguous().T)
    abs_accumulate_many([acc, acc[0]], [w, w[0]], [w, w[0]])
    embedding_sensitivity(acc, w, torch.randint(0, 136, (len(x),)), x, starts, lengths)
    best_window(acc, 40, 50)
    axis_sums(acc)
    block_sums(acc, 32)
