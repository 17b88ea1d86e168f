"""The layer-major engine: exact sensitivity of a teacher of any depth with one decoder layer in memory (DESIGN, section 5).

How it works. The model runs once with its decoder layers replaced by recorders (`pkt.streaming.parts`). Layers then run
forward one at a time, keeping only the hidden states at their boundaries; the head gives the gradient at the last boundary;
and from the last layer down each one is loaded again, recomputed with a graph, scored by the taps of `pkt.scoring.scorer`,
handed to the caller, and forgotten.

What it trades: weights are read twice and the forward pass is computed twice, for a memory that does not grow with depth.
A model that is not a plain chain of layers (its layers share parameters, or later ones use earlier hidden states) is found
out in the recorder pass and refused with `NotLayeredError`; the caller then scores it whole.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pkt import ops
from pkt.errors import PktError, SampleError
from pkt.scoring import RestartError, default_loss, one_order
from pkt.streaming.activations import Boundaries
from pkt.streaming.allocator import exact_memory
from pkt.streaming.loader import NotLayeredError, Teacher, dtype_of
from pkt.streaming.microbatches import Chunk, chunks_of, halved, rechunk
from pkt.streaming.parts import Key, LayeredModel
from pkt.streaming.tied import FrontScorer, HeadScorer, PartScorer

_PROBE_TOKENS = 24


class _OneByOneError(Exception):
    """Samples cannot share a batch in this model; begin again with one sample a micro-batch."""


@dataclass
class Progress:
    """Where the run stands when a part is complete: all that a resumed run needs besides the inputs."""

    boundary: int  # the gradient below is at this layer's input
    grads: list[Tensor]  # one per chunk
    losses: list[list[float]]  # by task
    carried: list[dict[str, Tensor]]  # by task: a tied table's unfinished scores
    sizes: list[list[int]]  # by task: samples of each chunk


@dataclass
class Tick:
    """One line of progress."""

    phase: str
    layer: int | None
    done: int
    total: int
    seconds: float
    tokens_per_s: float
    bytes_per_s: float
    waiting: float  # share of the time spent waiting for weights
    seconds_left: float


Part: TypeAlias = Callable[[int, Key, dict[str, Tensor], Callable[[str], Tensor]], None]


class Engine:
    """Scores a teacher on several tasks' batches part by part, from the head down (DESIGN, section 5).

    on_part(task, key, scores, weight): S of a part's parameters by name, complete, fp32 on the device, and a function from
    a parameter's name to its value; both are valid only during the call. on_commit(key, progress): a part of every task is
    complete. on_tick: progress.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        device: torch.device,
        num_layers: int,
        layers: str,
        on_part: Part,
        on_commit: Callable[[Key, Progress], None] = lambda key, progress: None,
        on_tick: Callable[[Tick], None] = lambda tick: None,
        prefetch: bool = True,
        resident: bool = False,
    ) -> None:
        self.parts = LayeredModel(teacher, device, num_layers, layers, prefetch=prefetch, resident=resident)
        self.device, self.count, self.itemsize = device, num_layers, dtype_of(teacher).itemsize
        self.on_part, self.on_commit, self.on_tick = on_part, on_commit, on_tick
        self.learnt: tuple[set[str], set[str]] = (set(), set())
        self.begin = time.perf_counter()

    def weights_of(self, key: Key) -> contextlib.AbstractContextManager[Callable[[str], Tensor]]:
        """A part's parameters once more, for what could not be decided while they were there."""
        return self.parts.weights_of(key)

    def run(
        self,
        tasks: Sequence[Sequence[dict[str, Tensor]]],
        sizes: list[list[int]],
        store: Callable[[], Boundaries],
        *,
        where: Callable[[int, int], str] = lambda task, sample: f"sample {sample}",
        resume: Progress | None = None,
        on_sizes: Callable[[list[list[int]], str], None] = lambda sizes, why: None,
    ) -> list[list[float]]:
        """Score every part of the teacher on every task; the losses by task, in the samples' order.

        sizes: micro-batches of each task. When one is too large for the memory, or samples cannot share a batch, they are
        made smaller, `on_sizes` is told, and the run goes on from the last complete part.
        """
        self.where = where
        on_cpu = self.device.type == "cpu"
        with exact_memory() if on_cpu else torch.cuda.device(self.device), one_order(self.device):
            return self._run_and_halve(tasks, sizes, store, resume, on_sizes)

    def _run_and_halve(
        self,
        tasks: Sequence[Sequence[dict[str, Tensor]]],
        sizes: list[list[int]],
        store: Callable[[], Boundaries],
        state: Progress | None,
        on_sizes: Callable[[list[list[int]], str], None],
    ) -> list[list[float]]:
        modes = {m: m.training for m in self.parts.model.modules()}
        self.parts.model.eval()
        try:
            while True:
                boundaries = store()
                try:
                    return self._run(chunks_of(tasks, sizes, self.device, self.itemsize), sizes, boundaries, state)
                except _OneByOneError:
                    if max(map(max, sizes)) == 1:
                        raise NotLayeredError("its use of its parameters cannot be followed") from None
                    sizes, why = [[1] * sum(task) for task in sizes], "samples cannot share a batch in this model"
                except (torch.OutOfMemoryError, RuntimeError) as error:
                    if not ops.out_of_memory(error):
                        raise
                    if max(map(max, sizes)) == 1:
                        raise PktError(
                            "not enough memory for one sample at a time; give more with --device-memory or --host-memory, "
                            f"or shorten the seeds with --max-length ({str(error).splitlines()[0]})"
                        ) from error
                    sizes, why = [halved(task) for task in sizes], "out of memory"
                finally:
                    boundaries.close()
                state = self.state
                on_sizes(sizes, why)
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
        finally:
            for module, training in modes.items():
                module.training = training

    def close(self) -> None:
        self.parts.close()

    def _run(
        self, chunks: list[Chunk], sizes: list[list[int]], store: Boundaries, resume: Progress | None
    ) -> list[list[float]]:
        self.state = resume
        self.tokens = sum(int(c.batch["attention_mask"].sum()) for c in chunks)
        top = self.count if resume is None else resume.boundary
        self.steps, self.done_steps = 4 * top + 3, 0
        last = top if resume is None else top - 1
        with torch.no_grad():
            with self.parts.loaded(self.parts.layer_names[0]):
                self._record_all(chunks, store)
                if last > 0:
                    self._forward(0, chunks, store, top)
            for index in range(1, last):
                self._forward(index, chunks, store, top)
        if resume is None:
            state = self._score_head(chunks, sizes, store)
        else:
            state = Progress(
                resume.boundary,
                [grad.to(self.device) for grad in rechunk(resume.grads, resume.sizes, chunks)],
                resume.losses,
                resume.carried,
                sizes,
            )
        self.state = state
        for index in reversed(range(top)):
            state = self.state = self._score_layer(index, chunks, store, state)
            self.on_commit(index, state)
        self._score_front(chunks, state)
        self.on_commit("front", state)
        return state.losses

    def _record_all(self, chunks: list[Chunk], store: Boundaries) -> None:
        with self.parts.watching():
            self._learn_shape(chunks)
            for number, chunk in enumerate(chunks):
                hidden, chunk.calls = self.parts.record(chunk.batch)
                store.put(0, number, hidden)
        self._tick("recording", None, 1)

    def _learn_shape(self, chunks: list[Chunk]) -> None:
        """Run one layer for real on a few tokens: what it returns, and whether samples can share a batch."""
        widest = max(chunks, key=lambda c: c.size)
        # Two samples need not both be this long: what is asked is where gradients go, not what they are.
        ids = widest.batch["input_ids"][:2, :_PROBE_TOKENS]
        small = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        self.parts.learn_width(small)
        hidden, calls = self.parts.record(small)
        if len(ids) < 2:
            return
        with self._scorer(PartScorer, 0) as scorer:

            def loss(layer: nn.Module, batch: Any) -> Tensor:
                return self.parts.call(0, hidden.detach().requires_grad_(), calls[0]).float().flatten(1).sum(1)

            scorer._probe_layout({**small, "labels": ids}, loss)
            if scorer.one_by_one:
                raise _OneByOneError

    def _forward(self, index: int, chunks: list[Chunk], store: Boundaries, top: int) -> None:
        following = self.parts.layer_names[index + 1] if index + 1 < top else self.parts.layer_names[index]
        with self.parts.loaded(self.parts.layer_names[index], following if index + 1 < self.count else self.parts.head):
            for number, chunk in enumerate(chunks):
                hidden = store.get(index, number, _following(index, number, len(chunks), index + 1))
                store.put(index + 1, number, self.parts.call(index, hidden, chunk.calls[index]))
        self._tick("forward", index, 1)

    def _scorer(self, kind: Any, key: Key, names: Sequence[str] | None = None, **options: Any) -> Any:
        names = self.parts.names_of(key) if names is None else names
        scorer = kind(self.parts.model, [n for n in names if n in self.parts.scored], **options)
        scorer.blame = self.parts.first_bad_parameter
        for learnt, known in zip(self.learnt, (scorer.shared, scorer.untapped), strict=True):
            known |= {n for n in scorer.parameters if _in_any_layer(n) in learnt}
        return scorer

    @contextlib.contextmanager
    def _named(self, task: int) -> Iterator[None]:
        """Errors of a sample say where the sample came from."""
        try:
            yield
        except SampleError as error:
            raise error.placed(lambda sample: self.where(task, sample)) from error

    def _until_known(self, scorer: Any, attempt: Callable[[], Any]) -> Any:
        """Run `attempt`; begin again, knowing more, when a parameter turns out to need another way."""
        while True:
            scorer._reset()
            known = (len(scorer.shared), len(scorer.untapped))
            try:
                return attempt()
            except RestartError:
                if known == (len(scorer.shared), len(scorer.untapped)):
                    raise _OneByOneError from None
                for learnt, found in zip(self.learnt, (scorer.shared, scorer.untapped), strict=True):
                    learnt |= {_in_any_layer(n) for n in found}

    def _pieces(self, chunk: Chunk, alone: bool) -> list[tuple[int, slice, dict[str, Tensor]]]:
        """(first sample, rows of the chunk, batch) of what a part is run on at once."""
        if not alone:
            return [(chunk.first, slice(0, chunk.size), chunk.batch)]
        return [(chunk.first + j, slice(j, j + 1), chunk.sample(j)) for j in range(chunk.size)]

    def _score_head(self, chunks: list[Chunk], sizes: list[list[int]], store: Boundaries) -> Progress:
        """The last norm, the head and the loss; one sample at a time where the logits have to exist."""
        grads: dict[int, Tensor] = {}
        losses: list[list[float]] = [[] for _ in sizes]
        carried: list[dict[str, Tensor]] = [{} for _ in sizes]
        with self.parts.loaded(self.parts.head, self.parts.layer_names[self.count - 1]):
            for task in range(len(sizes)):
                mine = [(n, c) for n, c in enumerate(chunks) if c.task == task]
                with self._scorer(HeadScorer, "head", tied=self.parts.tied) as scorer, self._named(task):
                    self._find_head(scorer, mine[0][1], store.get(self.count, mine[0][0]))

                    def attempt(mine: Any = mine, scorer: Any = scorer, task: int = task) -> None:
                        losses[task] = []
                        scorer.kept.clear()
                        for number, chunk in mine:
                            hidden = store.get(
                                self.count, number, _following(self.count, number, len(chunks), self.count - 1)
                            )
                            grad = torch.zeros(
                                hidden.shape, dtype=torch.float32 if scorer.half else hidden.dtype, device=hidden.device
                            )
                            for first, rows, batch in self._pieces(chunk, alone=scorer.fused is None):
                                length = batch["input_ids"].shape[1]
                                values, found = self._head_of(scorer, batch, first, hidden[rows, :length])
                                losses[task] += values
                                grad[rows, :length] = found
                            grads[number] = grad

                    self._until_known(scorer, attempt)
                scores = scorer.finish()
                if self.parts.tied is not None:
                    carried[task] = self._carry(scorer, scores.pop(self.parts.tied), store, task)
                self.on_part(task, "head", scores, self.parts.weight)
                del scores, scorer
        for number in range(len(chunks)):
            store.drop(self.count, number)
        state = Progress(self.count, [grads[n] for n in range(len(chunks))], losses, carried, sizes)
        self.on_commit("head", state)
        self._tick("head", None, 1)
        return state

    def _head_of(
        self, scorer: HeadScorer, batch: dict[str, Tensor], first: int, hidden: Tensor
    ) -> tuple[list[float], Tensor]:
        """Losses of the samples and the gradient at the last boundary."""
        leaf = hidden.detach().requires_grad_()
        scorer.ids = batch["input_ids"].to(self.device)
        with scorer.samples(batch, first):
            loss_fn = default_loss if scorer.fused is None else scorer._head_loss
            try:
                with self.parts.after_layers(batch, leaf) as inputs:
                    losses = loss_fn(self.parts.model, inputs).reshape(-1)
            except SampleError as error:
                raise error.shifted(first) from None
            values: list[float] = losses.detach().double().tolist()
            for j, value in enumerate(values):
                if not math.isfinite(value):
                    raise SampleError(f"the loss of {{samples}} is {value}; {scorer._blame()}", [first + j])
            grad = scorer.backward(losses, leaf)
            scorer.keep_fused()
        if grad is None or ("inputs_embeds" in inputs and inputs["inputs_embeds"].grad is not None):
            raise NotLayeredError("its head uses more than the last layer's hidden states")
        return values, grad

    def _find_head(self, scorer: HeadScorer, chunk: Chunk, hidden: Tensor) -> None:
        """Whether the loss can be had without logits, tried on a few tokens."""
        few = {k: v[:1, :_PROBE_TOKENS] for k, v in chunk.batch.items()}
        with self.parts.after_layers(few, hidden[:1, :_PROBE_TOKENS]) as inputs:
            scorer._find_head(inputs, head_only=True)

    def _carry(self, scorer: HeadScorer, table: Tensor, store: Boundaries, task: int) -> dict[str, Tensor]:
        """A tied table's scores so far, and the gradient rows its other use will touch."""
        kept = [scorer.kept[k] for k in sorted(scorer.kept)]
        return {
            "scores": store.spilled(f"tied-{task}", table.cpu()),
            "ids": torch.cat([ids for ids, _ in kept]).cpu(),
            "rows": torch.cat([rows for _, rows in kept]).cpu(),
            "counts": torch.tensor([len(ids) for ids, _ in kept]),
        }

    def _score_layer(self, index: int, chunks: list[Chunk], store: Boundaries, state: Progress) -> Progress:
        grads: dict[int, Tensor] = {}
        # What precedes the layers is not read ahead: a table may be many times a layer.
        with self.parts.loaded(self.parts.layer_names[index], self.parts.layer_names[index - 1] if index else None):
            for task in range(len(state.sizes)):
                mine = [(n, c) for n, c in enumerate(chunks) if c.task == task]
                with self._scorer(PartScorer, index) as scorer, self._named(task):

                    def attempt(mine: Any = mine, scorer: Any = scorer) -> None:
                        for number, chunk in mine:
                            following = _following(index, number, len(chunks), index - 1)
                            leaf = store.get(index, number, following).detach().requires_grad_()
                            with scorer.samples(chunk.batch, chunk.first):
                                out = self.parts.call(index, leaf, chunk.calls[index])
                                grad = scorer.backward_from(out, state.grads[number], leaf)
                            assert grad is not None
                            grads[number] = grad.detach()

                    self._until_known(scorer, attempt)
                scores = scorer.finish()
                self.on_part(task, index, scores, self.parts.weight)
                del scores, scorer
        for number in range(len(chunks)):
            store.drop(index, number)
        self._tick("backward", index, 3)
        return Progress(index, [grads[n] for n in range(len(chunks))], state.losses, state.carried, state.sizes)

    def _score_front(self, chunks: list[Chunk], state: Progress) -> None:
        with self.parts.loaded(self.parts.front):
            for task in range(len(state.sizes)):
                mine = [(n, c) for n, c in enumerate(chunks) if c.task == task]
                for alone in (False, True):
                    with self._scorer(FrontScorer, "front", tied=self.parts.tied) as scorer, self._named(task):
                        self._join_tied(scorer, state.carried[task])

                        def attempt(mine: Any = mine, scorer: Any = scorer, alone: bool = alone) -> None:
                            for number, chunk in mine:
                                for first, rows, batch in self._pieces(chunk, alone):
                                    scorer.ids = batch["input_ids"].to(self.device)
                                    grad = state.grads[number][rows, : batch["input_ids"].shape[1]]
                                    with scorer.samples(batch, first):
                                        scorer.backward_from(self.parts.to_first_layer(batch), grad, None)

                        try:
                            self._until_known(scorer, attempt)
                        except _OneByOneError:
                            if alone:
                                raise
                            continue
                    break
                scores = scorer.finish()
                with self._joined(scorer, scores, state.carried[task]):
                    self.on_part(task, "front", scores, self.parts.weight)
                del scores, scorer
        self._tick("front", None, 1)

    def _join_tied(self, scorer: FrontScorer, carried: dict[str, Tensor]) -> None:
        if self.parts.tied is None:
            return
        counts = carried["counts"].tolist()
        pairs = zip(carried["ids"].split(counts), carried["rows"].split(counts), strict=True)
        scorer.head, scorer.touched = dict(enumerate(pairs)), carried["ids"].unique().to(self.device)

    @contextlib.contextmanager
    def _joined(self, scorer: FrontScorer, scores: dict[str, Tensor], carried: dict[str, Tensor]) -> Iterator[None]:
        """Inside, a tied table's scores are those of both its uses. What was carried is as before afterwards."""
        if self.parts.tied is None:
            yield
            return
        change, table = scores[self.parts.tied], carried["scores"].to(self.device)
        before = table[scorer.touched]
        table[scorer.touched] = before + change
        scores[self.parts.tied] = table
        try:
            yield
        finally:
            # On a CPU it is the carried tensor itself, and a run that is out of memory now begins this part again.
            table[scorer.touched] = before

    def _tick(self, phase: str, layer: int | None, steps: int) -> None:
        self.done_steps += steps
        seconds = time.perf_counter() - self.begin
        loader = self.parts.loader
        self.on_tick(
            Tick(
                phase,
                layer,
                self.done_steps,
                self.steps,
                seconds,
                self.tokens * self.done_steps / self.steps / seconds,
                loader.bytes_read / seconds if loader else 0.0,
                loader.waited / seconds if loader else 0.0,
                seconds * max(0, self.steps - self.done_steps) / self.done_steps,
            )
        )


def _following(boundary: int, number: int, count: int, then: int) -> tuple[int, int]:
    """What is wanted after a micro-batch of a boundary: the next one, or the first at the boundary of the next layer."""
    return (boundary, number + 1) if number + 1 < count else (then, 0)


def _in_any_layer(name: str) -> str:
    """What is learnt about a parameter of one layer holds for its like in the others."""
    return re.sub(r"\.\d+\.", ".*.", name)
