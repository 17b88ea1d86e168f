"""Pictures of plans, score maps and comparisons."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from pkt.extras import needs

if TYPE_CHECKING:
    from torch import Tensor

    from pkt.planning import TransferPlan

TAKEN, LEFT = "#0b7a75", "#c9d1d3"


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


def plot_layers(axes: Any, plan: TransferPlan) -> None:
    """Sensitivity of each teacher layer; the chosen ones stand out."""
    colors = [TAKEN if i in plan.layer_map else LEFT for i in range(len(plan.layer_scores))]
    axes.bar(range(len(plan.layer_scores)), plan.layer_scores, color=colors)
    axes.set_title("teacher layers: sensitivity\n(dark: feeds the student)", fontsize=9)
    axes.set_xlabel("layer")


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
    axes.legend(fontsize=7)
    axes.set_xlabel("α")
    axes.set_title("loss on the seeds (circle: kept)", fontsize=9)


def png_bytes(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
