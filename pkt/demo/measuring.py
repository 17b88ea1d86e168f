"""The starts that the demo compares, and one training of one of them: each at its own learning rate and scale of A."""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from pkt.extraction import Extraction, Start
from pkt.lora import finalize, inject, load_with_adapter, scale_a, wrap
from pkt.models import load_model, load_tokenizer
from pkt.options import Training
from pkt.seeds import Seeds, load_seeds
from pkt.training import fit, row_losses, row_matches, silently
from pkt.transplanting import control_of

ASSETS = Path(__file__).parent / "assets"
TUNING = Path(__file__).parent / "tuning.json"
RANK = 32
BATCH = 32
EPOCHS = 2.0
TRAIN_ROWS, HELD_OUT = 512, 64
TEACHER_ROWS = 20_160  # of the task, that the shipped teacher was tuned on, as its README.md says
ANSWER_TOKENS = 40  # the longest answer of the task has half as many
SEEDS, TRAIN, TEST, GENERAL = (ASSETS / "data" / f"{name}.jsonl" for name in ("seeds", "train", "test", "general"))

What = Literal["transplant", "neutral", "wrong-units", "noise", "window", "plain"]


@dataclass(frozen=True)
class Method:
    """A start: what it is, for which model, and how long it trains. Models are names of folders in the assets or the output."""

    name: str
    model: str
    what: What
    epochs: float = EPOCHS

    @property
    def stranger(self) -> bool:
        return self.model == "student"

    @property
    def taught(self) -> bool:
        """Whether it is made from the teacher, so that the teacher's rows count as its own."""
        return self.what != "plain" or self.model in ("repruned", "healed")


OURS = "transplant"
# Plain LoRA makes a quarter more steps: what the other starts cost.
METHODS = {
    method.name: method
    for method in (
        Method(OURS, "descendant", "transplant"),
        Method("wrong units", "descendant", "wrong-units"),
        Method("noise of the same size", "descendant", "noise"),
        Method("neutral", "descendant", "neutral"),
        Method("re-pruned teacher", "repruned", "plain"),
        Method("re-pruned teacher, healed", "healed", "plain"),
        Method("the paper's window", "descendant", "window"),
        Method("plain LoRA", "descendant", "plain", 1.25 * EPOCHS),
        Method("stranger: the paper's window", "student", "window"),
        Method("stranger: plain LoRA", "student", "plain", 1.25 * EPOCHS),
    )
}


@dataclass(frozen=True)
class Setting:
    """What is chosen for each method on rows held out from training, with a seed that is not reported."""

    lr: float
    a_scale: float


def settings() -> dict[str, Setting]:
    """Those that `bench/tune_demo.py` found."""
    found = json.loads(TUNING.read_text(encoding="utf-8"))["methods"]
    return {name: Setting(found[name]["lr"], found[name]["a_scale"]) for name in METHODS}


def folder_of(model: str, out: Path) -> Path:
    return ASSETS / model if (ASSETS / model).is_dir() else out / model


def begin(method: Method, out: Path, seed: int, a_scale: float) -> Any:
    """The model ready to train; what is random is drawn anew for each seed."""
    torch.manual_seed(seed)
    student = load_model(folder_of(method.model, out), dtype=torch.float32)
    window = out / ("window-stranger" if method.stranger else "window")
    if method.what == "plain":
        # The same matrices at the same rank as all others.
        config = Extraction.load(window).adapter().config()
        model = wrap(student, {**config, "base_model_name_or_path": str(folder_of(method.model, out))})
        scale_a(model, a_scale)
        return model
    if method.what == "window":
        model = inject(student, Extraction.load(window))
    elif method.what in ("transplant", "neutral"):
        model = inject(student, Start.load(out / OURS), mode="paired" if method.what == "neutral" else "add")
    else:
        model = inject(student, control(method.what, out, seed))
    scale_a(model, a_scale)
    return model


def control(kind: Any, out: Path, seed: int) -> Start:
    """A control of the demo's transplant, at its α, drawn anew."""
    return control_of(
        Start.load(out / OURS),
        kind,
        seed,
        ASSETS / "teacher",
        ASSETS / "descendant",
        base=ASSETS / "base",
        lineage=out / OURS / "lineage.json",
    )


@functools.cache
def tokenizer() -> Any:
    """That of all the demo's models."""
    return load_tokenizer(ASSETS / "student")


@functools.cache
def rows_of(file: Path) -> Seeds:
    return load_seeds(file, tokenizer())


def measure(name: str, out: Path, seed: int, setting: Setting) -> dict[str, Any]:
    """One training, in a process of its own and one thread; the first also measures the start before it."""
    torch.set_num_threads(1)
    method = METHODS[name]
    found: dict[str, Any] = {}
    model = begin(method, out, seed, setting.a_scale)
    if seed == 0:
        found["before"] = measured(model)
    train_quietly(model, rows_head(rows_of(TRAIN), TRAIN_ROWS), setting.lr, seed, epochs=method.epochs)
    found["after"] = measured(model)
    if seed == 0 and name == OURS:
        found["finalize_gap"] = _finalize(model, out, rows_of(TEST))
    return found


def untrained(name: str) -> dict[str, list[Any]]:
    """One of the shipped models as it is, in a process of its own and one thread."""
    torch.set_num_threads(1)
    return measured(load_model(ASSETS / name, dtype=torch.float32))


def measured(model: Any) -> dict[str, list[Any]]:
    """By row: losses (sum, tokens) of the task's answers and of the general text, and whether each answer is right."""
    test = rows_of(TEST)
    return {
        "task": row_losses(model, test),
        "match": row_matches(model, test, tokenizer(), max_new_tokens=ANSWER_TOKENS),
        "general": row_losses(model, rows_of(GENERAL)),
    }


def tune(name: str, out: Path, setting: Setting, seed: int) -> float:
    """The loss [nats a token] on the rows held out from training, after half as many epochs as `measure` has."""
    torch.set_num_threads(1)
    rows = rows_of(TRAIN)
    model = begin(METHODS[name], out, seed, setting.a_scale)
    train_quietly(model, rows_head(rows, TRAIN_ROWS), setting.lr, seed, epochs=METHODS[name].epochs / 2)
    losses = row_losses(model, Seeds(list(rows[-HELD_OUT:]), rows.source, rows.pad_id))
    return sum(loss for loss, _ in losses) / sum(count for _, count in losses)


@torch.no_grad()
def _finalize(model: Any, out: Path, rows: Seeds) -> float:
    """Finalize, load with plain PEFT on the original student, and compare the logits."""
    with silently():
        finalize(model, out / "adapter", force=True)
        served = load_with_adapter(ASSETS / "descendant", out / "adapter", dtype=torch.float32)
    ids = torch.tensor([rows[0].input_ids])
    return float((served(ids).logits - model.eval()(ids).logits).abs().max())


def rows_head(rows: Seeds, count: int = 32) -> Seeds:
    return Seeds(list(rows[:count]), rows.source, rows.pad_id)


def train_quietly(model: Any, rows: Seeds, rate: float, seed: int, epochs: float = EPOCHS) -> None:
    with silently(), tempfile.TemporaryDirectory(prefix="pkt-demo-") as folder:
        options = Training(epochs, BATCH, BATCH, rate, warmup=0.1, scheduler="cosine", save_steps=None, seed=seed)
        fit(model, rows, Path(folder), options, quietly=True)
