"""pkt::rsvd against fp64 torch.linalg.svd: the registered implementation, and the torch one it falls back to."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pkt import ops
from pkt.ops import rsvd_reference

Rsvd = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
IMPLEMENTATIONS: dict[str, Rsvd] = {"registered": ops.rsvd, "torch": rsvd_reference.rsvd}
each_implementation = pytest.mark.parametrize("rsvd", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small matrices gain nothing from threads, and LAPACK's spin for seconds when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SPECTRA: dict[str, Callable[[int], float]] = {
    "flat": lambda i: 1.0,
    "1/i": lambda i: 1 / i,
    "slow": lambda i: i**-0.25,
    "exponential": lambda i: 0.9**i,
    "steep": lambda i: 0.5**i,
    "clustered": lambda i: 1.0 if i <= 10 else 0.99 if i < 40 else 0.1,
    "spiked": lambda i: 1e4 if i < 4 else i**-0.2,
}


def with_spectrum(n: int, m: int, value: Callable[[int], float], seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    k = min(n, m)
    left = torch.linalg.qr(torch.randn(n, k, generator=g, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(m, k, generator=g, dtype=torch.float64)).Q
    return (left * torch.tensor([value(i) for i in range(1, k + 1)], dtype=torch.float64)) @ right.T


def gaussian(n: int, m: int, seed: int = 0) -> Tensor:
    return torch.randn(n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check(
    a: Tensor, result: tuple[Tensor, Tensor, Tensor, Tensor], rank: int, worst: float = 1.01, floor: float = 2e-6
) -> None:
    """Orthonormal, ordered, honest statistics, and a residual within `worst` of the best possible.

    `floor`, relative to ‖a‖_F, is the residual that rounding may leave.
    """
    U, S, V, stats = result
    n, m = a.shape
    assert (U.shape, S.shape, V.shape, stats.shape) == ((n, rank), (rank,), (m, rank), (4,))
    assert all(x.dtype == torch.float32 and x.is_contiguous() for x in result)
    for basis in (U, V):
        assert (basis.T @ basis - torch.eye(rank)).abs().max() <= 1e-5
    assert (S >= 0).all()
    assert (S[:-1] >= S[1:]).all()

    exact = a.double()
    total = exact.square().sum()
    best = torch.linalg.svdvals(exact)[rank:].square().sum()
    residual = (exact - (U.double() * S.double()) @ V.double().T).square().sum()
    assert worst == math.inf or residual <= worst * best + floor**2 * total
    torch.testing.assert_close(stats[0].double(), total, rtol=1e-5, atol=0)
    torch.testing.assert_close(stats[1].double(), S.double().square().sum(), rtol=1e-5, atol=0)
    if total > 0:
        assert stats[2].item() == pytest.approx(math.sqrt(residual / total), abs=math.sqrt(floor / 2))
    assert stats[3] == 1


@each_implementation
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("n", "m"), [(700, 500), (401, 609)])
def test_the_residual_is_within_one_percent_of_the_best_possible(rsvd: Rsvd, n: int, m: int, spectrum: str) -> None:
    a = with_spectrum(n, m, SPECTRA[spectrum]).float()
    check(a, rsvd(a, 16), 16)


@each_implementation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_gaussian_matrix_in_every_dtype(rsvd: Rsvd, dtype: torch.dtype) -> None:
    a = gaussian(600, 431).to(dtype)
    check(a, rsvd(a, 16), 16)


@each_implementation
def test_one_over_i_keeps_its_energy(rsvd: Rsvd) -> None:
    a = with_spectrum(800, 600, lambda i: 1 / i).float()
    best = sum(i**-2 for i in range(1, 17))
    assert rsvd(a, 16)[3][1] >= 0.9999 * best
    assert rsvd(a.bfloat16(), 16)[3][1] >= 0.9999 * torch.linalg.svdvals(a.bfloat16().double())[:16].square().sum()


@each_implementation
def test_a_separated_subspace_is_found(rsvd: Rsvd) -> None:
    """Singular vectors match up to sign where the spectrum leaves no other choice."""
    a = with_spectrum(500, 400, lambda i: 2.0**-i if i <= 8 else 1e-4).float()
    U, S, V, _ = rsvd(a, 8)
    left, values, right = torch.linalg.svd(a.double(), full_matrices=False)
    torch.testing.assert_close(S.double(), values[:8], rtol=1e-5, atol=0)
    for ours, theirs in ((U, left[:, :8]), (V, right[:8].T)):
        cosines = (ours.double() * theirs).sum(0).abs()
        assert (cosines >= 1 - 1e-6).all()


@each_implementation
@pytest.mark.parametrize(
    ("n", "m"), [(1, 1), (1, 7), (7, 1), (3, 5), (16, 16), (17, 40), (160, 160), (161, 400), (3000, 2), (2, 3000)]
)
def test_small_and_extreme_shapes_are_exact(rsvd: Rsvd, n: int, m: int) -> None:
    a = gaussian(n, m).float()
    rank = min(n, m, 16)
    check(a, rsvd(a, rank), rank)


@each_implementation
@pytest.mark.parametrize("rank", [1, 15, 90, 200])
def test_ranks_up_to_the_full_one(rsvd: Rsvd, rank: int) -> None:
    a = gaussian(230, 200).float()
    check(a, rsvd(a, rank), rank)
    check(a, rsvd(a, rank, 0, 1), rank, worst=1.2)


@each_implementation
@pytest.mark.parametrize("true_rank", [0, 1, 5, 20])
def test_deficient_matrices_have_zero_values_and_orthonormal_vectors(rsvd: Rsvd, true_rank: int) -> None:
    a = (gaussian(300, true_rank) @ gaussian(true_rank, 250, seed=1)).float()
    result = rsvd(a, 24)
    check(a, result, 24)
    assert (result[1][true_rank:] <= 1e-5 * max(result[1][0], 1e-30)).all()


@each_implementation
def test_single_entries_and_repeated_columns(rsvd: Rsvd) -> None:
    a = torch.zeros(400, 300)
    a[123, 45] = -3.0
    check(a, rsvd(a, 4), 4)
    a = gaussian(400, 3).float()[:, [0, 1, 2, 0, 1, 2] * 60]
    check(a, rsvd(a, 8), 8)


@each_implementation
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_any_magnitude_fp32_holds(rsvd: Rsvd, scale: float) -> None:
    a = gaussian(300, 250).float()
    _, S, _, stats = rsvd(a, 8)
    _, scaled, _, scaled_stats = rsvd(a * scale, 8)
    torch.testing.assert_close(scaled / scale, S, rtol=1e-4, atol=0)
    assert scaled_stats[3] == 1
    assert scaled_stats[2].item() == pytest.approx(stats[2].item(), abs=1e-4)


@each_implementation
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "m"), [(30, 20), (400, 300)])
def test_non_finite_input_is_flagged_and_gives_zeros(
    rsvd: Rsvd, n: int, m: int, dtype: torch.dtype, bad: float
) -> None:
    a = gaussian(n, m).to(dtype)
    a[n - 1, m - 1] = bad
    assert all((x == 0).all() for x in rsvd(a, 4))


@each_implementation
def test_views_are_read_in_place(rsvd: Rsvd) -> None:
    base = gaussian(700, 900).to(torch.bfloat16)
    views = {
        "window": base[101:501, 37:437],
        "transposed": base[101:501, 37:437].T,
        "stepped": base[::2, 1::3],
        "broadcast": base[:1].expand(300, 900),
        "column": base[:, 5:6],
    }
    for name, view in views.items():
        rank = min(8, *view.shape)
        check(view, rsvd(view, rank), rank)
        contiguous = rsvd(view.contiguous(), rank)
        torch.testing.assert_close(rsvd(view, rank)[1], contiguous[1], rtol=1e-5, atol=1e-4, msg=name)


@each_implementation
def test_the_same_bytes_twice_and_other_bytes_for_another_seed(rsvd: Rsvd) -> None:
    a = gaussian(512, 512).to(torch.bfloat16)
    first, second, other = rsvd(a, 16, seed=3), rsvd(a.clone(), 16, seed=3), rsvd(a, 16, seed=-4)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])


@each_implementation
def test_the_input_is_left_alone(rsvd: Rsvd) -> None:
    a = gaussian(200, 300).float()
    before = a.clone()
    rsvd(a, 4)
    assert torch.equal(a, before)


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 90),
    m=st.integers(1, 90),
    rank=st.integers(1, 90),
    oversample=st.integers(0, 20),
    iters=st.integers(0, 3),
    seed=st.integers(-(2**63), 2**63 - 1),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    layout=st.sampled_from(["contiguous", "transposed", "stepped"]),
    true_rank=st.integers(0, 90),
)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_any_shape_stride_and_dtype(
    name: str,
    n: int,
    m: int,
    rank: int,
    oversample: int,
    iters: int,
    seed: int,
    dtype: torch.dtype,
    layout: str,
    true_rank: int,
) -> None:
    rank = min(rank, n, m)
    a = (gaussian(n, true_rank) @ gaussian(true_rank, m, seed=1)).to(dtype)
    if layout == "transposed":
        a = a.T.contiguous().T
    elif layout == "stepped":
        a = a.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3]
    exact = min(n, m) <= max(rank * (iters + 1), rank + oversample)
    check(a, IMPLEMENTATIONS[name](a, rank, oversample, iters, seed), rank, worst=1.01 if exact else math.inf)


@pytest.mark.parametrize("implementation", ["registered", "torch"])
def test_the_batch_is_each_matrix_by_itself(implementation: str) -> None:
    batch_rsvd = ops.rsvd_batch if implementation == "registered" else rsvd_reference.rsvd_batch
    shapes = [(120, 300), (300, 120), (120, 300), (5, 3), (400, 380)]
    batch = [gaussian(n, m, seed=i).to(torch.bfloat16) for i, (n, m) in enumerate(shapes)]
    U, S, V, stats = batch_rsvd(batch, 3, 16, 4, 0)
    assert stats.shape == (len(shapes), 4)
    for i, a in enumerate(batch):
        for got, expected in zip((U[i], S[i], V[i], stats[i]), IMPLEMENTATIONS[implementation](a, 3), strict=True):
            assert torch.equal(got, expected)


def test_philox_signs_are_the_published_generator() -> None:
    """Known answers of Philox-4x32-10 from Random123's own test vectors: key 0, counter 0."""
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    expected = [1 - 2 * (word >> bit & 1) for word in words for bit in range(32)]
    signs = rsvd_reference.philox_signs(2, 128, seed=0, stream=0, device=torch.device("cpu"))
    assert signs[0].tolist() == expected
    assert torch.equal(signs[:, :30], rsvd_reference.philox_signs(2, 30, 0, 0, torch.device("cpu")))
    assert abs(rsvd_reference.philox_signs(1000, 200, 7, 1, torch.device("cpu")).mean()) < 0.01


@pytest.mark.skipif(ops.implementation("rsvd", "cpu")[0] != "C++", reason="pkt._C is not built")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            "pkt.factorize(torch.zeros(1, 1).expand(4_000_000, 4096), 1024, name='model.up_proj')",
            "pkt.errors.PktError: model.up_proj: not enough memory to factorize it; use a smaller rank",
        ),
        (
            "ops.rsvd(torch.zeros(1, 1).expand(4_000_000, 4096), 1024)",
            "pkt: out of memory: no tensor of 4096000000 entries",
        ),
        # Without the check it would take 20 GB.
        (
            "ops.rsvd(torch.zeros(1, 1).expand(60_000, 50_000), 12_000)",
            "pkt::rsvd: a basis of 50000 columns is too wide; use a smaller rank",
        ),
    ],
    ids=["memory that does not suffice", "how the op says it", "a basis too wide for its eigenproblem"],
)
def test_refused_within_a_limit_on_the_memory(call: str, message: str) -> None:
    script = (
        "import resource, torch, pkt; from pkt import ops;"
        f"resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30));{call}"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert message in run.stderr
