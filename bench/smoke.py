"""Every op of pkt once, small, on one device, against its formula in fp64 on the CPU; and which implementation each one has.

    python bench/smoke.py --device cuda                     # writes smoke_cuda.json
    python bench/smoke.py --device cuda --only linear       # the ops whose names begin so (a pattern)
    python bench/smoke.py --device cuda --implementations   # runs nothing; fails if an op has no kernel of its own there

An op that several kernels can serve is run with each that the device can run, forced by PKT_KERNEL: today's as `op`, another as
`op@kernel`. Where an op leaves the device unusable, the ops after it run in a new process, so that one fault does not hide another.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
from measuring import RESULTS, Report, implementations
from torch import Tensor

from pkt import ops
from pkt.ops import candidates

# What may serve an op on a device: on a GPU torch's own operations would, unnoticed, if a build or an import went wrong.
SERVES = {"cuda": ("CUDA", "Triton"), "cpu": ("C++", "torch")}
N, M, TILE, VOCABULARY = 136, 72, 16, 61
STARTS, LENS = (3, 33, 36), (30, 0, 70)
ROWS = 110
Case: TypeAlias = "Callable[[Inputs], float]"


class Inputs:
    """Random inputs of one dtype, drawn on the CPU, moved to the device; rows of no sample hold NaN."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0)
        self.starts, self.lens = (torch.tensor(values, device=device) for values in (STARTS, LENS))

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype).to(self.device)

    def packed(self, width: int) -> Tensor:
        rows = self.random(ROWS, width)
        owned = torch.zeros(ROWS, dtype=torch.bool, device=self.device)
        for start, length in zip(STARTS, LENS, strict=True):
            owned[start : start + length] = True
        rows[~owned] = float("nan")
        return rows

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, device=self.device)


def fp64(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def relative(found: Tensor, truth: Tensor) -> float:
    return float((fp64(found) - truth).norm() / truth.norm())


def worst(errors: Iterable[float]) -> float:
    """The largest, which NaN is."""
    return float(torch.tensor(list(errors)).max())


def of_measures(run: Callable[..., float]) -> Case:
    """A case of an op that adds |θ ⊙ g|, |g|, g² or (θ ⊙ g)²: the worst of the four."""
    return lambda inputs: worst(run(inputs, power, weighted) for power in (1, 2) for weighted in (True, False))


def summed(gradients: Iterable[Tensor], w: Tensor, power: int, weighted: bool) -> Tensor:
    """Σ_j |w^weighted ⊙ G_j|^power."""
    weight = fp64(w) if weighted else torch.ones(w.shape, dtype=torch.float64)
    return sum((weight * gradient).abs() ** power for gradient in gradients)


def of_samples(x: Tensor, dy: Tensor) -> Iterator[Tensor]:
    """dY_jᵀ X_j, [n, m], a sample each."""
    for start, length in zip(STARTS, LENS, strict=True):
        yield fp64(dy)[start : start + length].T @ fp64(x)[start : start + length]


def abs_accumulate(inputs: Inputs, *measure: Any) -> float:
    theta, grad, acc = inputs.random(N, M), inputs.random(M, N).T, inputs.zeros(N, M)
    ops.abs_accumulate_(acc, theta, grad, *measure)
    return relative(acc, summed([fp64(grad)], theta, *measure))


def abs_accumulate_many(inputs: Inputs, *measure: Any) -> float:
    shapes = ((N,), (5,), (M, 3))
    theta, grad = ([inputs.random(*shape) for shape in shapes] for _ in range(2))
    acc = [inputs.zeros(*shape) for shape in shapes]
    ops.abs_accumulate_many_(acc, theta, grad, *measure)
    return worst(relative(a, summed([fp64(g)], t, *measure)) for a, t, g in zip(acc, theta, grad, strict=True))


def linear_sensitivity(inputs: Inputs, *measure: Any) -> float:
    w, x, dy, acc = inputs.random(N, M), inputs.packed(M), inputs.packed(N), inputs.zeros(N, M)
    ops.linear_sensitivity_(acc, w, x, dy, inputs.starts, inputs.lens, *measure)
    return relative(acc, summed(of_samples(x, dy), w, *measure))


def linear_sensitivity_tiles(inputs: Inputs, *measure: Any) -> float:
    w, x, dy = inputs.random(N, M), inputs.packed(M), inputs.packed(N)
    tiles = inputs.zeros(-(-N // TILE), -(-M // TILE))
    ops.linear_sensitivity_tiles_(tiles, w, x, dy, inputs.starts, inputs.lens, TILE, *measure)
    padded = torch.nn.functional.pad(summed(of_samples(x, dy), w, *measure), (0, -M % TILE, 0, -N % TILE))
    return relative(tiles, padded.view(tiles.shape[0], TILE, tiles.shape[1], TILE).sum((1, 3)))


def embedding_sensitivity(inputs: Inputs, *measure: Any) -> float:
    w, dy, acc = inputs.random(VOCABULARY, M), inputs.packed(M), inputs.zeros(VOCABULARY, M)
    ids = torch.randint(0, VOCABULARY, (ROWS,), generator=inputs.generator)
    ops.embedding_sensitivity_(acc, w, ids.to(inputs.device), dy, inputs.starts, inputs.lens, *measure)

    def scattered() -> Iterator[Tensor]:
        for start, length in zip(STARTS, LENS, strict=True):
            rows = slice(start, start + length)
            yield torch.zeros(VOCABULARY, M, dtype=torch.float64).index_add_(0, ids[rows], fp64(dy)[rows])

    return relative(acc, summed(scattered(), w, *measure))


def best_window(inputs: Inputs) -> float:
    """Whether the offset is another one: the scores are small integers, whose sums are exact, ties included."""
    score = torch.randint(0, 8, (N, M), generator=inputs.generator).float()
    offset, _ = ops.best_window(score.to(inputs.device), 40, 50)
    table = torch.nn.functional.pad(score.double().cumsum(0).cumsum(1), (1, 0, 1, 0))
    sums = table[40:, 50:] - table[:-40, 50:] - table[40:, :-50] + table[:-40, :-50]
    first = int((sums.flatten() == sums.max()).nonzero()[0])
    return float(offset.tolist() != [first // sums.shape[1], first % sums.shape[1]])


def best_blocks(inputs: Inputs) -> float:
    """Whether other blocks are chosen: sums of small integers are exact, ties included."""
    score = torch.randint(0, 3, (N, M), generator=inputs.generator).float()
    found = ops.best_blocks(score.to(inputs.device), 9, 5, 8, 4)
    sums = score.view(-1, 8, M).sum((1, 2)), score.view(N, -1, 4).sum((0, 2))
    wanted = [s.sort(descending=True, stable=True).indices[:k].sort().values for s, k in zip(sums, (9, 5), strict=True)]
    return float([f.tolist() for f in found] != [w.tolist() for w in wanted])


def excess(a: Tensor, found: tuple[Tensor, Tensor, Tensor]) -> float:
    """How much ‖a − U S Vᵀ‖² is above the optimum."""
    U, S, V = map(fp64, found)
    best = torch.linalg.svdvals(fp64(a))[len(S) :].square().sum()
    return float(abs((fp64(a) - (U * S) @ V.T).square().sum() / best - 1))


def rsvd(inputs: Inputs) -> float:
    whole = inputs.random(300, 200)
    # A window that begins at an odd column, as most real ones do.
    windows = (whole[5:255, 3:160], whole[5:255, 3:160].T)
    return worst(excess(a, ops.rsvd(a, 8)[:3]) for a in windows)


def rsvd_batch(inputs: Inputs) -> float:
    batch = [inputs.random(N + 40 * i, 90 + 7 * i) for i in range(3)]
    U, S, V, _ = ops.rsvd_batch(batch, 8)
    return worst(excess(a, found) for a, *found in zip(batch, U, S, V, strict=True))


# Op -> how far it is from its formula, and how far it may be.
CASES: dict[str, tuple[Case, float]] = {
    "abs_accumulate_": (of_measures(abs_accumulate), 1e-6),
    "abs_accumulate_many_": (of_measures(abs_accumulate_many), 1e-6),
    "linear_sensitivity_": (of_measures(linear_sensitivity), 1e-5),
    "linear_sensitivity_tiles_": (of_measures(linear_sensitivity_tiles), 1e-5),
    "embedding_sensitivity_": (of_measures(embedding_sensitivity), 1e-5),
    "best_window": (best_window, 0.0),
    "best_blocks": (best_blocks, 0.0),
    "rsvd": (rsvd, 0.01),
    "rsvd_batch": (rsvd_batch, 0.01),
}


def unserved(device: torch.device) -> list[str]:
    """Ops that nothing of pkt's own serves on the device, each with the reason."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return ["torch sees no CUDA device"]
    found = implementations(device)
    for op, (used, why) in found.items():
        print(f"{op:26} {used:7} {why}", flush=True)
    return [f"{op} uses {used}: {why}" for op, (used, why) in found.items() if used not in SERVES[device.type]]


def works(device: torch.device) -> list[str]:
    """Every op, and those with several kernels once more for each other that runs there."""
    others = [name for name in candidates.MODULES if name != candidates.STANDARD and device.type == "cuda"]
    able = [name for name in others if candidates.obstacle(name, device) is None]
    return [*CASES, *(f"{op}@{name}" for name in able for op in CASES if op.startswith("linear_sensitivity"))]


def check(work: str, device: torch.device, report: Report) -> bool:
    """Run one op in both working types; whether the device is still usable afterwards."""
    op, _, kernel = work.partition("@")
    os.environ["PKT_KERNEL"] = kernel or candidates.STANDARD
    run, tolerance = CASES[op]
    for dtype in (torch.bfloat16, torch.float32):
        name = f"{work} {str(dtype).removeprefix('torch.')}"
        try:
            error = run(Inputs(device, dtype))
        except Exception as fault:
            report.fail(name, fault)
        else:
            # NaN is not within any tolerance.
            good = error <= tolerance
            report.add({"op": work, "dtype": str(dtype), "error": error, "tolerance": tolerance, "passed": good})
            print(f"{name:36} error {error:.1e} of {tolerance:.0e} {'ok' if good else 'WRONG'}", flush=True)
            if not good:
                report.fail(name, ValueError(f"error {error:.1e} where {tolerance:.0e} is allowed"))
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except Exception:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--implementations", action="store_true", help="only say what serves each op, and whether it may"
    )
    parser.add_argument("--only", default="", help="a pattern that the names of the ops to run begin with")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--after", help=argparse.SUPPRESS)  # the op at which the process before this one broke
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.implementations:
        missing = unserved(device)
        print("\n".join(f"no kernel: {line}" for line in missing))
        return int(bool(missing))
    path = options.out / f"smoke_{device.type}.json"
    report = Report.resumed(path) if options.after else Report(path, device)
    left = [work for work in works(device) if re.match(options.only, work)]
    for work in left[left.index(options.after) + 1 if options.after else 0 :]:
        if not check(work, device, report):
            again = [sys.executable, __file__, "--device", options.device, "--out", str(options.out), "--only"]
            os.execv(sys.executable, [*again, options.only, "--after", work])
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
