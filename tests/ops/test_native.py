"""The C++ of pkt._C without torch: each instruction set, several threads, sanitizers; and the CUDA kernels, executed.

`native/rsvd_emulated.cpp` runs `rsvd_pipeline.h` and its kernels on the CPU (fibers for threads, NaN in fresh memory), so what a
GPU computes is checked here too; how fast it is, is not.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_rsvd import SPECTRA, check, gaussian, one_thread, with_spectrum
from torch import Tensor

from pkt import ops

CSRC = Path(__file__).parents[2] / "csrc"
NATIVE = Path(__file__).parents[1] / "native"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LEVELS = pytest.mark.parametrize("level", [0, 1, 2], ids=["baseline", "AVX2", "AVX-512"])
MEASURES = pytest.mark.parametrize("measure", ops.MEASURES)
TWO_HALVES = 2.0**-17  # what a factor that travels as two bf16 numbers is rounded by
COMPILER = shutil.which(os.environ.get("CXX", "c++"))

pytestmark = [
    pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs a C++ compiler on Linux"),
    pytest.mark.usefixtures(one_thread.__name__),
]


class _Matrix(ctypes.Structure):
    _fields_ = [
        ("a", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("n", "m", "row_stride", "col_stride")),
    ]


class _Stored(ctypes.Structure):
    _fields_ = [("matrix", _Matrix), *((name, ctypes.c_int64) for name in ("before", "after"))]


class _Options(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("rank", "oversample", "iters", "seed")]


class _Factors(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("u", "s", "v", "stats")]


class _Strided(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "row_stride", "col_stride")),
    ]


class _Measure(ctypes.Structure):
    _fields_ = [("power", ctypes.c_int64), ("weighted", ctypes.c_bool)]


class _Scored(ctypes.Structure):
    _fields_ = [
        ("acc", ctypes.c_void_p),
        ("acc_is_fp64", ctypes.c_bool),
        *((name, ctypes.c_int64) for name in ("acc_row", "acc_col")),
        *((name, _Strided) for name in ("w", "x", "dy")),
        *((name, ctypes.c_void_p) for name in ("starts", "lens")),
        *((name, ctypes.c_int64) for name in ("samples", "tile")),
        ("measure", _Measure),
    ]


class _Accumulation(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("acc", "theta", "grad")),
        *((name, ctypes.c_int) for name in ("acc_dtype", "theta_dtype", "grad_dtype")),
        ("dims", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("size", "acc_stride", "theta_stride", "grad_stride")),
    ]


class _Embedded(ctypes.Structure):
    _fields_ = [
        ("acc", ctypes.c_void_p),
        ("acc_is_fp64", ctypes.c_bool),
        *((name, ctypes.c_int64) for name in ("acc_row", "acc_col")),
        *((name, _Strided) for name in ("w", "dy")),
        *((name, ctypes.c_void_p) for name in ("ids", "starts", "lens")),
        ("samples", ctypes.c_int64),
        ("measure", _Measure),
    ]


Results = list[tuple[Tensor, Tensor, Tensor, Tensor]]


def compile_library(to: Path, *flags: str) -> Path:
    common = [
        "-std=c++20",
        "-DPKT_LEAST_SHARE=32768",  # so that small tensors have several threads
        "-ffp-contract=fast",
        "-fopenmp-simd",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
    ]
    without_torch = [path for path in CSRC.glob("*.cpp") if not re.search("<torch/|<Python.h>", path.read_text())]
    sources = map(str, [*without_torch, *NATIVE.glob("*.cpp")])
    common += ["-shared", "-fPIC", "-pthread", f"-I{CSRC}", f"-I{NATIVE}"]
    subprocess.run([str(COMPILER), *common, *flags, *sources, "-o", str(to)], check=True)
    return to


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(compile_library(tmp_path_factory.mktemp("csrc") / "rsvd.so", "-O1")))
    loaded.pkt_cpu.restype = loaded.pkt_emulated_cuda.restype = ctypes.c_char_p
    return loaded


def marshal(
    matrices: Sequence[Tensor], rank: int, tall: bool = False
) -> tuple[ctypes.Array[_Stored], ctypes.Array[_Factors], Results]:
    inputs, outputs = (_Stored * len(matrices))(), (_Factors * len(matrices))()
    results = []
    for i, a in enumerate(matrices):
        (n, m), (row_stride, col_stride) = a.shape, a.stride()
        result = U, S, V, stats = tuple(torch.full(s, math.nan) for s in ((n, rank), (rank,), (m, rank), (4,)))
        results.append(result)
        pointers = [x.data_ptr() for x in (U, S, V, stats)]
        if tall and n < m:
            n, m, row_stride, col_stride = m, n, col_stride, row_stride
            pointers = [pointers[j] for j in (2, 1, 0, 3)]
        before, end = a.storage_offset(), a.storage_offset() + (n - 1) * row_stride + (m - 1) * col_stride + 1
        matrix = _Matrix(a.data_ptr(), DTYPES.index(a.dtype), n, m, row_stride, col_stride)
        inputs[i] = _Stored(matrix, before, a.untyped_storage().nbytes() // a.itemsize - end)
        outputs[i] = _Factors(*pointers)
    return inputs, outputs, results


def on_cpu(library: ctypes.CDLL, a: Tensor, rank: int, threads: int = 1, level: int = 2, iters: int = 4) -> Results:
    inputs, outputs, results = marshal([a], rank, tall=True)
    options = _Options(rank, 16, iters, 0)
    library.pkt_cpu(ctypes.byref(inputs[0].matrix), outputs, ctypes.byref(options), ctypes.c_int64(threads), level)
    return results


def on_emulated_cuda(
    library: ctypes.CDLL,
    matrices: Sequence[Tensor],
    rank: int,
    *,
    oversample: int = 0,
    iters: int = 4,
    shared_limit: int = 160 * 1024,
    backwards: bool = False,
) -> Results:
    inputs, outputs, results = marshal(matrices, rank)
    options, limit = _Options(rank, oversample, iters, 0), ctypes.c_int64(shared_limit)
    refusal = library.pkt_emulated_cuda(inputs, outputs, len(matrices), ctypes.byref(options), limit, backwards)
    if refusal is not None:
        raise RuntimeError(refusal.decode())
    return results


# --- the CPU --------------------------------------------------------------------------------------------------------


@LEVELS
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(library: ctypes.CDLL, dtype: torch.dtype, level: int) -> None:
    for shape in ((401, 243), (243, 401), (97, 61)):
        a = gaussian(*shape).to(dtype)
        for view in (a, a.T, a[::2, 1::3]):
            check(view, on_cpu(library, view, 9, level=level)[0], 9)


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_share_the_rows(library: ctypes.CDLL, threads: int) -> None:
    a = with_spectrum(1301, 300, SPECTRA["1/i"]).to(torch.bfloat16)
    first, second = (on_cpu(library, a, 16, threads)[0] for _ in range(2))
    check(a, first, 16)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def strided(a: Tensor) -> _Strided:
    return _Strided(a.data_ptr(), [*DTYPES, torch.float64].index(a.dtype), *a.shape, *a.stride())


@LEVELS
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("threads", [1, 3])
@MEASURES
def test_sensitivity_on_every_instruction_set(
    library: ctypes.CDLL, dtype: torch.dtype, level: int, threads: int, measure: str
) -> None:
    power, weighted = ops.MEASURES[measure]
    worst = 3e-7 * power  # squaring doubles a relative error
    for n, m, lens in [(1, 1, [3]), (13, 47, [5, 0, 70]), (210, 33, [64, 1, 3])]:
        rows = sum(lens) + 2
        x, dy = (torch.randn(rows, k).to(dtype) for k in (m, n))
        x[:2], dy[:2] = torch.nan, torch.nan
        w, acc = torch.randn(n, m).to(dtype), torch.ones(m, n).t()
        starts, lengths = torch.tensor([0, *lens[:-1]]).cumsum(0) + 2, torch.tensor(lens)
        products = [dy[s : s + k].double().t() @ x[s : s + k].double() for s, k in zip(starts, lens, strict=True)]
        truth = 1 + sum((w.double() * p if weighted else p).abs() ** power for p in products)
        w = w if weighted else torch.full_like(w, math.nan)
        scored = _Scored(
            *(acc.data_ptr(), False, *acc.stride()),
            *(strided(w), strided(x), strided(dy)),
            *(starts.data_ptr(), lengths.data_ptr(), len(lens), 0, _Measure(power, weighted)),
        )
        library.pkt_abs_products(ctypes.byref(scored), ctypes.c_int64(threads), level)
        assert float((acc.double() - truth).norm() / truth.norm()) < worst
        for tile in (1, 5, 64, 1000):
            tiles = torch.ones(-(-n // tile), -(-m // tile))
            scored.acc, scored.acc_row, scored.acc_col, scored.tile = tiles.data_ptr(), *tiles.stride(), tile
            library.pkt_abs_products(ctypes.byref(scored), ctypes.c_int64(threads), level)
            sums = 1 + ops.tile_sums(truth - 1, tile).double()
            assert float((tiles.double() - sums).norm() / sums.norm()) < worst


# Accumulators, weights and gradients of one shape: contiguous, transposed, stepped, broadcast, of no dimension, empty.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.t().contiguous().t(),
    "stepped": lambda t: t.repeat_interleave(3, 1)[:, ::3],
    "a window": lambda t: torch.nn.functional.pad(t, (2, 5, 1, 0))[1:, 2:-5],
}


def accumulations(triples: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[ctypes.Array[_Accumulation], list[Any]]:
    """What `pkt_abs_accumulate` takes, and what must outlive the call."""
    kept, all_ = [], (_Accumulation * len(triples))()
    for i, triple in enumerate(triples):
        shapes = [(ctypes.c_int64 * triple[0].ndim)(*x) for x in (triple[0].shape, *(t.stride() for t in triple))]
        kept.append(shapes)
        all_[i] = _Accumulation(
            *(t.data_ptr() for t in triple),
            *([*DTYPES, torch.float64].index(t.dtype) for t in triple),
            triple[0].ndim,
            *map(ctypes.addressof, shapes),
        )
    return all_, kept


@LEVELS
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [1, 3])
@MEASURES
def test_abs_accumulate_on_every_instruction_set(
    library: ctypes.CDLL, dtype: torch.dtype, grad_dtype: torch.dtype, threads: int, level: int, measure: str
) -> None:
    power, weighted = ops.MEASURES[measure]
    triples = []
    for rows, columns in ((1, 1), (0, 4), (7, 93), (301, 257)):
        values = (
            torch.rand(rows, columns),
            torch.randn(rows, columns).to(dtype),
            torch.randn(rows, columns).to(grad_dtype),
        )
        triples += [tuple(view(t.clone()) for t in values) for view in VIEWS.values()]
        triples.append((values[0].clone(), VIEWS["transposed"](values[1]), values[2]))
    triples.append((torch.zeros(()), torch.randn(()).to(dtype), torch.randn(()).to(grad_dtype)))
    triples.append(
        (torch.rand(9, dtype=torch.float64), torch.randn(1).to(dtype).expand(9), torch.randn(9).to(grad_dtype))
    )
    truths = [a + (t.double() * g.double() if weighted else g.double()).abs() ** power for a, t, g in triples]
    all_, kept = accumulations(triples)
    count, workers = ctypes.c_int64(len(triples)), ctypes.c_int64(threads)
    library.pkt_abs_accumulate(ctypes.byref(_Measure(power, weighted)), all_, count, workers, level)
    assert len(kept) == len(triples)
    for (acc, _, _), truth in zip(triples, truths, strict=True):
        torch.testing.assert_close(acc.double(), truth, rtol=2e-7 * power, atol=1e-7)


@LEVELS
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("threads", [1, 3])
@MEASURES
def test_embedding_sensitivity_on_every_instruction_set(
    library: ctypes.CDLL, dtype: torch.dtype, threads: int, level: int, measure: str
) -> None:
    power, weighted = ops.MEASURES[measure]
    for vocabulary, d, lens in [(1, 1, [3]), (11, 33, [5, 0, 170]), (400, 20, [64, 1, 300]), (5, 3, [])]:
        rows = sum(lens) + 2
        ids = torch.randint(0, vocabulary, (rows,))
        ids[:2] = -1
        dy, w, acc = torch.randn(d, rows).to(dtype).t(), torch.randn(vocabulary, d).to(dtype), torch.ones(vocabulary, d)
        starts, lengths = (
            torch.tensor([0, *lens[:-1]])[: len(lens)].cumsum(0) + 2,
            torch.tensor(lens, dtype=torch.int64),
        )
        truth = torch.zeros(vocabulary, d, dtype=torch.float64)
        for s, k in zip(starts.tolist(), lens, strict=True):
            gradient = torch.zeros_like(truth).index_add_(0, ids[s : s + k], dy[s : s + k].double())
            truth += (w.double() * gradient if weighted else gradient).abs() ** power
        truth += 1
        embedded = _Embedded(
            *(acc.data_ptr(), False, *acc.stride()),
            *(strided(w), strided(dy)),
            *(ids.data_ptr(), starts.data_ptr(), lengths.data_ptr(), len(lens), _Measure(power, weighted)),
        )
        library.pkt_abs_embedding(ctypes.byref(embedded), ctypes.c_int64(threads), level)
        assert float((acc.double() - truth).norm() / truth.norm()) < 3e-7 * power  # squaring doubles a relative error


# Runs without torch, which the sanitizers' runtime would slow down or trip over.
SANITIZED = """
import ctypes, random, struct, sys
class M(ctypes.Structure):
    _fields_ = [("a", ctypes.c_void_p), ("dtype", ctypes.c_int)] + [(k, ctypes.c_int64) for k in "nmrc"]
class O(ctypes.Structure):
    _fields_ = [(k, ctypes.c_int64) for k in ("rank", "oversample", "iters", "seed")]
class F(ctypes.Structure):
    _fields_ = [(k, ctypes.c_void_p) for k in "usvt"]
class V(ctypes.Structure):
    _fields_ = [("a", ctypes.c_void_p), ("dtype", ctypes.c_int)] + [(k, ctypes.c_int64) for k in "nmrc"]
class S(ctypes.Structure):
    _fields_ = [("acc", ctypes.c_void_p), ("wide", ctypes.c_bool), ("row", ctypes.c_int64), ("col", ctypes.c_int64)] + [
        (k, V) for k in ("w", "x", "dy")] + [("starts", ctypes.c_void_p), ("lens", ctypes.c_void_p), ("samples", ctypes.c_int64),
        ("tile", ctypes.c_int64), ("power", ctypes.c_int64), ("weighted", ctypes.c_bool)]
class A(ctypes.Structure):
    _fields_ = [(k, ctypes.c_void_p) for k in "atg"] + [(k, ctypes.c_int) for k in "xyz"] + [("dims", ctypes.c_int64)] + [
        (k, ctypes.c_void_p) for k in ("size", "p", "q", "r")]
class E(ctypes.Structure):
    _fields_ = [("acc", ctypes.c_void_p), ("wide", ctypes.c_bool), ("row", ctypes.c_int64), ("col", ctypes.c_int64), ("w", V),
        ("dy", V)] + [(k, ctypes.c_void_p) for k in ("ids", "starts", "lens")] + [("samples", ctypes.c_int64),
        ("power", ctypes.c_int64), ("weighted", ctypes.c_bool)]
class P(ctypes.Structure):
    _fields_ = [("power", ctypes.c_int64), ("weighted", ctypes.c_bool)]
library = ctypes.CDLL(sys.argv[1])
random.seed(0)
for n, m, lens, threads, level in [
    (1, 1, [1], 1, 2), (13, 47, [5, 0, 70], 2, 2), (130, 33, [9], 2, 1), (25, 65, [3, 4], 3, 0), (7, 3, [], 1, 2), (0, 5, [2], 1, 2)
]:
    rows = sum(lens)
    for kind, wide in ((ctypes.c_float, False), (ctypes.c_double, True)):
        make = lambda a, b: (kind * (a * b))(*(random.gauss(0, 1) for _ in range(a * b)))
        view = lambda data, a, b: V(ctypes.addressof(data), 3 if wide else 2, a, b, b, 1)
        w, x, dy, acc = make(n, m), make(rows, m), make(rows, n), (kind * (n * m))()
        starts = (ctypes.c_int64 * len(lens))(*(sum(lens[:j]) for j in range(len(lens))))
        sizes = (ctypes.c_int64 * len(lens))(*lens)
        scored = S(ctypes.addressof(acc), wide, m, 1, view(w, n, m), view(x, rows, m), view(dy, rows, n),
                   ctypes.addressof(starts), ctypes.addressof(sizes), len(lens), 0, 1, True)
        library.pkt_abs_products(ctypes.byref(scored), ctypes.c_int64(threads), level)
        for i, j in {(0, 0), (n // 2, m // 2), (n - 1, m - 1)} if n else ():
            truth = abs(w[i * m + j]) * sum(
                abs(sum(dy[k * n + i] * x[k * m + j] for k in range(s, s + t))) for s, t in zip(starts, lens))
            assert abs(acc[i * m + j] - truth) <= 1e-4 * (1 + truth), (n, m, i, j)
        for tile in (1, 5, 64) if n else ():
            across = -(-m // tile)
            tiles = (kind * (-(-n // tile) * across))()
            scored.acc, scored.row, scored.tile = ctypes.addressof(tiles), across, tile
            library.pkt_abs_products(ctypes.byref(scored), ctypes.c_int64(threads), level)
            assert abs(sum(tiles) - sum(acc)) <= 1e-4 * (1 + sum(acc)), (n, m, tile)
        ids = (ctypes.c_int64 * rows)(*(random.randrange(n) for _ in range(rows))) if n else (ctypes.c_int64 * 0)()
        table = (kind * (n * m))()
        embedded = E(ctypes.addressof(table), wide, m, 1, view(w, n, m), view(x, rows, m), ctypes.addressof(ids),
                     ctypes.addressof(starts), ctypes.addressof(sizes), len(lens) if n else 0, 1, True)
        library.pkt_abs_embedding(ctypes.byref(embedded), ctypes.c_int64(threads), level)
        for i, j in {(0, 0), (n // 2, m // 2), (n - 1, m - 1)} if n else ():
            truth = abs(w[i * m + j]) * sum(
                abs(sum(x[k * m + j] for k in range(s, s + t) if ids[k] == i)) for s, t in zip(starts, lens))
            assert abs(table[i * m + j] - truth) <= 1e-4 * (1 + truth), (n, m, i, j)
for n, m, power, threads, level in [(1, 1, 1, 1, 2), (7, 93, 2, 1, 1), (301, 257, 1, 3, 2), (301, 257, 2, 3, 0)]:
    theta, grad, acc = ((ctypes.c_float * (n * m))(*(random.gauss(0, 1) for _ in range(n * m))) for _ in range(3))
    before = list(acc)
    shape, by_rows, by_columns = ((ctypes.c_int64 * 2)(*x) for x in ((n, m), (m, 1), (1, n)))
    for strides in (by_rows, by_columns):
        one = A(*(ctypes.addressof(x) for x in (acc, theta, grad)), 2, 2, 2, 2, ctypes.addressof(shape),
                *(ctypes.addressof(x) for x in (by_rows, strides, by_rows)))
        library.pkt_abs_accumulate(
            ctypes.byref(P(power, True)), ctypes.byref(one), ctypes.c_int64(1), ctypes.c_int64(threads), level)
    for i in {0, n * m // 2, n * m - 1}:
        twice = abs(theta[i] * grad[i]) ** power + abs(theta[i // m + i % m * n] * grad[i]) ** power
        assert abs(acc[i] - before[i] - twice) <= 1e-5 * (1 + twice), (n, m, i)
for n, m, rank, oversample, iters, dtype, order, threads, level in [
    (1, 1, 1, 0, 0, 0, "rows", 1, 2), (7, 1, 1, 16, 4, 2, "rows", 1, 2), (300, 100, 5, 3, 2, 0, "rows", 1, 2),
    (300, 100, 5, 3, 2, 1, "columns", 1, 1), (601, 245, 16, 16, 4, 0, "columns", 2, 2), (601, 245, 4, 0, 1, 2, "rows", 2, 0),
    (300, 241, 33, 16, 1, 1, "rows", 1, 2), (230, 200, 90, 0, 1, 2, "rows", 1, 2), (97, 96, 96, 16, 0, 0, "rows", 1, 1),
    (300, 100, 5, 3, 2, 3, "rows", 1, 2),
]:
    zero, dtype = dtype == 3, dtype % 3
    count = n * m
    if dtype == 2:
        data = (ctypes.c_float * count)(*(random.gauss(0, 1) for _ in range(count)))
    else:
        pack = (lambda x: struct.unpack("<H", struct.pack("<e", x))[0]) if dtype else (
            lambda x: struct.unpack("<I", struct.pack("<f", x))[0] >> 16)
        data = (ctypes.c_uint16 * count)(*(0 if zero else pack(random.gauss(0, 1)) for _ in range(count)))
    strides = (m, 1) if order == "rows" else (1, n)
    out = [(ctypes.c_float * k)() for k in (n * rank, rank, m * rank, 4)]
    factors = F(*(ctypes.addressof(x) for x in out))
    matrix, options = M(ctypes.addressof(data), dtype, n, m, *strides), O(rank, oversample, iters, 7)
    library.pkt_cpu(ctypes.byref(matrix), ctypes.byref(factors), ctypes.byref(options), ctypes.c_int64(threads), level)
    assert out[3][3] == 1.0 and abs(sum(x * x for x in out[0]) - rank) < 1e-3, (n, m)
print("clean")
"""


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_the_cpu_part_is_clean_under_sanitizers(tmp_path: Path, sanitizer: str) -> None:
    flags = ["-O1", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    built = compile_library(tmp_path / "rsvd.so", *flags)
    runtime_name = "libtsan.so" if sanitizer == "thread" else "libasan.so"
    runtime = subprocess.run([str(COMPILER), f"-print-file-name={runtime_name}"], capture_output=True, text=True)
    environment = {**os.environ, "LD_PRELOAD": runtime.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    run = subprocess.run(
        [sys.executable, "-c", SANITIZED, str(built)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.strip() == "clean"


# --- the CUDA kernels, emulated -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_emulated_cuda_in_every_dtype(library: ctypes.CDLL, dtype: torch.dtype, transposed: bool) -> None:
    a = gaussian(150, 90).to(dtype)[3:133, 5:85]
    a = a.T if transposed else a
    check(a, on_emulated_cuda(library, [a], 8)[0], 8)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_emulated_cuda_on_every_spectrum(library: ctypes.CDLL, spectrum: str) -> None:
    a = with_spectrum(120, 90, SPECTRA[spectrum]).float()
    check(a, on_emulated_cuda(library, [a], 8)[0], 8)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 7), (9, 1), (3, 5), (16, 16), (17, 40)])
def test_emulated_cuda_on_tiny_shapes(library: ctypes.CDLL, n: int, m: int) -> None:
    a = gaussian(n, m).float()
    rank = min(n, m, 4)
    check(a, on_emulated_cuda(library, [a], rank)[0], rank)
    check(a, on_emulated_cuda(library, [a], rank, iters=0)[0], rank, worst=5.0)


@pytest.mark.parametrize("true_rank", [0, 1, 5])
def test_emulated_cuda_on_deficient_matrices(library: ctypes.CDLL, true_rank: int) -> None:
    a = (gaussian(60, true_rank) @ gaussian(true_rank, 50, seed=1)).float()
    result = on_emulated_cuda(library, [a], 8)[0]
    check(a, result, 8)
    assert (result[1][true_rank:] <= 1e-5 * max(result[1][0], 1e-30)).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_emulated_cuda_flags_what_is_not_finite(library: ctypes.CDLL, bad: float) -> None:
    a = gaussian(70, 50).to(torch.bfloat16)
    a[69, 49] = bad
    assert all((x == 0).all() for x in on_emulated_cuda(library, [a], 4)[0])


@pytest.mark.parametrize("scale", [1e-12, 1e12, 1e18])
def test_emulated_cuda_at_any_magnitude(library: ctypes.CDLL, scale: float) -> None:
    a = gaussian(70, 50).float()
    plain, scaled = (on_emulated_cuda(library, [x], 4)[0] for x in (a, a * scale))
    torch.testing.assert_close(scaled[1] / scale, plain[1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e16])
def test_emulated_cuda_s_energy_of_long_rows(library: ctypes.CDLL, scale: float) -> None:
    """Rows long enough for every loop, in and outside the range where squares are added in fp32."""
    a = (gaussian(3, 1360) * scale).to(torch.bfloat16)
    a[:, ::97] = 0
    found = on_emulated_cuda(library, [a], 1, iters=0)[0][3][0]
    torch.testing.assert_close(found.double(), a.double().square().sum(), rtol=1e-6, atol=0)


def test_emulated_cuda_widens_the_basis_with_the_rank(library: ctypes.CDLL) -> None:
    """A slow spectrum's rank 32 comes within 1% by 48 columns, not by the 32 that were asked for."""
    a = with_spectrum(110, 100, SPECTRA["slow"]).float()
    check(a, on_emulated_cuda(library, [a], 32, iters=6)[0], 32)


def test_emulated_cuda_batches_unequal_shapes(library: ctypes.CDLL) -> None:
    batch = [gaussian(n, m, seed=n).to(torch.bfloat16) for n, m in ((90, 40), (33, 70), (5, 3), (64, 64))]
    for a, result in zip(batch, on_emulated_cuda(library, batch, 3), strict=True):
        check(a, result, 3, floor=TWO_HALVES)
        alone = on_emulated_cuda(library, [a], 3)[0]
        torch.testing.assert_close(result[1], alone[1], rtol=1e-5, atol=0)


# Bytes of shared memory that hold a tile of 48 columns' rows, but not the small matrices of as many.
ROOM_FOR_A_TILE = 30_000


def test_emulated_cuda_where_only_the_narrow_matrices_of_a_batch_fit_in_shared_memory(library: ctypes.CDLL) -> None:
    batch = [gaussian(n, m, seed=n).float() for n, m in ((90, 60), (40, 6))]
    results = on_emulated_cuda(library, batch, 6, oversample=42, shared_limit=ROOM_FOR_A_TILE)
    for a, result in zip(batch, results, strict=True):
        check(a, result, 6)


@pytest.mark.parametrize(("rank", "oversample", "iters"), [(20, 25, 1), (4, 12, 4)], ids=["wide", "narrow"])
@pytest.mark.parametrize("shared_limit", [160 * 1024, ROOM_FOR_A_TILE], ids=["shared", "global"])
def test_emulated_cuda_has_no_race(
    library: ctypes.CDLL, shared_limit: int, rank: int, oversample: int, iters: int
) -> None:
    """Threads that take turns backwards give the same bytes, with the small matrices in shared and in global memory."""
    a = gaussian(100, 45).to(torch.bfloat16)
    a[:, 7] = a[:, 3]
    forwards, backwards = (
        on_emulated_cuda(
            library, [a], rank, oversample=oversample, iters=iters, shared_limit=shared_limit, backwards=flag
        )[0]
        for flag in (False, True)
    )
    check(a, forwards, rank)
    assert all(torch.equal(x, y) for x, y in zip(forwards, backwards, strict=True))


def window(content: Tensor, storage: Tensor, left: int, pitch: int) -> Tensor:
    """`content` as a view of `storage`, whose other entries are finite here and there only."""
    beside = torch.tensor([1.0, math.nan, -3.0, math.inf, 2.0, 2.0, 2.0, 2.0, 2.0, -math.inf])
    storage.copy_(beside[torch.arange(len(storage)) % len(beside)])
    return storage.as_strided(content.shape, (pitch, 1), left).copy_(content)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("left", "m", "pitch", "right", "widened"),
    [
        pytest.param(0, 24, 32, 8, True, id="aligned already"),
        pytest.param(1, 24, 32, 8, True, id="an odd offset"),
        pytest.param(37, 21, 32, 64, True, id="an odd offset and length"),
        pytest.param(37, 22, 40, 5, True, id="nothing behind the last row"),
        pytest.param(3, 21, 24, 9, True, id="up to the row's end"),
        pytest.param(7, 22, 24, 9, False, id="wider than the row"),
        pytest.param(3, 21, 27, 9, False, id="rows that do not lie alike"),
    ],
)
def test_emulated_cuda_of_a_window_is_that_of_its_copy(
    library: ctypes.CDLL,
    left: int,
    m: int,
    pitch: int,
    right: int,
    widened: bool,
    transposed: bool,
    dtype: torch.dtype,
) -> None:
    """Its products begin on 16 bytes where they can, and the bytes are the same, whatever lies beside it."""
    content = gaussian(43, m).to(dtype)
    a = window(content, torch.empty(left + 42 * pitch + m + right, dtype=dtype), left, pitch)
    pair = (content.T, a.T) if transposed else (content, a)
    (*copy, copy_stats), (*found, stats) = (on_emulated_cuda(library, [x], 4, iters=1)[0] for x in pair)
    assert (library.pkt_unaligned_products() == 0) is widened
    assert all(torch.equal(x, y) for x, y in zip(copy, found, strict=True))
    torch.testing.assert_close(stats, copy_stats, rtol=1e-5, atol=0)


def test_emulated_cuda_reads_nothing_outside_a_window_s_storage(library: ctypes.CDLL) -> None:
    """The storage between two pages that end the process when they are read."""
    page = mmap.PAGESIZE
    pages = mmap.mmap(-1, 3 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    libc = ctypes.CDLL(None)
    for edge in (address, address + 2 * page):
        assert libc.mprotect(ctypes.c_void_p(edge), ctypes.c_size_t(page), 0) == 0
    for left, m, right in [(0, 21, 0), (3, 21, 2), (3, 21, 0), (0, 24, 0)]:
        size = left + 42 * 32 + m + right
        for at in (page, 2 * page - 2 * size):
            a = window(
                gaussian(43, m).bfloat16(),
                torch.frombuffer(pages, dtype=torch.bfloat16, offset=at, count=size),
                left,
                32,
            )
            for view in (a, a.T):
                check(
                    view.clone(), on_emulated_cuda(library, [view], 4, iters=1)[0], 4, worst=math.inf, floor=TWO_HALVES
                )


def test_emulated_cuda_takes_a_batch_larger_than_one_launch(library: ctypes.CDLL) -> None:
    batch = [gaussian(9 + i, 20 - i, seed=i).float() for i in range(17)]
    for a, result in zip(batch, on_emulated_cuda(library, batch, 2, iters=1), strict=True):
        check(a, result, 2, worst=math.inf)


def test_emulated_cuda_with_any_oversample(library: ctypes.CDLL) -> None:
    a = gaussian(30, 20).float()
    check(a, on_emulated_cuda(library, [a], 4, oversample=2**31 - 1)[0], 4)


def test_emulated_cuda_refuses_what_shared_memory_does_not_hold(library: ctypes.CDLL) -> None:
    with pytest.raises(RuntimeError, match="rank 20 with oversample 30 takes 64 columns, more than this GPU's shared"):
        on_emulated_cuda(library, [gaussian(90, 80).float()], 20, oversample=30, shared_limit=ROOM_FOR_A_TILE)


def test_emulated_cuda_and_the_cpu_agree(library: ctypes.CDLL) -> None:
    a = with_spectrum(200, 150, lambda i: 2.0**-i if i <= 8 else 1e-3).to(torch.bfloat16)
    ours, theirs = on_emulated_cuda(library, [a], 8)[0], on_cpu(library, a, 8)[0]
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=0)
    cosines = ((ours[0] * theirs[0]).sum(0) * (ours[2] * theirs[2]).sum(0))[:6]
    assert (cosines >= 1 - 1e-4).all()
