"""Builds `pkt._C`, the compiled part of pkt, where the machine can; everything else is in pyproject.toml.

    pip install -e . --no-build-isolation      C++ always, CUDA too where torch has it and nvcc is there
    PKT_BUILD_EXT=1 pip install ...            the same, but what cannot be built is an error: of the CUDA part too, if
                                               torch is built for CUDA
    PKT_BUILD_EXT=0 pip install ...            no compiler is asked for: pkt uses its torch implementation

An isolated build has no torch, so it builds nothing: that is why a plain `pip install` is small and fast.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

MODES = ("auto", "0", "1")
TORCH_TARGET = "0x020b000000000000"  # the stable ABI of torch 2.11: one build serves every later torch
PYTHON_TAG = "cp310"
CXX_FLAGS = ["-O3", "-std=c++20", "-ffp-contract=fast", "-fopenmp-simd", "-fvisibility=hidden"]
NVCC_FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-DUSE_CUDA", "-Xcompiler", "-fvisibility=hidden"]


def obstacle() -> str | None:
    """Why the C++ part cannot be built here, or None."""
    if sys.platform == "win32":
        return "its kernels need GCC or Clang"
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        return "there is no C++ compiler"
    try:
        import torch
    except ImportError:
        return "torch is not importable (use --no-build-isolation)"
    if tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
        return f"torch {torch.__version__} is older than 2.11"
    return None


def cuda_home() -> Path | None:
    """A CUDA toolkit with a compiler and a runtime to link with; nvcc on the PATH may be a wrapper far from both."""
    named = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    beside = [str(Path(nvcc).resolve().parents[1])] if nvcc else []
    for home in map(Path, filter(None, [*named, *beside, "/usr/local/cuda"])):
        runtime = any((home / folder / "libcudart.so").exists() for folder in ("lib64", "lib"))
        if runtime and (home / "bin" / "nvcc").exists():
            return home
    return None


def torch_has_cuda() -> bool:
    """What makes a machine one for CUDA: neither a GPU nor a toolkit is of use to a torch without it."""
    import torch

    return torch.version.cuda is not None


def cuda_obstacle() -> str | None:
    """Why the CUDA part cannot be built here, or None; then CUDA_HOME is set."""
    import torch

    if not torch_has_cuda():
        return "this torch has no CUDA"
    home = cuda_home()
    if home is None:
        return "there is no nvcc with its runtime (set CUDA_HOME)"
    release = subprocess.run([str(home / "bin" / "nvcc"), "--version"], capture_output=True, text=True).stdout
    if f"release {torch.version.cuda.split('.')[0]}." not in release:
        return f"nvcc is not of CUDA {torch.version.cuda}, which torch was built with"
    os.environ["CUDA_HOME"] = str(home)
    return None


def extension(with_cuda: bool) -> Any:
    """The Extension; torch decides where its headers and libraries are."""
    import torch
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    sources = sorted(map(str, Path("csrc").glob("*.cpp")))
    if with_cuda:
        sources += sorted(map(str, Path("csrc").glob("*.cu")))
        # 9.0a: the clustered kernel's instructions, which 9.0 does not have; it runs on what 9.0 runs on, and no later.
        blackwell = tuple(map(int, (torch.version.cuda or "0").split(".")[:2])) >= (12, 8)
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0a;10.0+PTX" if blackwell else "8.0;9.0a;9.0+PTX")
    macros = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    return (CUDAExtension if with_cuda else CppExtension)(
        "pkt._C",
        sources,
        extra_compile_args={"cxx": [*CXX_FLAGS, *macros], "nvcc": [*NVCC_FLAGS, *macros]},
        depends=[*map(str, Path("csrc").glob("*.[hi]*")), *map(str, Path("csrc").glob("*.cuh"))],
        py_limited_api=True,
    )


def build_command(forced: bool) -> type:
    from torch.utils.cpp_extension import BuildExtension

    class BuildOrSayWhy(BuildExtension):  # type: ignore[misc]
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                if forced:
                    raise
                reason = str(error).splitlines()[0][:200]
                print(f"pkt: pkt._C was not built, the torch implementation serves instead: {reason}", file=sys.stderr)
                self.extensions = []  # nothing to copy into the package

    return BuildOrSayWhy


def arguments() -> dict[str, Any]:
    mode = os.environ.get("PKT_BUILD_EXT", "auto")
    if mode not in MODES:
        raise SystemExit(f"PKT_BUILD_EXT is {mode!r}; it must be one of {', '.join(MODES)}")
    reason = "PKT_BUILD_EXT=0" if mode == "0" else obstacle()
    if reason is not None:
        if mode == "1":
            raise SystemExit(f"PKT_BUILD_EXT=1, but pkt._C cannot be built: {reason}")
        print(f"pkt: pkt._C is not built: {reason}; the torch implementation serves instead", file=sys.stderr)
        return {}
    no_cuda = cuda_obstacle()
    if mode == "1" and no_cuda is not None and torch_has_cuda():
        raise SystemExit(f"PKT_BUILD_EXT=1 with a torch for CUDA, but pkt._C's CUDA part cannot be built: {no_cuda}")
    scope = f"for the CPU; not for CUDA: {no_cuda}" if no_cuda else "for the CPU and CUDA"
    print(f"pkt: pkt._C is built {scope}", file=sys.stderr)
    return {
        "ext_modules": [extension(with_cuda=no_cuda is None)],
        "cmdclass": {"build_ext": build_command(forced=mode == "1")},
        "options": {"bdist_wheel": {"py_limited_api": PYTHON_TAG}},
    }


setup(**arguments())
