"""Draws docs/does-it-help.svg, README's picture, from bench/results/study_demo.json.

python bench/readme_picture.py               # draws it
python bench/readme_picture.py --check       # only says whether it is of that file
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pkt.files import sha256
from pkt.reporting import canvas, save_figure
from pkt.reporting.plots import FOCUS, INK, LINE, MUTED

ROOT = Path(__file__).parents[1]
SOURCE, PICTURE = ROOT / "bench" / "results" / "study_demo.json", ROOT / "docs" / "does-it-help.svg"


def main() -> int:
    text = SOURCE.read_text(encoding="utf-8")
    mark = f"<!-- {sha256(text)} -->"
    if "--check" in sys.argv:
        there = PICTURE.is_file() and mark in PICTURE.read_text(encoding="utf-8")
        print("" if there else f"{PICTURE.name} is not of {SOURCE.name}; run python bench/readme_picture.py")
        return int(not there)
    found = json.loads(text)
    (task,) = found["tasks"].values()
    test, _, metric = task["decides"].rpartition(".")
    untrained = {who: of[test][metric] for who, of in task["untrained"].items()}
    figure, (axes,) = canvas(3.3)
    starts = sorted(task["starts"].items(), key=lambda item: _mean(item[1], test, metric))
    for row, (start, told) in enumerate(starts):
        before, after = told["before"][test][metric], _mean(told, test, metric)
        color = FOCUS if start == found["of"] else MUTED
        axes.plot([before, after], [row, row], color=LINE, linewidth=2, zorder=1)
        axes.plot(
            [before], [row], "o", color=color, fillstyle="none", label="before any training" if row == 0 else None
        )
        axes.plot(
            [after],
            [row],
            "o",
            color=color,
            label=f"after the same training ({len(found['seeds'])} seeds)" if row == 0 else None,
        )
        axes.annotate(
            f"{after:.2f}",
            (after, row),
            (-7, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=9,
            color=INK,
        )
    axes.axvline(untrained["student"], color=INK, linestyle=":", linewidth=1, label="the student as it was")
    axes.set_yticks(range(len(starts)), [start for start, _ in starts])
    axes.set_ylim(len(starts) - 0.4, -0.6)
    axes.set_xlim(left=-0.9)
    axes.set_xlabel(f"NLL of the answers, nats a token (teacher: {untrained['tuned']:.2f})")
    figure.legend(loc="outside lower center", ncols=1, frameon=False, labelcolor=INK, fontsize=9)
    figure.suptitle("What a student starts from, and where the same training takes it", fontsize=10, color=INK)
    figure.patch.set_facecolor("white")
    save_figure(figure, PICTURE, "svg")
    drawn = PICTURE.read_text(encoding="utf-8").replace("</svg>", f"{mark}\n</svg>")
    # On a page of any colour.
    whole = '<rect width="100%" height="100%" fill="white"/>'
    start = drawn.index(">", drawn.index("<svg")) + 1
    PICTURE.write_text(drawn[:start] + whole + drawn[start:], encoding="utf-8")
    return 0


def _mean(start: dict, test: str, metric: str) -> float:
    values = [run[test][metric] for run in start["after"]]
    return sum(values) / len(values)


if __name__ == "__main__":
    sys.exit(main())
