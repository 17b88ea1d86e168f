"""Hidden states at the boundaries between decoder layers: on the device, in host memory, or in files."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from pkt.errors import PktError
from pkt.files import os_errors
from pkt.streaming.loader import bytes_of
from pkt.streaming.memory import Place


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
