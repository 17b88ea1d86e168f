"""The injected adapter for a trainer that is not ours, with the base it is to be trained on; and how it began, read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pkt.adapters import Pair, apply_kinds, check_fit, kinds_of, split_tied
from pkt.cards import INJECTED, write_card
from pkt.errors import PktError
from pkt.extraction import Extraction, Start, open_start
from pkt.files import MANIFEST, atomic_folder, check_apart, check_output_folder, is_stored, write_json
from pkt.lora import ADAPTER, Mode, check_settings, checked_dropout, inject, read_source
from pkt.manifest import call_of, manifest_of, read_manifest, versions
from pkt.models import Model, save_model, spec_of
from pkt.training.folder import write_initial, write_run


def write_injected(
    student: str | Path,
    extraction: str | Path,
    out: str | Path,
    *,
    mode: Mode | None = None,
    dropout: float | None = None,
    alpha: float | None = None,
    rslora: bool = False,
    save_residual: str | Path | None = None,
    force: bool = False,
) -> list[str]:
    """Write the injected adapter for a trainer that is not ours, and what to do next.

    dropout: as in `train`. `residual` also needs its base: a complete student of W − B₀A₀, written to `save_residual` (default:
    OUT/base).
    """
    asked = call_of(write_injected, locals(), "out", "save_residual", "force")
    ext = open_start(extraction)
    mode = mode or ext.mode
    if save_residual is not None and mode != "residual":
        raise PktError(
            f"--save-residual writes the base of mode='residual'; with mode={mode!r} the base is the student itself"
        )
    check_settings(mode, dropout, alpha)
    out = check_output_folder(out, force=force)
    read = [given for given in (extraction, student) if is_stored(given)]
    check_apart(out, *read)
    base_path = Path(save_residual) if save_residual is not None else out / "base"
    if save_residual is not None:
        check_apart(check_output_folder(base_path, force=force), out, *read)
    dropout = checked_dropout(ext.pairs, dropout)
    model = inject(student, ext, mode=mode, dropout=dropout, alpha=alpha, rslora=rslora)
    settings = {"mode": mode, "dropout": dropout, "student": Model.of(student).content()["fingerprint"]}
    # Both are written whole before either is renamed into place.
    with atomic_folder(out, force=force) as scratch:
        write_run(scratch, ext, settings, str(student), {"given": asked})
        if mode == "residual":
            model.peft_config[ADAPTER].base_model_name_or_path = str(base_path)
        model.save_pretrained(str(scratch), save_embedding_layers=False)
        write_card(scratch, INJECTED, mode=mode, student=student, base=base_path if mode == "residual" else student)
        if save_residual is not None:
            with atomic_folder(base_path, force=force) as base:
                _write_base(base, model, ext, student)
        elif mode == "residual":
            _write_base(scratch / "base", model, ext, student)
    if mode != "residual":
        base_path = Path(student)
    return [
        f"{out}: the {mode} adapter, to be trained on {base_path}",
        f"next: train it with any PEFT trainer on {base_path}, then: pkt finalize TRAINER_OUTPUT --out ADAPTER",
    ]


def read_injected(folder: str | Path, student: str | Path) -> Start | None:
    """What `write_injected` started from, as a start that can be injected again; None for a folder of another kind.

    Raises `PktError` for one that was trained since, and for another student's.
    """
    if not (Path(folder) / MANIFEST).is_file():
        return None
    manifest = read_manifest(folder)
    if manifest.get("kind") != "run" or "epochs" in manifest["settings"]:
        return None
    source, spec = read_source(folder), spec_of(student)
    adapter = split_tied(source.adapter, spec.head if spec.tied else None)
    check_fit(adapter.pairs, spec, str(folder))
    pairs = apply_kinds(adapter, kinds_of(spec, adapter.pairs)).pairs
    mode: Mode = manifest["mode"]
    if mode == "paired":
        pairs = {module: _first_half(pair, module, folder) for module, pair in pairs.items()}
    return Start("start", pairs, spec.identity(), mode, {}, {"told": {"from": f"what was injected in {folder}"}})


def _first_half(pair: Pair, module: str, folder: str | Path) -> Pair:
    """A₀ and B₀ of A = [A₀; A₀], B = [B₀, −B₀]."""
    (a, same), (b, opposite) = pair.A.chunk(2, -2), pair.B.chunk(2, -1)
    if pair.rank % 2 or not (torch.equal(a, same) and torch.equal(b, -opposite)):
        raise PktError(
            f"{folder} was trained since it was injected ({module}); finalize it, or train from the extraction it came from"
        )
    return Pair(a.contiguous(), b.contiguous(), pair.kind)


def _write_base(folder: Path, model: Any, ext: Extraction | Start, student: str | Path) -> None:
    """The shifted student as a complete checkpoint that says what it is."""
    save_model(model.unload(), folder, student)
    write_initial(folder, ext, str(student))
    write_json(folder / MANIFEST, manifest_of("residual-base", {"student": str(student), "versions": versions()}))
