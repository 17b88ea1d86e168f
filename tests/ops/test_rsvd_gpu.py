"""pkt::rsvd on a GPU, whichever implementation is registered there; the compiled one's promises where it is."""

from __future__ import annotations

import math

import pytest
import torch
from test_rsvd import SPECTRA, check, gaussian, with_spectrum
from torch import Tensor

from pkt import ops

pytestmark = pytest.mark.gpu
needs_extension = pytest.mark.skipif(ops.implementation("rsvd", "cuda")[0] != "CUDA", reason="pkt._C has no CUDA part")
TWO_HALVES = 2.0**-17  # what a factor that travels as two bf16 numbers is rounded by


def on_gpu(a: Tensor, rank: int, **options: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    U, S, V, stats = ops.rsvd(a.cuda() if not a.is_cuda else a, rank, **options)
    return U.cpu(), S.cpu(), V.cpu(), stats.cpu()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "m"), [(1200, 700), (613, 1301)])
def test_every_dtype(n: int, m: int, dtype: torch.dtype) -> None:
    a = gaussian(n, m).to(dtype)
    check(a, on_gpu(a, 16), 16, floor=TWO_HALVES)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_every_spectrum(spectrum: str) -> None:
    a = with_spectrum(700, 500, SPECTRA[spectrum]).float()
    check(a, on_gpu(a, 16), 16)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 7), (7, 1), (3, 5), (16, 16), (17, 40), (9000, 2), (2, 9000)])
def test_small_and_extreme_shapes(n: int, m: int) -> None:
    a = gaussian(n, m).float()
    rank = min(n, m, 8)
    check(a, on_gpu(a, rank), rank)


@pytest.mark.parametrize("rank", [1, 64, 128, 200])
def test_ranks(rank: int) -> None:
    a = with_spectrum(500, 400, SPECTRA["slow"]).float()
    check(a, on_gpu(a, rank), rank)


@pytest.mark.parametrize("true_rank", [0, 1, 5, 20])
def test_deficient_matrices(true_rank: int) -> None:
    a = (gaussian(300, true_rank) @ gaussian(true_rank, 250, seed=1)).float()
    check(a, on_gpu(a, 24), 24)


def test_views_are_read_in_place_and_never_widened() -> None:
    base = gaussian(5000, 4100).to(torch.bfloat16).cuda()
    for view in (base[7:4103, 5:4001], base[7:4103, 5:4001].T):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = ops.rsvd(view, 16)
        peak = torch.cuda.max_memory_allocated() - before
        if ops.implementation("rsvd", "cuda")[0] == "CUDA":
            assert peak < view.numel(), "half of the bf16 matrix at most"
        check(view.cpu(), tuple(x.cpu() for x in result), 16, floor=TWO_HALVES)


@pytest.mark.parametrize("offset", [0, 1, 3, 8, 13])
@pytest.mark.parametrize("beside", [1.0, math.nan, math.inf])
def test_what_lies_beside_a_window_does_not_matter(offset: int, beside: float) -> None:
    content = gaussian(700, 509).to(torch.bfloat16).cuda()
    base = torch.full((700, 640), beside, dtype=torch.bfloat16, device="cuda")
    base[:, offset : offset + 509] = content
    for a, window in ((content, base[:, offset : offset + 509]), (content.T, base[:, offset : offset + 509].T)):
        found = on_gpu(window, 16)
        check(a.cpu(), found, 16, floor=TWO_HALVES)
        torch.testing.assert_close(found[1], on_gpu(a, 16)[1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_flagged(bad: float) -> None:
    a = gaussian(400, 300).to(torch.bfloat16)
    a[399, 299] = bad
    assert all((x == 0).all() for x in on_gpu(a, 4))


def test_the_cpu_agrees() -> None:
    a = with_spectrum(800, 600, lambda i: 2.0**-i if i <= 8 else 1e-3).to(torch.bfloat16)
    ours, theirs = on_gpu(a, 8), ops.rsvd(a, 8)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=0)
    cosines = ((ours[0] * theirs[0]).sum(0) * (ours[2] * theirs[2]).sum(0))[:6]
    assert (cosines >= 1 - 1e-4).all()


@needs_extension
def test_nothing_waits_for_the_device() -> None:
    a = gaussian(700, 500).to(torch.bfloat16).cuda()
    first = ops.rsvd(a, 16)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = ops.rsvd(a, 16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@needs_extension
@pytest.mark.parametrize("spare", [1 << 20, 36 << 20], ids=["no workspace", "no products"])
def test_memory_that_does_not_suffice_is_recognised(spare: int) -> None:
    a = torch.zeros(32768, 4096, dtype=torch.bfloat16, device="cuda")
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + spare) / total)
    try:
        with pytest.raises(RuntimeError) as caught:
            ops.rsvd(a, 64)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert ops.out_of_memory(caught.value)
    assert (ops.rsvd(a, 64)[1] == 0).all()


@needs_extension
def test_it_can_be_captured_in_a_graph() -> None:
    a = gaussian(700, 500).to(torch.bfloat16).cuda()
    expected = ops.rsvd(a, 16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.rsvd(a, 16)
    graph.replay()
    torch.cuda.synchronize()
    for x, y in zip(captured, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@needs_extension
def test_a_batch_larger_than_one_launch() -> None:
    shapes = [(500 + 7 * i, 900 - 11 * i) for i in range(19)] + [(5, 3)]
    batch = [gaussian(n, m, seed=n).to(torch.float16 if n % 3 == 0 else torch.bfloat16).cuda() for n, m in shapes]
    U, S, V, stats = ops.rsvd_batch(batch, 3)
    for i, a in enumerate(batch):
        check(a.cpu(), (U[i].cpu(), S[i].cpu(), V[i].cpu(), stats[i].cpu()), 3, floor=TWO_HALVES)
