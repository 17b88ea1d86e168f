"""`pkt sensitivity`: a checkpoint's scores on the rows of a file, a layer at a time, into a file of their own."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pkt.files import check_output_file, followed, os_errors
from pkt.models import Model
from pkt.options import Execution, Limits, Loss, Reading
from pkt.ranks import Ranks
from pkt.scoring import FORMAT, Sensitivity
from pkt.streaming import NotLayeredError
from pkt.transferring.job import ScoringJob, SeedsLike, day_of
from pkt.transferring.reader import Listeners, Reader, activations_folder, identify, score_whole, working_folder


def score_checkpoint(
    teacher: str | Path,
    seeds: str | Path,
    out: str | Path,
    *,
    tile: int | None = None,
    measure: str = "theta_grad",
    loss: Loss = "answer",
    max_length: int = 2048,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    device_memory: int | str | None = None,
    host_memory: int | str | None = None,
    scratch: str | Path | None = None,
    listeners: Listeners = Listeners(),  # noqa: B008  # frozen
    resume: bool = True,
    group: Any = None,
) -> Sensitivity | None:
    """`pkt.sensitivity` of a checkpoint that need not fit in the memory, nor its scores: both come a layer at a time.

    The scores are written to `out`, and those returned are read from there when they are used. The same call continues an
    interrupted one. device_memory, host_memory, scratch, group: as in `pkt.transfer`. resume: go on from an unfinished run. Raises
    one `PktError` for anything that can be known to fail before the weights are read.
    """
    ranks = Ranks.of(group)
    if not ranks.first:
        listeners = Listeners(progress=False)
    with ranks.together():
        out = followed(check_output_file(out, FORMAT) if ranks.first else out)
        job = ScoringJob(
            Model.of(teacher),
            {"": seeds},
            None,
            reading=Reading(loss, max_length),
            execution=Execution(batch_size, device, dtype),
            limits=Limits(device_memory, host_memory, scratch),
            measure=measure,
            tile=tile,
            today=ranks.first_of(lambda: day_of(out) if resume else None),
        )
        identify(job, ranks, progress=listeners.progress)
        with working_folder(out, job, fresh=not resume, ranks=ranks) as (folder, activations):
            try:
                with Reader(job, {}, folder, activations, listeners, ranks).reading():
                    pass
            except NotLayeredError as error:
                for _ in score_whole(job, folder, listeners, str(error), tile=tile, ranks=ranks):
                    pass
            if folder is not None:
                with os_errors(f"writing {out}"):
                    os.replace(folder.scores_file(0), out)
        ranks.all_of(None)
    return Sensitivity.load(out) if ranks.first else None


def read_scores(
    teacher: Any,
    seeds: SeedsLike,
    take: Callable[[Mapping[str, Tensor]], None],
    *,
    tokenizer: Any = None,
    reading: Reading = Reading(),  # noqa: B008  # frozen
    execution: Execution = Execution(),  # noqa: B008
    limits: Limits = Limits(),  # noqa: B008
    listeners: Listeners = Listeners(),  # noqa: B008
) -> dict[str, Any]:
    """Hand S of a teacher's parameters to `take`, a layer at a time; nothing of them is kept. Returns what the seeds were.

    Each parameter comes once. An interrupted call begins anew.
    """
    job = ScoringJob(Model.of(teacher), {"": seeds}, tokenizer, reading=reading, execution=execution, limits=limits)
    job.keeps = False
    told = dataclasses.replace(listeners, on_scores=lambda _, scores: take(scores))
    with activations_folder(job) as activations:
        try:
            with Reader(job, {}, None, activations, told).reading():
                pass
        except NotLayeredError as error:
            for _ in score_whole(job, None, told, str(error)):
                pass
    return job.seeds[""].describe()
