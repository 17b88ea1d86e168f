"""The distillation arm on the demo: plain LoRA and the transplant on the descendant, with and without the teacher's targets.

    python bench/bench_distil.py               # writes bench/results/distil_cpu.json
    python bench/bench_distil.py --seeds 2     # a quick look, written nowhere

Every arm trains on the same rows, five seeds each; with targets, half of the loss is the teacher's (64 draws an answer token).
They are compared at equal steps and at equal cost: some arms without targets go on for as many steps more as the teacher's
reading of these rows costs, in operations (2 for each of its weights and tokens; a step has 4 for each weight of the student
that rests and 6 for each that learns). What the transplant's search for a scale costs is charged to nobody. Each arm's learning
rate is chosen among half, once and twice the demo's for its start, by the loss on rows held out from training, with half its
steps and a seed that is not reported; the scale of A is the demo's. General text stands beside the task.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, machine

ROUNDS, MIX, TUNING_SEED = (0.5, 1.0, 2.0), 0.5, 1000
STARTS = ("plain LoRA", "transplant")


@dataclass(frozen=True)
class Arm:
    """A start of the demo's: with the teacher's targets or without, or without for as long as reading the teacher takes."""

    start: str
    taught: bool = False
    longer: bool = False

    @property
    def name(self) -> str:
        more = (
            ", half the loss the teacher's"
            if self.taught
            else ", longer by the teacher's reading"
            if self.longer
            else ""
        )
        return self.start + more


ARMS = [arm for start in STARTS for arm in (Arm(start), Arm(start, taught=True), Arm(start, longer=True))]
# What is held against what, and what the two have alike.
PAIRS = [
    *((Arm(start, taught=True), Arm(start), "steps") for start in STARTS),
    (Arm(STARTS[0], taught=True), Arm(STARTS[1]), "steps"),
    *((Arm(start, taught=True), Arm(start, longer=True), "cost") for start in STARTS),
    (Arm(STARTS[0], taught=True), Arm(STARTS[1], longer=True), "cost"),
]


def reading_epochs(out: Path) -> float:
    """Epochs of training that cost what the teacher's reading of the rows does."""
    from pkt.demo import measuring as demo
    from pkt.models import Model
    from pkt.pruning.sizes import parameters

    student, teacher = (parameters(Model.of(demo.ASSETS / name)) for name in ("descendant", "teacher"))
    model = demo.begin(demo.METHODS[STARTS[0]], out, 0, 1.0)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return 2 * teacher / (4 * student + 6 * learning)


class Trainings:
    """What all trainings share: the transplant's folder, the teacher's targets, the rows, what the teacher's reading costs."""

    def __init__(self, out: Path) -> None:
        import pkt
        from pkt.demo import measuring as demo

        self.out, self.every = out, demo.rows_of(demo.TRAIN)
        self.rows = demo.rows_head(self.every, demo.TRAIN_ROWS)
        self.targets = pkt.teach(demo.ASSETS / "teacher", self.rows, dtype=torch.float32, progress=False)
        self.longer = reading_epochs(out)

    def epochs(self, arm: Arm) -> float:
        from pkt.demo import measuring as demo

        return demo.EPOCHS + (self.longer if arm.longer else 0.0)

    def train(self, arm: Arm, lr: float, seed: int, share: float = 1.0) -> Any:
        """The model of one training, of this share of the arm's epochs."""
        from pkt.demo import measuring as demo
        from pkt.options import Training
        from pkt.training import fit
        from pkt.training.targets import Distillation

        model = demo.begin(demo.METHODS[arm.start], self.out, seed, demo.settings()[arm.start].a_scale)
        taught = Distillation(self.targets, MIX, self.targets.places(self.rows)) if arm.taught else None
        epochs = share * self.epochs(arm)
        options = Training(
            epochs, demo.BATCH, demo.BATCH, lr, warmup=0.1, scheduler="cosine", save_steps=None, seed=seed
        )
        with tempfile.TemporaryDirectory(prefix="pkt-bench-") as folder:
            fit(model, self.rows, Path(folder), options, quietly=True, taught=taught)
        return model

    def held_out(self, arm: Arm, lr: float) -> float:
        """Nats a token on the rows held out from training, after half the steps."""
        from pkt.demo import measuring as demo
        from pkt.seeds import Seeds
        from pkt.training import row_losses

        model = self.train(arm, lr, TUNING_SEED, 0.5)
        losses = row_losses(model, Seeds(list(self.every[-demo.HELD_OUT :]), self.every.source, self.every.pad_id))
        return sum(loss for loss, _ in losses) / sum(count for _, count in losses)

    def rate(self, arm: Arm) -> float:
        """An arm's learning rate."""
        from pkt.demo import measuring as demo

        losses = {lr: self.held_out(arm, lr) for lr in (demo.settings()[arm.start].lr * by for by in ROUNDS)}
        print(f"{arm.name}: {', '.join(f'{lr:g}: {loss:.3f}' for lr, loss in losses.items())}", flush=True)
        return min(losses, key=lambda lr: losses[lr])


def verdict(runs: dict[Arm, list[dict[str, Any]]]) -> tuple[list[str], list[dict[str, Any]]]:
    """The arms with the teacher's targets against the others, seeds × items, p of one figure adjusted over all pairs."""
    from pkt.demo.summing import LEVEL, items
    from pkt.statistics import compare, holm

    lines: list[list[str]] = [[] for _ in PAIRS]
    found = []
    for figure, spoken in {"task": "NLL", "match": "right answers", "general": "general text"}.items():
        each = [compare(items(runs[a], figure), items(runs[b], figure), level=LEVEL) for a, b, _ in PAIRS]
        for number, (c, p) in enumerate(zip(each, holm([c.p for c in each]), strict=True)):
            times, unit = (100, " points") if figure == "match" else (1, "")
            sure = "" if p < 1 - LEVEL else ", which may be chance"
            lines[number].append(
                f"{spoken} {times * c.mean:+.3g}{unit} [{times * c.low:+.3g}, {times * c.high:+.3g}]{sure}"
            )
            a, b, alike = PAIRS[number]
            found.append({"a": a.name, "b": b.name, "equal": alike, "figure": figure, **c.__dict__, "adjusted": p})
    told = [
        f"at equal {alike}, {a.name} minus {b.name}: {'; '.join(line)}"
        for (a, b, alike), line in zip(PAIRS, lines, strict=True)
    ]
    return told, found


def arm_facts(arm: Arm, lr: float, epochs: float, done: list[dict[str, Any]]) -> dict[str, Any]:
    from pkt.demo import measuring as demo
    from pkt.demo.summing import summed

    values = {name: summed(done)[name] for name in ("nll", "exact_match", "general")}
    return {
        "name": arm.name,
        "lr": lr,
        "a_scale": demo.settings()[arm.start].a_scale,
        "epochs": epochs,
        **values,
        "mean": {name: statistics.mean(found) for name, found in values.items()},
        "std": {name: statistics.stdev(found) for name, found in values.items()},
    }


def main() -> int:
    from pkt.demo import measuring as demo
    from pkt.demo.preparing import prepare

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="pkt-bench-") as scratch:
        out = Path(scratch)
        prepare(out, lambda text: print(text, flush=True))
        trainings = Trainings(out)
        arms, runs = [], {}
        for arm in ARMS:
            lr, runs[arm] = trainings.rate(arm), []
            for seed in range(options.seeds):
                runs[arm].append({"after": demo.measured(trainings.train(arm, lr, seed))})
            arms.append(arm_facts(arm, lr, trainings.epochs(arm), runs[arm]))
            print(f"{arm.name}: NLL {arms[-1]['mean']['nll']:.3f}", flush=True)
    told, targets = verdict(runs), trainings.targets
    result = {
        "what": f"The demo's descendant after {demo.TRAIN_ROWS} problems, {demo.EPOCHS:g} epochs in steps of {demo.BATCH}, "
        f"{options.seeds} seeds; the teacher's own NLL on these problems is {targets.told['nll']:.4f}",
        "machine": {**machine("cpu")["machine"], "threads": 1},
        "shared": load > 0.5,
        "seeds": options.seeds,
        "mix": MIX,
        "draws": targets.size,
        "teacher_nll": targets.told["nll"],
        "bytes_a_token": targets.bytes_a_token,
        "reading_epochs": trainings.longer,
        "arms": arms,
        "comparisons": told[1],
        "verdict": told[0],
    }
    print(json.dumps(result, indent=2))
    if options.seeds == 5:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "distil_cpu.json").write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
