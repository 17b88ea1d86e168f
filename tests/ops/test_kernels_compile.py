"""Every kernel compiles for every chip family with no GPU: on the tensor cores, without spills, within shared memory.

The launchers themselves are called, on CPU tensors, with a driver that has a target but no device: what is compiled is
what would be launched, specializations and block sizes included.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets in this process", allow_module_level=True)

from pkt_kernels import (  # noqa: E402
    abs_accumulate,
    embedding_sensitivity,
    launch,
    linear_sensitivity,
    linear_sensitivity_hopper,
    window_search,
)
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import JITFunction, driver  # noqa: E402

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[list[Any]]:
    """What the launchers called in the test compiled, for the test's `capability`."""
    capability = request.getfixturevalue("capability")
    kernels: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))
        return kernels[-1]

    active = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        # One "device" a capability keeps Triton's caches apart.
        get_current_device=lambda: capability,
        get_current_stream=lambda device: 0,
    )
    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(launch, "capability", lambda device: divmod(capability, 10))
    monkeypatch.setattr(launch, "multiprocessors", lambda device: MULTIPROCESSORS[capability])
    monkeypatch.setattr(driver, "_active", active)
    yield kernels
    assert kernels


def cuobjdump(option: str, kernel: Any, tmp_path: Path) -> str:
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    return subprocess.run([CUOBJDUMP, option, cubin], capture_output=True, text=True, check=True).stdout


def disassembly(kernel: Any, tmp_path: Path) -> str:
    return cuobjdump("-sass", kernel, tmp_path)


def resources(kernel: Any, tmp_path: Path) -> dict[str, int]:
    """Registers, stack and local memory as the assembler counted them."""
    report = cuobjdump("-res-usage", kernel, tmp_path)
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}


def check_resources(kernels: list[Any], capability: int, tmp_path: Path) -> None:
    for kernel in kernels:
        used = resources(kernel, tmp_path)
        print(f"sm_{capability} {kernel.metadata.name}: {used} shared {kernel.metadata.shared}")
        assert used["STACK"] == 0, kernel.metadata.name
        assert used["LOCAL"] == 0, kernel.metadata.name
        assert kernel.metadata.shared <= SHARED_MEMORY[capability], kernel.metadata.name


def linear_inputs(n: int, m: int, dtype: torch.dtype, pad: int = 0) -> list[torch.Tensor]:
    """w, x, dy, seq_starts, seq_lens; uninitialised, for nothing is run."""
    rows = 64
    return [
        torch.empty(n, m, dtype=dtype),
        torch.empty(rows, m + pad, dtype=dtype)[:, :m],
        torch.empty(rows, n + pad, dtype=dtype)[:, :n],
        torch.empty(2, dtype=torch.int64),
        torch.empty(2, dtype=torch.int64),
    ]


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# (power, weighted). Σ(θg)² changes both the loop and the end of every kernel; the rest are left to the slow tests.
MEASURES = [
    pytest.param((1, True), id="theta_grad"),
    pytest.param((2, True), id="theta_grad_squared"),
    pytest.param((1, False), id="grad", marks=pytest.mark.slow),
    pytest.param((2, False), id="fisher", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("dtype", "small", "tile", "pad"),
    [
        pytest.param(BF16, False, 0, 0, id="bf16"),
        pytest.param(BF16, True, 0, 0, id="bf16-small"),
        pytest.param(BF16, False, 64, 0, id="bf16-tiles"),
        pytest.param(BF16, False, 0, 1, id="bf16-unaligned"),
        pytest.param(FP32, False, 0, 0, id="fp32"),
        pytest.param(FP16, False, 0, 0, id="fp16", marks=pytest.mark.slow),
        pytest.param(FP32, True, 0, 0, id="fp32-small", marks=pytest.mark.slow),
        pytest.param(FP32, False, 32, 0, id="fp32-tiles", marks=pytest.mark.slow),
        pytest.param(BF16, False, 1, 0, id="bf16-tiles-of-1", marks=pytest.mark.slow),
        pytest.param(BF16, False, 128, 0, id="bf16-tiles-of-128", marks=pytest.mark.slow),
        pytest.param(FP32, False, 0, 1, id="fp32-unaligned", marks=pytest.mark.slow),
    ],
)
def test_linear_sensitivity(
    compiled: list[Any], capability: int, dtype: torch.dtype, small: bool, tile: int, pad: int, tmp_path: Path
) -> None:
    check_linear(compiled, capability, dtype, small, tile, pad, (1, True), tmp_path)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("measure", MEASURES[1:])
@pytest.mark.parametrize(
    ("dtype", "small", "tile"),
    [
        pytest.param(BF16, False, 0, id="bf16"),
        pytest.param(BF16, True, 0, id="bf16-small", marks=pytest.mark.slow),
        pytest.param(BF16, False, 64, id="bf16-tiles", marks=pytest.mark.slow),
        pytest.param(FP16, False, 0, id="fp16", marks=pytest.mark.slow),
        pytest.param(FP32, False, 0, id="fp32", marks=pytest.mark.slow),
        pytest.param(FP32, True, 0, id="fp32-small", marks=pytest.mark.slow),
    ],
)
def test_linear_sensitivity_of_other_measures(
    compiled: list[Any],
    capability: int,
    measure: tuple[int, bool],
    dtype: torch.dtype,
    small: bool,
    tile: int,
    tmp_path: Path,
) -> None:
    check_linear(compiled, capability, dtype, small, tile, 0, measure, tmp_path)


def check_linear(
    compiled: list[Any],
    capability: int,
    dtype: torch.dtype,
    small: bool,
    tile: int,
    pad: int,
    measure: tuple[int, bool],
    tmp_path: Path,
) -> None:
    size = 256 if small else 4096
    inputs = linear_inputs(size, size, dtype, pad)
    if tile:
        tiles = torch.empty(-(-size // tile), -(-size // tile))
        linear_sensitivity.linear_sensitivity_tiles(tiles, *inputs, tile, *measure)
    else:
        linear_sensitivity.linear_sensitivity(torch.empty(size, size), *inputs, *measure)
    check_resources(compiled, capability, tmp_path)
    (kernel,) = compiled
    ptx = kernel.asm["ptx"]
    assert TENSOR_CORES[capability] in ptx
    blocks = linear_sensitivity.choose_blocks(
        size, size, dtype, divmod(capability, 10), MULTIPROCESSORS[capability], tile
    )
    if pad == 0:
        # The loads run ahead of the product: the copies before the loop, and those in it.
        in_flight = "cp.async.commit_group" if capability == 80 else "cp.async.bulk.tensor"
        per_step = 1 if capability == 80 else 2
        assert ptx.count(in_flight) >= per_step * blocks.num_stages
    if capability == 90 and dtype != FP32:
        # A step's product is waited for one step later, except where a sample ends and at the very end; the assembler
        # has not fallen back to waiting after every instruction.
        assert re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", ptx) == ["1", "0", "0"]
        assert len(re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0", disassembly(kernel, tmp_path))) == 2


@pytest.mark.parametrize("capability", [90])
@pytest.mark.parametrize(
    ("dtype", "tile", "measure"),
    [
        pytest.param(BF16, 0, (1, True), id="bf16"),
        *(
            pytest.param(dtype, tile, measure, id=f"{dtype}-{tile}-{measure}", marks=pytest.mark.slow)
            for dtype, tile, measure in [
                (FP16, 0, (1, True)),
                *((BF16, tile, (1, True)) for tile in (16, 32, 64)),
                *((BF16, tile, measure) for tile in (0, 64) for measure in [(2, True), (1, False), (2, False)]),
            ]
        ),
    ],
)
def test_linear_sensitivity_on_hopper(
    compiled: list[Any], capability: int, dtype: torch.dtype, tile: int, measure: tuple[int, bool], tmp_path: Path
) -> None:
    size = 4096
    out = torch.empty(size // (tile or 1), size // (tile or 1))
    linear_sensitivity_hopper.linear_sensitivity_tiles(out, *linear_inputs(size, size, dtype), tile, *measure)
    check_resources(compiled, capability, tmp_path)
    (kernel,) = compiled
    assert steps_follow_the_sample(kernel.asm["ttgir"]) == [True] * 3
    # One block a multiprocessor: two warpgroups of 232 registers and, with the one warp's, four of 24.
    assert set(re.findall(r"setmaxnreg.inc.sync.aligned.u32\s+(\d+)", kernel.asm["ptx"])) >= {"232"}
    assert "setmaxnreg.dec.sync.aligned.u32 \t24;" in kernel.asm["ptx"]
    code = disassembly(kernel, tmp_path)
    # A step of 64 rows is four products in each warpgroup and four copies (x is two of them) in the producer.
    assert code.count("HGMMA.64x128x16") == 8
    assert code.count("UTMALDG.4D") == 4
    assert not re.search(r"\b(LDL|STL)\b", code)
    # In each warpgroup the product before this one is waited for, and all where a sample ends; a serialized one waits more.
    assert re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\d)", code) == ["0x1", "0x0"] * 2
    # |g| is a modifier of the addition: nothing else is done to an element where a sample ends.
    if measure[0] == 1:
        assert len(re.findall(r"FADD R\d+, \|R\d+\|, R\d+", code)) == 2 * 64


def steps_follow_the_sample(code: str) -> list[bool]:
    """For each loop over a sample's rows, whether its bound is found within the loop over samples around it: Triton 3.6 took
    the first sample's length for all where it was carried from turn to turn."""
    lines = code.splitlines()
    found = []
    for number, line in enumerate(lines):
        if match := re.search(r"scf\.for %t(?:_\d+)? = %\S+ to (%\S+) step", line):
            (bound,) = (
                re.findall(r"maxsi (%\w+), %", each)[0] for each in lines if f"{match[1]} = arith.maxsi" in each
            )
            around = max(i for i in range(number) if re.search(r"scf\.for .* to %(num_samples|arg\d+) step", lines[i]))
            found.append(any(f"{bound} = " in each for each in lines[around:number]))
    return found


def accumulate_flat(*measure: Any) -> None:
    tensors = torch.empty(4096), torch.empty(4096, dtype=BF16), torch.empty(4096, dtype=BF16)
    abs_accumulate.abs_accumulate(*tensors, *measure)


def accumulate_strided(*measure: Any) -> None:
    tensors = torch.empty(64, 64), torch.empty(64, 64, dtype=BF16).T, torch.empty(64, 64)
    abs_accumulate.abs_accumulate(*tensors, *measure)


def accumulate_many(*measure: Any) -> None:
    tensors = [torch.empty(64)], [torch.empty(64, dtype=BF16)], [torch.empty(64)]
    abs_accumulate.abs_accumulate_many(*tensors, *measure)


def embedding(*measure: Any) -> None:
    bounds = torch.zeros(2, dtype=torch.int64)
    ids, dy = torch.zeros(64, dtype=torch.int64), torch.empty(64, 1024, dtype=BF16)
    embedding_sensitivity.embedding_sensitivity(
        torch.empty(100, 1024), torch.empty(100, 1024, dtype=BF16), ids, dy, bounds, bounds, *measure
    )


def window() -> None:
    window_search.best_window(torch.zeros(256, 512), 100, 200, 1, 1)


def axes() -> None:
    window_search.axis_sums(torch.zeros(256, 512))


def best_blocks() -> None:
    window_search.best_blocks(torch.zeros(256, 512), 3, 4, 16, 32)


def blocks() -> None:
    window_search.block_sums(torch.zeros(256, 512), 64)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    "launch_kernels",
    [accumulate_flat, accumulate_strided, accumulate_many, embedding],
    ids=lambda function: function.__name__,
)
@pytest.mark.parametrize("measure", MEASURES)
def test_accumulating(
    compiled: list[Any],
    capability: int,
    launch_kernels: Callable[..., None],
    measure: tuple[int, bool],
    tmp_path: Path,
) -> None:
    launch_kernels(*measure)
    check_resources(compiled, capability, tmp_path)
    if launch_kernels is accumulate_flat:
        assert "ld.global.v4" in compiled[0].asm["ptx"]


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("launch_kernels", [window, axes, best_blocks, blocks], ids=lambda function: function.__name__)
def test_windows(compiled: list[Any], capability: int, launch_kernels: Callable[[], None], tmp_path: Path) -> None:
    launch_kernels()
    check_resources(compiled, capability, tmp_path)


@pytest.mark.parametrize("capability", [90])
def test_sizes_of_one(compiled: list[Any], capability: int, tmp_path: Path) -> None:
    """Triton makes a constant of every argument that is 1, which only compiling shows."""
    one, row = torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64)
    linear_sensitivity.linear_sensitivity(one, one, one, one, row, row)
    linear_sensitivity.linear_sensitivity_tiles(one, one, one, one, row, row, 1)
    abs_accumulate.abs_accumulate(one, one, one)
    abs_accumulate.abs_accumulate(torch.zeros(2, 1, 2)[:, :, :1], torch.zeros(2, 1, 1), torch.zeros(2, 1, 1))
    abs_accumulate.abs_accumulate_many([one], [one], [one])
    embedding_sensitivity.embedding_sensitivity(one, one, row, one, row, row)
    window_search.best_window(one, 1, 1, 1, 1)
    window_search.best_window(torch.zeros(2, 1), 1, 1, 1, 1)
    window_search.axis_sums(one)
    window_search.block_sums(one, 1)
    check_resources(compiled, capability, tmp_path)
