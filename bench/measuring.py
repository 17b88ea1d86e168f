"""How the benches measure: one timing harness, one memory sampler, the machine's facts, and JSON that survives a kill.

Rivals of a group take turns, so that clocks and neighbours hit all alike, and times are medians. A run is timed between two
events on a GPU, behind a write of 1 GiB that empties the caches and keeps the device busy while the run is queued, so that
only the device's time counts; on a CPU by the wall clock, after the rival before has come to rest. Whoever has used up the
group's budget of seconds is run no more, so that a bench ends in a known time whatever it meets.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Run = Callable[[], Any]
RESULTS = Path(os.environ.get("OUT") or Path(__file__).parent / "results")
# Threads of the rival before may still be spinning, waiting for more.
REST = 0.1


def anonymous() -> int:
    """Bytes of anonymous resident memory of this process (RssAnon): what is resident and not shared with a file."""
    # Of the files that tell, the one of a few bytes: looking must not show in the bytes read.
    _, resident, shared = map(int, Path("/proc/self/statm").read_text().split()[:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """The most memory taken inside, beyond what was there on entering: `bytes`, and `before`.

    On a GPU the allocator's; on a CPU anonymous memory, looked at every `interval` seconds, after what earlier work freed
    has gone back to the system (else the work inside would take that first).
    """

    def __init__(self, device: str | torch.device = "cpu", interval: float = 0.002) -> None:
        self.cuda, self.interval = torch.device(device).type == "cuda", interval
        self.stop = threading.Event()

    def __enter__(self) -> Peak:
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return self
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)
        self.before = self.most = anonymous()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.stop.wait(self.interval):
            self.most = max(self.most, anonymous())

    def __exit__(self, *exc: object) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            self.most = torch.cuda.max_memory_allocated()
        else:
            self.stop.set()
            self.thread.join()
            self.most = max(self.most, anonymous())
        self.bytes = self.most - self.before


class Clock:
    """Seconds of one run on a device."""

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.cold = torch.empty(2**30, dtype=torch.uint8, device=self.device) if self.cuda else None

    def seconds(self, run: Run) -> float:
        if self.cold is None:
            time.sleep(REST)
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.cold.zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


@dataclass(frozen=True)
class Measured:
    """What a rival's runs took; `value` is what its first run returned."""

    times: list[float]
    peak_bytes: int
    value: Any

    @property
    def median(self) -> float:
        return statistics.median(self.times)


def measure(
    clock: Clock, rivals: dict[str, Run], rounds: int, budget: float
) -> tuple[dict[str, Measured], dict[str, str]]:
    """Every rival's times and peak, and why those that failed did. The first rival is ours: if it fails, that is raised.

    The first run of each warms up; where it alone takes the budget of seconds, it is all there is of that rival.
    """
    values: dict[str, Any] = {}
    times: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    failed: dict[str, str] = {}
    for name, run in rivals.items():
        try:
            with Peak(clock.device, 0.0005) as peak:
                seconds = clock.seconds(lambda name=name, run=run: values.update({name: run()}))
        except Exception as error:
            if not values:
                raise
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        times[name] = [seconds] if seconds >= budget else []
        if seconds < budget:
            with Peak(clock.device, 0.0005) as peak:
                run()
        peaks[name] = peak.bytes
    for _ in range(rounds):
        for name, taken in times.items():
            if not taken or sum(taken) < budget:
                taken.append(clock.seconds(rivals[name]))
    return {name: Measured(times[name], peaks[name], values[name]) for name in times}, failed


def kind_of(device: str | torch.device, tiny: bool) -> str:
    """What stands in a report's file name: the device, or that its shapes were too small to measure anything."""
    return "tiny" if tiny else torch.device(device).type


class Report:
    """A bench's JSON file: facts of the machine and the run, then rows as they are found.

    Written anew, whole or not at all, whenever it is saved, which is after every group: a run that is killed leaves what it
    had measured. `complete` is true once nothing is missing.
    """

    def __init__(self, path: Path, device: str | torch.device, **facts: Any) -> None:
        self.path = path
        self.content: dict[str, Any] = {"complete": False, **machine(device), **facts, "rows": [], "failures": []}
        self.save()

    @classmethod
    def resumed(cls, path: Path) -> Report:
        """The report that a process before this one left."""
        report = cls.__new__(cls)
        report.path, report.content = path, json.loads(path.read_text())
        return report

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.content["rows"]
        return rows

    def add(self, *rows: dict[str, Any]) -> None:
        self.rows.extend(rows)
        self.save()

    def fail(self, what: str, error: BaseException) -> None:
        reason = f"{what}: {type(error).__name__}: {error}"
        self.content["failures"].append(reason[:500])
        print(f"FAILED {reason}", flush=True)
        self.save()

    def save(self, **facts: Any) -> None:
        self.content.update(facts)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(unfinished, self.path)

    def finish(self) -> int:
        """The bench's exit status."""
        self.save(complete=not self.content["failures"])
        print(f"wrote {self.path}", flush=True)
        return int(bool(self.content["failures"]))


class Bench:
    """Measures groups of rivals on one device, prints their rows and keeps them in a report."""

    def __init__(self, report: Report, device: str, rounds: int, budget: float) -> None:
        self.report, self.clock, self.rounds, self.budget = report, Clock(device), rounds, budget
        self.device, self.cuda = self.clock.device, self.clock.cuda
        self.ceilings: dict[str, float] = {}
        gc.freeze()  # what is imported is not looked through again at every measurement

    def group(
        self,
        name: str,
        rivals: dict[str, Run],
        *,
        flops: float = 0,
        bytes_moved: float = 0,
        budget: float | None = None,
        more: Callable[[Measured], dict[str, Any]] = lambda found: {},
    ) -> None:
        """A row a rival; the first is ours. `flops` and `bytes_moved` are the work's, not the rival's."""
        found, failed = measure(self.clock, rivals, self.rounds, self.budget if budget is None else budget)
        ours = next(iter(found.values())).median
        for rival, one in found.items():
            row: dict[str, Any] = {
                "group": name,
                "rival": rival,
                "ms": one.median * 1e3,
                "fastest_ms": min(one.times) * 1e3,
                "runs": len(one.times),
                "spread": (max(one.times) - min(one.times)) / one.median,
                "ours_is_faster_by": one.median / ours,
                "peak_bytes": one.peak_bytes,
            }
            if flops:
                row["tflops"] = flops / one.median / 1e12
                row["of_product"] = row["tflops"] / self.ceilings["product_tflops"]
            if bytes_moved:
                row["gbs"] = bytes_moved / one.median / 1e9
                row["of_copy"] = row["gbs"] / self.ceilings["copy_gbs"]
            row |= more(one)
            self.report.rows.append(row)
            show(row)
        for rival, reason in failed.items():
            self.report.rows.append({"group": name, "rival": rival, "failed": reason})
            print(f"{name:44} {rival:30} did not run: {reason}", flush=True)
        self.report.save()

    def measure_ceilings(self, *, tiny: bool = False) -> None:
        """The rate of a large copy (bytes read and written) and of a large product, in this run."""
        elements, side = (2**31, 8192) if self.cuda else (2**20, 256) if tiny else (2**26, 2048)
        dtype = torch.bfloat16 if self.cuda else torch.float32
        source = torch.empty(elements, dtype=torch.bfloat16, device=self.device).fill_(1)
        target = torch.empty_like(source)
        a, b = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        rivals: dict[str, Run] = {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(a, b, out=out)}
        found, _ = measure(self.clock, rivals, self.rounds, self.budget)
        self.ceilings = {
            "copy_gbs": 4 * elements / found["copy"].median / 1e9,
            "product_tflops": 2 * side**3 / found["product"].median / 1e12,
        }
        self.report.save(ceilings=self.ceilings)
        print(f"ceilings of this run: {self.ceilings}", flush=True)


def show(row: dict[str, Any]) -> None:
    words = [f"{row['group']:44} {row['rival']:30} {row['ms']:10.3f} ms {row['ours_is_faster_by']:8.2f}x"]
    if "tflops" in row:
        words.append(f"{row['tflops']:8.2f} TFLOP/s {row['of_product']:6.1%}")
    if "gbs" in row:
        words.append(f"{row['gbs']:8.1f} GB/s {row['of_copy']:6.1%}")
    words.append(f"{row['peak_bytes'] / 2**20:9.1f} MiB")
    print("  ".join(words), flush=True)


def implementations(device: str | torch.device) -> dict[str, tuple[str, str]]:
    """Every op of pkt -> what serves it on a device, and why."""
    from pkt import ops

    return {name: ops.implementation(name, device) for name in sorted(ops.names())}


def machine(device: str | torch.device) -> dict[str, Any]:
    """What a figure was measured on: processor, what it can multiply, device, threads, load, versions and implementations."""
    from pkt import ops

    device = torch.device(device)
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "implementations": {name: used for name, (used, _) in implementations(device).items()},
        "machine": {
            "cpu": _processor(),
            "cores": os.cpu_count(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "multiplies": sorted(str(dtype).removeprefix("torch.") for dtype in ops.native_halves()),
            "load_average": os.getloadavg()[0],
            "python": platform.python_version(),
            **{name: _version(name) for name in ("numpy", "transformers", "triton")},
        },
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["machine"] |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "device_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return facts


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
