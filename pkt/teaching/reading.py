"""`pkt teach`: a teacher's next-token distributions for the answer tokens of given rows (docs/distil.md).

The teacher is read a decoder layer at a time, forward passes only. Rows go through it in passes; every finished pass is a
checkpoint in a hidden folder beside the output, and the same command goes on there after any interruption and ends with the same
bytes.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pkt import ops
from pkt.errors import PktError, PktWarning
from pkt.files import MANIFEST, as_path, check_apart, check_output_folder, is_stored, run_path
from pkt.manifest import difference, read_manifest, recorded_day, versions
from pkt.models import Model, checked_device, vocabulary_digest
from pkt.options import RowTemplate, TrainingLoss
from pkt.progress import bar
from pkt.seeds import IGNORE, Seeds, collate, load_seeds
from pkt.streaming import (
    Chunk,
    Forward,
    Head,
    MemoryPlan,
    NotLayeredError,
    Teacher,
    Tick,
    head_rows,
    measured_seconds,
    micro_batches,
    open_teacher,
    parse_size,
    plan_forward,
    samples_of,
    sizes_of,
)
from pkt.targets import DIGEST, FILE, Targets, row_digest, write_targets
from pkt.teaching.drawing import Keeper, uniforms
from pkt.transferring import RunFolder

DRAWS = 64
MOST = 4096  # draws, or likeliest tokens
_WORTH_MEASURING = 2e12  # flops


@dataclass(frozen=True)
class Options:
    """What is kept of each distribution, and how it is computed."""

    draws: int | None
    top: int | None
    seed: int
    batch_size: int
    dtype: Any

    def __post_init__(self) -> None:
        if self.draws is not None and self.top is not None:
            raise PktError("draws and top exclude each other: give --draws N, or --top K for the K likeliest tokens")
        for name in ("draws", "top"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and 1 <= value <= MOST):
                raise PktError(f"{name}={value!r} must be a whole number from 1 to {MOST}")
        if self.batch_size < 1:
            raise PktError(f"batch_size={self.batch_size} must be at least 1")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise PktError(f"seed={self.seed!r} must be a whole number from 0 to 2**63 - 1")
        if self.dtype is not None and not isinstance(self.dtype, torch.dtype):
            raise PktError(f"dtype={self.dtype!r} is not a torch.dtype; pass torch.float32 or torch.bfloat16")

    @property
    def form(self) -> str:
        return "draws" if self.top is None else "top"

    @property
    def size(self) -> int:
        return self.top or self.draws or DRAWS


def teach(
    teacher: Any,
    data: Seeds | str | Path,
    *,
    out: str | Path | None = None,
    draws: int | None = None,
    top: int | None = None,
    seed: int = 0,
    tokenizer: Any = None,
    loss: TrainingLoss = "answer",
    template: RowTemplate = "chat",
    max_length: int = 2048,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    device_memory: int | str | None = None,
    host_memory: int | str | None = None,
    resume: bool = True,
    force: bool = False,
    progress: bool = True,
    on_memory: Callable[[MemoryPlan], None] | None = None,
    on_tick: Callable[[Tick], None] | None = None,
) -> Targets:
    """The teacher's next-token distributions for the answer tokens of `data`, for `pkt.train(..., teacher_targets=)`.

    draws: the counts of so many draws of each (64 unless given; seeded per row, so that they hang on no other row); top: instead
    the K likeliest tokens and the mass of all others. tokenizer: what the rows are read with, a tokenizer or a model's folder
    (the student's, whose chat template it will learn with); its tokens must be the teacher's. loss, template, max_length: as in
    `pkt.train`. out: a folder; the same call continues an interrupted one. The rest is as in `pkt.transfer`.

    Raises `PktError`, before the weights are read, for anything that can be known then.
    """
    options = Options(draws, top, seed, batch_size, dtype)
    with contextlib.ExitStack() as stack:
        if out is None:
            out = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pkt-teach-"))) / "targets"
        out, goes_on = as_path(out, "the path of a folder"), resume and not force
        # A run may have been killed when all was written.
        there = goes_on and (out / FILE).is_file() and read_manifest(out).get("kind") == "targets"
        if not there:
            check_output_folder(out, force=force)
        check_apart(out, *(each for each in (teacher, data) if is_stored(each)))
        today = recorded_day(out / MANIFEST if there else run_path(out) / "run.json") if goes_on else None
        model = Model.of(teacher)
        read_with = _tokenizer_of(model, tokenizer)
        if not isinstance(data, Seeds):
            data = load_seeds(data, read_with, loss=loss, max_length=max_length, today=today, template=template)
        job = Job(model, data, options, read_with, device)
        inputs = job.inputs(progress=progress)
        with RunFolder.locked(out, fresh=not goes_on) as folder:
            if there:
                return _same(out, inputs)
            folder.bind(inputs)
            memory = (parse_size(device_memory), parse_size(host_memory))
            Passes(job, folder, memory, progress, on_memory, on_tick).run()
            job.write(out, folder, inputs, force=force)
        return Targets.load(out)


def _same(out: Path, inputs: Mapping[str, Any]) -> Targets:
    """The targets in `out`. Raises `PktError` where they are not of these inputs."""
    found = Targets.load(out)
    different = difference(found.told.get("inputs", {}), inputs)
    if different:
        raise PktError(
            f"{out} already holds a result of pkt, of other inputs ({', '.join(different)}); name another folder, or replace it "
            "with --force"
        )
    return found


def _tokenizer_of(model: Model, given: Any) -> Any:
    """What rows are read with. Raises `PktError` where its tokens are not the teacher's."""
    own = None
    # A checkpoint need not come with a tokenizer where one is given.
    with contextlib.suppress(*([] if given is None else [PktError])):
        own = model.tokenizer if model.is_named else None
    if given is None:
        if own is None:
            raise PktError("a teacher in memory needs its tokenizer; pass tokenizer=")
        return own
    if isinstance(given, (str, Path)):
        name, given = str(given), Model.of(given).tokenizer
    else:
        name = "the tokenizer given"
    if own is not None and vocabulary_digest(own) != vocabulary_digest(given):
        raise PktError(
            f"{name} numbers its tokens otherwise than {model.name}, whose distributions are over its own tokens; the teacher's "
            "answers work across tokenizers: pkt teach --generate"
        )
    return given


class Job:
    """The inputs of one reading, checked."""

    def __init__(self, model: Model, rows: Seeds, options: Options, tokenizer: Any, device: Any) -> None:
        model.check_dequantized()
        model.check()
        self.model, self.rows, self.options, self.spec = model, rows, options, model.spec
        self.tokenizer = vocabulary_digest(tokenizer)
        parameters = () if model.module is None else model.module.parameters()
        here = next((p.device for p in parameters), torch.device("cpu"))
        self.device = here if device is None else checked_device(device)
        rows.check_fits(self.spec.vocab_size, self.spec.positions, self.spec.name)
        vocabulary = self.spec.vocab_size
        if vocabulary is None:
            raise PktError(f"{model.name} has no token table, so it has no distributions over tokens")
        if options.top is not None and options.top > vocabulary:
            raise PktError(f"top={options.top} is more than the {vocabulary} tokens of {model.name}")
        self.keeper = Keeper(options.form, options.size, vocabulary)
        self.digests = [row_digest(row) for row in rows]
        before: dict[bytes, int] = {}
        self.occurrence = []
        for digest in self.digests:
            self.occurrence.append(before.get(digest, 0))
            before[digest] = self.occurrence[-1] + 1

    def inputs(self, *, progress: bool) -> dict[str, Any]:
        """All that the bytes of a result depend on, by the names a refusal uses."""
        content = self.model.content(progress=progress)
        return {
            "kind": "targets",
            "teacher": self.spec.name,
            "teacher's weights": content["fingerprint"],
            "teacher's config.json": content["configuration"],
            "rows": self.rows.fingerprint,
            "tokenizer": self.tokenizer,
            **({} if self.rows.today is None else {"today": self.rows.today.isoformat()}),
            **{f"option {name}": getattr(self.options, name) for name in ("form", "size", "seed", "batch_size")},
            "dtype": str(self.options.dtype),
            "device": self.device.type,
            "half types of this CPU": sorted(map(str, ops.native_halves())) if self.device.type == "cpu" else [],
            "versions": versions(),
        }

    def answers(self, index: int) -> int:
        return sum(label != IGNORE for label in self.rows[index].labels[1:])

    def read(
        self, order: Sequence[int], chunk: Chunk, hidden: Tensor, head: Head
    ) -> list[tuple[dict[str, Tensor], float]]:
        """What is kept of each row of a micro-batch, and its loss. order: the rows' numbers, as the pass has them."""
        labels = chunk.batch["labels"].to(hidden.device)
        mask = labels[:, 1:] != IGNORE
        rows = order[chunk.first : chunk.first + chunk.size]
        counts = mask.sum(1).tolist()
        u = None
        if self.options.form == "draws":
            each = [(self.digests[i], self.occurrence[i], n) for i, n in zip(rows, counts, strict=True)]
            u = torch.cat([uniforms(self.options.seed, *some, self.options.size) for some in each])
        block = head_rows(self.keeper.vocabulary, self.device)
        kept, losses = self.keeper.keep(hidden[:, :-1][mask], head, block, labels[:, 1:][mask], u)
        found = []
        by_row = losses.split(counts)
        for row, (tensors, loss) in enumerate(zip(_by_row(kept, counts), by_row, strict=True)):
            if not bool(loss.isfinite().all()) and bool(loss.isnan().any()):
                raise PktError(
                    f"{self.rows.where(rows[row])}: the teacher's probabilities are not numbers; its weights are damaged, or its "
                    "type is too narrow for it (--dtype float32)"
                )
            found.append((tensors, float(loss.double().sum())))
        return found

    def write(self, out: Path, folder: RunFolder, inputs: Mapping[str, Any], *, force: bool) -> None:
        """The targets of all passes, in the rows' order."""
        loss = sum(folder.load(name)[0]["loss"] for name in folder.steps)
        tokens = sum(self.answers(i) for i in range(len(self.rows)))
        entries = {
            "form": self.options.form,
            "size": self.options.size,
            "vocabulary": self.keeper.vocabulary,
            "tokenizer": self.tokenizer,
            "teacher": self.model.identified().identity(),
            "rows": self.rows.describe(),
            **({} if self.rows.today is None else {"today": self.rows.today.isoformat()}),
            "tokens": tokens,
            "nll": loss / tokens,
            "inputs": dict(inputs),
        }
        write_targets(out, _Steps(folder), entries, force=force)


class _Steps(Sequence[dict[str, Tensor]]):
    """The tensors of a run's passes, each read when it is asked for."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return len(self.folder.steps)

    def __getitem__(self, index: Any) -> Any:
        return self.folder.load(self.folder.steps[index])[1]


def _by_row(kept: dict[str, Tensor], counts: list[int]) -> list[dict[str, Tensor]]:
    """The tensors of a micro-batch, row by row."""
    sizes = dict.fromkeys(kept, counts)
    if "words" in kept:
        sizes["words"] = [int(part.sum()) for part in kept["distinct"].long().split(counts)]
    parts = {name: tensor.split(sizes[name]) for name, tensor in kept.items()}
    return [{name: parts[name][row] for name in parts} for row in range(len(counts))]


class Passes:
    """The rows of a job, read in passes: each a checkpoint of its own."""

    def __init__(
        self,
        job: Job,
        folder: RunFolder,
        memory: tuple[int | None, int | None],
        progress: bool,
        on_memory: Callable[[MemoryPlan], None] | None,
        on_tick: Callable[[Tick], None] | None,
    ) -> None:
        self.job, self.folder, self.memory, self.progress = job, folder, memory, progress
        self.on_memory, self.on_tick = on_memory, on_tick

    def run(self) -> None:
        """Read every pass that is not there yet. Raises `PktError` for a checkpoint that is damaged."""
        for name in self.folder.steps:
            self.folder.load(name)
        job, spec = self.job, self.job.spec
        teacher = open_teacher(job.model, job.device, job.options.dtype)
        try:
            if spec.layers is None or spec.num_layers == 0:
                raise NotLayeredError("it has no list of decoder layers")
            memory, sizes = self._plan(teacher, spec.layers)
            with self._ticks() as tick:
                forward = Forward(
                    teacher,
                    device=job.device,
                    num_layers=spec.num_layers,
                    layers=spec.layers,
                    place=memory.places[0],
                    passes=len(sizes) - len(self.folder.steps),
                    positions=spec.positions,
                    resident=memory.resident and teacher.source is not None,
                    on_tick=tick,
                )
                with forward.ready():
                    self._read(sizes, forward)
        except NotLayeredError as error:
            self._whole(str(error))

    def _plan(self, teacher: Teacher, layers: str) -> tuple[MemoryPlan, list[list[int]]]:
        """The memory plan, and the micro-batches of each pass as they were recorded or are recorded now."""
        job = self.job
        lengths = [len(row.input_ids) for row in job.rows]
        memory, passes = plan_forward(
            sizes_of(teacher, layers, job.spec.num_layers),
            lengths,
            device=job.device,
            batch_size=job.options.batch_size,
            in_memory=teacher.source is None,
            device_memory=self.memory[0],
            host_memory=self.memory[1],
        )
        ends = itertools.accumulate(passes, initial=0)
        each = [sorted(lengths[a:b], reverse=True) for a, b in itertools.pairwise(ends)]
        sizes = [micro_batches(part, memory.micro_batch, job.device) for part in each]
        if self.on_memory is not None:
            if memory.flops > _WORTH_MEASURING:
                dtype = teacher.dtype or next(teacher.model.parameters()).dtype
                memory.seconds = measured_seconds(memory.flops, dtype, job.device)
            self.on_memory(memory)
        return memory, self.folder.execution(sizes, memory)

    def _read(self, sizes: list[list[int]], forward: Forward) -> None:
        first = 0
        for number, mine in enumerate(sizes):
            rows = range(first, first + sum(mine))
            first = rows.stop
            if number < len(self.folder.steps):
                continue
            # Longest first, so that little is padding.
            order = sorted(rows, key=lambda i: -len(self.job.rows[i].input_ids))
            samples = samples_of([collate([self.job.rows[i]], self.job.rows.pad_id) for i in order])

            def read(chunk: Chunk, hidden: Tensor, head: Head, order: list[int] = order) -> Any:
                return self.job.read(order, chunk, hidden, head)

            def resized(now: list[int], why: str, number: int = number) -> None:
                self.folder.resized([*sizes[:number], now, *sizes[number + 1 :]], why)

            found = itertools.chain.from_iterable(forward.run(samples, mine, read, resized))
            self._commit(dict(zip(order, found, strict=True)))

    def _commit(self, found: dict[int, tuple[dict[str, Tensor], float]]) -> None:
        """Write a pass. found: by row, what is kept of it, and its loss."""
        rows = sorted(found)
        tensors = {name: torch.cat([found[i][0][name] for i in rows]) for name in found[rows[0]][0]}
        digests = b"".join(self.job.digests[i] for i in rows)
        tensors["rows"] = torch.frombuffer(bytearray(digests), dtype=torch.uint8).view(-1, DIGEST)
        tensors["answers"] = torch.tensor([self.job.answers(i) for i in rows], dtype=torch.int32)
        name = f"step-{len(self.folder.steps):04d}.safetensors"
        self.folder.save(name, {"loss": sum(found[i][1] for i in rows)}, tensors)
        self.folder.steps.append(name)

    def _whole(self, why: str) -> None:
        """Every row by itself through the model as it is."""
        job = self.job
        if self.folder.steps:
            raise PktError(f"{self.folder.path}: {why}, but it was when the run began; start over with --force")
        warnings.warn(f"{job.model.name} is read whole, not layer by layer: {why}", PktWarning, stacklevel=4)
        model = job.model.load(dtype=job.options.dtype, device=job.device, dequantize=True)
        found = {}
        with torch.no_grad(), bar("teaching", len(job.rows), unit="rows", shown=self.progress) as advance:
            for index in range(len(job.rows)):
                batch = collate([job.rows[index]], job.rows.pad_id)
                inputs = {k: v.to(job.device) for k, v in batch.items() if k != "labels"}
                logits = model(**inputs, use_cache=False).logits
                found[index] = job.read([index], Chunk(0, 0, batch), logits, lambda rows: rows)[0]
                advance(index + 1)
        self._commit(found)

    @contextlib.contextmanager
    def _ticks(self) -> Iterator[Callable[[Tick], None]]:
        with contextlib.ExitStack() as stack:
            advance: Callable[[int], None] | None = None

            def tick(now: Tick) -> None:
                nonlocal advance
                if advance is None:
                    advance = stack.enter_context(bar("teaching", now.total, unit="steps", shown=self.progress))
                advance(now.done)
                if self.on_tick is not None:
                    self.on_tick(now)

            yield tick
