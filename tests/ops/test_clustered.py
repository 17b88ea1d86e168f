"""The clustered CUDA kernel: what the compiler makes of it, and its indices and barriers on an emulated Hopper."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pkt.ops import clustered

ROOT = Path(__file__).parents[2]
CSRC, NATIVE = ROOT / "csrc", ROOT / "tests" / "native"
COMPILER, NVCC = shutil.which(os.environ.get("CXX", "c++")), shutil.which("nvcc")
BF16, FP16 = torch.bfloat16, torch.float16

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


def compiled(to: Path, headers: Path = CSRC) -> ctypes.CDLL:
    flags = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    folders = [f"-I{headers}", f"-I{CSRC}", f"-I{NATIVE}"]
    source = str(NATIVE / "clustered_emulated.cpp")
    subprocess.run([str(COMPILER), *flags, *folders, source, "-o", str(to)], check=True)
    library = ctypes.CDLL(str(to))
    library.pkt_emulated_clustered.restype = ctypes.c_bool
    return library


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled(tmp_path_factory.mktemp("clustered") / "clustered.so")


def packed(lens: list[int], width: int, dtype: torch.dtype) -> Tensor:
    """Rows of samples with NaN between them."""
    rows = torch.full((3 + sum(lens) + 3 * len(lens), width + 8), float("nan"), dtype=dtype)
    start = 3
    for length in lens:
        rows[start : start + length] = torch.randn(length, width + 8).to(dtype)
        start += length + 3
    return rows[:, :width]


def error(
    library: ctypes.CDLL,
    n: int,
    m: int,
    lens: list[int],
    dtype: torch.dtype = BF16,
    power: int = 1,
    weighted: bool = True,
    clusters: int = 1,
    backwards: bool = False,
) -> float:
    """Of what the emulated kernel adds, relative to fp64; infinite if somebody waits for ever or a neighbour is written."""
    torch.manual_seed(0)
    x, dy, w = packed(lens, m, dtype), packed(lens, n, dtype), torch.randn(n, m).to(dtype)
    starts = [3 + sum(lens[:j]) + 3 * j for j in range(len(lens))]
    truth = torch.zeros(n, m, dtype=torch.float64)
    for start, length in zip(starts, lens, strict=True):
        gradient = dy[start : start + length].double().T @ x[start : start + length].double()
        truth += (w.double() * gradient if weighted else gradient).abs() ** power
    whole = torch.full((n + 2, m + 4), float("nan"))
    acc = whole[1:-1, 2:-2].fill_(1.0)
    bounds = [torch.tensor(values, dtype=torch.int64) for values in (starts, lens)]

    def pointer(t: Tensor) -> ctypes.c_void_p:
        return ctypes.c_void_p(t.data_ptr())

    def stride(t: Tensor) -> ctypes.c_int64:
        return ctypes.c_int64(t.stride(0))

    rows = [argument for t in (acc, w, x, dy) for argument in (pointer(t), stride(t))]
    if not weighted:
        rows[2] = ctypes.c_void_p(None)
    ended = library.pkt_emulated_clustered(
        *rows, *map(pointer, bounds), len(lens), len(x), n, m, power, int(dtype == FP16), clusters, int(backwards)
    )
    found = acc.double() - 1.0
    acc.fill_(float("nan"))
    if not ended or not bool(whole.isnan().all()) or not bool(found.isfinite().all()):
        return float("inf")
    return float((found - truth).norm() / truth.norm().clamp_min(1e-30))


@needs_compiler
@pytest.mark.parametrize(
    ("n", "m", "lens"),
    [(2, 2, [1]), (130, 72, [30, 0, 70]), (300, 200, [65, 129]), (128, 192, [0]), (258, 386, [3])],
)
def test_the_emulated_numbers(library: ctypes.CDLL, n: int, m: int, lens: list[int]) -> None:
    assert error(library, n, m, lens) <= 1e-6


@needs_compiler
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("weighted", [True, False])
def test_every_measure_emulated(library: ctypes.CDLL, power: int, weighted: bool) -> None:
    assert error(library, 130, 72, [30, 70], FP16, power, weighted) <= 1e-6


@needs_compiler
def test_no_race_emulated(library: ctypes.CDLL) -> None:
    """More steps than stages, several tiles a cluster, and threads that take turns backwards."""
    for clusters, backwards in ((1, True), (2, False), (2, True)):
        assert error(library, 300, 200, [200, 129, 64], clusters=clusters, backwards=backwards) <= 1e-6


@needs_compiler
def test_the_op_s_caller_gives_it_what_it_takes(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = pytest.importorskip("pkt_kernels.launch")
    pytest.importorskip("triton")
    calls = []

    def op(
        acc: Tensor, w: Tensor, x: Tensor, dy: Tensor, starts: Tensor, lens: Tensor, power: int, weighted: bool
    ) -> None:
        calls.append((power, weighted))
        rows = [a for t in (acc, w, x, dy) for a in (ctypes.c_void_p(t.data_ptr()), ctypes.c_int64(t.stride(0)))]
        bounds = (ctypes.c_void_p(starts.data_ptr()), ctypes.c_void_p(lens.data_ptr()))
        library.pkt_emulated_clustered(*rows, *bounds, len(lens), len(x), *acc.shape, power, 0, 1, 0)

    monkeypatch.setattr(torch.ops.pkt, "linear_sensitivity_clustered_", op)
    n, m = 10, 16
    w, x, dy = torch.randn(n, m).to(BF16), torch.randn(9, m + 1).to(BF16)[:, :m], torch.randn(9, n).to(BF16)
    bounds = torch.tensor([2]), torch.tensor([5])
    truth = w.float().abs() * (dy[2:7].float().T @ x[2:7].float()).abs()
    for acc, weight in ((torch.zeros(n, m), w), (torch.zeros(m, n).T, w.T.contiguous().T)):
        clustered.linear_sensitivity(acc, weight, x, dy, *bounds, 1, True)
        torch.testing.assert_close(acc, truth)
    assert calls == [(1, True)] * 2
    wide = torch.zeros(n, m + 1)
    for acc, weight, rows in (
        (torch.zeros(n, m), w.float(), x),
        (wide[:, :m], w, x),
        (torch.zeros(n, m), w, x.float()),
    ):
        with pytest.raises(launch.NoFormError, match="16-bit rows, weights of their type, even shapes"):
            clustered.linear_sensitivity(acc, weight, rows, dy, *bounds)
        assert not acc.any()
    with pytest.raises(launch.NoFormError, match="no tile sums"):
        clustered.linear_sensitivity_tiles(wide, w, x, dy, *bounds, 16)
    assert len(calls) == 2
    assert not clustered.serves(BF16, 64)


def test_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = pytest.importorskip("pkt_kernels.launch")
    for capability, reason in (((9, 0), "its CUDA part"), ((10, 0), "compute capability is 10.0"), ((8, 0), "not 9.0")):
        monkeypatch.setattr(launch, "capability", lambda device, capability=capability: capability)
        if torch.version.cuda is None:
            assert reason in (clustered.obstacle(torch.device("cuda")) or "")


FAULTS = [
    ("gpu.release(previous, lane);\n        previous", "gpu.release(stage, lane);\n        previous"),
    ("releases = cluster * 2", "releases = 2"),
    ("gpu.template wait_products<0>(d);", ""),
    ("row + gpu.rank() * (step / cluster)", "row"),
    ("t + k > 0", "true"),
    ("bound - rows.length + t", "bound - rows.length"),
    ("lane % 4 * 2;", "lane % 4;"),
]


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(("line", "fault"), FAULTS)
def test_a_fault_shows(line: str, fault: str, tmp_path: Path) -> None:
    """The emulation is no proof unless it finds what it is there for."""
    text = (CSRC / "clustered.h").read_text(encoding="utf-8")
    assert line in text
    (tmp_path / "clustered.h").write_text(text.replace(line, fault), encoding="utf-8")
    shutil.copy(NATIVE / "clustered_emulated.cpp", tmp_path)
    broken = compiled(tmp_path / "broken.so", tmp_path)
    assert error(broken, 300, 200, [200, 129, 64]) > 1e-3


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_what_the_compiler_makes_of_it(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    import triton

    source = tmp_path / "alone.cu"
    arguments = "(const __grid_constant__ CUtensorMap, const __grid_constant__ CUtensorMap, Batch, Scores, const"
    wanted = [(power, element) for power in (1, 2) for element in ("Bf16", "Fp16")]
    source.write_text(
        '#define PKT_KERNEL_ALONE\n#include "clustered_cuda.cu"\nnamespace pkt::clustered {\n'
        + "".join(f"template __global__ void kernel<{p}, {e}>{arguments} {e}*);\n" for p, e in wanted)
        + "}\n"
    )
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ("80", "90a", "100")]
    command = [str(NVCC), "-O3", "-std=c++20", f"-I{CSRC}", *targets, "-Xptxas=-v", "-c", str(source), "-o", "alone.o"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", run.stderr)
    assert len(frames) == len(wanted) * len(targets)
    assert set(frames) == {("0", "0", "0")}, run.stderr
    assert "C75" not in run.stderr, "ptxas serialized the products"
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    dump = [str(cuobjdump), "-sass", "-arch", "sm_90a", "alone.o"]
    code = subprocess.run(dump, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert len(re.findall(r"HGMMA\.64x192x16\.F32(\.BF16)?", code)) == 4 * len(wanted)
    assert code.count("UTMALDG.4D.MULTICAST") == 3 * len(wanted)
    assert len(re.findall(r"UTMALDG\.4D ", code)) == 2 * len(wanted)
    assert re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\d)", code) == ["0x1", "0x0"] * len(wanted)
    assert code.count("USETMAXREG") == 2 * len(wanted)
    assert len(re.findall(r"FADD R\d+, \|R\d+\|, R\d+|FADD R\d+, R\d+, \|R\d+\|", code)) == 96 * 2
