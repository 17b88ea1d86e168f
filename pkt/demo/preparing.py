"""What the demo trains from: lineage of both students, the transplant, the paper's windows, and the re-pruned teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import pkt
from pkt.demo.measuring import ASSETS, OURS, RANK, SEEDS
from pkt.extraction import Extraction, Start
from pkt.matching import Lineage, shrink_to
from pkt.models import load_model, save_model
from pkt.options import Execution, Factorization, PlanOptions
from pkt.transferring import Listeners, Recipe, transfer_recipes
from pkt.transplanting import Control

Say = Callable[[str], None]
CONTROLS: dict[str, Control] = {"wrong units": "wrong-units", "noise of the same size": "noise"}


@dataclass(frozen=True)
class Prepared:
    """lineages: of the descendant and the stranger; scores: the teacher's; own: the controls' own best α by the seeds."""

    lineages: dict[str, Lineage]
    transplant: Start
    window: Extraction
    scores: dict[str, Tensor]
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
        teacher, descendant, SEEDS, base=ASSETS / "base", rank=RANK, out=out / OURS, force=True, progress=False
    )
    matched = Lineage.load(out / OURS / "lineage.json")
    say(f"   {moved.provenance['told']['kept at']}")
    own = {}
    for name, kind in CONTROLS.items():
        made = pkt.transplant(
            teacher, descendant, SEEDS, base=ASSETS / "base", lineage=matched, rank=RANK, control=kind,
            alpha=moved.provenance["alpha"], progress=False,
        )  # fmt: skip
        own[name] = made.provenance["own_alpha"]
    _reprune(matched, out / "repruned")
    _, scores = _window(descendant, out / "window")
    window, _ = _window(stranger, out / "window-stranger")
    return Prepared(lineages, moved, window, scores, own)


def _window(student: Path, folder: Path) -> tuple[Extraction, dict[str, Tensor]]:
    """The paper's extraction for a student, saved, and the teacher's scores that it was planned by."""
    scored: dict[str, Tensor] = {}
    listeners = Listeners(
        progress=False,
        on_scores=lambda task, scores: scored.update({n: s.clone() for n, s in scores.items()}),
    )
    recipe = Recipe(PlanOptions(), Factorization(RANK))
    made = transfer_recipes(
        ASSETS / "teacher",
        student,
        {"": SEEDS},
        {"window": recipe},
        execution=Execution(dtype=torch.float32),
        listeners=listeners,
    )
    made["", "window"].save(folder)
    return made["", "window"], scored


def _reprune(found: Lineage, folder: Path) -> None:
    """The tuned teacher cut to the descendant's units: what somebody without pkt would train."""
    teacher = load_model(ASSETS / "teacher", dtype=torch.float32)
    # With the gains as they are, as the descendant was cut.
    cut = shrink_to(teacher, copy.deepcopy(found), rescale=False)
    cut.generation_config = teacher.generation_config
    save_model(cut, folder, ASSETS / "teacher")
