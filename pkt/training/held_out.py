"""Rows held out from training: the model is measured on them every so many steps, and the best weights are what a run ends with.

A look at them takes no random number, so that training is the same with and without. What was found is kept in every checkpoint,
and the best weights of each checkpoint that is there in a file beside it: a resumed run ends as an undisturbed one.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from pkt.errors import PktError
from pkt.files import atomic_file, read_json, write_tensors
from pkt.progress import tell
from pkt.ranks import ALONE, Ranks
from pkt.seeds import Seeds
from pkt.training.evaluation import evaluate


class HeldOut(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Measures a model on `rows` before the first step, every `every` steps and after the last; keeps the best weights in `out`.

    Of ranks all measure, and the first one writes.

    looks: (step, nats per answer token), in order. tell: is told of each by name, as transformers' `Trainer.log` is.
    """

    def __init__(
        self, rows: Seeds, out: Path, every: int, batch_size: int, *, quietly: bool = False, ranks: Ranks = ALONE
    ) -> None:
        self.ranks = ranks
        self.rows, self.out, self.every, self.batch_size, self.quietly = rows, out, every, batch_size, quietly
        self.looks: list[tuple[int, float]] = []
        self.tell: Callable[[dict[str, float]], None] = lambda values: None

    @property
    def best(self) -> tuple[int, float]:
        """(step, nats per answer token) of the best look, the earlier of two alike."""
        return _best(self.looks)

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"looks": self.looks}}

    def restore(self, trainer_state: dict[str, Any]) -> None:
        """As it was at a checkpoint. Raises `PktError` where the best weights until then are gone."""
        self.looks = [(int(step), float(nll)) for step, nll in _looks_in(trainer_state)]
        if self.looks and self.ranks.first and not self._file(self.best[0]).is_file():
            raise PktError(
                f"{self._file(self.best[0])}, the best weights so far, is missing; start over with --force, or put it back"
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **more: Any) -> None:
        if state.global_step == 0:
            self._look(model, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **more: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._look(model, state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Forget weights that are the best neither now nor of a checkpoint that is there."""
        wanted = {self.best[0]}
        for file in self.out.glob("checkpoint-*/trainer_state.json"):
            # One that is not whole is never gone on from.
            with contextlib.suppress(PktError):
                wanted |= {_best(_looks_in(read_json(file)))[0]}
        self._forget(wanted)

    def _look(self, model: Any, step: int) -> None:
        nll = evaluate(model, self.rows, batch_size=self.batch_size).nll
        self.looks.append((step, nll))
        self.tell({"held_out_nll": nll})
        if self.best[0] == step and self.ranks.first:
            with atomic_file(self._file(step)) as scratch:
                write_tensors(scratch, {n: p for n, p in model.named_parameters() if p.requires_grad})

    def put_back(self, model: Any) -> None:
        """Give the model its best weights."""
        step, nll = self.best
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        if self.ranks.first:
            weights = load_file(str(self._file(step)))
            for name, parameter in trained.items():
                parameter.copy_(weights[name])
        self.ranks.copied(trained)
        if not self.quietly:
            tell(
                f"held-out NLL {self.looks[0][1]:.4f} before training, {nll:.4f} at its best (step {step}), which is kept"
            )

    def told(self) -> dict[str, Any]:
        """What a run records of it."""
        step, nll = self.best
        return {
            "rows": self.rows.describe(),
            "best": {"step": step, "nll": nll},
            "looks": [list(look) for look in self.looks],
        }

    def clean(self) -> None:
        """Remove the weights beside a run that has ended."""
        self._forget(set())

    def _file(self, step: int) -> Path:
        return self.out / f"best-{step}.safetensors"

    def _forget(self, wanted: set[int]) -> None:
        if not self.ranks.first:
            return
        for file in self.out.glob("best-*.safetensors"):
            match = re.fullmatch(r"best-(\d+)\.safetensors", file.name)
            if match and int(match[1]) not in wanted:
                file.unlink(missing_ok=True)


def _best(looks: list[tuple[int, float]]) -> tuple[int, float]:
    return min(looks, key=lambda look: (look[1], look[0]), default=(-1, 0.0))


def _looks_in(trainer_state: Any) -> list[tuple[int, float]]:
    kept = trainer_state.get("stateful_callbacks", {}).get("HeldOut", {}).get("attributes", {})
    return [(look[0], look[1]) for look in kept.get("looks", [])]
