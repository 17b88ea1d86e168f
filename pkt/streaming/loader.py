"""Where a teacher's weights come from: a checkpoint's files or another device, a group of tensors at a time.

A teacher is a model without values. `Loader` reads what is wanted next while one group computes, with pread into buffers that
are used again, and widens what is stored in another type than it is computed in.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pkt import ops
from pkt.errors import PktWarning
from pkt.models import CheckpointFiles, Model, NotStoredError, Stored, all_tensors
from pkt.streaming.streams import Buffers, Event, streams_of

_ALIGN = 64


class NotLayeredError(Exception):
    """The model is not a chain of decoder layers that can be scored one at a time; the message says why."""


class HostTensors:
    """Tensors of a model that lives on another device than the one that computes."""

    def __init__(self, model: nn.Module) -> None:
        self.values = {name: tensor.detach() for name, tensor in all_tensors(model)}
        self.tensors = {
            name: Stored(Path(), 0, t.numel() * t.element_size(), t.dtype, tuple(t.shape))
            for name, t in self.values.items()
        }

    def fill(self, name: str, target: memoryview) -> None:
        tensor = self.values[name].cpu().contiguous().reshape(-1)
        into = torch.frombuffer(target, dtype=torch.uint8, count=tensor.numel() * tensor.element_size())
        into.copy_(tensor.view(torch.uint8))

    def close(self) -> None:
        pass


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    view: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(view)


@dataclass
class _Group:
    """Tensors that have come together: the buffer they are in, where it goes back to, and the event that they are there."""

    tensors: dict[str, Tensor]
    buffer: Tensor
    home: Buffers
    there: Event


class Loader:
    """Brings groups of tensors to the device, the next group while one computes, into buffers that are used again.

    dtypes: what each tensor is wanted in. With `resident`, what was loaded stays. `waited` and `bytes_read` are for the
    progress report.
    """

    def __init__(
        self,
        source: CheckpointFiles | HostTensors,
        device: torch.device,
        dtypes: Mapping[str, torch.dtype],
        *,
        prefetch: bool,
        resident: bool,
    ) -> None:
        self.source, self.dtypes, self.resident = source, dtypes, resident
        self.streams = streams_of(device)
        self.thread = ThreadPoolExecutor(1, "pkt-weights", self.streams.bind_thread) if prefetch else None

        def on_device(size: int) -> Tensor:
            return torch.empty(size, dtype=torch.uint8, device=device)

        def on_host(size: int) -> Tensor:
            return self.streams.pinned([size], torch.uint8)

        # What files are read into, its copy on a device with a memory of its own, and what is wanted in another type.
        self.read = Buffers(self.streams, on_host, self.streams.settle)
        self.copied, self.cast = (Buffers(self.streams, on_device, self.streams.wait) for _ in range(2))
        self.in_use: dict[tuple[str, ...], _Group] = {}
        self.coming: dict[tuple[str, ...], Future[_Group]] = {}
        self.waited, self.bytes_read = 0.0, 0

    def get(self, names: tuple[str, ...], then: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        """The tensors of `names` on the device; `then` begins to be read while the caller computes."""
        begin = time.perf_counter()
        if names not in self.in_use:
            future = self.coming.pop(names, None)
            group = future.result() if future is not None else self._load(names)
            # The caller's stream is known here only: the thread that reads has another current one.
            self.streams.wait(group.there)
            self.streams.lend(group.buffer)
            self.in_use[names] = group
        self.waited += time.perf_counter() - begin
        self.expect(then)
        return self.in_use[names].tensors

    def expect(self, names: tuple[str, ...] | None) -> None:
        """Begin to read what will be wanted next."""
        if names and self.thread is not None and names not in self.coming and names not in self.in_use:
            self.coming[names] = self.thread.submit(self._load, names)

    def release(self, names: tuple[str, ...]) -> None:
        if not self.resident and names in self.in_use:
            group = self.in_use.pop(names)
            group.home.give(group.buffer, self.streams.mark())

    def close(self) -> None:
        if self.thread is not None:
            self.thread.shutdown(cancel_futures=True)
        self.source.close()
        self.coming.clear()
        self.in_use.clear()
        for kind in (self.read, self.copied, self.cast):
            kind.free.clear()

    def _load(self, names: tuple[str, ...]) -> _Group:
        """Read, copied to the device and widened; it is there on return."""
        stored = {name: self.source.tensors[name] for name in names}
        ordered = sorted(names, key=lambda n: (stored[n].file, stored[n].offset))
        offsets, total = _places([(n, stored[n].nbytes) for n in ordered])
        host = self.read.take(total)
        # Pinned and pageable buffers alike are plain memory to pread.
        view = bytes_of(host)
        for name, offset in offsets.items():
            nbytes = stored[name].nbytes
            if nbytes:
                self.source.fill(name, view[offset : offset + nbytes])
            self.bytes_read += nbytes
        steps = [(self.read, host)]
        with self.streams.beside():
            if self.streams.apart:
                steps.append((self.copied, self.copied.take(total)))
                self.streams.copy(steps[-1][1][:total], host[:total])
            tensors = {n: _cut(steps[-1][1], offset, stored[n].dtype, stored[n].shape) for n, offset in offsets.items()}
            if any(self._wanted(name) != stored[name].dtype for name in names):
                tensors, buffer = self._widened(tensors)
                steps.append((self.cast, buffer))
            there = self.streams.mark()
        self.streams.settle(there)
        *passed, (home, buffer) = steps
        for kind, free in passed:
            kind.give(free)
        return _Group(tensors, buffer, home, there)

    def _wanted(self, name: str) -> torch.dtype:
        stored = self.source.tensors[name].dtype
        return self.dtypes[name] if stored.is_floating_point else stored

    def _widened(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """All of them copied into the types that are wanted, so that what they were read into is free for the next."""
        offsets, total = _places([(n, tensor.numel() * self._wanted(n).itemsize) for n, tensor in tensors.items()])
        buffer = self.cast.take(total)
        found = {n: _cut(buffer, offset, self._wanted(n), tensors[n].shape) for n, offset in offsets.items()}
        for name, tensor in found.items():
            self.streams.copy(tensor, tensors[name])
        return found, buffer


def _places(sizes: Sequence[tuple[str, int]]) -> tuple[dict[str, int], int]:
    """Where each of these many bytes goes in one buffer, and the buffer's size."""
    offsets, total = {}, 0
    for name, size in sizes:
        offsets[name] = total
        total += -(-size // _ALIGN) * _ALIGN
    return offsets, total


def _cut(buffer: Tensor, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    return buffer[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).view(tuple(shape))


@dataclass
class Teacher:
    """A model whose tensors are put into its modules when needed; `source` is None when they are all there already."""

    model: nn.Module
    source: CheckpointFiles | HostTensors | None
    dtype: torch.dtype | None = None
    stored_as: dict[str, str] = field(default_factory=dict)  # name in the model -> name in the source

    def dtypes(self) -> dict[str, torch.dtype]:
        """What each tensor of the source is wanted in: what it is in the empty model."""
        return {self.stored_as[name]: tensor.dtype for name, tensor in all_tensors(self.model)}

    @property
    def stored_itemsize(self) -> int:
        """Bytes of a weight where it comes from."""
        found = {} if self.source is None else self.source.tensors
        return next((t.dtype.itemsize for t in found.values() if t.dtype.is_floating_point), dtype_of(self).itemsize)


def open_teacher(given: Any, device: torch.device, dtype: torch.dtype | None = None) -> Teacher:
    """A teacher with its weights unread where its files can be read one tensor at a time; else loaded whole, with a warning.

    Weights in a half type that this CPU cannot multiply are widened as they are read, unless a dtype is given.
    """
    model = Model.of(given)
    if model.module is not None:
        return _of_module(model.module, device, dtype)
    try:
        files = model.files
        stored = _stored_dtype(model.config, files)
        working = dtype or (stored and ops.working_dtype(stored, device))
        hollow = model.hollow(working, device)
        return Teacher(hollow, files, working, files.names_of(hollow))
    except NotStoredError as error:
        warnings.warn(f"{model.name} is loaded whole, not layer by layer: {error}", PktWarning, stacklevel=3)
    return _of_module(model.load(dtype=dtype, dequantize=True), device, dtype)


def _of_module(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> Teacher:
    """A model in memory as it is, or, where it lies on another device or in another type, as a source of tensors."""
    tensors = dict(all_tensors(model))
    wanted = {t: t.dtype if dtype else ops.working_dtype(t.dtype, device) for t in tensors.values()}
    if all(t.device == device and t.dtype == wanted[t] for t in tensors.values()):
        return Teacher(model, None)
    hollow = copy.deepcopy(model, {id(t): _emptied(t, wanted[t]) for t in tensors.values()})
    for module in hollow.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[key] = buffer.to(device)
    return Teacher(hollow, HostTensors(model), None, {name: name for name, _ in all_tensors(hollow)})


def dtype_of(teacher: Teacher) -> torch.dtype:
    found = next((p.dtype for p in teacher.model.parameters() if p.is_floating_point()), torch.float32)
    return teacher.dtype or found


def _emptied(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    empty = torch.empty_like(tensor, device="meta", dtype=dtype)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _stored_dtype(config: Any, files: CheckpointFiles) -> torch.dtype | None:
    """What transformers' dtype="auto" takes: the configuration's, or that of the first weights."""
    named = getattr(config, "dtype", None)
    if isinstance(named, torch.dtype):
        return named
    return next((t.dtype for t in files.tensors.values() if t.dtype.is_floating_point), None)
