"""The first half of the work in one call: seeds, sensitivity, plan and extraction, everything checked before it starts.

The teacher is scored part by part (`pkt.streaming.engine`). As soon as a part's scores are complete its regions are chosen and
factorized, and the scores are forgotten (`pkt.transferring.extractor`).

With an output folder, every finished part is a checkpoint in a hidden folder beside it (`.NAME.run`, see `checkpoints`), bound to
the inputs. The same command continues there after any interruption and ends with the same bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pkt.errors import PktError
from pkt.extraction import Extraction, extract
from pkt.models import Model, read_roles
from pkt.options import Execution, Factorization, KeepScores, Limits, Loss, PlanOptions, Reading, Select, Split, Svd
from pkt.planning import Chooser, ModuleMap, TransferPlan, read_map
from pkt.ranks import Ranks
from pkt.streaming import MemoryPlan, NotLayeredError, Tick
from pkt.transferring.checkpoints import RunFolder
from pkt.transferring.extractor import Extractor
from pkt.transferring.job import Recipe, Result, SeedsLike, TransferJob, day_of
from pkt.transferring.reader import (
    Listeners,
    Losses,
    Reader,
    WeightsOf,
    activations_folder,
    identify,
    score_whole,
    working_folder,
)


def transfer(
    teacher: Any,
    student: Any,
    seeds: SeedsLike | Mapping[str, SeedsLike],
    *,
    out: str | Path | None = None,
    resume: bool = True,
    tokenizer: Any = None,
    layers: str | Sequence[int] = "sensitivity",
    select: Select = "window",
    modules: str = "all",
    align_heads: bool = False,
    module_map: ModuleMap | None = None,
    partial: bool = False,
    map_vocabulary: bool | tuple[Any, Any] = False,
    roles: Any = None,
    rank: int = 16,
    max_rank: int = 64,
    energy: float | None = None,
    split: Split = "b",
    svd: Svd = "fast",
    loss: Loss = "answer",
    max_length: int = 2048,
    batch_size: int = 8,
    seed: int = 0,
    force: bool = False,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    device_memory: int | str | None = None,
    host_memory: int | str | None = None,
    scratch: str | Path | None = None,
    keep_scores: KeepScores = "none",
    prefetch: bool = True,
    progress: bool = True,
    on_memory: Callable[[MemoryPlan], None] | None = None,
    on_plan: Callable[[TransferPlan], None] | None = None,
    on_tick: Callable[[Tick], None] | None = None,
    group: Any = None,
) -> Any:
    """Score the teacher on the seeds one layer at a time, plan, extract; write the extraction folder to `out` if given.

    teacher: a checkpoint directory or a model (then pass its tokenizer); student: a directory, configuration or model;
    seeds: a JSONL file or `Seeds`; or several by task name, and then a dictionary of extractions is returned and each is
    written to `out`/name, all from one reading of the teacher. With `resume`, an unfinished run of the same inputs and
    options continues, and a finished `out` is returned as it is. device_memory, host_memory: limits in bytes or as "16GB"
    (default: what is free); scratch: a folder for activations that fit in neither. keep_scores: also write the scores, or
    their tile sums, to `out`/scores.safetensors, for `pkt.plan` with other options. batch_size: samples at once, at most.
    map_vocabulary: True, or both tokenizers (teacher's, student's). The other arguments are those of `pkt.load_seeds`,
    `pkt.plan` and `pkt.extract`.

    on_memory is told what will be used before any weight is read; on_tick of each finished layer; on_plan of each plan.
    group: of torch.distributed, whose ranks all make this call and share the seeds out; the first one writes, is told, and gets the
    result, the others None (docs/scaling.md).

    Raises one `PktError` for anything that can be known to fail before the teacher's weights are read.
    """
    options = PlanOptions(
        layers=layers,
        select=select,
        modules=modules,
        align_heads=align_heads,
        module_map=read_map(module_map),
        partial=partial,
        map_vocabulary=map_vocabulary is not False,
        roles=None if roles is None else read_roles(roles),
        seed=seed,
    )
    several = isinstance(seeds, Mapping)
    found = transfer_recipes(
        teacher,
        student,
        seeds if isinstance(seeds, Mapping) else {"": seeds},
        {"": Recipe(options, Factorization(rank, max_rank, energy, split, seed, svd))},
        out=out,
        resume=resume,
        force=force,
        tokenizer=tokenizer,
        map_vocabulary=map_vocabulary,
        reading=Reading(loss, max_length),
        execution=Execution(batch_size, device, dtype),
        limits=Limits(device_memory, host_memory, scratch, prefetch),
        keep_scores=keep_scores,
        listeners=Listeners(progress, on_memory, on_plan, on_tick),
        group=group,
    )
    if not found:
        return None
    return {task: ext for (task, _), ext in found.items()} if several else found["", ""]


def transfer_recipes(
    teacher: Any,
    student: Any,
    seeds: Mapping[str, SeedsLike],
    recipes: Mapping[str, Recipe],
    *,
    only: Collection[Result] | None = None,
    out: str | Path | None = None,
    resume: bool = True,
    force: bool = False,
    tokenizer: Any = None,
    map_vocabulary: bool | tuple[Any, Any] = False,
    reading: Reading = Reading(),  # noqa: B008  # frozen
    execution: Execution = Execution(),  # noqa: B008
    limits: Limits = Limits(),  # noqa: B008
    keep_scores: KeepScores = "none",
    listeners: Listeners = Listeners(),  # noqa: B008
    group: Any = None,
) -> dict[Result, Extraction]:
    """`transfer` of several tasks by several recipes, all from one reading of the teacher: the extraction of each (task, recipe).

    Each has the bytes it has alone. They are written to `out`/task/recipe; one task or one recipe alone may be named "" and then
    has no folder of its own. Scores that are kept lie in `out`/task. only: the pairs that are wanted; default: all of them.
    map_vocabulary: True, or both tokenizers, for the recipes whose options say so. On all ranks of a group but the
    first there are none.
    """
    ranks, out = Ranks.of(group), None if out is None else Path(out)
    if not ranks.first:
        listeners = Listeners(progress=False)
    with ranks.together():
        kept = out if resume and not force else None
        today = ranks.first_of(lambda: None if kept is None else day_of(kept, itertools.product(seeds, recipes)))
        job = TransferJob(
            Model.of(teacher, "a teacher (a model, or the path of its checkpoint)"),
            Model.of(student, "a student (a model, or the path of its checkpoint)"),
            seeds,
            recipes,
            tokenizer,
            map_vocabulary=map_vocabulary,
            reading=reading,
            execution=execution,
            limits=limits,
            keep_scores=keep_scores,
            only=only,
            today=today,
        )
        identify(job, ranks, progress=listeners.progress)
        if out is not None:
            found = _into(out, job, listeners, ranks, resume=resume, force=force)
        elif job.keeps:
            raise PktError(f"keep_scores={keep_scores!r} needs an output folder to keep them in; pass out=")
        else:
            with activations_folder(job) as activations:
                found = _extractions(job, None, activations, listeners, ranks)
        # No rank goes before the first one has written.
        ranks.all_of(None)
    return found


def _into(
    out: Path, job: TransferJob, listeners: Listeners, ranks: Ranks, *, resume: bool, force: bool
) -> dict[Result, Extraction]:
    """The extractions of a job in its folder: those that are there already, or made, going on from an unfinished run."""
    finished = job.finished(out) if resume and not force and ranks.first else None
    if ranks.first_of(lambda: finished is not None):
        return finished or {}
    if ranks.first:
        job.check_output(out, force=force)
    with working_folder(out, job, fresh=force or not resume, ranks=ranks) as (folder, activations):
        extractions = _extractions(job, folder, activations, listeners, ranks)
        if folder is not None:
            job.save(extractions, out, folder, force=force)
    return extractions


def _extractions(
    job: TransferJob, folder: RunFolder | None, activations: Path, listeners: Listeners, ranks: Ranks
) -> dict[Result, Extraction]:
    extractors = {
        (task, recipe): Extractor(job.pairings[recipe], job.recipes[recipe].factorization, ranks)
        for task, recipe in job.results
    }
    try:
        with Reader(job, extractors, folder, activations, listeners, ranks).reading() as (losses, weights_of):
            found = _finish(job, extractors, losses, weights_of, listeners)
    except NotLayeredError as error:
        found = _from_whole(job, folder, listeners, str(error), ranks)
    return found if ranks.first else {}


def _finish(
    job: TransferJob,
    extractors: Mapping[Result, Extractor],
    losses: Losses,
    weights_of: WeightsOf,
    listeners: Listeners,
) -> dict[Result, Extraction]:
    found, tasks = {}, list(job.seeds)
    for result, extractor in extractors.items():
        made, pairs, energies = extractor.finish(weights_of)
        if listeners.on_plan is not None:
            listeners.on_plan(made)
        task = tasks.index(result[0])
        provenance = {**job.provenance(result), "losses": job.losses(task, losses[task])}
        if extractor.unsettled:
            provenance["unsettled"] = extractor.unsettled
        found[result] = Extraction(pairs, energies, made, provenance)
    return found


def _from_whole(
    job: TransferJob, folder: RunFolder | None, listeners: Listeners, why: str, ranks: Ranks
) -> dict[Result, Extraction]:
    found: dict[Result, Extraction] = {}
    for task, model, sens in score_whole(job, folder, listeners, why, ranks=ranks):
        if not ranks.first:
            continue
        for recipe, how in job.recipes.items():
            if (task, recipe) not in job.results:
                continue
            made = Chooser(job.pairings[recipe]).plan(sens)
            if listeners.on_plan is not None:
                listeners.on_plan(made)
            # sens.losses stand in the file's order already.
            provenance = {**job.provenance((task, recipe)), "losses": sens.losses}
            found[task, recipe] = extract(
                model, made, **how.factorization.as_dict(), progress=listeners.progress, provenance=provenance
            )
    return found
