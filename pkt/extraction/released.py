"""A folder of the method's authors' released code as a start: adapter_model.bin, a copied adapter_config.json, a `-delta` twin.

Their factors are U Σ and Vᵀ in fp16. The configuration is copied from a file of the student's size, so that its `r` is 16 whatever
rank was extracted; what it says is the scale, lora_alpha / r. The twin holds −A: their training merges it into the base, which is
what pkt's residual mode does by itself. A folder that their trainer has trained since stands on that base: with its twin it is a
change of the student, W − B₀A₀ + BA, and so a plain LoRA of twice the rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pkt.adapters import Pair, adapter_from_state, apply_kinds, check_fit, kinds_of, split_tied
from pkt.errors import PktError
from pkt.extraction.start import Start
from pkt.files import as_path, check_apart, check_output_folder, os_errors, read_json
from pkt.manifest import versions
from pkt.models import ModelSpec, spec_of
from pkt.models.adapter_files import CONFIG, PICKLE
from pkt.options import Mode

TWIN = "-delta"


def import_released(
    folder: str | Path,
    out: str | Path,
    *,
    student: str | Path | None = None,
    trained_from: str | Path | None = None,
    force: bool = False,
) -> Start:
    """Write what the released code extracted as a folder that pkt injects, trains and finalizes; the start is neutral (`paired`).

    student: the model it is for, unless its adapter_config.json names one that is here. trained_from: of a folder that the
    released code has trained, the one it was trained from, extracted, or that one's `-delta` twin; the result is then the trained
    student's change, kept (`add`). Raises `PktError` for a pickle that is not tensors alone, a `-delta` twin of other factors or
    given in place of its folder, and factors that do not fit the student.
    """
    folder = as_path(folder, "the path of a folder that the released code wrote")
    out = check_output_folder(out, force=force)
    check_apart(out, folder)
    state, config = _read(folder)
    origin = None if trained_from is None else as_path(trained_from, "the path of the folder it was trained from")
    if origin is None:
        _check_twin(folder, state)
    name = str(student or config.get("base_model_name_or_path") or "")
    if not name or (student is None and not Path(name).is_dir()):
        raise PktError(
            f"{folder} is for {name or 'a student it does not name'}, which is not here; name it (--student DIR)"
        )
    spec = spec_of(name)
    pairs = _pairs(state, config, folder, spec)
    if origin is not None and origin.is_dir() and origin.samefile(folder):
        raise PktError(f"{folder} cannot have been trained from itself; name what was extracted, or its {TWIN} twin")
    if origin is not None:
        pairs = _with_counterweight(pairs, _pairs(*_read(origin), origin, spec), origin)
    mode: Mode = "paired" if origin is None else "add"
    start = Start(
        "start", pairs, dataclasses.replace(spec, name=name).identity(), mode, {}, _told(folder, pairs, origin)
    )
    start.save(out, force=force)
    return start


def _pairs(state: dict[str, Tensor], config: dict[str, Any], folder: Path, spec: ModelSpec) -> dict[str, Pair]:
    found = adapter_from_state(state, _rescaled(config, state, folder), str(folder))
    adapter = split_tied(found, spec.head if spec.tied else None)
    adapter = apply_kinds(adapter, kinds_of(spec, adapter.pairs))
    check_fit(adapter.pairs, spec, str(folder))
    return adapter.pairs


def _with_counterweight(pairs: Mapping[str, Pair], begun: Mapping[str, Pair], origin: Path) -> dict[str, Pair]:
    """BA − B₀A₀ as one pair a module; what was not extracted began at zero. A twin's A is −A₀ already."""
    missing = sorted(begun.keys() - pairs.keys())
    if missing:
        raise PktError(
            f"{origin} holds {missing[0]}, which was not trained, so it is of another training; name its own"
        )
    sign = 1.0 if origin.name.endswith(TWIN) else -1.0
    joined = dict(pairs)
    for module, other in begun.items():
        pair = pairs[module]
        joined[module] = Pair(torch.cat([pair.A, sign * other.A]), torch.cat([pair.B, other.B], 1), pair.kind)
    return joined


def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not (folder / PICKLE).is_file() or not (folder / CONFIG).is_file():
        raise PktError(
            f"{folder} has no {PICKLE} with an {CONFIG}; name a folder that the authors' released code wrote"
        )
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise PktError(f"{folder / CONFIG} is not an adapter's configuration; copy the folder again")
    return _tensors(folder / PICKLE), config


def _tensors(file: Path) -> dict[str, Tensor]:
    with os_errors(f"reading {file}"):
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # torch.load raises many types for a bad pickle
            raise PktError(f"{file} is a pickle that cannot be loaded safely; copy the folder again") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(t, Tensor) for k, t in state.items()):
        raise PktError(f"{file} does not hold an adapter's tensors by name; name a folder that the released code wrote")
    return state


def _check_twin(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Refuse the negated twin in place of its folder, and a twin of other factors."""
    origin = folder.with_name(folder.name.removesuffix(TWIN))
    if origin != folder and (origin / PICKLE).is_file():
        raise PktError(
            f"{folder} holds the negated factors of {origin}; import that one, pkt makes the counterweight itself"
        )
    twin = folder.with_name(folder.name + TWIN) / PICKLE
    if not twin.is_file():
        return
    other = _tensors(twin)
    same = other.keys() == state.keys() and all(
        torch.equal(other[k], -t if "lora_A" in k or "lora_embedding_A" in k else t) for k, t in state.items()
    )
    if not same:
        raise PktError(
            f"{twin.parent} does not negate the factors of {folder}, so that either one of the two is of another extraction, or "
            f"{folder} has been trained since: then name what it was trained from (--trained-from {twin.parent})"
        )


def _rescaled(config: Mapping[str, Any], state: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
    """The configuration with the factors' own rank, at the scale that the copied one says."""
    ranks = {t.shape[0] if t.ndim else 0 for key, t in state.items() if "lora_A" in key or "lora_embedding_A" in key}
    if len(ranks) != 1:
        raise PktError(
            f"{folder / PICKLE} holds factors of {len(ranks)} ranks, and one is expected; copy the folder again"
        )
    rank, said, alpha = ranks.pop(), config.get("r"), config.get("lora_alpha")
    if not isinstance(said, int) or not isinstance(alpha, (int, float)) or said < 1:
        raise PktError(f"{folder / CONFIG} says no r and lora_alpha; copy it again")
    return {**config, "r": rank, "lora_alpha": alpha / said * rank, "rank_pattern": {}, "alpha_pattern": {}}


def _told(folder: Path, pairs: Mapping[str, Pair], origin: Path | None) -> dict[str, Any]:
    told = {"imported from": folder.name, "by": "the authors' released code", "matrices": len(pairs)}
    if origin is not None:
        told["trained from"] = origin.name
    return {"told": told, "versions": versions()}
