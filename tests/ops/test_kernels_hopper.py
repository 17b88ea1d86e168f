"""The numbers of the Hopper kernel and its barriers, from its own source on the CPU, and what its launcher refuses."""

from __future__ import annotations

import itertools
import os
import random
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton.experimental.gluon")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets in this process", allow_module_level=True)

import gluon_emulation
from pkt_kernels import launch, linear_sensitivity_hopper

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KERNEL = "_linear_sensitivity_hopper_kernel"


@pytest.fixture(autouse=True)
def two_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few that each takes several tiles; and few stages, so that they come round."""
    torch.manual_seed(0)
    random.seed(0)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 2)
    monkeypatch.setattr(linear_sensitivity_hopper, "STAGES", 2)
    emulated = gluon_emulation.emulated(linear_sensitivity_hopper, KERNEL)
    monkeypatch.setattr(linear_sensitivity_hopper, KERNEL, emulated)


def packed(lens: list[int], *widths: int, dtype: torch.dtype, pad: int = 0) -> tuple[Tensor, Tensor, list[Tensor]]:
    """seq_starts, seq_lens and a random matrix a width; the rows between samples hold NaN."""
    starts = [3 + sum(lens[:j]) + 3 * j for j in range(len(lens))]
    matrices = [torch.full((3 + sum(lens) + 3 * len(lens), width + pad), float("nan"), dtype=dtype) for width in widths]
    for matrix in matrices:
        for start, length in zip(starts, lens, strict=True):
            matrix[start : start + length] = torch.randn(length, matrix.shape[1]).to(dtype)
    return torch.tensor(starts), torch.tensor(lens), [m[:, : m.shape[1] - pad] for m in matrices]


def truth(w: Tensor, x: Tensor, dy: Tensor, starts: Tensor, lens: Tensor, power: int, weighted: bool) -> Tensor:
    total = torch.zeros(w.shape, dtype=torch.float64)
    for start, length in zip(starts.tolist(), lens.tolist(), strict=True):
        gradient = dy[start : start + length].double().T @ x[start : start + length].double()
        total += (w.double() * gradient if weighted else gradient).abs() ** power
    return total


def check(n: int, m: int, lens: list[int], dtype: torch.dtype, tile: int, power: int, weighted: bool, pad: int) -> None:
    starts, lengths, (x, dy) = packed(lens, m, n, dtype=dtype, pad=pad)
    w = torch.randn(n, m).to(dtype) if weighted else torch.full((n, m), float("nan"), dtype=dtype)
    wanted = truth(w, x, dy, starts, lengths, power, weighted)
    if tile:
        wanted = torch.nn.functional.pad(wanted, (0, -m % tile, 0, -n % tile))
        wanted = wanted.view(-(-n // tile), tile, -(-m // tile), tile).sum((1, 3))
    whole = torch.full((wanted.shape[0] + 2, wanted.shape[1] + 3), float("nan"))
    out = whole[1:-1, 2:-1]
    out.fill_(1.0)
    linear_sensitivity_hopper.linear_sensitivity_tiles(out, w, x, dy, starts, lengths, tile, power, weighted)
    assert float((out.double() - 1.0 - wanted).norm() / wanted.norm().clamp_min(1e-30)) <= 1e-6
    out.fill_(float("nan"))
    assert bool(whole.isnan().all()), "its neighbours are untouched"


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(
    ("n", "m", "lens"),
    [(1, 8, [1]), (130, 72, [30, 0, 70, 1]), (264, 392, [129, 64]), (128, 128, [0]), (72, 520, [5, 200])],
)
def test_the_numbers(n: int, m: int, lens: list[int], dtype: torch.dtype) -> None:
    check(n, m, lens, dtype, 0, 1, True, 0)


@pytest.mark.parametrize(("power", "weighted"), list(itertools.product((1, 2), (True, False))))
@pytest.mark.parametrize("tile", [0, 16, 32, 64])
def test_every_measure_and_tile(tile: int, power: int, weighted: bool) -> None:
    check(200, 264, [65, 0, 7], BF16, tile, power, weighted, 0)


def test_unaligned_rows_are_copied() -> None:
    check(131, 70, [65, 3], BF16, 0, 1, True, 3)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_transposed_weight(transposed: bool) -> None:
    starts, lens, (x, dy) = packed([40, 90], 72, 136, dtype=BF16)
    w = torch.randn(72, 136).to(BF16).T
    acc = torch.zeros(72, 136).T if transposed else torch.zeros(136, 72)
    linear_sensitivity_hopper.linear_sensitivity(acc, w, x, dy, starts, lens)
    wanted = truth(w, x, dy, starts, lens, 1, True)
    assert float((acc.double() - wanted).norm() / wanted.norm()) <= 1e-6


def test_a_sample_past_the_end_is_cut_there() -> None:
    x, dy, w, acc = torch.randn(12, 16).to(BF16), torch.randn(12, 8).to(BF16), torch.randn(8, 16), torch.zeros(8, 16)
    linear_sensitivity_hopper.linear_sensitivity(acc, w, x, dy, torch.tensor([2]), torch.tensor([99]))
    torch.testing.assert_close(acc, w.abs() * (dy[2:].float().T @ x[2:].float()).abs())


@pytest.mark.parametrize("what", ["no samples", "no rows"])
def test_nothing_to_add(what: str) -> None:
    rows = 0 if what == "no rows" else 12
    starts = torch.zeros(0 if what == "no samples" else 1, dtype=torch.int64)
    x, dy, acc = torch.randn(rows, 16).to(BF16), torch.randn(rows, 8).to(BF16), torch.zeros(8, 16)
    linear_sensitivity_hopper.linear_sensitivity(acc, torch.randn(8, 16), x, dy, starts, starts)
    assert not acc.any()


@pytest.mark.parametrize(("dtype", "tile"), [(FP32, 0), (BF16, 128), (BF16, 48), (BF16, 1)], ids=str)
def test_what_it_has_no_form_for_is_left_to_todays_kernel(dtype: torch.dtype, tile: int) -> None:
    starts, lens, (x, dy) = packed([4], 8, 8, dtype=dtype)
    out = torch.zeros(8, 8)
    with pytest.raises(launch.NoFormError, match="16-bit rows and tiles of"):
        linear_sensitivity_hopper.linear_sensitivity_tiles(out, torch.randn(8, 8), x, dy, starts, lens, tile)
    assert not out.any()
    assert not linear_sensitivity_hopper.serves(dtype, tile)


def test_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, there in (((9, 0), True), ((8, 0), False), ((10, 0), False), ((12, 0), False)):
        monkeypatch.setattr(launch, "capability", lambda device, capability=capability: capability)
        assert (linear_sensitivity_hopper.obstacle(torch.device("cpu")) is None) == there


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        # A stage given up while the product still reads it.
        ("(step + STAGES - 1) % STAGES), pred=t > 0", "step % STAGES), pred=t > 0"),
        ("warpgroup_mma_wait(1, deps=[product])", "warpgroup_mma_wait(1 + (t > 0), deps=[product])"),
        ("use_acc=t > 0", "use_acc=True"),
        ("row = BOUND - length + t", "row = BOUND - length"),
        ("mbarrier.init(empty.index(stage), count=2)", "mbarrier.init(empty.index(stage), count=1)"),
        ("first_n + HALF], ready", "first_n], ready"),
    ],
)
def test_a_fault_shows(line: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulation is no proof unless it finds what it is there for."""
    import types
    from pathlib import Path

    file = Path(linear_sensitivity_hopper.__file__)
    text = file.read_text(encoding="utf-8")
    assert line in text
    broken = types.ModuleType("broken")
    plain = text.replace(line, fault).replace("@gluon.jit\n", "@jitted\n")

    class GluonJITFunction:
        def __init__(self, fn: Any) -> None:
            self.fn = fn

    broken.__dict__["jitted"] = GluonJITFunction
    exec(compile(plain, str(file), "exec"), broken.__dict__)
    monkeypatch.setattr(gluon_emulation, "SECONDS", 1.0)
    monkeypatch.setattr(linear_sensitivity_hopper, KERNEL, gluon_emulation.emulated(broken, KERNEL))
    with pytest.raises(AssertionError):
        check(264, 392, [129, 64, 200], BF16, 0, 1, True, 0)
