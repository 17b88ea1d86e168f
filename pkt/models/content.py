"""Hashes of a model's whole content, those of files remembered by what the file system says of them.

A file counts as unchanged while its device, inode, size, time of modification and time of change are the ones it was hashed
under; no program sets the last of these, so that a large checkpoint is hashed once, and never taken for another.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from pkt.errors import PktError
from pkt.files import atomic_file, os_errors, read_json, sha256, write_json
from pkt.progress import bar

_PIECE = 64 << 20  # hashed by one thread
_BLOCK = 4 << 20  # read at once
_BLOCKS, _IN_BLOCK = 64, 1 << 16  # of a tensor in memory, in bytes
_REMEMBERED = 4096
# Within the resolution of a file system's clock a second change leaves no trace.
_SETTLED_NS = 2_000_000_000


def files_digest(files: Sequence[Path], *, progress: bool = False) -> str:
    """A hash of every byte of these files, whatever their names; a change while they are read raises `PktError`."""
    known = _remembered()
    stamps = {file: _stamp(os.stat(file)) for file in files}
    new = [file for file in files if stamps[file] not in known]
    with os_errors("hashing the weights"):
        found = _hash_files(new, progress=progress)
    changed = next((file for file in new if _stamp(os.stat(file)) != stamps[file]), None)
    if changed is not None:
        raise PktError(f"{changed} changed while it was read; run the same command again once it is whole")
    digests = [known[stamps[file]] if stamps[file] in known else found[file] for file in files]
    _remember({stamps[file]: found[file] for file in new if _settled(file)})
    return sha256(*sorted(digests))


def _hash_files(files: Sequence[Path], *, progress: bool) -> dict[Path, str]:
    """Each file's hash: of its size and of its pieces' hashes, which threads take side by side."""
    pieces = [(file, begin) for file in files for begin in range(0, max(1, file.stat().st_size), _PIECE)]
    sums: dict[Path, list[bytes]] = {file: [] for file in files}
    with (
        ThreadPoolExecutor(os.cpu_count(), "pkt-hash") as pool,
        bar("hashing the weights", len(pieces) * (_PIECE >> 20), unit="MB", shown=progress) as advance,
    ):
        for count, ((file, _), digest) in enumerate(zip(pieces, pool.map(_hash_piece, pieces), strict=True), 1):
            sums[file].append(digest)
            advance(count * (_PIECE >> 20))
    return {file: sha256(str(file.stat().st_size), *found) for file, found in sums.items()}


def _hash_piece(piece: tuple[Path, int]) -> bytes:
    file, begin = piece
    digest, block = hashlib.blake2b(digest_size=32), memoryview(bytearray(_BLOCK))
    with open(file, "rb", buffering=0) as opened:
        opened.seek(begin)
        left = _PIECE
        while left and (count := opened.readinto(block[: min(left, _BLOCK)])):
            digest.update(block[:count])
            left -= count
    return digest.digest()


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of tensors' names, types, shapes and values, taken where they are; tied ones are read once.

    What is hashed of values is the sum of their bytes, as words of 32 bits, each times an odd number of its own, mod 2**64: the
    same on every device, and no single change keeps it. Of a tensor above 4 MB, blocks of 64 kB that lie evenly in it are read,
    so that a model of any size takes a moment: training moves them all, a single weight set by hand may be missed.
    """
    found: dict[int, str] = {}
    parts = []
    for name, tensor in tensors:
        if id(tensor) not in found:
            value = "" if tensor.is_meta else str(int(_weighted_sum(tensor.detach())))
            found[id(tensor)] = f"{tensor.dtype} {tuple(tensor.shape)} {value}"
        parts.append(f"{name} {found[id(tensor)]}")
    return sha256(*parts)


def _weighted_sum(tensor: Tensor) -> Tensor:
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    if len(flat) > _BLOCKS * _IN_BLOCK:
        flat = flat.as_strided((_BLOCKS, _IN_BLOCK), ((len(flat) - _IN_BLOCK) // (_BLOCKS - 1), 1)).flatten()
    elif flat.data_ptr() % 4:
        flat = flat.clone()
    words = nn.functional.pad(flat, (0, -len(flat) % 4)).view(torch.int32).long()
    numbers = torch.arange(1, len(words) + 1, device=words.device) * 0x1E3779B97F4A7C15
    return (words * (((numbers ^ (numbers >> 29)) * 0x3F58476D1CE4E5B9) | 1)).sum()


# -- what is remembered


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_dev}-{status.st_ino}-{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}"


def _settled(file: Path) -> bool:
    status = file.stat()
    return time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > _SETTLED_NS


def _cache_file() -> Path | None:
    """Where hashes are remembered, or None for a user without a home."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "pkt" / "hashes.json" if os.path.isabs(home) else None


def _remembered() -> dict[str, str]:
    file = _cache_file()
    try:
        found = read_json(file) if file is not None and file.is_file() else {}
    except (PktError, OSError):
        return {}  # it only saves time
    return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}


def _remember(found: dict[str, str]) -> None:
    file = _cache_file()
    if not found or file is None:
        return
    kept = list({**_remembered(), **found}.items())[-_REMEMBERED:]
    try:
        with atomic_file(file) as scratch:
            write_json(scratch, dict(kept))
    except PktError:
        pass  # a read-only home, a full disk: the next command hashes again
