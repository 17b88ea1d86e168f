"""What a person sees of a training: a bar with the time left, and a line at each of the Trainer's logs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from pkt.progress import bar, tell


class Shown(TrainerCallback):  # type: ignore[misc]
    """Instead of transformers' own bar and dictionaries. stack: what ends the bar, however the training ends."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.stack = stack
        self.advance: Callable[[int], None] = lambda done: None

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.advance = self.stack.enter_context(bar("training", state.max_steps, unit="steps"))

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.advance(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, *, logs: dict[str, Any], **more: Any) -> None:
        tell(f"step {state.global_step} of {state.max_steps}: {', '.join(_words(logs))}")


def _words(logs: dict[str, Any]) -> list[str]:
    """What a log says, the most telling first; of its own names what is known by no other."""
    known = {
        "loss": "loss {:.4f}",
        "held_out_nll": "held-out NLL {:.4f}",
        "grad_norm": "gradient norm {:.3g}",
        "learning_rate": "lr {:.3g}",
        "train_loss": "mean loss {:.4f}",
        "train_runtime": "{:.0f} s",
    }
    return [text.format(float(logs[name])) for name, text in known.items() if name in logs]
