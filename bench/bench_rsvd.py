"""pkt::rsvd against its rivals: same matrices, one group of one run, energy checked before time.

    python bench/bench_rsvd.py [--device cpu|cuda] [--shapes 4096x4096,...] [--ranks 16,64] [--full] [--odd] [--student]
                               [--quality] [--tiny] [--out DIR]

A matrix is bf16 with the spectrum of a trained projection (σ_i falling as i^-½ from a few outliers, plus noise), and a
window of a larger one, so never contiguous; `--odd` adds windows that begin at an odd column, as most real ones do. Rivals take
their conversion from bf16 into account, as a user would pay it. Each row holds the median and the least time of interleaved
rounds, the captured energy as a share of the best known, and the peak of the memory beyond the input. `--full` adds
torch.linalg.svd, once, and the exact energy (on a CPU of matrices up to 4096 wide); `--student` the 224 matrices of a 7B
student, in batches and one by one; `--quality` compares block Krylov with plain subspace iteration for the same readings of
the matrix. Writes DIR/rsvd_<device>.json (with --tiny, rsvd_tiny.json) after every group.
"""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from measuring import RESULTS, Bench, Measured, Report, kind_of  # noqa: E402

from pkt import ops  # noqa: E402
from pkt.ops import rsvd_reference  # noqa: E402

Values = Callable[[], Tensor]  # the singular values a rival finds
LLAMA_7B = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
# Of the matrix, at the default number of iterations: block Krylov's on a CPU, and subspace iteration's on a GPU, one for the
# energy each.
READINGS = {"cpu": 6, "cuda": 10}


def window(n: int, m: int, device: torch.device, seed: int = 0, column: int = 32) -> Tensor:
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
    return whole[32 : 32 + n, column : column + m]


def group(bench: Bench, name: str, rank: int, rivals: dict[str, Values], best: float | None, moved: float) -> None:
    """Rows of one group; the first rival is ours. `best`: the optimum's energy, else the most that any rival finds is it."""
    first = len(bench.report.rows)
    bench.group(name, rivals, bytes_moved=moved, more=lambda found: {"energy": energy(found, rank)})
    rows = [row for row in bench.report.rows[first:] if "energy" in row]
    ceiling = best or max(row["energy"] for row in rows)
    for place, row in enumerate(rows):
        row["energy_of_best"] = row.pop("energy") / ceiling
        if place:  # the bytes moved are ours
            del row["gbs"], row["of_copy"]
    shares = ", ".join(f"{row['energy_of_best']:.5f}" for row in rows)
    print(f"{name:44} energies of the best {shares}", flush=True)
    bench.report.save()


def energy(found: Measured, rank: int) -> float:
    return float(found.value[:rank].double().square().sum())


def readings_of(a: Tensor) -> float:
    """Bytes that pkt::rsvd reads of a matrix."""
    return READINGS[a.device.type] * a.numel() * a.element_size()


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


def student(bench: Bench, layers: int, by: int = 1, rank: int = 16) -> None:
    """The windows of a 7B student, seven a layer and a layer at a time, as `pkt.extract` sends them: in a batch, or not."""
    layer = [window(n // by, m // by, bench.device, seed=i) for i, (n, m) in enumerate(LLAMA_7B)]

    def each_layer(values: Callable[[], list[Tensor]]) -> Values:
        def run() -> Tensor:
            for _ in range(layers):
                found = values()
            return torch.cat([s[:rank] for s in found])

        return run

    count = len(layer)
    group(
        bench,
        f"7B student, {layers * count} matrices",
        rank * count,
        {
            "pkt::rsvd_batch": each_layer(lambda: ops.rsvd_batch(layer, rank)[1]),
            "pkt::rsvd, one by one": each_layer(lambda: [ops.rsvd(a, rank)[1] for a in layer]),
            "torch.svd_lowrank niter=4": each_layer(
                lambda: [torch.svd_lowrank(a.float(), q=rank + 16, niter=4)[1] for a in layer]
            ),
        },
        None,
        layers * sum(readings_of(a) for a in layer),
    )


def quality(bench: Bench, n: int, m: int, rank: int = 16) -> None:
    """Excess of ‖A − USVᵀ‖² over the optimum for the same readings: block Krylov, twice as wide, and without its basis."""
    g = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(n, m, generator=g)).Q.to(bench.device)
    right = torch.linalg.qr(torch.randn(m, m, generator=g)).Q.to(bench.device)
    i = torch.arange(1, m + 1, device=bench.device)
    spectra = {
        "Gaussian": None,
        "flat": torch.ones(m, device=bench.device),
        "1/i": 1 / i,
        "i^-1/2": i**-0.5,
        "i^-1/4": i**-0.25,
        "0.9^i": 0.9**i,
        "clustered": torch.where(i <= 10, 1.0, torch.where(i < 40, 0.99, 0.1)),
    }
    for name, values in spectra.items():
        a = torch.randn(n, m, generator=g).to(bench.device) if values is None else (left * values) @ right.T
        exact = torch.linalg.svdvals(a.double())
        total, best = a.double().square().sum(), exact[rank:].square().sum()

        def captured(right_vectors: Tensor, a: Tensor = a) -> Tensor:
            return (a.double() @ right_vectors.double()).square().sum()

        def excess(right_vectors: Tensor, total: Tensor = total, best: Tensor = best) -> float:
            return ((total - captured(right_vectors)) / best - 1).item()

        for readings in (3, 5, 7):
            ours = ops.rsvd(a, rank, iters=readings - 1)[2]
            plain = torch.svd_lowrank(a, q=rank + 16, niter=readings - 1)[2][:, :rank]
            row = {
                "group": f"quality, {readings} readings",
                "spectrum": name,
                "captured_of_best": (captured(ours) / exact[:rank].square().sum()).item(),
                "excess_block_krylov": excess(ours),
                "excess_block_krylov_32_wide": excess(ops.rsvd(a, rank, 32 * readings - rank, readings - 1)[2]),
                "excess_subspace_iteration_32_wide": excess(plain),
            }
            bench.report.add(row)
            print(
                f"{row['group']:22} {name:10} excess over the optimum: Krylov {row['excess_block_krylov']:.1e}, "
                f"32 wide {row['excess_block_krylov_32_wide']:.1e}, "
                f"subspace iteration 32 wide {row['excess_subspace_iteration_32_wide']:.1e}",
                flush=True,
            )


def full_svd(bench: Bench, a: Tensor) -> Tensor:
    """All singular values, timed once: it takes seconds to minutes."""
    n, m = a.shape
    result: list[Tensor] = []
    seconds = bench.clock.seconds(lambda: result.append(torch.linalg.svd(a.float(), full_matrices=False)[1]))
    rival = "torch.linalg.svd (PEFT pissa)"
    bench.report.add({"group": f"{n}x{m} full SVD", "rival": rival, "ms": seconds * 1e3, "runs": 1})
    print(f"{n}x{m} torch.linalg.svd, once: {seconds:.1f} s", flush=True)
    return result[0]


def one_shape(bench: Bench, n: int, m: int, ranks: list[int], full: bool, odd: bool) -> None:
    shape = f"{n}x{m}"
    a = window(n, m, bench.device)
    exact: Tensor | None = None
    if full and bench.cuda:
        # The full decomposition comes last there, for the slot may end in it.
        exact = torch.linalg.eigvalsh(a.double().T @ a.double()).clamp_min(0).sqrt().flip(0)
    elif full and max(n, m) <= 4096:
        exact = full_svd(bench, a)
    for rank in ranks:
        best = None if exact is None else exact[:rank].double().square().sum().item()
        group(bench, f"{shape} rank {rank}", rank, rivals(a, rank), best, readings_of(a))
    if odd:
        a, rank = window(n, m, bench.device, column=33), ranks[0]
        ours = {"pkt::rsvd": lambda: ops.rsvd(a, rank)[1]}
        group(bench, f"{shape} rank {rank} odd column", rank, ours, None, readings_of(a))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", default="4096x4096,11008x4096,32000x4096")
    parser.add_argument("--ranks", default="16,64")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget", type=float, default=3.0, help="seconds a rival may run in a group")
    parser.add_argument("--full", action="store_true", help="torch.linalg.svd too, and shares of the exact optimum")
    parser.add_argument("--odd", action="store_true", help="also windows that begin at an odd column")
    parser.add_argument("--student", action="store_true")
    parser.add_argument("--layers", type=int, default=32, help="of the student's 32; fewer on a CPU")
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="shapes that show whether it runs, and nothing else")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()

    by, core = 1, (2048, 1024)
    if options.tiny:
        options.shapes, options.ranks, options.rounds, options.layers = "200x160,130x200", "16", 2, 1
        by, core = 64, (128, 100)
    print(f"pkt::rsvd on {options.device}: {ops.implementation('rsvd', options.device)}", flush=True)
    path = options.out / f"rsvd_{kind_of(options.device, options.tiny)}.json"
    report = Report(path, options.device, rounds=options.rounds)
    bench = Bench(report, options.device, options.rounds, options.budget)
    bench.measure_ceilings(tiny=options.tiny)
    ranks = [int(rank) for rank in options.ranks.split(",")]
    shapes = [tuple(map(int, shape.split("x"))) for shape in filter(None, options.shapes.split(","))]
    works: dict[str, Callable[[], object]] = {}
    for n, m in shapes:
        works[f"{n}x{m}"] = lambda n=n, m=m: one_shape(bench, n, m, ranks, options.full, options.odd)
    if options.quality:
        works["quality"] = lambda: quality(bench, *core)
    if options.student:
        works["student"] = lambda: student(bench, options.layers, by)
    if options.full and bench.cuda:
        works["full SVD"] = lambda: [full_svd(bench, window(*shape, bench.device)) for shape in shapes]
    for name, work in works.items():
        try:
            work()
        except Exception as error:
            report.fail(name, error)
    report.save(peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
