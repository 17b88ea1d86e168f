"""`pkt.sensitivity`: every parameter of a model in memory scored on batches or on seeds."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pkt.errors import PktError, SampleError
from pkt.models import Model, ModelSpec, checked_device, decoder_layers, kind_of, position_limit, rows_apart
from pkt.ops import MEASURES
from pkt.progress import bar
from pkt.ranks import Ranks, shared_out
from pkt.scoring.attention import one_order
from pkt.scoring.batches import batch_size, in_order_of, longest_first
from pkt.scoring.losses import LossFn, check_labels, checked_loss, default_loss
from pkt.scoring.result import Sensitivity
from pkt.scoring.scorer import score_batches
from pkt.seeds import Seeds


def sensitivity(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    loss_fn: LossFn | None = None,
    params: str | Iterable[str] | None = None,
    tile: int | None = None,
    measure: str = "theta_grad",
    device: str | torch.device | None = None,
    group: Any = None,
    progress: bool = True,
) -> Sensitivity:
    """Score every parameter of `model` on the samples of `loader` (docs/method.md §1).

    model: any nn.Module; it is scored in eval mode and left exactly as it was found, also when interrupted.
    loader: batches, all held in a list, for they may have to be gone through again; for the default loss mappings with
        `labels` and what the model's forward takes. A batch's first dimension is the sample. S does not depend on how
        samples are batched, padded on the right or ordered. What `pkt.load_seeds` returns is taken as it is.
    loss_fn(model, batch) -> [B]: one loss per sample; default: cross-entropy, the mean over each sample's target tokens,
        shifted by one for logits [B, T, V]. A model that only gives a scalar loss is run one sample at a time.
    params: a regular expression or a list of names; the other parameters are not scored.
    tile: return sums over tile x tile blocks of S instead of its elements.
    measure: what is summed over the samples: "theta_grad" |θ·g| (the method's), "grad" |g|, "fisher" g², or
        "theta_grad_squared" (θ·g)². `pkt.plan` takes the first.
    device: where the scores are kept; default: where each parameter is.
    group: of torch.distributed, whose ranks all make this call, each with batches of its own (none, for some): S is the sum over
        all of them and the losses are all ranks', one after another. A model in DistributedDataParallel is scored as what it
        wraps; one whose weights are sharded is refused.

    Returns a `Sensitivity`, fp32 whatever the weights' type. Raises `PktError` for a sample without a target, a loss or a
    gradient that is not finite (naming the sample and the first bad parameter), a loss_fn of another form, and an empty loader.
    """
    if not isinstance(model, nn.Module):
        raise PktError(f"sensitivity takes a model in memory, not {model!r}; pkt.transfer takes checkpoint directories")
    if isinstance(loader, (str, bytes, os.PathLike)):
        raise PktError(
            f"sensitivity takes batches, not the file {loader!r}; read it with pkt.load_seeds(path, tokenizer)"
        )
    if torch.is_inference_mode_enabled():
        raise PktError("sensitivity needs gradients; call it outside torch.inference_mode()")
    ranks = Ranks.of(group)
    with ranks.together():
        return _scored(
            _whole(model), loader, loss_fn, params, tile, measure, device, ranks, progress=progress and ranks.first
        )


def _whole(model: nn.Module) -> nn.Module:
    """The model inside torch's data-parallel wrapper. Raises `PktError` where each rank holds a part of the weights."""
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        model = model.module
    # By their marks, for to import what makes them takes a second.
    sharded = any(hasattr(p, "device_mesh") for p in model.parameters())
    if sharded or any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise PktError(
            "the model's weights are sharded over the ranks (FSDP), and a sensitivity needs them whole: score the model before it "
            "is wrapped, or its checkpoint layer by layer with torchrun -m pkt sensitivity"
        )
    return model


def _scored(
    model: nn.Module,
    loader: Iterable[Any],
    loss_fn: LossFn | None,
    params: str | Iterable[str] | None,
    tile: int | None,
    measure: str,
    device: str | torch.device | None,
    ranks: Ranks,
    *,
    progress: bool,
) -> Sensitivity:
    packed = next((n for n, m in model.named_modules() if kind_of(m) and not _weight_of(m).is_floating_point()), None)
    if packed is not None:
        raise PktError(f"{packed} has a quantized weight; score the model at whole weights: model.dequantize() first")
    place = None if device is None else checked_device(device)
    check_measure(measure)
    names = _choose(model, params)
    parameters = dict(model.named_parameters())
    if any(parameters[name].is_meta for name in names):
        raise PktError("the model has parameters on the meta device, so without values; load its weights first")
    if tile is not None:
        check_tile(tile, [parameters[name].shape for name in names])
    batches = loader.batches(8) if isinstance(loader, Seeds) else list(loader)
    if not any(ranks.all_of(len(batches))):
        raise PktError("the loader gave no batches; there is nothing to score on")
    models = ranks.all_of({name: tuple(parameters[name].shape) for name in names})
    if any(each != models[0] for each in models):
        raise PktError("the ranks have models with other parameters; give all of them the same one")
    loss = default_loss if loss_fn is None else checked_loss(loss_fn)
    limit = position_limit(model, decoder_layers(model))
    for batch in batches:
        _check_batch(model, batch, loss_fn, limit)
    total = sum(map(batch_size, batches))
    with (
        one_order(parameters[names[0]].device),
        rows_apart(model),
        bar("scoring", total, unit="samples", shown=progress) as advance,
    ):
        how = MEASURES[measure]
        scores, losses = score_batches(
            model, names, batches, loss, measure=how, tile=tile, advance=advance, ranks=ranks
        )
    if place is not None:
        scores = {name: score.to(place) for name, score in scores.items()}
    shapes = {name: tuple(parameters[name].shape) for name in scores}
    return Sensitivity(scores, shapes, tile=tile, layers=decoder_layers(model), losses=losses, measure=measure)


def score_seeds(
    teacher: Any,
    seeds: Seeds,
    *,
    batch_size: int = 8,
    tile: int | None = None,
    measure: str = "theta_grad",
    progress: bool = True,
    recorded: ModelSpec | None = None,
    group: Any = None,
) -> Sensitivity:
    """`pkt.sensitivity` of a model on seeds, with what the scores were made from recorded in them.

    recorded: what the model is known as, when it was loaded from files. group: the ranks that share these seeds out.
    """
    if batch_size < 1:
        raise PktError(f"batch_size={batch_size} must be at least 1")
    spec = recorded or Model.of(teacher).identified()
    seeds.check_fits(spec.vocab_size, spec.positions, spec.name)
    order = longest_first(seeds)
    ranks = Ranks.of(group)
    shares = [share for (share,) in shared_out([[len(seeds[i].input_ids) for i in order]], ranks.world)]
    ordered = Seeds([seeds[order[i]] for i in shares[ranks.rank]], seeds.source, seeds.pad_id)
    try:
        batches = ordered.batches(batch_size)
        sens = sensitivity(teacher, batches, tile=tile, measure=measure, progress=progress, group=group)
    except SampleError as error:
        raise error.placed(ordered.where) from error
    sens.losses = in_order_of(sens.losses, [order[i] for share in shares for i in share])
    sens.provenance = {"seeds": seeds.describe(), "teacher": spec.identity()}
    return sens


def check_measure(measure: str) -> None:
    if measure not in MEASURES:
        raise PktError(f"measure={measure!r} is unknown; choose one of {', '.join(MEASURES)}")


def check_tile(tile: int, shapes: Iterable[Sequence[int]]) -> None:
    if not 1 <= tile <= max(max(shape, default=1) for shape in shapes):
        raise PktError(f"tile={tile} must be at least 1 and no larger than the largest matrix")


def _check_batch(model: Any, batch: Any, loss_fn: LossFn | None, limit: int | None) -> None:
    """Refuse what would otherwise stop torch inside the model."""
    if loss_fn is None:
        check_labels(batch)
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    try:
        rows = model.get_input_embeddings().weight.shape[0]
    except (AttributeError, NotImplementedError):
        return
    if isinstance(ids, Tensor) and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
        raise PktError(
            f"token ids {int(ids.min())} to {int(ids.max())} are not all in the model's {rows}; "
            "the tokenizer and the model do not belong together"
        )
    if limit is not None and isinstance(ids, Tensor) and ids.ndim == 2 and ids.shape[1] > limit:
        raise PktError(
            f"a batch has rows of {ids.shape[1]} tokens, and the model only {limit} positions; cut the rows "
            f"(max_length={limit} of pkt.load_seeds)"
        )


def _weight_of(module: Any) -> Tensor:
    weight: Tensor = module.weight
    return weight


def _choose(model: nn.Module, params: str | Iterable[str] | None) -> list[str]:
    names = [name for name, p in model.named_parameters() if p.is_floating_point()]
    if params is None:
        chosen = names
    elif isinstance(params, str):
        try:
            chosen = [name for name in names if re.search(params, name)]
        except re.error as error:
            raise PktError(f"params={params!r} is not a regular expression: {error}") from error
    else:
        wanted = list(params)
        unknown = sorted(set(wanted) - set(names))
        if unknown:
            raise PktError(
                f"the model has no parameter {', '.join(unknown[:5])}; names are those of named_parameters()"
            )
        chosen = [name for name in names if name in set(wanted)]
    if not chosen:
        raise PktError(f"no parameter to score (params={params!r}); names are those of model.named_parameters()")
    return chosen
