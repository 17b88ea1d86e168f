"""PiSSA: a model's own leading factors as the start of its adapter, in the manner of `residual`."""

from __future__ import annotations

import collections
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pkt.adapters import Adapter, Pair
from pkt.errors import PktError, short_list
from pkt.extraction.factorization import BATCH, factorize_all
from pkt.lora.factors import start_adapter
from pkt.lora.record import check_unshifted, name_of
from pkt.lora.wrapping import ADAPTER, config_of
from pkt.models import Kind
from pkt.options import Factorization


def initialize_pissa_weights(peft_model: Any, *, adapter_name: str = ADAPTER, seed: int = 0) -> None:
    """PEFT's `init_lora_weights="pissa"` (Meng et al., 2024, arXiv 2404.02948) without its full SVDs.

    peft_model: as `get_peft_model` makes it with PEFT's default start, changed in place. Each linear layer W [out, in] of the
    adapter, Conv1D too, gets A = √(Σ/s) Vᵀ [r, in] and B = U √(Σ/s) [out, r] from its r leading singular triplets
    (`pkt::rsvd`), s being the adapter's scale; W − s·BA, computed in fp32 and rounded once to W's dtype, stays in the base.
    Embeddings keep PEFT's start, as with PEFT. The configuration then says "pissa", for PEFT's own conversion to a plain LoRA;
    `pkt.finalize(peft_model, OUT)` makes one too. The same seed gives the same bytes.

    Raises `PktError` before anything is changed: listing every layer without a plain weight of its own in fp32, fp16 or bf16
    (quantized, tied to another module, merged), for other adapters on the base, and for weights that are not finite.
    """
    config = config_of(peft_model, adapter_name)
    check_unshifted(peft_model)
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise PktError(
            f"the adapter {adapter_name!r} was made with init_lora_weights={config.init_lora_weights!r}; leave it at its default"
        )
    others = [name for name in peft_model.peft_config if name != adapter_name]
    if others:
        raise PktError(f"PiSSA would shift the base under the other adapters of this model ({', '.join(others)})")
    pairs = pissa_pairs(peft_model, adapter_name=adapter_name, seed=seed)
    start_adapter(peft_model, Adapter(pairs, name_of(peft_model.get_base_model())), "residual", adapter_name)
    config.init_lora_weights = "pissa"


def pissa_pairs(
    peft_model: Any, *, adapter_name: str = ADAPTER, seed: int = 0, only: Container[str] | None = None
) -> dict[str, Pair]:
    """The leading factors of each linear layer of an adapter (of those named in `only`); nothing is changed.

    Raises `PktError` listing every layer that PiSSA could not subtract them from.
    """
    base = peft_model.get_base_model()
    layers = {
        name: layer
        for name, layer in base.named_modules()
        if adapter_name in getattr(layer, "lora_A", ()) and (only is None or name in only)
    }
    owners = collections.Counter(id(p) for module in base.modules() for p in module.parameters(recurse=False))
    faults = [f"{name}: {fault}" for name, layer in layers.items() if (fault := _pissa_fault(layer, owners))]
    if faults or not layers:
        raise PktError(
            "PiSSA subtracts the factors from the base's weights, so each layer needs a plain matrix of its own in float32, "
            "float16 or bfloat16; initialize before quantizing, or take these out of target_modules: "
            + short_list(faults or [f"no linear layer has the adapter {adapter_name!r}"])
        )
    by_rank: dict[int, list[str]] = {}
    for name, layer in layers.items():
        by_rank.setdefault(layer.r[adapter_name], []).append(name)
    pairs = {}
    for rank, names in by_rank.items():
        options = Factorization(rank, split="sqrt", seed=seed)
        for some in (names[i : i + BATCH] for i in range(0, len(names), BATCH)):
            weights = [layers[n].get_base_layer().weight.detach() for n in some]
            matrices = [w.t() if layers[n].fan_in_fan_out else w for n, w in zip(some, weights, strict=True)]
            for name, found in zip(some, factorize_all(matrices, some, options), strict=True):
                kind: Kind = "conv1d" if layers[name].fan_in_fan_out else "linear"
                root = layers[name].scaling[adapter_name] ** 0.5
                pairs[name] = Pair((found.A / root).cpu(), (found.B * root).cpu(), kind)
    return pairs


def _pissa_fault(layer: Any, owners: Mapping[int, int]) -> str | None:
    """Why this LoRA layer cannot be started by PiSSA, or None."""
    weight = getattr(layer.get_base_layer(), "weight", None)
    if not isinstance(weight, Tensor):
        return "no weight"
    if type(weight) not in (Tensor, nn.Parameter) or weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{type(weight).__name__} of {str(weight.dtype).removeprefix('torch.')}"
    if weight.is_meta or weight.ndim != 2:
        return f"{list(weight.shape)} on {weight.device}"
    if owners[id(weight)] > 1:
        return "tied to another module"
    return "merged" if layer.merged else None
