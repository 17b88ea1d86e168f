"""The layer-major engine: exact sensitivity of a teacher of any depth with one decoder layer in memory (docs/design.md §5).

How it works. The model runs once with its decoder layers replaced by recorders (`pkt.streaming.parts`). Layers then run
forward one at a time, keeping only the hidden states at their boundaries; the head gives the gradient at the last boundary;
and from the last layer down each one is loaded again, recomputed with a graph, scored by a `pkt.scoring.Scorer`, handed to
the caller, and forgotten.

What it trades: weights are read twice and the forward pass is computed twice, for a memory that does not grow with depth.
A model that is not a plain chain of layers (its layers share parameters, or later ones use earlier hidden states) is found
out in the recorder pass and refused with `NotLayeredError`; the caller then scores it whole.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pkt import ops
from pkt.errors import PktError, SampleError
from pkt.models import rows_apart
from pkt.ranks import ALONE, Ranks
from pkt.scoring import PROBE_TOKENS, Findings, Layout, LearntError, Scorer, Sink, find_fused_head, one_order
from pkt.streaming.activations import Boundaries
from pkt.streaming.allocator import exact_memory, give_back
from pkt.streaming.loader import NotLayeredError, Teacher, dtype_of
from pkt.streaming.microbatches import Chunk, chunks_of, halved, rechunk
from pkt.streaming.parts import Key, LayeredModel
from pkt.streaming.steps import NoMemoryError, OneByOneError, in_step
from pkt.streaming.tied import HeadRowsSink, JoinedSink, changed


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
    """Scores a teacher on several tasks' batches part by part, from the head down (docs/design.md §5).

    on_part(task, key, scores, weight): S of a part's parameters by name, complete, fp32 on the device, and a function from
    a parameter's name to its value; both are valid only during the call. on_commit(key, progress): a part of every task is
    complete. on_tick: progress.

    ranks: who scores other samples of the same tasks, part by part alike. on_part then has of S what this rank owns, summed over
    all; on_commit this rank's progress. probe: two samples at most, alike on all, that show how the model is built. spread: whether
    S is shared out, or the first rank's.
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
        measure: str = "theta_grad",
        ranks: Ranks = ALONE,
        probe: dict[str, Tensor] | None = None,
        spread: bool = True,
    ) -> None:
        self.ranks, self.probe, self.spread = ranks, probe, spread
        self.parts = LayeredModel(teacher, device, num_layers, layers, prefetch=prefetch, resident=resident)
        self.device, self.count, self.itemsize = device, num_layers, dtype_of(teacher).itemsize
        self.on_part, self.on_commit, self.on_tick = on_part, on_commit, on_tick
        self.findings, self.measure = Findings(), ops.MEASURES[measure]
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
        with (
            exact_memory() if on_cpu else torch.cuda.device(self.device),
            one_order(self.device),
            rows_apart(self.parts.model),
        ):
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
                except OneByOneError:
                    if self._largest(sizes) == 1:
                        raise NotLayeredError("its use of its parameters cannot be followed") from None
                    sizes, why = [[1] * sum(task) for task in sizes], "samples cannot share a batch in this model"
                except (NoMemoryError, torch.OutOfMemoryError, RuntimeError) as error:
                    if not isinstance(error, NoMemoryError) and not (self.ranks.alone and ops.out_of_memory(error)):
                        raise
                    if self._largest(sizes) == 1:
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

    def _largest(self, sizes: list[list[int]]) -> int:
        return max(self.ranks.all_of(max((size for task in sizes for size in task), default=1)))

    def close(self) -> None:
        self.parts.close()

    def _run(
        self, chunks: list[Chunk], sizes: list[list[int]], store: Boundaries, resume: Progress | None
    ) -> list[list[float]]:
        self.state = resume
        self.largest = self._largest(sizes)
        self.tokens = sum(self.ranks.all_of(sum(int(c.batch["attention_mask"].sum()) for c in chunks)))
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
        with self.parts.watching(), in_step(self.ranks):
            self._learn_shape(chunks)
            for number, chunk in enumerate(chunks):
                hidden, chunk.calls = self.parts.record(chunk.batch)
                store.put(0, number, hidden)
        self._tick("recording", None, 1)

    def _learn_shape(self, chunks: list[Chunk]) -> None:
        """Run one layer for real on a few tokens: what it returns, and whether samples can share a batch."""
        shown = self.probe or max(chunks, key=lambda c: c.size).batch
        # Two samples need not both be this long: what is asked is where gradients go, not what they are.
        ids = shown["input_ids"][:2, :PROBE_TOKENS]
        small = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        self.parts.learn_width(small)
        hidden, calls = self.parts.record(small)
        if len(ids) < 2 or self.largest == 1:
            return

        def loss(model: nn.Module, batch: Any) -> Tensor:
            return self.parts.call(0, hidden.detach().requires_grad_(), calls[0]).float().flatten(1).sum(1)

        with self._scorer(0) as scorer:
            if not scorer.shares_a_batch({name: value.to(self.device) for name, value in small.items()}, loss):
                raise OneByOneError

    def _forward(self, index: int, chunks: list[Chunk], store: Boundaries, top: int) -> None:
        following = self.parts.layer_names[index + 1] if index + 1 < top else self.parts.layer_names[index]
        with (
            in_step(self.ranks),
            self.parts.loaded(self.parts.layer_names[index], following if index + 1 < self.count else self.parts.head),
        ):
            for number, chunk in enumerate(chunks):
                hidden = store.get(index, number, _following(index, number, len(chunks), index + 1))
                store.put(index + 1, number, self.parts.call(index, hidden, chunk.calls[index]))
        self._tick("forward", index, 1)

    def _scorer(self, key: Key, *, fused: str | None = None, tied: Sink | None = None) -> Scorer:
        """Of one part's parameters; tied: where S of the table accrues of which this part is one use."""
        names = [n for n in self.parts.names_of(key) if n in self.parts.scored]
        module, prefix = self.parts.module_of(key)
        own = Findings.of(module, names, prefix)
        alike = self.findings.alike(names)
        sinks = {} if self.parts.tied is None or tied is None else {self.parts.tied: tied}
        # The other use of a tied table is in the other part.
        shared = (own.shared - sinks.keys()) | alike.shared
        findings = Findings(shared, alike.untapped, fused=None if fused in alike.shared | alike.untapped else fused)
        blame = self.parts.first_bad_parameter
        return Scorer(module, names, findings, measure=self.measure, sinks=sinks, blame=blame, prefix=prefix)

    @contextlib.contextmanager
    def _named(self, task: int) -> Iterator[None]:
        """Errors of a sample say where the sample came from."""
        try:
            yield
        except SampleError as error:
            raise error.placed(lambda sample: self.where(task, sample)) from error

    def _until_known(
        self, task: int, make: Callable[[], Scorer], attempt: Callable[[Scorer], None]
    ) -> dict[str, Tensor]:
        """S of a part on a task: `attempt`, once more, knowing more, when a parameter turns out to need another way.

        What one rank learns, all know: they begin again together.
        """
        while True:
            scorer, learnt = make(), None
            with in_step(self.ranks):
                try:
                    with scorer, self._named(task):
                        attempt(scorer)
                        scorer.check_finite()
                except LearntError as error:
                    learnt = error.findings
                    if learnt.one_by_one or learnt == scorer.findings:
                        raise OneByOneError from None
            told = [findings for findings in self.ranks.all_of(learnt) if findings is not None]
            if not told:
                break
            self.findings = functools.reduce(Findings.joined, told, self.findings)
        scores = scorer.finish()
        if self.device.type == "cpu":
            give_back()
        return scores

    def _pieces(self, chunk: Chunk, alone: bool) -> list[tuple[int, slice, dict[str, Tensor], Layout | None]]:
        """(first sample, rows of the chunk, batch, its layout if known) of what a part is run on at once."""
        if not alone:
            return [(chunk.first, slice(0, chunk.size), chunk.batch, chunk.layout)]
        return [(chunk.first + j, slice(j, j + 1), chunk.sample(j), None) for j in range(chunk.size)]

    def _score_head(self, chunks: list[Chunk], sizes: list[list[int]], store: Boundaries) -> Progress:
        """The last norm, the head and the loss."""
        grads: dict[int, Tensor] = {}
        losses: list[list[float]] = [[] for _ in sizes]
        carried: list[dict[str, Tensor]] = [{} for _ in sizes]
        with self.parts.loaded(self.parts.head, self.parts.layer_names[self.count - 1]):
            for task in range(len(sizes)):
                scores, rows = self._score_head_on(task, chunks, store, losses, grads)
                if self.parts.tied is not None and rows is not None:
                    # S of the table so far, and the gradient rows its other use will touch.
                    whole = self.ranks.summed({"scores": scores.pop(self.parts.tied)})
                    table = {key: store.spilled(f"tied-{task}", t.cpu()) for key, t in whole.items()}
                    carried[task] = {**table, **rows.carried()}
                self.on_part(task, "head", self.ranks.summed(scores, spread=self.spread), self.parts.weight)
                del scores, rows
        for number in range(len(chunks)):
            store.drop(self.count, number)
        state = Progress(self.count, [grads[n] for n in range(len(chunks))], losses, carried, sizes)
        self.on_commit("head", state)
        self._tick("head", None, 1)
        return state

    def _score_head_on(
        self,
        task: int,
        chunks: list[Chunk],
        store: Boundaries,
        losses: list[list[float]],
        grads: dict[int, Tensor],
    ) -> tuple[dict[str, Tensor], HeadRowsSink | None]:
        """Scores of one task; its losses and gradients are filled in. One sample at a time where logits have to exist."""
        mine = _of_task(chunks, task)
        fused = self._fused_head(mine[0][1], store.get(self.count, mine[0][0])) if mine else None
        rows: HeadRowsSink | None = None

        def make() -> Scorer:
            nonlocal rows
            rows = None if self.parts.tied is None else HeadRowsSink(self.parts.weight(self.parts.tied), self.measure)
            return self._scorer("head", fused=fused, tied=rows)

        def attempt(scorer: Scorer) -> None:
            losses[task] = []
            for number, chunk in mine:
                hidden = store.get(self.count, number, _following(self.count, number, len(chunks), self.count - 1))
                kept_in = torch.float32 if scorer.half else hidden.dtype
                grads[number] = torch.zeros(hidden.shape, dtype=kept_in, device=hidden.device)
                for first, part, batch, layout in self._pieces(chunk, alone=scorer.fused is None):
                    if rows is not None:
                        rows.begin_batch(batch, first)
                    length = batch["input_ids"].shape[1]
                    values, found = self._head_of(scorer, batch, first, hidden[part, :length], layout)
                    losses[task] += values
                    grads[number][part, :length] = found

        return self._until_known(task, make, attempt), rows

    def _head_of(
        self, scorer: Scorer, batch: dict[str, Tensor], first: int, hidden: Tensor, layout: Layout | None
    ) -> tuple[list[float], Tensor]:
        """Losses of the samples and the gradient at the last boundary."""
        leaf = hidden.detach().requires_grad_()
        with scorer.samples(batch, first, layout):
            with self.parts.after_layers(batch, leaf) as inputs:
                losses, values = scorer.losses(inputs, scorer.default_loss, first)
            grad = scorer.backward(losses, leaf)
        if grad is None or ("inputs_embeds" in inputs and inputs["inputs_embeds"].grad is not None):
            raise NotLayeredError("its head uses more than the last layer's hidden states")
        return values, grad

    def _fused_head(self, chunk: Chunk, hidden: Tensor) -> str | None:
        """The head's weight when the loss can be had without logits, tried on a few tokens."""
        few = {k: v[:1, :PROBE_TOKENS] for k, v in chunk.batch.items()}
        names = self.parts.scored.intersection(self.parts.head)
        with self.parts.after_layers(few, hidden[:1, :PROBE_TOKENS]) as inputs:
            return find_fused_head(self.parts.model, names, inputs)

    def _score_layer(self, index: int, chunks: list[Chunk], store: Boundaries, state: Progress) -> Progress:
        grads: dict[int, Tensor] = {}

        def attempt(task: int, scorer: Scorer) -> None:
            for number, chunk in _of_task(chunks, task):
                following = _following(index, number, len(chunks), index - 1)
                leaf = store.get(index, number, following).detach().requires_grad_()
                with scorer.samples(chunk.batch, chunk.first, chunk.layout):
                    out = self.parts.call(index, leaf, chunk.calls[index])
                    grad = scorer.backward_from(out, state.grads[number], leaf)
                assert grad is not None
                grads[number] = grad.detach()

        # What precedes the layers is not read ahead: a table may be many times a layer.
        with self.parts.loaded(self.parts.layer_names[index], self.parts.layer_names[index - 1] if index else None):
            for task in range(len(state.sizes)):
                make = functools.partial(self._scorer, index)
                scores = self._until_known(task, make, functools.partial(attempt, task))
                scores = self.ranks.summed(scores, spread=self.spread)
                self.on_part(task, index, scores, self.parts.weight)
                del scores
        for number in range(len(chunks)):
            store.drop(index, number)
        self._tick("backward", index, 3)
        return Progress(index, [grads[n] for n in range(len(chunks))], state.losses, state.carried, state.sizes)

    def _score_front(self, chunks: list[Chunk], state: Progress) -> None:
        with self.parts.loaded(self.parts.front):
            for task in range(len(state.sizes)):
                mine = _of_task(chunks, task)
                try:
                    scores, change = self._score_front_on(task, mine, state, alone=False)
                except OneByOneError:
                    scores, change = self._score_front_on(task, mine, state, alone=True)
                changes = None if change is None else self._changes(change, scores)
                scores = self.ranks.summed(scores, spread=self.spread)
                with self._joined(changes, scores, state.carried[task]):
                    self.on_part(task, "front", scores, self.parts.weight)
                del scores, change, changes
        self._tick("front", None, 1)

    def _score_front_on(
        self, task: int, mine: list[tuple[int, Chunk]], state: Progress, *, alone: bool
    ) -> tuple[dict[str, Tensor], JoinedSink | None]:
        change: JoinedSink | None = None

        def make() -> Scorer:
            nonlocal change
            tied = self.parts.tied
            change = None if tied is None else JoinedSink(self.parts.weight(tied), self.measure, state.carried[task])
            return self._scorer("front", tied=change)

        def attempt(scorer: Scorer) -> None:
            for number, chunk in mine:
                for first, part, batch, layout in self._pieces(chunk, alone):
                    if change is not None:
                        change.begin_batch(batch, first)
                    grad = state.grads[number][part, : batch["input_ids"].shape[1]]
                    with scorer.samples(batch, first, layout):
                        scorer.backward_from(self.parts.to_first_layer(batch), grad, None)

        return self._until_known(task, make, attempt), change

    def _changes(self, change: JoinedSink, scores: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]] | None:
        """Which rows of a tied table its other use changes, and by how much, of each rank; where the table is."""
        assert self.parts.tied is not None
        if self.ranks.alone:
            return [(change.touched, scores[self.parts.tied])]
        return self.ranks.gathered((change.touched.cpu(), scores.pop(self.parts.tied).cpu()))

    @contextlib.contextmanager
    def _joined(
        self,
        changes: list[tuple[Tensor, Tensor]] | None,
        scores: dict[str, Tensor],
        carried: dict[str, Tensor],
    ) -> Iterator[None]:
        """Inside, a tied table's scores are those of both its uses. What was carried is as before afterwards."""
        if self.parts.tied is None or changes is None:
            yield
            return
        # On a CPU it is the carried tensor itself, and a run that is out of memory now begins this part again.
        with changed(carried["scores"].to(self.device), changes) as scores[self.parts.tied]:
            yield

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


def _of_task(chunks: list[Chunk], task: int) -> list[tuple[int, Chunk]]:
    """The micro-batches of a task, each with its number among all."""
    return [(number, chunk) for number, chunk in enumerate(chunks) if chunk.task == task]


def _following(boundary: int, number: int, count: int, then: int) -> tuple[int, int]:
    """What is wanted after a micro-batch of a boundary: the next one, or the first at the boundary of the next layer."""
    return (boundary, number + 1) if number + 1 < count else (then, 0)
