"""Any model on tokenized rows through transformers' Trainer, stopped at the first number that is not finite."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pkt.errors import PktError
from pkt.files import os_errors, share_files
from pkt.models import quiet
from pkt.seeds import Seeds, collate
from pkt.training.folder import say


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
        say(f"{at_once} rows in memory at once: the most up to {micro_batch} that divide a batch of {batch_size}")

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
    with run_environment(out), os_errors(f"training in {out}"):
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


@contextlib.contextmanager
def run_environment(out: Path) -> Iterator[None]:
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
