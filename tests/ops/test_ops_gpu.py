"""The ops as CUDA dispatches them: every measure against fp64, the same bytes twice, and what is refused.

A CPU shows each piece alone (the kernels interpreted and compiled, the dispatch with a stand-in for a kernel, the torch
implementations); that the pieces meet on a device, and that nothing there depends on the order of atomics, only a GPU can.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_ops import DTYPES, case, summand, truth
from torch import Tensor

import pkt
from pkt import ops

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

needs_triton = pytest.mark.skipif(
    ops.implementation("linear_sensitivity_", "cuda")[0] != "Triton", reason="no Triton kernels on this GPU"
)


def relative(value: Tensor, expected: Tensor) -> float:
    assert value.isfinite().all()
    return float((value.double().cpu() - expected).norm() / expected.norm())


def twice(run: Callable[[Tensor], None], shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """What `run` adds to zeros, the same bytes in three runs."""
    found = [torch.zeros(shape, dtype=dtype, device="cuda") for _ in range(3)]
    for acc in found:
        run(acc)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    return found[0]


@pytest.mark.parametrize("measure", ops.MEASURES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_every_measure_of_a_linear_layer(dtype: torch.dtype, measure: str) -> None:
    """The op, its tile sums and the torch implementation agree with fp64: products and sums are fp32 in each (fp64 for
    fp64), so the inputs' own rounding is no part of the error."""
    args = case([65, 0, 200, 1], 264, 136, dtype, gap=3)
    given = [tensor.cuda() for tensor in args]
    expected = truth(*args, *ops.MEASURES[measure])
    for add in (ops.linear_sensitivity_, ops.reference.linear_sensitivity_):
        found = twice(lambda acc, add=add: add(acc, *given, *ops.MEASURES[measure]), (264, 136))
        assert relative(found, expected) < 1e-5
    for tile in (16, 64):
        sums = ops.tile_sums(expected, tile)
        run = lambda acc, tile=tile: ops.linear_sensitivity_tiles_(acc, *given, tile, *ops.MEASURES[measure])  # noqa: E731
        assert relative(twice(run, tuple(sums.shape)), sums) < 1e-5


@pytest.mark.parametrize("measure", ops.MEASURES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_measure_of_any_parameter(dtype: torch.dtype, measure: str) -> None:
    """Flat, strided, and many in one launch: one contribution each, in fp32, whatever walks the elements."""
    theta, grad = torch.randn(129, 65).to(dtype), torch.randn(65, 129).to(dtype).T
    expected = summand(theta, grad, *ops.MEASURES[measure])
    t, g = theta.cuda(), grad.cuda()
    strided = twice(lambda acc: ops.abs_accumulate_(acc, t, g, *ops.MEASURES[measure]), (129, 65))
    assert relative(strided, expected) < 1e-6
    flat = twice(lambda acc: ops.abs_accumulate_(acc, t, g.contiguous(), *ops.MEASURES[measure]), (129, 65))
    assert torch.equal(flat, strided)
    accs = [torch.zeros(129, 65, device="cuda"), torch.zeros(65, device="cuda")]
    ops.abs_accumulate_many_(accs, [t, t[3]], [g.contiguous(), g[3].contiguous()], *ops.MEASURES[measure])
    assert torch.equal(accs[0], flat)
    assert relative(accs[1], expected[3]) < 1e-6


@pytest.mark.parametrize("measure", ops.MEASURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_measure_of_an_embedding_gives_the_same_bytes_twice(dtype: torch.dtype, measure: str) -> None:
    """A hundred rows of one token in each of eight samples: atomics would add them in another order each time, both
    within a sample and across samples. The kernel sorts and has one writer a row; the torch implementation (which fp64
    always takes) adds through index_put_, which sorts on CUDA. On a CPU neither path runs."""
    lengths, vocabulary, width = [300] * 8, 500, 96
    _, _, dy, starts, lens = case(lengths, width, 4, dtype)
    ids = torch.randint(0, vocabulary, (len(dy),), generator=torch.Generator().manual_seed(1))
    ids[::3] = 7
    w = torch.randn(vocabulary, width).to(dtype)
    expected = torch.zeros(vocabulary, width, dtype=torch.float64)
    for start, length in zip(starts.tolist(), lengths, strict=True):
        rows = slice(start, start + length)
        gradient = torch.zeros_like(expected).index_add_(0, ids[rows], dy[rows].double())
        expected += summand(w, gradient, *ops.MEASURES[measure])
    given = [tensor.cuda() for tensor in (w, ids, dy, starts, lens)]
    for add in (ops.embedding_sensitivity_, ops.reference.embedding_sensitivity_):
        found = twice(lambda acc, add=add: add(acc, *given, *ops.MEASURES[measure]), (vocabulary, width))
        assert relative(found, expected) < 1e-5


def test_rows_are_added_in_one_order() -> None:
    """40 000 rows for ten places, in fp32: an order that changed would change the last bits in some of the runs."""
    index, rows = torch.randint(0, 10, (40_000,), device="cuda"), torch.randn(40_000, 8, device="cuda")
    found = twice(lambda to: ops.add_rows_(to, index, rows), (10, 8))
    expected = torch.zeros(10, 8, dtype=torch.float64).index_add_(0, index.cpu(), rows.double().cpu())
    assert relative(found, expected) < 1e-4


@needs_triton
def test_a_tile_without_a_kernel_falls_back_and_says_so() -> None:
    """72 is neither a power of two nor a multiple of 16: the kernel refuses it before it writes anything, so torch's
    result is the whole result. Only on CUDA does the dispatcher ask the kernel at all."""
    args = case([30, 70], 136, 72, torch.bfloat16)
    given, sums = [tensor.cuda() for tensor in args], ops.tile_sums(truth(*args), 72)
    tiles = torch.zeros(sums.shape, device="cuda")
    ops.dispatch.warn_once.cache_clear()
    with pytest.warns(pkt.PktWarning, match="linear_sensitivity_tiles_ runs in torch.*tile=72"):
        ops.linear_sensitivity_tiles_(tiles, *given, 72)
    assert relative(tiles, sums) < 1e-5


@needs_triton
def test_a_failing_kernel_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ValueError from inside a real launch, through the real dispatcher."""
    from pkt_kernels import linear_sensitivity

    def choose_blocks(*_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(linear_sensitivity, "choose_blocks", choose_blocks)
    acc, given = torch.zeros(6, 5, device="cuda"), [t.cuda() for t in case([3, 4], 6, 5, torch.float32)]
    with pytest.raises(ValueError, match="a bug"):
        ops.linear_sensitivity_(acc, *given)
    assert not acc.any()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
def test_tensors_of_a_device_that_is_not_the_current_one() -> None:
    """A launch happens on the current device, whatever the tensors say; and "cuda" means the current device."""
    args = case([30, 70], 136, 72, torch.bfloat16)
    acc, given = torch.zeros(136, 72, device="cuda:1"), [tensor.to("cuda:1") for tensor in args]
    assert torch.cuda.current_device() == 0
    ops.linear_sensitivity_(acc, *given)
    ops.abs_accumulate_(acc, given[0], given[0])
    assert relative(acc, truth(*args) + args[0].double() ** 2) < 1e-5
    with torch.cuda.device(1):
        assert ops.implementation("best_window", "cuda") == ops.implementation("best_window", "cuda:1")
