"""The factors of an adapter as PEFT holds them: filled with their start, masked, and the base shifted under them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pkt.adapters import Adapter, Pair, from_peft
from pkt.errors import PktError
from pkt.lora.record import Mode, make_record, subtract
from pkt.models.adapter_files import RECORD, SHIFTED


def start_adapter(peft_model: Any, adapter: Adapter, mode: Mode, name: str) -> None:
    """Fill an adapter with its initial factors, shift the base in `residual`, and record both."""
    base, config = peft_model.get_base_model(), peft_model.peft_config[name]
    record = make_record(base, adapter, mode)
    config.auto_mapping = {**(config.auto_mapping or {}), RECORD: record}
    if mode == "residual":
        shift(peft_model, adapter.pairs, record)
    _fill(peft_model, adapter.pairs, name, paired=mode == "paired")
    injected = getattr(peft_model, "pkt_injection", {})
    peft_model.pkt_injection = {**injected, name: {"mode": mode, "initial": adapter.pairs}}


def layer_of(model: Any, module: str, pair: Pair) -> Any:
    """The module that PEFT has put around a matrix; around a parameter of experts, one of its nested wrappers."""
    if not pair.experts:
        return model.get_base_model().get_submodule(module)
    owner, _, name = module.rpartition(".")
    layer = model.get_base_model().get_submodule(owner)
    while hasattr(layer, "base_layer") and getattr(layer, "parameter_name", None) != name:
        layer = layer.base_layer
    return layer


def lora_parameters(model: Any, module: str, pair: Pair, name: str) -> tuple[Tensor, Tensor] | None:
    """The factors of an adapter as PEFT has them."""
    layer = layer_of(model, module, pair)
    if pair.kind == "embedding" and name in getattr(layer, "lora_embedding_A", {}):
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    if name in getattr(layer, "lora_A", {}):
        return layer.lora_A[name].weight, layer.lora_B[name].weight
    return None


def _start(model: Any, module: str, pair: Pair, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The adapter's factors of a module, views of its parameters; the extraction's in their dtype, the scale divided out of B."""
    found = lora_parameters(model, module, pair, name)
    assert found is not None
    a, b = from_peft(*found, pair.experts)
    return a, b, pair.A.to(a), (pair.B / layer_of(model, module, pair).scaling[name]).to(b)


@torch.no_grad()
def _fill(model: Any, pairs: Mapping[str, Pair], name: str, *, paired: bool) -> None:
    for module, pair in pairs.items():
        a, b, first_a, first_b = _start(model, module, pair, name)
        a.copy_(torch.cat([first_a, first_a], -2) if paired else first_a)
        b.copy_(torch.cat([first_b, -first_b], -1) if paired else first_b)
        if paired:
            _mask(model, module, pair, name)


@torch.no_grad()
def arm_pair(model: Any, module: str, pair: Pair, name: str) -> float:
    """Mask a module's second half; returns how far it is from [A₀], [−B₀], relative to them."""
    a, b, first_a, first_b = _start(model, module, pair, name)
    if a.shape[-2] != 2 * pair.rank:
        raise PktError(
            f"{module} has rank {a.shape[-2]} in the adapter {name!r}, not twice the extraction's {pair.rank}"
        )
    _mask(model, module, pair, name)
    gap_a = (a[..., pair.rank :, :] - first_a).norm() / first_a.norm().clamp_min(1e-30)
    gap_b = (b[..., pair.rank :] + first_b).norm() / first_b.norm().clamp_min(1e-30)
    return float(max(gap_a, gap_b))


def _mask(model: Any, module: str, pair: Pair, name: str) -> None:
    found = lora_parameters(model, module, pair, name)
    assert found is not None
    a, b = found
    # PEFT lays the experts of A one after another, and those of B side by side in every column of a rank.
    a.register_hook(_keep_first_half(0, max(1, pair.experts)))
    b.register_hook(_keep_first_half(1, 1))


def _keep_first_half(dim: int, times: int) -> Callable[[Tensor], Tensor]:
    """times: how often the halves follow each other along the dimension."""

    def mask(grad: Tensor) -> Tensor:
        masked = grad.clone()
        halves = masked.unflatten(dim, (times, 2, -1))
        halves.select(dim + 1, 1).zero_()
        return masked

    return mask


def shift(model: Any, pairs: Mapping[str, Pair], record: dict[str, Any]) -> None:
    base = model.get_base_model()
    subtract(base, pairs)
    if hasattr(base, "config"):
        setattr(base.config, SHIFTED, {k: record[k] for k in ("student", "initial")})


@torch.no_grad()
def scale_a(model: Any, scale: float) -> None:
    """A of every projection times `scale` and B divided by it, so that the product stays."""
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            parameter.mul_(scale)
        elif ".lora_B." in name:
            parameter.div_(scale)
