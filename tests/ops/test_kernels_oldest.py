"""The kernels with the oldest Triton that pkt accepts, beside the installed one: what they compile to, and their numbers.

That Triton lies in a folder of its own, which `make test-oldest` fills and
PKT_OLDEST_TRITON may name; its interpreter needs a numpy older than 2.4, which lies there too.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """An environment in which that Triton is imported."""
    floors = re.findall(r'"triton>=([\d.]+)', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert len(floors) == 1
    folder = Path(os.environ.get("PKT_OLDEST_TRITON", ROOT / ".triton-oldest"))
    if not (folder / "triton").is_dir():
        pytest.skip(f"no Triton {floors[0]} in {folder}; `make test-oldest` installs it and runs this")
    path = [str(folder), str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-c", "import triton; print(triton.__version__)"]
    version = subprocess.run(command, env=found, capture_output=True, text=True, check=True).stdout
    assert f"{version.strip()}.".startswith(f"{floors[0]}."), f"Triton {version.strip()} is not the oldest accepted"
    return found


@pytest.mark.parametrize("tests", ["test_kernels_compile.py", "test_kernels_interpreter.py"])
def test_the_oldest_triton(environment: dict[str, str], tests: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", str(ROOT / "tests" / "ops" / tests)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert "skipped" not in run.stdout.splitlines()[-1], run.stdout[-2000:]
