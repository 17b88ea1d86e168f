"""What a streamed transfer will take, known before any weight is read."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch

from pkt import ops
from pkt.errors import PktError
from pkt.models import hidden_size, is_tied, layer_of, plain_head, tables_of
from pkt.options import Select
from pkt.planning import STRATEGIES
from pkt.scoring.head import BLOCK, BLOCK_DEFAULT
from pkt.streaming.available import free_memory
from pkt.streaming.loader import Teacher, dtype_of
from pkt.streaming.microbatches import rounded_up, width_step
from pkt.streaming.sharing import SharedReading
from pkt.streaming.units import spoken_size

Place: TypeAlias = Literal["device", "host", "disk"]

# What the CPU's matrix libraries keep: their buffers, and code and buffers for each micro-batch's shapes in the half types.
LIBRARIES, PER_SHAPE = 24 << 20, 10 << 20
# The workspaces of cuBLAS and cuBLASLt, of 32 MiB each from Hopper on.
CUDA_LIBRARIES = 64 << 20
# The share of a GPU's memory that is left to its allocator, which rounds what it is asked for and leaves holes.
ROUNDING = 0.08


@dataclass
class MemoryPlan:
    """What a run will use, known before any weight is read. Sizes in bytes.

    disk: of activations; checkpoint: of what the next part starts from, saved after each part; folder: what the run folder takes
    until the run is finished, where there is one.
    """

    micro_batch: int
    places: list[Place]
    resident: bool
    device: dict[str, int]
    host: int
    disk: int
    read: int
    flops: float
    device_limit: int
    checkpoint: int = 0
    widened: bool = False  # weights are computed with in a wider type than they are stored in
    seconds: float | None = None
    shared: SharedReading | None = None  # where several ranks read
    folder: dict[str, int] = field(default_factory=dict)

    @property
    def device_total(self) -> int:
        return sum(self.device.values())

    def lines(self) -> list[str]:
        """The plan in a few lines, to be shown before the work starts."""
        parts = ", ".join(f"{what} {spoken_size(value)}" for what, value in self.device.items() if value)
        where = ", ".join(f"{self.places.count(p)} on {_PLACE_NAMES[p]}" for p in _PLACE_NAMES if p in self.places)
        took = "" if self.seconds is None else f", about {_duration(self.seconds)} at this machine's measured speed"
        wide = ", widened to fp32 as they are read" if self.widened else ""
        folder = ", ".join(f"{what} {spoken_size(value)}" for what, value in self.folder.items() if value)
        checkpoints = (
            [f"checkpoints on disk: about {spoken_size(sum(self.folder.values()))} ({folder})"] if folder else []
        )
        return [
            *([] if self.shared is None else self.shared.lines()),
            f"memory: {spoken_size(self.device_total)} of {spoken_size(self.device_limit)} on the device ({parts})",
            f"activations at {len(self.places)} layer boundaries: {where} ({spoken_size(self.host)} host, "
            f"{spoken_size(self.disk)} disk)",
            f"{'resident' if self.resident else 'streamed'}, micro-batches of {self.micro_batch}; "
            f"{spoken_size(self.read)} of weights to read{wide}, {self.flops:.2e} flops{took}",
            *checkpoints,
        ]


_PLACE_NAMES: dict[Place, str] = {"device": "the device", "host": "the host", "disk": "disk"}


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


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

    @property
    def checkpoint(self) -> int:
        """Bytes of the weights where they come from."""
        return self.stored * (self.layers * self.layer + self.head + (0 if self.tied else self.front))

    @property
    def part(self) -> int:
        """Bytes of the most that is read at once."""
        return self.stored * max(self.layer, self.front, self.head)


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
    embedding, _ = tables_of(model)
    front = 0 if embedding is None else embedding.weight.numel()
    tied = is_tied(model)
    vocab = 1 if embedding is None else embedding.weight.shape[0]
    dtype = dtype_of(teacher)
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
        hidden=hidden_size(model) or 1,
        itemsize=dtype.itemsize,
        stored=teacher.stored_itemsize,
        grad_itemsize=grad_itemsize,
        tied=tied,
        logits=plain_head(model) is None,
    )


def _choosing(
    elements: int, side: int, *, device: torch.device, itemsize: int, choices: Sequence[tuple[Select, int]]
) -> int:
    """Bytes that choosing and factorizing a region of one matrix takes at most."""
    # Windows and sums are found a block at a time.
    most = min(ops.SEARCH_BYTES, 48 * elements)
    # And factors tried.
    widened = 0 if device.type == "cpu" else 4 * min(elements, ops.widened_elements(device))
    for select, rank in choices:
        strategy = STRATEGIES[select]
        factors = strategy.cut_bytes(elements, itemsize) + 4 * side * 9 * ops.block_width(rank) + widened
        most = max(most, strategy.choosing_bytes(elements), factors)
    return most


@dataclass(frozen=True)
class Limits:
    """Bytes that may be used: on the device, on a host beside it, on the scratch disk; and the option that allows more."""

    device: int
    host: int
    scratch: int | None
    option: str


@dataclass(frozen=True)
class _Work:
    """What is scored, and where: all that a need follows from, besides the size of a micro-batch."""

    sizes: Sizes
    lengths: Sequence[Sequence[int]]
    device: torch.device
    in_memory: bool
    choices: Sequence[tuple[Select, int]]

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def tokens(self) -> int:
        return sum(map(sum, self.lengths))

    @property
    def parameters(self) -> int:
        # A tied table is loaded with what precedes the layers and with what follows them.
        return self.sizes.layers * self.sizes.layer + self.sizes.front + self.sizes.head

    @property
    def waiting(self) -> int:
        """A tied table's scores wait on the host for its other use, of every task."""
        return len(self.lengths) * 4 * max(self.sizes.head, self.sizes.front) if self.sizes.tied else 0

    @property
    def rows(self) -> int:
        """And the gradient rows of the tokens that occur."""
        return 4 * self.tokens * self.sizes.hidden if self.sizes.tied else 0


@dataclass(frozen=True)
class _Need:
    """What micro-batches of one size take, in bytes.

    device: while a tied table's scores do not wait in memory, waiting: while they do; boundary: of the hidden states at one
    boundary between layers, on the device or in a file, and as pinned memory of the host; gradients: of the losses there.
    """

    micro: int
    device: dict[str, int]
    waiting: dict[str, int]
    boundary: int
    pinned: int
    gradients: int


def plan_memory(
    sizes: Sizes,
    lengths: Sequence[Sequence[int]],
    *,
    device: torch.device,
    batch_size: int,
    in_memory: bool,
    choices: Sequence[tuple[Select, int]] = (("window", 16),),
    device_memory: int | None = None,
    host_memory: int | None = None,
    scratch_free: int | None = None,
    resident: bool = True,
    neighbours: int = 1,
) -> MemoryPlan:
    """Choose the micro-batch and where activations go, so that everything fits; says what would when nothing does.

    lengths: tokens of each task's samples, longest first. device_memory, host_memory: limits in bytes; default: what is
    free. On a CPU both limit the same memory and the smaller counts. scratch_free: bytes on the scratch disk. resident:
    whether the weights of a teacher that fits may stay. choices: how regions are selected and at what largest rank. neighbours:
    processes on this machine that share out what is free of its memory.
    """
    limits = limits_of(device, device_memory, host_memory, scratch_free, neighbours)
    work, smallest = _Work(sizes, lengths, device, in_memory, choices), 0
    for micro in halvings(batch_size):
        need = _need(work, micro)
        smallest = sum(need.device.values())
        if smallest <= _usable(limits, work):
            return _placed(work, need, limits, resident)
    smallest = smallest * limits.device // max(1, _usable(limits, work))
    raise PktError(
        f"one sample at a time needs {spoken_size(smallest)} on the device and {spoken_size(limits.device)} may be used; allow "
        f"more with {limits.option} {spoken_size(1.05 * smallest).replace(' ', '')}, or shorten the seeds with --max-length"
    )


def limits_of(
    device: torch.device,
    device_memory: int | None,
    host_memory: int | None,
    scratch_free: int | None,
    neighbours: int = 1,
) -> Limits:
    free = free_memory() // neighbours
    if device.type != "cpu":
        here = device_memory if device_memory is not None else torch.cuda.mem_get_info(device)[0]
        return Limits(here, host_memory if host_memory is not None else free, scratch_free, "--device-memory")
    least = min([m for m in (device_memory, host_memory) if m is not None], default=free)
    # The smaller counts, so it is the one to raise.
    option = "--host-memory" if host_memory is not None and host_memory == least else "--device-memory"
    return Limits(least, 0, scratch_free, option)


def _usable(limits: Limits, work: _Work) -> int:
    """What may be planned for, of the device's memory: a GPU's allocator rounds what it is asked for, and leaves holes."""
    return limits.device if work.on_cpu else int(limits.device * (1 - ROUNDING))


def _need(work: _Work, micro: int) -> _Need:
    sizes, item = work.sizes, work.sizes.itemsize
    shapes = _chunk_shapes(work.lengths, micro, work.device, item)
    areas = [size * width for size, width in shapes]
    widest, padded = max(areas), sum(areas)
    gradients = padded * sizes.hidden * sizes.grad_itemsize
    always = {"gradients at the boundary": 2 * gradients}
    waiting = 0
    if work.on_cpu:
        always["gradients at the boundary"] += work.rows
        kept = LIBRARIES + PER_SHAPE * len(set(shapes))
        always["libraries"] = kept if item == 2 else min(LIBRARIES, sizes.layer * 4)
        waiting = work.waiting
    else:
        always["libraries"] = CUDA_LIBRARIES
        # Two on their way to the host, one on its way back.
        always["activations under way"] = 3 * widest * sizes.hidden * item
        # A byte for each pair of a sample's positions, as the model's own masks have it.
        always["masks"] = sum(area * width for area, (_, width) in zip(areas, shapes, strict=True))
    return _Need(
        micro,
        {**_largest_part(work, widest, 0), **always},
        {**_largest_part(work, widest, waiting), **always},
        padded * sizes.hidden * item,
        sum(pinned(area * sizes.hidden * item) for area in areas),
        gradients,
    )


def _placed(work: _Work, need: _Need, limits: Limits, resident: bool) -> MemoryPlan:
    """Where activations and weights go, for micro-batches that fit."""
    sizes, usable, boundaries = work.sizes, _usable(limits, work), work.sizes.layers + 1
    weights = work.parameters * sizes.itemsize
    with_waiting = sum(need.waiting.values())
    streamed = not work.in_memory and (not resident or with_waiting + weights > 0.8 * limits.device)
    extra = 0 if streamed or work.in_memory else weights
    left = usable - sum(need.device.values()) - extra
    fits = with_waiting + extra + boundaries * need.boundary <= usable
    # Where not everything fits, something goes to a file, and a tied table's scores then do first.
    waits = work.on_cpu and work.waiting > 0
    most = boundaries if fits or not waits else boundaries - 1
    on_device = min(most, max(0, left // max(1, need.boundary)))
    host = 0 if work.on_cpu else work.waiting + work.rows
    if not work.on_cpu and not work.in_memory:
        host += pinned(sizes.stored * max(sizes.layer, sizes.front, sizes.head))
    on_host = min(boundaries - on_device, max(0, int(0.9 * limits.host) - host) // max(1, need.pinned))
    on_disk = boundaries - on_device - on_host
    disk = on_disk * need.boundary + (work.waiting if on_disk else 0)
    if on_disk and limits.scratch is not None and disk > limits.scratch:
        raise PktError(
            f"activations need {spoken_size(disk)} beside memory and the scratch disk has "
            f"{spoken_size(limits.scratch)} free; name a larger disk with --scratch, or allow more with --host-memory"
        )
    # The last boundaries are wanted first and soonest: they stay nearest.
    places: list[Place] = [*["disk"] * on_disk, *["host"] * on_host, *["device"] * on_device]  # type: ignore[list-item]
    device_use = {**(need.waiting if fits else need.device), "activations": on_device * need.boundary}
    if extra:
        device_use["resident weights"] = extra
    if not work.on_cpu:
        device_use["allocator's rounding"] = int(sum(device_use.values()) * ROUNDING / (1 - ROUNDING))
    twice = 2 * sizes.layers * sizes.layer + 2 * sizes.front + sizes.head
    return MemoryPlan(
        micro_batch=need.micro,
        places=places,
        resident=bool(extra) or work.in_memory,
        device=device_use,
        host=on_host * need.pinned + host,
        disk=disk,
        read=0 if work.in_memory else sizes.stored * (work.parameters if extra else twice),
        flops=8.0 * (sizes.layers * sizes.layer + sizes.head) * work.tokens,
        device_limit=limits.device,
        # The one before is removed when the next is written.
        checkpoint=2 * need.gradients + work.waiting + work.rows,
        widened=sizes.itemsize > sizes.stored,
    )


def pinned(size: int) -> int:
    """Bytes that torch takes for a pinned buffer: the next power of two."""
    return 1 << max(0, size - 1).bit_length()


def halvings(size: int) -> Iterator[int]:
    while size > 1:
        yield size
        size = (size + 1) // 2
    yield 1


def _chunk_shapes(
    lengths: Sequence[Sequence[int]], micro: int, device: torch.device, itemsize: int
) -> list[tuple[int, int]]:
    """(samples, padded width) of each micro-batch."""
    step = width_step(device, itemsize, max(map(max, lengths)))
    parts = [task[i : i + micro] for task in lengths for i in range(0, len(task), micro)]
    return [(len(part), rounded_up(max(part), step)) for part in parts]


def _largest_part(work: _Work, widest: int, waiting: int) -> dict[str, int]:
    """What a decoder layer takes on the device, or the head, whichever takes more.

    widest: tokens of the largest micro-batch; waiting: bytes of tied tables' scores.
    """
    sizes, item, table = work.sizes, work.sizes.itemsize, max(work.sizes.head, work.sizes.front)
    choose = functools.partial(_choosing, device=work.device, itemsize=item, choices=work.choices)
    # The C++ product's share of each factor; without it two blocks of a gradient, one sample's and the sum.
    blocks = 0
    if work.on_cpu:
        compiled = ops.implementation("linear_sensitivity_", work.device)[0] == "C++"
        blocks = 8 * min(1 << 18 if compiled else ops.GRADIENT_ELEMENTS, sizes.largest)
    # Inputs and outputs of every matrix and of what lies between them, and fp32 copies of one matrix's.
    layer_work = widest * sizes.linear_io * (2 * item + 4) + blocks
    if sizes.logits:
        head_work = max(map(max, work.lengths)) * sizes.vocab * (3 * 4 + 2 * item) + blocks
    else:
        # A block of logits, beside a copy in fp32 (half types) or a part of the next one, and what the last norm keeps.
        block = min(BLOCK.get(work.device.type, BLOCK_DEFAULT), widest * sizes.vocab)
        head_work = 8 * block + widest * sizes.hidden * (4 * item + 32) + blocks
    loaded = 1 if work.in_memory else 2
    # The buffer that weights of another type are read into.
    buffer = 0 if sizes.stored == item else sizes.stored
    # Micro-batches are gone when regions are chosen.
    layer = {
        "weights": sizes.layer * (loaded * item + buffer),
        "scores": 4 * sizes.layer,
        "tied scores": waiting,
        "work": max(layer_work, choose(sizes.largest, sizes.side)),
    }
    head = {
        "weights": (sizes.head + (loaded - 1) * sizes.layer) * item + max(sizes.head, sizes.layer) * buffer,
        "scores": 4 * table,
        "tied scores": max(0, waiting - 4 * table),
        "work": max(head_work, choose(table, max(sizes.vocab, sizes.hidden))),
    }
    return max((layer, head), key=lambda part: sum(part.values()))


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
