"""The transplant: lineage, the teacher's change on the student's units, its factors, and how much of it is kept.

The teacher and its base are read a matrix at a time. With an output folder every finished layer is a checkpoint in a hidden
folder beside it; the same command continues there after any interruption and ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import nn

from pkt.adapters import Pair
from pkt.errors import PktError
from pkt.extraction import Start
from pkt.files import (
    atomic_file,
    atomic_folder,
    check_apart,
    check_output_folder,
    is_stored,
    run_path,
    safetensors_header,
    sha256,
    write_tensors,
)
from pkt.lora import write_merged
from pkt.manifest import recorded_day, versions
from pkt.matching import Cutter, Lineage, Matrices, lineage
from pkt.models import Model, Target, load_model
from pkt.models.adapter_files import CONFIG, PICKLE, WEIGHTS
from pkt.progress import bar
from pkt.seeds import Seeds
from pkt.starting import best_scale, rows_for, tried
from pkt.transferring import RunFolder
from pkt.transplanting.content import Difference, Rank, open_base, open_content, pairs_of, vectors_of, whole_pairs
from pkt.transplanting.controls import CONTROLS, MEANS, Control, noise_like, shuffled

Made = dict[str, tuple[Pair, float]]  # module -> its pair, and the share of the change that it holds


@dataclass(frozen=True)
class Options:
    """What makes the bytes of a transplant, beside its inputs."""

    rank: Rank = 32
    seed: int = 0
    anyway: bool = False
    control: Control | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.rank != "full" and (not isinstance(self.rank, int) or self.rank < 1):
            raise PktError(f"rank={self.rank!r} must be a whole number of at least 1, or 'full' for no truncation")
        if self.control is not None and self.control not in CONTROLS:
            raise PktError(f"control={self.control!r} is unknown; choose one of {', '.join(CONTROLS)}")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise PktError(f"alpha={self.alpha!r} must be above 0: it is how much of the change is kept")


@dataclass(frozen=True)
class Scale:
    """How much is kept: α, the best by the seeds (`own`), and the loss on them at each α tried."""

    alpha: float
    own: float
    losses: dict[str, float]


def transplant(
    teacher: Any,
    student: Any,
    seeds: Seeds | str | Path,
    *,
    base: Any = None,
    adapter: str | Path | None = None,
    out: str | Path | None = None,
    merge: str | Path | None = None,
    rank: Rank = 32,
    lineage: Lineage | str | Path | None = None,
    tokenizer: Any = None,
    control: Control | None = None,
    alpha: float | None = None,
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
    the student became since it was cut. lineage: one made before, of the base (to
    which the student is matched where there is one) or of the teacher. The result is W + BA at the scale α of
    {0, ¼, ½, ¾, 1, 1½} with the smallest loss on the seeds, which goes on to 2, 3 and 4 while the loss falls; a base that the
    teacher's card names and that is a folder here is taken where none is given. α = 0 is an error that says not to transplant;
    `alpha` fixes it.

    merge: also write the whole student with the change added at that α, norms and biases with it, which no LoRA of matrices
    holds. rank: of each pair; "full": no truncation. Without `out` the norms and biases take part in the choice of α.

    control: the same folder for what a transplant is held against, at the transplant's α; its own best α is recorded beside it.
    "wrong-units": the change on shuffled units; "noise": random directions with its singular values; "neutral": injected so
    that step 0 is still the student; "repruned": the teacher on the student's units, whole, at whatever rank that takes.

    Raises `PktError` for models without lineage (go on with anyway=True), a base or adapter of another model, a teacher that
    changed nothing, and anything that cannot be read, before the work.
    """
    if base is not None and adapter is not None:
        raise PktError("give either the base or the teacher's adapter: with an adapter the teacher is the base")
    _check_folders(out, merge, (teacher, student, base, adapter, seeds, lineage), control, force=force)
    named = named_base(teacher) if base is None and adapter is None else None
    if named is not None and Path(named).is_dir():
        base = named
    # Without truncation there is nothing that takes long to make again.
    place = out if out is not None or rank == "full" else merge
    today = None if place is None or force or not resume else recorded_day(run_path(Path(place)) / "run.json")
    rows = rows_for(seeds, student, tokenizer, today)
    options = Options(rank, seed, anyway, control, alpha)
    job = Job(teacher, student, base, adapter, rows, options, with_vectors=out is None and merge is not None)
    found = job.find_lineage(lineage, progress)
    content = open_content(Cutter(found, job.old, job.new), base=job.root, adapter=adapter)
    with _checkpoints(place, fresh=force or not resume) as steps:
        if steps is not None:
            steps.bind(job.inputs(found))
        made = _pairs(content, job, steps, progress)
        if not made:
            if steps is not None:
                steps.steps.clear()  # there is nothing to go on from
            raise PktError(content.nothing)
        scale = job.scale(made, content, progress)
        start = job.result(made, scale, content, found)
        if control is not None:
            start, content = job.control(start, made, content, found, progress)
        if out is not None:
            start.save(out, force=force)
            found.save(Path(out) / "lineage.json")
        if merge is not None:
            _write_merged(Path(merge), start, content, job, found, force=force)
    return start


def _check_folders(
    out: str | Path | None, merge: str | Path | None, read: tuple[Any, ...], control: str | None, *, force: bool
) -> None:
    """Refuse folders that cannot be written, and a merge that there is no student on disk or no sense for."""
    for folder in (out, merge):
        if folder is not None:
            check_output_folder(Path(folder), force=force)
    if merge is None:
        return
    if isinstance(read[1], nn.Module):
        raise PktError("a merged model is written from the student's directory; pass that, not the model in memory")
    if control not in (None, "repruned"):
        raise PktError(
            f"control={control!r} is a LoRA to be held against another; only 'repruned' makes a model of its own"
        )
    check_apart(merge, *filter(is_stored, (*read, out)))
    if out is not None:
        check_apart(merge, out)


def _write_merged(folder: Path, start: Start, content: Difference, job: Job, found: Lineage, *, force: bool) -> None:
    """The student with the start's pairs added, and what they cannot hold at the same α."""
    alpha = start.provenance["alpha"]
    vectors = {name: alpha * change for name, change in vectors_of(content, job.new).items()}
    told = {**start.provenance["told"], "added too": f"the change of {len(vectors)} norms and biases"}
    entries = {"student": job.new.spec.name, **start.provenance, "added": sorted(vectors), "told": told}
    entries["left_out"] = {name: size for name, size in start.provenance["left_out"].items() if name not in vectors}
    with atomic_folder(folder, force=force) as scratch:
        write_merged(scratch, job.student, start.pairs, entries, vectors=vectors)
        found.save(scratch / "lineage.json")


class Job:
    """The inputs of a transplant, opened: both models' matrices, the rows, the options.

    with_vectors: norms and biases are kept beside the pairs.
    """

    def __init__(
        self,
        teacher: Any,
        student: Any,
        base: Any,
        adapter: str | Path | None,
        rows: Seeds,
        options: Options,
        *,
        with_vectors: bool = False,
    ) -> None:
        self.teacher, self.student, self.base, self.adapter = teacher, student, base, adapter
        self.rows, self.options = rows, options
        self.with_vectors = with_vectors
        self.old, self.new = Matrices(teacher), Matrices(student)
        self.root = None if base is None else open_base(base, self.old)
        spec = self.new.spec
        rows.check_fits(spec.vocab_size, spec.positions, spec.name)

    def find_lineage(self, given: Lineage | str | Path | None, progress: bool) -> Lineage:
        """The given lineage, of the teacher or of its base, or one made now. Raises `PktError` for a pair without one.

        Where there is a base the student is matched to it: that is what it was cut from, and the tuning moved the teacher away.
        """
        if isinstance(given, (str, Path)):
            given = Lineage.load(given)
        if self.adapter is None and self.old.same(self.new):
            raise PktError(f"{self.new.spec.name} has the teacher's own weights: there is nothing to transplant")
        anyway = self.options.anyway
        root = self.teacher if self.base is None else self.base
        found = given or lineage(root, self.student, seed=self.options.seed, anyway=anyway, progress=progress)
        try:
            found.check(self.root or self.old, self.new)
        except PktError:
            found.check(self.old, self.new)
        if found.rotated:
            raise PktError(
                f"{self.new.spec.name} descends from {self.old.spec.name}, but its hidden units are rotated, which pkt cannot "
                "cut through: transplant into a student whose units are the teacher's own (pkt shrink makes one)"
            )
        if not found.kin and not self.options.anyway:
            raise PktError(
                f"{self.new.spec.name}: {found.verdict}: {found.reason}; there is nothing to transplant between these models: "
                "train a plain LoRA, or make a student that descends from the teacher's base; --anyway goes on all the same"
            )
        return found

    def inputs(self, found: Lineage) -> dict[str, Any]:
        """All that the bytes of a result depend on, by the names a refusal uses."""
        models = {"teacher": self.teacher, "student": self.student, "base": self.base}
        return {
            "kind": "transplant",
            **{f"{name}'s weights": _weights(model) for name, model in models.items() if model is not None},
            "adapter": None if self.adapter is None else _adapter_digest(Path(self.adapter)),
            "seeds": self.rows.fingerprint,
            **({} if self.rows.today is None else {"today": self.rows.today.isoformat()}),
            "lineage": found.fingerprint(),
            **{f"option {name}": value for name, value in self.options.__dict__.items()},
            "versions": versions(),
        }

    def scale(self, made: Made, content: Difference, progress: bool) -> Scale:
        """How much is kept, by the seeds or as asked. Raises `PktError` where all of it makes the student worse."""
        asked = self.options.alpha
        scale = self._try(made, content, asked, progress)
        if scale.own == 0 and asked is None and not self.options.anyway:
            told = ", ".join(f"α = {a}: {loss:.3f}" for a, loss in scale.losses.items())
            raise PktError(
                f"every scale of the change makes the student worse on the seeds ({told}): do not transplant; train a plain "
                "LoRA instead"
            )
        return scale

    def _try(self, made: Made, content: Difference, asked: float | None, progress: bool) -> Scale:
        pairs = {name: pair for name, (pair, _) in made.items()}
        model = self.student if isinstance(self.student, nn.Module) else load_model(self.student, dtype=torch.float32)
        vectors = vectors_of(content, self.new) if self.with_vectors else {}
        own, losses = best_scale(model, pairs, self.rows, also=asked, vectors=vectors, progress=progress)
        return Scale(asked or own or 1.0, own, losses)

    def control(
        self, kept: Start, made: Made, content: Difference, found: Lineage, progress: bool
    ) -> tuple[Start, Difference]:
        """What the transplant `kept` is held against, at its α unless asked otherwise, and its content.

        The re-pruned teacher is itself at α = 1.
        """
        kind, theirs = self.options.control, kept.provenance
        assert kind is not None
        content, others = self._others(made, content, found)
        if kind == "neutral":
            # The student is as it was at every α.
            before, alpha = theirs["losses"]["0"], theirs["alpha"]
            scale = Scale(alpha, alpha, {"0": before, f"{alpha:g}": before})
        else:
            alpha = self.options.alpha or (1.0 if kind == "repruned" else theirs["alpha"])
            scale = self._try(others, content, alpha, progress)
        start = self.result(others, scale, content, found)
        start.mode = "paired" if kind == "neutral" else "add"
        own = "0, none of it: a plain LoRA" if scale.own == 0 else f"{scale.own:g}"
        told = {"control": f"{kind}: {MEANS[kind]}", **start.provenance["told"]}
        told["best α by the seeds"] = f"the control's own {own}; the transplant's {theirs['own_alpha']:g}"
        transplanted = {name: theirs[name] for name in ("alpha", "own_alpha", "losses")}
        start.provenance |= {"control": kind, "transplant": transplanted, "told": told}
        return start, content

    def _others(self, made: Made, content: Difference, found: Lineage) -> tuple[Difference, Made]:
        """A control's content and its pairs."""
        options, targets = self.options, _fed(content)
        if options.control == "wrong-units":
            cutter = Cutter(shuffled(found, options.seed), self.old, self.new)
            content = open_content(cutter, base=self.root, adapter=self.adapter)
            return content, pairs_of(content, targets, options.rank, options.seed)
        if options.control == "repruned":
            content = Difference(content.cutter)
            return content, {name: (pair, 1.0) for name, pair in whole_pairs(content, targets).items()}
        if options.control == "noise":
            noise = noise_like({name: pair for name, (pair, _) in made.items()}, options.seed)
            return content, {name: (pair, made[name][1]) for name, pair in noise.items()}
        return content, made

    def result(self, made: Made, scale: Scale, content: Difference, found: Lineage) -> Start:
        """The folder's value: α shared out over both factors, and all that a reader needs to know."""
        alpha, losses = scale.alpha, scale.losses
        rows, old = self.rows, self.old.spec
        kept = f"α = {alpha:g}; loss on the seeds {losses['0']:.3f} before, {losses[f'{alpha:g}']:.3f} after"
        told = {
            "teacher": old.name,
            "content": content.told,
            "lineage": f"{found.verdict}: {found.reason}",
            "kept at": kept if self.options.control == "neutral" else f"{kept}; {tried(losses)}",
            "seeds": f"{len(rows)} samples, fingerprint {rows.fingerprint[:16]}",
        }
        provenance = {
            "content": content.kind,
            "base": None if self.base is None else _named(self.base),
            "adapter": None if self.adapter is None else str(self.adapter),
            "named": named_base(self.teacher),
            "teacher": self.old.model.identified().identity(),
            "lineage": {
                "verdict": found.verdict,
                "reason": found.reason,
                "evidence": [e.__dict__ for e in found.evidence],
            },
            "alpha": alpha,
            "own_alpha": scale.own,
            "losses": losses,
            "seeds": rows.describe(),
            "options": self.options.__dict__,
            "left_out": left_out(content, self.new, made),
            "told": told,
            "versions": versions(),
        }
        energies = {name: energy for name, (_, energy) in made.items()}
        return Start("transplant", _scaled(made, alpha), self.new.spec.identity(), "add", energies, provenance)


def control_of(
    kept: Start,
    kind: Literal["wrong-units", "noise"],
    seed: int,
    teacher: Any,
    student: Any,
    *,
    base: Any = None,
    adapter: str | Path | None = None,
    lineage: Lineage | str | Path,
) -> Start:
    """What `transplant` makes with this control, at the α of the transplant `kept`; no row is read and no other α tried."""
    told = {"control": f"{kind}: {MEANS[kind]}", **kept.provenance["told"]}
    options = {**kept.provenance["options"], "control": kind, "seed": seed, "alpha": kept.provenance["alpha"]}
    provenance = {**kept.provenance, "control": kind, "options": options, "told": told}
    if kind == "noise":
        return dataclasses.replace(kept, pairs=noise_like(kept.pairs, seed), provenance=provenance)
    found = lineage if isinstance(lineage, Lineage) else Lineage.load(lineage)
    old = Matrices(teacher)
    content = open_content(
        Cutter(shuffled(found, seed), old, Matrices(student)),
        base=None if base is None else open_base(base, old),
        adapter=adapter,
    )
    made = pairs_of(content, _fed(content), kept.provenance["options"]["rank"], seed)
    energies = {name: energy for name, (_, energy) in made.items()}
    pairs = _scaled(made, kept.provenance["alpha"])
    return dataclasses.replace(kept, pairs=pairs, energies=energies, provenance=provenance)


def _scaled(made: Made, alpha: float) -> dict[str, Pair]:
    """α shared out over both factors."""
    root = math.sqrt(alpha)
    return {name: Pair(pair.A * root, pair.B * root, pair.kind) for name, (pair, _) in made.items()}


def _fed(content: Difference) -> list[Target]:
    """The student's matrices that the teacher has something for."""
    return [t for t in content.cutter.new.spec.targets if content.holds(t)]


def named_base(teacher: Any) -> str | None:
    """What the teacher's own card says that it was tuned from."""
    card = None if isinstance(teacher, nn.Module) else Path(teacher) / "README.md"
    if card is None or not card.is_file():
        return None
    text = card.read_text(encoding="utf-8", errors="replace")[:20_000]
    found = re.search(r"(?m)^base_model:\s*(?:\n\s*-\s*)?[\"']?([^\s\"']+)", text)
    return None if found is None else found[1]


def _weights(model: Any) -> dict[str, str]:
    return Model.of(model).content()


def _adapter_digest(folder: Path) -> str:
    """Of the factors and of the configuration that scales them."""
    weights = folder / WEIGHTS if (folder / WEIGHTS).is_file() else folder / PICKLE
    return sha256(weights.read_bytes(), (folder / CONFIG).read_bytes())


def _named(model: Any) -> str:
    return str(
        getattr(getattr(model, "config", None), "name_or_path", model) if isinstance(model, nn.Module) else model
    )


@contextlib.contextmanager
def _checkpoints(out: str | Path | None, *, fresh: bool) -> Iterator[RunFolder | None]:
    if out is None:
        yield None
        return
    with RunFolder.locked(Path(out), fresh=fresh) as folder:
        yield folder


def _pairs(content: Difference, job: Job, steps: RunFolder | None, progress: bool) -> Made:
    """The pairs of every matrix, a layer at a time, each layer a checkpoint."""
    parts: dict[int, list[Target]] = {}
    for target in _fed(content):
        parts.setdefault(-1 if target.layer is None else target.layer, []).append(target)
    found: Made = {}
    with bar("cutting", len(parts), unit="layers", shown=progress) as advance:
        for done, (layer, targets) in enumerate(sorted(parts.items()), 1):
            file = None if steps is None else steps.path / f"step-{layer + 1:04d}.safetensors"
            if file is not None and file.is_file():
                found |= _read_step(file, targets)
            else:
                made = pairs_of(content, targets, job.options.rank, job.options.seed)
                if steps is not None and file is not None:
                    _write_step(file, made)
                    steps.steps.append(file.name)
                found |= made
            advance(done)
    return found


def _write_step(file: Path, made: Made) -> None:
    tensors = {f"{name}.{side}": getattr(pair, side) for name, (pair, _) in made.items() for side in "AB"}
    with atomic_file(file) as scratch:
        write_tensors(scratch, tensors, ("pkt", json.dumps({name: energy for name, (_, energy) in made.items()})))


def _read_step(file: Path, targets: list[Target]) -> Made:
    energies = json.loads(safetensors_header(file).metadata["pkt"])
    tensors = load_file(str(file))
    kinds = {t.module: t.kind for t in targets}
    return {n: (Pair(tensors[f"{n}.A"], tensors[f"{n}.B"], kinds[n]), e) for n, e in energies.items()}


def left_out(content: Difference, new: Matrices, made: Made) -> dict[str, float]:
    """What a LoRA of matrices cannot hold, with the norm of its change; and matrices nothing feeds, 0."""
    held = {name: float(change.norm()) for name, change in vectors_of(content, new).items()}
    apart = [t for t in new.spec.targets if t.module not in made and t.parameter not in held]
    return {t.module: 0.0 for t in apart if not content.cutter.roles(t)} | held
