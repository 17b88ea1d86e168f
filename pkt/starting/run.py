"""`pkt.start`: a start for a student's LoRA that needs no teacher, as a folder that everything else takes."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pkt.adapters import Pair
from pkt.errors import PktError
from pkt.extraction import Start
from pkt.files import check_output_folder
from pkt.manifest import versions
from pkt.models import Model, ModelSpec, Target, load_tokenizer
from pkt.options import How, Starting
from pkt.planning import adapted
from pkt.seeds import Seeds, load_seeds
from pkt.starting import ways
from pkt.starting.scale import best_scale, tried
from pkt.starting.statistics import input_covariances, mean_gradients

# What each takes from the seeds, and how it is injected.
NEEDS_SEEDS = ("lora-ga", "eva", "spectral")
NEUTRAL = ("pissa", "lora-ga")


def start(
    student: Any,
    seeds: Seeds | str | Path | None = None,
    *,
    how: How = "lora",
    out: str | Path | None = None,
    rank: int = 32,
    a_scale: float = 3.0,
    seed: int = 0,
    tokenizer: Any = None,
    batch_size: int = 8,
    force: bool = False,
    progress: bool = True,
) -> Start:
    """A start of `student`'s own for its LoRA, on every linear layer of its decoder layers.

    how: "lora", A as PEFT draws it times `a_scale` and B = 0; "pissa", the weights' leading directions; "lora-ga", the
    gradient's, as its authors' code has it; "eva", the inputs' principal axes times `a_scale`; "spectral", one step in the
    gradient's leading directions, as far as the seeds' loss says. seeds: rows of the task, which the last three need; rank: less
    where a matrix has less. All but "spectral" leave the student as it is until it is trained.

    Raises `PktError` for seeds that are missing, for gradients that are not finite, and for a spectral step that helps at no size.
    """
    options = Starting(how, rank, a_scale, seed)
    if out is not None:
        check_output_folder(Path(out), force=force)
    if how in NEEDS_SEEDS and seeds is None:
        raise PktError(f"the start {how!r} is made from rows of the task; give the seeds")
    named = Model.of(student)
    rows = None if seeds is None else rows_for(seeds, student, tokenizer)
    if rows is not None:
        rows.check_fits(named.spec.vocab_size, named.spec.positions, named.spec.name)
    model = student if isinstance(student, nn.Module) else named.load(dtype=torch.float32, dequantize=True)
    targets = linear_layers(named.spec)
    if not targets:
        raise PktError(f"{named.spec.name} has no linear layer in its decoder layers")
    pairs, told = _made(model, targets, rows, options, batch_size, progress)
    provenance = {
        "how": how,
        "options": options.__dict__,
        "seeds": None if rows is None else rows.describe(),
        "told": {"start": how, **told},
        "versions": versions(),
    }
    known = named.identified().identity()
    result = Start("start", pairs, known, "paired" if how in NEUTRAL else "add", {}, provenance)
    if out is not None:
        result.save(out, force=force)
    return result


def linear_layers(spec: ModelSpec) -> list[Target]:
    """Those within the decoder layers that PEFT adapts, one matrix each."""
    inside = {t.module for t in spec.targets if t.layer is not None and t.kind != "embedding" and not t.experts}
    return [t for t in adapted(spec, "all") if t.module in inside] if inside else []


def _made(
    model: nn.Module, targets: list[Target], seeds: Seeds | None, options: Starting, batch_size: int, progress: bool
) -> tuple[ways.Pairs, dict[str, str]]:
    """The pairs, and what there is to say of them."""
    rank, scale, seed = options.rank, options.a_scale, options.seed
    if options.how == "lora":
        return ways.plain(targets, rank, scale, seed), {"A": f"{scale:g} × PEFT's"}
    if options.how == "pissa":
        return ways.pissa(model, targets, rank, seed), {}
    assert seeds is not None
    if options.how == "eva":
        found = input_covariances(model, targets, seeds, batch_size=batch_size, progress=progress)
        return ways.eva(found, targets, rank, scale), {"A": f"{scale:g} × orthonormal"}
    gradients, loss = mean_gradients(model, targets, seeds, batch_size=batch_size, progress=progress)
    if options.how == "lora-ga":
        return ways.lora_ga(gradients, targets, rank, seed), {}
    pairs, first = ways.spectral(gradients, loss, targets, rank, scale, seed)
    sizes, beyond = ([first * step for step in steps] for steps in (ways.STEPS, ways.BEYOND))
    alpha, losses = best_scale(
        model, pairs, seeds, alphas=sizes, beyond=beyond, batch_size=batch_size, progress=progress
    )
    if alpha == 0:
        raise PktError(
            f"a spectral step makes the loss on the seeds ({losses['0']:.3f}) worse at every size tried; start from --how lora"
        )
    kept = {name: Pair(pair.A, alpha * pair.B, pair.kind) for name, pair in pairs.items()}
    return kept, {
        "step": f"α = {alpha:.3g}; loss on the seeds {losses['0']:.3f} before, {losses[f'{alpha:g}']:.3f} after; {tried(losses)}"
    }


def rows_for(seeds: Seeds | str | Path, student: Any, tokenizer: Any, today: datetime.date | None = None) -> Seeds:
    """The seeds, read with the student's tokenizer unless they are read already. today: the day that templates print."""
    if isinstance(seeds, Seeds):
        return seeds
    if tokenizer is None and isinstance(student, nn.Module):
        raise PktError("a student in memory needs its tokenizer to read the seeds; pass tokenizer=")
    return load_seeds(seeds, load_tokenizer(student) if tokenizer is None else tokenizer, today=today)
