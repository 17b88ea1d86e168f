"""What the demo trains from: lineage of both students, the transplant, the paper's windows, and the re-pruned teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pkt
from pkt.demo.measuring import ASSETS, OURS, RANK, SEEDS, control
from pkt.extraction import Extraction, Start
from pkt.matching import Lineage, shrink_to
from pkt.models import load_model, load_tokenizer

Say = Callable[[str], None]
CONTROLS = {"wrong units": "wrong-units", "noise of the same size": "noise"}


@dataclass(frozen=True)
class Prepared:
    """lineages: of the descendant and the stranger; own: the controls' own best α by the seeds."""

    lineages: dict[str, Lineage]
    transplant: Start
    window: Extraction
    own: dict[str, float]


def prepare(out: Path, say: Say) -> Prepared:
    """Write the folders that `measuring.begin` reads, and tell what they are."""
    teacher, descendant, stranger = (ASSETS / name for name in ("teacher", "descendant", "student"))
    say("[bold]1. pkt lineage[/bold]: do the students descend from the teacher? By their weights alone:")
    lineages = {name: pkt.lineage(teacher, ASSETS / name, progress=False) for name in ("descendant", "student")}
    for name, found in zip(("descendant", "stranger"), lineages.values(), strict=True):
        say(f"   {name}: [bold]{found.verdict}[/bold]: {found.reason}")
    say("[bold]2. pkt transplant[/bold]: what the teacher learnt since its base, on the descendant's units, kept")
    moved = pkt.transplant(
        teacher, descendant, SEEDS, base=ASSETS / "base", lineage=lineages["descendant"], rank=RANK, out=out / OURS,
        force=True, progress=False,
    )  # fmt: skip
    say(f"   {moved.provenance['told']['kept at']}")
    own = {name: control(kind, out, 0).provenance["own_alpha"] for name, kind in CONTROLS.items()}
    _reprune(lineages["descendant"], out / "repruned")
    common: dict[str, Any] = {"rank": RANK, "dtype": torch.float32, "force": True, "progress": False}
    window = pkt.transfer(teacher, stranger, SEEDS, out=out / "window-stranger", **common)
    pkt.transfer(teacher, descendant, SEEDS, out=out / "window", **common)
    return Prepared(lineages, moved, window, own)


def _reprune(found: Lineage, folder: Path) -> None:
    """The tuned teacher cut to the descendant's units: what somebody without pkt would train."""
    teacher = load_model(ASSETS / "teacher", dtype=torch.float32)
    cut = shrink_to(teacher, copy.deepcopy(found))
    cut.generation_config = teacher.generation_config
    cut.save_pretrained(folder)
    load_tokenizer(ASSETS / "teacher").save_pretrained(folder)
