"""A smaller model out of a larger one's own units: chosen by score, gathered as they are, ready to be healed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pkt.errors import PktError
from pkt.matching.cutting import Cutter
from pkt.matching.lineage import Lineage
from pkt.matching.matrices import Matrices
from pkt.models import unwrap

_ROLES = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Shape:
    """What a shrunk model keeps: hidden units, FFN neurons, key/value groups (each with its queries), layers."""

    hidden: int
    neurons: int
    groups: int
    layers: int


def choose_units(old: Matrices, scores: Mapping[str, Tensor], shape: Shape) -> Lineage:
    """The units with the largest score, Σ over all matrices they touch, in their order; layers by the score of all of theirs.

    scores: parameter -> S, in the parameter's shape (`pkt.sensitivity`, |W|², ...). Raises `PktError` for a shape that the
    model does not have.
    """
    spec = old.spec
    count = spec.num_layers
    if not (0 < shape.layers <= count and 0 < shape.hidden <= old.hidden):
        raise PktError(
            f"{spec.name} has {count} layers of {old.hidden} hidden units; {shape} asks for more, or for none"
        )
    by_layer = torch.zeros(count, dtype=torch.float64)
    hidden = torch.zeros(old.hidden, dtype=torch.float64)
    neurons: list[Tensor] = []
    groups: list[Tensor] = []
    for layer in range(count):
        share = old.heads(layer)
        if not share[1]:
            raise PktError(f"{spec.name}: the heads of layer {layer} are not known by name, so they cannot be chosen")
        part = {
            role: _scores(old, scores, role, layer)
            for role in ("q", "k", "v", "o", "gate", "up", "down")
            if old.has(role, layer)
        }
        by_layer[layer] = sum(float(s.sum()) for s in part.values())
        hidden += sum(s.sum(0) for role, s in part.items() if role not in ("o", "down"))
        hidden += part["o"].sum(1) + part["down"].sum(1)
        neurons.append(sum((part[r].sum(1) for r in ("gate", "up") if r in part), part["down"].sum(0)))
        per_group = [s.reshape(share[1], -1).sum(1) for s in (part["q"], part["k"], part["v"], part["o"].t())]
        groups.append(sum(per_group[1:], per_group[0]))
    for role in ("embed", "head"):
        if old.has(role, None):
            hidden += _scores(old, scores, role, None).sum(0)
    layers = _largest(by_layer, shape.layers)
    found = Lineage(
        spec.identity(), {}, _largest(hidden, shape.hidden), layers, verdict="descends", reason="cut from it"
    )
    for layer in layers:
        if shape.neurons > len(neurons[layer]) or shape.groups > len(groups[layer]):
            raise PktError(
                f"{spec.name} has {len(neurons[layer])} neurons and {len(groups[layer])} groups a layer; {shape} asks for more"
            )
        chosen = _largest(groups[layer], shape.groups)
        queries = old.heads(layer)[0] // old.heads(layer)[1]
        found.neurons.append(_largest(neurons[layer], shape.neurons))
        found.groups.append([[g] for g in chosen])
        found.queries.append([g * queries + i for g in chosen for i in range(queries)])
    return found


def _scores(old: Matrices, scores: Mapping[str, Tensor], role: str, layer: int | None) -> Tensor:
    target, rows = old.index[role, layer]
    if target.experts:
        raise PktError(f"{old.spec.name} has experts, which cannot be shrunk yet")
    whole = target.oriented(scores[target.parameter]).double()
    return torch.cat([whole[a:b] for a, b in rows])


def _largest(scores: Tensor, count: int) -> list[int]:
    return [int(i) for i in scores.topk(count).indices.sort().values]


def shrink_to(model: nn.Module, found: Lineage) -> Any:
    """The model of the units in `found`, with their weights as they are, in fp32 and in memory."""
    old = Matrices(model)
    plain: Any = unwrap(model)
    config = copy.deepcopy(plain.config)
    heads = len(found.queries[0])
    config.update(
        {
            "hidden_size": len(found.hidden),
            "intermediate_size": len(found.neurons[0]),
            "num_hidden_layers": len(found.layers),
            "num_key_value_heads": len(found.groups[0]),
            "num_attention_heads": heads,
            "head_dim": old.spec.head_dim,
        }
    )
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in found.layers]
    small: Any = type(plain)(config).float()
    new = Matrices(small)
    cutter = Cutter(found, old, new)
    with torch.no_grad():
        for target in new.spec.targets:
            small.get_parameter(target.parameter).copy_(target.oriented(cutter.matrix(target, old.raw)))
        for name, shape in new.shapes.items():
            if len(shape) == 1:
                vector = cutter.vector(name, old.parameter)
                if vector is None:
                    raise PktError(f"{name} of the small model has no counterpart in {old.spec.name}")
                small.get_parameter(name).copy_(vector)
    found.student = new.spec.identity()
    return small.eval()
