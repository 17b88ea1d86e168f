"""Writing results so that a reader never meets half of one, and reading checkpoints so that a bad file is named."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pkt.errors import PktError

MANIFEST = "pkt.json"


@contextlib.contextmanager
def os_errors(action: str) -> Iterator[None]:
    """Turn the operating system's refusals (disk full, no permission) into one `PktError`."""
    try:
        yield
    except OSError as error:
        hint = {
            errno.ENOSPC: "free some space, or write to another disk",
            errno.EDQUOT: "your disk quota is used up; free some space, or write elsewhere",
            errno.EACCES: "check the permissions of that path",
            errno.EROFS: "that file system is read-only; write elsewhere",
            errno.EFBIG: "the file-size limit was reached; raise it (ulimit -f) or write elsewhere",
        }.get(error.errno or 0)
        if hint is None:
            raise PktError(f"{action}: {error}") from error
        raise PktError(f"{action}: {os.strerror(error.errno or 0)}; {hint}") from error


def check_output_folder(out: str | Path, *, force: bool = False) -> Path:
    """Refuse, before any work is done, an output folder that cannot be written or holds something else.

    With `force`, a folder that pkt itself wrote (it has a pkt.json) is replaced; anything else never is.
    """
    out = Path(out)
    if out.is_file():
        raise PktError(f"{out} is a file; name a folder that does not exist yet")
    if out.is_dir() and any(out.iterdir()):
        if not (out / MANIFEST).is_file():
            raise PktError(f"{out} holds something that pkt did not write; name a new or an empty folder")
        if not force:
            raise PktError(f"{out} already holds a result of pkt; name another folder, or replace it with --force")
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise PktError(f"{out} cannot be created: {parent} is not a folder you may write to")
    return out


@contextlib.contextmanager
def atomic_folder(out: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a scratch folder beside `out` that becomes `out` in one rename, or disappears."""
    out = check_output_folder(out, force=force)
    with os_errors(f"writing {out}"):
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
    try:
        with os_errors(f"writing {out}"):
            yield scratch
            scratch.chmod(0o777 & ~_umask())
            if out.is_dir():
                old = out.with_name(f".{out.name}.old-{os.getpid()}")
                os.replace(out, old)
                os.replace(scratch, out)
                shutil.rmtree(old)
            else:
                os.replace(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def sweep_scratch(out: Path) -> None:
    """Remove the scratch folders that killed writers of `out` left; only for who holds `out` against other writers."""
    for entry in out.absolute().parent.glob(f".{glob.escape(out.name)}.????????"):
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(out: str | Path) -> Iterator[Path]:
    """Yield a scratch path beside `out` that becomes `out` in one rename, or disappears."""
    out = Path(out)
    if out.is_dir():
        raise PktError(f"{out} is a folder; name a file")
    scratch = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with os_errors(f"writing {out}"):
            out.absolute().parent.mkdir(parents=True, exist_ok=True)
            yield scratch
            os.replace(scratch, out)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: tuple[str, str] = ("format", "pt")) -> None:
    """safetensors, with the operating system's errors kept recognisable.

    One metadata entry only: safetensors writes several in random order, and the same result must be the same bytes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path, dict([metadata]))
    except SafetensorError as error:
        text = str(error)
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES):
            if os.strerror(code) in text or f"os error {code}" in text:
                raise OSError(code, os.strerror(code)) from error
        raise


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def read_json(path: str | Path) -> Any:
    """JSON from a file; raises `PktError` naming the file and the line."""
    path = Path(path)
    if not path.is_file():
        raise PktError(f"{path} does not exist; check the path")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise PktError(f"{path}: not UTF-8 text (byte {error.start}); this should be a JSON file") from error
    except json.JSONDecodeError as error:
        raise PktError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg}); mend the file or write it again"
        ) from error


def safetensors_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, checked against the file's length.

    Raises `PktError` when the file is missing, truncated or not safetensors, naming the file.
    """
    if not path.is_file():
        raise PktError(f"{path} is missing; download or copy the checkpoint again")
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        if len(head) < 8:
            raise PktError(f"{path} is truncated ({size} bytes); download or copy it again")
        (length,) = struct.unpack("<Q", head)
        if length > size - 8:
            raise PktError(f"{path} is truncated or not a safetensors file ({size} bytes); download or copy it again")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
        except ValueError as error:
            raise PktError(f"{path} has a broken safetensors header; download or copy it again") from error
    end = 8 + length + max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
    if end != size:
        raise PktError(f"{path} is truncated: {size} bytes of {end}; download or copy it again")
    return header


def sha256(*parts: bytes | str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()
