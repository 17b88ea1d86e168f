"""The layer-major engine on a teacher that is larger than the memory it may use: peak memory, time and bytes read.

    python bench/bench_stream.py                 # the CPU row; writes bench/results/stream_cpu.json
    python bench/bench_stream.py --layers 4      # a quick look, written nowhere
    python bench/bench_stream.py --device cuda   # 13B resident and streamed, 34B from host memory; stream_cuda.json
    python bench/bench_stream.py --scaling       # docs/scaling.md's tables: calculated from shapes, nothing is run

The teacher has random bf16 weights, written to disk shard by shard: 24 layers of 2048/5632 and a vocabulary of 16384, 1.3B
parameters. The student has 12 layers of 1024/2816. 8 seeds of 128 tokens, rank 16.

Correctness comes first: on a small teacher of the same architecture the streamed extraction must choose the windows of the
in-memory path. Then, in one process of its own, so that its memory can be told: the peak of anonymous memory above the bare
import (mapped files are not counted), the time of the whole transfer against that of its matrix products alone, measured
after it in the same process on the same operands' shapes and types, and the bytes read against the checkpoint's size.

Predicted for the GPU's rows before any was run (never a measured figure): 8·P·T flops at 800 TFLOP/s and the weights twice at
25 GB/s give 13B 2.1 s of products and, streamed, 52 GB in 2.1 s; 34B 5.5 s, and 134 GB in 5.4 s. What a run takes beyond that is
launches, attention, windows and factors, or waiting, and `seconds_by_phase` and `waiting_share` say where.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import RESULTS, Clock, Peak, Report, kind_of, machine, measure
from synthetic import LARGE, SMALLER, VOCABULARY, config, llama, random_model, seeds, write_teacher

RANK, SEEDS, TOKENS, MICRO_BATCH = 16, 8, 128, 8
TEACHER = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_hidden_layers": 24}
STUDENT = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "num_hidden_layers": 12}
MEMORY = "1500MB"
GOALS = {"peak_gb": 1.5, "time_ratio": 1.3, "read_ratio": 2.05}


def read_so_far() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def same_answer(folder: Path) -> bool:
    """On a small teacher: the windows and layers of the in-memory path."""
    import pkt
    from pkt.models import load_model
    from pkt.scoring import score_seeds

    small = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_hidden_layers": 4}
    student = config({"hidden_size": 32, "intermediate_size": 88, "num_attention_heads": 2, "num_hidden_layers": 2})
    write_teacher(folder, small)
    rows = seeds(4, 32)
    sens = score_seeds(load_model(folder), rows, batch_size=MICRO_BATCH, progress=False)
    plan = pkt.plan(sens, folder, student)
    ext = pkt.transfer(folder, student, rows, rank=4, batch_size=MICRO_BATCH, device_memory="200MB", progress=False)
    found = [(e.source, e.target, e.region) for e in ext.plan.entries]
    return found == [(e.source, e.target, e.region) for e in plan.entries]


def products(shape: dict[str, int]) -> dict[str, float]:
    """Seconds of the run's matrix products alone: twice forward, once dX and once dW per sample, in the run's types."""
    hidden, ffn, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    counts = {(hidden, hidden): 4 * layers, (ffn, hidden): 2 * layers, (hidden, ffn): layers}
    total = {"forward": 0.0, "dX": 0.0, "dW": 0.0, "head": 0.0}
    for (rows, cols), count in counts.items():
        for kind, seconds in _products(rows, cols, SEEDS * TOKENS, SEEDS).items():
            total[kind] += count * seconds * (2 if kind == "forward" else 1)

    total["head"] = SEEDS * sum(_products(VOCABULARY, hidden, TOKENS, 1).values())
    return total


def _products(rows: int, cols: int, tokens: int, samples: int) -> dict[str, float]:
    from pkt.ops import working_dtype

    dtype = working_dtype(torch.bfloat16, torch.device("cpu"))
    w = torch.randn(rows, cols).to(dtype)
    x, dy = torch.randn(tokens, cols).to(dtype), torch.randn(tokens, rows).to(dtype)
    wide = [(a.float(), b.float()) for a, b in zip(x.chunk(samples), dy.chunk(samples), strict=True)]

    def weight_gradients() -> None:
        for a, b in wide:
            b.t() @ a

    calls = {"forward": lambda: F.linear(x, w), "dX": lambda: dy @ w, "dW": weight_gradients}
    # The first call chooses a kernel and packs weights; the run pays that once, not per layer.
    return {kind: found.median for kind, found in measure(Clock("cpu"), calls, rounds=3, budget=60.0)[0].items()}


def by_phase(ticks: list[Any]) -> dict[str, float]:
    """Seconds that each phase of a transfer took."""
    found: dict[str, float] = {}
    for earlier, now in zip([None, *ticks], ticks, strict=False):
        found[now.phase] = found.get(now.phase, 0.0) + now.seconds - (earlier.seconds if earlier else 0.0)
    return found


def child(folder: Path, layers: int) -> dict[str, Any]:
    """The measured process."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    import pkt
    import pkt.transferring

    shape, student = {**TEACHER, "num_hidden_layers": layers}, {**STUDENT, "num_hidden_layers": layers // 2}
    rows = seeds(SEEDS, TOKENS)
    ticks: list[Any] = []
    memory: list[Any] = []
    selecting = [0.0]
    take = pkt.transferring.run.Extractor.take

    def timed_take(*args: Any) -> None:
        begin = time.perf_counter()
        take(*args)
        selecting[0] += time.perf_counter() - begin

    pkt.transferring.run.Extractor.take = timed_take
    before = read_so_far()
    with Peak() as peak:
        begin, cpu = time.perf_counter(), time.process_time()
        ext = pkt.transfer(
            folder,
            config(student),
            rows,
            out=folder.parent / "out",
            rank=RANK,
            batch_size=MICRO_BATCH,
            device_memory=MEMORY,
            progress=False,
            on_memory=memory.append,
            on_tick=ticks.append,
        )
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    read, load = read_so_far() - before, os.getloadavg()[0]
    alone = products(shape)
    checkpoint = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    return {
        "seconds": seconds,
        "seconds_by_phase": by_phase(ticks),
        "windows_and_factors_seconds": selecting[0],
        "products_seconds": sum(alone.values()),
        "products_by_kind": alone,
        "time_ratio": seconds / sum(alone.values()),
        "peak_gb": peak.bytes / 1e9,
        "planned_gb": memory[0].device_total / 1e9,
        "read_bytes": read,
        "read_ratio": read / checkpoint,
        "cpu_seconds": cpu,
        "load_average": load,
        "waiting_share": ticks[-1].waiting,
        "tokens_per_s": SEEDS * TOKENS / seconds,
        "micro_batch": memory[0].micro_batch,
        "places": memory[0].places,
        "layers_chosen": ext.plan.layer_map,
    }


def scaling(samples: int = 32, tokens: int = 512) -> None:
    """Memory, bytes and flops of large teachers, from the planner and the shapes alone."""
    from pkt.models import hollow_model
    from pkt.streaming import Teacher, plan_memory, sizes_of

    print("| teacher | parameters | one layer | its S | micro-batch | device | boundaries | read | flops |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, shape in LARGE.items():
        _, hidden, layers, *_ = shape
        teacher = Teacher(hollow_model(llama(shape), torch.bfloat16, torch.device("cpu")), None, torch.bfloat16)
        sizes = sizes_of(teacher, "model.layers", layers)
        plan = plan_memory(
            sizes,
            [[tokens] * samples],
            device=torch.device("cuda"),
            batch_size=8,
            in_memory=False,
            device_memory=80_000_000_000,
            host_memory=0,
            scratch_free=10**15,
            resident=False,
        )
        boundaries = (layers + 1) * samples * tokens * hidden * 2
        parameters = sum(p.numel() for p in teacher.model.parameters())
        rounding = plan.device["allocator's rounding"] / plan.device_total
        used = int(plan.device_total - plan.device["activations"] / (1 - rounding))
        print(
            f"| {name} | {parameters / 1e9:.1f}B | {sizes.layer * 2 / 1e9:.2f} GB | {sizes.layer * 4 / 1e9:.2f} GB | "
            f"{plan.micro_batch} | {used / 1e9:.1f} GB | {boundaries / 1e9:.1f} GB | {plan.read / 1e9:.0f} GB | "
            f"{plan.flops:.2e} |"
        )


# Name, teacher, student, device memory and host memory the transfer may use (None: resident, in what is free).
GPU_ROWS = (
    ("13B resident", "13B", "7B", None, 32_000_000_000),
    ("13B streamed", "13B", "7B", 10_000_000_000, 32_000_000_000),
    ("34B from host memory", "34B", "8B", 16_000_000_000, 32_000_000_000),
)


def regions_of(ext: Any) -> list[Any]:
    return [ext.plan.layer_map, *((e.source, e.target, e.region) for e in ext.plan.entries)]


def regions_that_differ(device: torch.device, folder: Path) -> int:
    """On a small teacher in fp32: how many regions and layers the device chooses otherwise than the CPU, either way."""
    import pkt
    from pkt.models import load_model

    shape = {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4, "num_hidden_layers": 4}
    student = config({"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 2, "num_hidden_layers": 2})
    write_teacher(folder, shape)
    rows = seeds(4, 32)
    options: dict[str, Any] = {"rank": 4, "batch_size": 2, "dtype": torch.float32, "progress": False}
    wanted = regions_of(pkt.transfer(folder, student, rows, device="cpu", **options))
    resident = regions_of(pkt.transfer(folder, student, rows, device=device, **options))
    on_host = load_model(folder, dtype=torch.float32)
    streamed = regions_of(pkt.transfer(on_host, student, rows, device=device, device_memory="1GB", **options))
    return sum(a != b for found in (resident, streamed) for a, b in zip(found, wanted, strict=True))


class _PlannedError(Exception):
    """Carries a transfer's memory plan out of it, before any weight is read."""


def planned(**inputs: Any) -> dict[str, Any]:
    """What the transfer says that it will take; `predicted_seconds` is its flops at the rate this device shows in a trial."""
    import pkt

    def stop(plan: Any) -> None:
        raise _PlannedError(plan)

    try:
        pkt.transfer(**inputs, on_memory=stop)
    except _PlannedError as told:
        plan = told.args[0]
    return {
        "planned_bytes": plan.device_total,
        "predicted_seconds": plan.seconds,
        "micro_batch": plan.micro_batch,
        "places": {place: plan.places.count(place) for place in sorted(set(plan.places))},
        "resident": plan.resident,
    }


def one_transfer(row: tuple[Any, ...], device: torch.device, tiny: bool) -> dict[str, Any]:
    """32 samples of 512 tokens, end to end after loading, after the same on two layers has made every kernel."""
    import pkt

    name, teacher, student, device_memory, host_memory = row
    home = device if device_memory is None else torch.device("cpu")
    shapes = llama(LARGE[teacher], tiny), llama(SMALLER[student], tiny)
    rows = seeds(4 if tiny else 32, 32 if tiny else 512, shapes[0].vocab_size)
    options: dict[str, Any] = {
        "seeds": rows,
        "rank": 2 if tiny else RANK,
        "batch_size": 8,
        "device": device,
        "device_memory": None if tiny else device_memory,
        "host_memory": None if tiny else host_memory,
        "progress": False,
    }
    two = copy.deepcopy(shapes)
    for shape in two:
        shape.num_hidden_layers = 2
    begin = time.perf_counter()
    pkt.transfer(random_model(two[0], home, layers_share=False), two[1], **options)
    warm_up = time.perf_counter() - begin

    model = random_model(shapes[0], home, layers_share=device_memory is not None)
    found = {"row": name, "warm_up_seconds": warm_up, **planned(teacher=model, student=shapes[1], **options)}
    ticks: list[Any] = []
    with Peak(device) as peak:
        begin = time.perf_counter()
        pkt.transfer(model, shapes[1], **options, on_tick=ticks.append)
        seconds = time.perf_counter() - begin
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    text = shapes[0]
    return {
        **found,
        "seconds": seconds,
        "seconds_by_phase": by_phase(ticks),
        "waiting_share": ticks[-1].waiting,
        "tokens": rows.tokens,
        "tokens_per_s": rows.tokens / seconds,
        # All that the device holds: a resident teacher was there before.
        "peak_bytes": peak.most if device.type == "cuda" else peak.bytes,
        "reserved_bytes": torch.cuda.max_memory_reserved() if device.type == "cuda" else None,
        "weights_bytes": weights,
        "boundaries_bytes": (text.num_hidden_layers + 1) * rows.tokens * text.hidden_size * 2,
    }


def on_device(device: torch.device, tiny: bool, out: Path) -> int:
    """The rows of a GPU, each written as soon as it is there."""
    report = Report(out / f"stream_{kind_of(device, tiny)}.json", device, rank=2 if tiny else RANK)
    with tempfile.TemporaryDirectory(prefix="pkt-bench-") as scratch:
        try:
            different = regions_that_differ(device, Path(scratch) / "small")
            report.save(regions_that_differ=different)
            if different:
                raise ValueError(f"{different} regions or layers are not those that the CPU chooses")
        except Exception as error:
            report.fail("same regions", error)
    for row in GPU_ROWS:
        try:
            found = one_transfer(row, device, tiny)
        except Exception as error:
            report.fail(row[0], error)
            continue
        report.add(found)
        phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in found["seconds_by_phase"].items())
        print(
            f"stream {found['row']:22} {found['seconds']:8.2f} s ({phases}; waiting {found['waiting_share']:.0%})  "
            f"peak {found['peak_bytes'] / 1e9:6.2f} GB of {found['planned_bytes'] / 1e9:6.2f} planned",
            flush=True,
        )
    return report.finish()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=TEACHER["num_hidden_layers"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--scaling", action="store_true", help="print the calculated tables and leave")
    parser.add_argument("--device", default="", help="cuda: the rows of a GPU")
    parser.add_argument("--tiny", action="store_true", help="with --device: shapes that show whether it runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.device:
        device = torch.device(options.device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        return on_device(device, options.tiny, options.out)
    if options.scaling:
        scaling()
        return 0
    from pkt.ops import working_dtype

    torch.set_num_threads(options.threads)
    if options.child is not None:
        print(json.dumps(child(options.child, options.layers)))
        return 0
    with tempfile.TemporaryDirectory(prefix="pkt-bench-") as scratch:
        if not same_answer(Path(scratch) / "small"):
            print("the streamed windows differ from the in-memory ones; nothing is measured", file=sys.stderr)
            return 1
        folder = Path(scratch) / "teacher"
        size = write_teacher(folder, {**TEACHER, "num_hidden_layers": options.layers})
        print(f"teacher written: {size / 1e9:.2f} GB", file=sys.stderr)
        command = [sys.executable, __file__, "--child", str(folder), "--layers", str(options.layers)]
        done = subprocess.run(
            [*command, "--threads", str(options.threads)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return done.returncode
        found = json.loads(done.stdout.splitlines()[-1])
    facts = machine("cpu")["machine"]
    result = {
        "what": f"streamed transfer, {size / 2e9:.2f}B bf16 teacher on disk, {SEEDS} seeds x {TOKENS} tokens, rank {RANK}",
        "teacher": {**TEACHER, "num_hidden_layers": options.layers, "vocab_size": VOCABULARY, "bytes": size},
        "student": {**STUDENT, "num_hidden_layers": options.layers // 2},
        "machine": {
            **facts,
            "cpu": f"{facts['cpu']}, {facts['instructions']}",
            "threads": options.threads,
            "computed_in": str(working_dtype(torch.bfloat16, torch.device("cpu"))).removeprefix("torch."),
        },
        "torch": torch.__version__,
        "goals": GOALS,
        "met": {goal: found[goal] <= limit for goal, limit in GOALS.items()},
        **found,
    }
    print(json.dumps(result, indent=2))
    if options.layers == TEACHER["num_hidden_layers"]:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "stream_cpu.json").write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
