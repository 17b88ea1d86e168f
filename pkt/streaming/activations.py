"""Hidden states at the boundaries between decoder layers: on the device, in host memory, or in files."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from pkt.errors import PktError
from pkt.files import os_errors
from pkt.streaming.loader import bytes_of
from pkt.streaming.memory import Place
from pkt.streaming.streams import Event, streams_of

Where: TypeAlias = tuple[int, int]  # a boundary between layers, and a micro-batch


class Boundaries:
    """Hidden states by (boundary, chunk): on the device, in host memory, or in files written behind the computation."""

    def __init__(self, device: torch.device, places: Sequence[Place], folder: Path | None, *, behind: bool) -> None:
        self.device, self.places, self.folder = device, places, folder
        self.streams = streams_of(device)
        self.held: dict[Where, Tensor] = {}
        self.shapes: dict[Where, tuple[torch.Size, torch.dtype]] = {}
        self.leaving: deque[tuple[Event, Tensor]] = deque()
        self.there: dict[Where, Event] = {}  # when what left the device is on the host
        self.coming: dict[Where, tuple[Tensor, Event | Future[Event]]] = {}
        self.writing: dict[Where, Future[None]] = {}
        self.thread = (
            ThreadPoolExecutor(1, "pkt-activations", self.streams.bind_thread) if behind and "disk" in places else None
        )

    def put(self, boundary: int, chunk: int, hidden: Tensor) -> None:
        key, place = (boundary, chunk), self.places[boundary]
        self.shapes[key] = hidden.shape, hidden.dtype
        if place == "device":
            self.held[key] = hidden
            return
        host, there = self._to_host(hidden.contiguous())
        if place == "host":
            self.held[key], self.there[key] = host, there
        elif self.thread is None:
            self._write(key, host, there)
        else:
            # Two unwritten boundaries at most: what waits to be written is memory too.
            while len(self.writing) > 1:
                self._settle(next(iter(self.writing)))
            self.writing[key] = self.thread.submit(self._write, key, host, there)

    def get(self, boundary: int, chunk: int, then: Where | None = None) -> Tensor:
        """Hidden states on the device; those of `then` begin to come there while the caller computes."""
        key = (boundary, chunk)
        self._settle(key)
        if not self.streams.apart:
            return self.held[key] if key in self.held else self._read(key)
        if self.places[boundary] == "device":
            return self.held[key]
        self._expect(key)
        if then is not None and then in self.shapes and self.places[then[0]] != "device":
            self._expect(then)
        hidden, there = self.coming.pop(key)
        self.streams.wait(there.result() if isinstance(there, Future) else there)
        return hidden

    def drop(self, boundary: int, chunk: int) -> None:
        key = (boundary, chunk)
        self._settle(key)
        for known in (self.held, self.there, self.coming):
            known.pop(key, None)
        if self.shapes.pop(key, None) is not None and self.places[boundary] == "disk":
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
        # No copy may go on into memory that is given away.
        with self.streams.beside():
            last = self.streams.mark()
        self.streams.settle(last)
        for key in self.shapes:
            if self.places[key[0]] == "disk":
                self._file(key).unlink(missing_ok=True)
        for known in (self.held, self.shapes, self.leaving, self.there, self.coming, self.writing):
            known.clear()

    # -- between device and host

    def _to_host(self, hidden: Tensor) -> tuple[Tensor, Event]:
        if not self.streams.apart:
            return hidden, None
        # Two at most are on their way: until they are there they take memory on the device.
        while len(self.leaving) > 1:
            self.streams.settle(self.leaving.popleft()[0])
        host, made = self.streams.pinned(hidden.shape, hidden.dtype), self.streams.mark()
        there = self._copied(host, hidden, made)
        self.leaving.append((there, hidden))
        return host, there

    def _expect(self, key: Where) -> None:
        if key in self.coming:
            return
        shape, dtype = self.shapes[key]
        # Memory that what is computing now may have used before: the copy comes after that.
        hidden, free = torch.empty(shape, dtype=dtype, device=self.device), self.streams.mark()
        if key in self.held:
            self.coming[key] = hidden, self._copied(hidden, self.held[key], free, self.there[key])
        elif self.thread is None:
            self.coming[key] = hidden, self._from_file(key, hidden, free)
        else:
            # The one thread has written the file before.
            self.coming[key] = hidden, self.thread.submit(self._from_file, key, hidden, free)

    def _from_file(self, key: Where, hidden: Tensor, free: Event) -> Event:
        return self._copied(hidden, self._read(key), free)

    def _copied(self, target: Tensor, source: Tensor, *after: Event) -> Event:
        with self.streams.beside():
            for event in after:
                self.streams.wait(event)
            self.streams.copy(target, source)
            return self.streams.mark()

    # -- between host and disk

    def _settle(self, key: Where) -> None:
        future = self.writing.pop(key, None)
        if future is not None:
            future.result()

    def _file(self, key: Where) -> Path:
        assert self.folder is not None
        return self.folder / f"boundary-{key[0]}-{key[1]}.bin"

    def _write(self, key: Where, hidden: Tensor, there: Event) -> None:
        self.streams.settle(there)
        with os_errors(f"writing activations to {self.folder}"), open(self._file(key), "wb", buffering=0) as file:
            data = bytes_of(hidden)
            done = 0
            while done < len(data):
                done += file.write(data[done:])

    def _read(self, key: Where) -> Tensor:
        hidden = self.streams.pinned(*self.shapes[key])
        with os_errors(f"reading {self._file(key)}"), open(self._file(key), "rb") as file:
            if file.readinto(bytes_of(hidden)) != hidden.numel() * hidden.element_size():
                raise PktError(f"{self._file(key)} was cut short while it was in use; run the same command again")
        return hidden
