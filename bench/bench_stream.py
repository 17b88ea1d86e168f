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
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

OUT = Path(os.environ.get("OUT") or Path(__file__).parent / "results")
RANK, SEEDS, TOKENS, MICRO_BATCH = 16, 8, 128, 8
TEACHER = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_hidden_layers": 24}
STUDENT = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "num_hidden_layers": 12}
VOCAB = 16384
MEMORY = "1500MB"
GOALS = {"peak_gb": 1.5, "time_ratio": 1.3, "read_ratio": 2.05}


def config(shape: dict[str, int], vocab: int = VOCAB) -> Any:
    from transformers import LlamaConfig

    heads = shape["num_attention_heads"]
    return LlamaConfig(
        **shape, vocab_size=vocab, num_key_value_heads=heads, max_position_embeddings=2048, dtype="bfloat16"
    )


def write_teacher(folder: Path, shape: dict[str, int]) -> int:
    """A checkpoint of random bf16 weights, one shard a layer; never whole in memory. Its bytes."""
    from safetensors.torch import save_file

    from pkt.models import Model

    config(shape).save_pretrained(folder)
    groups: dict[str, list[str]] = {}
    model = Model.of(config(shape)).skeleton()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name in shapes:
        parts = name.split(".")
        groups.setdefault(parts[2] if "layers" in parts else "outside", []).append(name)
    weight_map, size = {}, 0
    generator = torch.Generator().manual_seed(0)
    for number, (_, names) in enumerate(groups.items()):
        tensors = {}
        for name in names:
            noise = torch.randn(shapes[name], generator=generator)
            tensors[name] = (1 + 0.1 * noise if noise.ndim == 1 else noise.mul_(0.02)).to(torch.bfloat16)
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
        size += sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def seeds(vocab: int = VOCAB, count: int = SEEDS, length: int = TOKENS) -> Any:
    from pkt.seeds import Example, Seeds

    rows = torch.randint(0, vocab, (count, length), generator=torch.Generator().manual_seed(1)).tolist()
    return Seeds([Example(ids, list(ids), [], "", line) for line, ids in enumerate(rows, 1)], "bench", 0)


def anonymous() -> int:
    """Bytes of anonymous resident memory of this process (RssAnon): what is resident and not shared with a file."""
    # Of the files that tell, the one of a few bytes: looking must not show in the bytes read.
    _, resident, shared = map(int, Path("/proc/self/statm").read_text().split()[:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def read_so_far() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


class Peak:
    """The largest anonymous memory while it is open, looked at every few milliseconds."""

    def __enter__(self) -> Peak:
        self.value, self.stop = anonymous(), threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.stop.wait(0.005):
            self.value = max(self.value, anonymous())

    def __exit__(self, *exc: object) -> None:
        self.stop.set()
        self.thread.join()
        self.value = max(self.value, anonymous())


def same_answer(folder: Path) -> bool:
    """On a small teacher: the windows and layers of the in-memory path."""
    import pkt
    from pkt.models import load_model
    from pkt.scoring import score_seeds

    small = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_hidden_layers": 4}
    student = config({"hidden_size": 32, "intermediate_size": 88, "num_attention_heads": 2, "num_hidden_layers": 2})
    write_teacher(folder, small)
    rows = seeds(count=4, length=32)
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

    total["head"] = SEEDS * sum(_products(VOCAB, hidden, TOKENS, 1).values())
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
    return {kind: _seconds(call) for kind, call in calls.items()}


def _seconds(call: Any) -> float:
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    # The first call chooses a kernel and packs weights; the run pays that once, not per layer.
    return sorted(times[1:])[1]


def child(folder: Path, layers: int) -> dict[str, Any]:
    """The measured process."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    import pkt
    import pkt.transferring

    shape, student = {**TEACHER, "num_hidden_layers": layers}, {**STUDENT, "num_hidden_layers": layers // 2}
    rows = seeds()
    ticks: list[Any] = []
    memory: list[Any] = []
    selecting = [0.0]
    take = pkt.transferring.run.Harvest.take

    def timed_take(*args: Any) -> None:
        begin = time.perf_counter()
        take(*args)
        selecting[0] += time.perf_counter() - begin

    pkt.transferring.run.Harvest.take = timed_take
    bare, before = anonymous(), read_so_far()
    begin, cpu = time.perf_counter(), time.process_time()
    with Peak() as peak:
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
    by_phase: dict[str, float] = {}
    for earlier, now in zip([None, *ticks], ticks, strict=False):
        by_phase[now.phase] = by_phase.get(now.phase, 0.0) + now.seconds - (earlier.seconds if earlier else 0.0)
    return {
        "seconds": seconds,
        "seconds_by_phase": by_phase,
        "windows_and_factors_seconds": selecting[0],
        "products_seconds": sum(alone.values()),
        "products_by_kind": alone,
        "time_ratio": seconds / sum(alone.values()),
        "peak_gb": (peak.value - bare) / 1e9,
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


LARGE = {
    "13B": (13824, 5120, 40, 40, 40, 32000),
    "34B": (22016, 8192, 48, 64, 8, 32000),
    "70B": (28672, 8192, 80, 64, 8, 128256),
    "405B": (53248, 16384, 126, 128, 8, 128256),
}


def llama(shape: tuple[int, ...], tiny: bool = False) -> Any:
    from transformers import LlamaConfig

    ffn, hidden, layers, heads, kv, vocab = shape
    by = 64 if tiny else 1
    return LlamaConfig(
        vocab_size=vocab // by,
        hidden_size=hidden // by,
        intermediate_size=ffn // by,
        num_hidden_layers=max(2, layers // by) if tiny else layers,
        num_attention_heads=heads // 8 if tiny else heads,
        num_key_value_heads=max(1, kv // 8) if tiny else kv,
    )


def scaling(samples: int = 32, tokens: int = 512) -> None:
    """Memory, bytes and flops of large teachers, from the planner and the shapes alone."""
    from pkt.models import Model
    from pkt.streaming import Teacher, plan_memory, sizes_of

    print("| teacher | parameters | one layer | its S | micro-batch | device | boundaries | read | flops |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, shape in LARGE.items():
        _, hidden, layers, *_ = shape
        teacher = Teacher(Model.of(llama(shape)).hollow(torch.bfloat16, torch.device("cpu")), None, torch.bfloat16)
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
        used = plan.device_total - plan.device["activations"]
        print(
            f"| {name} | {parameters / 1e9:.1f}B | {sizes.layer * 2 / 1e9:.2f} GB | {sizes.layer * 4 / 1e9:.2f} GB | "
            f"{plan.micro_batch} | {used / 1e9:.1f} GB | {boundaries / 1e9:.1f} GB | {plan.read / 1e9:.0f} GB | "
            f"{plan.flops:.2e} |"
        )


# Name, teacher, student, memory the transfer may use (None: what is free), goals of DESIGN's table (seconds, bytes).
SMALLER = {"7B": (11008, 4096, 32, 32, 32, 32000), "8B": (14336, 4096, 32, 32, 8, 32000)}
GPU_ROWS = (
    ("13B resident", "13B", "7B", None, 10.0, None),
    ("13B streamed", "13B", "7B", 10_000_000_000, 10.0, 10_000_000_000),
    ("34B from host memory", "34B", "8B", 16_000_000_000, 60.0, 16_000_000_000),
)


def random_model(shape: Any, device: torch.device) -> Any:
    """bf16 weights from one random block: a large model's own random numbers would take longer than the transfer."""
    from pkt.models import Model

    model = Model.of(shape).hollow(torch.bfloat16, device)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = torch.nn.Parameter(torch.empty_like(parameter, device=device))
    block = (torch.randn(1 << 24) * 0.02).to(torch.bfloat16).to(device)
    for index, parameter in enumerate(model.parameters()):
        flat = parameter.data.view(-1)
        for start in range(0, flat.numel(), block.numel()):
            part = flat[start : start + block.numel()]
            part.copy_(block.roll(7919 * (index + 1))[: part.numel()])
        if parameter.ndim == 1:
            parameter.data += 1
    return model


def on_device(device: torch.device, tiny: bool) -> list[dict[str, Any]]:
    """One transfer a row: 32 samples of 512 tokens, end to end after loading."""
    import pkt

    found = []
    for name, teacher, student, memory, seconds_goal, bytes_goal in GPU_ROWS:
        resident = memory is None
        model = random_model(llama(LARGE[teacher], tiny), device if resident else torch.device("cpu"))
        rows = seeds(vocab=model.config.vocab_size, count=4 if tiny else 32, length=32 if tiny else 512)
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        ticks: list[Any] = []
        begin = time.perf_counter()
        pkt.transfer(
            *(model, llama(SMALLER[student], tiny), rows),
            rank=RANK if not tiny else 2,
            batch_size=8,
            device=device,
            device_memory=None if tiny else memory,
            progress=False,
            on_tick=ticks.append,
        )
        row = {
            "row": name,
            "seconds": time.perf_counter() - begin,
            "seconds_goal": seconds_goal,
            "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
            "bytes_goal": bytes_goal,
            "weights_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
            "waiting_share": ticks[-1].waiting,
        }
        found.append(row)
        print(f"stream {name:22} {row['seconds']:8.2f} s  peak {(row['peak_bytes'] or 0) / 1e9:6.2f} GB", flush=True)
        del model
        if cuda:
            torch.cuda.empty_cache()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=TEACHER["num_hidden_layers"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--scaling", action="store_true", help="print the calculated tables and leave")
    parser.add_argument("--device", default="", help="cuda: the rows of a GPU")
    parser.add_argument("--tiny", action="store_true", help="with --device: tiny shapes, written nowhere")
    options = parser.parse_args()
    if options.device:
        device = torch.device(options.device)
        rows = on_device(device, options.tiny)
        if not options.tiny:
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
            value = {"device": name, "torch": torch.__version__, "samples": 32, "tokens": 512, "rows": rows}
            (OUT / f"stream_{device.type}.json").write_text(json.dumps(value, indent=1) + "\n")
        return 0
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
    result = {
        "what": f"streamed transfer, {size / 2e9:.2f}B bf16 teacher on disk, {SEEDS} seeds x {TOKENS} tokens, rank {RANK}",
        "teacher": {**TEACHER, "num_hidden_layers": options.layers, "vocab_size": VOCAB, "bytes": size},
        "student": {**STUDENT, "num_hidden_layers": options.layers // 2},
        "machine": {
            "cpu": f"{platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
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
        OUT.mkdir(parents=True, exist_ok=True)
        (OUT / "stream_cpu.json").write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
