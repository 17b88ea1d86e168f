"""The layer-major engine: exact sensitivity of a teacher of any depth with one decoder layer in memory (DESIGN, section 5).

How it works. The model runs once with its decoder layers replaced by recorders, which yields every layer's own arguments
(masks, rotary embeddings) for any architecture. Layers then run forward one at a time, keeping only the hidden states at
their boundaries; the head gives the gradient at the last boundary; and from the last layer down each one is loaded again,
recomputed with a graph, scored by the taps of `pkt.scoring.scorer`, handed to the caller, and forgotten.

What it trades: weights are read twice and the forward pass is computed twice, for a memory that does not grow with depth.
A model that is not a plain chain of layers (its layers share parameters, or later ones use earlier hidden states) is found
out in the recorder pass and refused with `NotLayeredError`; the caller then scores it whole.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from pkt import ops
from pkt.errors import PktError, SampleError
from pkt.files import os_errors
from pkt.models import layer_of
from pkt.scoring import RestartError, Scorer, default_loss, real_lengths
from pkt.streaming.loader import Loader, NotLayeredError, Teacher, all_tensors, bytes_of, dtype_of
from pkt.streaming.memory import Place, exact_memory, rounded_up, width_step

Key: TypeAlias = int | Literal["head", "front"]  # a decoder layer, what follows them, what precedes them

_PROBE_TOKENS = 24


class _OneByOneError(Exception):
    """Samples cannot share a batch in this model; begin again with one sample a micro-batch."""


# --- hidden states at layer boundaries ------------------------------------------------------------------------------


class Boundaries:
    """Hidden states by (boundary, chunk): on the device, in host memory, or in files written behind the computation."""

    def __init__(self, device: torch.device, places: Sequence[Place], folder: Path | None, *, behind: bool) -> None:
        self.device, self.places, self.folder = device, places, folder
        self.held: dict[tuple[int, int], Tensor] = {}
        self.shapes: dict[tuple[int, int], tuple[torch.Size, torch.dtype]] = {}
        self.writing: dict[tuple[int, int], Future[None]] = {}
        self.thread = ThreadPoolExecutor(1, "pkt-activations") if behind and "disk" in places else None

    def put(self, boundary: int, chunk: int, hidden: Tensor) -> None:
        key, place = (boundary, chunk), self.places[boundary]
        if place != "disk":
            self.held[key] = hidden if place == "device" else hidden.cpu().contiguous()
            return
        hidden = hidden.cpu().contiguous()
        self.shapes[key] = (hidden.shape, hidden.dtype)
        if self.thread is None:
            self._write(key, hidden)
            return
        # Two unwritten boundaries at most: what waits to be written is memory too.
        while len(self.writing) > 1:
            self._settle(next(iter(self.writing)))
        self.writing[key] = self.thread.submit(self._write, key, hidden)

    def get(self, boundary: int, chunk: int) -> Tensor:
        key = (boundary, chunk)
        if key in self.held:
            return self.held[key].to(self.device, non_blocking=True)
        self._settle(key)
        shape, dtype = self.shapes[key]
        hidden = torch.empty(shape, dtype=dtype)
        with os_errors(f"reading {self._file(key)}"), open(self._file(key), "rb") as file:
            if file.readinto(bytes_of(hidden)) != hidden.numel() * hidden.element_size():
                raise PktError(f"{self._file(key)} was cut short while it was in use; run the same command again")
        return hidden.to(self.device)

    def drop(self, boundary: int, chunk: int) -> None:
        key = (boundary, chunk)
        self.held.pop(key, None)
        if self.shapes.pop(key, None) is not None:
            self._settle(key)
            self._file(key).unlink(missing_ok=True)

    def spilled(self, name: str, tensor: Tensor) -> Tensor:
        """A CPU tensor that is not wanted soon, in the pages of a file; the file goes with the tensor."""
        if self.folder is None or "disk" not in self.places:
            return tensor
        file = self.folder / f"{name}.bin"
        with os_errors(f"writing {file}"):
            with open(file, "wb") as opened:
                opened.write(bytes_of(tensor.contiguous()))
            mapped = torch.from_file(str(file), shared=True, size=tensor.numel(), dtype=tensor.dtype)
            file.unlink()
        return mapped.view(tensor.shape)

    def close(self) -> None:
        if self.thread is not None:
            self.thread.shutdown(cancel_futures=True)
        for key in list(self.shapes):
            self._file(key).unlink(missing_ok=True)
        self.held.clear()

    def _settle(self, key: tuple[int, int]) -> None:
        future = self.writing.pop(key, None)
        if future is not None:
            future.result()

    def _file(self, key: tuple[int, int]) -> Path:
        assert self.folder is not None
        return self.folder / f"boundary-{key[0]}-{key[1]}.bin"

    def _write(self, key: tuple[int, int], hidden: Tensor) -> None:
        with os_errors(f"writing activations to {self.folder}"), open(self._file(key), "wb", buffering=0) as file:
            data = bytes_of(hidden)
            done = 0
            while done < len(data):
                done += file.write(data[done:])


# --- scoring one part of the model ----------------------------------------------------------------------------------


class _PartScorer(Scorer):
    """A `Scorer` of some parameters of a model, driven one forward and backward at a time by the engine."""

    blame: Callable[[], str | None]

    def __init__(self, model: nn.Module, names: Sequence[str], *, tied: str | None = None) -> None:
        super().__init__(model, names)
        self.tied = tied
        if tied is not None:
            # Only one of its two uses runs in this part; the other's share is joined in the front (`_FrontScorer`).
            self.shared.discard(tied)

    @contextlib.contextmanager
    def samples(self, batch: dict[str, Tensor], first: int) -> Iterator[None]:
        """What backward passes inside deliver belongs to these samples, number `first` onwards of their task."""
        self._set_layout(batch, len(batch["input_ids"]))
        self._begin_batch()
        self.tokens.clear()
        self.first = first
        with torch.enable_grad():
            yield
        self._check_finite(first)
        self._flush()

    def backward(self, losses: Tensor, leaf: Tensor | None) -> Tensor | None:
        """Backward from [B] losses, scaled where fp16 needs it; the gradient of `leaf`, its scale divided out."""
        scale = self._choose_scale(losses) if self.half else 1.0
        self._set_scale(scale)
        if leaf is not None:
            leaf.grad = None
        (losses * scale).sum().backward()
        if leaf is None or leaf.grad is None:
            return None
        return leaf.grad.float() / scale if self.half else leaf.grad

    def backward_from(self, out: Tensor, grad: Tensor, leaf: Tensor | None) -> Tensor | None:
        """Backward from the gradient at a part's output."""
        if self.half:
            return self.backward((out.float() * grad).flatten(1).sum(1), leaf)
        torch.autograd.backward(out, grad.to(out.dtype))
        return None if leaf is None else leaf.grad

    def _blame(self) -> str:
        name = self.blame()
        if name is not None:
            return f"parameter {name} itself holds NaN or Inf: the checkpoint is damaged, copy it again"
        return "every parameter is finite, so look at that sample, or load the model in fp32 or bf16"

    def spans(self, dy: Tensor) -> list[tuple[int, int]]:
        layout = self._rows(dy)
        if layout is None:
            raise RestartError
        return [(s, s + n) for s, n in zip(layout[1].tolist(), layout[2].tolist(), strict=True)]


class _HeadScorer(_PartScorer):
    """Keeps, for a tied table, the rows of each sample's gradient that the embedding will touch: (ids, rows) by sample."""

    ids: Tensor  # of the samples being scored

    def __init__(self, model: nn.Module, names: Sequence[str], *, tied: str | None = None) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        super().__init__(model, names, tied=tied)

    def _accumulate(self, kind: str, name: str, saved: Tensor, dy: Tensor) -> None:
        super()._accumulate(kind, name, saved, dy)
        if name != self.tied:
            return
        rows, x = dy.reshape(-1, dy.shape[-1]), saved.reshape(-1, saved.shape[-1])
        work = torch.float64 if dy.dtype == torch.float64 else torch.float32
        for j, (a, b) in enumerate(self.spans(dy)):
            ids = self.ids[j, : b - a].unique()
            kept = rows[a:b, ids].to(work).t() @ x[a:b].to(work) / self.scale
            self.kept[self.first + j] = (ids, kept)

    def _add_abs(self, acc: Tensor, parameter: Tensor, grad: Tensor) -> None:
        super()._add_abs(acc, parameter, grad)
        if self.tied is not None and acc is self.acc.get(self.tied):
            ids = self.ids[0].unique()
            self.kept[self.first] = (ids, grad[ids].float() / self.scale)

    def keep_fused(self) -> None:
        """The same for the fused head, which shows no gradient of the whole table."""
        if self.tied is None or self.fused is None:
            return
        assert self.lens is not None
        for j, length in enumerate(self.lens.tolist()):
            ids = self.ids[j, :length].unique()
            self.kept[self.first + j] = (ids, self._head_rows(self.tied, j, ids) / self.scale)


class _FrontScorer(_PartScorer):
    """Joins the two uses of a tied table: |θ(H+E)| − |θH| for the rows that sample j's tokens touched.

    Only the change of the rows `touched` by any sample is accumulated; the table's scores themselves need no second copy.
    """

    ids: Tensor
    head: dict[int, tuple[Tensor, Tensor]]
    touched: Tensor

    def _accumulator(self, name: str, *, full: bool = False) -> Tensor:
        if name == self.tied and name not in self.acc:
            shape = len(self.touched), *self.shapes[name][1:]
            self.acc[name] = torch.zeros(shape, dtype=torch.float32, device=self.touched.device)
        return super()._accumulator(name, full=full)

    def _accumulate(self, kind: str, name: str, saved: Tensor, dy: Tensor) -> None:
        if name != self.tied:
            super()._accumulate(kind, name, saved, dy)
            return
        ids, rows = saved.reshape(-1), dy.reshape(-1, dy.shape[-1])
        for j, (a, b) in enumerate(self.spans(dy)):
            whole = torch.tensor([0], device=dy.device), torch.tensor([b - a], device=dy.device)
            touched, grads = ops.embedding_rows(ids[a:b], rows[a:b], *whole, self.shapes[name][0])
            self._join(self.first + j, touched, grads)

    def _add_abs(self, acc: Tensor, parameter: Tensor, grad: Tensor) -> None:
        if self.tied is None or acc is not self.acc.get(self.tied):
            super()._add_abs(acc, parameter, grad)
            return
        touched = self.ids[0].unique()
        self._join(self.first, touched, grad[touched].float())

    def _join(self, sample: int, touched: Tensor, embedding: Tensor) -> None:
        assert self.tied is not None
        acc, table = self._accumulator(self.tied), self.parameters[self.tied].detach()
        ids, head = (t.to(acc.device) for t in self.head[sample])
        if not torch.equal(ids, touched):
            raise RestartError
        weight = table[ids].to(embedding.dtype)
        head = head.to(embedding.dtype) * self.scale
        change = (weight * (head + embedding)).abs_() - (weight * head).abs_()
        acc.index_add_(0, torch.searchsorted(self.touched, ids), change.to(acc.dtype))


# --- the engine -----------------------------------------------------------------------------------------------------


@dataclass
class Chunk:
    """A micro-batch of one task: samples `first` onwards of its order, and every layer's recorded arguments."""

    task: int
    first: int
    batch: dict[str, Tensor]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.batch["input_ids"])

    def sample(self, index: int) -> dict[str, Tensor]:
        """One sample without its right padding."""
        length = int(self.batch["attention_mask"][index].sum())
        return {k: v[index : index + 1, :length] for k, v in self.batch.items()}


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
        self.model, self.device, self.count, self.prefix = teacher.model, device, num_layers, layers
        self.on_part, self.on_commit, self.on_tick, self.prefetch = on_part, on_commit, on_tick, prefetch
        self.stored_as, self.itemsize = teacher.stored_as, dtype_of(teacher).itemsize
        self.loader = (
            None
            if teacher.source is None
            else Loader(teacher.source, device, teacher.dtypes(), prefetch=prefetch, resident=resident)
        )
        self.layers = [self.model.get_submodule(f"{layers}.{i}") for i in range(num_layers)]
        self._map_names()
        self.active: set[tuple[str, ...]] = set()
        self.width: int | None = None  # outputs of a layer that returns a tuple
        self.learnt: tuple[set[str], set[str]] = (set(), set())
        self.begin = time.perf_counter()

    # -- the model's parts

    def _map_names(self) -> None:
        """Canonical names, all places of each tensor, and the part it belongs to."""
        self.places: dict[str, list[tuple[nn.Module, str, bool]]] = {}
        canonical: dict[int, str] = {}
        parts: dict[str, set[int | None]] = {}
        modules = dict(self.model.named_modules(remove_duplicate=False))
        for name, tensor in all_tensors(self.model):
            first = canonical.setdefault(id(tensor), name)
            owner, _, key = name.rpartition(".")
            self.places.setdefault(first, []).append((modules[owner], key, isinstance(tensor, nn.Parameter)))
            parts.setdefault(first, set()).add(layer_of(name, self.prefix))
        mixed = [name for name, found in parts.items() if len(found) > 1]
        if mixed:
            raise NotLayeredError(f"{mixed[0]} is shared between decoder layers")
        part_of = {name: next(iter(found)) for name, found in parts.items()}
        self.layer_names = [tuple(n for n in self.places if part_of[n] == i) for i in range(self.count)]
        self.outside = tuple(n for n in self.places if part_of[n] is None)
        self.scored = {n for n, p in self.model.named_parameters() if p.is_floating_point()}
        self.front: tuple[str, ...] = ()
        self.head: tuple[str, ...] = ()
        self.tied: str | None = None

    @contextlib.contextmanager
    def loaded(self, names: tuple[str, ...], then: tuple[str, ...] | None = None) -> Iterator[None]:
        """The named tensors are in their modules' places inside."""
        if self.loader is None or not names:
            yield
            return
        if names in self.active:
            self.loader.expect(None if then is None else self._stored(then))
            yield
            return
        self.active.add(names)
        tensors = self.loader.get(self._stored(names), None if then is None else self._stored(then))
        undo = []
        for name in names:
            tensor = tensors[self.stored_as[name]]
            value = nn.Parameter(tensor) if self.places[name][0][2] and tensor.is_floating_point() else tensor
            for module, key, is_parameter in self.places[name]:
                table: dict[str, Any] = module._parameters if is_parameter else module._buffers
                undo.append((table, key, table[key]))
                table[key] = value
        try:
            yield
        finally:
            for table, key, old in undo:
                table[key] = old
            self.active.discard(names)
            self.loader.release(self._stored(names))

    def _stored(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(self.stored_as[name] for name in names)

    def weight(self, name: str) -> Tensor:
        module, key, _ = self.places[name][0]
        value = module._parameters.get(key)
        assert value is not None
        return value.detach()

    @contextlib.contextmanager
    def weights_of(self, key: Key) -> Iterator[Callable[[str], Tensor]]:
        """A part's parameters once more, for what could not be decided while they were there."""
        with self.loaded(self._names_of(key)):
            yield self.weight

    def _names_of(self, key: Key) -> tuple[str, ...]:
        return self.layer_names[key] if isinstance(key, int) else self.head if key == "head" else self.front

    # -- running layers that are not there

    @contextlib.contextmanager
    def _replaced(self, handler: Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], Tensor]) -> Iterator[None]:
        """While active, decoder layer i returns handler(i, hidden states, other arguments) instead of computing."""

        def make(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                named = not args
                hidden = kwargs.pop("hidden_states") if named else args[0]
                return self._shaped(handler(index, hidden, (named, *args[1:]), kwargs))

            return forward

        before = [layer.__dict__.get("forward") for layer in self.layers]
        try:
            for index, layer in enumerate(self.layers):
                layer.forward = make(index)
            yield
        finally:
            for layer, old in zip(self.layers, before, strict=True):
                layer.__dict__.pop("forward", None)
                if old is not None:
                    layer.__dict__["forward"] = old

    def _shaped(self, hidden: Tensor) -> Any:
        return hidden if self.width is None else (hidden, *[None] * (self.width - 1))

    def _call(self, index: int, hidden: Tensor, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
        """The real layer on recorded arguments."""
        (named, *args), kwargs = call
        layer = self.layers[index]
        out = layer(hidden_states=hidden, **kwargs) if named else layer(hidden, *args, **kwargs)
        if isinstance(out, tuple):
            if any(isinstance(value, Tensor) for value in out[1:]):
                raise NotLayeredError(f"layer {index} returns more than hidden states")
            self.width = len(out)
            out = out[0]
        if not isinstance(out, Tensor):
            raise NotLayeredError(f"layer {index} returns {type(out).__name__}, not hidden states")
        return out

    def _inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        inputs: dict[str, Any] = {k: v.to(self.device) for k, v in batch.items() if k != "labels"}
        inputs["use_cache"] = False
        return inputs

    def _to_first_layer(self, batch: dict[str, Tensor]) -> Tensor:
        """Hidden states before layer 0, with their graph."""

        def handler(index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            raise _ReachedError(hidden)

        with self._replaced(handler):
            try:
                self.model(**self._inputs(batch))
            except _ReachedError as reached:
                return reached.hidden
        raise NotLayeredError("its forward pass does not call its decoder layers")

    def _record(self, batch: dict[str, Tensor]) -> tuple[Tensor, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
        """Hidden states before layer 0 and every layer's other arguments. Checks that the layers form a chain."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        first: list[Tensor] = []

        def handler(index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            if index != len(calls):
                raise NotLayeredError(
                    f"its layers do not run once each in order (layer {index} as number {len(calls)})"
                )
            if first and hidden is not first[0]:
                raise NotLayeredError(f"something happens between layers {index - 1} and {index}")
            if any(t.requires_grad for t in _tensors_in((args, kwargs))):
                raise NotLayeredError(f"layer {index} uses parameters or hidden states from outside")
            first.append(hidden)
            calls.append((args, kwargs))
            if index == self.count - 1:
                raise _ReachedError(hidden)
            return hidden

        with torch.enable_grad(), self._replaced(handler):
            try:
                self.model(**self._inputs(batch))
            except _ReachedError as reached:
                return reached.hidden.detach(), calls
        raise NotLayeredError("its forward pass leaves out some of its decoder layers")

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        """Note which modules outside the layers run before them, loading each when it is called."""
        called: dict[str, None] = {}
        owner_of: dict[int, list[str]] = {}
        for name in self.outside:
            for module, _, _ in self.places[name]:
                owner_of.setdefault(id(module), []).append(name)
        with contextlib.ExitStack() as stack:

            def before(module: nn.Module, args: Any) -> None:
                for name in owner_of[id(module)]:
                    if name not in called:
                        called[name] = None
                        stack.enter_context(self.loaded((name,)))
                        for owner, key, is_parameter in self.places[name]:
                            parameter = owner._parameters.get(key) if is_parameter else None
                            if parameter is not None and parameter.is_floating_point():
                                stack.callback(parameter.requires_grad_, parameter.requires_grad)
                                parameter.requires_grad_()
                ran.add(id(module))

            ran: set[int] = set()
            for module in self.model.modules():
                if id(module) in owner_of:
                    stack.callback(module.register_forward_pre_hook(before).remove)
            yield
            self.front = tuple(called)
            after = [n for n in self.outside if any(id(m) not in ran for m, _, _ in self.places[n])]
            self.head = tuple(after)
            both = [n for n in after if n in called]
            if len(both) > 1:
                raise NotLayeredError(f"{len(both)} tables are used before and after the layers")
            self.tied = both[0] if both else None

    # -- the passes

    def chunks_of(self, tasks: Sequence[Sequence[dict[str, Tensor]]], sizes: list[list[int]]) -> list[Chunk]:
        """Each task's samples (batches of one, unpadded, in order) as micro-batches of the given sizes."""
        chunks = []
        step = width_step(self.device, self.itemsize, max(s["input_ids"].shape[1] for task in tasks for s in task))
        for task, samples in enumerate(tasks):
            first = 0
            for size in sizes[task]:
                part = samples[first : first + size]
                width = rounded_up(max(s["input_ids"].shape[1] for s in part), step)
                chunks.append(Chunk(task, first, _padded(part, width)))
                first += size
        return chunks

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
        with exact_memory() if self.device.type == "cpu" else contextlib.nullcontext():
            return self._run_and_halve(tasks, sizes, store, resume, on_sizes)

    def _run_and_halve(
        self,
        tasks: Sequence[Sequence[dict[str, Tensor]]],
        sizes: list[list[int]],
        store: Callable[[], Boundaries],
        state: Progress | None,
        on_sizes: Callable[[list[list[int]], str], None],
    ) -> list[list[float]]:
        modes = {m: m.training for m in self.model.modules()}
        self.model.eval()
        try:
            while True:
                boundaries = store()
                try:
                    return self._run(self.chunks_of(tasks, sizes), sizes, boundaries, state)
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
                    sizes, why = [_halved(task) for task in sizes], "out of memory"
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
        if self.loader is not None:
            self.loader.close()

    def _run(
        self, chunks: list[Chunk], sizes: list[list[int]], store: Boundaries, resume: Progress | None
    ) -> list[list[float]]:
        self.state = resume
        self.tokens = sum(int(c.batch["attention_mask"].sum()) for c in chunks)
        top = self.count if resume is None else resume.boundary
        self.steps, self.done_steps = 4 * top + 3, 0
        last = top if resume is None else top - 1
        with torch.no_grad():
            with self.loaded(self.layer_names[0]):
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
                _rechunk(resume.grads, resume.sizes, chunks),
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
        with self._watching():
            self._learn_shape(chunks)
            for number, chunk in enumerate(chunks):
                hidden, chunk.calls = self._record(chunk.batch)
                store.put(0, number, hidden)
        self._tick("recording", None, 1)

    def _learn_shape(self, chunks: list[Chunk]) -> None:
        """Run one layer for real on a few tokens: what it returns, and whether samples can share a batch."""
        widest = max(chunks, key=lambda c: c.size)
        # Two samples need not both be this long: what is asked is where gradients go, not what they are.
        ids = widest.batch["input_ids"][:2, :_PROBE_TOKENS]
        small = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        self._learn_width(small)
        hidden, calls = self._record(small)
        if len(ids) < 2:
            return
        with self._scorer(_PartScorer, 0) as scorer:

            def loss(layer: nn.Module, batch: Any) -> Tensor:
                return self._call(0, hidden.detach().requires_grad_(), calls[0]).float().flatten(1).sum(1)

            scorer._probe_layout({**small, "labels": ids}, loss)
            if scorer.one_by_one:
                raise _OneByOneError

    def _learn_width(self, batch: dict[str, Tensor]) -> None:
        """Whether a layer returns a tuple must be known before any is replaced: a model may take the first of it."""
        calls: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

        def handler(index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            calls.append((hidden, args, kwargs))
            raise _ReachedError(hidden)

        with self._replaced(handler), contextlib.suppress(_ReachedError):
            self.model(**self._inputs(batch))
        for hidden, args, kwargs in calls:
            self._call(0, hidden, (args, kwargs))

    def _forward(self, index: int, chunks: list[Chunk], store: Boundaries, top: int) -> None:
        following = self.layer_names[index + 1] if index + 1 < top else self.layer_names[index]
        with self.loaded(self.layer_names[index], following if index + 1 < self.count else self.head):
            for number, chunk in enumerate(chunks):
                store.put(index + 1, number, self._call(index, store.get(index, number), chunk.calls[index]))
        self._tick("forward", index, 1)

    def _scorer(self, kind: Any, key: Key, names: Sequence[str] | None = None, **options: Any) -> Any:
        names = self._names_of(key) if names is None else names
        scorer = kind(self.model, [n for n in names if n in self.scored], **options)
        scorer.blame = self._blame
        for learnt, known in zip(self.learnt, (scorer.shared, scorer.untapped), strict=True):
            known |= {n for n in scorer.parameters if _in_any_layer(n) in learnt}
        return scorer

    def _blame(self) -> str | None:
        """The first parameter of the whole teacher that is not finite; read again, for it is asked only when all is lost."""
        for names in (self.front, *self.layer_names, self.head):
            with self.loaded(names):
                for name in names:
                    if name in self.scored and not bool(self.weight(name).isfinite().all()):
                        return name
        return None

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
        with self.loaded(self.head, self.layer_names[self.count - 1]):
            for task in range(len(sizes)):
                mine = [(n, c) for n, c in enumerate(chunks) if c.task == task]
                with self._scorer(_HeadScorer, "head", tied=self.tied) as scorer, self._named(task):
                    self._find_head(scorer, mine[0][1], store.get(self.count, mine[0][0]))

                    def attempt(mine: Any = mine, scorer: Any = scorer, task: int = task) -> None:
                        losses[task] = []
                        scorer.kept.clear()
                        for number, chunk in mine:
                            hidden = store.get(self.count, number)
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
                if self.tied is not None:
                    carried[task] = self._carry(scorer, scores.pop(self.tied), store, task)
                self.on_part(task, "head", scores, self.weight)
                del scores, scorer
        for number in range(len(chunks)):
            store.drop(self.count, number)
        state = Progress(self.count, [grads[n] for n in range(len(chunks))], losses, carried, sizes)
        self.on_commit("head", state)
        self._tick("head", None, 1)
        return state

    def _head_of(
        self, scorer: _HeadScorer, batch: dict[str, Tensor], first: int, hidden: Tensor
    ) -> tuple[list[float], Tensor]:
        """Losses of the samples and the gradient at the last boundary."""
        leaf = hidden.detach().requires_grad_()
        scorer.ids = batch["input_ids"].to(self.device)
        with scorer.samples(batch, first):
            loss_fn = default_loss if scorer.fused is None else scorer._head_loss
            try:
                with self._after_layers(batch, leaf) as inputs:
                    losses = loss_fn(self.model, inputs).reshape(-1)
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

    @contextlib.contextmanager
    def _after_layers(self, batch: dict[str, Tensor], leaf: Tensor) -> Iterator[dict[str, Tensor]]:
        """The model's inputs; inside, its last layer returns `leaf`."""

        def handler(index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            return leaf if index == self.count - 1 else hidden

        inputs = {k: v.to(self.device) for k, v in batch.items()}
        if self._takes_embeddings():
            # The table itself need not be there: nothing of what precedes the layers reaches the head.
            del inputs["input_ids"]
            inputs["inputs_embeds"] = torch.zeros_like(leaf, requires_grad=True)
        with self._replaced(handler), self._lazily(self.front):
            yield inputs

    def _find_head(self, scorer: _HeadScorer, chunk: Chunk, hidden: Tensor) -> None:
        """Whether the loss can be had without logits, tried on a few tokens."""
        few = {k: v[:1, :_PROBE_TOKENS] for k, v in chunk.batch.items()}
        with self._after_layers(few, hidden[:1, :_PROBE_TOKENS]) as inputs:
            scorer._find_head(inputs, head_only=True)

    def _takes_embeddings(self) -> bool:
        import inspect

        embedding = getattr(self.model, "get_input_embeddings", lambda: None)()
        wide = getattr(embedding, "embedding_dim", None)
        config: Any = getattr(self.model, "config", None)
        same = wide == getattr(config, "hidden_size", wide)
        return same and "inputs_embeds" in inspect.signature(self.model.forward).parameters

    @contextlib.contextmanager
    def _lazily(self, names: tuple[str, ...]) -> Iterator[None]:
        """Load what is called of `names` (position embeddings, say) for as long as it is needed."""
        if self.loader is None:
            yield
            return
        owners: dict[int, list[str]] = {}
        for name in names:
            if name not in self.head:
                for module, _, _ in self.places[name]:
                    owners.setdefault(id(module), []).append(name)
        with contextlib.ExitStack() as stack:

            def before(module: nn.Module, args: Any) -> None:
                for name in owners.pop(id(module), ()):
                    stack.enter_context(self.loaded((name,)))

            for module in self.model.modules():
                if id(module) in owners:
                    stack.callback(module.register_forward_pre_hook(before).remove)
            yield

    def _carry(self, scorer: _HeadScorer, table: Tensor, store: Boundaries, task: int) -> dict[str, Tensor]:
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
        with self.loaded(self.layer_names[index], self.layer_names[index - 1] if index else None):
            for task in range(len(state.sizes)):
                mine = [(n, c) for n, c in enumerate(chunks) if c.task == task]
                with self._scorer(_PartScorer, index) as scorer, self._named(task):

                    def attempt(mine: Any = mine, scorer: Any = scorer) -> None:
                        for number, chunk in mine:
                            leaf = store.get(index, number).detach().requires_grad_()
                            with scorer.samples(chunk.batch, chunk.first):
                                out = self._call(index, leaf, chunk.calls[index])
                                grad = scorer.backward_from(out, state.grads[number].to(self.device), leaf)
                            assert grad is not None
                            grads[number] = grad.detach().to(state.grads[number].device)

                    self._until_known(scorer, attempt)
                scores = scorer.finish()
                self.on_part(task, index, scores, self.weight)
                del scores, scorer
        for number in range(len(chunks)):
            store.drop(index, number)
        self._tick("backward", index, 3)
        return Progress(index, [grads[n] for n in range(len(chunks))], state.losses, state.carried, state.sizes)

    def _score_front(self, chunks: list[Chunk], state: Progress) -> None:
        with self.loaded(self.front):
            for task in range(len(state.sizes)):
                mine = [(n, c) for n, c in enumerate(chunks) if c.task == task]
                for alone in (False, True):
                    with self._scorer(_FrontScorer, "front", tied=self.tied) as scorer, self._named(task):
                        self._join_tied(scorer, state.carried[task])

                        def attempt(mine: Any = mine, scorer: Any = scorer, alone: bool = alone) -> None:
                            for number, chunk in mine:
                                for first, rows, batch in self._pieces(chunk, alone):
                                    scorer.ids = batch["input_ids"].to(self.device)
                                    grad = state.grads[number][rows, : batch["input_ids"].shape[1]].to(self.device)
                                    with scorer.samples(batch, first):
                                        scorer.backward_from(self._to_first_layer(batch), grad, None)

                        try:
                            self._until_known(scorer, attempt)
                        except _OneByOneError:
                            if alone:
                                raise
                            continue
                    break
                scores = scorer.finish()
                with self._joined(scorer, scores, state.carried[task]):
                    self.on_part(task, "front", scores, self.weight)
                del scores, scorer
        self._tick("front", None, 1)

    def _join_tied(self, scorer: _FrontScorer, carried: dict[str, Tensor]) -> None:
        if self.tied is None:
            return
        counts = carried["counts"].tolist()
        pairs = zip(carried["ids"].split(counts), carried["rows"].split(counts), strict=True)
        scorer.head, scorer.touched = dict(enumerate(pairs)), carried["ids"].unique().to(self.device)

    @contextlib.contextmanager
    def _joined(self, scorer: _FrontScorer, scores: dict[str, Tensor], carried: dict[str, Tensor]) -> Iterator[None]:
        """Inside, a tied table's scores are those of both its uses. What was carried is as before afterwards."""
        if self.tied is None:
            yield
            return
        change, table = scores[self.tied], carried["scores"].to(self.device)
        before = table[scorer.touched]
        table[scorer.touched] = before + change
        scores[self.tied] = table
        try:
            yield
        finally:
            # On a CPU it is the carried tensor itself, and a run that is out of memory now begins this part again.
            table[scorer.touched] = before

    def _tick(self, phase: str, layer: int | None, steps: int) -> None:
        self.done_steps += steps
        seconds = time.perf_counter() - self.begin
        loader = self.loader
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


def _in_any_layer(name: str) -> str:
    """What is learnt about a parameter of one layer holds for its like in the others."""
    return re.sub(r"\.\d+\.", ".*.", name)


class _ReachedError(Exception):
    """The forward pass came to where it was wanted."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from itertools.chain.from_iterable(map(_tensors_in, value.values()))
    elif isinstance(value, (tuple, list)):
        yield from itertools.chain.from_iterable(map(_tensors_in, value))


def _padded(samples: Sequence[dict[str, Tensor]], longest: int) -> dict[str, Tensor]:
    """Samples [1, T] of one task as one batch, padded on the right to `longest`."""
    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        key: torch.cat([nn.functional.pad(s[key], (0, longest - s[key].shape[1]), value=fill) for s in samples])
        for key, fill in fills.items()
    }


def samples_of(batches: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The samples of right-padded batches, each [1, T] without its padding."""
    found = []
    for batch in batches:
        lengths = real_lengths(batch)
        if lengths is None:
            raise PktError("streaming needs batches of input_ids, attention_mask and labels, padded on the right")
        found += [{k: v[j : j + 1, :n] for k, v in batch.items()} for j, n in enumerate(lengths)]
    return found


def _halved(sizes: list[int]) -> list[int]:
    return [part for size in sizes for part in ((size + 1) // 2, size // 2) if part]


def _rechunk(grads: list[Tensor], sizes: list[list[int]], chunks: list[Chunk]) -> list[Tensor]:
    """Gradients of micro-batches of `sizes` as those of `chunks`, sample by sample."""
    if [c.size for c in chunks] == [s for task in sizes for s in task]:
        return grads
    rows = [grad[j : j + 1] for grad in grads for j in range(len(grad))]
    found = []
    for chunk in chunks:
        mine, rows = rows[: chunk.size], rows[chunk.size :]
        width = chunk.batch["input_ids"].shape[1]
        padded = [nn.functional.pad(row, (0, 0, 0, max(0, width - row.shape[1]))) for row in mine]
        found.append(torch.cat([row[:, :width] for row in padded]))
    return found
