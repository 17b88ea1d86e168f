"""One loss per sample: what a model is scored on unless the caller says otherwise."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pkt.errors import PktError, SampleError
from pkt.seeds import IGNORE

LossFn = Callable[[nn.Module, Any], Tensor]


def checked_loss(loss_fn: LossFn) -> LossFn:
    """A caller's loss, whose faults are one `PktError` that says what is expected and what came.

    Raises it at once for what cannot be called with a model and a batch.
    """
    expected = "sensitivity calls loss_fn(model, batch) and expects one loss per sample, a tensor [B]"
    try:
        inspect.signature(loss_fn).bind(None, None)
    except TypeError as error:
        raise PktError(f"{expected}; {_named(loss_fn)} cannot be called so ({error})") from error
    except ValueError:  # a builtin without a signature
        pass

    def loss(model: nn.Module, batch: Any) -> Tensor:
        try:
            found: Any = loss_fn(model, batch)
        except (AttributeError, TypeError, KeyError, IndexError) as error:
            raise PktError(
                f"{expected}; {_named(loss_fn)} stopped with {type(error).__name__}: {error} (the model is a "
                f"{type(model).__name__}, the batch a {type(batch).__name__})"
            ) from error
        if not isinstance(found, Tensor):
            raise PktError(f"{expected}; {_named(loss_fn)} returned a {type(found).__name__}")
        if found.ndim > 1 and found.shape[0] != found.numel():
            raise PktError(f"{expected}; {_named(loss_fn)} returned a tensor {list(found.shape)}")
        return found

    return loss


def _named(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def check_labels(batch: Any) -> None:
    if isinstance(batch, Mapping) and "labels" not in batch and {"messages", "prompt", "text"} & set(batch):
        raise PktError(
            "the loader gives rows of text; read them with pkt.load_seeds(path, tokenizer), which gives batches"
        )
    if not isinstance(batch, Mapping) or "labels" not in batch:
        raise PktError("the default loss needs batches that are mappings with 'labels'; pass loss_fn for anything else")
    ids, labels = batch.get("input_ids"), batch["labels"]
    if not isinstance(labels, Tensor) or (isinstance(ids, Tensor) and ids.ndim == 1):
        raise PktError(
            "the loader gives samples, not batches: collate them into tensors [samples, tokens], as a DataLoader with a collator "
            "does"
        )


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """Mean cross-entropy of each sample's target tokens, [B]; a 0-dim tensor when the model gives nothing but a loss."""
    check_labels(batch)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    labels = batch["labels"]
    accepted = inspect.signature(model.forward).parameters
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    if "output_router_logits" in accepted:
        inputs["output_router_logits"] = False
    required = "labels" in accepted and accepted["labels"].default is inspect.Parameter.empty
    output = model(**inputs, labels=labels) if required else model(**inputs)
    logits = output_field(output, "logits")
    if logits is None:
        if not required and "labels" in accepted:
            output = model(**inputs, labels=labels)
        loss = output_field(output, "loss")
        if loss is None:
            raise PktError("the model returned neither logits nor a loss; pass loss_fn(model, batch) -> [B]")
        return loss
    return per_sample_loss(logits, labels)


def output_field(output: Any, name: str) -> Tensor | None:
    if isinstance(output, Tensor):
        return output if (name == "loss") == (output.ndim == 0) else None
    if isinstance(output, Mapping):
        return output.get(name)
    if isinstance(output, tuple) and not hasattr(output, name):
        return next((t for t in output if isinstance(t, Tensor) and (name == "loss") == (t.ndim == 0)), None)
    return getattr(output, name, None)


def per_sample_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """logits [B, T, V] with labels [B, T] (shifted by one) or logits [B, C] with labels [B] -> mean losses [B], fp32."""
    if logits.ndim == labels.ndim + 1 == 3:
        logits, labels = logits[:, :-1], labels[:, 1:]
    elif logits.ndim != labels.ndim + 1:
        raise PktError(f"logits {list(logits.shape)} and labels {list(labels.shape)} do not fit; pass loss_fn")
    targets = check_targets(labels)
    work = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(work.reshape(-1, work.shape[-1]), labels.reshape(-1), reduction="none")
    return losses.view(labels.shape[0], -1).sum(1) / targets


def check_targets(labels: Tensor) -> Tensor:
    """Target tokens of each sample [B]; every sample must have one."""
    targets = (labels != IGNORE).reshape(labels.shape[0], -1).sum(1)
    if not bool(targets.all()):
        sample = int((targets == 0).nonzero()[0, 0])
        raise SampleError("{samples} has no target token (every label is -100)", [sample])
    return targets
