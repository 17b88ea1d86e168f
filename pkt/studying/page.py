"""A study's page: the verdict, every start beside the untrained models, every comparison, how rates were chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pkt.files import atomic_file
from pkt.reporting import new_figure, page, png_bytes

_COLORS = {"better": "#0b7a75", "worse": "#b3261e"}
GREY = "#6b7375"


def write_page(found: dict[str, Any], out: Path) -> Path:
    """report.html of a study's stats.json. Raises `PktError` where what draws is not installed."""
    sections: list[dict[str, Any]] = [{"heading": "Verdict", "text": [found["verdict"], *_notes(found)]}]
    for task, value in found["tasks"].items():
        sections.append({"heading": f"{task}: every start", **_scores(task, value, len(found["seeds"]))})
    families = list(dict.fromkeys(c["family"] for c in found["comparisons"]))
    for family in families:
        rows = [c for c in found["comparisons"] if c["family"] == family]
        sections.append({"heading": f"Comparisons: {family}", **_forest(found, rows)})
    for task, value in found["tasks"].items():
        sections.append({"heading": f"{task}: how rates were chosen", **_tuning(value)})
    if found["failures"]:
        rows = [(f["cell"], f["error"]) for f in found["failures"]]
        sections.append({"heading": "What is missing", "head": ["cell", "failed of"], "rows": rows})
    file = out / "report.html"
    with atomic_file(file) as scratch:
        scratch.write_text(page(f"pkt study: {found['study']}", sections), encoding="utf-8")
    return file


def _notes(found: dict[str, Any]) -> list[str]:
    tuning = found["tuning"]
    ends = [
        f"{name} ({task})"
        for task, value in found["tasks"].items()
        for name, start in value["starts"].items()
        if start["at_the_end"]
    ]
    notes = [
        f"{len(found['seeds'])} training seeds; all starts tuned on the same grid (lr {', '.join(f'{v:g}' for v in tuning['lr'])}; "
        f"A × {', '.join(f'{v:g}' for v in tuning['a_scale'])}), rows and tuning seeds ({', '.join(map(str, tuning['seeds']))}), "
        "none of which is reported. Intervals count seeds and items as samples; p values of a family are adjusted together (Holm)."
    ]
    if ends:
        notes.append(
            f"The best rate is still an end of the grid for {', '.join(ends)}: a wider grid may change what is said."
        )
    return notes


def _scores(task: str, value: dict[str, Any], planned: int) -> dict[str, Any]:
    test, _, metric = value["decides"].rpartition(".")
    starts = value["starts"]
    figure, (axes,) = new_figure(8, 0.6 + 0.35 * len(starts), 1)
    for row, start in enumerate(starts.values()):
        if start.get("trained", 0) < planned:
            continue
        values = [run[test][metric] for run in start.get("after", []) if metric in run.get(test, {})]
        axes.plot(values, [row] * len(values), "o", color=_COLORS["better"], alpha=0.6, markersize=5)
        if values:
            axes.plot([sum(values) / len(values)] * 2, [row - 0.3, row + 0.3], color="black", linewidth=2)
    axes.set_yticks(range(len(starts)), list(starts), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"{value['decides']} after training (points: training seeds; bar: mean)", fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    names = list(
        dict.fromkeys(
            f"{t}.{m}" for s in starts.values() for run in s.get("after", []) for t, v in run.items() for m in v
        )
    )
    head = [
        "",
        *(f"{n} before" for n in names if n.endswith("nll")),
        *(f"{n} after" for n in names),
        "trainable",
        "made in",
        "trained in",
    ]
    rows = [(f"untrained {name}", *_untrained(names, figures)) for name, figures in value["untrained"].items()]
    rows += [(name, *_start(names, start, planned)) for name, start in starts.items()]
    note = f"{value['rows']} rows learnt from, {value['held_out']} held out to choose rates."
    return {"picture": png_bytes(figure), "text": [note], "head": head, "rows": rows}


def _untrained(names: list[str], figures: dict[str, dict[str, float]]) -> list[str]:
    def one(name: str) -> str:
        test, _, metric = name.rpartition(".")
        value = figures.get(test, {}).get(metric)
        return "" if value is None else f"{value:.3f}"

    return [*(one(n) for n in names if n.endswith("nll")), *(one(n) for n in names), "", "", ""]


def _start(names: list[str], start: dict[str, Any], planned: int) -> list[str]:
    def before(name: str) -> str:
        test, _, metric = name.rpartition(".")
        value = start.get("before", {}).get(test, {}).get(metric)
        return "" if value is None else f"{value:.3f}"

    def after(name: str) -> str:
        test, _, metric = name.rpartition(".")
        values = [run[test][metric] for run in start.get("after", []) if metric in run.get(test, {})]
        if start.get("trained", 0) < planned:
            return f"{start.get('trained', 0)} of {planned} seeds"
        if start.get("diverged"):
            return f"diverged in {start['diverged']} of {start['trained']}"
        if not values:
            return ""
        mean = sum(values) / len(values)
        spread = (sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)) ** 0.5
        return f"{mean:.3f} ± {spread:.3f}"

    def seconds(name: str) -> str:
        return "" if start.get(name) is None else f"{start[name]:.1f} s"

    trainable = "" if start.get("trainable") is None else f"{start['trainable']:,}"
    shown = [*(before(n) for n in names if n.endswith("nll")), *(after(n) for n in names)]
    return [*shown, trainable, seconds("seconds_to_make"), seconds("seconds_to_train")]


def _forest(found: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Each control's difference with its interval and the margin; as a table too."""
    if not rows:
        return {"text": ["Nothing to compare yet."]}
    figure, (axes,) = new_figure(8, 0.9 + 0.35 * len(rows), 1)
    for row, c in enumerate(rows):
        color = _COLORS.get(c["word"], GREY)
        axes.plot([c["low"], c["high"]], [row, row], color=color, linewidth=2)
        axes.plot([c["mean"]], [row], "o", color=color)
    margin = rows[0]["margin"]
    axes.axvline(0, color="black", linewidth=1)
    axes.axvspan(-margin, margin, color="#c9d1d3", alpha=0.5)
    several = len(found["tasks"]) > 1
    axes.set_yticks(range(len(rows)), [(f"{c['task']}: " if several else "") + c["control"] for c in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(
        f"{rows[0]['metric']} of {found['of']} minus the control's (band: ±{margin:g}, what would matter)", fontsize=8
    )
    head = [
        "task",
        "figure",
        f"{found['of']} minus",
        "difference",
        "95% interval",
        "p",
        "adjusted",
        "",
        "would have seen",
        "seeds for the margin",
    ]
    table = [
        (
            c["task"], f"{c['test']}.{c['metric']}", c["control"], f"{c['mean']:+.4f}", f"{c['low']:+.4f} to {c['high']:+.4f}",
            f"{c['p']:.3g}", f"{c['adjusted']:.3g}", c["word"], f"{c['detectable']:.4f}",
            "more items" if c["seeds_for_margin"] is None else c["seeds_for_margin"],
        )
        for c in rows
    ]  # fmt: skip
    return {"picture": png_bytes(figure), "head": head, "rows": table}


def _tuning(value: dict[str, Any]) -> dict[str, Any]:
    starts = {name: start for name, start in value["starts"].items() if start["curve"]}
    if not starts:
        return {"text": ["Nothing is tuned yet."]}
    figure, (axes,) = new_figure(8, 3.2, 1)
    for name, start in starts.items():
        lrs = sorted({p["lr"] for p in start["curve"]})
        best = [
            min((p["nll"] for p in start["curve"] if p["lr"] == lr and p["nll"] is not None), default=None)
            for lr in lrs
        ]
        axes.plot(lrs, [float("nan") if b is None else b for b in best], "o-", label=name, markersize=4, linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate", fontsize=8)
    axes.set_ylabel("held-out NLL (best A)", fontsize=8)
    axes.legend(fontsize=7)
    head = ["", "chosen lr", "A ×", "at the grid's end", "tunings", "diverged"]
    rows = [
        (
            name, *(f"{start['chosen'][n]:g}" if start["chosen"] else "" for n in ("lr", "a_scale")),
            "yes" if start["at_the_end"] else "", len(start["curve"]), sum(p["nll"] is None for p in start["curve"]),
        )
        for name, start in starts.items()
    ]  # fmt: skip
    return {"picture": png_bytes(figure), "head": head, "rows": rows}
