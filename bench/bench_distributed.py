"""A transfer by one rank and by two, a thread each: how much of the second core is work, and what the ranks send each other.

    python bench/bench_distributed.py              # writes bench/results/distributed_cpu.json
    python bench/bench_distributed.py --layers 4   # a quick look, written nowhere
    python bench/bench_distributed.py --scaling    # distributed_scaling.json, for docs/scaling.md: calculated, nothing is run

The teacher and the student are those of bench_stream.py: 1.3B parameters on disk in bf16, computed in what the CPU multiplies.
Efficiency is seconds of one rank / (2 x seconds of two). On a machine that others use it is too low by what they take; beside it
stands the same of CPU seconds, of which ranks that wait for each other in torch.distributed take few.

What is sent is counted twice: the tensors given to torch.distributed by all ranks, against the formula of docs/scaling.md, and what
went through the loopback device, where the ring of a reduction and everything else on the machine show too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_stream import MEMORY, MICRO_BATCH, RANK, SEEDS, STUDENT, TEACHER, TOKENS, by_phase
from measuring import RESULTS, machine
from synthetic import LARGE, config, llama, seeds, write_teacher

GOAL = 0.85


def loopback() -> int:
    """Bytes that the loopback device has received."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def from_disk() -> int:
    """Bytes that this process had to fetch from a disk."""
    return int(Path("/proc/self/io").read_text().split("\nread_bytes:")[1].split()[0])


def child(folder: Path, layers: int, out: Path) -> None:
    """One rank of a measured transfer; the first one writes what all found."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    import pkt
    from pkt.ranks import ALONE, joined

    torch.set_num_threads(1)
    several = os.environ["WORLD_SIZE"] != "1"
    if several:
        with joined() as ranks:
            _measured(pkt, ranks, folder, layers, out)
    else:
        _measured(pkt, ALONE, folder, layers, out)


def _measured(pkt: Any, ranks: Any, folder: Path, layers: int, out: Path) -> None:
    ticks: list[Any] = []
    ranks.all_of(None)
    lo, disk = loopback(), from_disk()
    begin, cpu = time.perf_counter(), time.process_time()
    pkt.transfer(
        folder,
        config({**STUDENT, "num_hidden_layers": layers // 2}),
        seeds(SEEDS, TOKENS),
        out=out.parent / f"{out.stem}-out",
        rank=RANK,
        batch_size=MICRO_BATCH,
        device_memory=MEMORY,
        progress=False,
        on_tick=ticks.append,
        group=None if ranks is None or ranks.alone else ranks,
    )
    mine = {
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time() - cpu,
        "sent_bytes": ranks.sent,
        "disk_bytes": from_disk() - disk,
    }
    found = ranks.all_of(mine)
    if ranks.first:
        whole = {
            "seconds": max(each["seconds"] for each in found),
            "seconds_by_phase": by_phase(ticks),
            "loopback_bytes": loopback() - lo,
            "load_average": os.getloadavg()[0],
            "ranks": found,
        }
        out.write_text(json.dumps(whole))


def formula(sizes: Any, tokens: list[int]) -> dict[str, float]:
    """Bytes that all ranks send together, by docs/scaling.md. tokens: of each rank's seeds, the first one's first.

    scores: every rank gives S of what it does not own; gradients: every rank but the first gives those at each boundary between
    layers, and of a checkpoint the first layer's input too; by name.
    """
    parameters = sizes.layers * sizes.layer + sizes.front + (0 if sizes.tied else sizes.head)
    parts = sizes.layers + 1
    return {
        "scores": 4.0 * parameters * (len(tokens) - 1),
        "gradients": float(parts * sum(tokens[1:]) * sizes.hidden * sizes.grad_itemsize),
    }


def run(world: int, folder: Path, layers: int, work: Path) -> dict[str, Any]:
    for file in folder.iterdir():
        with open(file, "rb") as opened:  # so that it has to come from the disk
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    out = work / f"{world}.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command = [*launch, __file__, "--child", str(folder), "--layers", str(layers), "--out", str(out)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return dict(json.loads(out.read_text()))


def bench(layers: int) -> dict[str, Any]:
    from pkt.streaming import open_teacher, sizes_of

    with tempfile.TemporaryDirectory() as place:
        work, folder = Path(place), Path(place) / "teacher"
        folder.mkdir()
        shape = {**TEACHER, "num_hidden_layers": layers}
        size = write_teacher(folder, shape)
        sizes = sizes_of(open_teacher(folder, torch.device("cpu")), "model.layers", layers)
        one, two = (run(world, folder, layers, work) for world in (1, 2))
    expected = formula(sizes, [SEEDS * TOKENS // 2] * 2)
    sent = sum(each["sent_bytes"] for each in two["ranks"])
    cpu = [sum(each["cpu_seconds"] for each in found["ranks"]) for found in (one, two)]
    efficiency = one["seconds"] / (2 * two["seconds"])
    return {
        "what": f"a transfer by 1 and 2 ranks of a thread each, {size / 2e9:.2f}B bf16 teacher on disk, {SEEDS} x {TOKENS} tokens",
        "teacher": {**shape, "bytes": size},
        **machine("cpu"),
        "threads": 1,
        "goal": {"efficiency": GOAL},
        "met": {"efficiency": efficiency >= GOAL},
        "efficiency": efficiency,
        "efficiency_of_cpu_seconds": cpu[0] / cpu[1],
        "sent_bytes": sent,
        "formula_bytes": expected,
        "sent_to_formula": sent / sum(expected.values()),
        "loopback_to_formula": two["loopback_bytes"] / sum(expected.values()),
        "disk_to_checkpoint": {
            name: sum(each["disk_bytes"] for each in found["ranks"]) / size for name, found in (("1", one), ("2", two))
        },
        "one": one,
        "two": two,
    }


# -- calculated

# What the table takes for granted; nothing of it was measured.
TAKEN = {
    "seeds": 512,
    "tokens": 512,
    "flops_per_s": 400e12,
    "gpus_a_machine": 8,
    "gpu_memory": 80e9,
    "bytes_per_s_between_gpus": 300e9,
    "bytes_per_s_between_machines": 25e9,
    "bytes_per_s_from_disk": 6e9,
}


def scaling() -> dict[str, Any]:
    """Memory, bytes and seconds by the formulas of docs/scaling.md for large teachers on 1, 8 and 64 GPUs."""
    from pkt.models import hollow_model
    from pkt.streaming import Teacher, plan_memory, sizes_of
    from pkt.streaming.memory import ROUNDING

    rows = []
    for name in ("70B", "405B"):
        _, _, layers, *_ = LARGE[name]
        model = hollow_model(llama(LARGE[name]), torch.bfloat16, torch.device("cpu"))
        sizes = sizes_of(Teacher(model, None, torch.bfloat16), "model.layers", layers)
        for gpus in (1, 8, 64):
            own = math.ceil(TAKEN["seeds"] / gpus)
            plan = plan_memory(
                sizes,
                [[int(TAKEN["tokens"])] * own],
                device=torch.device("cuda"),
                batch_size=8,
                in_memory=False,
                device_memory=int(TAKEN["gpu_memory"]),
                host_memory=200_000_000_000,
                scratch_free=10**15,
                resident=False,
            )
            sent = formula(sizes, [own * int(TAKEN["tokens"])] * gpus)["scores"] / gpus
            machines = -(-gpus // int(TAKEN["gpus_a_machine"]))
            # Between machines a ring passes what all of a machine's GPUs send through its one network.
            through = sent * TAKEN["gpus_a_machine"] / TAKEN["bytes_per_s_between_machines"]
            rows.append(
                {
                    "teacher": name,
                    "gpus": gpus,
                    "seeds_of_each": own,
                    "held_bytes": plan.device_total - plan.device["activations"] / (1 - ROUNDING),
                    "sent_bytes": sent,
                    "read_bytes": plan.read,
                    "products_s": plan.flops / TAKEN["flops_per_s"],
                    "sums_s": through if machines > 1 else sent / TAKEN["bytes_per_s_between_gpus"],
                    "reading_s": plan.read / TAKEN["bytes_per_s_from_disk"],
                }
            )
    return {"what": "calculated from shapes; nothing was run", "taken": TAKEN, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=TEACHER["num_hidden_layers"])
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--child", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.scaling:
        (RESULTS / "distributed_scaling.json").write_text(json.dumps(scaling(), indent=2) + "\n")
    elif given.child is not None:
        child(given.child, given.layers, given.out)
    else:
        found = bench(given.layers)
        print(json.dumps(found, indent=2))
        if given.layers == TEACHER["num_hidden_layers"]:
            (RESULTS / "distributed_cpu.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
