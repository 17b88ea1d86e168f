"""What a reading without a backward pass will take, known before any weight is read, and how its rows are parted into passes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from pkt.errors import PktError
from pkt.streaming.memory import (
    CUDA_LIBRARIES,
    LIBRARIES,
    PER_SHAPE,
    ROUNDING,
    MemoryPlan,
    Sizes,
    halvings,
    limits_of,
    pinned,
)
from pkt.streaming.units import spoken_size

# Tokens of one pass of a reading without a backward pass: reading the weights is then some percent of computing with them.
PASS_TOKENS = {"cpu": 1 << 13}
PASS_DEFAULT = 1 << 17
# Tokens of a micro-batch, unless one row has more: in larger ones the work between the products waits for memory.
MICRO_TOKENS = {"cpu": 1 << 10}
# Elements of one block of logits in it, and of the part of them that is drawn from at once.
HEAD, HEAD_DEFAULT = {"cpu": 1 << 23}, 1 << 26
DRAW, DRAW_DEFAULT = {"cpu": 1 << 20}, 1 << 26


def plan_forward(
    sizes: Sizes,
    lengths: Sequence[int],
    *,
    device: torch.device,
    batch_size: int,
    in_memory: bool,
    device_memory: int | None = None,
    host_memory: int | None = None,
) -> tuple[MemoryPlan, list[int]]:
    """The micro-batch and the passes of a reading without a backward pass, so that everything fits; says what would otherwise.

    lengths: tokens of the rows, in order; the passes: rows of each, one after another. A pass reads all weights once: it has
    enough tokens for that to be little of its time, and its hidden states fit beside the largest part of the model.
    """
    limits, on_cpu = limits_of(device, device_memory, host_memory, None), device.type == "cpu"
    usable = limits.device if on_cpu else int(limits.device * (1 - ROUNDING))
    smallest = 0
    for micro in halvings(batch_size):
        need = _forward_need(sizes, max(lengths), micro, device, in_memory)
        smallest = sum(need.values())
        left = usable - smallest
        room = left // 2 if on_cpu else max(left // 2, limits.host // 2)
        per_token = sizes.hidden * sizes.itemsize
        if left > 0 and room // per_token >= micro * max(lengths):
            break
    else:
        raise PktError(
            f"one row at a time needs {spoken_size(smallest)} on the device and {spoken_size(limits.device)} may be used; allow "
            f"more with {limits.option} {spoken_size(1.2 * smallest).replace(' ', '')}, or shorten the rows with --max-length"
        )
    passes = _passes(lengths, min(PASS_TOKENS.get(device.type, PASS_DEFAULT), room // per_token))
    # Padding within a micro-batch is at most as wide again as its rows; those of a pass are sorted by length.
    ends = itertools.accumulate(passes, initial=0)
    tokens = max(sum(lengths[a:b]) for a, b in itertools.pairwise(ends))
    boundary = (tokens + micro * max(lengths)) * per_token
    on_device = on_cpu or boundary <= left // 2
    weights = (sizes.layers * sizes.layer + sizes.front + sizes.head) * sizes.itemsize
    stays = not in_memory and len(passes) > 1 and weights + smallest + on_device * boundary <= 0.8 * usable
    use = {**need, "activations": on_device * boundary, "resident weights": stays * weights}
    readings = 0 if in_memory else 1 if stays else len(passes)
    plan = MemoryPlan(
        micro_batch=micro,
        places=["device" if on_device else "host"] * 2,
        resident=stays or in_memory,
        device=use,
        host=0 if on_device else pinned(boundary),
        disk=0,
        read=readings * sizes.stored * (sizes.layers * sizes.layer + sizes.front + sizes.head),
        flops=2.0 * (sizes.layers * sizes.layer + sizes.head) * sum(lengths),
        device_limit=limits.device,
        widened=sizes.itemsize > sizes.stored,
    )
    return plan, passes


def _passes(lengths: Sequence[int], most: int) -> list[int]:
    """Rows of each pass: as many as have `most` tokens together, one at least."""
    found, tokens = [0], 0
    for length in lengths:
        if found[-1] and tokens + length > most:
            found.append(0)
            tokens = 0
        found[-1] += 1
        tokens += length
    return found


def _forward_need(sizes: Sizes, longest: int, micro: int, device: torch.device, in_memory: bool) -> dict[str, int]:
    """What the largest part of the model takes on the device, beside the hidden states of a pass."""
    item, widest, on_cpu = sizes.itemsize, micro * longest, device.type == "cpu"
    buffer = 0 if sizes.stored == item else sizes.stored
    loaded = 0 if in_memory else 1
    layer = loaded * sizes.layer * (2 * item + buffer) + widest * sizes.linear_io * (item + 4)
    table = max(sizes.head, sizes.front)
    head = loaded * ((table + sizes.layer) * item + max(table, sizes.layer) * buffer)
    block = min(head_rows(sizes.vocab, device), widest) * sizes.vocab
    # Logits, a copy in fp32 where they are not, and what draws take of a part of them.
    head += block * (2 * item + 4) + 24 * min(draw_rows(sizes.vocab, device), widest) * sizes.vocab
    libraries = (LIBRARIES + (PER_SHAPE * 8 if item == 2 else 0)) if on_cpu else CUDA_LIBRARIES
    found = {"weights and work": max(layer, head), "libraries": libraries, "masks": widest * longest}
    if not on_cpu:
        found["activations under way"] = 3 * widest * sizes.hidden * item
    return found


def micro_batches(lengths: Sequence[int], most: int, device: torch.device) -> list[int]:
    """Rows of each micro-batch of a pass, `most` at most. lengths: tokens of its rows, the longest first."""
    tokens = MICRO_TOKENS.get(device.type)
    found: list[int] = []
    first = 0
    while first < len(lengths):
        size = most if tokens is None else max(1, min(most, tokens // lengths[first]))
        found.append(min(size, len(lengths) - first))
        first += found[-1]
    return found


def head_rows(vocabulary: int, device: torch.device) -> int:
    """Tokens whose logits are there at once."""
    return max(1, HEAD.get(device.type, HEAD_DEFAULT) // vocabulary)


def draw_rows(vocabulary: int, device: torch.device) -> int:
    """Tokens whose cumulated probabilities, in fp64, are there at once."""
    return max(1, DRAW.get(device.type, DRAW_DEFAULT) // vocabulary)
