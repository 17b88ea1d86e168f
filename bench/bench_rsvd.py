"""pkt::rsvd against its rivals: same matrices, one group of one run, energy checked before time.

    python bench/bench_rsvd.py [--device cpu|cuda] [--shapes 4096x4096,...] [--ranks 16,64] [--full] [--student] [--out DIR]

A matrix is bf16 with the spectrum of a trained projection (σ_i falling as i^-½ from a few outliers, plus noise), and a
window of a larger one, so never contiguous. Rivals take their conversion from bf16 into account, as a user would pay it.
Each row holds the median wall-clock time of interleaved rounds (`ms`) and the least (`fastest_ms`), the captured energy
as a share of the best known, and the peak of the memory beyond the input. `--full` adds torch.linalg.svd and the exact
energy; `--student` the 224 matrices of a 7B student, in batches and one by one; `--quality` compares block Krylov with
plain subspace iteration for the same readings of the matrix.
Writes DIR/rsvd_<device>.json.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from pkt import ops  # noqa: E402
from pkt.ops import rsvd_reference  # noqa: E402

Values = Callable[[], Tensor]  # the singular values a rival finds
LLAMA_7B = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]


def window(n: int, m: int, device: torch.device, seed: int = 0) -> Tensor:
    """A bf16 [n, m] view into a larger matrix: 64 directions that fall off as i^-½, two outliers, and noise."""
    g = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    whole = torch.empty(n + 64, m + 64, dtype=torch.bfloat16, device=device)
    values = 8 * torch.arange(1, 65, device=device) ** -0.5
    values[:2] *= 3
    left, right = normal(n + 64, 64) / n**0.5, normal(64, m + 64) / m**0.5
    for start in range(0, n + 64, 1024):
        rows = slice(start, start + 1024)
        block = (left[rows] * values) @ right
        whole[rows] = (block + 0.02 * normal(*block.shape)).to(torch.bfloat16)
    return whole[32 : 32 + n, 32 : 32 + m]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Bench:
    def __init__(self, device: str, rounds: int) -> None:
        self.device, self.rounds = torch.device(device), rounds
        self.rows: list[dict[str, Any]] = []

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], Any]) -> float:
        self.synchronize()
        if self.device.type == "cpu":
            time.sleep(0.5)  # the threads of the rival before may still be spinning, waiting for more
        start = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - start

    def peak_bytes(self, run: Callable[[], Any]) -> int:
        """Memory that a run takes beyond what was there: the allocator's on a GPU, resident and sampled on the CPU."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # else the run takes what earlier ones freed
        before, peak, finished = resident_bytes(), 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not finished.wait(0.0005):
                peak = max(peak, resident_bytes())

        watcher = threading.Thread(target=watch)
        watcher.start()
        run()
        finished.set()
        watcher.join()
        return max(0, peak - before)

    def group(self, name: str, rank: int, rivals: dict[str, Values], best: float | None = None) -> None:
        """Rows of one group; the first rival is ours. `best` is the optimum's energy, else the most that any rival finds."""
        energies: dict[str, float] = {}
        for rival, values in list(rivals.items()):
            try:
                energies[rival] = values()[:rank].double().square().sum().item()
            except Exception as error:
                print(f"{name:22} {rival:34} did not run: {error}", flush=True)
                self.rows.append({"group": name, "rival": rival, "failed": str(error)[:200]})
                del rivals[rival]
        ceiling = best or max(energies.values())
        ours = next(iter(rivals))
        peaks = {rival: self.peak_bytes(values) for rival, values in rivals.items()}
        times: dict[str, list[float]] = {rival: [] for rival in rivals}
        for _ in range(self.rounds):
            for rival, values in rivals.items():
                times[rival].append(self.seconds(values))
        medians = {rival: statistics.median(values) for rival, values in times.items()}
        for rival in rivals:
            row = {
                "group": name,
                "rival": rival,
                "ms": medians[rival] * 1e3,
                "fastest_ms": min(times[rival]) * 1e3,
                "ours_is_faster_by": medians[rival] / medians[ours],
                "energy_of_best": energies[rival] / ceiling,
                "peak_bytes": peaks[rival],
            }
            self.rows.append(row)
            print(
                f"{name:22} {rival:34} {row['ms']:10.2f} ms (fastest {row['fastest_ms']:9.2f})"
                f" {row['ours_is_faster_by']:8.2f}x  energy {row['energy_of_best']:.5f}"
                f"  peak {row['peak_bytes'] / 2**20:8.1f} MiB",
                flush=True,
            )


def rivals(a: Tensor, rank: int) -> dict[str, Values]:
    """Ours first. The rest as their users call them, from a bf16 matrix."""

    def lowrank(columns: int, niter: int) -> Values:
        return lambda: torch.svd_lowrank(a.float(), q=columns, niter=niter)[1]

    found: dict[str, Values] = {
        "pkt::rsvd": lambda: ops.rsvd(a, rank)[1],
        "pkt::rsvd iters=2": lambda: ops.rsvd(a, rank, iters=2)[1],
        "pkt::rsvd iters=6": lambda: ops.rsvd(a, rank, iters=6)[1],
        "pkt's torch implementation": lambda: rsvd_reference.rsvd(a, rank)[1],
        "torch.svd_lowrank niter=4": lowrank(rank + 16, 4),
        "torch.svd_lowrank niter=2": lowrank(rank + 16, 2),
        "PEFT pissa_niter_16": lowrank(rank, 16),
    }
    if a.device.type == "cpu":
        try:
            from sklearn.utils.extmath import randomized_svd

            found["sklearn randomized_svd n_iter=4"] = lambda: torch.from_numpy(
                randomized_svd(a.float().numpy(), rank, n_oversamples=16, n_iter=4, random_state=0)[1].copy()
            )
        except ImportError:
            pass
    return found


def student(bench: Bench, layers: int, rank: int = 16) -> None:
    """The windows of a 7B student, seven a layer and a layer at a time, as `pkt.extract` sends them: in a batch, or not."""
    layer = [window(n, m, bench.device, seed=i) for i, (n, m) in enumerate(LLAMA_7B)]

    def each_layer(values: Callable[[], list[Tensor]]) -> Values:
        def run() -> Tensor:
            for _ in range(layers):
                found = values()
            return torch.cat([s[:rank] for s in found])

        return run

    count = len(layer)
    bench.group(
        f"7B student, {layers * count} matrices",
        rank * count,
        {
            "pkt::rsvd_batch": each_layer(lambda: ops.rsvd_batch(layer, rank)[1]),
            "pkt::rsvd, one by one": each_layer(lambda: [ops.rsvd(a, rank)[1] for a in layer]),
            "torch.svd_lowrank niter=4": each_layer(
                lambda: [torch.svd_lowrank(a.float(), q=rank + 16, niter=4)[1] for a in layer]
            ),
        },
    )


def quality(bench: Bench) -> None:
    """Excess of ‖A − USVᵀ‖² over the optimum for the same readings: block Krylov, twice as wide, and without its basis."""
    n, m, rank = 2048, 1024, 16
    g = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(n, m, generator=g)).Q
    right = torch.linalg.qr(torch.randn(m, m, generator=g)).Q
    i = torch.arange(1, m + 1)
    spectra = {
        "Gaussian": None,
        "flat": torch.ones(m),
        "1/i": 1 / i,
        "i^-1/2": i**-0.5,
        "i^-1/4": i**-0.25,
        "0.9^i": 0.9**i,
        "clustered": torch.where(i <= 10, 1.0, torch.where(i < 40, 0.99, 0.1)),
    }
    for name, values in spectra.items():
        a = torch.randn(n, m, generator=g) if values is None else (left * values) @ right.T
        exact = torch.linalg.svdvals(a.double())
        best = exact[rank:].square().sum()

        def excess(right_vectors: Tensor, a: Tensor = a, best: Tensor = best) -> float:
            captured = (a.double() @ right_vectors.double()).square().sum()
            return ((a.double().square().sum() - captured) / best - 1).item()

        for readings in (3, 5, 7):
            plain = torch.svd_lowrank(a, q=rank + 16, niter=readings - 1)[2][:, :rank]
            row = {
                "group": f"quality, {readings} readings",
                "spectrum": name,
                "excess_block_krylov": excess(ops.rsvd(a, rank, iters=readings - 1)[2]),
                "excess_block_krylov_32_wide": excess(ops.rsvd(a, rank, 32 * readings - rank, readings - 1)[2]),
                "excess_subspace_iteration_32_wide": excess(plain),
            }
            bench.rows.append(row)
            print(
                f"{row['group']:22} {name:10} excess over the optimum: Krylov {row['excess_block_krylov']:.1e}, "
                f"32 wide {row['excess_block_krylov_32_wide']:.1e}, "
                f"subspace iteration 32 wide {row['excess_subspace_iteration_32_wide']:.1e}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", default="4096x4096,11008x4096,32000x4096")
    parser.add_argument("--ranks", default="16,64")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--full", action="store_true", help="torch.linalg.svd too, and shares of the exact optimum")
    parser.add_argument("--student", action="store_true")
    parser.add_argument("--layers", type=int, default=32, help="of the student's 32; fewer on a CPU")
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "bench" / "results")))
    options = parser.parse_args()

    bench = Bench(options.device, options.rounds)
    print(f"pkt::rsvd on {options.device}: {ops.implementation('rsvd', options.device)}", flush=True)
    for shape in filter(None, options.shapes.split(",")):
        n, m = map(int, shape.split("x"))
        a = window(n, m, bench.device)
        exact: Tensor | None = None
        if options.full and max(n, m) <= 4096:
            result: list[Tensor] = []
            seconds = bench.seconds(lambda a=a, result=result: result.append(torch.linalg.svd(a.float())[1]))
            exact = result[0]
            bench.rows.append(
                {"group": f"{shape} full SVD", "rival": "torch.linalg.svd (PEFT pissa)", "ms": seconds * 1e3}
            )
            print(f"{shape:22} torch.linalg.svd, once: {seconds:.1f} s", flush=True)
        for rank in map(int, options.ranks.split(",")):
            best = None if exact is None else exact[:rank].double().square().sum().item()
            bench.group(f"{shape} rank {rank}", rank, rivals(a, rank), best)
    if options.quality:
        quality(bench)
    if options.student:
        student(bench, options.layers)

    facts = {
        "device": torch.cuda.get_device_name()
        if bench.device.type == "cuda"
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "implementation": ops.implementation("rsvd", options.device),
        "rounds": options.rounds,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "load_average": os.getloadavg(),
        "rows": bench.rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"rsvd_{bench.device.type}.json"
    path.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
