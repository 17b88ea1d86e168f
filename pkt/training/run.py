"""`pkt train`: a student and the start of its LoRA through transformers' Trainer (docs/method.md §6, docs/choices.md)."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pkt.adapters import Pair
from pkt.errors import PktError
from pkt.extraction import Extraction, Start, open_start
from pkt.files import MANIFEST, as_path, check_apart, check_parent, followed, is_stored, lock_folder, os_errors
from pkt.lora import DRAWN, Mode, check_init, check_settings, checked_dropout, draw_pairs, inject, mode_of
from pkt.manifest import call_of, difference, recorded_day
from pkt.models import Model, ModelSpec, Target, load_model, load_tokenizer, spec_of
from pkt.options import Lora, Precision, Recipe, RecipeName, RowTemplate, Training, TrainingLoss, TrainModules
from pkt.planning import adapted
from pkt.progress import tell
from pkt.ranks import ALONE, Ranks
from pkt.seeds import Seeds, load_seeds
from pkt.targets import Targets
from pkt.training.export import read_injected
from pkt.training.folder import finish_run, start_run, write_run
from pkt.training.targets import Distillation, check_mix, distillation
from pkt.training.trainer import check_machine, check_reporters, fit

# Of a LoRA, of one that is kept and has begun already, and of all weights.
RATE, KEPT_RATE, FULL_RATE = 3e-4, 1.5e-4, 5e-5
FULL = "full"


def train(
    student: str | Path,
    extraction: Any,
    data: str | Path | Seeds,
    out: str | Path,
    *,
    recipe: RecipeName = "pkt",
    mode: Mode | None = None,
    epochs: float = 3.0,
    batch_size: int = 64,
    micro_batch: int = 8,
    lr: float | None = None,
    dropout: float | None = None,
    warmup: float | None = None,
    scheduler: str = "linear",
    max_length: int = 2048,
    max_steps: int | None = None,
    save_steps: int = 50,
    seed: int = 0,
    train_modules: TrainModules | None = None,
    loss: TrainingLoss | None = None,
    template: RowTemplate | None = None,
    a_scale: float | None = None,
    init: str | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    modules: str | None = None,
    precision: Precision = "auto",
    gradient_checkpointing: bool | None = None,
    group_by_length: bool = False,
    held_out: str | Path | Seeds | None = None,
    eval_steps: int | None = None,
    full: bool = False,
    teacher_targets: str | Path | Targets | None = None,
    mix: float | None = None,
    report_to: str = "tensorboard",
    force: bool = False,
    quietly: bool = False,
    group: Any = None,
) -> Any:
    """Start a LoRA in `student`, train it on `data` and keep everything in `out`. Returns the trained PeftModel.

    extraction: an extraction, transplant or start, or its folder; None for plain LoRA, which init, rank, alpha and modules
    describe (`pkt.options.Lora`) and whose A starts at a_scale times PEFT's (3 unless given).
    `out` is a run folder: the adapter as PEFT saves it, checkpoints, TensorBoard logs under `logs/`, and pkt.json. The same
    call on an unfinished run goes on from its last complete checkpoint; on a finished one it is refused. With `force` it
    starts over. batch_size: rows of a step; micro_batch: rows in memory at once, at most; lr: 3e-4 unless given, half of it for
    a transplant, which has begun already; dropout: 0.05 unless given, or 0 where experts are adapted, for which PEFT has none;
    warmup: steps, or a share of them below 1; max_steps: fewer steps than the epochs have, if given. recipe: what is meant by
    whatever is not given of mode, lr, warmup, train_modules, loss, template, a_scale and gradient_checkpointing
    (`pkt.options.RECIPES`); "paper" is what the paper's authors train with. held_out: rows that the model is measured on before
    the first step, every eval_steps (save_steps unless given) and after the last; the run ends with the weights of the best look.
    full: train all weights instead of a LoRA, in fp32, at 5e-5 unless given; `out` is then also the trained model, in the student's
    own type, and a plain model is returned. teacher_targets: what `pkt.teach` gave for these rows, or its folder; mix: its share of
    the loss, (1 − mix) · CE − mix · Σ_t (c_t / N) log p_t for each answer token.
    group: torch.distributed's default one, whose ranks all make this call and train together; all of them see `out`.
    The rest is as in `pkt.options.Training`. loss and template concern files of rows; `Seeds` are taken as they were read.

    Raises `PktError` for settings no training can have, bad data, a mismatch of student and extraction, an `out` that is
    another run's or that another process is writing, a full disk, and the first loss or gradient that is not finite.
    """
    asked = call_of(train, locals(), "out", "force", "quietly", "group")
    ranks = Ranks.of(group)
    if ranks.alone and os.environ.get("WORLD_SIZE", "1") != "1":
        raise PktError(
            "this is one of several processes (WORLD_SIZE), and each would train by itself into the same folder: pass group="
        )
    given = Recipe(mode, lr, warmup, gradient_checkpointing, train_modules, a_scale, loss, template)
    told = given.over(recipe)
    check_mix(teacher_targets, mix)
    lora = {"init": init, "rank": rank, "alpha": alpha, "modules": modules}
    start: Extraction | Start | Lora | None = None
    if full:
        _check_full(extraction, {**lora, "dropout": dropout}, given)
        told = replace(told, mode=None, a_scale=None)
        rate = given.lr or FULL_RATE
    else:
        start = _opened(extraction, student, data, lora, given)
        told = replace(told, mode=mode or _usual_mode(start, told), a_scale=_a_scale(start, given, told))
        rate = told.lr or (KEPT_RATE if told.mode == "add" and not isinstance(start, Lora) else RATE)
        check_settings(str(told.mode), dropout)
        if not isinstance(start, Lora):
            checked_dropout(start.pairs, dropout)
    options = Training(
        epochs,
        batch_size,
        micro_batch,
        rate if lr is None else lr,
        told.warmup or 0.0,
        scheduler,
        max_steps,
        save_steps,
        seed,
        precision,
        bool(told.gradient_checkpointing),
        group_by_length,
        report_to,
        eval_steps,
    )
    told_of = {"given": asked, **({} if recipe == "pkt" else {"recipe": recipe})}
    check_machine(options)
    check_reporters(options)
    out, student = followed(as_path(out, "the path of a run folder")), as_path(student, "the path of a student")
    _check_out(out, (extraction, student, data, held_out, teacher_targets))
    if held_out is None and eval_steps is not None:
        raise PktError("eval_steps concerns held-out rows; name them (--held-out FILE)")
    job = _job(student, start, (data, held_out), told, options, dropout, max_length, _day(out, teacher_targets, force))
    job = replace(job, taught=distillation(teacher_targets, mix, job.examples, job.tokenizer, spec_of(student)))
    job.check_alike(ranks)
    with contextlib.ExitStack() as held:
        with ranks.together():
            if ranks.first:
                held.enter_context(lock_folder(out, out))
            settings = job.settings(ranks)
            checkpoint = ranks.first_of(lambda: start_run(out, settings, force=force, ranks=ranks.world))
            if checkpoint is not None and not Path(checkpoint).is_dir():
                raise PktError(f"rank {ranks.rank} does not see {checkpoint}; train into a folder that all ranks see")
            quietly = quietly or not ranks.first
            if not quietly and job.targets and job.told.a_scale != 1:
                tell(f"A starts at {job.told.a_scale:g} times PEFT's initialisation (--a-scale 1 is PEFT's own)")
            begun, model = job.begin()
            if checkpoint is None and ranks.first:
                write_run(out, begun, settings, str(student), told_of)
            ranks.all_of(None)
        job.finish(model, out, checkpoint, quietly, ranks)
    return model


def _day(out: Path, targets: Any, force: bool) -> datetime.date | None:
    """The day that a template is told of: that of the teacher's targets, whose rows these are, or of the run that goes on."""
    where = targets.source if isinstance(targets, Targets) else targets
    of_targets = recorded_day(Path(where) / MANIFEST) if where else None
    return of_targets or (None if force else recorded_day(out / MANIFEST))


def _check_out(out: Path, given: Sequence[Any]) -> None:
    """Refuse a run folder that cannot be one, or that is one of the inputs."""
    with os_errors(f"writing {out}"):
        if out.exists() and not out.is_dir():
            raise PktError(f"{out} is a file; name a folder that does not exist yet")
        check_parent(out)
    check_apart(out, *(each for each in given if is_stored(each)))


@dataclass(frozen=True)
class Job:
    """The inputs of a run, checked: where the student's LoRA starts, the rows it learns from, and how.

    start: None where all weights are trained. targets: the matrices whose factors are drawn rather than given. taught: what a
    teacher says of the rows.
    """

    student: Path
    start: Extraction | Start | Lora | None
    targets: list[Target]
    told: Recipe
    options: Training
    dropout: float
    examples: Seeds
    tokenizer: Any
    held_out: Seeds | None = None
    taught: Distillation | None = None

    def check_alike(self, ranks: Ranks) -> None:
        """Raises `PktError` where a rank reads something else than the first one."""
        first, *others = ranks.all_of(self.settings(ranks))
        for rank, settings in enumerate(others, 1):
            if different := difference(first, settings):
                raise PktError(
                    f"rank {rank} has other inputs than rank 0 ({', '.join(different)}); give every rank the same files"
                )

    def settings(self, ranks: Ranks = ALONE) -> dict[str, Any]:
        """What decides a run's result: a folder with other settings holds another run."""
        options, start = self.options, self.start
        drawn = {"a_scale": self.told.a_scale}
        begun: dict[str, Any] = {}
        if isinstance(start, Lora):
            begun = {"lora": {**vars(start), **drawn}}
        elif start is not None:
            begun = {"extraction": start.adapter().fingerprint()}
            if self.targets:
                begun |= {"train_modules": "all", **drawn}
        return {
            "mode": FULL if start is None else self.told.mode,
            "epochs": options.epochs,
            "batch_size": options.batch_size,
            "lr": options.lr,
            "dropout": self.dropout,
            "warmup": options.warmup,
            "scheduler": options.scheduler,
            "max_steps": options.max_steps,
            "seed": options.seed,
            **options.later(),
            **({} if self.held_out is None else {"held_out": self.held_out.fingerprint, "eval_steps": self.eval_steps}),
            "data": self.examples.fingerprint,
            **({} if self.examples.today is None else {"today": self.examples.today.isoformat()}),
            **begun,
            **({} if self.taught is None else {"teacher_targets": self.taught.fingerprint, "mix": self.taught.mix}),
            # What ranks drop and the order of their sums are their number's.
            **({} if ranks.alone else {"ranks": ranks.world}),
            "student": Model.of(self.student).content()["fingerprint"],
        }

    @property
    def eval_steps(self) -> int:
        return self.options.eval_steps or self.options.save_steps or 50

    def begin(self) -> tuple[Extraction | Start | None, Any]:
        """What the run starts from, with all its factors, and the student wrapped with them; or the student as it is."""
        from transformers import set_seed

        seed = self.options.seed
        set_seed(seed)
        if self.start is None:
            # In a half type, steps this small would be lost in rounding.
            return None, load_model(self.student, dtype=torch.float32)
        model = load_model(self.student)
        start, drawn = self.start, self._drawn(model)
        if isinstance(start, Lora):
            told = {"init": start.init, "rank": start.rank, "A": f"{self.told.a_scale:g} times PEFT's"}
            begun: Extraction | Start = Start("start", drawn, {"name": str(self.student)}, provenance={"told": told})
        else:
            begun = replace(start, pairs={**start.pairs, **drawn}) if drawn else start
        alpha = start.alpha if isinstance(start, Lora) else None
        set_seed(seed)
        return begun, inject(model, begun, mode=self.told.mode, dropout=self.dropout, alpha=alpha)

    def finish(self, model: Any, out: Path, checkpoint: str | None, quietly: bool, ranks: Ranks = ALONE) -> None:
        """Train from where it is, and write what came of it."""
        from pkt.training.held_out import HeldOut

        held: HeldOut | None = None
        if self.held_out is not None:
            held = HeldOut(self.held_out, out, self.eval_steps, self.options.micro_batch, quietly=quietly, ranks=ranks)
        loss = fit(
            model,
            self.examples,
            out,
            self.options,
            quietly=quietly,
            resume_from=checkpoint,
            tokenizer=self.tokenizer,
            held_out=held,
            taught=self.taught,
            ranks=ranks,
        )
        with ranks.together():
            if ranks.first:
                more = {} if held is None else {"held_out": held.told()}
                finish_run(out, model, loss, more, whole_from=self.whole_from)
            ranks.all_of(None)
        if held is not None:
            held.clean()

    @property
    def whole_from(self) -> Path | None:
        """The student, where a whole model is written rather than an adapter of it."""
        return self.student if self.start is None else None

    def _drawn(self, model: Any) -> dict[str, Pair]:
        if not self.targets:
            return {}
        start = self.start
        assert start is not None
        # Beside an extraction the others start at B = 0, at its rank.
        lora = start if isinstance(start, Lora) else Lora(rank=start.rank)
        scale = self.told.a_scale or 1.0
        return draw_pairs(model, self.targets, lora, scale, rows=self.examples, seed=self.options.seed)


def _opened(
    extraction: Any, student: Any, data: Any, lora: Mapping[str, Any], given: Recipe
) -> Extraction | Start | Lora:
    """Where the LoRA starts. Raises `PktError` for what is said of a plain LoRA beside an extraction, and the reverse."""
    said = {name: value for name, value in lora.items() if value is not None}
    if extraction is None:
        if isinstance(data, (str, Path)) and Path(data).is_dir():
            raise PktError(
                f"{data} is a folder, not rows; after an extraction the rows are named too: STUDENT EXTRACTION DATA"
            )
        if given.train_modules is not None:
            raise PktError(
                "train_modules concerns an extraction; a plain LoRA's matrices are chosen by modules (--modules)"
            )
        start = Lora(**said)
        check_init(start)
        return start
    if said:
        raise PktError(
            f"{', '.join(said)}: the extraction has settled it; leave it out, or train without an extraction"
        )
    if given.a_scale is not None and given.train_modules != "all":
        raise PktError("a_scale concerns factors that are drawn: those of a plain LoRA, or with train_modules='all'")
    return (read_injected(extraction, student) if is_stored(extraction) else None) or open_start(extraction)


def _check_full(extraction: Any, lora: Mapping[str, Any], given: Recipe) -> None:
    """Refuse what concerns a LoRA where all weights are trained."""
    if extraction is not None:
        raise PktError(
            "full training takes no extraction or start: it changes the student's own weights; leave it out, or merge it first "
            "(pkt finalize --merge)"
        )
    more = {"mode": given.mode, "train_modules": given.train_modules, "a_scale": given.a_scale}
    said = [name for name, value in {**lora, **more}.items() if value is not None]
    if said:
        raise PktError(f"{', '.join(said)}: of a LoRA; full training has none, so leave it out")


def _usual_mode(start: Extraction | Start | Lora, told: Recipe) -> Mode:
    """How it is injected unless one says otherwise: the recipe knows of extractions."""
    if isinstance(start, Lora):
        return mode_of(start)
    return (told.mode if isinstance(start, Extraction) else None) or start.mode


def _a_scale(start: Extraction | Start | Lora, given: Recipe, told: Recipe) -> float | None:
    """Factors that PEFT computes rather than draws are taken as they are."""
    computed = isinstance(start, Lora) and start.init not in DRAWN
    return given.a_scale or 1.0 if computed else told.a_scale


def _job(
    student: Path,
    start: Extraction | Start | Lora | None,
    data: tuple[str | Path | Seeds, str | Path | Seeds | None],
    told: Recipe,
    options: Training,
    dropout: float | None,
    max_length: int,
    today: datetime.date | None,
) -> Job:
    spec, tokenizer = spec_of(student), load_tokenizer(student)
    targets = _targets(start, told, spec)
    members: dict[str, Pair | Target] = {t.module: t for t in targets}
    if isinstance(start, (Extraction, Start)):
        members |= start.pairs
    found = 0.0 if start is None else checked_dropout(members, dropout)

    def rows(given: str | Path | Seeds) -> Seeds:
        loss, template = told.loss or "answer", told.template or "chat"
        read = given
        if not isinstance(read, Seeds):
            read = load_seeds(read, tokenizer, loss=loss, max_length=max_length, today=today, template=template)
        read.check_fits(spec.vocab_size, spec.positions, spec.name)
        return read

    examples, held_out = rows(data[0]), None if data[1] is None else rows(data[1])
    learnt = {tuple(e.input_ids) for e in examples}
    if held_out is not None and all(tuple(e.input_ids) in learnt for e in held_out):
        raise PktError(f"every row of {held_out.source} is among those learnt from; hold other rows out (--held-out)")
    return Job(student, start, targets, told, options, found, examples, tokenizer, held_out)


def _targets(start: Extraction | Start | Lora | None, told: Recipe, spec: ModelSpec) -> list[Target]:
    """The matrices whose factors are drawn."""
    if start is None:
        return []
    if isinstance(start, Lora):
        return adapted(spec, start.modules)
    if told.train_modules != "all":
        return []
    return [t for t in adapted(spec, "all") if t.module not in start.pairs]
