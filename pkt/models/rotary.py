"""Rotary frequencies that follow the length (dynamic NTK, longrope): each row its own, whatever was read before or beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_CACHED = "max_seq_len_cached"


@contextlib.contextmanager
def rows_apart(model: nn.Module) -> Iterator[None]:
    """Inside, every row of a batch has the frequencies that it would have alone, in a model that has read nothing.

    transformers takes those of the longest row of the batch, and keeps the longest ever read until a short one comes. The
    model's state is what it was afterwards.
    """
    with contextlib.ExitStack() as undo:
        for name, module in model.named_modules():
            if _follows_length(module):
                rows = _Rows(module)
                parts = name.split(".")
                for depth in range(len(parts)):
                    owner = model.get_submodule(".".join(parts[:depth]))
                    undo.callback(owner.register_forward_pre_hook(rows.note, with_kwargs=True).remove)
                undo.enter_context(rows.replaced())
        yield


def _follows_length(module: Any) -> bool:
    kinds = getattr(module, "rope_type", None)
    kinds = list(kinds.values()) if isinstance(kinds, dict) else [kinds]
    return any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in kinds)


class _Rows:
    """The forward of one rotary module, row by row."""

    def __init__(self, module: Any) -> None:
        self.module, self.plain = module, module.forward
        self.mask: Tensor | None = None  # [B, T] of the batch that is read

    def note(self, owner: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if mask is None or mask.ndim == 2:
            self.mask = mask

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        if position_ids.ndim != 2:
            return self._alone(x, position_ids, *args, **kwargs)
        rows, width = max(x.shape[0], position_ids.shape[0]), position_ids.shape[1]
        if position_ids.shape[0] == rows:
            ends = position_ids.amax(1)
        elif self.mask is not None and tuple(self.mask.shape) == (rows, width):
            # Positions past the end of a row, which only padding has, are the last one's.
            ends = (self.mask.to(position_ids.device).bool() * position_ids).amax(1)
        else:
            return self._alone(x, position_ids, *args, **kwargs)
        if bool((ends == ends[0]).all()):
            return self._alone(x, position_ids.clamp(max=int(ends[0])), *args, **kwargs)
        each = [
            self._alone(x[:1], ids[None].clamp(max=end), *args, **kwargs)
            for ids, end in zip(position_ids.expand(rows, width), ends.tolist(), strict=True)
        ]
        return tuple(map(torch.cat, zip(*each, strict=True))) if isinstance(each[0], tuple) else torch.cat(each)

    def _alone(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        for key, value, name, frequencies in self._fresh():
            self.module.__dict__[key] = value
            self.module._buffers[name] = frequencies.to(x.device)
        return self.plain(x, *args, **kwargs)

    def _fresh(self) -> list[tuple[str, Any, str, Tensor]]:
        """What a module that has read nothing has: (setting, value, buffer, frequencies) for each kind of layer."""
        found = []
        for key in [k for k in self.module.__dict__ if k.endswith(_CACHED)]:
            prefix = key.removesuffix(_CACHED)
            original = getattr(self.module, f"{prefix}original_inv_freq", None)
            if original is not None and self._is_dynamic(prefix):
                found.append((key, self.module.original_max_seq_len, f"{prefix}inv_freq", original))
        return found

    def _is_dynamic(self, prefix: str) -> bool:
        kinds = self.module.rope_type
        return "dynamic" in (kinds.get(prefix.removesuffix("_"), "") if isinstance(kinds, dict) else kinds)

    @contextlib.contextmanager
    def replaced(self) -> Iterator[None]:
        forward = self.module.__dict__.get("forward")
        before = {key: value for key, value in self.module.__dict__.items() if key.endswith(_CACHED)}
        buffers = dict(self.module._buffers)
        self.module.forward = self.forward
        try:
            yield
        finally:
            del self.module.forward
            self.module.__dict__.update(before if forward is None else {**before, "forward": forward})
            self.module._buffers.update(buffers)
