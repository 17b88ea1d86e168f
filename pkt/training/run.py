"""`pkt train`: an injected student through transformers' Trainer, with the paper's settings as defaults (METHOD, section 6)."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import shutil
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from pkt.adapters import Adapter, read_adapter
from pkt.errors import PktError
from pkt.extraction import Extraction
from pkt.files import (
    LOCK,
    MANIFEST,
    as_path,
    atomic_file,
    atomic_folder,
    check_apart,
    check_output_folder,
    is_stored,
    lock_folder,
    os_errors,
    read_json,
    share_files,
    write_json,
)
from pkt.lora.finalization import INITIAL
from pkt.lora.injection import ADAPTER, Mode, check_settings, checked_dropout, inject
from pkt.manifest import difference, manifest_of, name_kind, read_manifest, versions
from pkt.models import Model, check_tokenizer, content_kind, load_model, load_tokenizer, quiet, spec_of
from pkt.seeds import Seeds, collate, load_seeds
from pkt.version import __version__


def train(
    student: str | Path,
    extraction: str | Path,
    data: str | Path | Seeds,
    out: str | Path,
    *,
    mode: Mode = "paired",
    epochs: float = 3.0,
    batch_size: int = 64,
    micro_batch: int = 8,
    lr: float = 3e-4,
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
    starts over. batch_size: rows of a step; micro_batch: rows in memory at once, at most; dropout: 0.05 unless given, or 0
    where experts are adapted, for which PEFT has none; warmup: steps, or a share of them below 1; max_steps: fewer steps than
    the epochs have, if given.

    Raises `PktError` for settings no training can have, bad data, a mismatch of student and extraction, an `out` that is
    another run's or that another process is writing, a full disk, and the first loss or gradient that is not finite.
    """
    check_settings(mode, dropout)
    _check_numbers(
        {"epochs": epochs, "lr": lr},
        {"batch_size": batch_size, "micro_batch": micro_batch, "save_steps": save_steps, "max_steps": max_steps},
        warmup,
        seed,
    )
    ext = Extraction.load(extraction)
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
        "student": Model.of(student).content()["fingerprint"],
    }
    if out.is_file():
        raise PktError(f"{out} is a file; name a folder that does not exist yet")
    with lock_folder(out, out):
        checkpoint = _start_run(out, settings, force=force)
        from transformers import set_seed

        set_seed(seed)
        model = inject(load_model(student), ext, mode=mode, dropout=dropout)
        if checkpoint is None:
            _write_run(out, ext, model, settings, str(student))
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


def fit(
    model: Any,
    examples: Seeds,
    out: Path,
    *,
    epochs: float,
    batch_size: int,
    lr: float,
    max_steps: int | None = None,
    micro_batch: int = 8,
    scheduler: str = "linear",
    warmup: float = 0.0,
    save_steps: int | None = None,
    seed: int = 0,
    quietly: bool = False,
    resume_from: str | None = None,
    tokenizer: Any = None,
) -> float:
    """Train any model on tokenized rows with transformers' Trainer; returns the mean training loss.

    save_steps=None keeps no checkpoints and no logs: what the demo's controls use. Raises `PktError` at the first loss or
    gradient that is not finite, before it reaches the weights.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments

    at_once = largest_divisor(batch_size, micro_batch)
    if at_once < min(micro_batch, batch_size) and not quietly:
        _say(f"{at_once} rows in memory at once: the most up to {micro_batch} that divide a batch of {batch_size}")

    class FiniteTrainer(Trainer):  # type: ignore[misc]
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            found: torch.Tensor = super().training_step(*args, **kwargs)
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            for what, value in (("loss", found), ("norm of the gradient", torch.nn.utils.get_total_norm(grads))):
                if not value.isfinite():
                    raise PktError(
                        f"training diverged: the {what} is {float(value)} at step {self.state.global_step + 1}. Lower the "
                        f"learning rate (lr={lr}) and train into a new folder; if this is the first step, look for NaN in "
                        "the student's weights"
                    )
            return found

    class Shared(TrainerCallback):  # type: ignore[misc]
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            share_files(out / f"checkpoint-{state.global_step}")

    cuda = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(out),
        num_train_epochs=epochs,
        max_steps=-1 if max_steps is None else max_steps,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=batch_size // at_once,
        learning_rate=lr,
        lr_scheduler_type=scheduler,
        warmup_steps=warmup,
        weight_decay=0.0,
        logging_steps=5 if max_steps is None else 1,
        logging_nan_inf_filter=False,
        save_strategy="no" if save_steps is None else "steps",
        save_steps=save_steps or 500,
        save_total_limit=2,
        report_to=[] if save_steps is None else ["tensorboard"],
        disable_tqdm=quietly,
        remove_unused_columns=False,
        dataloader_pin_memory=cuda,
        bf16=cuda and torch.cuda.is_bf16_supported(),
        label_names=["labels"],
        seed=seed,
    )
    with _run_environment(out), os_errors(f"training in {out}"):
        trainer = FiniteTrainer(
            model=model,
            args=arguments,
            train_dataset=list(examples),
            data_collator=lambda rows: collate(rows, examples.pad_id),
            processing_class=tokenizer,
            callbacks=[Shared],
        )
        if quietly:
            from transformers import PrinterCallback

            trainer.remove_callback(PrinterCallback)
        return float(trainer.train(resume_from_checkpoint=resume_from).training_loss)


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` up to `limit`."""
    return next(d for d in range(min(number, limit), 0, -1) if number % d == 0)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _start_run(out: Path, settings: dict[str, Any], *, force: bool = False) -> str | None:
    """The checkpoint to go on from, or None for a new run; refuses a finished run and another run's folder."""
    entries = [p for p in out.iterdir() if p.name != LOCK]
    if not (out / MANIFEST).is_file():
        if entries:
            raise PktError(f"{out} holds something that pkt did not write; name a new or an empty folder")
        return None
    if force:
        for entry in entries:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        return None
    manifest = read_manifest(out)
    if manifest.get("kind") != "run":
        raise PktError(f"{out} holds {name_kind(manifest)}, not a training run; name a new folder")
    recorded = manifest["settings"]
    if not content_kind({"fingerprint": recorded.get("student")}):
        # An older pkt's hash of the student cannot be compared.
        recorded = {**recorded, "student": settings["student"]}
    different = difference(recorded, settings)
    if different:
        raise PktError(f"{out} is another run ({', '.join(different)}); name a new folder, or start over with --force")
    if manifest.get("finished"):
        raise PktError(
            f"{out} is a finished run; finalize it (pkt finalize {shlex.quote(str(out))} --out DIR), name a new folder, or start "
            "over with --force"
        )
    numbers = sorted((int(p.name[11:]) for p in entries if re.fullmatch(r"checkpoint-\d+", p.name)), reverse=True)
    for number in numbers:
        fault = _checkpoint_fault(out / f"checkpoint-{number}", number)
        if fault is None:
            return str(out / f"checkpoint-{number}")
        _say(f"checkpoint-{number} is incomplete and left aside ({fault})")
    return None


def _checkpoint_fault(folder: Path, step: int) -> str | None:
    """What keeps a checkpoint of the Trainer from being gone on from, or None for a complete one."""
    try:
        read_adapter(folder)
        state = read_json(folder / "trainer_state.json")
    except PktError as error:
        return str(error)
    if not isinstance(state, dict) or state.get("global_step") != step:
        return f"trainer_state.json is not of step {step}"
    pickles = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
    # torch.save writes zip files, whose end says that they are whole.
    return next((f"{name} is missing or truncated" for name in pickles if not zipfile.is_zipfile(folder / name)), None)


def _write_run(out: Path, ext: Extraction, model: Any, settings: dict[str, Any], student: str) -> None:
    with os_errors(f"writing {out}"):
        out.mkdir(parents=True, exist_ok=True)
        entries = {
            "mode": settings["mode"],
            "student": student,
            "settings": settings,
            "plan": {k: v for k, v in ext.plan.as_dict().items() if k != "entries"},
            "versions": versions(),
            "finished": False,
        }
        with atomic_file(out / MANIFEST) as scratch:
            write_json(scratch, manifest_of("run", entries))
        if settings["mode"] == "residual":
            _write_initial(out, ext, student)


@contextlib.contextmanager
def _run_environment(out: Path) -> Iterator[None]:
    """TensorBoard's folder, which transformers takes from the environment only; and quiet saving."""
    import warnings

    before = os.environ.get("TENSORBOARD_LOGGING_DIR")
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(out / "logs")
    try:
        with quiet(), warnings.catch_warnings():
            # Trainer saves through PEFT, which announces that it adds the base embeddings; finalize leaves them out.
            warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
            yield
    finally:
        if before is None:
            del os.environ["TENSORBOARD_LOGGING_DIR"]
        else:
            os.environ["TENSORBOARD_LOGGING_DIR"] = before


def _write_initial(folder: Path, ext: Extraction, student: str) -> None:
    (folder / INITIAL).mkdir(parents=True, exist_ok=True)
    Adapter(ext.pairs, student).write(folder / INITIAL)


def write_injected(
    student: str | Path,
    extraction: str | Path,
    out: str | Path,
    *,
    mode: Mode = "paired",
    dropout: float | None = None,
    alpha: float | None = None,
    rslora: bool = False,
    save_residual: str | Path | None = None,
    force: bool = False,
) -> list[str]:
    """Write the injected adapter for a trainer that is not ours, and what to do next.

    dropout: as in `train`. `residual` also needs its base: a complete student of W − B₀A₀, written to `save_residual` (default:
    OUT/base).
    """
    if save_residual is not None and mode != "residual":
        raise PktError(
            f"--save-residual writes the base of mode='residual'; with mode={mode!r} the base is the student itself"
        )
    check_settings(mode, dropout, alpha)
    out = check_output_folder(out, force=force)
    read = [given for given in (extraction, student) if is_stored(given)]
    check_apart(out, *read)
    base_path = Path(save_residual) if save_residual is not None else out / "base"
    if save_residual is not None:
        check_apart(check_output_folder(base_path, force=force), out, *read)
    ext = Extraction.load(extraction)
    dropout = checked_dropout(ext.pairs, dropout)
    model = inject(student, ext, mode=mode, dropout=dropout, alpha=alpha, rslora=rslora)
    settings = {"mode": mode, "dropout": dropout, "student": Model.of(student).content()["fingerprint"]}
    # Both are written whole before either is renamed into place.
    with atomic_folder(out, force=force) as scratch:
        _write_run(scratch, ext, model, settings, str(student))
        if mode == "residual":
            model.peft_config[ADAPTER].base_model_name_or_path = str(base_path)
        model.save_pretrained(str(scratch), save_embedding_layers=False)
        (scratch / "README.md").write_text(_card(mode, student, base_path if mode == "residual" else student), "utf-8")
        if save_residual is not None:
            with atomic_folder(base_path, force=force) as base:
                _write_base(base, model, ext, student)
        elif mode == "residual":
            _write_base(scratch / "base", model, ext, student)
    if mode != "residual":
        base_path = Path(student)
    return [
        f"{out}: the {mode} adapter, to be trained on {base_path}",
        f"next: train it with any PEFT trainer on {base_path}, then: pkt finalize TRAINER_OUTPUT --out ADAPTER",
    ]


def _write_base(folder: Path, model: Any, ext: Extraction, student: str | Path) -> None:
    """The shifted student as a complete checkpoint that says what it is."""
    base = model.unload()
    with quiet():
        base.save_pretrained(str(folder))
        if (Path(student) / "tokenizer_config.json").is_file():
            load_tokenizer(student).save_pretrained(str(folder))
    _write_initial(folder, ext, str(student))
    write_json(folder / MANIFEST, manifest_of("residual-base", {"student": str(student), "versions": versions()}))


CARD = """---
library_name: peft
base_model: {base}
tags: [lora, peft, pkt]
---

# An injected LoRA, ready to be trained

Made by [pkt](https://pypi.org/project/pkt-transfer/) {version}, mode `{mode}`, for {student}. Train it with any PEFT trainer on
`{base}` (`PeftModel.from_pretrained(model, DIR, is_trainable=True)`), then `pkt finalize OUTPUT --out ADAPTER` gives a plain
LoRA for the original student.
"""


def _card(mode: str, student: Any, base: Any) -> str:
    return CARD.format(mode=mode, student=student, base=base, version=__version__)
