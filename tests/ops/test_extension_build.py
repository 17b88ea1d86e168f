"""setup.py builds what the machine can and says what it did; the CUDA code compiles for every target without a spill."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import pkt
from pkt import ops

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
NVCC = shutil.which("nvcc")
ARCHITECTURES = (80, 90, 100)

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")
needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="needs a C++ compiler")

# What csrc may use of torch: each is in the headers of 2.11 and of 2.13, so one source builds against every torch between.
STABLE_ABI = """
    torch/csrc/stable/accelerator.h torch/csrc/stable/library.h torch/csrc/stable/ops.h torch/csrc/stable/tensor.h
    torch/headeronly/core/ScalarType.h torch/headeronly/util/Exception.h torch/headeronly/util/shim_utils.h
    STABLE_TORCH_LIBRARY_IMPL STD_TORCH_CHECK TORCH_ABI_VERSION TORCH_BOX TORCH_ERROR_CODE_CHECK
    StableIValue torch::stable::detail::from torch::stable::detail::to torch_call_dispatcher TORCH_SUCCESS
    AOTITorchError AtenTensorHandle aoti_torch__reinterpret_tensor aten::mm.out aten::mm.dtype_out
    torch::headeronly::ScalarType torch::headeronly::ScalarType::Float torch::stable::Tensor
    torch::stable::accelerator::DeviceGuard
    torch::stable::empty torch::stable::new_empty torch::stable::zero_
    torch::stable::get_num_threads torch::stable::parallel_for aoti_torch_get_current_cuda_stream
    aoti_torch_get_storage_size aoti_torch_get_storage_offset
"""
TORCH_NAME = re.compile(
    r"\b\w*TORCH_\w+|\b(?:aoti_torch|torch)_\w+|\b(?:STD_|Stable|AOTI|Aten)\w+|torch(?:::\w+)+|(?<=#include <)torch/[\w/.]+"
)
ATEN_OP = re.compile(r'"(aten::\w+)", "(\w*)"')

NO_TORCH = "import sys; sys.modules['torch'] = None; "
RUN_SETUP = "import runpy, sys; sys.argv = ['setup.py', *sys.argv[1:]]; runpy.run_path('setup.py', run_name='__main__')"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources, so that building leaves nothing in the checkout."""
    copy = tmp_path / "pkt"
    copy.mkdir()
    for name in ("csrc", "kernels", "pkt", "tests/native"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    return copy


def setup(tree: Path, *arguments: str, before: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", before + RUN_SETUP, *arguments],
        cwd=tree,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def said(run: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in run.stderr.splitlines() if line.startswith("pkt:")]
    assert len(lines) == 1, run.stderr
    return lines[0]


def test_the_version_is_stated_once(tree: Path) -> None:
    run = setup(tree, "--version", before=NO_TORCH, PKT_BUILD_EXT="0")
    assert run.stdout.split()[-1:] == [pkt.__version__], run.stderr
    assert '"' + pkt.__version__ not in (tree / "pyproject.toml").read_text()


def test_without_torch_nothing_is_built_and_nothing_fails(tree: Path) -> None:
    run = setup(tree, "build_ext", "--inplace", before=NO_TORCH, PKT_BUILD_EXT="auto")
    assert run.returncode == 0, run.stderr
    assert "not built: torch is not importable (use --no-build-isolation)" in said(run)
    assert not list(tree.glob("pkt/*.so"))


def test_without_a_compiler_nothing_is_built_and_nothing_fails(tree: Path) -> None:
    run = setup(tree, "build_ext", "--inplace", CXX="no-such-compiler")
    assert run.returncode == 0, run.stderr
    assert "not built: there is no C++ compiler" in said(run)


def test_zero_builds_nothing(tree: Path) -> None:
    run = setup(tree, "build_ext", "--inplace", PKT_BUILD_EXT="0")
    assert run.returncode == 0, run.stderr
    assert "not built: PKT_BUILD_EXT=0" in said(run)


@pytest.mark.parametrize(("mode", "message"), [("1", "cannot be built: torch"), ("yes", "must be one of auto, 0, 1")])
def test_what_cannot_be_done_is_an_error_when_asked_for(tree: Path, mode: str, message: str) -> None:
    run = setup(tree, "build_ext", "--inplace", before=NO_TORCH, PKT_BUILD_EXT=mode)
    assert run.returncode != 0
    assert message in run.stderr


# No nvcc is of that release; `--version` runs setup.py and builds nothing.
NO_SUCH_CUDA = "import torch; torch.version.cuda = '99.9'; "


@needs_compiler
def test_a_cuda_part_that_cannot_be_built_is_told_and_an_error_when_asked_for(tree: Path) -> None:
    reason = "(nvcc is not of CUDA 99.9|there is no nvcc)"
    run = setup(tree, "--version", before=NO_SUCH_CUDA, PKT_BUILD_EXT="auto")
    assert run.returncode == 0, run.stderr
    assert re.search(f"built for the CPU; not for CUDA: {reason}", said(run))
    run = setup(tree, "--version", before=NO_SUCH_CUDA, PKT_BUILD_EXT="1")
    assert run.returncode != 0
    assert re.search(f"PKT_BUILD_EXT=1 with a torch for CUDA, but .* CUDA part cannot be built: {reason}", run.stderr)


@needs_compiler
def test_a_failed_compilation_is_told_and_survived_unless_forced(tree: Path) -> None:
    for source in (tree / "csrc").glob("*.cpp"):
        source.write_text("#error deliberately\n" if source.stem == "extension" else "")
    run = setup(tree, "build_ext", "--inplace")
    assert run.returncode == 0, run.stderr
    assert "pkt: pkt._C was not built, the torch implementation serves instead" in run.stderr
    assert setup(tree, "build_ext", "--inplace", PKT_BUILD_EXT="1").returncode != 0


def test_the_sdist_holds_every_source(tree: Path, tmp_path: Path) -> None:
    run = setup(tree, "sdist", "-d", str(tmp_path / "dist"), PKT_BUILD_EXT="0")
    assert run.returncode == 0, run.stderr
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    expected = {f"{folder}/{path.name}" for folder in ("csrc", "tests/native") for path in (ROOT / folder).iterdir()}
    assert expected | {"setup.py", "pyproject.toml", "MANIFEST.in"} <= names


def uses_of_torch(text: str) -> set[str]:
    code = re.sub(r"//.*", "", text)
    ops = {f"{name}.{overload}".rstrip(".") for name, overload in ATEN_OP.findall(code)}
    return (set(TORCH_NAME.findall(code)) | ops) - {"torch_threads"}  # our own


def test_the_sources_use_what_every_torch_from_2_11_on_has() -> None:
    used = {name for path in CSRC.iterdir() if path.suffix != ".md" for name in uses_of_torch(path.read_text())}
    allowed = set(STABLE_ABI.split())
    assert used == allowed
    later = "STABLE_TORCH_ERROR_CODE_CHECK(torch_exception_get_what()); torch::stable::Generator g; STD_CUDA_CHECK(e);"
    assert uses_of_torch(later).isdisjoint(allowed)
    assert len(uses_of_torch(later)) == 4


@needs_nvcc
def test_the_cuda_kernels_compile_for_every_target_without_a_spill(tmp_path: Path) -> None:
    source = tmp_path / "kernels.cu"
    source.write_text(
        '#include "rsvd_pipeline.h"\n'
        "namespace pkt {\n"
        "template <class T> cudaError_t all(Launches& l) { return subspace_iteration<T>(l, 1, [](int, bool) {}); }\n"
        "template cudaError_t all<float>(Launches&);\n"
        "template cudaError_t all<Bf16>(Launches&);\n"
        "template cudaError_t all<Fp16>(Launches&);\n"
        "}\n"
    )
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    run = subprocess.run(
        [str(NVCC), "-O3", "-std=c++20", f"-I{CSRC}", *targets, "-Xptxas=-v", "-c", str(source), "-o", "kernels.o"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", run.stderr)
    kernels = 6 * 3  # energy, sketch, mend, gram, apply and write for three types
    assert len(frames) == kernels * len(ARCHITECTURES)
    assert set(frames) == {("0", "0", "0")}, run.stderr


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("source", sorted(path.name for path in CSRC.glob("*.cu")))
def test_the_cuda_extension_compiles_against_torch_s_stable_abi(source: str, tmp_path: Path) -> None:
    include = Path(torch.__file__).parent / "include"
    flags = ["-O1", "-std=c++20", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-arch=sm_90a"]
    command = [str(NVCC), *flags, f"-I{include}", "-Xcompiler=-fPIC", "-c", str(CSRC / source)]
    run = subprocess.run([*command, "-o", str(tmp_path / "cuda.o")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    symbols = subprocess.run(["nm", "-u", str(tmp_path / "cuda.o")], capture_output=True, text=True).stdout
    assert " cu" not in re.sub(r" cuda\w+| __cuda\w+", "", symbols), "nothing of the driver may be linked with"
    assert not re.search(r"_ZN(3c10|2at)", symbols), "only the stable ABI's C functions may be needed"


@pytest.mark.slow
@needs_compiler
def test_a_wheel_built_from_the_sdist_passes_its_tests_from_an_empty_folder(tree: Path, tmp_path: Path) -> None:
    run = setup(tree, "sdist", "-d", str(tmp_path / "sdist"), PKT_BUILD_EXT="0")
    assert run.returncode == 0, run.stderr[-4000:]
    (archive,) = (tmp_path / "sdist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "sdist", filter="data")
    (unpacked,) = (path.parent for path in (tmp_path / "sdist").glob("*/setup.py"))
    run = setup(unpacked, "bdist_wheel", "-d", str(tmp_path / "dist"), PKT_BUILD_EXT="1")
    assert run.returncode == 0, run.stderr[-4000:]
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert re.search(r"-cp310-abi3-", wheel.name)
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    symbols = subprocess.run(["nm", "-u", str(installed / "pkt" / "_C.abi3.so")], capture_output=True, text=True).stdout
    assert not re.search(r"_ZN(3c10|2at)", symbols), "only the stable ABI's C functions may be needed"
    empty = tmp_path / "empty"
    empty.mkdir()
    for name in ("oracle", "zoo", "ops/test_ops", "ops/test_rsvd"):
        shutil.copy(ROOT / "tests" / f"{name}.py", empty)
    (empty / "test_installed.py").write_text(
        "import pkt\n"
        "from pkt import ops\n"
        "def test_the_wheel_is_what_is_tested():\n"
        f"    assert pkt.__file__.startswith({str(installed)!r})\n"
        "    assert ops.implementation('rsvd', 'cpu')[0] == 'C++'\n"
    )
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=empty,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:]


def test_what_the_extension_says_of_a_failed_allocation_is_recognised() -> None:
    source = (CSRC / "from_torch.h").read_text(encoding="utf-8")
    (message,) = re.findall(r'runtime_error\("(pkt: out of memory.*?)"', source)
    assert ops.out_of_memory(RuntimeError(message))
