"""An extraction: LoRA pairs with their provenance, and the PEFT adapter folder that holds them, with its card."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pkt.adapters import Adapter, Pair, pairs_table, read_adapter, split_tied
from pkt.cards import EXTRACTION, extraction_summary, write_card
from pkt.errors import PktError
from pkt.files import MANIFEST, as_path, atomic_folder, write_json
from pkt.manifest import manifest_of, name_kind, read_manifest
from pkt.models import Kind
from pkt.planning import TransferPlan
from pkt.tables import Tabular


@dataclass(repr=False)
class Extraction(Tabular):
    """LoRA factors for every student matrix of a plan, and where they came from."""

    mode: ClassVar[Literal["paired"]] = "paired"  # how they are injected unless one says otherwise

    pairs: dict[str, Pair]
    energies: dict[str, float]  # share of each region's squared norm that its factors catch; the mean over experts
    plan: TransferPlan
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return max(p.rank for p in self.pairs.values())

    def adapter(self) -> Adapter:
        tied_head = self.plan.student.get("tied_head")
        return Adapter(self.pairs, str(self.plan.student.get("name", "")), tied_head)

    def table(self) -> list[tuple[str, ...]]:
        return pairs_table(self.pairs, self.energies)

    def summary(self) -> list[str]:
        ranks = [p.rank for p in self.pairs.values()]
        return [extraction_summary(ranks, self.energies, self.provenance.get("unsettled", {}))]

    def __repr__(self) -> str:
        return f"Extraction({self.summary()[0]})"

    def save(self, folder: str | Path, *, force: bool = False) -> None:
        """Write the folder atomically: PEFT's two files, pkt.json and a model card.

        Raises `PktError` when the folder holds something else, or the disk is full (nothing is left behind then).
        """
        with atomic_folder(folder, force=force) as scratch:
            self.adapter().write(scratch)
            write_json(scratch / MANIFEST, self.manifest())
            _write_card(scratch, self)

    def manifest(self) -> dict[str, Any]:
        entries = {
            "plan": self.plan.as_dict(),
            "kinds": {m: p.kind for m, p in self.pairs.items()},
            "ranks": {m: p.rank for m, p in self.pairs.items()},
            "energies": self.energies,
            **self.provenance,
        }
        return manifest_of("extraction", entries)

    @classmethod
    def load(cls, folder: str | Path) -> Extraction:
        """Read what `save` wrote. Raises `PktError` for anything else."""
        folder = as_path(folder, "an extraction, or the path of its folder,")
        manifest = read_manifest(folder)
        if manifest.get("kind") != "extraction":
            raise PktError(
                f"{folder} is {name_kind(manifest)}, not an extraction; run `pkt inspect {shlex.quote(str(folder))}`"
            )
        try:
            plan = TransferPlan.from_json(manifest["plan"])
        except PktError as error:
            raise PktError(f"{folder / MANIFEST} is damaged: {error}") from error
        adapter, _ = read_adapter(folder)
        kinds: dict[str, Kind] = manifest["kinds"]
        adapter = split_tied(adapter, plan.student.get("tied_head"))
        planned = {entry.target for entry in plan.entries}
        if not set(adapter.pairs) == set(kinds) == planned == set(manifest["energies"]):
            raise PktError(
                f"{folder}: {MANIFEST} and the weights list different modules; the folder was changed, make it again"
            )
        pairs = {m: Pair(adapter.pairs[m].A, adapter.pairs[m].B, kinds[m]) for m in kinds}
        rest = {k: v for k, v in manifest.items() if k not in ("format", "kind", "plan", "kinds", "ranks", "energies")}
        return cls(pairs, manifest["energies"], plan, rest)


def describe_factorization(extraction: Extraction) -> dict[str, Any]:
    """The options that were in use: the largest rank and the energy go together."""
    found = extraction.provenance.get("factorization", {})
    unused = ("energy", "max_rank") if found.get("energy") is None else ("rank",)
    return {k: v for k, v in found.items() if k not in unused}


def _write_card(folder: Path, extraction: Extraction) -> None:
    """README.md of an extraction folder, from its provenance alone."""
    plan, seeds = extraction.plan, extraction.provenance.get("seeds", {})
    count = seeds.get("count", "unknown")
    write_card(
        folder,
        EXTRACTION,
        teacher=plan.teacher["name"],
        student=plan.student["name"],
        quoted=shlex.quote(plan.student["name"]),
        summary=extraction,
        seeds=f"{count} samples, fingerprint {str(seeds.get('fingerprint', 'unknown'))[:16]}",
        layers="; ".join(plan.summary()[:1]),
        select=plan.options["select"],
        modules=plan.options["modules"],
        factorization=", ".join(f"{k} {v}" for k, v in describe_factorization(extraction).items()),
    )
