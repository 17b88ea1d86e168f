"""By what a smaller model's units should be chosen: `pkt shrink`'s four scores and what else is done, before and after healing.

    python bench/bench_shrink.py                  # writes bench/results/shrink_cpu.json; ten minutes of one core
    python bench/bench_shrink.py --tiny --out D   # shows whether it runs, and nothing else

On the demo's base, a toy of 1.6 M parameters, cut to its descendant's shape. Beside the scores: units at random, weight
subcloning's rule (arXiv 2312.09299), and "depth only", which has about as many parameters in whole layers. All are made as
`pkt shrink` makes a model, norm gains times √(H/h), but for the row that says otherwise. Healing is the demo's own
(examples/make_demo_models.py), of equal tokens for all, on general text that is in no file; the loss is measured on
data/general.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
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
from pkt.matching import Matrices, Shape, UnitScores, shape_of, shrink_to, shrunk_model  # noqa: E402
from pkt.models import load_model, load_tokenizer  # noqa: E402
from pkt.pruning.activations import activation_scores  # noqa: E402
from pkt.pruning.sizes import parameters  # noqa: E402
from pkt.seeds import load_seeds  # noqa: E402

ASSETS = ROOT / "pkt" / "demo" / "assets"
SCORES = ("sensitivity", "activation", "magnitude", "random", "subcloning")
DEPTH, PLAIN = "depth only", "sensitivity, gains as they were"
BATCH, RATE = 32, 2e-3


def units_by(score: str, model: Any, seeds: Any, seed: int = 0) -> UnitScores:
    """The units' scores by one of `SCORES`."""
    units = UnitScores(Matrices(model))
    if score == "random":
        units.draw(torch.Generator().manual_seed(seed))
    elif score == "magnitude":
        units.add({name: p.detach().abs() for name, p in model.named_parameters()})
    elif score == "activation":
        units.add(activation_scores(model, units.old.spec, seeds, progress=False))
    elif score == "subcloning":
        _subcloning(units, model, seeds)
    else:
        units.add(pkt.sensitivity(model, seeds.batches(8), progress=False))
    return units


@torch.no_grad()
def _subcloning(units: UnitScores, model: Any, seeds: Any) -> None:
    """Units by their mean absolute activation, blocks by how much they change what goes through them; the first and last stay.

    Hidden units by that of the residual stream over all blocks; heads, of which the paper keeps all, by what they give to
    the output projection.
    """
    index, layers = units.old.index, units.old.spec.layers
    keep = torch.zeros(0)

    def sums(rows: Any) -> torch.Tensor:
        return rows[keep].abs().double().sum(0)

    def block(layer: int) -> Any:
        def see(module: Any, args: Any, kwargs: Any, out: Any) -> None:
            before, after = args[0] if args else kwargs["hidden_states"], out[0] if isinstance(out, tuple) else out
            units.hidden += sums(after)
            units.layers[layer] += float(((after - before)[keep].norm(dim=1) / after[keep].norm(dim=1)).double().sum())

        return see

    def feed(axis: str, layer: int) -> Any:
        def see(module: Any, args: Any) -> None:
            getattr(units, axis)[layer] += sums(args[0]).view(len(getattr(units, axis)[layer]), -1).sum(1)

        return see

    hooks = []
    for layer in range(len(units.layers)):
        one = model.get_submodule(f"{layers}.{layer}")
        hooks.append(one.register_forward_hook(block(layer), with_kwargs=True))
        for role, axis in (("down", "neurons"), ("o", "queries")):
            module = model.get_submodule(index[role, layer][0].module)
            hooks.append(module.register_forward_pre_hook(feed(axis, layer)))
    for batch in seeds.batches(8):
        keep = batch["attention_mask"].bool()
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    for hook in hooks:
        hook.remove()
    for layer, queries in enumerate(units.queries):
        units.groups[layer] = queries.view(len(units.groups[layer]), -1).sum(1)
    units.layers[[0, -1]] = torch.inf


def depth_near(whole: Shape, model: Any, wanted: int) -> Shape:
    """Whole layers only: as many as have the parameters nearest to `wanted`."""
    old = Matrices(model)
    shapes = [dataclasses.replace(whole, layers=count) for count in range(1, whole.layers + 1)]
    return min(shapes, key=lambda shape: abs(parameters(shrunk_model(old, shape)) - wanted))


def resumed(path: Path, facts: dict[str, Any]) -> Report:
    """The report that is there. Raises `PktError` where it is of other settings."""
    report = Report.resumed(path)
    if {name: report.content[name] for name in facts} != facts:
        raise pkt.PktError(f"{path} is of other settings; measure all of it again")
    return report


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
    resuming = options.scores and path.is_file()
    report = resumed(path, facts) if resuming else Report(path, "cpu", **facts, healed_tokens=0)
    depth = depth_near(whole, base, parameters(shrunk_model(Matrices(base), HALF)))
    shapes = {**dict.fromkeys(SCORES, HALF), DEPTH: depth, PLAIN: HALF}
    for score in options.scores or shapes:
        shape = shapes[score]
        row: dict[str, Any] = {"score": score, "shape": str(shape), "healed": [], "cuts": []}
        rule = "sensitivity" if score in (DEPTH, PLAIN) else score
        for seed in range(options.seeds):
            if seed == 0 or rule == "random":
                units = units_by(rule, base, seeds, seed)
            small = shrink_to(base, units.choose(shape), rescale=score != PLAIN)
            row["parameters"] = sum(p.numel() for p in small.parameters())
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
