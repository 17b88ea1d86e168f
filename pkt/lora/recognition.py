"""Which adapter is in a model or a folder, and how it was injected."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pkt.adapters import Adapter, Pair, adapter_from_state, read_adapter
from pkt.errors import PktError, PktWarning
from pkt.extraction import Extraction
from pkt.files import as_path
from pkt.lora.wrapping import unwrapped
from pkt.models.adapter_files import CONFIG, SHIFTED, Origin, origin_of, read_config, record_of, without_initial


@dataclass
class Source:
    """A trained adapter, with its scales folded into B, and how it was injected."""

    adapter: Adapter
    mode: str  # paired, residual, add or plain
    initial: dict[str, Pair] | None = None  # of a residual adapter
    record: dict[str, Any] = field(default_factory=dict)
    student: str | None = None  # the original student, as it was named
    how: str = ""  # what the mode was recognised by


def read_source(source: Any, extraction: Extraction | str | Path | None = None) -> Source:
    """The adapter in a model or a folder, and how it was injected. Raises `PktError` where that would be a guess."""
    if extraction is not None and not isinstance(extraction, Extraction):
        extraction = Extraction.load(extraction)
    if isinstance(source, nn.Module):
        found = _read_model(unwrapped(source))
    else:
        found = _read_folder(as_path(source, "a trained model, or the path of its folder,"))
    if extraction is not None and found.mode != "residual":
        text = f"the extraction is not used: this adapter is {found.mode}, and only a residual one needs it"
        warnings.warn(text, PktWarning, stacklevel=3)
    if found.mode == "residual" and found.initial is None and extraction is not None:
        # An adapter of one's own configuration may use a part of the extraction.
        found.initial = {m: p for m, p in extraction.pairs.items() if m in found.adapter.pairs}
    if found.mode == "residual":
        where = "this model" if isinstance(source, nn.Module) else str(source)
        if found.initial is None:
            raise PktError(without_initial(where))
        wanted = found.record.get("initial")
        if wanted is not None and wanted != Adapter(found.initial, "").fingerprint():
            raise PktError(
                f"the initial factors at hand are not those {where} started from; name the extraction it was injected from "
                "(--extraction DIR)"
            )
    return found


def _read_model(model: Any) -> Source:
    from peft import get_peft_model_state_dict

    if not hasattr(model, "peft_config"):
        raise PktError(
            "this model carries no adapter; finalize what pkt.inject returned, or the folder it was saved to"
        )
    injected = getattr(model, "pkt_injection", {})
    active = [n for n in model.active_adapters if n in model.peft_config]
    name = next(iter(active or injected or model.peft_config))
    config = model.peft_config[name].to_dict()
    record = record_of(config)
    if record is None:
        raise PktError(
            f"the adapter {name!r} of this model was not made by pkt, so it needs no finalize; save it with PEFT, or make the "
            "injected adapter the active one (set_adapter)"
        )
    shifted = getattr(getattr(model.get_base_model(), "config", None), SHIFTED, None)
    if record["mode"] == "residual" and not shifted:
        raise PktError(
            f"the adapter {name!r} is residual but the base under it is not shifted, so this model is not the trained one; "
            "arm it first: pkt.inject(model, extraction, mode='residual')"
        )
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    adapter = adapter_from_state(state, config, "the model's adapter")
    return Source(
        adapter, record["mode"], injected.get(name, {}).get("initial"), record, record["student"], "its record"
    )


def _read_folder(folder: Path) -> Source:
    if not (folder / CONFIG).is_file() and (folder / "config.json").is_file():
        raise PktError(f"{folder} is a model, not an adapter folder; name the folder that holds the trained adapter")
    origin = origin_of(folder, read_config(folder))
    adapter, _ = read_adapter(folder)
    if origin is None and looks_paired(adapter):
        origin = Origin("paired", adapter.base, "its factors: the second half is a pair of singular factors")
    if origin is None:
        raise PktError(
            f"{folder}: pkt cannot tell how this adapter was injected: no run manifest beside it, no record in its {CONFIG}, and "
            "its factors are not a paired adapter's. If pkt.inject made it, finalize the trainer's own output folder, or the "
            "model in memory; if not, it needs no finalize"
        )
    initial = None if origin.initial is None else read_adapter(origin.initial)[0].pairs
    return Source(adapter, origin.mode, initial, origin.record, origin.student, origin.how)


def looks_paired(adapter: Adapter) -> bool:
    """Whether each module's second half is an untouched [A₀], [−B₀]: orthogonal singular factors that mirror the first half.

    Training leaves no other LoRA with orthogonal rows and columns in one half of every module.
    """
    seen = False
    for a, b in (factors for pair in adapter.pairs.values() for factors in pair.each()):
        if not (a.any() or b.any()):
            # An expert that nothing feeds: its factors stay zero.
            continue
        half = len(a) // 2
        a0, b0 = a[half:].double(), -b[:, half:].double()
        if len(a) % 2 or not (_orthogonal(a0) and _orthogonal(b0.t())):
            return False
        mirrored = (a[:half].double() * a0).sum() > 0 and (b[:, :half].double() * b0).sum() > 0
        if not mirrored:
            return False
        seen = True
    return seen


def _orthogonal(rows: Tensor) -> bool:
    gram = rows @ rows.t()
    diagonal = gram.diagonal()
    if not (diagonal > 0).any():
        return False
    # Cosines between rows; rounding to bf16 leaves them under 2%.
    size = diagonal.clamp_min(1e-30).sqrt()
    cosines = gram / size / size[:, None]
    return float((cosines - torch.diag(cosines.diagonal())).abs().max()) < 0.02 if len(rows) > 1 else False
