"""`pkt demo`: the whole path on a tiny teacher and student that ship with the package, against four controls.

The teacher knows general text and a task (word problems with sums), the student only the general text. Every start below is
trained by the same code on the same rows, over several training seeds; each method's learning rate is chosen on rows held
out from training, with a seed that is not reported.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import pkt
from pkt.adapters import Pair
from pkt.demo.workers import workers
from pkt.extraction import Extraction
from pkt.files import MANIFEST, check_output_folder, os_errors, write_json
from pkt.lora import finalize, inject, load_with_adapter, wrap
from pkt.manifest import manifest_of, read_manifest
from pkt.models import load_model, load_tokenizer, spec_of
from pkt.reporting import new_figure, page, plot_layers, plot_methods, plot_window, png_bytes
from pkt.scoring import score_seeds
from pkt.seeds import Seeds, load_seeds
from pkt.training import evaluate, final_answer, fit

ASSETS = Path(__file__).parent / "assets"
RANK = 16
RATES = (3e-3, 1e-2)
BATCH = 32
EPOCHS = 2.0
TRAIN_ROWS, HELD_OUT = 512, 64
CHOOSING_SEED = 1000

Start = Callable[[int], Any]  # training seed -> a model ready to train


def starts(ext: Extraction, random_window: Extraction, own: Extraction) -> dict[str, Start]:
    """The methods compared. All train the same modules at the same rank; the noise has PKT's singular values."""

    def injected(extraction: Extraction) -> Start:
        return lambda seed: inject(load_model(ASSETS / "student", dtype=torch.float32), extraction)

    def noise(seed: int) -> Any:
        return inject(load_model(ASSETS / "student", dtype=torch.float32), matched_noise(ext, seed))

    def plain(seed: int) -> Any:
        return wrap(load_model(ASSETS / "student", dtype=torch.float32), ext.adapter().config())

    return {
        "PKT: sensitivity window": injected(ext),
        "random window": injected(random_window),
        "noise of the same size": noise,
        "PiSSA: the student's own": injected(own),
        "plain LoRA (B = 0)": plain,
    }


def matched_noise(ext: Extraction, seed: int) -> Extraction:
    """Random directions with the singular values of `ext`'s pairs: what is left of PKT when its content is taken out."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for module, pair in ext.pairs.items():
        sizes = pair.B.norm(dim=0)  # split "b": the columns of B carry the singular values
        left = torch.linalg.qr(torch.randn(pair.B.shape, generator=generator))[0]
        right = torch.linalg.qr(torch.randn(pair.A.shape[::-1], generator=generator))[0]
        pairs[module] = Pair(right.t().contiguous(), left * sizes, pair.kind)
    return Extraction(pairs, ext.energies, ext.plan, ext.provenance)


def run_demo(out: Path, *, seeds: int = 3, force: bool = False, console: Any = None) -> dict[str, Any]:
    """Run the demo into `out` and return its results; prints the table, writes demo.png, demo.html and results.json."""
    from rich.console import Console

    console = console or Console()

    def say(text: str) -> None:
        console.print(text, highlight=False)

    begin = time.perf_counter()
    # What an interrupted demo left is nothing to keep.
    found = read_manifest(out) if (out / MANIFEST).is_file() else {}
    unfinished = found.get("kind") == "demo" and not found.get("finished")
    check_output_folder(out, force=force or unfinished)
    shutil.rmtree(out, ignore_errors=True)
    with os_errors(f"writing {out}"):
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / MANIFEST, manifest_of("demo", {"finished": False}))
    teacher, student, data = ASSETS / "teacher", ASSETS / "student", ASSETS / "data"
    tokenizer = load_tokenizer(student)
    rows = load_seeds(data / "train.jsonl", tokenizer)
    test_rows = load_seeds(data / "test.jsonl", tokenizer)

    say("[bold]1. transfer[/bold]: score the teacher on 32 seeds, cut the student's shape out of it, factorize")
    ext = pkt.transfer(
        teacher, student, data / "seeds.jsonl", out=out / "extraction", rank=RANK, dtype=torch.float32, force=True
    )
    for line in ext.plan.summary():
        say(f"   {line}")
    say(f"   {ext}")
    folders = {"PKT": out / "extraction", "random": out / "random-window", "own": out / "student-own"}
    pkt.transfer(
        teacher,
        student,
        data / "seeds.jsonl",
        out=folders["random"],
        select="random",
        layers="random",
        rank=RANK,
        dtype=torch.float32,
        progress=False,
    )
    own_model = load_model(student, dtype=torch.float32)
    scores = score_seeds(own_model, rows_head(rows), progress=False)
    pkt.extract(own_model, pkt.plan(scores, own_model, own_model), rank=RANK, progress=False).save(folders["own"])

    count = len(starts(ext, ext, ext)) - 1
    say(
        f"[bold]2. inject and train[/bold] the student on {TRAIN_ROWS} problems: PKT and {count} controls, {seeds} seeds each; "
        "finalize the first PKT run"
    )
    untrained = evaluate(load_model(student, dtype=torch.float32), test_rows, tokenizer=tokenizer, exact_match=True)
    knows = evaluate(load_model(teacher, dtype=torch.float32), test_rows, tokenizer=tokenizer, exact_match=True)
    results: dict[str, dict[str, Any]] = {}
    with workers() as pool:
        jobs = {name: pool.submit(_measure, name, folders, out, seeds) for name in starts(ext, ext, ext)}
        for name, job in jobs.items():
            results[name] = job.result()
            say(f"   {name}: NLL {statistics.mean(results[name]['nll']):.3f}")
    gap = results[next(iter(results))].pop("finalize_gap")
    say("[bold]3. finalized[/bold] to a plain LoRA and loaded with PEFT on the untouched student:")
    say(f"   largest difference between its logits and the trained model's: {gap:.1e}")

    answers = [final_answer(e.answer.replace(tokenizer.eos_token, "")) for e in rows]
    common = max(sorted(set(answers)), key=answers.count)
    guess = sum(final_answer(e.answer.replace(tokenizer.eos_token, "")) == common for e in test_rows) / len(test_rows)
    summary: dict[str, Any] = {
        "seeds": seeds,
        "train_rows": TRAIN_ROWS,
        "test_rows": len(test_rows),
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "rank": RANK,
        "untrained": {"nll": untrained.nll, "exact_match": untrained.exact_match},
        "teacher": {"nll": knows.nll, "exact_match": knows.exact_match},
        "guess": {"answer": common, "exact_match": guess},
        "methods": results,
        "finalize_gap": gap,
        "verdict": verdict(results),
        "seconds": time.perf_counter() - begin,
    }
    summary["verdict"].append(exact_match_note(summary))
    _show(console, summary)
    with os_errors(f"writing {out}"):
        (out / "results.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        picture = _picture(ext, summary, rows_head(load_seeds(data / "seeds.jsonl", tokenizer)))
        (out / "demo.png").write_bytes(picture)
        (out / "demo.html").write_text(_page(summary, picture), encoding="utf-8")
        write_json(out / MANIFEST, manifest_of("demo", {"finished": True}))
    say(f"{out / 'demo.png'} and {out / 'demo.html'} show it; {time.perf_counter() - begin:.0f} seconds in all")
    return summary


def _measure(name: str, folders: dict[str, Path], out: Path, seeds: int) -> dict[str, Any]:
    """One method in a process of its own, one thread: its learning rate, then its runs. PKT's first run is finalized too."""
    torch.set_num_threads(1)
    loaded = [Extraction.load(folders[key]) for key in ("PKT", "random", "own")]
    start = starts(loaded[0], loaded[1], loaded[2])[name]
    student, data = ASSETS / "student", ASSETS / "data"
    tokenizer = load_tokenizer(student)
    rows, test_rows = (load_seeds(data / file, tokenizer) for file in ("train.jsonl", "test.jsonl"))
    train_rows = rows_head(rows, TRAIN_ROWS)
    choice_rows = Seeds(list(rows[-HELD_OUT:]), rows.source, rows.pad_id)
    chosen: dict[float, float] = {}
    for rate in RATES:
        torch.manual_seed(CHOOSING_SEED)
        model = start(CHOOSING_SEED)
        _fit(model, train_rows, rate, CHOOSING_SEED, epochs=EPOCHS / 2)
        chosen[rate] = evaluate(model, choice_rows).nll
    rate = min(chosen, key=lambda r: chosen[r])
    runs, found = [], {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = start(seed)
        _fit(model, train_rows, rate, seed)
        runs.append(evaluate(model, test_rows, tokenizer=tokenizer, exact_match=True))
        if seed == 0 and name.startswith("PKT"):
            found["finalize_gap"] = _finalize(model, out, test_rows)
    return {
        "lr": rate,
        "choice_nll": {str(r): v for r, v in chosen.items()},
        "nll": [r.nll for r in runs],
        "exact_match": [r.exact_match for r in runs],
        **found,
    }


@torch.no_grad()
def _finalize(model: Any, out: Path, rows: Seeds) -> float:
    """Finalize, load with plain PEFT on the original student, and compare the logits."""
    with _silence():
        finalize(model, out / "adapter", force=True)
        served = load_with_adapter(ASSETS / "student", out / "adapter", dtype=torch.float32)
    ids = torch.tensor([rows[0].input_ids])
    return float((served(ids).logits - model.eval()(ids).logits).abs().max())


def rows_head(rows: Seeds, count: int = 32) -> Seeds:
    return Seeds(list(rows[:count]), rows.source, rows.pad_id)


def _fit(model: Any, rows: Seeds, rate: float, seed: int, epochs: float = EPOCHS) -> None:
    with _silence(), tempfile.TemporaryDirectory(prefix="pkt-demo-") as folder:
        fit(
            model,
            rows,
            Path(folder),
            epochs=epochs,
            batch_size=BATCH,
            micro_batch=BATCH,
            lr=rate,
            scheduler="cosine",
            warmup=0.1,
            seed=seed,
            quietly=True,
        )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The demo trains two dozen times; transformers' notices would drown its own lines."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def verdict(results: dict[str, dict[str, Any]]) -> list[str]:
    """PKT against each control, in words: beaten only where the means differ by more than both spreads together."""
    ours, *controls = results.items()
    lines = []
    for name, control in controls:
        difference = statistics.mean(control["nll"]) - statistics.mean(ours[1]["nll"])
        spread = _spread(control["nll"]) + _spread(ours[1]["nll"])
        if difference > spread:
            word = "beats"
        elif difference < -spread:
            word = "loses to"
        else:
            word = "cannot be told from"
        side = "lower" if difference > 0 else "higher"
        lines.append(f"PKT {word} {name}: NLL {abs(difference):.3f} {side}, spreads {spread:.3f}")
    return lines


def exact_match_note(summary: dict[str, Any]) -> str:
    """Whether the exact matches say anything: the best mean against always giving the commonest answer."""
    best = max(statistics.mean(r["exact_match"]) for r in summary["methods"].values())
    guess = summary["guess"]["exact_match"]
    if best > 2 * guess:
        return f"exact match: the best start reaches {100 * best:.1f}%, guessing {100 * guess:.1f}%"
    return (
        f"exact match says nothing here: no start gets well above always answering {summary['guess']['answer']} "
        f"({100 * guess:.1f}%); in so few steps this student learns the form of the answers, not the sums"
    )


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _table(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    head = ["start", "lr", "test NLL", "exact match"]
    one = summary["untrained"], summary["teacher"]
    rows = [
        [name, "", f"{e['nll']:.3f}", f"{100 * e['exact_match']:.1f}%"]
        for name, e in zip(("student before training", "teacher"), one, strict=True)
    ]
    guess = summary["guess"]
    rows.append([f"always answering {guess['answer']}", "", "", f"{100 * guess['exact_match']:.1f}%"])
    for name, result in summary["methods"].items():
        matches = [100 * m for m in result["exact_match"]]
        rows.append(
            [
                name,
                f"{result['lr']:g}",
                f"{statistics.mean(result['nll']):.3f} ± {_spread(result['nll']):.3f}",
                f"{statistics.mean(matches):.1f}% ± {_spread(matches):.1f}",
            ]
        )
    return head, rows


def _show(console: Any, summary: dict[str, Any]) -> None:
    from rich.table import Table

    head, rows = _table(summary)
    table = Table(
        *head, box=None, header_style="bold", title=f"held-out problems, mean ± spread over {summary['seeds']} seeds"
    )
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for line in summary["verdict"]:
        console.print(line, highlight=False)


def _picture(ext: Extraction, summary: dict[str, Any], seeds: Seeds) -> bytes:
    figure, (layers, window, nll, match) = new_figure(17, 3.6, 4)
    plot_layers(layers, ext.plan)
    downs = {t.module for t in spec_of(ASSETS / "teacher").targets if t.role == "down"}
    source = next(e.source for e in ext.plan.entries if e.source in downs)
    sens = pkt.sensitivity(
        load_model(ASSETS / "teacher", dtype=torch.float32),
        seeds.batches(8),
        params=[f"{source}.weight"],
        progress=False,
    )
    plot_window(window, sens[f"{source}.weight"], ext.plan, source)
    methods = summary["methods"]
    plot_methods(
        nll, {n: r["nll"] for n, r in methods.items()}, summary["untrained"]["nll"], "test NLL, lower is better"
    )
    scores = {n: [100 * m for m in r["exact_match"]] for n, r in methods.items()}
    plot_methods(
        match,
        scores,
        100 * summary["untrained"]["exact_match"],
        "exact match %, higher is better",
        guess=100 * summary["guess"]["exact_match"],
    )
    match.set_yticks(range(len(scores)), [""] * len(scores))
    return png_bytes(figure)


def _page(summary: dict[str, Any], picture: bytes) -> str:
    head, rows = _table(summary)
    return page(
        "pkt demo",
        [
            {"heading": "What happened", "picture": picture},
            {"heading": "Held-out problems", "head": head, "rows": rows, "text": summary["verdict"]},
            {
                "heading": "How it was measured",
                "text": [
                    f"{summary['train_rows']} training problems, {summary['epochs']:g} epochs, batch {summary['batch_size']}, "
                    f"rank {summary['rank']}, all seven projections, embeddings and head; {summary['test_rows']} test problems; "
                    f"{summary['seeds']} training seeds. ± is the standard deviation over them.",
                    f"Each method's learning rate was chosen from {RATES} by half as many epochs, on {HELD_OUT} problems held out "
                    "from training, with a seed that is not reported.",
                ],
            },
        ],
    )
