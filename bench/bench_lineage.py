"""`pkt lineage` on a pair of Llama 3's 8B and 1B shapes: seconds and peak memory, for a stranger and for a descendant.

    python bench/bench_lineage.py                 # writes bench/results/lineage_cpu.json; 19 GB of disk in --scratch
    python bench/bench_lineage.py --tiny --out D  # shapes that show whether it runs, and nothing else

Both models are random bf16 checkpoints on disk; the stranger's weights are drawn apart, the descendant's are the teacher's on
random hidden units, neurons, groups and every second layer, with noise of a tenth. Each is looked at in a process of its own;
memory is the peak of anonymous memory above the bare import (mapped files are not counted).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, Peak, Report, kind_of
from synthetic import write_checkpoint

from pkt.files import sha256

TEACHER = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
STUDENT = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 128256,
}
NOISE = 0.1  # of each matrix's own spread
SMALLER = 64  # by which --tiny divides


def config(shape: dict[str, int], tiny: bool) -> Any:
    from transformers import LlamaConfig

    if tiny:
        shape = {k: max(v // SMALLER, 2) for k, v in shape.items()} | {
            "num_hidden_layers": shape["num_hidden_layers"] // 8
        }
        shape |= {"num_attention_heads": shape["hidden_size"] // 16, "num_key_value_heads": 1}
    return LlamaConfig(**shape, head_dim=16 if tiny else 128, max_position_embeddings=2048, dtype="bfloat16")


class Weights:
    """A teacher's tensors by name, made when asked for, the same every time."""

    def __init__(self, shape: Any, seed: int) -> None:
        from pkt.models import Model

        self.config, self.seed = shape, seed
        self.shapes = {n: tuple(p.shape) for n, p in Model.of(shape).skeleton().named_parameters()}
        # Every tensor is a stretch of one block, at a place of its own: random numbers of 8B would take minutes.
        generator = torch.Generator().manual_seed(seed)
        self.block = torch.randn(min(1 << 26, sum(map(_count, self.shapes.values()))), generator=generator)

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        place = int(sha256(f"{self.seed} {name}")[:15], 16) % len(self.block)
        flat = self.block.roll(-place)
        flat = flat.repeat(-(-_count(shape) // len(flat)))[: _count(shape)].view(shape)
        return 1 + 0.1 * flat if len(shape) == 1 else 0.02 * flat


class Descendant:
    """The teacher's tensors on some of its units, with noise."""

    def __init__(self, teacher: Weights, shape: Any, seed: int) -> None:
        self.teacher, self.config, self.noise = teacher, shape, Weights(shape, seed)
        old, generator = teacher.config, torch.Generator().manual_seed(seed)

        def some(count: int, of: int) -> torch.Tensor:
            return torch.randperm(of, generator=generator)[:count].sort().values

        self.hidden = some(shape.hidden_size, old.hidden_size)
        self.neurons = some(shape.intermediate_size, old.intermediate_size)
        groups = some(shape.num_key_value_heads, old.num_key_value_heads)
        each, dim = old.num_attention_heads // old.num_key_value_heads, shape.head_dim
        self.values = (groups[:, None] * dim + torch.arange(dim)).flatten()
        heads = (groups[:, None] * each + torch.arange(shape.num_attention_heads // len(groups))).flatten()
        self.queries = (heads[:, None] * dim + torch.arange(dim)).flatten()

    def __getitem__(self, name: str) -> torch.Tensor:
        parts = name.split(".")
        if "layers" in parts:
            parts[2] = str(2 * int(parts[2]))
        whole = self.teacher[".".join(parts)]
        if whole.ndim == 1:
            return whole[self.hidden]
        rows = {"q": self.queries, "k": self.values, "v": self.values, "gate": self.neurons, "up": self.neurons}
        cols = {"o": self.queries, "down": self.neurons}
        kind = parts[-2].removesuffix("_proj")
        if kind in rows:
            cut = whole[rows[kind]][:, self.hidden]
        elif kind in cols:
            cut = whole[self.hidden][:, cols[kind]]
        else:
            cut = whole[:, self.hidden]
        return cut + NOISE * self.noise[name]


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def look(teacher: str, student: str) -> None:
    """In a process of its own: prints what it took and what it found."""
    import scipy.optimize  # noqa: F401
    import transformers  # noqa: F401

    import pkt

    with Peak() as peak:
        begin = time.perf_counter()
        found = pkt.lineage(teacher, student, progress=False)
        seconds = time.perf_counter() - begin
    evidence = {
        e.kind: {"matched": e.matched, "of": e.total, "cosine": e.cosine, "chance": e.chance} for e in found.evidence
    }
    row = {
        "seconds": seconds,
        "peak_bytes": peak.bytes,
        "verdict": found.verdict,
        "evidence": evidence,
        "layers": found.layers,
    }
    print(json.dumps(row | {"hidden": found.hidden}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--scratch", type=Path, help="where the checkpoints are written; default: a temporary folder")
    parser.add_argument("--look", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.look:
        look(*options.look)
        return 0
    what = (
        "tiny shapes"
        if options.tiny
        else "Llama 3's shapes, 8B (32 layers of 4096) and 1B (16 layers of 2048), random bf16"
    )
    report = Report(options.out / f"lineage_{kind_of('cpu', options.tiny)}.json", "cpu", what=what, noise=NOISE)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        teacher = Weights(config(TEACHER, options.tiny), 1)
        size = write_checkpoint(Path(scratch, "teacher"), teacher.config, lambda name, _: teacher[name])
        for kind in ("stranger", "descendant"):
            small = config(STUDENT, options.tiny)
            made = Weights(small, 2) if kind == "stranger" else Descendant(teacher, small, 3)
            folder = Path(scratch, kind)
            bytes_ = write_checkpoint(folder, small, lambda name, _, made=made: made[name])
            command = [sys.executable, __file__, "--look", str(Path(scratch, "teacher")), str(folder)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                report.fail(kind, RuntimeError(f"exit status {done.returncode}"))
                continue
            row = json.loads(done.stdout.splitlines()[-1])
            hidden = row.pop("hidden")
            if isinstance(made, Descendant):
                right = sum(a == b for a, b in zip(hidden, made.hidden.tolist(), strict=True))
                row |= {
                    "hidden_right": right,
                    "layers_right": row["layers"] == list(range(0, 2 * len(row["layers"]), 2)),
                }
            report.add({"pair": kind, "teacher_bytes": size, "student_bytes": bytes_, **row})
            print(f"{kind:12} {row['seconds']:7.1f} s  {row['peak_bytes'] / 1e9:5.2f} GB  {row['verdict']}", flush=True)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
