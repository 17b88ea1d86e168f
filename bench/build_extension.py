"""Build pkt._C here, for this machine's own GPU alone, and put it beside pkt's modules.

    python bench/build_extension.py [--device cuda|cpu]

From a copy without pyproject.toml: setuptools before 77 refuses its licence line, and a build of the extension needs none
of it. One architecture compiles in a third of the time of the three that a wheel has.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def architecture() -> str:
    """The device's compute capability as TORCH_CUDA_ARCH_LIST wants it, "9.0"."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}" + ("a" if major == 9 else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    environment = {**os.environ, "PKT_BUILD_EXT": "1"}
    if parser.parse_args().device == "cuda":
        environment["TORCH_CUDA_ARCH_LIST"] = architecture()
        print(f"for compute capability {environment['TORCH_CUDA_ARCH_LIST']}", flush=True)
    with tempfile.TemporaryDirectory(prefix="pkt-build-") as scratch:
        copy = Path(scratch)
        shutil.copytree(ROOT / "csrc", copy / "csrc")
        shutil.copy(ROOT / "setup.py", copy)
        (copy / "pkt").mkdir()
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        status = subprocess.run(command, cwd=copy, env=environment).returncode
        if status:
            return status
        for library in (copy / "pkt").glob("_C*.so"):
            # Moved whole: a process that has loaded the old one keeps it.
            shutil.copy(library, ROOT / "pkt" / f"{library.name}.new")
            os.replace(ROOT / "pkt" / f"{library.name}.new", ROOT / "pkt" / library.name)
            print(f"built pkt/{library.name}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
