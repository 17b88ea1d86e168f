"""What a streamed transfer will take, known before any weight is read."""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch

from pkt import ops
from pkt.errors import PktError
from pkt.models import layer_of, plain_head
from pkt.options import Select
from pkt.planning import STRATEGIES
from pkt.scoring.head import BLOCK, BLOCK_DEFAULT
from pkt.streaming.loader import Teacher, dtype_of
from pkt.streaming.microbatches import rounded_up, width_step

Place: TypeAlias = Literal["device", "host", "disk"]

# What the CPU's matrix libraries keep: their buffers, and code and buffers for each micro-batch's shapes in the half types.
_LIBRARIES, _PER_SHAPE = 24 << 20, 10 << 20


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
        hidden=hidden,
        itemsize=dtype.itemsize,
        stored=teacher.stored_itemsize,
        grad_itemsize=grad_itemsize,
        tied=tied,
        logits=plain_head(model) is None,
    )


def _choosing(elements: int, side: int, *, itemsize: int, choices: Sequence[tuple[Select, int]]) -> int:
    """Bytes that choosing and factorizing a region of one matrix takes at most."""
    # Windows and sums are found a block at a time.
    most = min(ops.SEARCH_BYTES, 48 * elements)
    for select, rank in choices:
        strategy = STRATEGIES[select]
        width = -(-max(rank, -(-(rank + 16) // 5)) // 16) * 16
        factors = strategy.cut_bytes(elements, itemsize) + 4 * side * 9 * width
        most = max(most, strategy.choosing_bytes(elements), factors)
    return most


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
) -> MemoryPlan:
    """Choose the micro-batch and where activations go, so that everything fits; says what would when nothing does.

    lengths: tokens of each task's samples, longest first. device_memory, host_memory: limits in bytes; default: what is
    free. On a CPU both limit the same memory and the smaller counts. scratch_free: bytes on the scratch disk. resident:
    whether the weights of a teacher that fits may stay. choices: how regions are selected and at what largest rank.
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
        part = functools.partial(_largest_part, sizes, lengths, widest, device, in_memory, choices)
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
    step = width_step(device, itemsize, max(map(max, lengths)))
    parts = [task[i : i + micro] for task in lengths for i in range(0, len(task), micro)]
    return [(len(part), rounded_up(max(part), step)) for part in parts]


def _largest_part(
    sizes: Sizes,
    lengths: Sequence[Sequence[int]],
    widest: int,
    device: torch.device,
    in_memory: bool,
    choices: Sequence[tuple[Select, int]],
    waiting: int,
) -> dict[str, int]:
    """What a decoder layer takes on the device, or the head, whichever takes more; waiting: bytes of tied tables' scores."""
    item, table = sizes.itemsize, max(sizes.head, sizes.front)
    choose = functools.partial(_choosing, itemsize=item, choices=choices)
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
