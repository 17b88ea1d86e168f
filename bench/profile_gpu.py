"""Where the time goes on a GPU: every kernel, copy and wait of a transfer's layers, of one rsvd and of one window search.

    python bench/profile_gpu.py [--layers 4] [--tiny]          # writes profile_cuda.json, prints the longest

A transfer is 13B shapes, resident, 32 samples of 512 tokens, on few layers, whose kernels were made before. For each work: the
wall's seconds, the device's busy seconds, and by kernel the number of launches and their milliseconds, the longest first; of what
the host does, the waits and launches.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, Report, kind_of
from synthetic import LARGE, SMALLER, llama, random_model, seeds
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

LONGEST = 45
HOST = ("Synchronize", "cudaLaunch", "cudaMemcpy", "cudaMalloc", "cudaFree", "cudaHostAlloc", "cuLaunch")


def profiled(work: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """What one run does, after one that warmed up."""
    cuda = device.type == "cuda"
    work()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        begin = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    kernels, host = [], {}
    for event in found.key_averages():
        if event.device_type == DeviceType.CUDA or not cuda:
            ms = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3
            kernels.append({"kernel": event.key[:150], "calls": event.count, "ms": ms})
        elif any(word in event.key for word in HOST):
            host[event.key] = {"calls": event.count, "ms": event.self_cpu_time_total / 1e3}
    kernels.sort(key=lambda row: -row["ms"])
    return {
        "seconds": seconds,
        "busy_seconds": sum(row["ms"] for row in kernels) / 1e3,
        "launches": sum(row["calls"] for row in kernels),
        "kernels": kernels[:LONGEST],
        "host": host,
    }


def works(device: torch.device, layers: int, tiny: bool) -> dict[str, Callable[[], Any]]:
    import pkt
    from pkt import ops

    shapes = llama(LARGE["13B"], tiny), llama(SMALLER["7B"], tiny)
    shapes[0].num_hidden_layers, shapes[1].num_hidden_layers = layers, max(layers - 1, 1)
    rows = seeds(4 if tiny else 32, 32 if tiny else 512, shapes[0].vocab_size)
    model = random_model(shapes[0], device, layers_share=False)
    by = 64 if tiny else 1
    dtype = torch.bfloat16
    tall, square = (torch.randn(n // by, 4096 // by, device=device).to(dtype) for n in (11008, 4096))
    score = torch.rand(13824 // by, 5120 // by, device=device)
    rank = 2 if tiny else 16

    def transfer() -> None:
        pkt.transfer(model, shapes[1], seeds=rows, rank=rank, batch_size=8, device=device, progress=False)

    return {
        "rsvd 11008x4096": lambda: ops.rsvd(tall, rank),
        "rsvd 4096x4096": lambda: ops.rsvd(square, rank),
        "best_window 13824x5120": lambda: ops.best_window(score, 11008 // by, 4096 // by),
        f"transfer 13B, {layers} layers": transfer,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tiny", action="store_true", help="shapes that show whether it runs, and nothing else")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    device = torch.device(options.device)
    report = Report(options.out / f"profile_{kind_of(device, options.tiny)}.json", device, layers=options.layers)
    for name, work in works(device, options.layers, options.tiny).items():
        try:
            found = profiled(work, device)
        except Exception as error:
            report.fail(name, error)
            continue
        report.add({"work": name, **found})
        print(f"{name}: {found['seconds']:.4f} s, busy {found['busy_seconds']:.4f} s, {found['launches']} launches")
        for row in found["kernels"][:30]:
            print(f"  {row['ms']:9.3f} ms {row['calls']:6} {row['kernel'][:110]}")
        for key, row in found["host"].items():
            print(f"  host {row['ms']:9.3f} ms {row['calls']:6} {key}", flush=True)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
