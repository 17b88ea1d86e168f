"""A descendant for a teacher of one's own: shrink it, heal the small model, tune the teacher, move what it learnt.

    python examples/chain.py                 # on the demo base; some minutes on 2 cores, writes bench/results/chain_cpu.json
    python examples/chain.py --quick         # a few steps of each, written nowhere

Every step is one function of pkt's, the same as a command:

    pkt shrink BASE general.jsonl --like DESCENDANT --out small
    pkt train small general.jsonl --full --out healed
    pkt train BASE problems.jsonl --full --out tuned
    pkt lineage tuned healed
    pkt transplant tuned healed seeds.jsonl --base BASE --out moved
    pkt train healed moved train.jsonl --out run        # and, to compare, pkt train healed train.jsonl --out plain
    pkt evaluate healed test.jsonl --adapter run --exact-match

The healing text and the problems are drawn from the demo's grammars; no row of the test files is among them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from demo_text import stream
from make_demo_models import SEED, make_data, write_jsonl
from measuring import RESULTS, machine

import pkt
from pkt.models import load_tokenizer
from pkt.training import evaluate

ASSETS = Path(pkt.__file__).parent / "demo" / "assets"
ROWS, RANK = 512, 32
# Steps of healing and of tuning the teacher, 32 rows each, and their rates; rates of the two LoRA runs, as the demo tuned them.
FULL, QUICK = (1000, 600), (3, 3)
HEAL_LR, TUNE_LR, KEPT_LR, PLAIN_LR = 2e-3, 1e-3, 2.5e-3, 1e-2


def written(folder: Path, name: str, count: int, task: float, seed: int, taken: set[str]) -> Path:
    """So many rows of the demo's grammars, this share of them problems."""
    rows = stream(seed, task, taken)
    write_jsonl(folder / name, [rows() for _ in range(count)])
    return folder / name


def figures(student: Path, adapter: Path | None = None) -> dict[str, float]:
    """NLL and exact match of the task's test rows, and NLL of general text."""
    from pkt.lora import load_with_adapter

    model, tokenizer = load_with_adapter(student, adapter, dtype=torch.float32), load_tokenizer(student)
    test, general = (pkt.load_seeds(ASSETS / "data" / f"{n}.jsonl", tokenizer) for n in ("test", "general"))
    found = evaluate(model, test, tokenizer=tokenizer, exact_match=True, max_new_tokens=40)
    return {"nll": found.nll, "exact_match": found.exact_match or 0.0, "general": evaluate(model, general).nll}


def chain(folder: Path, heal: int, tune: int) -> dict[str, Any]:
    """Run all steps into a folder; the table's rows, and what was found on the way."""
    begin, table, told = time.perf_counter(), {}, {}
    base, data = ASSETS / "base", ASSETS / "data"
    taken = make_data(quick=False)[1]
    general = written(folder, "general.jsonl", 32 * heal, 0.0, SEED + 40, taken)
    problems = written(folder, "problems.jsonl", 32 * tune, 0.7, SEED + 41, taken)
    few = written(folder, "some.jsonl", 64, 0.0, SEED + 42, taken)

    def note(name: str, student: Path, adapter: Path | None = None) -> None:
        table[name] = figures(student, adapter)
        print(f"{time.perf_counter() - begin:5.0f} s  {name}: {table[name]}", flush=True)

    def trained(student: Path, start: Any, rows: Path, out: str, **options: Any) -> Path:
        pkt.train(
            student, start, rows, folder / out, batch_size=32, micro_batch=32, scheduler="cosine", save_steps=10_000,
            report_to="none", quietly=True, **options,
        )  # fmt: skip
        return folder / out

    note("base", base)
    made = pkt.shrink(base, few, like=ASSETS / "descendant", out=folder / "small", progress=False)
    told["shape"] = str(made)
    note("small: shrunk", folder / "small")
    healed = trained(
        folder / "small", None, general, "healed", full=True, lr=HEAL_LR, warmup=0.1, max_steps=heal, seed=SEED
    )
    note("healed on general text", healed)
    tuned = trained(base, None, problems, "tuned", full=True, lr=TUNE_LR, warmup=0.1, max_steps=tune, seed=SEED + 1)
    note("teacher: base, tuned on the task", tuned)
    found = pkt.lineage(tuned, healed, progress=False)
    told["lineage"] = f"{found.verdict}: {found.reason}"
    moved = pkt.transplant(
        tuned, healed, data / "seeds.jsonl", base=base, rank=RANK, out=folder / "moved", progress=False
    )
    told["transplant"] = moved.provenance["told"]["kept at"]
    note("healed, transplant, not trained", healed, folder / "moved")
    short = folder / "train.jsonl"
    rows = (data / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:ROWS]
    short.write_text("".join(rows), encoding="utf-8")
    for name, start, lr, out in (
        ("healed, transplant, trained", folder / "moved", KEPT_LR, "run"),
        ("healed, plain LoRA, trained as long", None, PLAIN_LR, "plain"),
    ):
        lora = {} if start is not None else {"rank": RANK}
        run = trained(healed, start, short, out, lr=lr, warmup=0.1, epochs=2.0, seed=SEED, **lora)
        pkt.finalize(run, folder / f"{out}-adapter")
        note(name, healed, folder / f"{out}-adapter")
    return {"steps": {"heal": heal, "tune": tune}, "rows": ROWS, "told": told, "table": table,
            "seconds": time.perf_counter() - begin}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps of each")
    parser.add_argument("--keep", type=Path, help="keep the folders here")
    args = parser.parse_args()
    folder = args.keep or Path(tempfile.mkdtemp(prefix="pkt-chain-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        found = chain(folder, *(QUICK if args.quick else FULL))
    finally:
        if args.keep is None:
            shutil.rmtree(folder)
    if not args.quick:
        result = {**machine("cpu"), **found}
        (RESULTS / "chain_cpu.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
