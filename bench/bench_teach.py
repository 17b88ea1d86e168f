"""`pkt teach` on a teacher larger than the memory it may use: time against its matrix products alone, peak memory, bytes a token.

    python bench/bench_teach.py               # writes bench/results/teach_cpu.json
    python bench/bench_teach.py --rows 2      # a quick look, written nowhere

The teacher has random bf16 weights on disk: 4 layers of 2048/5632 and a vocabulary of 16384, 273M parameters. 32 rows of 256
tokens, a whole pass, all of them answers, 64 draws each. Correctness comes first: on a small teacher of the same architecture
the probabilities must be the loaded model's own. Then, in one process of one thread, the whole of `pkt teach` (reading,
hashing, drawing and writing too), its matrix products alone, and the loaded model's own forward pass over the same rows take
turns. CPU seconds are counted rather than the clock's, so that neighbours on a shared machine do not decide the ratios. First in
the type that the CPU multiplies a bf16 model in, then in fp32. Peak memory is of the first turn, which is not timed: it also makes
the kernels of every shape.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import RESULTS, Peak, machine
from synthetic import VOCABULARY, seeds, write_teacher

TEACHER = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_hidden_layers": 4}
ROWS, TOKENS, MICRO_BATCH, TURNS = 32, 256, 8, 3
MEMORY, WIDE = "900MB", "1800MB"
GOALS = {"time_ratio": 1.15, "bytes_a_token": 200}


def same_answer(folder: Path) -> bool:
    """On a small teacher: the probabilities of the loaded model."""
    import pkt
    from pkt.models import load_model

    shape = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_hidden_layers": 3}
    write_teacher(folder, shape)
    rows = seeds(3, 32, 512)
    found = pkt.teach(folder, rows, tokenizer=Words(), top=16, dtype=torch.float32, progress=False)
    model = load_model(folder, dtype=torch.float32)
    with torch.no_grad():
        for index, row in enumerate(rows):
            p = model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1].softmax(1)
            mine = found.row(index)
            if float((p.gather(1, mine.ids) - mine.weights).abs().max()) > 1e-5:
                return False
    return True


class Words:
    """A tokenizer of nothing but numbers: the rows are token ids already."""

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(VOCABULARY)}


def batches(rows: int) -> list[int]:
    return [min(MICRO_BATCH, rows - first) for first in range(0, rows, MICRO_BATCH)]


def products(rows: int, dtype: torch.dtype) -> None:
    """The matrix products of the run, in its types and shapes, on operands that are there."""
    from pkt.streaming import head_rows

    hidden, ffn, layers = (TEACHER[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    for height, width, count in ((hidden, hidden, 4 * layers), (ffn, hidden, 2 * layers), (hidden, ffn, layers)):
        w = torch.full((height, width), 0.01, dtype=dtype)
        for size in batches(rows):
            x = torch.full((size, TOKENS, width), 0.01, dtype=dtype)
            for _ in range(count):
                F.linear(x, w)
    w, block = torch.full((VOCABULARY, hidden), 0.01, dtype=dtype), head_rows(VOCABULARY, torch.device("cpu"))
    for size in batches(rows):
        x = torch.full((size * (TOKENS - 1), hidden), 0.01, dtype=dtype)
        for part in x.split(block):
            F.linear(part, w)


@torch.no_grad()
def forward(model: Any, rows: Any) -> None:
    """The loaded model on the same micro-batches."""
    for batch in rows.batches(MICRO_BATCH):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)


def timed(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """CPU seconds, seconds, and what it gave."""
    begin, cpu = time.perf_counter(), time.process_time()
    value = run()
    return time.process_time() - cpu, time.perf_counter() - begin, value


def child(folder: Path, count: int) -> list[dict[str, Any]]:
    """The measured process."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    from pkt.ops import working_dtype

    own = working_dtype(torch.bfloat16, torch.device("cpu"))
    plans = {own: (count, TURNS, MEMORY), torch.float32: (count, 2, WIDE)}
    return [one(folder, dtype, *plan) for dtype, plan in plans.items()]


def one(folder: Path, dtype: torch.dtype, count: int, turns: int, limit: str) -> dict[str, Any]:
    """All turns in one type."""
    import pkt
    from pkt.models import load_model

    rows, memory, model = seeds(count, TOKENS), [], None
    times: dict[str, list[float]] = {"ours": [], "products": [], "forward": [], "clock": []}
    peak_bytes = 0
    for turn in range(turns):
        with Peak() as peak:
            cpu, clock, found = timed(
                lambda turn=turn: pkt.teach(
                    folder, rows, tokenizer=Words(), out=folder.parent / f"out-{dtype}-{turn}", batch_size=MICRO_BATCH,
                    dtype=dtype, device_memory=limit, progress=False, on_memory=memory.append,
                )
            )  # fmt: skip
        peak_bytes = peak_bytes or peak.bytes
        model = load_model(folder, dtype=dtype) if model is None else model
        times["ours"].append(cpu)
        times["clock"].append(clock)
        times["products"].append(timed(lambda: products(count, dtype))[0])
        times["forward"].append(timed(lambda model=model: forward(model, rows))[0])
    ratios = {
        name: [a / b for a, b in zip(times["ours"][1:], times[name][1:], strict=True)]
        for name in ("products", "forward")
    }
    return {
        "computed_in": str(dtype).removeprefix("torch."),
        "rows": count,
        "seconds": statistics.median(times["ours"][1:]),
        "products_seconds": statistics.median(times["products"][1:]),
        "forward_seconds": statistics.median(times["forward"][1:]),
        "time_ratio": statistics.median(ratios["products"]),
        "forward_ratio": statistics.median(ratios["forward"]),
        "all_seconds": times,
        "peak_bytes": peak_bytes,
        "planned_bytes": memory[0].device_total,
        "bytes_a_token": found.bytes_a_token,
        "answer_tokens": found.tokens,
        "micro_batch": memory[0].micro_batch,
    }


def demo_bytes() -> dict[str, float]:
    """What the demo's models say takes: a teacher that is sure, and a base on general text."""
    import pkt
    from pkt.demo.measuring import ASSETS, GENERAL, TRAIN

    pairs = {"teacher on its task": ("teacher", TRAIN), "base on general text": ("base", GENERAL)}
    return {
        name: pkt.teach(ASSETS / model, data, dtype=torch.float32, progress=False).bytes_a_token
        for name, (model, data) in pairs.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child is not None:
        print(json.dumps(child(options.child, options.rows)))
        return 0

    with tempfile.TemporaryDirectory(prefix="pkt-bench-") as scratch:
        if not same_answer(Path(scratch) / "small"):
            print("the distributions are not the loaded model's; nothing is measured", file=sys.stderr)
            return 1
        folder = Path(scratch) / "teacher"
        size = write_teacher(folder, TEACHER)
        load = os.getloadavg()[0]
        command = [sys.executable, __file__, "--child", str(folder), "--rows", str(options.rows)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return done.returncode
        found = json.loads(done.stdout.splitlines()[-1])
    facts = machine("cpu")["machine"]
    first = found[0]
    result = {
        "what": f"a {size / 2e6:.0f}M bf16 teacher on disk, rows of {TOKENS} tokens, 64 draws each, CPU seconds",
        "teacher": {**TEACHER, "vocab_size": VOCABULARY, "bytes": size},
        "machine": {**facts, "cpu": f"{facts['cpu']}, {facts['instructions']}", "threads": 1},
        "torch": torch.__version__,
        "load_before": load,
        "shared": load > 0.5,
        "goals": GOALS,
        "met": {
            **{goal: first[goal] <= limit for goal, limit in GOALS.items()},
            "memory": all(row["peak_bytes"] <= row["planned_bytes"] for row in found),
        },
        "rows": found,
        "demo_bytes_a_token": demo_bytes(),
    }
    print(json.dumps(result, indent=2))
    if options.rows == ROWS:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "teach_cpu.json").write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
