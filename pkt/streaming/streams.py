"""Copies between the host's memory and the device's, beside the computation.

On CUDA they have a stream of their own, and these rules, in terms of events, are what keeps them right: a copy comes after what
made its source and after the last use of its target; who uses the target waits for the event after the copy; a host that
writes what a copy reads, or reads what it writes, settles that event first; and memory made for one stream is lent to the
other before that one uses it, so that it is not given away while it does.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Event: TypeAlias = Any  # a torch.cuda.Event; None where there is nothing to wait for


class Streams:
    """Those of a device that computes in the host's memory: nothing is copied beside anything, and nobody waits."""

    apart = False  # whether host and device have a memory each

    def bind_thread(self) -> None:
        """Make the calling thread one that works for this device."""

    def beside(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, what the calling thread gives to the device goes to the side stream."""
        return contextlib.nullcontext()

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of the host that the device copies from and to by itself."""
        return torch.empty(tuple(shape), dtype=dtype)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Give a copy to the current stream."""
        target.copy_(source)

    def mark(self) -> Event:
        """The event that all that the current stream has been given so far is done."""

    def wait(self, event: Event) -> None:
        """Let what the current stream is given from now on come after the event."""

    def settle(self, event: Event) -> None:
        """Let the calling thread go on after the event."""

    def lend(self, tensor: Tensor) -> None:
        """The current stream uses this memory, which was made for another."""

    def trim(self) -> None:
        """Give memory that was freed back to the device: what is wanted next has another size."""


class CudaStreams(Streams):
    apart = True

    def __init__(self, device: torch.device) -> None:
        self.device, self.side = device, torch.cuda.Stream(device)

    def bind_thread(self) -> None:
        torch.cuda.set_device(self.device)

    def beside(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(self.side)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        # Pinning happens in the current device's context, which should not be made for this alone.
        with torch.cuda.device(self.device):
            return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def mark(self) -> Event:
        # A thread that settles a blocking event sleeps, and leaves its core to the one that computes.
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait(self, event: Event) -> None:
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def settle(self, event: Event) -> None:
        if event is not None:
            event.synchronize()

    def lend(self, tensor: Tensor) -> None:
        tensor.record_stream(torch.cuda.current_stream(self.device))

    def trim(self) -> None:
        torch.cuda.empty_cache()


def streams_of(device: torch.device) -> Streams:
    return CudaStreams(device) if device.type == "cuda" else Streams()


class Buffers:
    """Byte buffers of one kind, each used again when whoever had it is done with it.

    make: a new one of a size. wait: how the one who takes a buffer waits for the last use, `Streams.settle` for a thread that
    writes it, `Streams.wait` for a stream.
    """

    def __init__(self, streams: Streams, make: Callable[[int], Tensor], wait: Callable[[Event], None]) -> None:
        self.streams, self.make, self.wait = streams, make, wait
        self.free: list[tuple[Tensor, Event]] = []
        self.lock = threading.Lock()

    def take(self, size: int) -> Tensor:
        """A buffer of at least `size` bytes."""
        with self.lock:
            fitting = [pair for pair in self.free if size <= pair[0].numel() <= 2 * size]
            best = min(fitting, key=lambda pair: pair[0].numel(), default=None)
            # A buffer of another size will not be needed again: parts of one size follow each other.
            dropped = self.free if best is None else []
            self.free = [] if best is None else [pair for pair in self.free if pair is not best]
        if best is not None:
            self.wait(best[1])
            return best[0]
        if dropped:
            for _, event in dropped:
                self.streams.settle(event)
            dropped.clear()
            self.streams.trim()
        return self.make(size)

    def give(self, buffer: Tensor, event: Event = None) -> None:
        """Back, to be taken again after the event."""
        with self.lock:
            self.free.append((buffer, event))
