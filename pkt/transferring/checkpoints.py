"""The checkpoints of an unfinished transfer, so that the same command continues it after any interruption."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pkt import ops
from pkt.adapters import Pair
from pkt.errors import PktError
from pkt.files import LOCK, atomic_file, lock_folder, read_json, run_path, sha256, write_json, write_tensors
from pkt.manifest import difference
from pkt.planning import Entry
from pkt.streaming import Key, MemoryPlan, Progress, spoken_size
from pkt.transferring.extractor import Choice, Extractor

RUN_FORMAT = "pkt-run-2"


class RunFolder:
    """Checkpoints of an unfinished transfer: one file a part, written whole, checksummed, bound to the inputs.

    run.json holds the inputs and the execution plan; step-NNN the records and factors of a part; grad-NNN what the next
    part starts from. grad is written before step, and the one before is removed after it: a part is finished when its step
    is there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.value: dict[str, Any] = {}
        self.steps: list[str] = []

    @staticmethod
    @contextlib.contextmanager
    def locked(out: Path, *, fresh: bool) -> Iterator[RunFolder]:
        """The run folder of `out`, held against a second run; removed when the work is done or nothing of it is."""
        path = run_path(out)
        with lock_folder(path, out):
            folder = RunFolder(path)
            try:
                if fresh:
                    folder.clear()
                yield folder
                shutil.rmtree(path, ignore_errors=True)
            except BaseException:
                if not folder.steps:
                    shutil.rmtree(path, ignore_errors=True)
                raise

    def clear(self) -> None:
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != LOCK:
                entry.unlink()

    def bind(self, inputs: dict[str, Any]) -> None:
        """Refuse to continue a run of other inputs, naming what differs; sweep away what an interrupted write left."""
        if (self.path / "run.json").is_file():
            self.check(inputs)
        else:
            self.clear()
            self.value = {"format": RUN_FORMAT, "inputs": inputs}
            self._write()
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)

    def check(self, inputs: dict[str, Any]) -> None:
        """Read what the run is of; refuse it when that is not these inputs."""
        file = self.path / "run.json"
        # Known first: a folder that holds finished parts is kept, whatever is wrong with the rest.
        self.steps = sorted(p.name for p in self.path.glob("step-*.safetensors"))
        try:
            self.value = read_json(file)
        except PktError as error:
            raise PktError(f"{error}; start over with --force, or delete {self.path}") from error
        recorded = self.value.get("inputs", {}) if isinstance(self.value, dict) else {}
        if recorded and self.value.get("format") == "pkt-run-1":
            raise PktError(
                f"{self.path} holds an unfinished run of an older pkt; start over with --force, or delete it"
            )
        if not recorded or self.value.get("format") != RUN_FORMAT:
            raise PktError(f"{file} is damaged; start over with --force, or delete {self.path}")
        then, now = (int(each.get("ranks", 1)) for each in (recorded, inputs))
        if then != now:
            raise PktError(
                f"{self.path} holds an unfinished run of {then} ranks, and {now} would sum in another order: finish it with {then} "
                f"(torchrun --nproc-per-node), or score anew with --rescore"
            )
        different = difference(recorded, inputs)
        if not different and list(recorded) != list(inputs):
            # Steps and scores are by number.
            different = ["their order changed"]
        if different:
            raise PktError(
                f"{self.path} holds an unfinished run of other inputs ({', '.join(different)}); finish it with the old ones, "
                "or start over with --force"
            )

    def _write(self) -> None:
        with atomic_file(self.path / "run.json") as scratch:
            write_json(scratch, self.value)

    def check_space(self, size: int) -> None:
        """Refuse to begin what will not fit on the disk, counting what is here already."""
        here = sum(file.stat().st_size for file in self.path.iterdir() if file.is_file())
        free = shutil.disk_usage(self.path).free
        if size > here + free:
            raise PktError(
                f"{self.path} will need up to {spoken_size(size - here)} more and its disk has {spoken_size(free)} free; "
                "name an output on a larger disk, or keep fewer scores"
            )

    def execution(self, sizes: list[list[int]], memory: MemoryPlan) -> list[list[int]]:
        """The recorded micro-batches, or these, recorded: they are part of what makes the bytes."""
        recorded = self.value.get("execution")
        if recorded is None:
            recorded = self.value["execution"] = {
                "micro_batches": sizes,
                "halvings": [],
                "places": memory.places,
                "resident": memory.resident,
                "threads": torch.get_num_threads(),
            }
            self._write()
        found: list[list[int]] = recorded["micro_batches"]
        return found

    def resized(self, sizes: list[list[int]], why: str) -> None:
        self.value["execution"]["micro_batches"] = sizes
        self.value["execution"]["halvings"].append({"why": why, "after": len(self.steps)})
        self._write()

    def commit(self, key: Key, progress: Progress, extractors: Sequence[Extractor]) -> None:
        """A part of every task is finished."""
        number = len(self.steps)
        tensors = {f"grad.{i}": grad for i, grad in enumerate(progress.grads)}
        state = {"boundary": progress.boundary, "losses": progress.losses, "sizes": progress.sizes}
        if key == "front":
            # Nothing is left to compute from gradients.
            tensors, state["boundary"] = {}, -1
        self.save(f"grad-{number:04d}.safetensors", state, tensors)
        if key == "head" and any(progress.carried):
            carried = {f"{i}.{k}": t for i, task in enumerate(progress.carried) for k, t in task.items()}
            self.save("tied.safetensors", {}, carried)
        records, factors = [], {}
        for i, extractor in enumerate(extractors):
            record, pairs = _stored(extractor.choices[key])
            records.append(record)
            for name, pair in pairs.items():
                factors[f"{i}.A.{name}"], factors[f"{i}.B.{name}"] = pair.A, pair.B
        self.save(f"step-{number:04d}.safetensors", {"key": key, "records": records}, factors)
        self.steps.append(f"step-{number:04d}.safetensors")
        if number:
            (self.path / f"grad-{number - 1:04d}.safetensors").unlink(missing_ok=True)

    def resume(self, extractors: Sequence[Extractor], tasks: int) -> Progress | None:
        """Put finished parts back into the extractors; where the run stands, or None at its beginning."""
        choices: list[dict[Key, Choice]] = [{} for _ in extractors]
        for number, name in enumerate(self.steps):
            if name != f"step-{number:04d}.safetensors":
                raise PktError(f"{self.path} lacks step {number}; start over with --force")
            step, factors = self.load(name)
            for i, found in enumerate(choices):
                found[step["key"]] = _restored(step["records"][i], factors, i)
        if not self.steps:
            return None
        for extractor, found in zip(extractors, choices, strict=True):
            extractor.restore(found)
        state, grads = self.load(f"grad-{len(self.steps) - 1:04d}.safetensors")
        carried: list[dict[str, Tensor]] = [{} for _ in range(tasks)]
        if (self.path / "tied.safetensors").is_file():
            _, tied = self.load("tied.safetensors")
            for label, tensor in tied.items():
                owner, _, rest = label.partition(".")
                carried[int(owner)][rest] = tensor
        return Progress(
            state["boundary"], [grads[f"grad.{i}"] for i in range(len(grads))], state["losses"], carried, state["sizes"]
        )

    def save(self, name: str, value: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Write a checkpoint whole, with a checksum."""
        tensors = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
        text = json.dumps(value)
        with atomic_file(self.path / name) as scratch:
            write_tensors(scratch, tensors, ("pkt", json.dumps([_digest(text, tensors), text])))
            with open(scratch, "rb") as file:
                os.fsync(file.fileno())

    def load(self, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What `save` wrote. Raises `PktError` where it is damaged."""
        from safetensors import SafetensorError, safe_open

        path = self.path / name
        try:
            with safe_open(path, framework="pt") as file:
                digest, text = json.loads(file.metadata()["pkt"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if digest != _digest(text, tensors):
                raise ValueError
            value = json.loads(text)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise PktError(
                f"{path} is damaged, so this run cannot continue from it; start over with --force, or delete {self.path}"
            ) from error
        return value, tensors

    # -- scores kept for later plans

    def scores_file(self, task: int) -> Path:
        return self.path / f"scores-{task}.safetensors"

    def keep_scores(self, task: int, scores: dict[str, Tensor], tile: int | None) -> None:
        """Append a part's scores; parts computed twice because of an interruption are written twice, the last one counts."""
        kept = {n: s if tile is None else ops.tile_sums(s, tile) for n, s in scores.items()}
        if kept:
            part = sha256(*sorted(kept))[:16]
            with atomic_file(self.path / f"part-{task}-{part}.safetensors") as scratch:
                write_tensors(scratch, kept)

    def seal_scores(self, task: int, metadata: Callable[[], dict[str, Any]]) -> None:
        """One file of all parts that `pkt.Sensitivity.load` reads, copied part by part; once it is there it is whole."""
        files = sorted(self.path.glob(f"part-{task}-*.safetensors"))
        if files and not self.scores_file(task).is_file():
            self._join_parts(files, self.scores_file(task), metadata())
        for file in files:
            file.unlink()

    def _join_parts(self, files: list[Path], out: Path, meta: dict[str, Any]) -> None:
        from safetensors import safe_open

        header: dict[str, Any] = {"__metadata__": {"pkt": json.dumps(meta)}}
        places: dict[str, Path] = {}
        offset = 0
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    shape = list(opened.get_slice(name).get_shape())
                    size = 4 * math.prod(shape)
                    header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
                    places[name], offset = file, offset + size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with atomic_file(out) as scratch, open(scratch, "wb") as into:
            into.write(struct.pack("<Q", len(text)) + text)
            for name, file in places.items():
                with safe_open(file, framework="pt") as opened:
                    into.write(opened.get_tensor(name).contiguous().numpy().data)


def _stored(choice: Choice) -> tuple[dict[str, Any], dict[str, Pair]]:
    """What a part gave, as JSON, and its pairs."""
    targets: dict[str, dict[str, Any]] = {}
    for name, entries in choice.entries.items():
        targets[name] = {"entries": [e.to_json() for e in entries]}
        if name in choice.energies:
            targets[name]["energy"] = choice.energies[name]
        if name in choice.unsettled:
            targets[name]["unsettled"] = choice.unsettled[name]
    return {"total": choice.total, "entries": targets}, choice.pairs


def _restored(record: dict[str, Any], factors: Mapping[str, Tensor], i: int) -> Choice:
    choice = Choice(record["total"])
    for name, target in record["entries"].items():
        choice.entries[name] = [Entry.from_json(e) for e in target["entries"]]
        if "energy" in target:
            choice.energies[name] = target["energy"]
        if "unsettled" in target:
            choice.unsettled[name] = target["unsettled"]
        if f"{i}.A.{name}" in factors:
            kind = choice.entries[name][0].kind
            choice.pairs[name] = Pair(factors[f"{i}.A.{name}"], factors[f"{i}.B.{name}"], kind)
    return choice


def joined_progress(of_ranks: Sequence[Progress]) -> Progress:
    """That of several ranks as one, their tasks one after another."""
    first, *others = of_ranks
    found = Progress(first.boundary, [*first.grads], [*first.losses], [*first.carried], [*first.sizes])
    for each in others:
        found.grads += each.grads
        found.losses += each.losses
        found.carried += each.carried
        found.sizes += each.sizes
    return found


def parted(progress: Progress, ranks: int) -> list[Progress]:
    """What `joined_progress` made one of."""
    tasks, found, first = len(progress.sizes) // ranks, [], 0
    for rank in range(ranks):
        part = slice(rank * tasks, (rank + 1) * tasks)
        sizes = progress.sizes[part]
        stop = first + sum(map(len, sizes))
        found.append(
            Progress(
                progress.boundary, progress.grads[first:stop], progress.losses[part], progress.carried[part], sizes
            )
        )
        first = stop
    return found


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
