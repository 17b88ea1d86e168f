"""The pages of what is neither an extraction nor a start: scores, runs, adapters, several tasks, whole models."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pkt.files import MANIFEST, read_json
from pkt.manifest import read_manifest, tasks_in
from pkt.reporting.again import command_of
from pkt.reporting.folders import inspect_folder
from pkt.reporting.plots import canvas, drawn, legend_below, plot_curves, plot_map

if TYPE_CHECKING:
    from pkt.scoring import Sensitivity

Section = dict[str, Any]


def of_scores(scores: Sensitivity) -> list[Section]:
    """Of a file of scores: where S lies, by layer and kind of matrix."""
    head, *kinds = scores.table()
    facts = [("measure", scores.measure), ("samples", len(scores.losses)), *_known(scores.provenance)]
    return [
        {"heading": "What was scored", "head": ["", ""], "rows": facts, "text": scores.summary()},
        sensitivity_map(scores.totals(), "Σ of S over a matrix"),
        {"heading": "By kind", "head": head, "rows": kinds},
        {
            "heading": "Losses of the samples",
            "head": ["sample", "mean loss, nats a token"],
            "rows": [(i, f"{loss:.4f}") for i, loss in enumerate(scores.losses, 1)],
            "folded": True,
        },
    ]


def sensitivity_map(sums: dict[str, float], label: str) -> Section:
    """S by layer and kind of matrix, from the sums of whole parameters; what lies outside the layers is said in words."""
    from pkt.tables import by_last_name

    found: dict[tuple[int, str], float] = {}
    outside = {}
    for kind, names in by_last_name(sums).items():
        for name in names:
            layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
            if layer is None:
                outside[name] = sums[name]
            else:
                found[layer, kind] = found.get((layer, kind), 0.0) + sums[name]
    total = sum(sums.values()) or 1.0
    text = [f"Outside the layers: {', '.join(f'{n} {100 * v / total:.1f}% of S' for n, v in outside.items())}."]
    section: Section = {"heading": "Where S lies", "text": text if outside else []}
    if found:
        figure, (axes,) = canvas(1.6 + 0.16 * min(24, len({layer for layer, _ in found})))
        plot_map(figure, axes, found, "S")
        section["figures"] = [drawn(figure, "map", f"{label}, by layer and kind of matrix")]
    return section


def of_run(folder: Path) -> list[Section]:
    """Of a training run: its settings, the loss by step, what held-out rows say before and after."""
    manifest, told = read_manifest(folder), inspect_folder(folder)
    losses = {int(log["step"]): float(log["loss"]) for log in _history(folder) if "loss" in log}
    held = manifest.get("held_out") or {}
    looks = {int(step): float(nll) for step, nll in held.get("looks", [])}
    sections = [_told(told, manifest)]
    if losses or looks:
        figure, (axes,) = canvas(2.6)
        plot_curves(axes, losses, looks)
        legend_below(figure, axes)
        section: Section = {"heading": "As it learnt", "figures": [drawn(figure, "curves", "Loss by step")]}
        if looks:
            best = held["best"]
            section["text"] = [
                f"On {held['rows']['count']} held-out rows: {looks[min(looks)]:.4f} nats a token before training, "
                f"{best['nll']:.4f} at step {best['step']}, whose weights were kept."
            ]
            section |= {"head": ["step", "held-out NLL"], "rows": [(s, f"{nll:.4f}") for s, nll in looks.items()]}
        sections.append(section)
    settings = [(key, value) for key, value in manifest["settings"].items() if value is not None]
    return [*sections, {"heading": "Settings", "head": ["", ""], "rows": settings}, *versions_of(manifest)]


def of_adapter(folder: Path) -> list[Section]:
    """Of any other folder that pkt knows: what `pkt inspect` says, the check of its logits, its ranks."""
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else {}
    sections = [_told(inspect_folder(folder), manifest)]
    check = manifest.get("check")
    if check:
        text = (
            f"Against the trained model on {check['samples']} samples ({check['tokens']} tokens): logits differ by at most "
            f"{check['gap']:.1e}, where they reach {check['scale']:.1f}; the same next token at {100 * check['agreement']:.1f}% "
            "of positions."
        )
        sections.append({"heading": "Checked", "text": [text]})
    ranks = manifest.get("ranks")
    if isinstance(ranks, dict):
        sections.append(
            {"heading": "Matrices", "head": ["matrix", "rank"], "rows": list(ranks.items()), "folded": True}
        )
    return [*sections, *versions_of(manifest)]


def of_tasks(folder: Path) -> list[Section]:
    """Of a folder of several tasks: each by its layers and what its regions catch."""
    rows = []
    for name in tasks_in(folder):
        manifest = read_manifest(folder / name)
        plan, energies = manifest.get("plan", {}), manifest.get("energies", {})
        shares = [entry["share"] for entry in plan.get("entries", [])]
        rows.append(
            (
                name,
                ", ".join(map(str, plan.get("layer_map", []))),
                _percent(shares),
                _percent(energies.values()),
                f"pkt report {folder / name}",
            )
        )
    head = ["task", "teacher layers", "mean share of S", "mean energy kept", "its own page"]
    return [_told(inspect_folder(folder)), {"heading": "Tasks", "head": head, "rows": rows}]


def versions_of(manifest: dict[str, Any]) -> list[Section]:
    found = manifest.get("versions")
    return [{"heading": "Versions", "head": ["", ""], "rows": list(found.items()), "folded": True}] if found else []


def _percent(values: Iterable[float]) -> str:
    found = list(values)
    return f"{100 * sum(found) / len(found):.1f}%" if found else ""


def again(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """The command that makes a folder again, as a row; none where it cannot be said."""
    line = command_of(manifest)
    return [] if line is None else [("again", line)]


def _told(found: dict[str, Any], manifest: dict[str, Any] | None = None) -> Section:
    rows = [(key, value) for key, value in found.items() if value is not None] + again(manifest or {})
    return {"heading": "What this is", "head": ["", ""], "rows": rows}


def _known(provenance: dict[str, Any]) -> list[tuple[str, Any]]:
    """What scores were made from, as far as it is a name or a number."""
    seeds = provenance.get("seeds", {})
    teacher = provenance.get("teacher", {})
    found = [("teacher", teacher.get("name")), ("seeds", seeds.get("source")), ("tokens", seeds.get("tokens"))]
    return [(key, value) for key, value in found if value is not None]


def _history(folder: Path) -> list[dict[str, Any]]:
    """What transformers' Trainer logged up to the last checkpoint."""
    states = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda f: int(f.parent.name[11:]))
    history = read_json(states[-1]).get("log_history", []) if states else []
    return [log for log in history if isinstance(log, dict)]
