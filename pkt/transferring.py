"""The first half of the work in one call: seeds, sensitivity, plan and extraction, everything checked before it starts."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from pkt.errors import PktError
from pkt.extraction import Extraction, extract
from pkt.factorization import Split, check_rank
from pkt.models import ModelSpec, check_checkpoint, check_tokenizer, load_model, load_tokenizer, spec_of
from pkt.planning import TransferPlan, check_options, pair_targets, plan
from pkt.scoring import Sensitivity, sensitivity
from pkt.seeds import Seeds, load_seeds
from pkt.selection import Strategy, select_layers
from pkt.storage import check_output_folder


def score_seeds(
    teacher: Any, seeds: Seeds, *, batch_size: int = 8, tile: int | None = None, progress: bool = True
) -> Sensitivity:
    """`pkt.sensitivity` of a model on seeds, with what the scores were made from recorded in them."""
    if batch_size < 1:
        raise PktError(f"batch_size={batch_size} must be at least 1")
    spec = spec_of(teacher)
    seeds.check_vocabulary(spec.vocab_size, spec.name)
    # Samples of like length share a batch, so that little is padding; S does not depend on it.
    order = sorted(range(len(seeds)), key=lambda i: -len(seeds[i].input_ids))
    ordered = Seeds([seeds[i] for i in order], seeds.source, seeds.pad_id)
    try:
        sens = sensitivity(teacher, ordered.batches(batch_size), tile=tile, progress=progress)
    except PktError as error:
        raise PktError(_in_file(str(error), seeds, order)) from error
    losses = [0.0] * len(seeds)
    for place, loss in zip(order, sens.losses, strict=True):
        losses[place] = loss
    sens.losses = losses
    sens.provenance = {"seeds": describe_seeds(seeds), "teacher": spec.identity()}
    return sens


def _in_file(message: str, seeds: Seeds, order: Sequence[int]) -> str:
    """Name the file and line of the sample an error speaks of."""

    def line(match: re.Match[str]) -> str:
        return f"{seeds.source}:{seeds[order[int(match[1])]].line}"

    return re.sub(r"\bsample (\d+)", line, message, count=1)


def describe_seeds(seeds: Seeds) -> dict[str, Any]:
    return {"source": seeds.source, "count": len(seeds), "tokens": seeds.tokens, "fingerprint": seeds.fingerprint}


def check_transfer(
    teacher: ModelSpec,
    student: ModelSpec,
    *,
    layers: str | Sequence[int],
    modules: str,
    align_heads: bool,
    rank: int,
    energy: float | None,
) -> None:
    """Refuse a pair of models that no plan can join, before the teacher is loaded."""
    pairs, _ = pair_targets(teacher, student, modules=modules, align_heads=align_heads)
    if not isinstance(layers, str) or layers != "sensitivity":
        select_layers(layers, teacher.num_layers, student.num_layers, None)
    if energy is None:
        low = [f"{t.module} {list(t.shape)}" for _, t in pairs if rank > min(t.shape)]
        if low:
            raise PktError(
                f"rank {rank} is above the smaller side of {len(low)} matrices: {', '.join(low[:8])}; use a smaller rank"
            )


def transfer(
    teacher: Any,
    student: Any,
    seeds: Seeds | str | Path,
    *,
    out: str | Path | None = None,
    resume: bool = True,
    tokenizer: Any = None,
    layers: str | Sequence[int] = "sensitivity",
    select: Strategy = "window",
    modules: str = "all",
    align_heads: bool = False,
    rank: int = 16,
    max_rank: int = 64,
    energy: float | None = None,
    split: Split = "b",
    loss: Literal["answer", "all"] = "answer",
    max_length: int = 2048,
    batch_size: int = 8,
    seed: int = 0,
    force: bool = False,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    on_plan: Callable[[TransferPlan], None] | None = None,
) -> Extraction:
    """Score the teacher on the seeds, plan, extract; write the extraction folder to `out` when it is given.

    teacher: a checkpoint directory or a model (then pass its tokenizer); student: a directory, configuration or model;
    seeds: a JSONL file or `Seeds`. With `resume`, a finished `out` of the same inputs and options is returned as it is.
    The other arguments are those of `pkt.load_seeds`, `pkt.plan` and `pkt.extract`.

    Raises one `PktError` for anything that can be known to fail before the teacher's weights are read.
    """
    teacher_spec, student_spec = spec_of(teacher), spec_of(student)
    options = check_options(layers, select, modules, align_heads, None, seed)
    check_rank(rank, max_rank, energy, split)
    check_transfer(
        teacher_spec, student_spec, layers=layers, modules=modules, align_heads=align_heads, rank=rank, energy=energy
    )
    if not isinstance(teacher, nn.Module):
        check_checkpoint(teacher)
    if not isinstance(student, nn.Module) and isinstance(student, (str, Path)):
        check_checkpoint(student)
    if not isinstance(seeds, Seeds):
        if tokenizer is None:
            if isinstance(teacher, nn.Module):
                raise PktError("a teacher in memory needs its tokenizer to read the seeds; pass tokenizer=")
            tokenizer = load_tokenizer(teacher)
        check_tokenizer(tokenizer, teacher_spec)
        seeds = load_seeds(seeds, tokenizer, loss=loss, max_length=max_length)
    seeds.check_vocabulary(teacher_spec.vocab_size, teacher_spec.name)
    factorization = {"rank": rank, "max_rank": max_rank, "energy": energy, "split": split, "seed": seed}
    if out is not None:
        finished = (
            _finished(out, teacher_spec, student_spec, seeds, options, factorization) if resume and not force else None
        )
        if finished is not None:
            return finished
        check_output_folder(out, force=force)
    model = teacher if isinstance(teacher, nn.Module) else load_model(teacher, dtype=dtype)
    if device is not None:
        model = model.to(device)
    sens = score_seeds(model, seeds, batch_size=batch_size, progress=progress)
    chosen = plan(
        sens,
        teacher_spec,
        student_spec,
        layers=layers,
        select=select,
        modules=modules,
        align_heads=align_heads,
        seed=seed,
    )
    if on_plan is not None:
        on_plan(chosen)
    provenance = {"seeds": describe_seeds(seeds), "losses": sens.losses}
    ext = extract(
        model,
        chosen,
        rank=rank,
        max_rank=max_rank,
        energy=energy,
        split=split,
        seed=seed,
        progress=progress,
        provenance=provenance,
    )
    if out is not None:
        ext.save(out, force=force)
    return ext


def _finished(
    out: str | Path,
    teacher: ModelSpec,
    student: ModelSpec,
    seeds: Seeds,
    options: dict[str, Any],
    factorization: dict[str, Any],
) -> Extraction | None:
    """The extraction already in `out`, when it is of the same inputs; another one's is refused with the difference named."""
    if not (Path(out) / "pkt.json").is_file():
        return None
    ext = Extraction.load(out)
    wanted = {
        "teacher": teacher.identity(),
        "student": student.identity(),
        "seeds": seeds.fingerprint,
        "options": options,
        "factorization": factorization,
    }
    recorded = {
        "teacher": ext.plan.teacher,
        "student": ext.plan.student,
        "seeds": ext.provenance.get("seeds", {}).get("fingerprint"),
        "options": ext.plan.options,
        "factorization": ext.provenance.get("factorization"),
    }
    different = [name for name in wanted if wanted[name] != recorded[name]]
    if different:
        raise PktError(
            f"{out} holds the result of another transfer (other {', '.join(different)}); name another, or replace it with --force"
        )
    return ext
