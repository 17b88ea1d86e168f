"""A script of a user's own: TRL's trainer on an injected student, by several processes that torchrun starts."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import processes
import pytest
import torch
from conftest import ASSETS
from safetensors.torch import load_file

import pkt

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("trl") is None, reason="trl is not installed (pip install pkt-transfer[clients])"
    ),
]

# Trains with TRL's own defaults, as its pages have it; and each process says what it ended with.
SCRIPT = """
import json, os, sys
import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

import pkt
from pkt.models import load_model

student, extraction, mode, rows, out = sys.argv[1:]
world = int(os.environ["WORLD_SIZE"])
model = pkt.inject(load_model(student, dtype=torch.float32), extraction, mode=mode)
with open(rows) as file:
    data = Dataset.from_list([json.loads(line) for line in file])
settings = SFTConfig(
    output_dir=out, max_steps=5, per_device_train_batch_size=8 // world, learning_rate=1e-3, max_length=128, bf16=False,
    use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
)
trainer = SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(student))
trainer.train()
assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
trained = {n: p.detach().contiguous() for n, p in trainer.model.named_parameters() if "lora_" in n}
save_file(trained, f"{out}/trained-{os.environ['RANK']}.safetensors")
"""


@pytest.fixture(scope="module")
def extraction(tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path, student_dir: Path, seed_file: Path) -> Path:
    """Without the head: SFTTrainer multiplies by its weight directly and refuses an adapter on it."""
    out = tmp_path_factory.mktemp("trl") / "ext"
    pkt.transfer(teacher_dir, student_dir, seed_file, out=out, rank=4, modules=r"layers|embed_tokens", progress=False)
    return out


def trained(folder: Path, world: int, *given: str | Path) -> list[dict[str, torch.Tensor]]:
    """The LoRA matrices that each process ends with."""
    (folder / "train.py").write_text(SCRIPT)
    out = folder / str(world)
    out.mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    done = processes.run(
        [*launch, folder / "train.py", *given, out], seconds=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return [load_file(out / f"trained-{rank}.safetensors") for rank in range(world)]


@pytest.mark.parametrize("mode", ["paired", "residual"])
def test_a_script_of_trl_by_several_processes(mode: str, student_dir: Path, extraction: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join((ASSETS / "data" / "train.jsonl").read_text().splitlines()[:48]) + "\n")
    given = student_dir, extraction, mode, rows
    (one,) = trained(tmp_path, 1, *given)
    injected = pkt.inject(student_dir, extraction, mode=mode)  # type: ignore[arg-type]
    before = {name: p.detach() for name, p in injected.named_parameters() if "lora_" in name}
    assert one.keys() == before.keys()
    for world in (2, 4):
        first, *others = trained(tmp_path, world, *given)
        for name, begun in before.items():
            assert all(torch.equal(other[name], first[name]) for other in others), (world, name)
            # The steps of one process with as many rows in all.
            assert torch.allclose(first[name], one[name], rtol=1e-3, atol=2e-5), (world, name)
            axis = 0 if "lora_A" in name or "embedding_A" in name else 1
            frozen = begun.shape[axis] // 2 if mode == "paired" else 0
            moves = begun.shape[axis] - frozen
            assert torch.equal(first[name].narrow(axis, moves, frozen), begun.narrow(axis, moves, frozen)), (
                world,
                name,
            )
            assert not torch.equal(first[name].narrow(axis, 0, moves), begun.narrow(axis, 0, moves)), (world, name)
