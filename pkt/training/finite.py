"""transformers' Trainer as pkt uses it: it stops at the first number that is not finite and knows the loss of all its steps."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import get_length_grouped_indices

from pkt.errors import DivergedError, PktError
from pkt.files import read_json, share_files
from pkt.ranks import ALONE, Ranks
from pkt.training.sharing import MaybeEmpty, RowsOfRank

STATE = "trainer_state.json"
OnStep = Callable[[float, float], None]


class Arguments(TrainingArguments):  # type: ignore[misc]
    """Trains on one GPU, however many are visible: Trainer's DataParallel would multiply the rows of a step by their number."""

    @property
    def n_gpu(self) -> int:
        return min(1, int(super().n_gpu))


class Losses(TrainerCallback, ExportableState):  # type: ignore[misc]
    """The losses of all steps, kept in every checkpoint: Trainer knows those of the steps since it was resumed.

    on_step: told the loss of each step and its gradient's norm before it is clipped.
    """

    def __init__(self, on_step: OnStep | None = None, ranks: Ranks = ALONE) -> None:
        self.total, self.steps, self.on_step, self.ranks = 0.0, 0, on_step, ranks
        self.current, self.norm = 0.0, 0.0  # of the step that is under way

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"total": self.total, "steps": self.steps}}

    def restore(self, trainer_state: dict[str, Any]) -> None:
        """As they were at a checkpoint; one by an older pkt knows nothing of them."""
        kept = trainer_state.get("stateful_callbacks", {}).get(type(self).__name__, {}).get("attributes", {})
        self.total, self.steps = kept.get("total", 0.0), kept.get("steps", 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        # Trainer saves what a checkpoint's state names, and an older pkt's does not name this.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def add(self, loss: float, norm: float) -> None:
        """Of a micro-batch: its share of the step's loss, and the norm of the gradient so far."""
        if self.ranks.alone:
            self.total += loss
        self.current, self.norm = self.current + loss, norm

    def on_step_end(self, *given: Any, **more: Any) -> None:
        self.steps += 1
        if not self.ranks.alone:
            # Each rank's is multiplied by their number, for gradients are averaged.
            self.current = sum(self.ranks.all_of(self.current)) / self.ranks.world
            self.total += self.current
        if self.on_step is not None:
            self.on_step(self.current, self.norm)
        self.current = 0.0

    @property
    def mean(self) -> float:
        return self.total / max(1, self.steps)


class Apart(TrainerCallback):  # type: ignore[misc]
    """Ranks that drop units each draw their own; which they resume is in their checkpoints."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def on_train_begin(self, args: Any, *given: Any, **more: Any) -> None:
        torch.manual_seed(args.seed + self.ranks.rank)


class Shared(TrainerCallback):  # type: ignore[misc]
    """Gives the weights of each checkpoint the mode of the files beside them."""

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if not state.is_world_process_zero:
            return
        share_files(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class ByLength(Sampler[int]):
    """Rows of like lengths together; their order hangs on the seed and the epoch alone, so that a resumed run finds its place."""

    def __init__(self, lengths: Sequence[int], rows: int, seed: int) -> None:
        self.lengths, self.rows, self.seed, self.epoch = list(lengths), rows, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.rows, generator=generator))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class FiniteTrainer(Trainer):  # type: ignore[misc]
    """Raises `PktError` for a loss or a gradient that is not finite, before it reaches the weights.

    lengths: of the rows, where those of like lengths are to come together. callbacks: with a `restore`, as `Losses` has. loss: of
    (model, batch, answer tokens of the whole step), instead of the model's own. on_step: told each step's loss and gradient norm.
    ranks: who trains together, on `rows` a step.
    """

    def __init__(
        self,
        *,
        lengths: Sequence[int] | None = None,
        callbacks: Sequence[Any] = (),
        loss: Callable[[Any, dict[str, Any], Any], torch.Tensor] | None = None,
        on_step: OnStep | None = None,
        ranks: Ranks = ALONE,
        rows: int = 0,
        **given: Any,
    ) -> None:
        self.losses, self.lengths, self.loss, self.ranks, self.rows = Losses(on_step, ranks), lengths, loss, ranks, rows
        self.kept = [self.losses, *callbacks]
        more = [Shared] if ranks.alone else [Shared, Apart(ranks)]
        # With a loss function Trainer counts the answer tokens of the step and leaves the loss as it is.
        super().__init__(**given, callbacks=[*more, *self.kept], compute_loss_func=loss)
        if not (ranks.alone or loss or self.model_accepts_loss_kwargs):
            raise PktError(
                "this model gives a mean over each micro-batch, which ranks cannot weigh by its tokens: train it in one process"
            )

    def get_train_dataloader(self) -> Any:
        """Of ranks, every one's share of each step's rows, which are those that one process would take."""
        prepared = super().get_train_dataloader()
        if self.ranks.alone:
            return prepared
        # What accelerate has made of them: batches, in shards, of an order.
        order = prepared.batch_sampler.batch_sampler.sampler
        return DataLoader(
            MaybeEmpty(self.train_dataset),  # type: ignore[arg-type]
            batch_sampler=RowsOfRank(order, self.rows, self.args.train_batch_size, self.ranks),
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self.accelerator.autocast():
            found = self.loss(model, inputs, num_items_in_batch)
        return found if self.ranks.alone else found * self.ranks.world

    def _get_train_sampler(self, *given: Any) -> Any:
        if self.lengths is None:
            return super()._get_train_sampler(*given)
        rows = self.rows or self.args.train_batch_size * self.args.gradient_accumulation_steps
        return ByLength(self.lengths, rows, self.args.seed)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        found: torch.Tensor = super().training_step(*args, **kwargs)
        # Under fp16 gradients are scaled up: the scaler finds those that overflow, and leaves their step out.
        grads = [p.grad for p in self.model.parameters() if p.grad is not None and not self.args.fp16]
        norm = torch.nn.utils.get_total_norm(grads)
        for what, value in (("loss", found), ("norm of the gradient", norm)):
            if not value.isfinite():
                raise DivergedError(
                    f"training diverged: the {what} is {float(value)} at step {self.state.global_step + 1}. Lower the "
                    f"learning rate (lr={self.args.learning_rate}) and train into a new folder; if this is the first step, "
                    "look for NaN in the student's weights"
                )
        self.losses.add(float(found), float(norm))
        return found

    def fit(self, checkpoint: str | None = None) -> float:
        """Train, from a checkpoint on if given; returns the mean loss of all steps, those before the checkpoint too."""
        state = {} if checkpoint is None else read_json(Path(checkpoint) / STATE)
        for kept in self.kept:
            kept.restore(state)
        if checkpoint is not None and state["global_step"] >= state["max_steps"]:
            # Trainer would take one step too many.
            self._load_from_checkpoint(checkpoint)
            return self.losses.mean
        try:
            self.train(resume_from_checkpoint=checkpoint)
        except BaseException as error:
            # What was logged is written out, and the logs' threads end; the bar cannot, where no step was begun.
            with contextlib.suppress(AttributeError):
                self.callback_handler.on_train_end(self.args, self.state, self.control)
            if isinstance(error, pickle.UnpicklingError):
                raise PktError(
                    f"{checkpoint}: its optimizer, scheduler or random state cannot be loaded safely; remove that folder, and the "
                    "same command goes on from the checkpoint before it"
                ) from error
            raise
        return self.losses.mean
