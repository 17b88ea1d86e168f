"""The injected adapter for a trainer that is not ours, with the base it is to be trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pkt.cards import INJECTED, write_card
from pkt.errors import PktError
from pkt.extraction import Extraction, Start, open_start
from pkt.files import MANIFEST, atomic_folder, check_apart, check_output_folder, is_stored, write_json
from pkt.lora import ADAPTER, Mode, check_settings, checked_dropout, inject
from pkt.manifest import manifest_of, versions
from pkt.models import Model, save_model
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
        write_run(scratch, ext, settings, str(student))
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


def _write_base(folder: Path, model: Any, ext: Extraction | Start, student: str | Path) -> None:
    """The shifted student as a complete checkpoint that says what it is."""
    save_model(model.unload(), folder, student)
    write_initial(folder, ext, str(student))
    write_json(folder / MANIFEST, manifest_of("residual-base", {"student": str(student), "versions": versions()}))
