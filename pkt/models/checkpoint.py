"""The files of a checkpoint: which they are, whether they are whole, and the tensors in them, read one at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from pkt.errors import PktError
from pkt.files import os_errors, read_json, safetensors_header
from pkt.models.tables import EXPERT_FILES, RENAMED

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
}


def local_folder(path: str | Path) -> Path | None:
    """The directory a name means, or None when it must be a name on the Hub."""
    path = Path(path)
    if path.is_dir():
        return path
    if path.is_file():
        raise PktError(f"{path} is a file; name the checkpoint directory that holds it")
    if path.is_absolute() or str(path).startswith((".", "~")) or len(path.parts) != 2:
        raise PktError(f"{path} does not exist; name a checkpoint directory or a model on the Hub (owner/name)")
    return None


def first_line(error: BaseException) -> str:
    lines = (str(error).strip() or type(error).__name__).splitlines()
    # A heading says nothing without what it announces.
    return " ".join([lines[0], *[line.strip() for line in lines[1:2]]]) if lines[0].endswith(":") else lines[0]


def gguf_file(path: str | Path) -> Path | None:
    """The GGUF file of a directory that holds nothing else to load."""
    local = local_folder(path)
    if local is None or (local / "config.json").is_file():
        return None
    files = sorted(local.glob("*.gguf"))
    if len(files) > 1:
        raise PktError(f"{path} holds {len(files)} GGUF files; leave one of them there")
    return files[0] if files else None


def check_checkpoint(path: str | Path) -> None:
    """Refuse a checkpoint directory with a missing, truncated or unsafe weight file, before any of it is loaded.

    Raises `PktError` naming the file. A model on the Hub is left to transformers.
    """
    local = local_folder(path)
    if local is None or gguf_file(path) is not None:
        return
    index = local / "model.safetensors.index.json"
    if index.is_file():
        value = read_json(index)
        weight_map = value.get("weight_map") if isinstance(value, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise PktError(f"{index} does not say which file holds which weight; copy the checkpoint again")
        headers = {shard: safetensors_header(local / shard) for shard in sorted(set(weight_map.values()))}
        for name, shard in weight_map.items():
            if name not in headers[shard]:
                raise PktError(
                    f"{local / shard} lacks {name}, which {index.name} places there; copy the checkpoint again"
                )
        return
    if (local / "model.safetensors").is_file():
        safetensors_header(local / "model.safetensors")
        return
    pickles = sorted(local.glob("*.bin"))
    if not pickles:
        raise PktError(f"{path} has no model.safetensors; save the model there with save_pretrained")
    for file in pickles:
        try:
            torch.load(file, map_location="meta", weights_only=True)
        except Exception as error:  # torch.load raises many types for a bad pickle
            raise PktError(
                f"{file} is a pickle that cannot be loaded safely ({first_line(error)}); convert it to safetensors"
            ) from error


def stored_names(name: str, shape: tuple[int, ...], prefix: str) -> Iterator[list[str]]:
    """Ways in which a checkpoint may hold a parameter: the tensors whose bytes, one after another, are it."""
    names = [name, name.removeprefix(prefix)]
    names += [name.replace(now, then) for now, then in RENAMED.items() if now in name]
    yield from ([n] for n in names)
    if len(shape) == 3:
        for full in names:
            parent, _, key = full.rpartition(".")
            for parts in EXPERT_FILES.get(key, ()):
                yield [f"{parent}.{expert}.{part}.weight" for expert in range(shape[0]) for part in parts]


class NotStoredError(Exception):
    """The files do not hold the model's tensors one for one, so that only transformers can read them; the message says why."""


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
                    raise NotStoredError(f"{file} stores {name} as {entry['dtype']}")
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


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns
