"""`pkt train`: an injected student through transformers' Trainer, with the paper's settings as defaults (docs/method.md §6)."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from pkt.errors import PktError
from pkt.extraction import Extraction, Start, open_start
from pkt.extras import needs
from pkt.files import MANIFEST, as_path, check_apart, is_stored, lock_folder
from pkt.lora import Mode, check_settings, checked_dropout, inject
from pkt.manifest import recorded_day
from pkt.models import Model, load_model, load_tokenizer, spec_of
from pkt.options import Training
from pkt.seeds import Seeds, load_seeds
from pkt.training.export import read_injected
from pkt.training.folder import finish_run, start_run, write_run
from pkt.training.trainer import fit

RATE, KEPT_RATE = 3e-4, 1.5e-4


def train(
    student: str | Path,
    extraction: str | Path,
    data: str | Path | Seeds,
    out: str | Path,
    *,
    mode: Mode | None = None,
    epochs: float = 3.0,
    batch_size: int = 64,
    micro_batch: int = 8,
    lr: float | None = None,
    dropout: float | None = None,
    warmup: float = 0.0,
    scheduler: str = "linear",
    max_length: int = 2048,
    max_steps: int | None = None,
    save_steps: int = 50,
    seed: int = 0,
    force: bool = False,
    quietly: bool = False,
) -> Any:
    """Inject `extraction` into `student`, train it on `data` and keep everything in `out`. Returns the trained PeftModel.

    `out` is a run folder: the adapter as PEFT saves it, checkpoints, TensorBoard logs under `logs/`, and pkt.json. The same
    call on an unfinished run goes on from its last complete checkpoint; on a finished one it is refused. With `force` it
    starts over. batch_size: rows of a step; micro_batch: rows in memory at once, at most; lr: 3e-4 unless given, half of it for
    a transplant, which has begun already; dropout: 0.05 unless given, or 0 where experts are adapted, for which PEFT has none;
    warmup: steps, or a share of them below 1; max_steps: fewer steps than the epochs have, if given.

    Raises `PktError` for settings no training can have, bad data, a mismatch of student and extraction, an `out` that is
    another run's or that another process is writing, a full disk, and the first loss or gradient that is not finite.
    """
    injected = read_injected(extraction, student) if is_stored(extraction) else None
    ext = injected or open_start(extraction)
    mode = mode or ext.mode
    # What is kept has begun already: it wants about half the usual rate.
    lr = (KEPT_RATE if mode == "add" else RATE) if lr is None else lr
    check_settings(mode, dropout)
    options = Training(epochs, batch_size, micro_batch, lr, warmup, scheduler, max_steps, save_steps, seed)
    needs("tensorboard", "train", "keep the logs of a training run")
    dropout = checked_dropout(ext.pairs, dropout)
    out, student = as_path(out, "the path of a run folder"), as_path(student, "the path of a student")
    check_apart(out, *(given for given in (extraction, student, data) if is_stored(given)))
    today = None if force else recorded_day(out / MANIFEST)
    examples, tokenizer = _rows(data, student, max_length, today)
    settings = _settings(mode, dropout, options, examples, ext, student)
    if out.is_file():
        raise PktError(f"{out} is a file; name a folder that does not exist yet")
    with lock_folder(out, out):
        checkpoint = start_run(out, settings, force=force)
        model = _injected(student, ext, mode, dropout, seed)
        if checkpoint is None:
            write_run(out, ext, settings, str(student))
        loss = fit(model, examples, out, options, quietly=quietly, resume_from=checkpoint, tokenizer=tokenizer)
        finish_run(out, model, loss)
    return model


def _rows(data: str | Path | Seeds, student: Path, max_length: int, today: datetime.date | None) -> tuple[Seeds, Any]:
    """The rows as the student reads them, and its tokenizer."""
    spec, tokenizer = spec_of(student), load_tokenizer(student)
    examples = data if isinstance(data, Seeds) else load_seeds(data, tokenizer, max_length=max_length, today=today)
    examples.check_fits(spec.vocab_size, spec.positions, spec.name)
    return examples, tokenizer


def _settings(
    mode: Mode, dropout: float, options: Training, examples: Seeds, ext: Extraction | Start, student: Path
) -> dict[str, Any]:
    """What decides a run's result: a folder with other settings holds another run."""
    return {
        "mode": mode,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "lr": options.lr,
        "dropout": dropout,
        "warmup": options.warmup,
        "scheduler": options.scheduler,
        "max_steps": options.max_steps,
        "seed": options.seed,
        "data": examples.fingerprint,
        **({} if examples.today is None else {"today": examples.today.isoformat()}),
        "extraction": ext.adapter().fingerprint(),
        "student": Model.of(student).content()["fingerprint"],
    }


def _injected(student: Path, ext: Extraction | Start, mode: Mode, dropout: float, seed: int) -> Any:
    from transformers import set_seed

    set_seed(seed)
    return inject(load_model(student), ext, mode=mode, dropout=dropout)
