"""What the weights carry on general text: each times the size of what it is multiplied by (Wanda, arXiv 2306.11695)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pkt.models import ModelSpec, rows_apart
from pkt.progress import bar
from pkt.seeds import Seeds


@torch.no_grad()
def activation_scores(
    model: nn.Module, spec: ModelSpec, seeds: Seeds, *, batch_size: int = 8, progress: bool = True
) -> dict[str, Tensor]:
    """parameter -> |W_ij| √(mean of x_j²) over the positions that are no padding; of a table, |W_tj| √(share of token t).

    A tied head adds to its table. The model is run whole, forward only.
    """
    homes = {t.module: t for t in spec.targets}
    tied = {spec.head: next(t for t in spec.targets if t.role == "embed")} if spec.tied and spec.head else {}
    squares: dict[str, Tensor] = {}
    keep = torch.zeros(0)
    count = 0

    def see(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            rows = args[0][keep] if args[0].shape[:2] == keep.shape else args[0].flatten(0, -2)
            if not rows.is_floating_point():
                found = torch.bincount(rows.flatten(), minlength=module.num_embeddings).double()  # type: ignore[arg-type]
            else:
                found = rows.flatten(0, -2).double().square().sum(0)
            squares[name] = squares.get(name, 0) + found

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(see(name)) for name in {**homes, **tied}]
    try:
        with rows_apart(model), bar("reading", len(seeds), unit="samples", shown=progress) as advance:
            device = next(model.parameters()).device
            for done, batch in enumerate(seeds.batches(batch_size), 1):
                inputs = {k: v.to(device) for k, v in batch.items() if k != "labels"}
                keep = inputs["attention_mask"].bool()
                model(**inputs, use_cache=False)
                count += int(keep.sum())
                advance(min(len(seeds), done * batch_size))
    finally:
        for hook in hooks:
            hook.remove()
    scores: dict[str, Tensor] = {}
    for name, target in {**homes, **tied}.items():
        size = (squares[name] / count).sqrt().float()
        weight = target.oriented(model.get_parameter(target.parameter)).detach().abs().float()
        by_row = target.kind == "embedding" and name in homes
        found = target.oriented(weight * (size[:, None] if by_row else size))
        scores[target.parameter] = scores.get(target.parameter, 0) + found
    return scores
