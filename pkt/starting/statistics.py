"""What the seeds say of a model's linear layers: the gradient of their mean loss, and the covariance of what goes in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pkt.errors import PktError
from pkt.models import Target, rows_apart
from pkt.progress import bar
from pkt.scoring import default_loss
from pkt.seeds import Seeds


def mean_gradients(
    model: nn.Module, targets: Sequence[Target], seeds: Seeds, *, batch_size: int = 8, progress: bool = True
) -> tuple[dict[str, Tensor], float]:
    """(module -> G [out, in], fp32, of the mean over the samples of their losses, and that mean).

    The model is left as it was found. Raises `PktError` where a gradient is not finite.
    """
    total = 0.0
    with _requiring(model, targets) as weights:

        def backward(batch: Mapping[str, Tensor]) -> None:
            nonlocal total
            loss = default_loss(model, batch).sum() / len(seeds)
            loss.backward()
            total += float(loss.detach())

        _each(model, seeds, batch_size, "gradients", progress, backward)
        found = {t.module: t.oriented(_gradient(w)).float() for t, w in zip(targets, weights, strict=True)}
    bad = next((name for name, g in found.items() if not bool(g.isfinite().all())), None)
    if bad is not None:
        raise PktError(
            f"the gradient of {bad} on the seeds is not finite; load the model in fp32 or bf16, or look at them"
        )
    return found, total


@torch.no_grad()
def input_covariances(
    model: nn.Module, targets: Sequence[Target], seeds: Seeds, *, batch_size: int = 8, progress: bool = True
) -> dict[str, Tensor]:
    """module -> covariance [in, in], fp64, of its inputs over all positions of the seeds that are no padding.

    Raises `PktError` where one is not finite.
    """
    sums: dict[str, Tensor] = {}
    products: dict[str, Tensor] = {}
    keep = torch.zeros(0)
    count = 0

    def see(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])[keep].double()
            sums[name] = sums.get(name, 0) + x.sum(0)
            products[name] = products.get(name, 0) + x.t() @ x

        return hook

    def forward(batch: Mapping[str, Tensor]) -> None:
        nonlocal keep, count
        keep = batch["attention_mask"].reshape(-1).bool()
        count += int(keep.sum())
        default_loss(model, batch)

    handles = [model.get_submodule(t.module).register_forward_pre_hook(see(t.module)) for t in targets]
    try:
        _each(model, seeds, batch_size, "inputs", progress, forward)
    finally:
        for handle in handles:
            handle.remove()
    bad = next((name for name, p in products.items() if not bool(p.isfinite().all())), None)
    if bad is not None:
        raise PktError(
            f"the inputs of {bad} on the seeds are not finite; the checkpoint is damaged, or needs fp32 or bf16"
        )
    means = {name: s / count for name, s in sums.items()}
    return {name: products[name] / count - torch.outer(mean, mean) for name, mean in means.items()}


def _each(
    model: nn.Module,
    seeds: Seeds,
    batch_size: int,
    what: str,
    progress: bool,
    run: Callable[[Mapping[str, Tensor]], None],
) -> None:
    """Run every batch of the seeds on the model's device, the model in eval mode."""
    device, training = next(model.parameters()).device, model.training
    batches = seeds.batches(batch_size)
    model.eval()
    try:
        with rows_apart(model), bar(what, len(seeds), unit="samples", shown=progress) as advance:
            for number, batch in enumerate(batches, 1):
                run({key: value.to(device) for key, value in batch.items()})
                advance(min(number * batch_size, len(seeds)))
    finally:
        model.train(training)


@contextlib.contextmanager
def _requiring(model: nn.Module, targets: Sequence[Target]) -> Iterator[list[nn.Parameter]]:
    """Inside, only the targets' weights require a gradient, and have none yet."""
    before = {p: (p.requires_grad, p.grad) for p in model.parameters()}
    weights = [model.get_parameter(t.parameter) for t in targets]
    try:
        for p in before:
            p.requires_grad_(False)
            p.grad = None
        for p in weights:
            p.requires_grad_(True)
        with torch.enable_grad():
            yield weights
    finally:
        for p, (required, grad) in before.items():
            p.requires_grad_(required)
            p.grad = grad


def _gradient(weight: nn.Parameter) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad
