"""The files of a checkpoint: which of a folder's files transformers would load, whether they are sound, and the tensors in them."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pkt.errors import PktError, PktWarning
from pkt.files import os_errors, read_json, safetensors_header
from pkt.models.tables import EXPERT_FILES, RENAMED

CONFIG = "config.json"
_PIECE = 16 << 20
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class NotStoredError(Exception):
    """The files do not hold the model's tensors one for one, so that only transformers can read them; the message says why."""


def first_line(error: BaseException) -> str:
    lines = (str(error).strip() or type(error).__name__).splitlines()
    # A heading says nothing without what it announces.
    return " ".join([lines[0], *[line.strip() for line in lines[1:2]]]) if lines[0].endswith(":") else lines[0]


def gguf_file(folder: Path) -> Path | None:
    """The GGUF file of a folder that holds nothing else to load."""
    if (folder / CONFIG).is_file():
        return None
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        raise PktError(f"{folder} holds {len(files)} GGUF files; leave one of them there")
    return files[0] if files else None


def inside(folder: Path, name: Any, said_by: Path) -> Path:
    """The file of a folder that `said_by` names, links followed. Raises `PktError` for one that lies outside of the folder.

    The Hub's cache holds a model's files as links to its blobs, and those are followed.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise PktError(f"{said_by} names {name!r} where a file's name belongs; copy the checkpoint again")
    path = folder / name
    if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
        raise PktError(f"{said_by} names {name!r}, which is not in its folder; copy the checkpoint again")
    target = path.resolve()
    blob = target.parent.name == "blobs" and target.parents[1].name.startswith("models--")
    if not blob and not target.is_relative_to(folder.resolve()):
        raise PktError(f"{path} is a link out of its folder, to {target}; copy that file there instead")
    return path


@dataclass(frozen=True)
class WeightFiles:
    """The files of a folder that transformers loads a model's weights from."""

    form: Literal["safetensors", "pickle", "gguf"]
    paths: tuple[Path, ...]
    places: Mapping[str, Path] = field(default_factory=dict)  # tensor -> the file that an index says holds it


def find_weights(folder: Path) -> WeightFiles:
    """What transformers would load of this folder, and nothing else that lies there.

    Raises `PktError` for a folder without weights, an index that is damaged or leads out of the folder.
    """
    gguf = gguf_file(folder)
    if gguf is not None:
        return WeightFiles("gguf", (inside(folder, gguf.name, folder),))
    config = read_json(inside(folder, CONFIG, folder)) if (folder / CONFIG).is_file() else None
    named = config.get("transformers_weights") if isinstance(config, dict) else None
    name = named or next((n for n in _WEIGHTS if (folder / n).is_file()), None)
    if name is None:
        raise PktError(f"{folder} has no {_WEIGHTS[0]}; save the model there with save_pretrained")
    path = inside(folder, name, folder / CONFIG)
    form: Literal["safetensors", "pickle"] = "pickle" if ".bin" in path.name else "safetensors"
    if not path.name.endswith(".index.json"):
        return WeightFiles(form, (path,))
    value = read_json(path)
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise PktError(f"{path} does not say which file holds which weight; copy the checkpoint again")
    shards: dict[str, Path] = {}
    for shard in weight_map.values():
        if not isinstance(shard, str) or shard not in shards:
            found = inside(folder, shard, path)
            shards[shard] = found
    places = {tensor: shards[shard] for tensor, shard in weight_map.items()}
    return WeightFiles(form, tuple(shards[shard] for shard in sorted(shards)), places)


def check_weights(weights: WeightFiles, *, quantized: bool) -> CheckpointFiles | None:
    """Refuse missing, truncated or unsafe weight files before any of them is loaded; the tensors of safetensors files.

    quantized: the configuration says how to undo a quantization. Raises `PktError` naming the file.
    """
    if weights.form == "safetensors":
        files = CheckpointFiles(weights)
        if not quantized:
            files.check_unquantized()
        return files
    for file in weights.paths if weights.form == "pickle" else ():
        try:
            torch.load(file, map_location="meta", weights_only=True)
        except Exception as error:  # torch.load raises many types for a bad pickle
            raise PktError(
                f"{file} is a pickle that cannot be loaded safely ({first_line(error)}); convert it to safetensors"
            ) from error
    return None


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


def all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint holds of a model: parameters (tied ones under each of their names) and persistent buffers."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield dot + key, parameter
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                yield dot + key, buffer


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint: its file, its place there, its type and shape."""

    file: Path
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class CheckpointFiles:
    """Tensors of a safetensors checkpoint, read with pread into buffers that are used again.

    Raises `PktError` for files that are not sound, that do not hold what their index says, or that hold a tensor twice.
    """

    def __init__(self, weights: WeightFiles) -> None:
        self.tensors: dict[str, Stored] = {}
        self.foreign: dict[str, Path] = {}  # in types that torch does not compute with
        self.joined: dict[str, list[str]] = {}
        self.renamed: dict[str, str] = {}  # tensor of the model that was asked for last -> another name, in the files
        self.handles: dict[Path, int] = {}
        self.stamps: dict[Path, tuple[int, int, int]] = {}
        for file in weights.paths:
            header = safetensors_header(file)
            for name, entry in header.tensors.items():
                if self.file_of(name) is not None:
                    raise PktError(f"{file} and {self.file_of(name)} both hold {name}; copy the checkpoint again")
                if entry.dtype in _DTYPES:
                    size = entry.end - entry.begin
                    self.tensors[name] = Stored(file, entry.begin, size, _DTYPES[entry.dtype], entry.shape)
                else:
                    self.foreign[name] = file
            self.stamps[file] = _stamp(os.stat(file))
        for name, shard in weights.places.items():
            if self.file_of(name) != shard:
                raise PktError(f"{shard} lacks {name}, which the index places there; copy the checkpoint again")

    def file_of(self, name: str) -> Path | None:
        return self.tensors[name].file if name in self.tensors else self.foreign.get(name)

    def check_unquantized(self) -> None:
        """Refuse weights that mean nothing without their scales, where the configuration does not say how to undo that."""
        for name, stored in self.tensors.items():
            if name.endswith("_scale_inv") or stored.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
                raise PktError(
                    f"{stored.file} holds {name} of a quantized model, but {CONFIG} has no quantization_config; restore it, or "
                    "convert the weights to bf16 or fp16"
                )

    def names_of(self, model: nn.Module) -> dict[str, str]:
        """Where each tensor of the model is stored.

        Raises `NotStoredError` when only transformers can tell, `PktError` for files that hold too little.
        """
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        self.renamed = self._renamed_for(model)
        found: dict[str, str] = {}
        by_tensor: dict[int, str] = {}
        for name, tensor in all_tensors(model):
            stored = self._place(name, tensor, prefix)
            if stored is not None:
                found[name] = stored
                by_tensor.setdefault(id(tensor), stored)
        for name, tensor in all_tensors(model):
            if name not in found and id(tensor) in by_tensor:
                found[name] = by_tensor[id(tensor)]
        missing = {name: tensor for name, tensor in all_tensors(model) if name not in found}
        used = {part for stored in found.values() for part in self.joined.get(stored, [stored])}
        left = (self.tensors.keys() | self.foreign.keys()) - used
        unfilled = [name for name, tensor in missing.items() if isinstance(tensor, nn.Parameter)]
        if unfilled and not left:  # and so nothing that transformers could map to them
            raise PktError(
                f"{next(iter(self.stamps)).parent}: the checkpoint does not fill {', '.join(unfilled[:5])}; it is incomplete "
                "or another model's"
            )
        if missing:
            raise NotStoredError(f"its files do not name {next(iter(missing))}; transformers has to map them")
        # Some models leave out what they have no class for, and say so (DeepSeek's layers that predict further tokens).
        ignored: Any = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        self._tell_more_layers([n for n in left if not any(re.search(p, n) for p in ignored)], used)
        return found

    def _tell_more_layers(self, left: Iterable[str], used: Iterable[str]) -> None:
        """Say where the files hold what the model has, at numbers that it does not have: a configuration of fewer layers."""
        alike = {re.sub(r"\.\d+\.", ".*.", name) for name in used}
        more = sorted(name for name in left if (kind := re.sub(r"\.\d+\.", ".*.", name)) in alike and kind != name)
        if more:
            warnings.warn(
                f"{self.file_of(more[0])} holds {more[0]} ({len(more)} tensors like it), which its {CONFIG} leaves out: the model "
                "has fewer layers than its files",
                PktWarning,
                stacklevel=3,
            )

    def untied(self, model: nn.Module, tied: Mapping[str, str]) -> list[str]:
        """Which tensors that a model ties to others (name -> the other's) these files hold with values of their own."""
        prefix, tensors = f"{getattr(model, 'base_model_prefix', '')}.", dict(all_tensors(model))
        self.renamed = self._renamed_for(model)
        found = []
        for name, other in tied.items():
            places = [self._place(n, tensors[n], prefix) for n in (name, other) if n in tensors]
            if len(places) == 2 and places[0] and places[1] and not self.same(places[0], places[1]):
                found.append(name)
        return found

    def _place(self, name: str, tensor: Tensor, prefix: str) -> str | None:
        """The name in the files of a tensor of the model; what lies there in pieces is joined under its own name."""
        for parts in stored_names(name, tuple(tensor.shape), prefix):
            if parts[0] in self.foreign:
                raise NotStoredError(
                    f"{self.foreign[parts[0]]} stores {parts[0]} in a type that torch does not compute with"
                )
            if not all(part in self.tensors for part in parts):
                continue
            stored = parts[0]
            if len(parts) > 1:
                if not self._join(name, parts, tensor):
                    continue
                stored = name
            self._check_fit(stored, tensor)
            return stored
        if name in self.renamed:
            self._check_fit(self.renamed[name], tensor)
        return self.renamed.get(name)

    def _renamed_for(self, model: nn.Module) -> dict[str, str]:
        """Tensor of the model -> its name in the files, where transformers itself renames that one for one (Gemma 3, LLaVA)."""
        try:
            from transformers import PreTrainedModel
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightRenaming, rename_source_key
        except ImportError:  # an older transformers has other ways, and such files are loaded whole
            return {}
        if not isinstance(model, PreTrainedModel):
            return {}
        mapping, known = get_model_conversion_mapping(model), dict(all_tensors(model))
        renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        others = [m for m in mapping if not isinstance(m, WeightRenaming)]
        found: dict[str, list[str]] = {}
        for stored in self.tensors:
            name, converted = rename_source_key(stored, renamings, others, model.base_model_prefix, known)
            if converted is None and name != stored and name in known:
                found.setdefault(name, []).append(stored)
        return {name: stored[0] for name, stored in found.items() if len(stored) == 1}

    def _join(self, name: str, parts: list[str], tensor: Tensor) -> bool:
        """Add a tensor that is the bytes of others, one after another; False where they are not its slices."""
        pieces = [self.tensors[part] for part in parts]
        first = pieces[0]
        if any(len(p.shape) != 2 or p.shape[1:] != tensor.shape[2:] or p.dtype != first.dtype for p in pieces):
            return False
        rows, experts = sum(p.shape[0] for p in pieces), len(tensor)
        shape = (experts, rows // experts, *first.shape[1:])
        self.tensors[name] = Stored(first.file, first.offset, sum(p.nbytes for p in pieces), first.dtype, shape)
        self.joined[name] = parts
        return True

    def _check_fit(self, name: str, tensor: Tensor) -> None:
        stored = self.tensors[name]
        if stored.shape != tuple(tensor.shape):
            raise NotStoredError(f"{name} is {list(stored.shape)} in the files, {list(tensor.shape)} in the model")
        if stored.dtype.is_floating_point != tensor.is_floating_point():
            raise PktError(
                f"{stored.file} holds {name} as {stored.dtype}, and the model has {tensor.dtype} there; these are not its "
                "weights: copy the checkpoint again"
            )

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same values."""
        first, second = self.tensors[one], self.tensors[other]
        if first.shape != second.shape:
            return False
        if first.dtype != second.dtype:
            return torch.equal(self.read(one).double(), self.read(other).double())
        return all(a == b for a, b in zip(self._pieces(one), self._pieces(other), strict=True))

    def _pieces(self, name: str) -> Iterator[memoryview]:
        stored = self.tensors[name]
        for begin in range(0, stored.nbytes, _PIECE):
            piece = memoryview(bytearray(min(_PIECE, stored.nbytes - begin)))
            self._read(stored, name, begin, piece)
            yield piece

    def read(self, name: str) -> Tensor:
        """One tensor, copied into memory of its own."""
        stored = self.tensors[name]
        buffer = torch.empty(stored.nbytes, dtype=torch.uint8)
        if stored.nbytes:
            view: Any = buffer.numpy()
            self.fill(name, memoryview(view))
        return buffer.view(stored.dtype).view(stored.shape)

    def read_rows(self, name: str, count: int) -> Tensor:
        """The first rows of one tensor, without reading the others where it is stored in one piece."""
        stored = self.tensors[name]
        if name in self.joined or count >= stored.shape[0]:
            return self.read(name)[:count]
        buffer = torch.empty(stored.nbytes // stored.shape[0] * count, dtype=torch.uint8)
        view: Any = buffer.numpy()
        self._read(stored, name, 0, memoryview(view))
        return buffer.view(stored.dtype).view(count, *stored.shape[1:])

    def fill(self, name: str, target: memoryview) -> None:
        done = 0
        for part in self.joined.get(name, [name]):
            stored = self.tensors[part]
            self._read(stored, part, 0, target[done : done + stored.nbytes])
            done += stored.nbytes

    def _read(self, stored: Stored, name: str, begin: int, target: memoryview) -> None:
        handle, done = self.check(stored.file), 0
        with os_errors(f"reading {stored.file}"):
            while done < len(target):
                count = os.preadv(handle, [target[done:]], stored.offset + begin + done)
                if count == 0:
                    raise PktError(f"{stored.file} ends inside {name}; copy the checkpoint again")
                done += count
        self.check(stored.file)

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

    def close(self) -> None:
        for handle in self.handles.values():
            os.close(handle)
        self.handles.clear()


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns
