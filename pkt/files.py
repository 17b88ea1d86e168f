"""Writing results so that a reader never meets half of one, and reading checkpoints so that a bad file is named."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

from pkt.errors import PktError

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "pkt.json"
PAGE_MARK = '<meta name="generator" content="pkt">'
LOCK = "lock"


# Whether anything has been locked or written: until then a stopped command has nothing to put in order.
begun = False


def _begin() -> None:
    global begun
    begun = True


@contextlib.contextmanager
def os_errors(action: str) -> Iterator[None]:
    """Turn the operating system's refusals (disk full, no permission) into one `PktError`, whichever library met them."""
    try:
        yield
    except Exception as error:
        code = _errno(error)
        if code is None:
            raise
        name = getattr(error, "filename", None)
        if name is not None and str(name) not in action:
            action = f"{action} ({name})"
        hint = {
            errno.ENOSPC: "free some space, or write to another disk",
            errno.EDQUOT: "your disk quota is used up; free some space, or write elsewhere",
            errno.EACCES: "check the permissions of that path",
            errno.EROFS: "that file system is read-only; write elsewhere",
            errno.EFBIG: "the file-size limit was reached; raise it (ulimit -f) or write elsewhere",
        }.get(code)
        if hint is None:
            raise PktError(f"{action}: {error}") from error
        raise PktError(f"{action}: {os.strerror(code)}; {hint}") from error


def _errno(error: Exception) -> int | None:
    """The operating system's error number behind an exception (0: it does not say which), or None for any other error."""
    if isinstance(error, OSError):
        return error.errno or 0
    if type(error).__name__ == "SafetensorError" and (match := re.search(r"os error (\d+)", str(error))):
        return int(match[1])
    # torch.save forgets the number; a write that fails midway is a full disk in all likelihood.
    if isinstance(error, RuntimeError) and re.search("PytorchStreamWriter|unexpected pos", str(error)):
        return errno.ENOSPC
    return None


def as_path(value: Any, what: str) -> Path:
    """The path a caller named; raises `PktError` for anything but a name."""
    if isinstance(value, (str, os.PathLike)):
        return Path(value)
    raise PktError(f"{what} is needed, not {type(value).__name__}")


def followed(out: str | Path) -> Path:
    """Where a path leads whose last part is a link; what is written there must not replace the link."""
    out = Path(out)
    if not out.is_symlink():
        return out
    target = Path(os.path.realpath(out))
    if target.is_symlink():
        raise PktError(f"{out} is a link that leads back to itself; name another path")
    return target


def run_path(out: Path) -> Path:
    """Where unfinished work on the folder `out` keeps its checkpoints."""
    out = followed(out).absolute()
    return out.parent / f".{out.name}.run"


def check_output_folder(out: str | Path, *, force: bool = False) -> Path:
    """Refuse, before any work is done, an output folder that cannot be written or holds something else.

    With `force`, a folder that pkt itself wrote (it has a pkt.json) is replaced; anything else never is.
    """
    out = as_path(out, "the path of an output folder")
    with os_errors(f"writing {out}"):
        if out.exists() and not out.is_dir():
            raise PktError(f"{out} is a file; name a folder that does not exist yet")
        if out.is_dir() and any(out.iterdir()):
            if not (out / MANIFEST).is_file():
                raise PktError(f"{out} holds something that pkt did not write; name a new or an empty folder")
            if not force:
                raise PktError(f"{out} already holds a result of pkt; name another folder, or replace it with --force")
        check_parent(out)
    return out


def check_output_file(out: str | Path, form: str, *, force: bool = False) -> Path:
    """Refuse, before any work is done, an output file that cannot be written or is there already.

    form: what the file's own "format" begins with, as JSON or in the metadata of safetensors; or "<!", of a page of pkt's. With
    `force`, a file of that form is replaced; anything else never is.
    """
    out = as_path(out, "the path of an output file")
    with os_errors(f"writing {out}"):
        if out.is_dir():
            raise PktError(f"{out} is a folder; name a file")
        if out.exists():
            if not out.is_file() or not _is_of(out, form):
                raise PktError(
                    f"{out} holds something else than this command writes; name a file that does not exist yet"
                )
            if not force:
                raise PktError(f"{out} is there already; name another file, or replace it with --force")
        check_parent(out)
    return out


def _is_of(file: Path, form: str) -> bool:
    """Whether pkt wrote a file of this form."""
    with open(file, "rb") as opened:
        head = opened.read(4096)
    if form.startswith("<"):
        return head.lstrip().startswith(form.encode()) and PAGE_MARK.encode() in head
    try:
        found = read_json(file) if head[:1] == b"{" else json.loads(safetensors_header(file).metadata["pkt"])
    except (PktError, KeyError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and str(found.get("format")).startswith(form)


def check_parent(out: Path) -> None:
    """Refuse a path that nothing can be written to."""
    parent = followed(out).absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise PktError(f"{out} cannot be created: {parent} is not a folder you may write to")


def is_stored(value: Any) -> TypeGuard[str | Path]:
    """Whether this names a file or folder here, rather than being a value in memory or a model on the Hub."""
    return isinstance(value, (str, os.PathLike)) and os.path.exists(value)


def check_apart(out: str | Path, *others: str | Path) -> None:
    """Refuse an output folder that is, holds or lies in a folder that the same call reads or writes."""
    here = as_path(out, "the path of an output folder").resolve()
    for other in others:
        there = Path(other).resolve()
        if here == there or here in there.parents or there in here.parents:
            where = "are the same folder" if here == there else "lie one in the other"
            raise PktError(f"{out} and {other} {where}; name an output folder apart from it")


@contextlib.contextmanager
def lock_folder(folder: Path, out: Path) -> Iterator[None]:
    """Hold `folder`, made if need be, against a second writer of `out`; it goes again if nothing was put in it.

    The lock dies with its process. Raises `PktError` while another process holds it.
    """
    _begin()
    file = folder / LOCK
    with os_errors(f"writing {folder}"):
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:
                continue  # its last holder has just removed the folder
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(lock), os.stat(file)):
                    break
            except BlockingIOError:
                os.close(lock)
                raise PktError(f"another run is writing {out}; wait for it, stop it, or name another folder") from None
            except FileNotFoundError:
                pass
            os.close(lock)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()
        os.close(lock)


_SCRATCH = ".pkt-"  # and eight characters of tempfile's
_OLD = "old"  # within it, what is being replaced


@contextlib.contextmanager
def _scratch_in(parent: Path) -> Iterator[Path]:
    """A new hidden folder, locked while its writer lives: what a killed one left is removed by the next writer beside it."""
    parent.mkdir(parents=True, exist_ok=True)
    sweep_scratch(parent)
    while True:
        scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=parent))
        lock = os.open(scratch, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a file system without locks is never swept
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock).st_nlink:
            break
        os.close(lock)  # swept in the moment before it was locked
    try:
        yield scratch
    finally:
        _discard(scratch)
        os.close(lock)


def _discard(scratch: Path) -> None:
    """Remove a writer's folder; what it had moved aside to replace, and did not, goes back."""
    for old in (scratch / _OLD).glob("*"):
        if not (scratch.parent / old.name).exists():
            os.replace(old, scratch.parent / old.name)
    shutil.rmtree(scratch, ignore_errors=True)


def sweep_scratch(folder: Path) -> None:
    """Discard what killed writers left here: nobody locks it."""
    for name in os.listdir(folder):
        if not re.fullmatch(re.escape(_SCRATCH) + r"\w{8}", name):
            continue
        with contextlib.suppress(OSError):
            lock = os.open(folder / name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _discard(folder / name)
            finally:
                os.close(lock)


@contextlib.contextmanager
def atomic_folder(out: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a scratch folder that becomes `out` in one rename, or disappears; a link is followed, and stays."""
    _begin()
    parent = followed(as_path(out, "the path of an output folder")).absolute().parent
    with os_errors(f"writing {out}"):
        if parent.is_dir():
            sweep_scratch(parent)
    out = followed(check_output_folder(out, force=force))
    with os_errors(f"writing {out}"), _scratch_in(parent) as scratch:
        made, old = scratch / "made", scratch / _OLD / out.name
        made.mkdir()
        yield made
        share_files(made)
        if out.is_dir():
            old.parent.mkdir()
            os.replace(out, old)
        os.replace(made, out)


@contextlib.contextmanager
def atomic_file(out: str | Path) -> Iterator[Path]:
    """Yield a scratch path that becomes `out` in one rename, or disappears; a link is followed, and stays."""
    _begin()
    if Path(out).is_dir():
        raise PktError(f"{out} is a folder; name a file")
    out = followed(out)
    with os_errors(f"writing {out}"), _scratch_in(out.absolute().parent) as scratch:
        yield scratch / out.name
        os.replace(scratch / out.name, out)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def share_files(folder: Path) -> None:
    """Give the weights in a folder the mode of the files beside them: safetensors makes its own readable to their owner only."""
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o666 & ~_umask())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: tuple[str, str] = ("format", "pt")) -> None:
    """safetensors with one metadata entry: it writes several in random order, and the same result must be the same bytes."""
    from safetensors.torch import save_file

    kept: dict[str, Tensor] = {}
    places = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        # The format has no two names for one tensor.
        kept[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in places else tensor
        places.add(tensor.untyped_storage().data_ptr())
    save_file(kept, path, dict([metadata]))
    path.chmod(0o666 & ~_umask())


def write_json(path: Path, value: Any) -> None:
    _begin()
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def read_json(path: str | Path) -> Any:
    """JSON from a file; raises `PktError` naming the file and the line."""
    path = Path(path)
    try:
        with os_errors(f"reading {path}"):
            if not path.is_file():
                raise PktError(f"{path} does not exist; check the path")
            text = path.read_text(encoding="utf-8")
        return json.loads(text)
    except UnicodeDecodeError as error:
        raise PktError(f"{path}: not UTF-8 text (byte {error.start}); this should be a JSON file") from error
    except json.JSONDecodeError as error:
        raise PktError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg}); mend the file or write it again"
        ) from error
    except (RecursionError, ValueError) as error:  # nested without end; a number of thousands of digits
        raise PktError(f"{path}: not JSON that can be read ({error}); mend the file or write it again") from error


class StoredTensor(NamedTuple):
    """A tensor of a safetensors file: its type as the format names it, its shape, and its bytes' place in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsHeader(NamedTuple):
    """What a safetensors file holds."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def safetensors_header(path: Path) -> SafetensorsHeader:
    """The header of a safetensors file that the safetensors library itself would read.

    Raises `PktError` when the file is missing, unreadable, truncated or not safetensors, naming the file.
    """
    with os_errors(f"reading {path}"):
        return _header(path)


def _header(path: Path) -> SafetensorsHeader:
    from safetensors import SafetensorError, safe_open

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
            # What safetensors accepts has offsets without gaps, sizes that follow from types and shapes, and no deep nesting.
            with safe_open(path, framework="np"):
                pass
        except SafetensorError as error:
            if "not fully covered" in str(error):
                raise PktError(f"{path} {_misfit(file.read(length), size)}; download or copy it again") from error
            raise PktError(f"{path} is not a sound safetensors file ({error}); download or copy it again") from error
        try:
            header = json.loads(file.read(length), object_pairs_hook=_without_doubles)
        except ValueError as error:
            raise PktError(f"{path} is not a sound safetensors file ({error}); download or copy it again") from error
    metadata = header.pop("__metadata__", None) or {}
    tensors = {
        name: StoredTensor(entry["dtype"], tuple(entry["shape"]), *(8 + length + at for at in entry["data_offsets"]))
        for name, entry in header.items()
    }
    return SafetensorsHeader(tensors, metadata)


def _misfit(header: bytes, size: int) -> str:
    places = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
    end = 8 + len(header) + max((end for _, end in places), default=0)
    return (
        f"is truncated: {size} bytes of {end}"
        if size < end
        else f"goes on for {size - end} bytes after its last tensor"
    )


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"it names {name!r} twice")
        found[name] = value
    return found


def sha256(*parts: bytes | str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()
