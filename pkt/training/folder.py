"""The folder of a training run: begun, gone on from, and never another's."""

from __future__ import annotations

import re
import shlex
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pkt.adapters import Adapter, read_adapter
from pkt.errors import PktError
from pkt.extraction import Extraction, Start
from pkt.files import LOCK, MANIFEST, atomic_file, os_errors, read_json, share_files, write_json
from pkt.manifest import difference, manifest_of, name_kind, read_manifest, versions
from pkt.models import Model, content_kind, save_model
from pkt.models.adapter_files import INITIAL
from pkt.progress import tell


def start_run(out: Path, settings: dict[str, Any], *, force: bool = False, ranks: int = 1) -> str | None:
    """The checkpoint to go on from, or None for a new run; refuses a finished run and another run's folder."""
    entries = [p for p in out.iterdir() if p.name != LOCK]
    if not (out / MANIFEST).is_file():
        if entries:
            raise PktError(f"{out} holds something that pkt did not write; name a new or an empty folder")
        return None
    if force:
        for entry in entries:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        return None
    manifest = read_manifest(out)
    if manifest.get("kind") != "run":
        raise PktError(f"{out} holds {name_kind(manifest)}, not a training run; name a new folder")
    recorded = manifest["settings"]
    if not content_kind({"fingerprint": recorded.get("student")}):
        # An older pkt's hash of the student cannot be compared.
        recorded = {**recorded, "student": settings["student"]}
    different = difference(recorded, settings)
    if different:
        raise PktError(f"{out} is another run ({', '.join(different)}); name a new folder, or start over with --force")
    if manifest.get("finished"):
        raise PktError(
            f"{out} is a finished run; finalize it (pkt finalize {shlex.quote(str(out))} --out DIR), name a new folder, or start "
            "over with --force"
        )
    numbers = sorted((int(p.name[11:]) for p in entries if re.fullmatch(r"checkpoint-\d+", p.name)), reverse=True)
    for number in numbers:
        whole = settings["mode"] == "full"
        fault = _checkpoint_fault(out / f"checkpoint-{number}", number, ranks, whole=whole)
        if fault is None:
            return str(out / f"checkpoint-{number}")
        tell(f"checkpoint-{number} is incomplete and left aside ({fault})")
    return None


def _checkpoint_fault(folder: Path, step: int, ranks: int, *, whole: bool) -> str | None:
    """What keeps a checkpoint of the Trainer from being gone on from, or None for a complete one. whole: of all weights."""
    try:
        if whole:
            Model.of(folder).check()
        else:
            read_adapter(folder)
        state = read_json(folder / "trainer_state.json")
    except PktError as error:
        return str(error)
    if not isinstance(state, dict) or state.get("global_step") != step:
        return f"trainer_state.json is not of step {step}"
    random = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]
    pickles = ("optimizer.pt", "scheduler.pt", *random)
    # torch.save writes zip files, whose end says that they are whole.
    return next((f"{name} is missing or truncated" for name in pickles if not zipfile.is_zipfile(folder / name)), None)


def write_run(
    out: Path,
    ext: Extraction | Start | None,
    settings: dict[str, Any],
    student: str,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Begin a run's folder. ext: None where all weights are trained. more: what is told beside what decides its result."""
    with os_errors(f"writing {out}"):
        out.mkdir(parents=True, exist_ok=True)
        entries = {
            "mode": settings["mode"],
            "student": student,
            "settings": settings,
            **_origin(ext),
            **(more or {}),
            "versions": versions(),
            "finished": False,
        }
        with atomic_file(out / MANIFEST) as scratch:
            write_json(scratch, manifest_of("run", entries))
        if settings["mode"] == "residual" and ext is not None:
            write_initial(out, ext, student)


def finish_run(
    out: Path, model: Any, loss: float, more: Mapping[str, Any] | None = None, *, whole_from: Path | None = None
) -> None:
    """The trained adapter, and the manifest that says so. more: what else was found on the way.

    whole_from: the student, where all its weights were trained: the model is written instead, in the student's type, with its
    tokenizer.
    """
    with os_errors(f"writing {out}"):
        if whole_from is None:
            model.save_pretrained(str(out), save_embedding_layers=False)
        else:
            own = getattr(Model.of(whole_from).config, "dtype", None)
            save_model(model.to(own) if isinstance(own, torch.dtype) else model, out, whole_from)
        share_files(out)
        with atomic_file(out / MANIFEST) as scratch:
            write_json(scratch, {**read_manifest(out), "finished": True, "train_loss": loss, **(more or {})})


def _origin(ext: Extraction | Start | None) -> dict[str, Any]:
    """What a run was started from: the plan of an extraction, or what a transplant or start tells."""
    if ext is None:
        return {}
    if isinstance(ext, Extraction):
        return {"plan": {k: v for k, v in ext.plan.as_dict().items() if k != "entries"}}
    return {"start": {"kind": ext.kind, **ext.provenance}}


def write_initial(folder: Path, ext: Extraction | Start, student: str) -> None:
    (folder / INITIAL).mkdir(parents=True, exist_ok=True)
    Adapter(ext.pairs, student).write(folder / INITIAL)
