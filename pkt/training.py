"""`pkt train`: an injected student through transformers' Trainer, with the paper's settings as defaults (METHOD, section 6)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pkt.adapters import Adapter
from pkt.errors import PktError
from pkt.extraction import Extraction, read_manifest, versions
from pkt.finalization import INITIAL
from pkt.injection import ADAPTER, MODES, Mode, inject
from pkt.models import check_tokenizer, fingerprint, load_model, load_tokenizer, quiet, spec_of
from pkt.seeds import Seeds, collate, load_seeds
from pkt.storage import MANIFEST, atomic_folder, check_output_folder, os_errors, write_json
from pkt.version import __version__

FORMAT = "pkt-run-1"


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
    dropout: float = 0.05,
    warmup: float = 0.0,
    scheduler: str = "linear",
    max_length: int = 2048,
    max_steps: int = -1,
    save_steps: int = 50,
    seed: int = 0,
    quietly: bool = False,
) -> Any:
    """Inject `extraction` into `student`, train it on `data` and keep everything in `out`. Returns the trained PeftModel.

    `out` is a run folder: the adapter as PEFT saves it, checkpoints, TensorBoard logs under `logs/`, and pkt.json. The same
    call on an unfinished run goes on from its last checkpoint; on a finished one it is refused.

    Raises `PktError` for bad data, a mismatch of student and extraction, or an `out` that is another run's.
    """
    if batch_size < 1 or micro_batch < 1 or epochs <= 0 or lr <= 0 or save_steps < 1:
        raise PktError("epochs, lr, batch size, micro batch and save steps must be positive")
    if mode not in MODES:
        raise PktError(f"mode={mode!r} is unknown; choose one of {', '.join(MODES)}")
    out = Path(out)
    ext = Extraction.load(extraction)
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
    checkpoint = _start_run(out, settings)
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
        write_json(out / MANIFEST, {**read_manifest(out), "finished": True, "train_loss": loss})
    return model


def fit(
    model: Any,
    examples: Seeds,
    out: Path,
    *,
    epochs: float,
    batch_size: int,
    lr: float,
    max_steps: int = -1,
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

    save_steps=None keeps no checkpoints and no logs: what the demo's controls use.
    """
    from transformers import Trainer, TrainingArguments

    micro_batch = min(micro_batch, batch_size)
    cuda = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(out),
        num_train_epochs=epochs,
        max_steps=max_steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=max(1, batch_size // micro_batch),
        learning_rate=lr,
        lr_scheduler_type=scheduler,
        warmup_steps=warmup,
        weight_decay=0.0,
        logging_steps=1 if max_steps > 0 else 5,
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
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=list(examples),
            data_collator=lambda rows: collate(rows, examples.pad_id),
            processing_class=tokenizer,
        )
        if quietly:
            from transformers import PrinterCallback

            trainer.remove_callback(PrinterCallback)
        return float(trainer.train(resume_from_checkpoint=resume_from).training_loss)


def _start_run(out: Path, settings: dict[str, Any]) -> str | None:
    """The checkpoint to go on from, or None for a new run; refuses a finished run and another run's folder."""
    if not (out / MANIFEST).is_file():
        check_output_folder(out)
        return None
    manifest = read_manifest(out)
    if manifest.get("kind") != "run":
        raise PktError(f"{out} holds a {manifest.get('kind')}, not a training run; name a new folder")
    different = [k for k, v in settings.items() if manifest.get("settings", {}).get(k) != v]
    if different:
        raise PktError(f"{out} is another run (different: {', '.join(different)}); name a new folder")
    if manifest.get("finished"):
        raise PktError(f"{out} is a finished run; finalize it (pkt finalize {out} --out DIR) or name a new folder")
    checkpoints = sorted(out.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    return str(checkpoints[-1]) if checkpoints else None


def _write_run(out: Path, ext: Extraction, model: Any, settings: dict[str, Any], student: str) -> None:
    with os_errors(f"writing {out}"):
        out.mkdir(parents=True, exist_ok=True)
        if settings["mode"] == "residual":
            _write_initial(out, ext, student)
        manifest = {
            "format": FORMAT,
            "kind": "run",
            "mode": settings["mode"],
            "student": student,
            "settings": settings,
            "plan": {k: v for k, v in ext.plan.as_dict().items() if k != "entries"},
            "versions": versions(),
            "finished": False,
        }
        write_json(out / MANIFEST, manifest)


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
    dropout: float = 0.05,
    alpha: float | None = None,
    rslora: bool = False,
    save_residual: str | Path | None = None,
) -> list[str]:
    """Write the injected adapter for a trainer that is not ours, and what to do next.

    `residual` also needs its base: a complete student of W − B₀A₀, written to `save_residual` (default: OUT/base).
    """
    if save_residual is not None and mode != "residual":
        raise PktError(
            f"--save-residual writes the base of mode='residual'; with mode={mode!r} the base is the student itself"
        )
    out = check_output_folder(out)
    base_path = Path(save_residual) if save_residual is not None else out / "base"
    if mode == "residual":
        check_output_folder(base_path)
    ext = Extraction.load(extraction)
    model = inject(student, ext, mode=mode, dropout=dropout, alpha=alpha, rslora=rslora)
    settings = {"mode": mode, "dropout": dropout, "student": fingerprint(student)}
    with atomic_folder(out) as scratch:
        _write_run(scratch, ext, model, settings, str(student))
        if mode == "residual":
            model.peft_config[ADAPTER].base_model_name_or_path = str(base_path)
        model.save_pretrained(str(scratch), save_embedding_layers=False)
        (scratch / "README.md").write_text(_card(mode, student, base_path if mode == "residual" else student), "utf-8")
        if mode == "residual" and save_residual is None:
            _write_base(scratch / "base", model, ext, student)
    if mode == "residual" and save_residual is not None:
        with atomic_folder(base_path) as scratch:
            _write_base(scratch, model, ext, student)
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
    write_json(
        folder / MANIFEST, {"format": FORMAT, "kind": "residual-base", "student": str(student), "versions": versions()}
    )


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
