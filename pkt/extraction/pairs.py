"""Regions of a plan cut out of the teacher's matrices, and factorized into LoRA pairs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pkt.adapters import Pair
from pkt.errors import PktError, short_list
from pkt.extraction.factorization import BATCH, SETTLED, Factors, enough_memory, factorize_all
from pkt.extraction.result import Extraction
from pkt.manifest import versions
from pkt.models import Model, ModelSpec, check_identity, spec_of
from pkt.options import Factorization, Split, Svd
from pkt.planning import Entry, Region, TransferPlan, by_expert, source_names
from pkt.progress import bar


def assemble(entries: Sequence[Entry], matrix_of: Callable[[Entry], Tensor]) -> Tensor:
    """A matrix [out, in] of a target from all its entries; a view of the teacher's for a single window that is all of it."""
    first = entries[0]
    if len(entries) == 1 and first.place is None:
        return first.region.cut(matrix_of(first))
    whole: Tensor | None = None
    for entry in entries:
        piece = entry.region.cut(matrix_of(entry))
        if whole is None:
            whole = torch.zeros(entry.target_shape, dtype=piece.dtype, device=piece.device)
        if entry.place is None:
            whole.copy_(piece)
        else:
            entry.place.put(whole, piece)
    assert whole is not None
    return whole


def lora_matrix(entries: Sequence[Entry], matrix_of: Callable[[Entry], Tensor]) -> Tensor:
    """What B A of a target's pair stands for: its matrix; LoRA writes an embedding [vocabulary, d] as (B A)ᵀ."""
    matrix = assemble(entries, matrix_of)
    return matrix.t() if entries[0].kind == "embedding" else matrix


def check_extraction(plan: TransferPlan, teacher: ModelSpec, options: Factorization) -> None:
    """Everything about an extraction that can be refused without reading a weight."""
    check_identity(plan.teacher, teacher, "the plan")
    sources = teacher.by_module()
    faults = [] if plan.entries else ["it has no regions"]
    for entry in plan.entries:
        source = sources.get(entry.source)
        if source is None or (entry.expert is None) == bool(source.experts):
            faults.append(f"{entry.source}: the teacher has no such matrix")
        elif not 0 <= (entry.expert or 0) < max(1, source.experts):
            faults.append(f"{entry.source}: the teacher has no expert {entry.expert}")
        elif not _lies_in(entry.region, source.shape) or not _lies_in(entry.place, entry.target_shape):
            faults.append(f"{entry.source} {list(source.shape)}: its region for {entry.target} does not lie in it")
        elif options.energy is None and options.rank > min(entry.target_shape):
            smaller = min(entry.target_shape)
            faults.append(f"{entry.target} {list(entry.target_shape)}: rank {options.rank} is above {smaller}")
    if faults:
        listed = short_list(list(dict.fromkeys(faults)))
        raise PktError(f"this plan cannot be extracted: {listed}; make it again with `pkt plan`, or lower the rank")


def check_targets(plan: TransferPlan, student: ModelSpec) -> None:
    """Refuse a plan made for another student, or that feeds what this one does not have, or not in that shape."""
    check_identity(_shape_of(plan.student), student, "the plan")
    targets = student.by_module()
    faults = []
    for entry in plan.entries:
        target, experts = targets.get(entry.target), entry.target_expert
        if target is None:
            faults.append(f"{entry.target}: {student.name} has no such matrix")
        elif target.doubt or target.unadaptable:
            faults.append(f"{entry.target} of {student.name}: {target.doubt or target.unadaptable}")
        elif entry.kind != target.kind or (experts[1] if experts else 0) != target.experts:
            faults.append(f"{entry.target}: {student.name} has a matrix of another kind there")
        elif entry.target_shape != target.shape or (experts and not 0 <= experts[0] < experts[1]):
            faults.append(f"{entry.target}: the plan has {list(entry.target_shape)}, the student {list(target.shape)}")
    if faults:
        listed = short_list(list(dict.fromkeys(faults)))
        raise PktError(f"this plan does not fit {student.name}: {listed}; make it again with `pkt plan`")


def _shape_of(recorded: dict[str, Any]) -> dict[str, Any]:
    """An identity without the weights': a student may have been trained since, and is none the less the student."""
    return {key: value for key, value in recorded.items() if key not in ("fingerprint", "configuration")}


def _lies_in(region: Region | None, shape: tuple[int, int]) -> bool:
    try:
        return region is None or region.lies_in(shape)
    except (TypeError, ValueError):
        return False


def factorize_targets(
    targets: Mapping[str, Sequence[Entry]], matrix_of: Callable[[Entry], Tensor], options: Factorization
) -> dict[str, tuple[Pair, float, float]]:
    """The pair of each target, by its name, its energy, and how unsettled it is; `factorize` says what is raised.

    Every expert of a target is a factorization of its own; one that nothing feeds, or of a smaller rank, is filled up with
    zeros.
    """
    pieces = [(target, slot, mine) for target in targets for slot, mine in by_expert(targets[target]).items()]
    found: dict[str, dict[int, Factors]] = {target: {} for target in targets}
    for first in range(0, len(pieces), BATCH):
        some = pieces[first : first + BATCH]
        names = [source_names(mine) for _, _, mine in some]
        factors = factorize_all([lora_matrix(mine, matrix_of) for _, _, mine in some], names, options)
        for (target, slot, _), made in zip(some, factors, strict=True):
            found[target][slot] = made
    return {target: _joined(targets[target][0], made) for target, made in found.items()}


def _joined(entry: Entry, found: Mapping[int, Factors]) -> tuple[Pair, float, float]:
    first, unsettled = next(iter(found.values())), max(made.unsettled for made in found.values())
    if entry.target_expert is None:
        return Pair(first.A, first.B, entry.kind), first.energy, unsettled
    experts, rank = entry.target_expert[1], max(made.rank for made in found.values())
    a, b = first.A.new_zeros(experts, rank, first.A.shape[1]), first.B.new_zeros(experts, len(first.B), rank)
    for slot, made in found.items():
        a[slot, : made.rank], b[slot, :, : made.rank] = made.A, made.B
    return Pair(a, b, entry.kind), sum(made.energy for made in found.values()) / len(found), unsettled


def extract(
    teacher: Any,
    plan: TransferPlan,
    *,
    student: Any = None,
    rank: int = 16,
    max_rank: int = 64,
    energy: float | None = None,
    split: Split = "b",
    seed: int = 0,
    svd: Svd = "fast",
    progress: bool = True,
    provenance: dict[str, Any] | None = None,
) -> Extraction:
    """Cut the plan's regions out of `teacher` (a model or a checkpoint directory) and factorize each (docs/method.md §4).

    rank: for every matrix; energy: instead, the smallest rank that catches this share of each region's squared norm, up to
    max_rank. svd: "fast", four steps of a randomized iteration, which leave the directions of flat spectra unsettled (the result
    says so); "adaptive", as many as settle them; "exact", LAPACK's. A checkpoint is read one layer at a time. Raises `PktError`
    naming the module for a rank above its size and for weights that are not finite; with `student` (a model, its configuration or
    its directory), also for what it does not have in the plan's shape.
    """
    if not isinstance(plan, TransferPlan):
        raise PktError(
            f"a plan is needed, not {type(plan).__name__}; make one with pkt.plan, or TransferPlan.from_json"
        )
    model = Model.of(teacher, "a teacher (a model, or the path of its checkpoint)")
    options = Factorization(rank, max_rank, energy, split, seed, svd)
    spec = model.identified(progress=progress)
    check_extraction(plan, spec, options)
    if student is not None:
        check_targets(plan, spec_of(student))
    sources = spec.by_module()
    pairs: dict[str, Pair] = {}
    energies: dict[str, float] = {}
    unsettled: dict[str, float] = {}
    targets = plan.by_target()

    def matrix_of(entry: Entry) -> Tensor:
        source = sources[entry.source]
        return source.oriented(model.tensor(source.parameter), entry.expert)

    with bar("factorizing", len(targets), unit="matrices", shown=progress) as advance:
        for _, group in itertools.groupby(targets, lambda target: sources[targets[target][0].source].layer):
            layer = {target: targets[target] for target in group}
            with enough_memory(", ".join(source_names(entries) for entries in layer.values())):
                found = factorize_targets(layer, matrix_of, options)
            pairs |= {target: pair for target, (pair, _, _) in found.items()}
            energies |= {target: caught for target, (_, caught, _) in found.items()}
            unsettled |= {target: share for target, (_, _, share) in found.items() if share > SETTLED}
            advance(len(pairs))
    details = {
        "factorization": options.as_dict(),
        "teacher": spec.identity(),
        "versions": versions(),
        **({"unsettled": unsettled} if unsettled else {}),
        **({"seeds": plan.seeds} if plan.seeds else {}),
    }
    return Extraction(pairs, energies, plan, {**details, **(provenance or {})})
