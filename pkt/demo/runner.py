"""`pkt demo`: the whole path on tiny models that ship with the package, against every control.

`base` knows general text; `teacher` is `base` tuned on a task (word problems with sums). Two students know general text alone:
`descendant` was cut out of `base` and healed, `student` is a stranger; `healed` is the same units cut out of `teacher` and healed
alike. Every start below is trained by the same code on the same rows, over several training seeds; each has its own learning
rate and scale of A, chosen by `bench/tune_demo.py` on rows held out from training with a seed that is not reported.
"""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from pkt.demo.measuring import (
    BATCH,
    EPOCHS,
    GENERAL,
    METHODS,
    OURS,
    RANK,
    TEACHER_ROWS,
    TEST,
    TRAIN,
    TRAIN_ROWS,
    Setting,
    measure,
    rows_of,
    settings,
    tokenizer,
    untrained,
)  # fmt: skip
from pkt.demo.preparing import Prepared, Say, prepare
from pkt.demo.showing import page_of, picture_of, sentences, show, verdict
from pkt.demo.summing import Runs, comparisons, goals, summed
from pkt.demo.workers import workers
from pkt.files import MANIFEST, check_output_folder, os_errors, write_json
from pkt.manifest import manifest_of, read_manifest
from pkt.reporting import check_packages
from pkt.seeds import Seeds
from pkt.training import final_answer

MODELS = ("teacher", "base", "descendant", "student")


def run_demo(out: Path, *, seeds: int = 3, force: bool = False, console: Any = None) -> dict[str, Any]:
    """Run the demo into `out` and return its results; prints the table, writes demo.png, demo.html and results.json.

    seeds: trainings of each method, at least 2, since a difference without a spread says nothing.
    """
    from rich.console import Console

    console = console or Console()

    def say(text: str) -> None:
        console.print(text, highlight=False)

    begin = time.perf_counter()
    check_packages()
    _start(out, force=force)
    with workers() as pool:
        # The workers begin with these, and with their imports, while the starts are prepared.
        models = {name: pool.submit(untrained, name) for name in MODELS}
        made = prepare(out, say)
        runs = _compare(pool, out, settings(), seeds, say)
        summary = _summary(made, runs, {name: job.result() for name, job in models.items()}, seeds)
    summary["seconds"] = time.perf_counter() - begin
    say(
        "[bold]4. pkt finalize[/bold] makes a plain LoRA of the first transplant's run; PEFT loads it on the untouched student:"
    )
    say(f"   largest difference between its logits and the trained model's: {summary['finalize_gap']:.1e}")
    show(console, summary)
    _write(out, summary, picture_of(made.window, summary, made.scores))
    say(f"{out / 'demo.png'} and {out / 'demo.html'} show it; {time.perf_counter() - begin:.0f} seconds in all")
    return summary


def _start(out: Path, *, force: bool) -> None:
    """An empty folder with a manifest; what an interrupted demo left is nothing to keep."""
    found = read_manifest(out) if (out / MANIFEST).is_file() else {}
    unfinished = found.get("kind") == "demo" and not found.get("finished")
    check_output_folder(out, force=force or unfinished)
    shutil.rmtree(out, ignore_errors=True)
    with os_errors(f"writing {out}"):
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / MANIFEST, manifest_of("demo", {"finished": False}))


def _compare(pool: Executor, out: Path, chosen: dict[str, Setting], seeds: int, say: Say) -> Runs:
    """What each training of each method reached, by row."""
    say(f"[bold]3. pkt train[/bold] on {TRAIN_ROWS} problems: {len(METHODS)} starts, {seeds} seeds each")
    runs = {}
    jobs = {n: [pool.submit(measure, n, out, seed, chosen[n]) for seed in range(seeds)] for n in METHODS}
    for name, started in jobs.items():
        runs[name] = [job.result() for job in started]
        found = summed(runs[name])
        say(f"   {name}: NLL {found['nll_mean']:.3f}, {100 * found['exact_match_mean']:.0f}% right")
    return runs


def _summary(made: Prepared, runs: Runs, models: dict[str, dict[str, Any]], seeds: int) -> dict[str, Any]:
    rows, test = rows_of(TRAIN), rows_of(TEST)
    chosen = settings()
    summary: dict[str, Any] = {
        "seeds": seeds,
        "train_rows": TRAIN_ROWS,
        "test_rows": len(test),
        "general_rows": len(rows_of(GENERAL)),
        "teacher_rows": TEACHER_ROWS,
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "rank": RANK,
        "models": {name: summed([{"after": found}], alone=True) for name, found in models.items()},
        "guess": _guess(rows, test),
        "lineage": {
            name: {"verdict": found.verdict, "reason": found.reason, "evidence": [e.__dict__ for e in found.evidence]}
            for name, found in made.lineages.items()
        },
        "transplant": {name: made.transplant.provenance[name] for name in ("alpha", "losses", "content")},
        "own_alpha": made.own,
        "methods": {
            name: {**METHODS[name].__dict__, "taught": METHODS[name].taught, **chosen[name].__dict__, **summed(found)}
            for name, found in runs.items()
        },
        "comparisons": comparisons(runs),
        "finalize_gap": runs[OURS][0]["finalize_gap"],
    }
    summary["goals"] = goals(summary)
    summary["sentences"] = sentences(summary)
    summary["verdict"] = verdict(summary)
    return summary


def _guess(rows: Seeds, test_rows: Seeds) -> dict[str, Any]:
    """The commonest answer of the training rows, and how often it is right."""

    def answers(given: Seeds) -> list[str]:
        return [final_answer(e.answer.replace(tokenizer().eos_token, "")) for e in given]

    common = max(sorted(set(answers(rows))), key=answers(rows).count)
    return {"answer": common, "exact_match": answers(test_rows).count(common) / len(test_rows)}


def _write(out: Path, summary: dict[str, Any], picture: bytes) -> None:
    with os_errors(f"writing {out}"):
        (out / "results.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        (out / "demo.png").write_bytes(picture)
        (out / "demo.html").write_text(page_of(summary, picture), encoding="utf-8")
        write_json(out / MANIFEST, manifest_of("demo", {"finished": True}))
