"""LoRA pairs a student starts with, kept or neutral, and where they came from: what a transplant or a start writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pkt.adapters import Adapter, Pair, pairs_table, read_adapter, split_tied
from pkt.cards import start_summary, start_words
from pkt.errors import PktError
from pkt.extraction.result import Extraction
from pkt.files import MANIFEST, as_path, atomic_folder, write_json
from pkt.manifest import STARTS, manifest_of, name_kind, read_manifest
from pkt.options import Mode
from pkt.tables import Tabular


@dataclass(repr=False)
class Start(Tabular):
    """LoRA factors for matrices of a student, with how they are injected.

    kind: "transplant" or "start"; mode: "add" changes the student at once (kept), "paired" leaves it as it is at step 0;
    student: its identity (`ModelSpec.identity`); energies: share of each change's squared norm that its pair holds.
    """

    KINDS: ClassVar[tuple[str, ...]] = STARTS

    kind: str
    pairs: dict[str, Pair]
    student: dict[str, Any]
    mode: Mode = "add"
    energies: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return max(p.rank for p in self.pairs.values())

    def adapter(self) -> Adapter:
        return Adapter(self.pairs, str(self.student.get("name", "")), self.student.get("tied_head"))

    def table(self) -> list[tuple[str, ...]]:
        return pairs_table(self.pairs, self.energies)

    def summary(self) -> list[str]:
        changed = self.mode == "add" and any(bool(p.B.any()) for p in self.pairs.values())
        return [start_summary([p.rank for p in self.pairs.values()], self.energies, changed)]

    def __repr__(self) -> str:
        return f"Start({self.kind}: {self.summary()[0]})"

    def save(self, folder: str | Path, *, force: bool = False) -> None:
        """Write the folder atomically: PEFT's two files, pkt.json and a model card. Raises `PktError` where it cannot."""
        with atomic_folder(folder, force=force) as scratch:
            self.adapter().write(scratch)
            write_json(scratch / MANIFEST, self.manifest())
            (scratch / "README.md").write_text(self.card(), encoding="utf-8", newline="\n")

    def manifest(self) -> dict[str, Any]:
        entries = {
            "mode": self.mode,
            "student": self.student,
            "kinds": {m: p.kind for m, p in self.pairs.items()},
            "ranks": {m: p.rank for m, p in self.pairs.items()},
            "energies": self.energies,
            **self.provenance,
        }
        return manifest_of(self.kind, entries)

    @classmethod
    def load(cls, folder: str | Path) -> Start:
        """Read what `save` wrote. Raises `PktError` for anything else."""
        folder = as_path(folder, "a transplant or start, or the path of its folder,")
        manifest = read_manifest(folder)
        if manifest.get("kind") not in cls.KINDS:
            raise PktError(f"{folder} is {name_kind(manifest)}, not a transplant or a start")
        adapter, _ = read_adapter(folder)
        kinds = manifest["kinds"]
        adapter = split_tied(adapter, manifest["student"].get("tied_head"))
        if set(adapter.pairs) != set(kinds):
            raise PktError(
                f"{folder}: {MANIFEST} and the weights list different modules; the folder was changed, make it again"
            )
        pairs = {m: Pair(adapter.pairs[m].A, adapter.pairs[m].B, kinds[m]) for m in kinds}
        known = ("format", "kind", "mode", "student", "kinds", "ranks", "energies")
        rest = {k: v for k, v in manifest.items() if k not in known}
        return cls(manifest["kind"], pairs, manifest["student"], manifest["mode"], manifest["energies"], rest)

    @property
    def how(self) -> str:
        """What it is, in words."""
        return start_words(self.kind, self.provenance.get("control"))

    def card(self) -> str:
        """README.md of the folder."""
        rows = "\n".join(f"| {k} | {v} |" for k, v in self.provenance.get("told", {}).items())
        return f"""---
library_name: peft
base_model: {self.student.get("name", "")}
tags: [lora, peft, pkt, {self.kind}]
---

# {self.kind.capitalize()} for {self.student.get("name", "the student")}

An ordinary LoRA of the student made by pkt: {self}. Plain PEFT loads it, vLLM serves it, any trainer goes on from it
(`pkt train STUDENT THIS_FOLDER DATA.jsonl --out RUN`).

| | |
|---|---|
{rows}

No claim is made by this card: measure it on your own test rows, with general text beside them.
"""


def open_start(given: Any) -> Extraction | Start:
    """An extraction, a transplant or a start: the value, or what its folder holds. Raises `PktError` for anything else."""
    if isinstance(given, (Extraction, Start)):
        return given
    folder = as_path(given, "an extraction or a transplant, or the path of its folder,")
    return Start.load(folder) if read_manifest(folder).get("kind") in Start.KINDS else Extraction.load(folder)
