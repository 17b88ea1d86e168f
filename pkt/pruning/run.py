"""The whole of `pkt shrink`: the shape, the scores, the units, and the folder of what they make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pkt.errors import PktError
from pkt.files import MANIFEST, atomic_folder, check_apart, check_output_folder, is_stored, write_json
from pkt.manifest import manifest_of, versions
from pkt.matching import BESIDE, Lineage, Matrices, Shape, UnitScores, shape_of, shrink_to, shrunk_model
from pkt.models import Model, load_tokenizer, save_model
from pkt.options import Execution, Limits, Loss, Reading, Score, Shrinking
from pkt.pruning.activations import activation_scores
from pkt.pruning.sizes import parameters, read_count, shape_like, shape_near
from pkt.seeds import Seeds, load_seeds
from pkt.streaming import MemoryPlan
from pkt.transferring import Listeners, read_scores

_BY_SEEDS = ("sensitivity", "activation")


@dataclass(frozen=True)
class Shrunk:
    """The small model, in memory, and whose units its are."""

    model: Any
    lineage: Lineage
    shape: Shape
    parameters: int

    def __str__(self) -> str:
        return f"{self.parameters:,} parameters: {self.shape}; the teacher's layers {', '.join(map(str, self.lineage.layers))}"


def shrink(
    teacher: Any,
    seeds: Seeds | str | Path | None = None,
    *,
    like: Any = None,
    params: int | str | None = None,
    out: str | Path | None = None,
    score: Score = "sensitivity",
    tokenizer: Any = None,
    seed: int = 0,
    loss: Loss = "answer",
    max_length: int = 2048,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    device_memory: int | str | None = None,
    host_memory: int | str | None = None,
    scratch: str | Path | None = None,
    prefetch: bool = True,
    force: bool = False,
    progress: bool = True,
    on_memory: Callable[[MemoryPlan], None] | None = None,
) -> Shrunk:
    """A model of the teacher's own units, those that score highest: layers, hidden units, FFN neurons, whole attention groups.

    teacher: a checkpoint directory, of which one layer at a time is in memory, or a model (then pass its tokenizer); seeds: rows of
    general text. like: a model or configuration of the same family whose shape is wanted; params: about how many parameters, such
    as "60M", in the teacher's proportions. score: a unit's is the sum over all matrices it touches of S ("sensitivity"), of |W|
    times its input's size ("activation", the teacher whole in memory), or of |W| ("magnitude"); "random" is a control. The last two
    need no seeds. The other options are those of `pkt.transfer`.

    The weights stay as they are, in the teacher's type: general text is to be learnt again before it is of use. With `out`, a
    folder that any trainer takes, its lineage beside it. Raises one `PktError` for a shape that the teacher or its family does
    not have, weights that are not finite, and anything that cannot be read.
    """
    options = Shrinking(score, seed)
    if (like is None) == (params is None):
        raise PktError("give the shape once: like= (a model's or its config.json), or params= such as 60M")
    if score in _BY_SEEDS and seeds is None:
        raise PktError(f"units are chosen by {score} on rows of general text; give the seeds, or score magnitude")
    if out is not None:
        check_output_folder(out, force=force)
        check_apart(out, *(given for given in (teacher, like, seeds) if is_stored(given)))
    old = Matrices(teacher)
    shape = shape_near(old, read_count(params)) if params is not None else shape_like(old, like)
    units = UnitScores(old)
    units.check(shape)
    if score == "activation" and any(target.experts for target in old.spec.targets):
        raise PktError(f"{old.spec.name} has experts, whose inputs are not measured one by one; choose another score")
    shrunk_model(old, shape)  # what its family cannot have is refused before anything is read
    read = Reading(loss, max_length), Execution(batch_size, device, dtype)
    limits = Limits(device_memory, host_memory, scratch, prefetch)
    told = _score(units, seeds, options, tokenizer, *read, limits, Listeners(progress, on_memory))
    found = units.choose(shape)
    small = Shrunk(shrink_to(old, found), found, shape, parameters(shrunk_model(old, shape)))
    if out is not None:
        _write(small, old, Path(out), options, told, force=force, progress=progress)
    return small


def _score(
    units: UnitScores, seeds: Any, options: Shrinking, tokenizer: Any, reading: Reading, execution: Execution, limits: Limits,
    listeners: Listeners,
) -> dict[str, Any] | None:  # fmt: skip
    """Fill the units' scores; returns what the seeds were, where some were read."""
    old, model = units.old, units.old.model
    if options.score == "random":
        units.draw(torch.Generator().manual_seed(options.seed))
    elif options.score == "magnitude":
        for name in {target.parameter for target in (*old.spec.targets, *old.others)}:
            units.add({name: old.parameter(name).float().abs()})
    elif options.score == "sensitivity":
        return read_scores(
            model,
            seeds,
            units.add,
            tokenizer=tokenizer,
            reading=reading,
            execution=execution,
            limits=limits,
            listeners=listeners,
        )
    else:
        if not isinstance(seeds, Seeds):
            if tokenizer is None and not model.is_named:
                raise PktError("a teacher in memory needs its tokenizer to read the seeds; pass tokenizer=")
            tokenizer = load_tokenizer(model) if tokenizer is None else tokenizer
            seeds = load_seeds(seeds, tokenizer, loss=reading.loss, max_length=reading.max_length)
        seeds.check_fits(old.spec.vocab_size, old.spec.positions, old.spec.name)
        whole: nn.Module = model.load(dtype=execution.dtype, device=execution.device or "cpu", dequantize=True)
        units.add(
            activation_scores(whole, old.spec, seeds, batch_size=execution.batch_size, progress=listeners.progress)
        )
        found: dict[str, Any] = seeds.describe()
        return found
    return None


def _write(
    small: Shrunk,
    old: Matrices,
    out: Path,
    options: Shrinking,
    seeds: dict[str, Any] | None,
    *,
    force: bool,
    progress: bool,
) -> None:
    """The folder: a checkpoint with the teacher's tokenizer and generation settings, pkt.json, and the lineage."""
    whole, found = shape_of(old), small.lineage
    source = old.model
    teacher = source.identified(progress=progress).identity()
    by = {"sensitivity": "S on the seeds", "activation": "|W| × the size of its input", "magnitude": "|W|",
          "random": f"chance, seed {options.seed}"}  # fmt: skip
    told = {
        "teacher": old.spec.name,
        "shape": f"{small}",
        "of": f"{parameters(source):,} parameters: {whole}",
        "units chosen by": f"{by[options.score]}, summed over all matrices they touch",
        **({} if seeds is None else {"seeds": f"{seeds['count']} samples, fingerprint {seeds['fingerprint'][:16]}"}),
    }
    with atomic_folder(out, force=force) as scratch:
        settings = _generation(source)
        if settings is not None:
            small.model.generation_config = settings
        save_model(small.model, scratch, source)
        found.teacher, found.student = teacher, Model.of(scratch).identified().identity() | {"name": str(out)}
        found.reason = "`pkt shrink` recorded it, and the weights of both are still those it was cut from and made"
        found.save(scratch / BESIDE)
        entries = {
            "teacher": teacher,
            "shape": asdict(small.shape),
            "parameters": small.parameters,
            "options": asdict(options),
            "seeds": seeds,
            "told": told,
            "versions": versions(),
        }
        write_json(scratch / MANIFEST, manifest_of("shrunk", entries))


def _generation(source: Model) -> Any:
    """The teacher's own generation settings, where it has some."""
    if source.module is not None:
        return getattr(source.module, "generation_config", None)
    if not (source.folder / "generation_config.json").is_file():
        return None
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(str(source.folder))
