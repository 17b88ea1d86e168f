"""Does it help to share a transplant's ranks out over its matrices? The demo's descendant, three ways of the same size.

    python bench/bench_ranks.py                 # writes bench/results/ranks_cpu.json; ten minutes on one thread
    python bench/bench_ranks.py --tiny --out D  # a few rows, which show whether it runs and nothing else

uniform: rank 32 everywhere. energy: singular directions of all matrices by their σ² for each of their parameters. sensitivity:
by σ² as a share of its matrix, times ΣS of the teacher's region on the seeds, for each parameter. All hold at most as many LoRA
parameters as uniform, and at least one direction of every matrix. Each has the α that is best by the seeds; the rate and the
scale of A are those tuned for the transplant, for all three. Reported: loss on the test rows before and after the demo's
training, and the differences to uniform with their intervals over seeds and rows (`pkt.statistics`).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, Report, kind_of
from torch import Tensor

import pkt
from pkt.adapters import Pair
from pkt.demo.measuring import (
    ASSETS,
    OURS,
    RANK,
    SEEDS,
    TEST,
    TRAIN,
    TRAIN_ROWS,
    rows_head,
    settings,
    train_quietly,
)
from pkt.lora import inject, scale_a
from pkt.matching import Cutter, Matrices
from pkt.models import load_model, load_tokenizer
from pkt.seeds import load_seeds
from pkt.starting import best_scale
from pkt.statistics import compare
from pkt.training import row_losses
from pkt.transplanting.content import Delta

WAYS = ("uniform", "energy", "sensitivity")


def shared_out(worth: Mapping[str, Tensor], sizes: Mapping[str, int], budget: int) -> dict[str, int]:
    """The rank of each matrix: its directions, best first, by worth for each parameter until the budget is spent.

    worth: of each direction, falling; sizes: parameters of one direction. Each matrix keeps one.
    """
    every = sorted(
        ((float(w) / sizes[name], name) for name, values in worth.items() for w in values[1:]),
        key=lambda pair: -pair[0],
    )
    ranks = dict.fromkeys(worth, 1)
    left = budget - sum(sizes.values())
    for _, name in every:
        if sizes[name] <= left:
            ranks[name] += 1
            left -= sizes[name]
    return ranks


class Changes:
    """The teacher's change on the descendant's units, decomposed, and ΣS of each region."""

    def __init__(self) -> None:
        self.found = pkt.lineage(ASSETS / "teacher", ASSETS / "descendant", progress=False)
        cutter = Cutter(self.found, Matrices(ASSETS / "teacher"), Matrices(ASSETS / "descendant"))
        content = Delta(cutter, Matrices(ASSETS / "base"))
        rows = load_seeds(SEEDS, load_tokenizer(ASSETS / "teacher"))
        scores = pkt.sensitivity(
            load_model(ASSETS / "teacher", dtype=torch.float32), list(rows.batches(8)), progress=False
        )
        whole = Matrices(ASSETS / "teacher")
        self.kinds, self.svd, self.s = {}, {}, {}
        for target in cutter.new.spec.targets:
            if not content.holds(target):
                continue
            change = content.whole(target)
            matrix = change.t() if target.kind == "embedding" else change
            self.kinds[target.module] = target.kind
            self.svd[target.module] = torch.linalg.svd(matrix, full_matrices=False)

            def source(role: str, layer: int | None, expert: int | None) -> Tensor:
                place, rows = whole.index[role, layer]
                scored = place.oriented(scores[place.parameter])
                return torch.cat([scored[a:b] for a, b in rows])

            self.s[target.module] = float(cutter.matrix(target, source).sum())

    def ranks(self, way: str, rank: int) -> dict[str, int]:
        sizes = {name: u.shape[0] + vh.shape[1] for name, (u, _, vh) in self.svd.items()}
        most = {name: min(rank, len(s)) for name, (_, s, _) in self.svd.items()}
        if way == "uniform":
            return most
        worth = {name: s.square() for name, (_, s, _) in self.svd.items()}
        if way == "sensitivity":
            worth = {name: w / w.sum() * self.s[name] for name, w in worth.items()}
        return shared_out(worth, sizes, sum(most[n] * sizes[n] for n in sizes))

    def pairs(self, ranks: Mapping[str, int]) -> dict[str, Pair]:
        """B = U√Σ, A = √ΣVᵀ."""
        found = {}
        for name, (u, s, vh) in self.svd.items():
            r = ranks[name]
            root = s[:r].sqrt()
            found[name] = Pair((vh[:r] * root[:, None]).contiguous(), (u[:, :r] * root).contiguous(), self.kinds[name])
        return found

    def held(self, ranks: Mapping[str, int]) -> float:
        """Share of the whole change's squared norm."""
        kept = sum(float(s[: ranks[n]].square().sum()) for n, (_, s, _) in self.svd.items())
        return kept / sum(float(s.square().sum()) for _, s, _ in self.svd.values())


def by_row(model: Any, rows: Any) -> list[float]:
    """Each row's loss, in nats a token."""
    return [loss / count for loss, count in row_losses(model, rows)]


def run(report: Report, seeds: int, rank: int, train_rows: int, test_rows: int, start: Any) -> dict[str, Any]:
    """Add a row for each way; the losses by way [seeds, rows]."""
    torch.set_num_threads(1)
    changes, tokenizer = Changes(), load_tokenizer(ASSETS / "student")
    rows = {name: load_seeds(path, tokenizer) for name, path in (("train", TRAIN), ("test", TEST), ("seeds", SEEDS))}
    rows["test"], rows["train"] = rows_head(rows["test"], test_rows), rows_head(rows["train"], train_rows)
    setting = settings()[OURS]
    losses: dict[str, Any] = {}
    for way in WAYS:
        ranks = changes.ranks(way, rank)
        pairs = changes.pairs(ranks)
        student = load_model(ASSETS / "descendant", dtype=torch.float32)
        alpha, by_alpha = best_scale(student, pairs, rows["seeds"], progress=False)
        root = math.sqrt(alpha)
        kept = {name: Pair(p.A * root, p.B * root, p.kind) for name, p in pairs.items()}
        moved = dataclasses.replace(start, pairs=kept)
        before, after = [], []
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = inject(load_model(ASSETS / "descendant", dtype=torch.float32), moved, mode="add")
            scale_a(model, setting.a_scale)
            if not before:
                before = by_row(model, rows["test"])
            train_quietly(model, rows["train"], setting.lr, seed)
            after.append(by_row(model, rows["test"]))
            print(
                f"{way}, seed {seed}: {sum(before) / len(before):.4f} -> {sum(after[-1]) / len(after[-1]):.4f}",
                flush=True,
            )
        losses[way] = after, before
        report.add(
            {
                "way": way,
                "parameters": sum(p.A.numel() + p.B.numel() for p in kept.values()),
                "ranks": {"least": min(ranks.values()), "most": max(ranks.values()), "all": ranks},
                "energy": changes.held(ranks),
                "alpha": alpha,
                "seed_losses": by_alpha,
                "before": sum(before) / len(before),
                "after": [sum(found) / len(found) for found in after],
            }
        )
    return losses


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    seeds, train_rows, test_rows = (2, 32, 4) if given.tiny else (given.seeds, TRAIN_ROWS, 10**6)
    report = Report(given.out / f"ranks_{kind_of('cpu', given.tiny)}.json", "cpu", seeds=seeds, rank=RANK,
                    setting=settings()[OURS].__dict__)  # fmt: skip
    start = pkt.transplant(
        ASSETS / "teacher", ASSETS / "descendant", SEEDS, base=ASSETS / "base", rank=RANK, progress=False
    )
    losses = run(report, seeds, RANK, train_rows, test_rows, start)
    told = {}
    for way in WAYS[1:]:
        after = compare(losses[way][0], losses["uniform"][0])
        told[way] = {**after.__dict__, "before": sum(losses[way][1]) / len(losses[way][1])
                     - sum(losses["uniform"][1]) / len(losses["uniform"][1])}  # fmt: skip
        print(f"{way} - uniform after training: {after.mean:+.4f} [{after.low:+.4f}, {after.high:+.4f}]")
    report.save(differences_to_uniform=told)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
