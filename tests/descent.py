"""Students made of a teacher's own units, drawn at random and in any order, of every family; and what becomes of them."""

from __future__ import annotations

import copy
from typing import Any

import torch

from pkt.matching import Cutter, Lineage, Matrices

KINDS = ("hidden", "layers", "neurons", "queries", "groups", "experts")


def drawn(
    teacher: Any,
    *,
    seed: int = 3,
    hidden: int = 40,
    neurons: int = 48,
    layers: int = 3,
    groups: int = 2,
    experts: int = 3,
) -> Lineage:
    """Units of a teacher's drawn at random and in a random order; layers in theirs. GPT-2 ties its heads to its width."""
    old = Matrices(teacher)
    generator = torch.Generator().manual_seed(seed)

    def some(count: int, of: int) -> list[int]:
        return torch.randperm(of, generator=generator)[:count].tolist()

    found = Lineage(old.spec.identity(), {}, some(hidden, old.hidden), sorted(some(layers, old.spec.num_layers)))
    found.verdict = "descends"
    for layer in found.layers:
        share = old.heads(layer)[0] // old.heads(layer)[1]
        width = old.index["down", layer][0].shape[1]
        chosen = some(hidden // 8 if share == 1 else groups, old.heads(layer)[1])
        found.experts.append(some(experts, old.experts(layer)) if old.experts(layer) else [])
        found.neurons.append([n for _ in found.experts[-1] or [0] for n in some(neurons, width)])
        found.groups.append([[g] for g in chosen])
        found.queries.append([g * share + i for g in chosen for i in some(share, share)])
    return found


def trained(model: Any, steps: int = 200) -> Any:
    """The model after some steps of AdamW on random tokens."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-4)
    for _ in range(steps):
        ids = torch.randint(2, model.config.vocab_size, (2, 16), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def cut(model: Any, found: Lineage) -> Any:
    """The model of these units in memory: every parameter gathered from the teacher's."""
    old, config = Matrices(model), copy.deepcopy(model.config)
    experts = len(found.experts[0])
    width = {
        "n_inner" if config.model_type == "gpt2" else "intermediate_size": len(found.neurons[0]) // max(1, experts)
    }
    config.update(
        {
            "hidden_size": len(found.hidden),
            "num_hidden_layers": len(found.layers),
            "num_key_value_heads": len(found.groups[0]),
            "num_attention_heads": len(found.queries[0]),
            **width,
            **({"num_local_experts": experts} if experts else {}),
        }
    )
    kinds = getattr(model.config, "layer_types", None)
    config.layer_types = kinds and [kinds[layer] for layer in found.layers]
    small = type(model)(config).float()
    new = Matrices(small)
    cutter = Cutter(found, old, new)
    matrices = {t.parameter: t for t in (*new.spec.targets, *new.others)}
    with torch.no_grad():
        for name, p in small.named_parameters():
            if name in matrices:
                value = cutter.matrix(matrices[name], old.raw)
                p.copy_(value.mT if matrices[name].kind == "conv1d" else value)
            else:
                p.copy_(cutter.vector(name, old.parameter))
    found.student = new.spec.identity()
    return small.eval()


def noisy(model: Any, amount: float, seed: int = 1) -> Any:
    """The model with noise of `amount` times each matrix's own spread."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            if p.ndim > 1:
                p.add_(torch.randn(p.shape, generator=generator) * p.std() * amount)
    return other
