"""`pkt train`: an injected student through transformers' Trainer, with the paper's settings as defaults (METHOD, section 6)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pkt.errors import PktError
from pkt.extraction import open_start
from pkt.files import (
    MANIFEST,
    as_path,
    atomic_file,
    check_apart,
    is_stored,
    lock_folder,
    os_errors,
    share_files,
    write_json,
)
from pkt.lora import Mode, check_settings, checked_dropout, inject
from pkt.manifest import read_manifest
from pkt.models import check_tokenizer, fingerprint, load_model, load_tokenizer, spec_of
from pkt.seeds import Seeds, load_seeds
from pkt.training.folder import start_run, write_run
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
    ext = open_start(extraction)
    mode = mode or ext.mode
    # What is kept has begun already: it wants about half the usual rate.
    lr = (KEPT_RATE if mode == "add" else RATE) if lr is None else lr
    check_settings(mode, dropout)
    _check_numbers(
        {"epochs": epochs, "lr": lr},
        {"batch_size": batch_size, "micro_batch": micro_batch, "save_steps": save_steps, "max_steps": max_steps},
        warmup,
        seed,
    )
    dropout = checked_dropout(ext.pairs, dropout)
    out = as_path(out, "the path of a run folder")
    student = as_path(student, "the path of a student")
    check_apart(out, *(given for given in (extraction, student, data) if is_stored(given)))
    spec = spec_of(student)
    tokenizer = load_tokenizer(student)
    check_tokenizer(tokenizer, spec)
    examples = data if isinstance(data, Seeds) else load_seeds(data, tokenizer, max_length=max_length)
    examples.check_vocabulary(spec.vocab_size, spec.name)
    settings = {
        "mode": mode,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "dropout": dropout,
        "warmup": warmup,
        "scheduler": scheduler,
        "max_steps": max_steps,
        "seed": seed,
        "data": examples.fingerprint,
        "extraction": ext.adapter().fingerprint(),
        "student": fingerprint(student),
    }
    if out.is_file():
        raise PktError(f"{out} is a file; name a folder that does not exist yet")
    with lock_folder(out, out):
        checkpoint = start_run(out, settings, force=force)
        from transformers import set_seed

        set_seed(seed)
        model = inject(load_model(student), ext, mode=mode, dropout=dropout)
        if checkpoint is None:
            write_run(out, ext, model, settings, str(student))
        loss = fit(
            model,
            examples,
            out,
            epochs=epochs,
            max_steps=max_steps,
            batch_size=batch_size,
            micro_batch=micro_batch,
            lr=lr,
            scheduler=scheduler,
            warmup=warmup,
            save_steps=save_steps,
            seed=seed,
            quietly=quietly,
            resume_from=checkpoint,
            tokenizer=tokenizer,
        )
        with os_errors(f"writing {out}"):
            model.save_pretrained(str(out), save_embedding_layers=False)
            share_files(out)
            with atomic_file(out / MANIFEST) as scratch:
                write_json(scratch, {**read_manifest(out), "finished": True, "train_loss": loss})
    return model


def _check_numbers(positive: Mapping[str, float], counts: Mapping[str, int | None], warmup: float, seed: int) -> None:
    """Refuse, before anything is made, numbers that no training can have."""
    for name, value in positive.items():
        if not 0 < value < math.inf:
            raise PktError(f"{name}={value} must be positive and finite")
    if positive["lr"] > 1:
        raise PktError(
            f"lr={positive['lr']} is too large: Adam moves every weight by about lr in each step; 3e-4 is usual"
        )
    for name, count in counts.items():
        if count is not None and count < 1:
            raise PktError(f"{name}={count} must be at least 1")
    if not 0 <= warmup < math.inf:
        raise PktError(f"warmup={warmup} must be a number of steps, or a share of them below 1")
    if not 0 <= seed < 2**32:
        raise PktError(f"seed={seed} must be from 0 to {2**32 - 1}")
