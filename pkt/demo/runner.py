"""`pkt demo`: the whole path on a tiny teacher and student that ship with the package, against four controls.

The teacher knows general text and a task (word problems with sums), the student only the general text. Every start below is
trained by the same code on the same rows, over several training seeds; each method's learning rate is chosen on rows held
out from training, with a seed that is not reported.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pkt
from pkt.demo.measuring import ASSETS, BATCH, EPOCHS, METHODS, TRAIN_ROWS, measure, rows_head
from pkt.demo.showing import exact_match_note, page_of, picture_of, show, verdict
from pkt.demo.workers import workers
from pkt.extraction import Extraction
from pkt.files import MANIFEST, check_output_folder, os_errors, write_json
from pkt.manifest import manifest_of, read_manifest
from pkt.models import load_model, load_tokenizer
from pkt.options import Execution, Factorization, PlanOptions
from pkt.reporting import check_packages
from pkt.scoring import score_seeds
from pkt.seeds import Seeds, load_seeds
from pkt.training import evaluate, final_answer
from pkt.transferring import Listeners, Recipe, transfer_recipes

RANK = 16


SEEDS, TRAIN, TEST = (ASSETS / "data" / f"{name}.jsonl" for name in ("seeds", "train", "test"))

Say = Callable[[str], None]


def run_demo(out: Path, *, seeds: int = 3, force: bool = False, console: Any = None) -> dict[str, Any]:
    """Run the demo into `out` and return its results; prints the table, writes demo.png, demo.html and results.json."""
    from rich.console import Console

    console = console or Console()

    def say(text: str) -> None:
        console.print(text, highlight=False)

    begin = time.perf_counter()
    check_packages()
    _start(out, force=force)
    tokenizer = load_tokenizer(ASSETS / "student")
    rows, test_rows = load_seeds(TRAIN, tokenizer), load_seeds(TEST, tokenizer)
    ext, folders, scored = _extract(out, rows, say)
    results = _compare(folders, out, seeds, say)
    gap = results[next(iter(results))].pop("finalize_gap")
    say("[bold]3. finalized[/bold] to a plain LoRA and loaded with PEFT on the untouched student:")
    say(f"   largest difference between its logits and the trained model's: {gap:.1e}")
    summary: dict[str, Any] = {
        "seeds": seeds,
        "train_rows": TRAIN_ROWS,
        "test_rows": len(test_rows),
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "rank": RANK,
        "untrained": _untrained("student", test_rows, tokenizer),
        "teacher": _untrained("teacher", test_rows, tokenizer),
        "guess": _guess(rows, test_rows, tokenizer),
        "methods": results,
        "finalize_gap": gap,
        "verdict": verdict(results),
        "seconds": time.perf_counter() - begin,
    }
    summary["verdict"].append(exact_match_note(summary))
    show(console, summary)
    _write(out, summary, picture_of(ext, summary, scored))
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


def _extract(out: Path, rows: Seeds, say: Say) -> tuple[Extraction, dict[str, Path], dict[str, Tensor]]:
    """PKT's extraction; the folders of it, of a random window, and of the student's own principal factors; the scores."""
    folders = {"PKT": out / "extraction", "random": out / "random-window", "own": out / "student-own"}
    student, ranks, scored = ASSETS / "student", Factorization(RANK), {}
    say("[bold]1. transfer[/bold]: score the teacher on 32 seeds, cut the student's shape out of it, factorize")
    made = transfer_recipes(
        ASSETS / "teacher",
        student,
        {"": SEEDS},
        {"PKT": Recipe(PlanOptions(), ranks), "random": Recipe(PlanOptions(select="random", layers="random"), ranks)},
        execution=Execution(dtype=torch.float32),
        listeners=Listeners(on_scores=lambda task, scores: scored.update({n: s.clone() for n, s in scores.items()})),
    )
    for (_, name), extraction in made.items():
        extraction.save(folders[name])
    ext = made["", "PKT"]
    for line in (*ext.plan.summary(), str(ext)):
        say(f"   {line}")
    model = load_model(student, dtype=torch.float32)
    scores = score_seeds(model, rows_head(rows), progress=False)
    pkt.extract(model, pkt.plan(scores, model, model), rank=RANK, progress=False).save(folders["own"])
    return ext, folders, scored


def _compare(folders: dict[str, Path], out: Path, seeds: int, say: Say) -> dict[str, dict[str, Any]]:
    """What each method reached; the first is PKT's, with the largest difference of a logit that finalizing made."""
    say(
        f"[bold]2. inject and train[/bold] the student on {TRAIN_ROWS} problems: PKT and {len(METHODS) - 1} controls, {seeds} "
        "seeds each; finalize the first PKT run"
    )
    results = {}
    with workers() as pool:
        jobs = {name: pool.submit(measure, name, folders, out, seeds) for name in METHODS}
        for name, job in jobs.items():
            results[name] = job.result()
            say(f"   {name}: NLL {statistics.mean(results[name]['nll']):.3f}")
    return results


def _untrained(name: str, test_rows: Seeds, tokenizer: Any) -> dict[str, float | None]:
    found = evaluate(load_model(ASSETS / name, dtype=torch.float32), test_rows, tokenizer=tokenizer, exact_match=True)
    return {"nll": found.nll, "exact_match": found.exact_match}


def _guess(rows: Seeds, test_rows: Seeds, tokenizer: Any) -> dict[str, Any]:
    """The commonest answer of the training rows, and how often it is right."""

    def answers(given: Seeds) -> list[str]:
        return [final_answer(e.answer.replace(tokenizer.eos_token, "")) for e in given]

    common = max(sorted(set(answers(rows))), key=answers(rows).count)
    return {"answer": common, "exact_match": answers(test_rows).count(common) / len(test_rows)}


def _write(out: Path, summary: dict[str, Any], picture: bytes) -> None:
    with os_errors(f"writing {out}"):
        (out / "results.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        (out / "demo.png").write_bytes(picture)
        (out / "demo.html").write_text(page_of(summary, picture), encoding="utf-8")
        write_json(out / MANIFEST, manifest_of("demo", {"finished": True}))
