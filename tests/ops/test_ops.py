"""The ops on the CPU, compiled and in torch, against the formula in fp64, their schemas, and what bad arguments get."""

from __future__ import annotations

import math
import sys
import types
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor

import pkt
from pkt import ops
from pkt.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(
    lengths: list[int], n: int, m: int, dtype: torch.dtype, *, gap: int = 0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """w, x, dy, seq_starts, seq_lens; rows between the samples hold NaN, which must never be read."""
    g = torch.Generator().manual_seed(seed)
    starts, position = [], 0
    for length in lengths:
        starts.append(position)
        position += length + gap
    x, dy = torch.full((position, m), float("nan")), torch.full((position, n), float("nan"))
    for start, length in zip(starts, lengths, strict=True):
        x[start : start + length] = torch.randn(length, m, generator=g)
        dy[start : start + length] = torch.randn(length, n, generator=g)
    w = torch.randn(n, m, generator=g)
    return (
        w.to(dtype),
        x.to(dtype),
        dy.to(dtype),
        torch.tensor(starts, dtype=torch.int64),
        torch.tensor(lengths, dtype=torch.int64),
    )


def summand(theta: Tensor, grad: Tensor, power: int = 1, weighted: bool = True) -> Tensor:
    """|θ^weighted · g|^power in fp64, the definition."""
    return (theta.double() * grad.double() if weighted else grad.double()).abs() ** power


def truth(w: Tensor, x: Tensor, dy: Tensor, starts: Tensor, lens: Tensor, *measure: Any) -> Tensor:
    total = torch.zeros(w.shape, dtype=torch.float64)
    for s, n in zip(starts.tolist(), lens.tolist(), strict=True):
        total += summand(w, dy[s : s + n].double().t() @ x[s : s + n].double(), *measure)
    return total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "n", "m", "gap"), [([5, 1, 9], 17, 33, 0), ([4, 0, 3], 1, 7, 2), ([], 3, 5, 0), ([6], 601, 443, 3)]
)
def test_linear_sensitivity(dtype: torch.dtype, lengths: list[int], n: int, m: int, gap: int) -> None:
    args = case(lengths, n, m, dtype, gap=gap)
    expected = truth(*args)
    for add in (ops.linear_sensitivity_, ops.reference.linear_sensitivity_):
        acc = torch.ones(n, m)
        add(acc, *args)
        assert oracle.relative_error(acc, expected + 1) < 1e-6
    for tile in (1, 4, 64):
        tiles = torch.zeros(-(-n // tile), -(-m // tile))
        ops.linear_sensitivity_tiles_(tiles, *args, tile)
        assert oracle.relative_error(tiles, ops.tile_sums(expected, tile)) < 1e-6


def test_the_measures_are_what_the_literature_sums() -> None:
    assert ops.MEASURES == {
        "theta_grad": (1, True),
        "grad": (1, False),
        "fisher": (2, False),
        "theta_grad_squared": (2, True),
    }


@pytest.mark.parametrize("measure", ops.MEASURES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_measure_of_a_linear_layer(dtype: torch.dtype, measure: str) -> None:
    args = case([5, 0, 9], 61, 43, dtype, gap=2)
    expected = truth(*args, *ops.MEASURES[measure])
    for add in (ops.linear_sensitivity_, ops.reference.linear_sensitivity_):
        acc = torch.ones(61, 43)
        add(acc, *args, *ops.MEASURES[measure])
        assert oracle.relative_error(acc, expected + 1) < 1e-6
    for tile in (1, 16):
        tiles = torch.zeros(-(-61 // tile), -(-43 // tile))
        ops.linear_sensitivity_tiles_(tiles, *args, tile, *ops.MEASURES[measure])
        assert oracle.relative_error(tiles, ops.tile_sums(expected, tile)) < 1e-6


def test_unweighted_measures_do_not_read_the_weight() -> None:
    w, x, dy, starts, lens = case([5, 4], 6, 8, torch.float32)
    unread, ids = torch.full_like(w, float("nan")), torch.tensor([0, 1, 1, 5, 2, 3, 3, 3, 0])
    for power in (1, 2):
        acc, tiles = torch.zeros(6, 8), torch.zeros(3, 4)
        ops.linear_sensitivity_(acc, unread, x, dy, starts, lens, power, False)
        ops.linear_sensitivity_tiles_(tiles, unread, x, dy, starts, lens, 2, power, False)
        ops.embedding_sensitivity_(acc, unread, ids, x, starts, lens, power, False)
        ops.abs_accumulate_(acc, unread, w, power, False)
        ops.abs_accumulate_many_([acc], [unread], [w], power, False)
        assert acc.isfinite().all()
        assert tiles.isfinite().all()


def test_linear_sensitivity_of_strided_views() -> None:
    w, x, dy, starts, lens = case([7, 5], 20, 24, torch.float32)
    wide_x = torch.full((12, 50), float("nan"))
    wide_x[:, 1:49:2] = x
    for add in (ops.linear_sensitivity_, ops.reference.linear_sensitivity_):
        acc = torch.zeros(24, 20).t()
        add(acc, w.t().contiguous().t(), wide_x[:, 1:49:2], dy, starts, lens)
        assert oracle.relative_error(acc, truth(w, x, dy, starts, lens)) < 1e-6


def test_linear_sensitivity_in_fp64_and_of_mixed_types() -> None:
    w, x, dy, starts, lens = case([7, 300], 20, 24, torch.float32)
    expected = truth(w, x, dy, starts, lens)
    acc = torch.zeros(20, 24, dtype=torch.float64)
    ops.linear_sensitivity_(acc, w.double(), x.double(), dy.double(), starts, lens)
    assert oracle.relative_error(acc, expected) < 1e-14
    acc = torch.zeros(20, 24)
    ops.linear_sensitivity_(acc, w, x.double(), dy, starts, lens)
    assert oracle.relative_error(acc, expected) < 1e-7


@pytest.mark.skipif(ops.implementation("linear_sensitivity_", "cpu")[0] != "C++", reason="pkt._C is not built")
@pytest.mark.parametrize("measure", ops.MEASURES)
def test_sensitivities_do_not_depend_on_the_threads(measure: str) -> None:
    args = case([40, 33], 301, 177, torch.bfloat16)
    w, x, _, starts, lens = args
    ids, grad = torch.randint(0, 301, (73,)), torch.randn(301, 177)
    how, found = ops.MEASURES[measure], []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            linear, embedding, elements = (torch.zeros(301, 177) for _ in range(3))
            tiles = torch.zeros(5, 3)
            ops.linear_sensitivity_(linear, *args, *how)
            ops.linear_sensitivity_tiles_(tiles, *args, 64, *how)
            ops.embedding_sensitivity_(embedding, w, ids, x, starts, lens, *how)
            ops.abs_accumulate_many_([elements], [w], [grad], *how)
            found.append((linear, tiles, embedding, elements))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (37,), (129, 65), (3, 5, 7)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("measure", ops.MEASURES)
def test_abs_accumulate(shape: tuple[int, ...], dtype: torch.dtype, measure: str) -> None:
    theta, grad, acc = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.rand(shape)
    given = theta.clone(), grad.clone()
    expected = acc.double() + summand(theta, grad, *ops.MEASURES[measure])
    ops.abs_accumulate_(acc, theta, grad, *ops.MEASURES[measure])
    assert oracle.relative_error(acc, expected) < 1e-6
    assert torch.equal(theta, given[0])
    assert torch.equal(grad, given[1])


@pytest.mark.parametrize("measure", ops.MEASURES)
def test_abs_accumulate_many_is_abs_accumulate_of_each(measure: str) -> None:
    thetas = [torch.randn(s).to(d) for s, d in [((7,), torch.float32), ((3, 5), torch.bfloat16), ((0,), torch.float32)]]
    grads = [torch.randn(t.shape) for t in thetas]
    accs, expected = [torch.rand(t.shape) for t in thetas], []
    for acc, theta, grad in zip(accs, thetas, grads, strict=True):
        expected.append(acc.clone())
        ops.abs_accumulate_(expected[-1], theta, grad, *ops.MEASURES[measure])
    ops.abs_accumulate_many_(accs, thetas, grads, *ops.MEASURES[measure])
    assert all(map(torch.equal, accs, expected))
    ops.abs_accumulate_many_([], [], [])
    with pytest.raises(pkt.PktError, match="lists of 3, 3 and 2 tensors differ"):
        ops.abs_accumulate_many_(accs, thetas, grads[:2])
    with pytest.raises(pkt.PktError, match=r"shapes or devices differ: acc \[7\]"):
        ops.abs_accumulate_many_(accs, thetas[::-1], grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("measure", ops.MEASURES)
def test_embedding_sensitivity_sums_duplicates_within_a_sample_first(dtype: torch.dtype, measure: str) -> None:
    ids = torch.tensor([4, 4, 2, 0, 4, 2, 9])
    dy, w = torch.randn(7, 6).to(dtype), torch.randn(11, 6).to(dtype)
    starts, lens = torch.tensor([0, 3]), torch.tensor([3, 4])
    expected = torch.zeros(11, 6, dtype=torch.float64)
    for s, n in ((0, 3), (3, 4)):
        grad = torch.zeros(11, 6, dtype=torch.float64).index_add_(0, ids[s : s + n], dy[s : s + n].double())
        expected += summand(w, grad, *ops.MEASURES[measure])
    acc = torch.zeros(11, 6)
    ops.embedding_sensitivity_(acc, w, ids, dy, starts, lens, *ops.MEASURES[measure])
    assert oracle.relative_error(acc, expected) < 1e-6


def test_schemas_fakes_and_mutations_pass_opcheck() -> None:
    w, x, dy, starts, lens = case([3, 4], 6, 5, torch.float32)
    check = torch.library.opcheck
    check(torch.ops.pkt.abs_accumulate_.default, (torch.zeros(6, 5), w, w))
    check(
        torch.ops.pkt.abs_accumulate_many_.default, ([torch.zeros(6, 5), torch.zeros(3)], [w, w[0, :3]], [w, w[1, :3]])
    )
    check(torch.ops.pkt.linear_sensitivity_.default, (torch.zeros(6, 5), w, x, dy, starts, lens))
    check(torch.ops.pkt.abs_accumulate_.default, (torch.zeros(6, 5), w, w, 2, False))
    check(torch.ops.pkt.linear_sensitivity_tiles_.default, (torch.zeros(3, 3), w, x, dy, starts, lens, 2))
    check(
        torch.ops.pkt.embedding_sensitivity_.default,
        (torch.zeros(6, 5), w, torch.zeros(7, dtype=torch.int64), x, starts, lens),
    )
    check(torch.ops.pkt.best_window.default, (torch.rand(6, 5), 3, 2))
    check(torch.ops.pkt.best_blocks.default, (torch.rand(6, 5), 2, 2, 2, 1))
    check(torch.ops.pkt.rsvd.default, (torch.randn(12, 9), 3))
    check(torch.ops.pkt.rsvd_batch.default, ([torch.randn(12, 9), torch.randn(4, 7).bfloat16()], 3))


def test_every_op_says_what_it_uses_and_why() -> None:
    declared = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("pkt::")}
    # One of the kernels of another op.
    assert {f"pkt::{op}" for op in ops.names()} == declared - {"pkt::linear_sensitivity_clustered_"}
    for op in ops.names():
        used, why = ops.implementation(op, "cpu")
        assert used in ("torch", "C++")
        assert why


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("pkt: out of memory: no tensor of 4096 entries"),
        RuntimeError("pkt::rsvd: CUDA says: out of memory"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
    ids=str,
)
def test_every_failed_allocation_is_recognised(error: Exception) -> None:
    assert ops.out_of_memory(error)


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: an illegal memory access was encountered",
        "pkt::rsvd: torch's product with a 64 by 32 matrix failed",
        "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)",
    ],
)
def test_other_errors_are_not_taken_for_failed_allocations(message: str) -> None:
    assert not ops.out_of_memory(RuntimeError(message))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(8, 5)}, "rows"),
        ({"w": torch.zeros(5, 6)}, r"\[out, in\]"),
        ({"acc": torch.zeros(6, 4)}, "shape does not fit"),
        ({"acc": torch.zeros(6, 5, dtype=torch.bfloat16)}, "must be fp32"),
        ({"dy": torch.zeros(7, 6, dtype=torch.int64)}, "floating point"),
        ({"w": torch.zeros(30)}, "2-D"),
        ({"starts": torch.tensor([0, 2])}, "overlap"),
        ({"lens": torch.tensor([3, 9])}, "run past"),
        ({"lens": torch.tensor([3, -1])}, "run past"),
        ({"lens": torch.tensor([3])}, "one length"),
        ({"lens": torch.tensor([3.0, 4.0])}, "int64"),
        ({"x": torch.zeros(7, 5, device="meta")}, "on cpu"),
    ],
)
def test_bad_arguments_name_the_argument(change: dict[str, Any], message: str) -> None:
    w, x, dy, starts, lens = case([3, 4], 6, 5, torch.float32)
    given = {"acc": torch.zeros(6, 5), "w": w, "x": x, "dy": dy, "starts": starts, "lens": lens} | change
    with pytest.raises(pkt.PktError, match=message):
        ops.linear_sensitivity_(*given.values())


def test_powers_other_than_1_and_2_are_refused() -> None:
    w, x, dy, starts, lens = case([3, 4], 6, 5, torch.float32)
    acc, ids = torch.zeros(6, 5), torch.zeros(7, dtype=torch.int64)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (ops.abs_accumulate_, (acc, w, w)),
        (ops.abs_accumulate_many_, ([acc], [w], [w])),
        (ops.linear_sensitivity_, (acc, w, x, dy, starts, lens)),
        (ops.linear_sensitivity_tiles_, (torch.zeros(3, 3), w, x, dy, starts, lens, 2)),
        (ops.embedding_sensitivity_, (acc, w, ids, x, starts, lens)),
    ]
    for op, arguments in calls:
        for power in (0, 3, -1):
            with pytest.raises(pkt.PktError, match=f"pkt::{op.__name__}: power is {power}; it must be 1 or 2"):
                op(*arguments, power)


def test_other_ops_refuse_bad_arguments() -> None:
    with pytest.raises(pkt.PktError, match="shapes differ"):
        ops.abs_accumulate_(torch.zeros(3), torch.zeros(3), torch.zeros(4))
    with pytest.raises(pkt.PktError, match="4 x 1 blocks of 2 x 3 do not fit in 7 x 4"):
        ops.best_blocks(torch.rand(7, 4), 4, 1, 2, 3)
    with pytest.raises(pkt.PktError, match="blocks must be positive"):
        ops.best_blocks(torch.rand(7, 4), 4, 1, 0, 3)
    with pytest.raises(pkt.PktError, match="does not fit in"):
        ops.best_window(torch.rand(3, 4), 4, 4)
    with pytest.raises(pkt.PktError, match="steps"):
        ops.best_window(torch.rand(3, 4), 2, 2, 0, 1)
    with pytest.raises(pkt.PktError, match="int64"):
        ops.embedding_sensitivity_(
            torch.zeros(3, 2),
            torch.zeros(3, 2),
            torch.zeros(4),
            torch.zeros(4, 2),
            torch.tensor([0]),
            torch.tensor([4]),
        )
    with pytest.raises(pkt.PktError, match="tiles"):
        ops.linear_sensitivity_tiles_(torch.zeros(2, 2), *case([3], 6, 5, torch.float32), 2)


@pytest.mark.parametrize(
    ("bad", "rank", "message"),
    [
        (torch.zeros(3), 1, r"must be a matrix, not \[3\]"),
        (torch.zeros(2, 3, 4), 1, "must be a matrix"),
        (torch.zeros(3, 3, dtype=torch.int64), 1, "bf16, fp16 or fp32, not .* int64"),
        (torch.zeros(3, 3, dtype=torch.complex64), 1, "bf16, fp16 or fp32, not .* complex64"),
        (torch.zeros(3, 5), 4, r"rank 4 is not between 1 and min\(3, 5\)"),
        (torch.zeros(3, 5), 0, "rank 0"),
        (torch.zeros(3, 5), -2, "rank -2"),
        (torch.zeros(0, 5), 1, r"min\(0, 5\)"),
    ],
)
def test_rsvd_refuses_bad_matrices_and_ranks(bad: Tensor, rank: int, message: str) -> None:
    with pytest.raises(pkt.PktError, match=f"pkt::rsvd: .*{message}"):
        ops.rsvd(bad, rank)
    with pytest.raises(pkt.PktError, match=rf"pkt::rsvd_batch: .*{message}"):
        ops.rsvd_batch([torch.zeros(9, 9), bad], rank)


def test_rsvd_refuses_bad_options_and_mixed_devices() -> None:
    for options in ({"oversample": -1}, {"iters": -1}, {"oversample": 2**31}, {"iters": 2**63 - 1}):
        with pytest.raises(pkt.PktError, match=r"must be between 0 and 2\*\*31 - 1"):
            ops.rsvd(torch.zeros(3, 5), 1, **options)
    with pytest.raises(pkt.PktError, match=r"a\[1\] is on meta, a\[0\] on cpu"):
        ops.rsvd_batch([torch.zeros(3, 5), torch.zeros(3, 5, device="meta")], 1)
    assert [len(x) for x in ops.rsvd_batch([], 1)] == [0, 0, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "counts", "blocks"),
    [((1, 1), (1, 1), (1, 1)), ((70, 33), (5, 3), (8, 5)), ((300, 90), (300, 11), (1, 4))],
)
@pytest.mark.parametrize("values", ["any", "ties", "zeros", "wide"])
def test_the_best_blocks(
    shape: tuple[int, int], counts: tuple[int, int], blocks: tuple[int, int], values: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    score = torch.rand(shape)
    score = {"any": score, "ties": (score > 0.5).float(), "zeros": torch.zeros(shape), "wide": score**20}[values].to(
        dtype
    )
    found = ops.best_blocks(score, *counts, *blocks)
    # In Python's own integers.
    exponent = math.frexp(float(score.max()))[1]
    bits = min(36, 53 - (max(blocks[0] * shape[1], blocks[1] * shape[0]) - 1).bit_length())
    whole = [[math.floor(math.ldexp(v, bits - exponent) + 0.5) for v in row] for row in score.tolist()]
    for axis, lines in enumerate((whole, list(zip(*whole, strict=True)))):
        block = blocks[axis]
        sums = [sum(sum(line) for line in lines[i : i + block]) for i in range(0, len(lines) - block + 1, block)]
        wanted = sorted(sorted(range(len(sums)), key=lambda i: (-sums[i], i))[: counts[axis]])
        assert found[axis].tolist() == wanted


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tiles' op as CUDA dispatches it, with a stand-in for its kernel: set `raises` on what is returned."""
    launch = pytest.importorskip("pkt_kernels.launch")
    stand_in = types.ModuleType("pkt_kernels.linear_sensitivity")
    found = types.SimpleNamespace(raises=None, NoFormError=launch.NoFormError, calls=0)

    def linear_sensitivity_tiles(*_: Any) -> None:
        found.calls += 1
        if found.raises is not None:
            raise found.raises

    stand_in.linear_sensitivity_tiles = linear_sensitivity_tiles
    monkeypatch.setitem(sys.modules, "pkt_kernels.linear_sensitivity", stand_in)
    monkeypatch.setattr(ops.dispatch, "no_triton", lambda _: None)
    ops.dispatch.warn_once.cache_clear()
    found.run = ops.dispatch.triton_or_torch("linear_sensitivity_tiles_")
    return found


def test_a_kernel_s_refusal_falls_back_to_torch_and_says_so_once(kernel: Any) -> None:
    args = case([3, 4], 6, 5, torch.float32)
    expected = ops.tile_sums(truth(*args), 2)
    kernel.raises = kernel.NoFormError("tile=2: not this one")
    once = torch.zeros(3, 3)
    with pytest.warns(pkt.PktWarning, match="linear_sensitivity_tiles_ runs in torch.*tile=2: not this one"):
        kernel.run(once, *args, 2)
    # Warnings of pkt are errors in the tests: a second one would end this.
    twice = once.clone()
    kernel.run(twice, *args, 2)
    assert oracle.relative_error(once, expected) < 1e-6
    assert oracle.relative_error(twice, 2 * expected) < 1e-6
    assert kernel.calls == 2


@pytest.mark.parametrize("error", [ValueError("a bug"), TypeError("a bug"), RuntimeError("Triton Error [CUDA]: a bug")])
def test_any_other_error_of_a_kernel_is_not_swallowed(kernel: Any, error: Exception) -> None:
    tiles, args = torch.zeros(3, 3), case([3, 4], 6, 5, torch.float32)
    kernel.raises = error
    with pytest.raises(type(error), match="a bug"):
        kernel.run(tiles, *args, 2)
    assert not tiles.any()


def test_fp64_never_reaches_a_kernel(kernel: Any) -> None:
    tiles, args = torch.zeros(3, 3, dtype=torch.float64), case([3, 4], 6, 5, torch.float32)
    kernel.run(tiles, *args, 2)
    assert kernel.calls == 0
    assert tiles.any()


def test_cuda_without_an_index_is_the_current_device(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((7, 0), (9, 0))[index])
    ops.dispatch.no_triton.cache_clear()
    try:
        assert ops.implementation("abs_accumulate_", "cuda")[0] == "Triton"
        assert ops.implementation("abs_accumulate_", "cuda:0") == (
            "torch",
            "the GPU's compute capability is 7.0, below 8.0",
        )
    finally:
        ops.dispatch.no_triton.cache_clear()


def test_a_sum_by_rows_in_fp32_is_the_sum_in_fp64() -> None:
    torch.manual_seed(0)
    score = torch.randn(700, 3000).mul(3).exp()
    for values in (score, score.t(), score[10:400, 7:2000], score.view(7, 100, 3000), score[0], score[0, 0]):
        exact = values.double().sum().item()
        found = reference.rows_first(values)
        assert found.dtype == torch.float64
        assert found.item() == pytest.approx(exact, rel=1e-8 if values.ndim > 1 else 1e-15)
