"""Tasks of EleutherAI's lm-evaluation-harness as tests of a study: the harness's own prompts and scores, item by item."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pkt.errors import PktError
from pkt.extras import needs
from pkt.files import sha256
from pkt.models import quiet


@dataclass(frozen=True)
class Harness:
    """task: its name there, or of a YAML file in the folder `include`; metric: one where more is better, with a value for each
    item; shots, limit: examples before each item and how many items, the task's own where they are not given; filter: of the
    answers, the task's first where it is not given."""

    task: str
    metric: str = "acc"
    shots: int | None = None
    limit: int | None = None
    filter: str | None = None
    include: str | None = None

    def inputs(self) -> dict[str, Any]:
        """What its figures depend on, the folder by the content of its files."""
        given = {n: v for n, v in vars(self).items() if v is not None and n != "include"}
        if self.include is None:
            return given
        files = sorted(file for file in Path(self.include).rglob("*") if file.is_file())
        return given | {"include": sha256(*(f"{file.name} {sha256(file.read_bytes())}" for file in files))}


def needs_harness() -> None:
    """Raises `PktError` where lm_eval is not installed."""
    needs("lm_eval", "lm-eval", "run the harness's tasks in a study")


def harness_items(model: Any, tokenizer: Any, harness: Harness, *, batch_size: int = 8) -> list[float]:
    """The metric of each item, in the order of the task's (of a group of tasks, by their names)."""
    needs_harness()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    training = model.training
    with _silent(), _left_as_it_is(model):
        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=[harness.task],
            num_fewshot=harness.shots,
            limit=harness.limit,
            task_manager=TaskManager(include_path=harness.include),
            bootstrap_iters=0,
            log_samples=True,
        )
    model.train(training)
    items = []
    for _, samples in sorted(found["samples"].items()):
        wanted = harness.filter or next(iter(s.get("filter") for s in samples), None)
        chosen = [s for s in samples if s.get("filter") == wanted]
        missing = next((s for s in chosen if not isinstance(s.get(harness.metric), (bool, int, float))), None)
        if missing is not None or not chosen:
            numbers = [n for n, v in (missing or {}).items() if isinstance(v, (bool, int, float))]
            known = ", ".join(n for n in numbers if n not in ("doc_id", "target"))
            raise PktError(
                f"lm_eval: {harness.task} has no number under {harness.metric!r} for each item; known are {known or 'none'}"
            )
        items += [float(s[harness.metric]) for s in sorted(chosen, key=lambda s: s["doc_id"])]
    return items


@contextlib.contextmanager
def _left_as_it_is(model: Any) -> Iterator[None]:
    """The harness ties the tables of what it is given, which would undo an adapter of one of them."""
    model.tie_weights = lambda *args, **options: None
    try:
        yield
    finally:
        del model.tie_weights


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
