"""Learning rate and scale of A of every method of `pkt demo`, on rows held out from training: pkt/demo/tuning.json.

    python bench/tune_demo.py                        # some five minutes on 2 cores
    python bench/tune_demo.py --only "plain LoRA"    # these methods alone; the others keep what they have

The same search and the same training seed, which the demo does not report, for all methods: the rate at three times PEFT's A,
extended where the best lies at an end; then A's scale at that rate.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from pkt.demo.measuring import METHODS, TUNING, Setting, tune
from pkt.demo.preparing import prepare
from pkt.demo.workers import workers

RATES = [0.005, 0.01, 0.02]
SCALES = [1.0, 3.0, 8.0]
SEED = 1000
EXTENSIONS = 2

Tried = dict[str, dict[Setting, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    names = parser.parse_args().only
    tried: Tried = {name: {} for name in names}
    with tempfile.TemporaryDirectory(prefix="pkt-tune-") as folder, workers() as pool:
        out = Path(folder)
        prepare(out, print)
        wanted = {name: [Setting(lr, 3.0) for lr in RATES] for name in names}
        for _ in range(EXTENSIONS + 1):
            attempt(pool, out, wanted, tried)
            wanted = {name: beyond(found) for name, found in tried.items()}
        attempt(pool, out, {name: [Setting(best(f).lr, s) for s in SCALES] for name, f in tried.items()}, tried)
    write(tried)


def attempt(pool: ProcessPoolExecutor, out: Path, wanted: dict[str, list[Setting]], tried: Tried) -> None:
    """Train with each setting that has not been tried."""
    jobs = {(n, s): pool.submit(tune, n, out, s, SEED) for n, each in wanted.items() for s in each if s not in tried[n]}
    for (name, setting), job in jobs.items():
        tried[name][setting] = job.result()
        print(f"{name}: lr {setting.lr:g}, A x {setting.a_scale:g}: {tried[name][setting]:.4f}", flush=True)


def best(found: dict[Setting, float]) -> Setting:
    return min(found, key=lambda setting: found[setting])


def beyond(found: dict[Setting, float]) -> list[Setting]:
    """The next rate where the best one lies at an end."""
    rates, lr = [setting.lr for setting in found], best(found).lr
    return [Setting(next_lr, 3.0) for end, next_lr in ((min(rates), lr / 2), (max(rates), lr * 2)) if lr == end]


def write(tried: Tried) -> None:
    kept: dict[str, Any] = json.loads(TUNING.read_text())["methods"] if TUNING.is_file() else {}
    for name, found in tried.items():
        figures = {f"lr {s.lr:g}, A x {s.a_scale:g}": round(loss, 4) for s, loss in found.items()}
        kept[name] = {**best(found).__dict__, "held_out_nll": figures}
    methods = {name: kept[name] for name in METHODS if name in kept}
    value = {"written_by": "bench/tune_demo.py", "seed": SEED, "methods": methods}
    TUNING.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
