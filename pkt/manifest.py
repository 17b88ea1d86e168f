"""pkt.json, which says what a folder of pkt's is: its kind and format, the versions that made it, and what two results differ in.

An identity is a mapping of plain values: all that a result depends on, by the names that a refusal uses.
"""

from __future__ import annotations

import contextlib
import datetime
import inspect
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from pkt.errors import PktError
from pkt.files import MANIFEST, read_json
from pkt.version import __version__


@dataclass(frozen=True)
class FolderKind:
    """What pkt writes under one name of `kind`: in words, its format, and the entries that are always there."""

    words: str
    format: str
    entries: Mapping[str, type] = field(default_factory=dict)
    older: tuple[str, ...] = ()  # formats that are read all the same


KINDS = {
    "extraction": FolderKind("an extraction", "pkt-extraction-1", {"plan": dict, "kinds": dict, "energies": dict}),
    "transplant": FolderKind(
        "a transplant", "pkt-start-1", {"mode": str, "student": dict, "kinds": dict, "energies": dict}
    ),
    "start": FolderKind("a start", "pkt-start-1", {"mode": str, "student": dict, "kinds": dict, "energies": dict}),
    "run": FolderKind(
        "a training run", "pkt-training-1", {"mode": str, "student": str, "settings": dict}, older=("pkt-run-1",)
    ),
    "adapter": FolderKind("a finalized adapter", "pkt-adapter-1", {"mode": str, "base": str}),
    "residual-base": FolderKind("the shifted base of a residual injection", "pkt-training-1", older=("pkt-run-1",)),
    "model": FolderKind("a merged model", "pkt-adapter-1"),
    "shrunk": FolderKind("a shrunk model", "pkt-shrunk-1", {"teacher": dict, "shape": dict, "told": dict}),
    "targets": FolderKind(
        "a teacher's targets",
        "pkt-targets-1",
        {"form": str, "size": int, "vocabulary": int, "tokenizer": str, "sha256": str},
    ),
    "study": FolderKind("a study's folder", "pkt-study-1"),
    "demo": FolderKind("a demo's folder", "pkt-demo-1"),
}


STARTS = ("transplant", "start")  # kinds of what a student starts with as it is


def manifest_of(kind: str, entries: Mapping[str, Any]) -> dict[str, Any]:
    """The content of pkt.json for a folder of this kind."""
    return {"format": KINDS[kind].format, "kind": kind, **entries}


def name_kind(found: Mapping[str, Any]) -> str:
    """What a folder with this manifest is, in words."""
    kind = KINDS.get(str(found.get("kind")))
    return "something else" if kind is None else kind.words


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """pkt.json of a folder that pkt wrote. Raises `PktError` where it is missing, not whole, or of a format unknown here."""
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "does not exist"
        raise PktError(f"{folder} {what}; name a folder that pkt wrote")
    tasks = tasks_in(folder)
    if tasks:
        raise PktError(f"{folder} holds the results of several tasks; name one of them: {folder / tasks[0]}, ...")
    if not (folder / MANIFEST).is_file():
        raise PktError(f"{folder} has no {MANIFEST}, so pkt did not write it")
    found = read_json(folder / MANIFEST)
    if not isinstance(found, dict):
        raise PktError(f"{folder / MANIFEST} is not a manifest of pkt's; the folder was changed")
    kind = KINDS.get(str(found.get("kind")))
    if kind is None:
        return found
    bad = [key for key, form in kind.entries.items() if not isinstance(found.get(key), form)]
    if bad:
        raise PktError(f"{folder / MANIFEST} is damaged: {kind.words} without {', '.join(bad)}; make it again")
    if found.get("format") not in (kind.format, *kind.older):
        raise PktError(
            f"{folder / MANIFEST} is {kind.words} in the format {found.get('format')!r}, which this pkt ({__version__}) does not "
            f"read; use the version that wrote it, or make it again"
        )
    return found


def tasks_in(folder: Path) -> list[str]:
    """The names of the results in a folder that holds those of several tasks; none in any other folder."""
    if (folder / MANIFEST).is_file() or not folder.is_dir():
        return []
    return sorted(entry.parent.name for entry in folder.glob(f"*/{MANIFEST}"))


def recorded_day(file: Path) -> datetime.date | None:
    """The day that a chat template was told for what a file of pkt's records, so that the same rows are read as they were then.

    None where it asked for none, and for a file that is not there or not whole: who needs the rest of it says so.
    """
    try:
        found = read_json(file)
    except PktError:
        return None
    entries = found if isinstance(found, dict) else {}
    for part in (entries, *(entries.get(key) for key in ("inputs", "settings", "seeds"))):
        if isinstance(part, dict) and isinstance(part.get("today"), str):
            with contextlib.suppress(ValueError):
                return datetime.date.fromisoformat(part["today"])
    return None


def versions() -> dict[str, str]:
    """Versions of everything that can change a result."""
    import importlib.metadata as metadata

    found = {"pkt": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "safetensors"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def call_of(function: Callable[..., Any], given: Mapping[str, Any], *left: str) -> dict[str, Any] | None:
    """What a call was given beside its defaults, as plain values, so that a command line can say it again; None where one is none.

    given: its arguments by name, such as locals() has them at its first line; left: those that change nothing of the result.
    """
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        value = given[name]
        if name in left or value is None or value is parameter.default:
            continue
        if isinstance(value, PurePath) or type(value).__module__ == "torch":  # a torch.dtype
            value = str(value).removeprefix("torch.")
        if not isinstance(value, (bool, int, float, str)):
            return None
        if value != parameter.default:
            found[name] = value
    return found


def difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between a recorded identity and the one at hand, by name, with both values where they say something."""
    then, now = json.loads(json.dumps([then, now]))
    return [
        _told(name, then.get(name), now.get(name)) for name in sorted({*then, *now}) if then.get(name) != now.get(name)
    ]


def spoken_name(name: str) -> str:
    """The name of an entry of an identity, as a user gave it."""
    return name.removeprefix("option ").removeprefix("factorization ")


def _told(name: str, then: Any, now: Any) -> str:
    plain = (bool, int, float, str, type(None))
    # Hashes and what is made of several things say nothing.
    if all(isinstance(value, plain) and len(str(value)) < 40 for value in (then, now)):
        return f"{spoken_name(name)}: {then} there, {now} here"
    return f"{spoken_name(name)} changed"
