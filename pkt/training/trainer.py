"""Any model trained on tokenized rows by transformers' Trainer."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pkt.errors import PktError
from pkt.extras import needs
from pkt.files import os_errors
from pkt.models import quiet, rows_apart
from pkt.options import Training
from pkt.progress import tell
from pkt.ranks import ALONE, LostRankError, Ranks
from pkt.seeds import Seeds, collate
from pkt.training.sharing import micro_batches

if TYPE_CHECKING:
    from pkt.training.finite import OnStep
    from pkt.training.held_out import HeldOut
    from pkt.training.targets import Distillation


def fit(
    model: Any,
    examples: Seeds,
    out: Path,
    options: Training,
    *,
    quietly: bool = False,
    resume_from: str | None = None,
    tokenizer: Any = None,
    held_out: HeldOut | None = None,
    taught: Distillation | None = None,
    on_step: OnStep | None = None,
    ranks: Ranks = ALONE,
) -> float:
    """Train a model on tokenized rows, on one device; returns the mean loss of all steps, those before `resume_from` too.

    ranks: who trains it together, each on its share of every step's rows; torch's DistributedDataParallel averages their gradients.

    held_out: measures the model as it trains, and gives it its best weights at the end. taught: a teacher's targets for the rows,
    which the loss is mixed with. on_step: told the loss of each step and its gradient's norm before it is clipped.

    Raises `PktError` at the first loss or gradient that is not finite, before it reaches the weights.
    """
    from transformers import PrinterCallback

    from pkt.training.finite import FiniteTrainer
    from pkt.training.shown import Shown

    at_once, quietly = largest_divisor(options.batch_size, options.micro_batch), quietly or not ranks.first
    if not ranks.alone:
        at_once = min(options.micro_batch, math.ceil(options.batch_size / ranks.world))
    elif at_once < min(options.micro_batch, options.batch_size) and not quietly:
        tell(
            f"{at_once} rows in memory at once: the most up to {options.micro_batch} that divide a batch of "
            f"{options.batch_size}"
        )
    rows: list[Any] = list(examples)
    given: dict[str, Any] = {"data_collator": lambda rows: collate(rows, examples.pad_id)}
    if taught is not None:
        rows = list(zip(examples, range(len(examples)), strict=True))
        given = {"data_collator": lambda rows: taught.collate(rows, examples.pad_id), "loss": taught.loss}
    with (
        _run_environment(out),
        rows_apart(model),
        _losing_ranks(ranks),
        os_errors(f"training in {out}"),
        contextlib.ExitStack() as stack,
    ):
        trainer = FiniteTrainer(
            model=model,
            args=_arguments(out, options, at_once, model, ranks),
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=[] if held_out is None else [held_out],
            lengths=[len(e.input_ids) for e in examples] if options.group_by_length else None,
            ranks=ranks,
            rows=0 if ranks.alone else options.batch_size,
            on_step=on_step,
            **given,
        )
        trainer.remove_callback(PrinterCallback)
        if not quietly:
            trainer.add_callback(Shown(stack))
        if held_out is None:
            return trainer.fit(resume_from)
        held_out.tell = trainer.log
        loss = trainer.fit(resume_from)
        held_out.put_back(model)
        return loss


def check_machine(options: Training) -> None:
    """Raises `PktError` for a precision that this machine does not have."""
    cuda = torch.cuda.is_available()
    if options.precision == "fp16" and not cuda:
        raise PktError("precision='fp16' needs a GPU; train in bf16 or fp32 here (--precision)")
    if options.precision == "bf16" and cuda and not torch.cuda.is_bf16_supported():
        raise PktError("precision='bf16': this GPU has no bf16; train in fp16 or fp32 (--precision)")


def check_reporters(options: Training) -> None:
    """Raises `PktError` for a place to report to that transformers does not know, or whose package is missing."""
    names = reporters(options)
    if "tensorboard" in names:
        needs("tensorboard", "train", "keep the logs of a training run")
    if set(names) <= {"tensorboard"}:
        return
    from transformers.integrations import integration_utils

    known, at_hand = integration_utils.INTEGRATION_TO_CALLBACK, integration_utils.get_available_reporting_integrations()
    for name in names:
        if name not in known:
            raise PktError(f"report_to={name!r} is unknown; choose of {', '.join(sorted(known))}, or none")
        if name not in at_hand:
            raise PktError(f"report_to={name!r}: its package cannot be imported; pip install {name.replace('_', '-')}")


def reporters(options: Training) -> list[str]:
    """Where a run reports to, by transformers' names."""
    names = [name.strip() for name in options.report_to.split(",") if name.strip()]
    return [] if names == ["none"] or options.save_steps is None else names


def _arguments(out: Path, options: Training, at_once: int, model: Any, ranks: Ranks) -> Any:
    from pkt.training.finite import Arguments

    kept, cuda = options.save_steps is not None, torch.cuda.is_available()
    # Ranks without a GPU, and bf16 where there is no accelerator, which transformers refuses unless it is told.
    on_cpu = not (cuda or ranks.alone) or (options.precision == "bf16" and not torch.accelerator.is_available())
    return Arguments(
        output_dir=str(out),
        num_train_epochs=options.epochs,
        max_steps=-1 if options.max_steps is None else options.max_steps,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=micro_batches(options.batch_size, at_once, ranks.world),
        learning_rate=options.lr,
        lr_scheduler_type=options.scheduler,
        warmup_steps=options.warmup,
        weight_decay=0.0,
        logging_steps=5 if options.max_steps is None else 1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if kept else "no",
        save_steps=options.save_steps or 500,
        save_total_limit=2,
        report_to=reporters(options),
        disable_tqdm=True,  # `Shown` has the bar
        remove_unused_columns=False,
        dataloader_pin_memory=cuda,
        bf16=options.precision == "bf16" or (options.precision == "auto" and cuda and torch.cuda.is_bf16_supported()),
        fp16=options.precision == "fp16",
        gradient_checkpointing=options.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if options.gradient_checkpointing else None,
        label_names=["labels"],
        seed=options.seed,
        # Without a GPU accelerate trains in several processes only where it is told to use the CPU.
        use_cpu=on_cpu,
        # Tokens need not reach every expert.
        ddp_find_unused_parameters=any("expert" in n for n, p in model.named_parameters() if p.requires_grad),
    )


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` up to `limit`."""
    return next(d for d in range(min(number, limit), 0, -1) if number % d == 0)


@contextlib.contextmanager
def _losing_ranks(ranks: Ranks) -> Iterator[None]:
    """What torch says when another rank's connections are closed is a `PktError`."""
    try:
        yield
    except RuntimeError as error:
        if ranks.alone or not any(word in str(error) for word in ("gloo", "NCCL", "onnection")):
            raise
        raise LostRankError("another rank ended; the same command continues from the last checkpoint") from error


@contextlib.contextmanager
def _run_environment(out: Path) -> Iterator[None]:
    """TensorBoard's folder, which transformers takes from the environment only; and quiet saving."""
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


@contextlib.contextmanager
def silently() -> Iterator[None]:
    """For whoever trains dozens of times: transformers' notices would drown its own lines."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
