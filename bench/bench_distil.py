"""The distillation arm on the demo: plain LoRA and the transplant on the descendant, with and without the teacher's targets.

    python bench/bench_distil.py               # writes bench/results/distil_cpu.json
    python bench/bench_distil.py --seeds 2     # a quick look, written nowhere

Every arm trains on the same rows for the same number of steps, five seeds each; with targets, half of the loss is the teacher's (64
draws an answer token). Each arm's learning rate is chosen among half, once and twice the demo's for its start, by the loss on rows
held out from training, with a seed that is not reported; the scale of A is the demo's. General text stands beside the task.
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
    """A start of the demo's, with the teacher's targets or without."""

    start: str
    taught: bool

    @property
    def name(self) -> str:
        return f"{self.start}, half the loss the teacher's" if self.taught else self.start


ARMS = [Arm(start, taught) for start in STARTS for taught in (False, True)]


def trained(arm: Arm, out: Path, targets: Any, lr: float, seed: int, epochs: float) -> Any:
    """The model of one training, and its tokenizer's rows."""
    from pkt.demo import measuring as demo
    from pkt.models import load_tokenizer
    from pkt.options import Training
    from pkt.seeds import load_seeds
    from pkt.training import fit
    from pkt.training.targets import Distillation

    torch.set_num_threads(1)
    rows = demo.rows_head(load_seeds(demo.TRAIN, load_tokenizer(demo.ASSETS / "student")), demo.TRAIN_ROWS)
    model = demo.begin(demo.METHODS[arm.start], out, seed, demo.settings()[arm.start].a_scale)
    taught = Distillation(targets, MIX, targets.places(rows)) if arm.taught else None
    options = Training(
        epochs, demo.BATCH, demo.BATCH, lr, warmup=0.1, scheduler="cosine", save_steps=None, seed=seed, report_to="none"
    )
    with tempfile.TemporaryDirectory(prefix="pkt-bench-") as folder:
        fit(model, rows, Path(folder), options, quietly=True, taught=taught)
    return model


def held_out(arm: Arm, out: Path, targets: Any, lr: float) -> float:
    """Nats a token on the rows held out from training, after half the steps."""
    from pkt.demo import measuring as demo
    from pkt.models import load_tokenizer
    from pkt.seeds import Seeds, load_seeds
    from pkt.training import row_losses

    rows = load_seeds(demo.TRAIN, load_tokenizer(demo.ASSETS / "student"))
    model = trained(arm, out, targets, lr, TUNING_SEED, demo.EPOCHS / 2)
    losses = row_losses(model, Seeds(list(rows[-demo.HELD_OUT :]), rows.source, rows.pad_id))
    return sum(loss for loss, _ in losses) / sum(count for _, count in losses)


def chosen(out: Path, targets: Any) -> dict[Arm, float]:
    """Each arm's learning rate."""
    from pkt.demo import measuring as demo

    found = {}
    for arm in ARMS:
        rates = [demo.settings()[arm.start].lr * by for by in ROUNDS]
        losses = {lr: held_out(arm, out, targets, lr) for lr in rates}
        found[arm] = min(losses, key=lambda lr: losses[lr])
        print(f"{arm.name}: {', '.join(f'{lr:g}: {loss:.3f}' for lr, loss in losses.items())}", flush=True)
    return found


def verdict(runs: dict[Arm, list[dict[str, Any]]]) -> tuple[list[str], list[dict[str, Any]]]:
    """Each start with the teacher's targets against the same without, seeds × items, p adjusted over the starts."""
    from pkt.demo.summing import LEVEL, items
    from pkt.studying import compare, holm

    names = {"task": "NLL", "match": "right answers", "general": "general text"}
    lines: dict[str, list[str]] = {start: [] for start in STARTS}
    found = []
    for figure, spoken in names.items():
        each = [
            compare(items(runs[Arm(start, True)], figure), items(runs[Arm(start, False)], figure), level=LEVEL)
            for start in STARTS
        ]
        for start, c, p in zip(STARTS, each, holm([c.p for c in each]), strict=True):
            times, unit = (100, " points") if figure == "match" else (1, "")
            sure = "" if p < 1 - LEVEL else ", which may be chance"
            lines[start].append(
                f"{spoken} {times * c.mean:+.3g}{unit} [{times * c.low:+.3g}, {times * c.high:+.3g}]{sure}"
            )
            found.append({"start": start, "figure": figure, **c.__dict__, "adjusted": p})
    return [f"{start}, with the teacher's targets minus without: {'; '.join(lines[start])}" for start in STARTS], found


def main() -> int:
    import pkt
    from pkt.demo import measuring as demo
    from pkt.demo.preparing import prepare
    from pkt.demo.summing import summed
    from pkt.models import load_tokenizer
    from pkt.seeds import load_seeds

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    tokenizer = load_tokenizer(demo.ASSETS / "student")
    with tempfile.TemporaryDirectory(prefix="pkt-bench-") as scratch:
        out = Path(scratch)
        prepare(out, lambda text: print(text, flush=True))
        rows = demo.rows_head(load_seeds(demo.TRAIN, tokenizer), demo.TRAIN_ROWS)
        targets = pkt.teach(demo.ASSETS / "teacher", rows, dtype=torch.float32, progress=False)
        rates = chosen(out, targets)
        runs: dict[Arm, list[dict[str, Any]]] = {}
        for arm in ARMS:
            runs[arm] = []
            for seed in range(options.seeds):
                model = trained(arm, out, targets, rates[arm], seed, demo.EPOCHS)
                runs[arm].append({"after": demo.measured(model, tokenizer)})
            print(f"{arm.name}: NLL {summed(runs[arm])['nll_mean']:.3f}", flush=True)
    arms = []
    for arm in ARMS:
        values = {name: summed(runs[arm])[name] for name in ("nll", "exact_match", "general")}
        arms.append(
            {
                "name": arm.name,
                "lr": rates[arm],
                "a_scale": demo.settings()[arm.start].a_scale,
                **values,
                "mean": {name: statistics.mean(found) for name, found in values.items()},
                "std": {name: statistics.stdev(found) for name, found in values.items()},
            }
        )
    lines, comparisons = verdict(runs)
    facts = machine("cpu")["machine"]
    result = {
        "what": f"The demo's descendant after {len(rows)} problems, {demo.EPOCHS:g} epochs in steps of {demo.BATCH}, "
        f"{options.seeds} seeds; the teacher's own NLL on these problems is {targets.told['nll']:.4f}",
        "machine": {**facts, "threads": 1},
        "shared": load > 0.5,
        "seeds": options.seeds,
        "mix": MIX,
        "draws": targets.size,
        "teacher_nll": targets.told["nll"],
        "bytes_a_token": targets.bytes_a_token,
        "arms": arms,
        "comparisons": comparisons,
        "verdict": lines,
    }
    print(json.dumps(result, indent=2))
    if options.seeds == 5:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "distil_cpu.json").write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
