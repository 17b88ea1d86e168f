"""README.md of the folders that pkt writes: what is in them, for a model hub and for who opens them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pkt.version import __version__

EXTRACTION = """---
library_name: peft
base_model: {student}
tags: [lora, peft, pkt, knowledge-transfer]
---

# Parametric knowledge of {teacher}, cut to the shape of {student}

A LoRA extraction made by pkt {version}: {summary}.
Source of the method: *Seeking Neural Nuggets* (ICLR 2024, arXiv 2310.11451).

**Loaded by plain PEFT this adapter is added to the student, which changes the student at once.** The method means it as a
start for training with the student's function unchanged at step 0: `pkt train {quoted} DIR DATA.jsonl --out RUN`, or
`model = pkt.inject(student, DIR)` in front of any trainer, then `pkt.finalize(model, OUT)` for a plain adapter.

| | |
|---|---|
| teacher | {teacher} |
| student | {student} |
| seeds | {seeds} |
| layers | {layers} |
| regions | {select}, modules {modules} |
| factorization | {factorization} |

No claim of transfer is made by this card: measure against plain LoRA, PiSSA and a random window (`pkt demo` shows how).
"""

INJECTED = """---
library_name: peft
base_model: {base}
tags: [lora, peft, pkt]
---

# An injected LoRA, ready to be trained

Made by pkt {version}, mode `{mode}`, for {student}. Train it with any PEFT trainer on
`{base}` (`PeftModel.from_pretrained(model, DIR, is_trainable=True)`), then `pkt finalize OUTPUT --out ADAPTER` gives a plain
LoRA for the original student.
"""

FINALIZED = """---
library_name: peft
base_model: {base}
tags: [lora, peft, pkt]
---

# LoRA for {base}

A plain LoRA adapter of rank {rank} (alpha = r, no patterns) finalized by pkt {version}
from a `{mode}` injection. Load it on the original model:
`PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), DIR)`.

{report}
"""


def extraction_summary(ranks: Sequence[int], energies: Mapping[str, float], unsettled: Mapping[str, float]) -> str:
    """An extraction in a line. unsettled: module -> residual of directions that the iteration had not found when it ended."""
    mean = sum(energies.values()) / max(1, len(energies))
    span = str(min(ranks)) if len(set(ranks)) == 1 else f"{min(ranks)} to {max(ranks)}"
    said = f"{len(ranks)} pairs of rank {span}; they catch {100 * mean:.1f}% of their regions' energy on average"
    if not unsettled:
        return said
    worst = max(unsettled, key=lambda module: unsettled[module])
    return (
        f"{said}; {len(unsettled)} of them are not quite the leading directions (residual up to {100 * unsettled[worst]:.0f}%, "
        f"{worst}): their spectra are flat, and svd='adaptive' or 'exact' (--svd) finds them"
    )


def start_words(kind: str, control: str | None) -> str:
    """What a start or a transplant is, in words."""
    if control is not None:
        return f"a control of one, {control}"
    return {"transplant": "what a teacher learnt, cut to this student", "start": "a start of the student's own"}[kind]


def start_summary(ranks: Sequence[int], energies: Mapping[str, float], changed: bool) -> str:
    """A start or a transplant in a line. changed: whether it makes the student another function at once."""
    what = "kept: the student is changed" if changed else "neutral: the student is as it was"
    said = f"{len(ranks)} pairs of rank up to {max(ranks)}, {what}"
    if not energies:
        return said
    mean = sum(energies.values()) / len(energies)
    return f"{said}; they hold {100 * mean:.1f}% of the change's energy on average"


def write_card(folder: Path, card: str, **values: object) -> None:
    """One of the cards above as the folder's README.md; values: what it names, without the version."""
    text = card.format(version=__version__, **values)
    (folder / "README.md").write_text(text, encoding="utf-8", newline="\n")
