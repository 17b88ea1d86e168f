"""What was done to a student, as recorded in an adapter's configuration, and what tells that student's weights from others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pkt.adapters import Adapter, Pair, parameter_name
from pkt.errors import PktError
from pkt.models import Model
from pkt.models.adapter_files import SHIFTED
from pkt.options import Mode as Mode
from pkt.progress import bar


def make_record(base: nn.Module, adapter: Adapter, mode: Mode) -> dict[str, Any]:
    """What must be known to finalize an adapter: how it was injected, into which weights, from which factors."""
    return {"mode": mode, "student": adapter.base, "initial": adapter.fingerprint(), "sketch": sketch(base, adapter)}


def sketch(student: Any, adapter: Adapter) -> dict[str, list[float]]:
    """Eight weights of a few modules: enough to tell the original student from a shifted one, or another.

    student: a model (its layers may be wrapped by PEFT) or a `Model`. The tables are always among the modules, since PEFT saves
    and loads their base weights with an adapter. Quantized matrices are left out.
    """
    inside = sorted(m for m in adapter.pairs if any(part.isdigit() for part in m.split(".")))
    outside = sorted(m for m in adapter.pairs if m not in inside)
    chosen = {*outside[:3], *inside[:1], *inside[len(inside) // 2 :][:1], *inside[-1:]}
    found = {m: weight_of(student, m, adapter.pairs[m]) for m in sorted(chosen)}
    values = {m: w.flatten()[_places(w)] for m, w in found.items() if w is not None}
    return {m: v.float().tolist() for m, v in values.items()}


def compare_sketch(
    recorded: Mapping[str, list[float]], student: Any, pairs: Mapping[str, Pair], *, initial: bool = False
) -> dict[str, str]:
    """Per module of the sketch that can be compared: "same", "other", or, where the pairs are the initial ones, "shifted" by −B₀A₀.

    Weights are the same up to rounding to bf16.
    """
    found = {}
    for module, values in recorded.items():
        pair = pairs.get(module)
        weight = weight_of(student, module, pair)
        if weight is None:
            continue
        then, now = torch.tensor(values), weight.flatten()[_places(weight)].float().cpu()
        found[module] = "same" if _like(then, now) else "other"
        if found[module] == "other" and initial and pair is not None:
            *expert, rows, cols = torch.unravel_index(_places(weight).cpu(), weight.shape)
            rows, cols = (rows, cols) if pair.kind == "linear" else (cols, rows)
            shift = (pair.B.cpu().float()[(*expert, rows)] * pair.A.cpu().float().mT[(*expert, cols)]).sum(1)
            found[module] = "shifted" if _like(then - shift, now, then) else "other"
    return found


def _like(then: Tensor, now: Tensor, size: Tensor | None = None) -> bool:
    size = (then if size is None else size).abs()
    bound = 2.0**-8 * torch.maximum(size, then.abs()) + 1e-6 * size.max()
    return not bool(((then - now).abs() > bound).any())


def _places(weight: Tensor) -> Tensor:
    return torch.linspace(0, weight.numel() - 1, 8, dtype=torch.float64).long().to(weight.device)


def weight_of(student: Any, module: str, pair: Pair | None) -> Tensor | None:
    """What a pair changes, or None where its values are not there, or packed."""
    name = parameter_name(module, pair)
    weight = student.tensor(name) if isinstance(student, Model) else parameter_of(student, name)
    whole = 3 if pair is not None and pair.experts else 2
    if weight is None or not weight.is_floating_point() or weight.ndim != whole or weight.is_meta:
        return None
    return weight.detach()


def parameter_of(model: nn.Module, name: str) -> Tensor | None:
    """A parameter of the student's own, PEFT's wrappers around its module or not; None where another form of it is kept."""
    owner, _, key = name.rpartition(".")
    layer: Any = model.get_submodule(owner)
    while hasattr(layer, "base_layer"):
        layer = layer.base_layer
    found: Tensor | None = layer._parameters.get(key)
    return found


def name_of(base: nn.Module) -> str:
    """Where a model in memory was loaded from; empty when it does not say."""
    return str(getattr(getattr(base, "config", None), "name_or_path", "") or "")


def check_unshifted(student: Any) -> None:
    shifted = getattr(getattr(student, "config", None), SHIFTED, None)
    if shifted:
        raise PktError(
            "this base was already shifted by mode='residual' (its weights are W − B₀A₀); "
            f"inject into the original student, {shifted.get('student') or 'from which it was made'}"
        )


@torch.no_grad()
def subtract(student: Any, pairs: Mapping[str, Pair]) -> None:
    """W − B₀A₀ in fp32, rounded once, in place. Raises `PktError`, before anything is changed, for a quantized matrix."""
    quantized = [m for m, p in pairs.items() if weight_of(student, m, p) is None]
    if quantized:
        raise PktError(
            f"mode='residual' changes the weights, which are quantized here ({few(quantized)}); use mode='paired'"
        )
    with bar("changing the weights", len(pairs), unit="modules") as advance:
        for done, (module, pair) in enumerate(pairs.items(), 1):
            weight = weight_of(student, module, pair)
            assert weight is not None
            delta = Pair(pair.A.to(weight.device), pair.B.to(weight.device), pair.kind).delta()
            weight.copy_((weight.to(delta.dtype) - delta).to(weight.dtype))
            advance(done)


def few(names: list[str]) -> str:
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + rest
