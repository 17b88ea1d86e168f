"""The scripts that people copy run as they are, on the bundled pair."""

from __future__ import annotations

import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import processes
import pytest
from conftest import ASSETS

import pkt

ROOT = Path(__file__).parents[1]
DATA = ASSETS / "data"


def example(name: str, *words: str | Path) -> str:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = processes.run([sys.executable, ROOT / "examples" / name, *words], env=env)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


def test_scores_of_an_mlp() -> None:
    said = example("scores_of_an_mlp.py")
    (off,) = re.findall(r"difference from autograd: (\S+)", said)
    assert float(off) < 1e-6
    assert "share of S" in said


@pytest.mark.slow
def test_a_loop_of_ones_own(tmp_path: Path) -> None:
    words = (ASSETS / "teacher", ASSETS / "student", DATA / "seeds.jsonl", DATA / "train.jsonl", tmp_path / "adapter")
    said = example("own_loop.py", *words)
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", said)]
    assert len(losses) == 20
    assert losses[-1] < losses[0]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["with_trainer.py", "with_trl.py"])
def test_another_trainer(name: str, tmp_path: Path) -> None:
    if name == "with_trl.py" and find_spec("trl") is None:
        pytest.skip("trl is not installed (pip install pkt-transfer[clients])")
    ext = tmp_path / "ext"
    pkt.transfer(
        ASSETS / "teacher",
        ASSETS / "student",
        DATA / "seeds.jsonl",
        out=ext,
        modules="layers|embed_tokens",
        progress=False,
    )
    example(name, ASSETS / "student", ext, DATA / "train.jsonl", tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
