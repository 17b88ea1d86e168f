"""By what a smaller model's units should be chosen: `pkt shrink`'s four scores, and layers alone, before and after healing.

    python bench/bench_shrink.py                  # writes bench/results/shrink_cpu.json; ten minutes of one core
    python bench/bench_shrink.py --tiny --out D   # shows whether it runs, and nothing else

On the demo's base, a toy of 1.6 M parameters, cut to its descendant's shape; "layers only" has about as many parameters, all of the
widest. Healing is the demo's own (examples/make_demo_models.py), of equal tokens for all, on general text that is in no
file; the loss is measured on data/general.jsonl. "louder" is the loss once cut with norm gains times √(H/h), which is what zeros in
place of the other units would give.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, Report, kind_of

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from demo_text import stream  # noqa: E402
from make_demo_models import CONTEXT, HALF, SEED, make_data, nll, train, write_jsonl  # noqa: E402

import pkt  # noqa: E402
from pkt.matching import Matrices, UnitScores, shape_of, shrink_to  # noqa: E402
from pkt.models import load_model, load_tokenizer  # noqa: E402
from pkt.pruning.activations import activation_scores  # noqa: E402
from pkt.seeds import load_seeds  # noqa: E402

ASSETS = ROOT / "pkt" / "demo" / "assets"
SCORES = ("sensitivity", "activation", "magnitude", "random")
LOUDER = "sensitivity, gains × √(H/h)"
BATCH, RATE = 32, 2e-3


def units_by(score: str, model: Any, seeds: Any, seed: int) -> UnitScores:
    units = UnitScores(Matrices(model))
    if score == "random":
        units.draw(torch.Generator().manual_seed(seed))
    elif score == "magnitude":
        units.add({name: p.detach().abs() for name, p in model.named_parameters()})
    elif score == "activation":
        units.add(activation_scores(model, units.old.spec, seeds, progress=False))
    else:
        units.add(pkt.sensitivity(model, seeds.batches(8), progress=False))
    return units


@torch.no_grad()
def scale_gains(small: Any, factor: float) -> None:
    for gain in (p for p in small.parameters() if p.ndim == 1):
        gain.mul_(factor)


def louder(small: Any, factor: float, tokenizer: Any, rows: Any) -> float:
    """The loss with every gain times `factor`; they are put back."""
    scale_gains(small, factor)
    found = nll(small, tokenizer, rows)
    scale_gains(small, 1 / factor)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--steps", type=int, default=200, help=f"of healing, {BATCH} rows each")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each, and draws of random units")
    parser.add_argument("--scores", nargs="+", help="only these rows; the file's others are kept")
    options = parser.parse_args()
    if options.tiny:
        options.steps, options.seeds = 2, 1
    base, tokenizer = load_model(ASSETS / "base", dtype=torch.float32), load_tokenizer(ASSETS / "base")
    splits, taken = make_data(quick=False)
    general = splits["general"][: 20 if options.tiny else None]
    drawn = stream(SEED + 30, 0.0, taken)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "shrink_seeds.jsonl"
    write_jsonl(file, [drawn() for _ in range(64)])
    seeds = load_seeds(file, tokenizer, max_length=CONTEXT)
    file.unlink()
    whole = shape_of(Matrices(base))
    teacher = {"parameters": sum(p.numel() for p in base.parameters()), "nll": nll(base, tokenizer, general)}
    path = options.out / f"shrink_{kind_of('cpu', options.tiny)}.json"
    facts = {
        "teacher": teacher,
        "shape": str(HALF),
        "seeds": options.seeds,
        "steps": options.steps,
        "batch": BATCH,
        "lr": RATE,
    }
    if options.scores and path.is_file():
        report = Report.resumed(path)
        if {name: report.content[name] for name in facts} != facts:
            raise pkt.PktError(f"{path} is of other settings; measure all of it again")
    else:
        report = Report(path, "cpu", **facts, healed_tokens=0)
    # One layer, whole, is nearest to the descendant's parameters.
    depth = type(whole)(whole.hidden, whole.neurons, whole.groups, 1)
    shapes = {**dict.fromkeys(SCORES, HALF), LOUDER: HALF, "sensitivity, layers only": depth}
    for score in options.scores or shapes:
        shape = shapes[score]
        factor = (whole.hidden / shape.hidden) ** 0.5
        row: dict[str, Any] = {"score": score, "healed": [], "cuts": []}
        for seed in range(options.seeds):
            units = units_by(score.split(",")[0], base, seeds, seed)
            small = shrink_to(base, units.choose(shape), rescale=False)
            if seed == 0:
                row |= {"parameters": sum(p.numel() for p in small.parameters()), "shape": str(shape)}
                row["louder"] = louder(small, factor, tokenizer, general)
            if score == LOUDER:
                scale_gains(small, factor)
            row["cuts"].append(nll(small, tokenizer, general))
            counted = Counted(stream(SEED + 22 + 100 * seed, 0.0, taken), tokenizer)
            with contextlib.redirect_stdout(io.StringIO()):
                train(small, tokenizer, counted, steps=options.steps, batch=BATCH, lr=RATE, name=score)
            row["healed"].append(nll(small, tokenizer, general))
            print(f"{score} seed {seed}: {row['cuts'][-1]:.3f} once cut, {row['healed'][-1]:.3f} healed", flush=True)
        report.content["rows"] = [one for one in report.rows if one["score"] != score]
        report.add(row)
        report.save(healed_tokens=counted.tokens * options.steps // counted.steps_of(BATCH))
    return report.finish()


class Counted:
    """A stream of rows that knows how many tokens it gave."""

    def __init__(self, rows: Any, tokenizer: Any) -> None:
        self.rows, self.tokenizer, self.count, self.tokens = rows, tokenizer, 0, 0

    def __call__(self) -> Any:
        row = self.rows()
        text = row.get("text") or "".join(m["content"] for m in row["messages"])
        self.tokens += len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        self.count += 1
        return row

    def steps_of(self, batch: int) -> int:
        """How many steps its rows would be: some are drawn that no step comes to."""
        return max(1, self.count // batch)


if __name__ == "__main__":
    sys.exit(main())
