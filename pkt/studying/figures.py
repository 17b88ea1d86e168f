"""The figures of a study's report, drawn from stats.json; each once, for the page and for files."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from pkt.reporting import FOCUS, INK, LINE, MUTED, PALETTE, PAPER, WORSE, canvas, legend_below
from pkt.studying.summing import (
    difference_text,
    is_variant,
    lower,
    missing,
    scaled,
    split,
    values,
)
from pkt.studying.tables import untrained_value

WORDS = {"better": FOCUS, "worse": WORSE}
FIRST = 10  # steps that the loss figure enlarges

Found = dict[str, Any]
Drawn = tuple[str, str, str, Callable[[], Any]]  # file name, title, caption, and what draws it


def figures(found: Found) -> Iterator[Drawn]:
    """Every figure there is something to draw for. Of large ones by task."""
    yield from _forests(found)
    for task, value in found["tasks"].items():
        if any(values(found, start, value["decides"]) for start in value["starts"].values()):
            caption = "Dots: training seeds; bars: means; lines: untrained models, where they are near."
            yield f"scores_{task}", f"{task}: every start", caption, functools.partial(scores, found, task)
    yield from _panels(found)
    for task, value in found["tasks"].items():
        if any(start["curve"] for start in value["starts"].values()):
            caption = "Held-out NLL by learning rate, at the best scale of A. Rings: chosen."
            yield f"rates_{task}", f"{task}: how rates were chosen", caption, functools.partial(rates, found, task)
    for task, value in found["tasks"].items():
        if any(_curves(found, start) for start in value["starts"].values()):
            caption = f"{task}: mean over the training seeds; bands: their range."
            yield f"losses_{task}", f"{task}: training loss by step", caption, functools.partial(losses, found, task)
    for task in found["tasks"]:
        if len(_gains(found, task)) > 1:
            caption = (
                f"{task}: gain over plain LoRA by the norm of B₀A₀ over all matrices. Squares: variants of panels."
            )
            yield (
                f"scale_{task}",
                f"{task}: is it all the size of the start?",
                caption,
                functools.partial(scale, found, task),
            )
    if any("won" in c["items"] for c in found["comparisons"] if c["family"] == "deciding"):
        caption = f"{found['of']} against each control: % of seeds × items."
        yield "items", "Items won and lost", caption, functools.partial(items, found)


def _rows(axes: Any, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    axes.tick_params(axis="y", length=0)


# F1: the starts' differences -------------------------------------------------------------------------------------------


def _forests(found: Found) -> Iterator[Drawn]:
    for family in dict.fromkeys(c["family"] for c in found["comparisons"]):
        margins = {
            difference_text(c["metric"], c["margin"]).lstrip("+") for c in found["comparisons"] if c["family"] == family
        }
        caption = (
            f"{found['of']} minus each, with {100 * found['level']:g}% intervals over seeds × items. Strokes: seeds; band: "
            f"± {', '.join(sorted(margins))}, what would matter; coloured: told apart."
        )
        yield f"forest_{family}", f"Comparisons: {family}", caption, functools.partial(forest, found, family)


def forest(found: Found, family: str) -> Any:
    """A row for each control and task: the difference, its interval, a dot for each seed, and the margin as a band."""
    rows = [c for c in found["comparisons"] if c["family"] == family]
    figure, (axes,) = canvas(0.9 + 0.32 * len(rows))
    metric, margin = rows[0]["metric"], scaled(rows[0]["metric"], rows[0]["margin"])
    axes.axvspan(-margin, margin, color=LINE, linewidth=0)
    axes.axvline(0, color=MUTED, linewidth=1)
    for row, c in enumerate(rows):
        color = WORDS.get(c["word"], MUTED)
        mean, low, high = (scaled(metric, c[n]) for n in ("mean", "low", "high"))
        axes.plot(_each(found, c), [row + 0.22] * len(found["seeds"]), "|", color=color, markersize=5, alpha=0.7)
        axes.plot([low, high], [row, row], color=color, linewidth=2, solid_capstyle="butt")
        axes.plot([mean], [row], "o", color=color, markersize=6)
    several = len({c["task"] for c in rows}) > 1
    _rows(axes, [(f"{c['task']}: " if several else "") + c["control"] for c in rows])
    unit = "nats" if metric == "nll" else "points"
    axes.set_xlabel(f"difference [{unit}], {'left' if lower(metric) else 'right'} is better")
    return figure


def _each(found: Found, c: dict[str, Any]) -> list[float]:
    """The difference of each seed."""
    starts, name = found["tasks"][c["task"]]["starts"], f"{c['test']}.{c['metric']}"
    ours, theirs = (values(found, starts[n], name) for n in (c["of"], c["control"]))
    return [scaled(c["metric"], a - b) for a, b in zip(ours, theirs, strict=True)]


# F2: scores ------------------------------------------------------------------------------------------------------------


def _dots(axes: Any, row: float, some: list[float], color: str) -> None:
    axes.plot(some, [row] * len(some), "o", color=color, alpha=0.55, markersize=5, markeredgewidth=0)
    axes.plot([statistics.mean(some)] * 2, [row - 0.3, row + 0.3], color=color, linewidth=2)


def _axis(axes: Any, name: str) -> None:
    metric = split(name)[1]
    axes.set_title(name, size=9, color=INK)
    unit = "nats" if metric == "nll" else "%"
    axes.set_xlabel(f"{unit}, {'left' if lower(metric) else 'right'} is better")


def scores(found: Found, task: str) -> Any:
    """Each start's deciding figure, and general text beside it; the untrained models as lines."""
    value = found["tasks"][task]
    starts = {name: start for name, start in value["starts"].items() if not is_variant(found, name)}
    names = [value["decides"], *(["general.nll"] if "general" in next(iter(value["untrained"].values()), {}) else [])]
    figure, both = canvas(1.1 + 0.3 * len(starts), len(names))
    for axes, name in zip(both, names, strict=True):
        metric = split(name)[1]
        for row, (start, of) in enumerate(starts.items()):
            some = [scaled(metric, v) for v in values(found, of, name)]
            if some:
                _dots(axes, row, some, FOCUS if start == found["of"] else INK)
            else:
                why = missing(found, of) or ""
                axes.text(
                    0.5, row, why, color=MUTED, ha="center", va="center", size=9, transform=axes.get_yaxis_transform()
                )
        for style, model in zip((":", "--", "-."), value["untrained"], strict=False):
            base = untrained_value(value, model, name)
            if base is not None and _near(base, [v for of in starts.values() for v in values(found, of, name)]):
                axes.axvline(
                    scaled(metric, base), color=MUTED, linestyle=style, linewidth=1, label=f"untrained {model}"
                )
        _rows(axes, list(starts))
        _axis(axes, name)
    legend_below(figure, both[0])
    if len(both) > 1:
        both[1].set_yticklabels([])
    return figure


def _near(base: float, some: list[float]) -> bool:
    """Whether a line would leave the dots room: not where it is far off all of them."""
    if not some:
        return False
    low, high = min(some), max(some)
    return low - 3 * (high - low) <= base <= high + 3 * (high - low)


# F3-F6: the panels -----------------------------------------------------------------------------------------------------


def _panels(found: Found) -> Iterator[Drawn]:
    for name, p in found["panels"].items():
        for task, value in found["tasks"].items():
            if any(values(found, value["starts"][n], value["decides"]) for n in p["names"] if n in value["starts"]):
                title = f"Panel {name}, {task}: {p['of']} by {p['vary']}"
                caption = (
                    f"{task}: {p['of']} by {p['vary']}. Dots: training seeds; bars: means; lines: plain LoRA, noise."
                )
                yield f"panel_{name}_{task}", title, caption, functools.partial(panel, found, name, task)


def panel(found: Found, name: str, task: str) -> Any:
    """One option varied: seeds as dots and their mean; the start itself, and plain and noise controls as lines."""
    p, value = found["panels"][name], found["tasks"][task]
    metric, decides = split(value["decides"])[1], value["decides"]
    shown = dict(zip(map(str, p["over"]), p["names"], strict=True))
    rows = {**shown, f"{p['of']} itself": p["of"]}
    figure, (axes,) = canvas(1.1 + 0.32 * len(rows))
    for row, start in enumerate(rows.values()):
        some = [scaled(metric, v) for v in values(found, value["starts"][start], decides)]
        if some:
            _dots(axes, row, some, FOCUS if start == p["of"] else INK)
        else:
            why = missing(found, value["starts"][start]) or ""
            axes.text(
                0.5, row, why, color=MUTED, ha="center", va="center", size=9, transform=axes.get_yaxis_transform()
            )
    roles = {c["control"]: c["role"] for c in found["comparisons"] if c["family"] == "deciding"}
    lines = [control for control, role in roles.items() if role in ("plain", "size")]
    for style, control in zip(("--", ":"), lines, strict=False):
        some = values(found, value["starts"][control], decides)
        if some:
            mean = scaled(metric, statistics.mean(some))
            axes.axvline(mean, color=MUTED, linestyle=style, linewidth=1, label=control)
    _rows(axes, list(rows))
    _axis(axes, decides)
    legend_below(figure, axes)
    return figure


# F7: rates -------------------------------------------------------------------------------------------------------------


def _styles(found: Found, task: str) -> dict[str, dict[str, Any]]:
    """How the line of each start looks; the one that is asked about stands out."""
    names = [n for n in found["tasks"][task]["starts"] if not is_variant(found, n) and n != found["of"]]
    styles: dict[str, dict[str, Any]] = {found["of"]: {"color": FOCUS, "linewidth": 2.4, "zorder": 3}}
    for i, name in enumerate(names):
        dashes = ("-", "--", ":")[i // len(PALETTE) % 3]
        styles[name] = {"color": PALETTE[i % len(PALETTE)], "linewidth": 1.3, "linestyle": dashes}
    return styles


def rates(found: Found, task: str) -> Any:
    """Held-out loss by rate, the best scale of A; what was chosen ringed."""
    figure, (axes,) = canvas(3.4)
    lrs: set[float] = set()
    for name, style in _styles(found, task).items():
        start = found["tasks"][task]["starts"][name]
        best: dict[float, float] = {}
        for point in start["curve"]:
            lrs.add(point["lr"])
            if point["nll"] is not None:
                best[point["lr"]] = min(point["nll"], best.get(point["lr"], point["nll"]))
        if not best:
            continue
        axes.plot(list(best), list(best.values()), "o", markersize=4, label=name, **{"linestyle": "-", **style})
        chosen = start["chosen"]
        if chosen is not None and chosen["lr"] in best:
            axes.plot([chosen["lr"]], [best[chosen["lr"]]], "o", color=style["color"], markersize=10, fillstyle="none")
    axes.set_xscale("log")
    axes.set_xticks(sorted(lrs), [f"{lr:.2g}" for lr in sorted(lrs)])
    axes.minorticks_off()
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("held-out NLL")
    legend_below(figure, axes)
    return figure


# F8: losses ------------------------------------------------------------------------------------------------------------


def _curves(found: Found, start: dict[str, Any]) -> list[list[float]]:
    """The loss of each step by seed, as far as all go."""
    some = start.get("losses") or []
    if missing(found, start) is not None or not some:
        return []
    shortest = min(map(len, some))
    return [losses[:shortest] for losses in some] if shortest else []


def losses(found: Found, task: str) -> Any:
    """Training loss by step, mean and range over the seeds; the first steps enlarged beside it."""
    figure, (whole, first) = canvas(3.4, 2)
    for name, style in _styles(found, task).items():
        curves = _curves(found, found["tasks"][task]["starts"][name])
        if not curves:
            continue
        steps = list(range(1, len(curves[0]) + 1))
        by_step = list(zip(*curves, strict=True))
        for axes, upto in ((whole, len(steps)), (first, FIRST)):
            some = by_step[:upto]
            axes.fill_between(
                steps[:upto], [min(v) for v in some], [max(v) for v in some], color=style["color"], alpha=0.15, linewidth=0
            )  # fmt: skip
            axes.plot(steps[:upto], [statistics.mean(v) for v in some], label=name, **style)
    for axes, title in ((whole, "all steps"), (first, f"first {FIRST}")):
        axes.set_title(title, size=9, color=INK)
        axes.set_xlabel("step")
        axes.grid(axis="y", color=LINE, linewidth=0.8)
    whole.set_ylabel("training loss")
    legend_below(figure, whole)
    return figure


# F9: the size of the start ---------------------------------------------------------------------------------------------


def _gains(found: Found, task: str) -> dict[str, tuple[float, float]]:
    """Of each start and variant: the norm of B₀A₀, and the gain over plain LoRA."""
    value = found["tasks"][task]
    plain = next((c["control"] for c in found["comparisons"] if c["role"] == "plain" and c["task"] == task), None)
    if plain is None:
        return {}
    metric = split(value["decides"])[1]
    base = values(found, value["starts"][plain], value["decides"])
    sign = -1 if lower(metric) else 1
    gains = {}
    for name, start in value["starts"].items():
        some = values(found, start, value["decides"])
        if some and base and start.get("norm") is not None:
            gains[name] = (start["norm"], sign * scaled(metric, statistics.mean(some) - statistics.mean(base)))
    return gains


def scale(found: Found, task: str) -> Any:
    """The norm of B₀A₀ against the gain, a dot for each start and variant."""
    figure, (axes,) = canvas(3.2)
    gains = _gains(found, task)
    axes.axhline(0, color=MUTED, linewidth=1)
    variants = dict(zip((n for n in gains if is_variant(found, n)), [*PALETTE] * len(gains), strict=False))
    colors = {**variants, **{name: style["color"] for name, style in _styles(found, task).items()}}
    for name, (norm, gain) in gains.items():
        mark = "s" if is_variant(found, name) else "o"
        axes.plot([norm], [gain], mark, color=colors[name], markersize=7, label=name)
    axes.grid(color=LINE, linewidth=0.8)
    axes.margins(0.1)
    axes.set_xlabel("norm of B₀A₀")
    metric = split(found["tasks"][task]["decides"])[1]
    axes.set_ylabel(f"gain [{'nats' if metric == 'nll' else 'points'}]")
    legend_below(figure, axes)
    return figure


# F10: items ------------------------------------------------------------------------------------------------------------


def items(found: Found) -> Any:
    """Shares of seeds × items that each comparison wins and loses."""
    rows = [c for c in found["comparisons"] if c["family"] == "deciding"]
    figure, (axes,) = canvas(1.1 + 0.32 * len(rows))
    parts = {"won": FOCUS, "both": MUTED, "even": MUTED, "neither": LINE, "lost": WORSE}
    names = {"won": "won", "both": "both right", "even": "even", "neither": "neither right", "lost": "lost"}
    used: set[str] = set()
    for row, c in enumerate(rows):
        left = 0.0
        for part, color in parts.items():
            width = 100 * c["items"].get(part, 0.0)
            if width == 0:
                continue
            axes.barh(row, width, 0.62, left, color=color, label=None if part in used else names[part])
            if width > 6:
                ink = INK if part == "neither" else PAPER
                axes.text(left + width / 2, row, f"{width:.0f}", color=ink, ha="center", va="center", size=9)
            used.add(part)
            left += width
    several = len(found["tasks"]) > 1
    _rows(axes, [(f"{c['task']}: " if several else "") + c["control"] for c in rows])
    axes.grid(visible=False)
    axes.set_xlim(0, 100)
    axes.set_xlabel("%")
    legend_below(figure, axes)
    return figure
