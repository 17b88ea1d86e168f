"""Pictures of plans, score maps and comparisons."""

from __future__ import annotations

import io
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pkt.extras import needs

if TYPE_CHECKING:
    from torch import Tensor

    from pkt.planning import TransferPlan

TAKEN, LEFT = "#0b7a75", "#c9d1d3"

# What figures on a page are drawn in: the page has its own value of each, in light and in dark (templates/report.html).
FOCUS, WORSE, INK, MUTED, LINE, PAPER = TAKEN, "#b3261e", "#1c2426", "#6b7375", "#dde3e4", "#fefefe"
_COLORS = {FOCUS: "focus", WORSE: "worse", INK: "ink", MUTED: "muted", LINE: "line", PAPER: "page"}
PALETTE = ("#c2410c", "#2f6fd0", "#7a5cc4", "#b8860b", "#c2478f", "#5b8c2a", "#8a6d5b")


def check_packages() -> None:
    """Raises `PktError` where what draws pictures or fills pages is not installed."""
    needs("matplotlib", "report", "draw pictures")
    needs("jinja2", "report", "write pages")


def new_figure(width: float, height: float, columns: int) -> Any:
    """A matplotlib figure with a row of axes; no display is needed."""
    check_packages()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, columns, i + 1) for i in range(columns)]


def canvas(height: float, columns: int = 1) -> Any:
    """A figure for a page [inches], of the one width that reads on a phone and on a desk, and its axes."""
    figure, all_axes = new_figure(5.4, height, columns)
    for axes in all_axes:
        axes.set_facecolor("none")
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=9, color=MUTED, labelcolor=INK)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set(color=MUTED, size=9)
        for name, spine in axes.spines.items():
            spine.set(color=MUTED, visible=name == "bottom")
    return figure, all_axes


def legend_below(figure: Any, axes: Any, columns: int = 3) -> None:
    """The names of the axes' lines under the figure, each once; nothing where they have none."""
    named = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if named:
        style = {"frameon": False, "labelcolor": INK, "fontsize": 9}
        figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=columns, **style)


def save_figure(figure: Any, file: Path, kind: str) -> None:
    """As svg, without a background, or png, on white; the same bytes each time."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "pkt"}):
        if kind == "svg":
            figure.savefig(file, format="svg", facecolor="none", metadata={"Date": None, "Creator": None})
        else:
            figure.savefig(file, format=kind, dpi=160, facecolor="white", metadata={"Software": None})


def svg_text(file: Path, title: str) -> str:
    """An SVG file as an element of a page: it is as wide as its place, has ids of its own, and takes the page's colours."""
    text = file.read_text(encoding="utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.S)
    prefix = re.sub(r"[^A-Za-z0-9]+", "-", file.stem)
    text = re.sub(r'(\bid="|"#|url\(#)', rf"\g<1>{prefix}-", text)
    for color, name in _COLORS.items():
        text = text.replace(color, f"var(--{name})")
    label = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>',
        rf'<svg role="img" aria-label="{label}" \1 xmlns:xlink="http://www.w3.org/1999/xlink" xmlns="http://www.w3.org/2000/svg">',
        text,
        count=1,
    )


def drawn(figure: Any, name: str, caption: str) -> dict[str, str]:
    """A figure as a section of a page has it. name: its own on the page; caption: what is seen."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.svg"
        save_figure(figure, file, "svg")
        return {"svg": svg_text(file, caption), "caption": caption}


def plot_map(figure: Any, axes: Any, sums: dict[tuple[int, str], float], label: str) -> None:
    """Positive numbers by layer (rows) and kind of matrix (columns), their logarithm as a colour."""
    import numpy as np

    layers, kinds = sorted({layer for layer, _ in sums}), list(dict.fromkeys(kind for _, kind in sums))
    values = np.full((len(layers), len(kinds)), np.nan)
    for (layer, kind), value in sums.items():
        if value > 0:
            values[layers.index(layer), kinds.index(kind)] = np.log10(value)
    image = axes.imshow(values, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(kinds)), kinds, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(layers)), layers) if len(layers) <= 24 else None
    axes.set_ylabel("layer")
    bar = figure.colorbar(image, ax=axes, label=f"log₁₀ {label}")
    bar.ax.tick_params(labelsize=9, color=MUTED, labelcolor=INK)
    bar.ax.yaxis.label.set(color=MUTED, size=9)


def plot_curves(axes: Any, losses: dict[int, float], held_out: dict[int, float]) -> None:
    """The loss of training, and of held-out rows where there are some, by step."""
    axes.plot(list(losses), list(losses.values()), color=MUTED, linewidth=1.2, label="training")
    if held_out:
        axes.plot(list(held_out), list(held_out.values()), "o-", color=FOCUS, markersize=4, label="held-out rows")
        best = min(held_out, key=lambda step: held_out[step])
        axes.plot([best], [held_out[best]], "o", color=INK, markersize=9, fillstyle="none", label="kept")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")


def plot_pairs(axes: Any, values: dict[str, tuple[float, float]], label: str) -> None:
    """Two values a row, what was found (a filled point) and what chance gives (a hollow one)."""
    for row, (found, chance) in enumerate(values.values()):
        axes.plot([chance, found], [row, row], color=LINE, linewidth=2, zorder=1)
        axes.plot([chance], [row], "o", color=MUTED, fillstyle="none", label="by chance")
        axes.plot([found], [row], "o", color=FOCUS, label="found")
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_xlabel(label)


def plot_layers(axes: Any, plan: TransferPlan) -> None:
    """Sensitivity of each teacher layer; the chosen ones stand out."""
    colors = [TAKEN if i in plan.layer_map else LEFT for i in range(len(plan.layer_scores))]
    axes.bar(range(len(plan.layer_scores)), plan.layer_scores, color=colors)
    axes.set_xlabel("teacher layer")
    axes.set_ylabel("Σ of S")


def plot_window(axes: Any, score: Tensor, plan: TransferPlan, source: str) -> None:
    """The sensitivity map of one matrix, averaged down, with its chosen window."""
    from matplotlib.patches import Rectangle

    from pkt import ops

    entry = next(e for e in plan.entries if e.source == source)
    side = max(1, max(score.shape) // 128)
    small = ops.tile_sums(score.float(), side).add(1e-12).log10().numpy()
    axes.imshow(small, cmap="magma", aspect="auto", extent=(0, score.shape[1], score.shape[0], 0))
    if len(entry.region.rows) == len(entry.region.cols) == 1:
        (a, b), (c, d) = entry.region.rows[0], entry.region.cols[0]
        axes.add_patch(Rectangle((c, a), d - c, b - a, fill=False, edgecolor="white", linewidth=1.5))
    axes.set_xlabel("input")
    axes.set_ylabel("output")
    axes.set_title(f"log S of {source}\nwindow catches {100 * entry.share:.0f}%", fontsize=9)


def plot_methods(
    axes: Any, results: dict[str, list[float]], reference: float, label: str, guess: float | None = None
) -> None:
    """One point per training seed and a bar at the mean, per method; a dashed line where `guess` lies."""
    for row, values in enumerate(results.values()):
        axes.plot(values, [row] * len(values), "o", color=TAKEN, alpha=0.6, markersize=5)
        axes.plot([sum(values) / len(values)] * 2, [row - 0.25, row + 0.25], color="black", linewidth=2)
    if guess is not None:
        axes.axvline(guess, color="black", linestyle="--", linewidth=1, label="guessing the commonest answer")
        axes.legend(fontsize=7)
    axes.set_yticks(range(len(results)), list(results), fontsize=8)
    axes.invert_yaxis()
    axes.set_title(f"{label}\n(points: training seeds; untrained student {reference:.2f})", fontsize=9)
    axes.grid(axis="x", alpha=0.3)


def plot_scales(axes: Any, losses: dict[float, float], kept: float) -> None:
    """The loss on the seeds at each scale tried; the one that was kept stands out."""
    axes.plot(list(losses), list(losses.values()), "o-", color=TAKEN, markersize=4)
    axes.plot([kept], [losses[kept]], "o", color="black", markersize=8, fillstyle="none")
    axes.axhline(losses[0.0], color=LEFT, linestyle="--", linewidth=1, label="the student as it was")
    axes.legend(fontsize=8, frameon=False, labelcolor=INK)
    axes.set_xlabel("α")
    axes.set_ylabel("loss on the seeds")


def png_bytes(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
