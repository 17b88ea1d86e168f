"""A teacher's last hidden states and its head with one decoder layer in memory: the engine's forward half (docs/design.md §5).

The model runs once a micro-batch with its decoder layers replaced by recorders; then each layer computes all micro-batches of a
pass and is forgotten. Of the activations only those at one boundary are kept, for nothing goes back. What follows the layers
(last norm, head, what a family does to its logits) is the model's own and runs on any tokens' hidden states, a block at a time.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pkt import ops
from pkt.errors import PktError
from pkt.models import rows_apart
from pkt.scoring.losses import output_field
from pkt.streaming.activations import Boundaries
from pkt.streaming.engine import Tick
from pkt.streaming.loader import NotLayeredError, Teacher, dtype_of
from pkt.streaming.memory import Place
from pkt.streaming.microbatches import Chunk, chunks_of, halved
from pkt.streaming.parts import LayeredModel

PROBE = 16  # tokens that tell whether the head takes each by itself

Head: TypeAlias = Callable[[Tensor], Tensor]  # hidden states [C, d] of any tokens -> their logits [C, V]
Read: TypeAlias = Callable[[Chunk, Tensor, Head], Any]


class Forward:
    """Runs a teacher forward, pass by pass. passes: how many there will be, for the progress that `on_tick` is told."""

    def __init__(
        self,
        teacher: Teacher,
        *,
        device: torch.device,
        num_layers: int,
        layers: str,
        place: Place = "device",
        passes: int = 1,
        positions: int | None = None,
        prefetch: bool = True,
        resident: bool = False,
        on_tick: Callable[[Tick], None] = lambda tick: None,
    ) -> None:
        self.parts = LayeredModel(teacher, device, num_layers, layers, prefetch=prefetch, resident=resident)
        self.device, self.count, self.itemsize = device, num_layers, dtype_of(teacher).itemsize
        self.place, self.positions, self.on_tick = place, positions, on_tick
        self.steps, self.done, self.tokens, self.begin = passes * (num_layers + 1), 0, 0, time.perf_counter()

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Inside, the model is in eval mode and `run` may be called."""
        model = self.parts.model
        modes = {m: m.training for m in model.modules()}
        here = contextlib.nullcontext() if self.device.type == "cpu" else torch.cuda.device(self.device)
        model.eval()
        try:
            with here, rows_apart(model), torch.no_grad():
                yield
        finally:
            for module, training in modes.items():
                module.training = training
            self.parts.close()

    def run(
        self,
        samples: Sequence[dict[str, Tensor]],
        sizes: list[int],
        read: Read,
        on_sizes: Callable[[list[int], str], None] = lambda sizes, why: None,
    ) -> list[Any]:
        """One pass over samples (batches of one, unpadded): what `read(chunk, hidden states [B, T, d], head)` gave of each
        micro-batch. When one is too large for the memory they are halved, `on_sizes` is told, and the pass begins again.
        """
        while True:
            places: list[Place] = [self.place] * (self.count + 1)
            store = Boundaries(self.device, places, None, behind=False)
            done = self.done
            try:
                return self._run(chunks_of([samples], [sizes], self.device, self.itemsize), store, read)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not ops.out_of_memory(error):
                    raise
                if max(sizes) == 1:
                    raise PktError(
                        "not enough memory for one row at a time; give more with --device-memory, or shorten the rows with "
                        f"--max-length ({str(error).splitlines()[0]})"
                    ) from error
                sizes, self.done = halved(sizes), done
            finally:
                store.close()
            on_sizes(sizes, "out of memory")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _run(self, chunks: list[Chunk], store: Boundaries, read: Read) -> list[Any]:
        parts, last = self.parts, self.count - 1
        with parts.loaded(parts.layer_names[0]):
            self._record(chunks, store)
            self._layer(0, chunks, store)
        for index in range(1, self.count):
            self._layer(index, chunks, store)
        found = []
        with parts.loaded(parts.head, parts.layer_names[0] if self.steps - self.done > 1 else None):
            for number, chunk in enumerate(chunks):
                following = (last + 1, number + 1) if number + 1 < len(chunks) else None
                hidden = store.get(last + 1, number, following)
                if number == 0:
                    self._check_head(hidden[0, : min(PROBE, int(chunk.batch["attention_mask"][0].sum()))])
                found.append(read(chunk, hidden, self.logits))
                store.drop(last + 1, number)
                chunk.calls.clear()
        self._tick("head", None, chunks)
        return found

    def _record(self, chunks: list[Chunk], store: Boundaries) -> None:
        with self.parts.watching():
            few = {k: v[:1, :PROBE] for k, v in chunks[0].batch.items() if k != "labels"}
            self.parts.learn_width(few)
            for number, chunk in enumerate(chunks):
                hidden, chunk.calls = self.parts.record(chunk.batch)
                store.put(0, number, hidden)

    def _layer(self, index: int, chunks: list[Chunk], store: Boundaries) -> None:
        then = self.parts.layer_names[index + 1] if index + 1 < self.count else self.parts.head
        with self.parts.loaded(self.parts.layer_names[index], then):
            for number, chunk in enumerate(chunks):
                following = (index, number + 1) if number + 1 < len(chunks) else None
                hidden = store.get(index, number, following)
                store.drop(index, number)
                store.put(index + 1, number, self.parts.call(index, hidden, chunk.calls[index]))
        self._tick("forward", index, chunks)

    def logits(self, rows: Tensor) -> Tensor:
        """What the model makes of the last layer's hidden states [C, d]: logits [C, V], in its own type."""
        most = self.positions or len(rows)
        if len(rows) > most:
            return torch.cat([self.logits(part) for part in rows.split(most)])
        batch = {"input_ids": torch.zeros(1, len(rows), dtype=torch.int64)}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        with self.parts.after_layers(batch, rows[None]) as inputs:
            found = output_field(self.parts.model(**inputs, use_cache=False), "logits")
        if found is None:
            raise NotLayeredError("it gives no logits")
        return found[0]

    def _check_head(self, rows: Tensor) -> None:
        """Refuse a head whose logits of a token depend on its neighbours."""
        there, back = self.logits(rows).float(), self.logits(rows.flip(0)).flip(0).float()
        if bool((there - back).abs().max() > 1e-2 * there.abs().max()):
            raise NotLayeredError("what follows its layers does not take every token by itself")

    def _tick(self, phase: str, layer: int | None, chunks: list[Chunk]) -> None:
        self.done += 1
        seconds = time.perf_counter() - self.begin
        if phase == "head":
            self.tokens += sum(int(c.batch["attention_mask"].sum()) for c in chunks)
        loader = self.parts.loader
        read, waited = (loader.bytes_read, loader.waited) if loader else (0, 0.0)
        left = seconds * max(0, self.steps - self.done) / self.done
        each = functools.partial(Tick, phase, layer, self.done, self.steps, seconds)
        self.on_tick(each(self.tokens / seconds, read / seconds, waited / seconds, left))
