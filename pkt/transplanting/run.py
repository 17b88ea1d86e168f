"""The transplant: lineage, the teacher's change on the student's units, its factors, and how much of it is kept.

The teacher and its base are read a layer at a time. With an output folder every finished layer is a checkpoint in a hidden
folder beside it; the same command continues there after any interruption and ends with the same bytes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pkt.adapters import Pair
from pkt.errors import PktError
from pkt.extraction.result import versions
from pkt.extraction.start import Start
from pkt.files import atomic_file, check_output_folder, read_json, safetensors_header, write_tensors
from pkt.matching import Cutter, Lineage, Matrices, lineage
from pkt.models import Target, fingerprint, load_model, load_tokenizer
from pkt.progress import bar
from pkt.seeds import Seeds, load_seeds
from pkt.starting import best_scale
from pkt.transferring.checkpoints import RunFolder
from pkt.transplanting.content import Content, Delta, open_content, pairs_of


@dataclass(frozen=True)
class Options:
    """What makes the bytes of a transplant, beside its inputs."""

    rank: int = 32
    seed: int = 0
    anyway: bool = False

    def check(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise PktError(f"rank={self.rank!r} must be a whole number of at least 1")


def transplant(
    teacher: Any,
    student: Any,
    seeds: Seeds | str | Path,
    *,
    base: Any = None,
    adapter: str | Path | None = None,
    out: str | Path | None = None,
    rank: int = 32,
    found: Lineage | str | Path | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    anyway: bool = False,
    force: bool = False,
    resume: bool = True,
    progress: bool = True,
) -> Start:
    """Put what `teacher` learnt into `student`, which descends from the teacher's base, as a LoRA that is kept.

    teacher, student: checkpoint directories or models in memory; seeds: rows of the task, read with the student's tokenizer;
    they only choose the scale. base: the model that the teacher was tuned from, and its delta W_teacher − W_base is taken;
    adapter: a LoRA of `teacher`, which is then the base itself; neither: the difference to the student, which undoes what
    the student became since it was cut. found: a lineage made before. The result's W + BA is at the scale α of
    {0, ¼, ½, ¾, 1, 1½} with the smallest loss on the seeds; α = 0 is an error that says not to transplant.

    Raises `PktError` for models without lineage (go on with anyway=True), a base or adapter of another model, a teacher that
    changed nothing, and anything that cannot be read, before the work.
    """
    options = Options(rank, seed, anyway)
    options.check()
    if base is not None and adapter is not None:
        raise PktError("give either the base or the teacher's adapter: with an adapter the teacher is the base")
    if out is not None:
        check_output_folder(Path(out), force=force or resume)
    rows = _rows(seeds, student, tokenizer)
    old, new = Matrices(teacher), Matrices(student)
    kin = _lineage(teacher, student, old, new, found, options, progress)
    content = open_content(Cutter(kin, old, new), base=base, adapter=adapter)
    with _checkpoints(out, fresh=force or not resume) as steps:
        steps.bind(_inputs(teacher, student, base, adapter, rows, kin, options))
        pairs, energies = _pairs(content, new, options, steps, progress)
        if not pairs:
            raise PktError(_nothing(content))
        model = student if isinstance(student, nn.Module) else load_model(student, dtype=torch.float32)
        alpha, losses = best_scale(model, pairs, rows, progress=progress)
        if alpha == 0 and not anyway:
            told = ", ".join(f"α = {a}: {loss:.3f}" for a, loss in losses.items())
            raise PktError(
                f"every scale of the change makes the student worse on the seeds ({told}): do not transplant; train a plain "
                "LoRA instead"
            )
        start = _scaled(pairs, energies, alpha or 1.0, new, content, kin, losses, rows, options, teacher, base, adapter)
        if out is not None:
            start.save(out, force=True)
            kin.save(Path(out) / "lineage.json")
    return start


def _rows(seeds: Seeds | str | Path, student: Any, tokenizer: Any) -> Seeds:
    if isinstance(seeds, Seeds):
        return seeds
    if tokenizer is None:
        if isinstance(student, nn.Module):
            raise PktError("a student in memory needs its tokenizer to read the seeds; pass tokenizer=")
        tokenizer = load_tokenizer(student)
    return load_seeds(seeds, tokenizer)


def _lineage(
    teacher: Any, student: Any, old: Matrices, new: Matrices, found: Any, options: Options, progress: bool
) -> Lineage:
    """The given lineage, checked, or one made now. Refuses a pair without one."""
    if isinstance(found, (str, Path)):
        found = Lineage.load(found)
    if found is None:
        found = lineage(teacher, student, seed=options.seed, progress=progress)
    found.check(old, new)
    if not found.kin and not options.anyway:
        raise PktError(
            f"{found}\nthere is nothing to transplant between these models: train a plain LoRA, or make a student that descends "
            "from the teacher's base; --anyway goes on all the same"
        )
    return found


class _NoSteps:
    """Checkpoints of a run that writes nothing."""

    path: Path | None = None

    def bind(self, inputs: dict[str, Any]) -> None:
        pass


@contextmanager
def _checkpoints(out: str | Path | None, *, fresh: bool) -> Iterator[Any]:
    if out is None:
        yield _NoSteps()
        return
    with RunFolder.locked(Path(out), fresh=fresh) as folder:
        yield folder


def _inputs(
    teacher: Any, student: Any, base: Any, adapter: Any, rows: Seeds, kin: Lineage, options: Options
) -> dict[str, Any]:
    named = {"teacher": teacher, "student": student, "base": base}
    weights = {f"{name}'s weights": fingerprint(model) for name, model in named.items() if model is not None}
    return {
        "kind": "transplant",
        **weights,
        "adapter": None if adapter is None else _adapter_stamp(Path(adapter)),
        "seeds": rows.fingerprint,
        "lineage": [kin.hidden, kin.layers],
        **{f"option {k}": v for k, v in options.__dict__.items()},
        "versions": versions(),
    }


def _adapter_stamp(folder: Path) -> str:
    from pkt.files import sha256

    file = folder / "adapter_model.safetensors"
    return sha256(file.read_bytes()) if file.is_file() else str(folder)


def _pairs(
    content: Content, new: Matrices, options: Options, steps: Any, progress: bool
) -> tuple[dict[str, Pair], dict[str, float]]:
    """The pairs of every matrix, a layer at a time, each layer a checkpoint."""
    parts: dict[int, list[Target]] = {}
    for target in new.spec.targets:
        if content.cutter.roles(target):
            parts.setdefault(-1 if target.layer is None else target.layer, []).append(target)
    pairs: dict[str, Pair] = {}
    energies: dict[str, float] = {}
    with bar("cutting", len(parts) if progress else 0, unit="layers") as advance:
        for done, (layer, targets) in enumerate(sorted(parts.items()), 1):
            file = None if steps.path is None else steps.path / f"step-{layer + 1:04d}.safetensors"
            if file is not None and file.is_file():
                made = _read_step(file, targets)
            else:
                made = pairs_of(content, targets, options.rank, options.seed)
                if file is not None:
                    _write_step(file, made)
                    steps.steps.append(file.name)
            pairs |= {name: pair for name, (pair, _) in made.items()}
            energies |= {name: energy for name, (_, energy) in made.items()}
            if progress:
                advance(done)
    return pairs, energies


def _write_step(file: Path, made: dict[str, tuple[Pair, float]]) -> None:
    tensors = {f"{name}.{side}": getattr(pair, side) for name, (pair, _) in made.items() for side in "AB"}
    with atomic_file(file) as scratch:
        write_tensors(scratch, tensors, ("pkt", json.dumps({name: energy for name, (_, energy) in made.items()})))


def _read_step(file: Path, targets: list[Target]) -> dict[str, tuple[Pair, float]]:
    energies = json.loads(safetensors_header(file)["__metadata__"]["pkt"])
    tensors = load_file(str(file))
    kinds = {t.module: t.kind for t in targets}
    return {n: (Pair(tensors[f"{n}.A"], tensors[f"{n}.B"], kinds[n]), e) for n, e in energies.items()}


def _nothing(content: Content) -> str:
    if content.kind == "difference":
        return "the student is the teacher on its own units already: there is nothing to transplant"
    return "the teacher and its base have the same weights: there is nothing to transplant"


def _scaled(
    pairs: dict[str, Pair],
    energies: dict[str, float],
    alpha: float,
    new: Matrices,
    content: Content,
    kin: Lineage,
    losses: dict[str, float],
    rows: Seeds,
    options: Options,
    teacher: Any,
    base: Any,
    adapter: Any,
) -> Start:
    """The folder's value: α shared out over both factors, and all that a reader needs to know."""
    root = math.sqrt(alpha)
    scaled = {name: Pair(pair.A * root, pair.B * root, pair.kind) for name, pair in pairs.items()}
    left = left_out(content, new, pairs)
    told = {
        "teacher": content.cutter.old.spec.name,
        "content": {"delta": "what the teacher learnt since its base", "adapter": "the teacher's own LoRA, cut",
                    "difference": "the difference to the teacher: it undoes the student's own training since"}[content.kind],
        "lineage": f"{kin.verdict}: {kin.reason}",
        "kept at": f"α = {alpha:g}; loss on the seeds {losses['0']:.3f} before, {losses[f'{alpha:g}']:.3f} after",
        "seeds": f"{len(rows)} samples, fingerprint {rows.fingerprint[:16]}",
    }  # fmt: skip
    provenance = {
        "content": content.kind,
        "base": None if base is None else str(getattr(base, "name_or_path", base)),
        "adapter": None if adapter is None else str(adapter),
        "teacher": {**content.cutter.old.spec.identity(), "fingerprint": fingerprint(teacher)},
        "lineage": {"verdict": kin.verdict, "reason": kin.reason, "evidence": [e.__dict__ for e in kin.evidence]},
        "alpha": alpha,
        "losses": losses,
        "seeds": {"source": rows.source, "count": len(rows), "tokens": rows.tokens, "fingerprint": rows.fingerprint},
        "options": options.__dict__,
        "left_out": left,
        "told": told,
        "versions": versions(),
    }
    return Start("transplant", scaled, new.spec.identity(), "add", energies, provenance)


def left_out(content: Content, new: Matrices, pairs: dict[str, Pair]) -> dict[str, float]:
    """What a LoRA of matrices cannot hold, norms and biases, with the norm of its change; and matrices nothing feeds, 0."""
    found = {t.module: 0.0 for t in new.spec.targets if t.module not in pairs and not content.cutter.roles(t)}
    if isinstance(content, Delta):
        for name, shape in new.shapes.items():
            change = content.cutter.vector(name, content.vector) if len(shape) == 1 else None
            if change is not None and bool((change != 0).any()):
                found[name] = float(change.norm())
    return found
