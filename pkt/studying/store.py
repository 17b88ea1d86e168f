"""Cells: artefacts addressed by the hash of their inputs, in a folder where each is whole or not there.

OUT/cells/4f/4f1c…/     cell.json (kind, inputs, versions, seconds, hashes of the files) and what the cell made
OUT/answers, OUT/judged  what models wrote, and what judges said of it, item by item
OUT/failed/4f1c….json   what went wrong; gone when the cell is there
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pkt.errors import PktError
from pkt.files import MANIFEST, atomic_file, atomic_folder, check_output_folder, read_json, sha256, write_json
from pkt.manifest import read_manifest, versions

CELL = "cell.json"
# Raised by hand when what a kind of cell means changes.
VERSIONS = {"start": 1, "tune": 1, "train": 2, "test": 1}


@dataclass(frozen=True)
class Cell:
    """kind: start, tune, train or test. inputs: all that its content depends on, as plain values, upstream cells by their keys;
    what is at its default is left out, so that a new option orphans nothing. labels: what people call it, no part of the key."""

    kind: str
    inputs: Mapping[str, Any]
    labels: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @functools.cached_property
    def key(self) -> str:
        """32 hexadecimal digits."""
        value = {"kind": self.kind, "version": VERSIONS[self.kind], "inputs": self.inputs}
        return sha256(json.dumps(value, sort_keys=True, allow_nan=False))[:32]

    def __str__(self) -> str:
        return " ".join([self.kind, *(str(value) for value in self.labels.values())])


def machine() -> dict[str, Any]:
    """What a cell was made on, and the most memory that its process has used until now (of a GPU, what torch has taken)."""
    import torch

    if torch.cuda.is_available():
        return {"device": torch.cuda.get_device_name(), "peak_bytes": torch.cuda.max_memory_allocated()}
    try:
        import resource
    except ImportError:  # Windows
        return {"device": "cpu", "peak_bytes": None}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"device": "cpu", "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


class Store:
    """The cells in a study's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._values: dict[str, Any] = {}  # a cell never changes

    def path(self, cell: Cell | str) -> Path:
        key = cell if isinstance(cell, str) else cell.key
        return self.folder / "cells" / key[:2] / key

    def has(self, cell: Cell) -> bool:
        return (self.path(cell) / CELL).is_file()

    @contextlib.contextmanager
    def making(self, cell: Cell) -> Iterator[Path]:
        """A scratch folder that becomes the cell's in one rename, with its record, or disappears."""
        begin = time.perf_counter()
        place = self.path(cell)
        place.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(place, force=True) as scratch:
            yield scratch
            files = sorted(f for f in scratch.rglob("*") if f.is_file())
            record = {
                "kind": cell.kind,
                "inputs": cell.inputs,
                "labels": cell.labels,
                "seconds": time.perf_counter() - begin,
                "versions": versions(),
                **machine(),
                "files": {str(f.relative_to(scratch)): sha256(f.read_bytes()) for f in files},
            }
            write_json(scratch / CELL, record)
        self._failure(cell).unlink(missing_ok=True)

    def record(self, cell: Cell) -> dict[str, Any]:
        """cell.json. Raises `PktError` for a file of the cell's that is not as it was written."""
        found: dict[str, Any] = read_json(self.path(cell) / CELL)
        for name, digest in found["files"].items():
            file = self.path(cell) / name
            if not file.is_file() or sha256(file.read_bytes()) != digest:
                raise PktError(
                    f"{file} was changed since it was written; remove {file.parent}, and the study makes it again"
                )
        return found

    def value(self, cell: Cell) -> Any:
        """What a cell of one JSON file holds."""
        if cell.key not in self._values:
            self.record(cell)
            self._values[cell.key] = read_json(self.path(cell) / "result.json")
        return self._values[cell.key]

    def kept(self, cell: Cell, kind: str, suffix: str = "json") -> Path:
        """A file beside the cells, of what is costly to make again before one is whole. kind: answers, or judged."""
        return self.folder / kind / cell.key[:2] / f"{cell.key}.{suffix}"

    def put(self, cell: Cell, make: Callable[[], Any]) -> Any:
        """The value of a cell of one JSON file: the stored one, or made and stored now."""
        if self.has(cell):
            return self.value(cell)
        with self.making(cell) as scratch:
            value = make()
            write_json(scratch / "result.json", value)
        return value

    def _failure(self, cell: Cell) -> Path:
        return self.folder / "failed" / f"{cell.key}.json"

    def fail(self, cell: Cell, error: str) -> None:
        self._failure(cell).parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self._failure(cell)) as scratch:
            write_json(scratch, {"cell": str(cell), "error": error})

    def failures(self) -> list[dict[str, str]]:
        folder = self.folder / "failed"
        return [read_json(file) for file in sorted(folder.glob("*.json"))] if folder.is_dir() else []


def check_place(out: Path) -> None:
    """Raises `PktError` for a folder that no study can be made in: it holds something else, or cannot be written."""
    if not (out / MANIFEST).is_file():
        check_output_folder(out)
    elif read_manifest(out).get("kind") != "study":
        raise PktError(f"{out} is no study's folder; name another")
