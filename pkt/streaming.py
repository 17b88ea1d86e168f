"""The layer-major engine: exact sensitivity of a teacher of any depth with one decoder layer in memory (DESIGN, section 5).

How it works. The model runs once with its decoder layers replaced by recorders, which yields every layer's own arguments
(masks, rotary embeddings) for any architecture. Layers then run forward one at a time, keeping only the hidden states at
their boundaries; the head gives the gradient at the last boundary; and from the last layer down each one is loaded again,
recomputed with a graph, scored by the taps of `pkt.scoring`, handed to the caller, and forgotten.

What it trades: weights are read twice and the forward pass is computed twice, for a memory that does not grow with depth.
A model that is not a plain chain of layers (its layers share parameters, or later ones use earlier hidden states) is found
out in the recorder pass and refused with `NotLayeredError`; the caller then scores it whole.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import itertools
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from pkt import ops
from pkt.errors import PktError
from pkt.head_loss import BLOCK, BLOCK_DEFAULT
from pkt.models import (
    check_checkpoint,
    hollow_model,
    layer_of,
    load_config,
    load_model,
    plain_head,
    stored_names,
    unwrap,
)
from pkt.scoring import Scorer, _real_lengths, _RestartError, _SampleError, default_loss
from pkt.storage import os_errors, safetensors_header

Place: TypeAlias = Literal["device", "host", "disk"]
Key: TypeAlias = int | Literal["head", "front"]  # a decoder layer, what follows them, what precedes them

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
}
_ALIGN = 64
_PROBE_TOKENS = 24
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
# What the CPU's matrix libraries keep: their buffers, and code and buffers for each micro-batch's shapes in the half types.
_LIBRARIES, _PER_SHAPE = 24 << 20, 10 << 20


class NotLayeredError(Exception):
    """The model is not a chain of decoder layers that can be scored one at a time; the message says why."""


class _OneByOneError(Exception):
    """Samples cannot share a batch in this model; begin again with one sample a micro-batch."""


# --- where weights come from ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint: its file, its place there, its type and shape."""

    file: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class CheckpointFiles:
    """Tensors of a safetensors checkpoint, read with pread into buffers that are used again."""

    def __init__(self, folder: Path) -> None:
        check_checkpoint(folder)
        self.tensors: dict[str, Stored] = {}
        self.joined: dict[str, list[str]] = {}
        self.handles: dict[Path, int] = {}
        self.stamps: dict[Path, tuple[int, int]] = {}
        for file in sorted(folder.glob("*.safetensors")):
            header = safetensors_header(file)
            with open(file, "rb") as opened:
                base = 8 + int.from_bytes(opened.read(8), "little")
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                if entry["dtype"] not in _DTYPES:
                    raise NotLayeredError(f"{file} stores {name} as {entry['dtype']}")
                begin, end = entry["data_offsets"]
                self.tensors[name] = Stored(
                    file, base + begin, end - begin, _DTYPES[entry["dtype"]], tuple(entry["shape"])
                )
            self.stamps[file] = _stamp(os.stat(file))

    def check(self, file: Path) -> int:
        """A handle on a shard that is still the file it was. Raises `PktError` naming it."""
        with os_errors(f"reading {file}"):
            if file not in self.handles:
                self.handles[file] = os.open(file, os.O_RDONLY)
            now = _stamp(os.fstat(self.handles[file]))
        if now != self.stamps[file]:
            raise PktError(
                f"{file} changed while it was read ({self.stamps[file][0]} bytes before, {now[0]} now); the scores of two "
                "different checkpoints cannot be mixed: restore it and run the same command again, or start over with --force"
            )
        return self.handles[file]

    def join(self, name: str, parts: list[str], shape: tuple[int, ...]) -> None:
        """Add a tensor that is the bytes of others, one after another."""
        first = self.tensors[parts[0]]
        nbytes = sum(self.tensors[part].nbytes for part in parts)
        self.tensors[name] = Stored(first.file, first.offset, nbytes, first.dtype, shape)
        self.joined[name] = parts

    def fill(self, name: str, target: memoryview) -> None:
        done = 0
        for part in self.joined.get(name, [name]):
            self._fill(part, target[done : done + self.tensors[part].nbytes])
            done += self.tensors[part].nbytes

    def _fill(self, name: str, target: memoryview) -> None:
        stored = self.tensors[name]
        handle, done = self.check(stored.file), 0
        with os_errors(f"reading {stored.file}"):
            while done < stored.nbytes:
                count = os.preadv(handle, [target[done : stored.nbytes]], stored.offset + done)
                if count == 0:
                    raise PktError(f"{stored.file} ends inside {name}; copy the checkpoint again")
                done += count
        self.check(stored.file)

    def close(self) -> None:
        for handle in self.handles.values():
            os.close(handle)
        self.handles.clear()


class HostTensors:
    """Tensors of a model that lives on another device than the one that computes."""

    def __init__(self, model: nn.Module) -> None:
        self.values = {name: tensor.detach() for name, tensor in _all_tensors(model)}
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


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    view: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(view)


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters (tied ones under each of their names) and persistent buffers."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield dot + key, parameter
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                yield dot + key, buffer


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
        self.source, self.device, self.dtypes, self.resident = source, device, dtypes, resident
        self.thread = ThreadPoolExecutor(1, "pkt-weights") if prefetch else None
        self.free: dict[str, list[Tensor]] = {"read": [], "cast": []}
        self.in_use: dict[tuple[str, ...], Tensor] = {}
        self.kept: dict[tuple[str, ...], dict[str, Tensor]] = {}
        self.coming: dict[tuple[str, ...], Future[dict[str, Tensor]]] = {}
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.waited, self.bytes_read = 0.0, 0

    def get(self, names: tuple[str, ...], then: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        """The tensors of `names` on the device; `then` begins to be read while the caller computes."""
        begin = time.perf_counter()
        if names in self.kept:
            tensors = self.kept[names]
        else:
            future = self.coming.pop(names, None)
            tensors = future.result() if future is not None else self._load(names)
            if self.resident:
                self.kept[names] = tensors
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self.waited += time.perf_counter() - begin
        self.expect(then)
        return tensors

    def expect(self, names: tuple[str, ...] | None) -> None:
        """Begin to read what will be wanted next."""
        if names and self.thread is not None and names not in self.coming and names not in self.kept:
            self.coming[names] = self.thread.submit(self._load, names)

    def release(self, names: tuple[str, ...]) -> None:
        if not self.resident and names in self.in_use:
            self.free["cast" if self._is_cast(names) else "read"].append(self.in_use.pop(names))

    def close(self) -> None:
        if self.thread is not None:
            self.thread.shutdown(cancel_futures=True)
        self.source.close()
        self.free.clear()
        self.in_use.clear()
        self.kept.clear()

    def _load(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        stored = {name: self.source.tensors[name] for name in names}
        ordered = sorted(names, key=lambda n: (stored[n].file, stored[n].offset))
        offsets, total = _places([(n, stored[n].nbytes) for n in ordered])
        slot = self._slot("read", total)
        # Pinned and pageable buffers alike are plain memory to pread.
        view = _bytes_of(slot)
        for name, offset in offsets.items():
            nbytes = stored[name].nbytes
            if nbytes:
                self.source.fill(name, view[offset : offset + nbytes])
            self.bytes_read += nbytes
        buffer = slot
        if self.stream is not None:
            with torch.cuda.stream(self.stream):
                buffer = torch.empty(total, dtype=torch.uint8, device=self.device)
                buffer.copy_(slot[:total], non_blocking=True)
            self.stream.synchronize()
            buffer.record_stream(torch.cuda.current_stream(self.device))
            self.free["read"].append(slot)
        tensors = {n: _cut(buffer, offset, stored[n].dtype, stored[n].shape) for n, offset in offsets.items()}
        if self._is_cast(names):
            tensors = self._cast(names, tensors, buffer)
        elif buffer is slot:
            self.in_use[names] = slot
        return tensors

    def _wanted(self, name: str) -> torch.dtype:
        stored = self.source.tensors[name].dtype
        return self.dtypes[name] if stored.is_floating_point else stored

    def _is_cast(self, names: tuple[str, ...]) -> bool:
        return any(self._wanted(name) != self.source.tensors[name].dtype for name in names)

    def _cast(self, names: tuple[str, ...], tensors: dict[str, Tensor], buffer: Tensor) -> dict[str, Tensor]:
        """All of them copied into the types that are wanted, so that what they were read into is free for the next."""
        if self.device.type != "cpu":
            return {name: tensor.to(self._wanted(name), copy=True) for name, tensor in tensors.items()}
        sizes = [(name, tensor.numel() * self._wanted(name).itemsize) for name, tensor in tensors.items()]
        offsets, total = _places(sizes)
        slot = self.in_use[names] = self._slot("cast", total)
        found = {n: _cut(slot, offset, self._wanted(n), tensors[n].shape) for n, offset in offsets.items()}
        for name, tensor in found.items():
            tensor.copy_(tensors[name])
        self.free["read"].append(buffer)
        return found

    def _slot(self, kind: str, size: int) -> Tensor:
        fitting = [slot for slot in self.free[kind] if size <= slot.numel() <= 2 * size]
        if fitting:
            best = min(fitting, key=Tensor.numel)
            self.free[kind] = [slot for slot in self.free[kind] if slot is not best]
            return best
        # A buffer of another size will not be needed again: parts of one size follow each other.
        self.free[kind] = []
        return torch.empty(size, dtype=torch.uint8, pin_memory=self.stream is not None)


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
    note: str = ""

    def dtypes(self) -> dict[str, torch.dtype]:
        """What each tensor of the source is wanted in: what it is in the empty model."""
        return {self.stored_as[name]: tensor.dtype for name, tensor in _all_tensors(self.model)}

    @property
    def stored_itemsize(self) -> int:
        """Bytes of a weight where it comes from."""
        found = {} if self.source is None else self.source.tensors
        return next((t.dtype.itemsize for t in found.values() if t.dtype.is_floating_point), _dtype_of(self).itemsize)


def open_teacher(teacher: Any, device: torch.device, dtype: torch.dtype | None = None) -> Teacher:
    """A model in memory or a checkpoint directory, its weights unread when its files can be read one tensor at a time.

    Weights in a half type that this CPU cannot multiply are widened as they are read, unless a dtype is given.
    """
    if isinstance(teacher, nn.Module):
        model = unwrap(teacher)
        tensors = dict(_all_tensors(model))
        wanted = {t: t.dtype if dtype else ops.working_dtype(t.dtype, device) for t in tensors.values()}
        if all(t.device == device and t.dtype == wanted[t] for t in tensors.values()):
            return Teacher(model, None)
        hollow = copy.deepcopy(model, {id(t): _emptied(t, wanted[t]) for t in tensors.values()})
        for module in hollow.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[key] = buffer.to(device)
        names = {name: name for name, _ in _all_tensors(hollow)}
        return Teacher(hollow, HostTensors(model), None, names)
    note = ""
    if Path(teacher).is_dir():
        config = load_config(teacher)
        try:
            files = CheckpointFiles(Path(teacher))
            stored = _stored_dtype(config, files)
            working = dtype or (stored and ops.working_dtype(stored, device))
            model = hollow_model(config, working, device)
            return Teacher(model, files, working, _match_names(model, files))
        except NotLayeredError as error:
            note = f"{teacher} is loaded whole, not layer by layer: {error}"
    loaded = load_model(teacher, dtype=dtype, dequantize=True)
    return Teacher(**{**vars(open_teacher(loaded, device, dtype)), "note": note})


def _dtype_of(teacher: Teacher) -> torch.dtype:
    found = next((p.dtype for p in teacher.model.parameters() if p.is_floating_point()), torch.float32)
    return teacher.dtype or found


def _emptied(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    empty = torch.empty_like(tensor, device="meta", dtype=dtype)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _stored_dtype(config: Any, files: CheckpointFiles) -> torch.dtype | None:
    """What transformers' dtype="auto" takes: the configuration's, or that of the first weights."""
    if getattr(config, "quantization_config", None):
        raise NotLayeredError("its weights are quantized")
    named = getattr(config, "dtype", None)
    if isinstance(named, torch.dtype):
        return named
    return next((t.dtype for t in files.tensors.values() if t.dtype.is_floating_point), None)


def _match_names(model: nn.Module, files: CheckpointFiles) -> dict[str, str]:
    """Where each tensor of the model is stored. Raises `NotLayeredError` when only transformers can tell."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found: dict[str, str] = {}
    by_tensor: dict[int, str] = {}
    for name, tensor in _all_tensors(model):
        for parts in stored_names(name, tuple(tensor.shape), prefix):
            if not all(part in files.tensors for part in parts):
                continue
            stored = parts[0]
            if len(parts) > 1:
                shapes = [files.tensors[part].shape for part in parts]
                if any(len(shape) != 2 or shape[1:] != tensor.shape[2:] for shape in shapes):
                    continue
                stored = name
                files.join(name, parts, (len(tensor), sum(shape[0] for shape in shapes) // len(tensor), *shapes[0][1:]))
            if files.tensors[stored].shape != tuple(tensor.shape):
                raise NotLayeredError(
                    f"{stored} is {list(files.tensors[stored].shape)} in the files, {list(tensor.shape)} in the model"
                )
            found[name] = stored
            by_tensor.setdefault(id(tensor), stored)
            break
    for name, tensor in _all_tensors(model):
        if name not in found and id(tensor) in by_tensor:
            found[name] = by_tensor[id(tensor)]
        if name not in found:
            raise NotLayeredError(f"its files do not name {name}; transformers has to map them")
    return found


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
            if file.readinto(_bytes_of(hidden)) != hidden.numel() * hidden.element_size():
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
                opened.write(_bytes_of(tensor.contiguous()))
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
            data = _bytes_of(hidden)
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
            raise _RestartError
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
            raise _RestartError
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
        self.stored_as, self.itemsize = teacher.stored_as, _dtype_of(teacher).itemsize
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
        for name, tensor in _all_tensors(self.model):
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
        step = _width_step(self.device, self.itemsize, max(s["input_ids"].shape[1] for task in tasks for s in task))
        for task, samples in enumerate(tasks):
            first = 0
            for size in sizes[task]:
                part = samples[first : first + size]
                width = _rounded_up(max(s["input_ids"].shape[1] for s in part), step)
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
        """Errors that speak of sample k of a batch say where the sample came from."""
        try:
            yield
        except PktError as error:
            text = re.sub(r"\bsample (\d+)", lambda m: self.where(task, int(m[1])), str(error), count=1)
            raise PktError(text) from error

    def _until_known(self, scorer: Any, attempt: Callable[[], Any]) -> Any:
        """Run `attempt`; begin again, knowing more, when a parameter turns out to need another way."""
        while True:
            scorer._reset()
            known = (len(scorer.shared), len(scorer.untapped))
            try:
                return attempt()
            except _RestartError:
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
            except _SampleError as error:
                raise PktError(f"sample {first + error.sample} {error}") from None
            values: list[float] = losses.detach().double().tolist()
            for j, value in enumerate(values):
                if not math.isfinite(value):
                    raise PktError(f"the loss of sample {first + j} is {value}; {scorer._blame()}")
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


@contextlib.contextmanager
def exact_memory() -> Iterator[None]:
    """Inside, memory that is freed goes back to the system at once, so that what a run takes is what it uses.

    glibc raises the size from which a block has pages of its own with every such block that is freed, up to 32 MiB; smaller
    ones then leave holes in its heaps that differ from run to run, a quarter of the peak here and there. Other C libraries
    have no such option, or need none.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    # Below it are the blocks that small work comes and goes in: those are better had again than mapped again.
    mallopt(_M_MMAP_THRESHOLD, 1 << 20)
    mallopt(_M_TRIM_THRESHOLD, 4 << 20)
    try:
        yield
    finally:
        # Where glibc's own rule ends.
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 64 << 20)


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


def _width_step(device: torch.device, itemsize: int, longest: int) -> int:
    """What the width of a micro-batch is a multiple of.

    On a CPU the half types' matrix library keeps megabytes of code and buffers for every shape it has met, so widths are
    rounded up to one of eight; it costs a few percent of padding.
    """
    return max(1, -(-longest // 8)) if device.type == "cpu" and itemsize == 2 else 1


def _rounded_up(value: int, step: int) -> int:
    return -(-value // step) * step


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
        lengths = _real_lengths(batch)
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


# --- what it will take ----------------------------------------------------------------------------------------------


@dataclass
class MemoryPlan:
    """What a run will use, known before any weight is read. Sizes in bytes."""

    micro_batch: int
    places: list[Place]
    resident: bool
    device: dict[str, int]
    host: int
    disk: int
    read: int
    flops: float
    device_limit: int
    widened: bool = False  # weights are computed with in a wider type than they are stored in
    seconds: float | None = None

    @property
    def device_total(self) -> int:
        return sum(self.device.values())

    def lines(self) -> list[str]:
        """The plan in a few lines, to be shown before the work starts."""
        parts = ", ".join(f"{what} {_size(value)}" for what, value in self.device.items() if value)
        where = ", ".join(f"{self.places.count(p)} on {_PLACE_NAMES[p]}" for p in _PLACE_NAMES if p in self.places)
        took = "" if self.seconds is None else f", about {_duration(self.seconds)} at this machine's measured speed"
        wide = ", widened to fp32 as they are read" if self.widened else ""
        return [
            f"memory: {_size(self.device_total)} of {_size(self.device_limit)} on the device ({parts})",
            f"activations at {len(self.places)} layer boundaries: {where} ({_size(self.host)} host, {_size(self.disk)} disk)",
            f"{'resident' if self.resident else 'streamed'}, micro-batches of {self.micro_batch}; "
            f"{_size(self.read)} of weights to read{wide}, {self.flops:.2e} flops{took}",
        ]


_PLACE_NAMES: dict[Place, str] = {"device": "the device", "host": "the host", "disk": "disk"}


def _size(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit in ("B", "kB") else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def parse_size(text: str | int | None) -> int | None:
    """Bytes from "400MB", "1.5GB", "16GiB" or a number."""
    if text is None or isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*([0-9.]+)\s*([kKMGT]?)(i?)[bB]?\s*", text)
    try:
        assert match is not None
        number = float(match[1])
    except (AssertionError, ValueError):
        raise PktError(f"{text!r} is not a size; write 400MB, 1.5GB or 16GiB") from None
    return int(number * (1024 if match[3] else 1000) ** " kMGT".index(match[2].replace("K", "k") or " "))


@dataclass(frozen=True)
class Sizes:
    """What the memory plan needs to know of a teacher, in elements and bytes, from its skeleton alone.

    layer, front, head: parameters; linear_io: Σ of inputs and outputs of one layer's matrices; largest, side: elements and
    longer side of a layer's largest matrix; itemsize: of a weight as it is computed with, stored: where it comes from;
    logits: whether the head's loss needs them (`pkt.models.plain_head`).
    """

    layers: int
    layer: int
    front: int
    head: int
    linear_io: int
    largest: int
    side: int
    vocab: int
    hidden: int
    itemsize: int
    stored: int
    grad_itemsize: int
    tied: bool
    logits: bool


def sizes_of(teacher: Teacher, layers: str, count: int) -> Sizes:
    """Measure a teacher's skeleton."""
    model: Any = teacher.model
    per_layer, io, outside, largest, side = [0] * count, [0] * count, 0, 1, 1
    for name, parameter in model.named_parameters():
        index = layer_of(name, layers)
        if index is None:
            outside += parameter.numel()
            continue
        per_layer[index] += parameter.numel()
        if parameter.ndim > 1:
            io[index] += sum(parameter.shape[-2:])
            largest, side = max(largest, parameter.numel()), max(side, *parameter.shape)
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    front = 0 if embedding is None else embedding.weight.numel()
    tied = head is not None and embedding is not None and head.weight is embedding.weight
    vocab, hidden = (1, 1) if embedding is None else (embedding.weight.shape[0], embedding.weight.shape[1])
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden = getattr(text, "hidden_size", None) or hidden
    dtype = _dtype_of(teacher)
    # Gradients between layers of an fp16 model are kept in fp32, whose range they need.
    grad_itemsize = 4 if dtype == torch.float16 else dtype.itemsize
    rest = outside if tied else max(0, outside - front)
    return Sizes(
        layers=count,
        layer=max(per_layer),
        front=front,
        head=rest,
        linear_io=max(io),
        largest=largest,
        side=side,
        vocab=vocab,
        hidden=hidden,
        itemsize=dtype.itemsize,
        stored=teacher.stored_itemsize,
        grad_itemsize=grad_itemsize,
        tied=tied,
        logits=plain_head(model) is None,
    )


def _choosing(elements: int, side: int, *, itemsize: int, select: str, rank: int) -> int:
    """Bytes that choosing and factorizing a region of one matrix takes at most."""
    # Windows and sums are found a block at a time; other regions are copied, and single weights sorted.
    region = {"window": 0, "random": 0, "weights": 32 * elements}.get(select, 4 * elements)
    cut = 0 if select in ("window", "random") else itemsize * elements
    width = -(-max(rank, -(-(rank + 16) // 5)) // 16) * 16
    return max(min(ops.SEARCH_BYTES, 48 * elements), region, cut + 4 * side * 9 * width)


def plan_memory(
    sizes: Sizes,
    lengths: Sequence[Sequence[int]],
    *,
    device: torch.device,
    batch_size: int,
    in_memory: bool,
    select: str = "window",
    rank: int = 16,
    device_memory: int | None = None,
    host_memory: int | None = None,
    scratch_free: int | None = None,
    resident: bool = True,
) -> MemoryPlan:
    """Choose the micro-batch and where activations go, so that everything fits; says what would when nothing does.

    lengths: tokens of each task's samples, longest first. device_memory, host_memory: limits in bytes; default: what is
    free. On a CPU both limit the same memory and the smaller counts. scratch_free: bytes on the scratch disk. resident:
    whether the weights of a teacher that fits may stay.
    """
    on_cpu = device.type == "cpu"
    free_host, option = _free_memory(), "--device-memory"
    if on_cpu:
        given = [m for m in (device_memory, host_memory) if m is not None]
        device_limit, host_limit = min(given, default=free_host), 0
        # The smaller counts, so it is the one to raise.
        option = "--host-memory" if host_memory is not None and host_memory == device_limit else option
    else:
        device_limit = device_memory if device_memory is not None else torch.cuda.mem_get_info(device)[0]
        host_limit = host_memory if host_memory is not None else free_host
    tokens = sum(map(sum, lengths))
    # A tied table is loaded with what precedes the layers and with what follows them.
    parameters = sizes.layers * sizes.layer + sizes.front + sizes.head
    flops = 8.0 * (sizes.layers * sizes.layer + sizes.head) * tokens
    weights, item = parameters * sizes.itemsize, sizes.itemsize
    read = sizes.stored * (2 * sizes.layers * sizes.layer + 2 * sizes.front + sizes.head)
    table = max(sizes.head, sizes.front)
    # A tied table's scores wait for its other use, with the gradient rows of the tokens that occur.
    waiting = len(lengths) * 4 * table if sizes.tied and on_cpu else 0
    rows = 4 * tokens * sizes.hidden if sizes.tied and on_cpu else 0
    smallest = 0
    for micro in _halvings(batch_size):
        shapes = _chunk_shapes(lengths, micro, device, item)
        widest, padded = max(size * width for size, width in shapes), sum(size * width for size, width in shapes)
        boundary = padded * sizes.hidden * item
        part = functools.partial(_largest_part, sizes, lengths, widest, device, in_memory, select, rank)
        always = {"gradients at the boundary": 2 * padded * sizes.hidden * sizes.grad_itemsize + rows}
        if on_cpu:
            kept = _LIBRARIES + _PER_SHAPE * len(set(shapes))
            always["libraries"] = kept if item == 2 else min(_LIBRARIES, sizes.layer * 4)
        fixed, with_waiting = {**part(0), **always}, {**part(waiting), **always}
        needed = sum(fixed.values())
        smallest = needed
        if needed > device_limit:
            continue
        streamed = not in_memory and (not resident or sum(with_waiting.values()) + weights > 0.8 * device_limit)
        extra = 0 if streamed or in_memory else weights
        left = device_limit - needed - extra
        fits = sum(with_waiting.values()) + extra + (sizes.layers + 1) * boundary <= device_limit
        if fits:
            fixed = with_waiting
        # Where not everything fits, something goes to a file, and a tied table's scores then do first.
        most = sizes.layers + 1 if fits or not waiting else sizes.layers
        on_device = min(most, max(0, left // max(1, boundary)))
        on_host = min(sizes.layers + 1 - on_device, max(0, int(0.9 * host_limit) // max(1, boundary)))
        on_disk = sizes.layers + 1 - on_device - on_host
        disk = on_disk * boundary + (waiting if on_disk else 0)
        if on_disk and scratch_free is not None and disk > scratch_free:
            raise PktError(
                f"activations need {_size(disk)} beside memory and the scratch disk has "
                f"{_size(scratch_free)} free; name a larger disk with --scratch, or allow more with --host-memory"
            )
        # The last boundaries are wanted first and soonest: they stay nearest.
        places: list[Place] = [*["disk"] * on_disk, *["host"] * on_host, *["device"] * on_device]  # type: ignore[list-item]
        device_use = {**fixed, "activations": on_device * boundary}
        if extra:
            device_use["resident weights"] = extra
        return MemoryPlan(
            micro_batch=micro,
            places=places,
            resident=bool(extra) or in_memory,
            device=device_use,
            host=on_host * boundary,
            disk=disk,
            read=0 if in_memory else (parameters * sizes.stored if extra else read),
            flops=flops,
            device_limit=device_limit,
            widened=sizes.itemsize > sizes.stored,
        )
    raise PktError(
        f"one sample at a time needs {_size(smallest)} on the device and {_size(device_limit)} may be used; allow more "
        f"with {option} {_size(1.05 * smallest).replace(' ', '')}, or shorten the seeds with --max-length"
    )


def _halvings(size: int) -> Iterator[int]:
    while size > 1:
        yield size
        size = (size + 1) // 2
    yield 1


def _chunk_shapes(
    lengths: Sequence[Sequence[int]], micro: int, device: torch.device, itemsize: int
) -> list[tuple[int, int]]:
    """(samples, padded width) of each micro-batch."""
    step = _width_step(device, itemsize, max(map(max, lengths)))
    parts = [task[i : i + micro] for task in lengths for i in range(0, len(task), micro)]
    return [(len(part), _rounded_up(max(part), step)) for part in parts]


def _largest_part(
    sizes: Sizes,
    lengths: Sequence[Sequence[int]],
    widest: int,
    device: torch.device,
    in_memory: bool,
    select: str,
    rank: int,
    waiting: int,
) -> dict[str, int]:
    """What a decoder layer takes on the device, or the head, whichever takes more; waiting: bytes of tied tables' scores."""
    item, table = sizes.itemsize, max(sizes.head, sizes.front)
    choose = functools.partial(_choosing, itemsize=item, select=select, rank=rank)
    # The C++ product's share of each factor; without it two blocks of a gradient, one sample's and the sum.
    blocks = 0
    if device.type == "cpu":
        compiled = ops.implementation("linear_sensitivity_", device)[0] == "C++"
        blocks = 8 * min(1 << 18 if compiled else ops.GRADIENT_ELEMENTS, sizes.largest)
    # Inputs and outputs of every matrix and of what lies between them, and fp32 copies of one matrix's.
    work = widest * sizes.linear_io * (2 * item + 4) + blocks
    if sizes.logits:
        head_work = max(map(max, lengths)) * sizes.vocab * (3 * 4 + 2 * item) + blocks
    else:
        # A block of logits, beside a copy in fp32 (half types) or a part of the next one, and what the last norm keeps.
        block = min(BLOCK.get(device.type, BLOCK_DEFAULT), widest * sizes.vocab)
        head_work = 8 * block + widest * sizes.hidden * (4 * item + 32) + blocks
    loaded = 1 if in_memory else 2
    # The buffer that weights of another type are read into.
    buffer = 0 if sizes.stored == item else sizes.stored
    # Micro-batches are gone when regions are chosen.
    layer = {
        "weights": sizes.layer * (loaded * item + buffer),
        "scores": 4 * sizes.layer,
        "tied scores": waiting,
        "work": max(work, choose(sizes.largest, sizes.side)),
    }
    head = {
        "weights": (sizes.head + (loaded - 1) * sizes.layer) * item + max(sizes.head, sizes.layer) * buffer,
        "scores": 4 * table,
        "tied scores": max(0, waiting - 4 * table),
        "work": max(head_work, choose(table, max(sizes.vocab, sizes.hidden))),
    }
    return max((layer, head), key=lambda part: sum(part.values()))


def _free_memory() -> int:
    """Memory that can be taken without swapping."""
    try:
        with open("/proc/meminfo") as file:
            available = next(line for line in file if line.startswith("MemAvailable"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration):
        return int(os.sysconf("SC_PHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))


def measured_seconds(flops: float, dtype: torch.dtype, device: torch.device, budget: float = 1.0) -> float:
    """Time for `flops` of matrix products at the rate this device shows in a trial of about `budget` seconds."""
    side = 1024 if device.type == "cpu" else 8192
    a = torch.ones(side, side, dtype=dtype, device=device)

    def trial() -> float:
        begin = time.perf_counter()
        float((a @ a)[0, 0])
        return time.perf_counter() - begin

    trial()
    times: list[float] = []
    while sum(times) < budget and len(times) < 1000:
        times.append(trial())
    return flops / (2 * side**3 / sorted(times)[len(times) // 2])
