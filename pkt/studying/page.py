"""A study's page, and its tables and figures as files: all of it from stats.json, however much of the study is done."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pkt.files import atomic_file, os_errors
from pkt.reporting import page, save_figure, svg_text
from pkt.studying import tables
from pkt.studying.figures import Drawn, figures
from pkt.studying.summing import sentence, warnings

Section = dict[str, Any]


def write_page(found: dict[str, Any], out: Path) -> Path:
    """report.html, figures/*.svg and *.png, and tables/*.tex of a study's stats.json; returns the first.

    Raises `PktError` where what draws is not installed.
    """
    report = _Report(found, out)
    file = out / "report.html"
    with atomic_file(file) as scratch:
        scratch.write_text(page(f"pkt study: {found['study']}", report.sections()), encoding="utf-8")
    report.tidy()
    return file


class _Report:
    def __init__(self, found: dict[str, Any], out: Path) -> None:
        self.found, self.out = found, out
        self.drawn = {drawn[0]: drawn for drawn in figures(found)}
        self.written: set[Path] = set()
        for folder in ("figures", "tables"):
            (out / folder).mkdir(exist_ok=True)

    def tidy(self) -> None:
        """Take away figures and tables that an earlier report had and this one has not."""
        with os_errors(f"writing {self.out}"):
            for folder in ("figures", "tables"):
                for file in (self.out / folder).iterdir():
                    if file.suffix in (".svg", ".png", ".tex") and file not in self.written:
                        file.unlink()

    def sections(self) -> list[Section]:
        found, tasks = self.found, list(self.found["tasks"])
        deciding = [c for c in found["comparisons"] if c["family"] == "deciding"]
        words = [sentence(found, c) for c in deciding]
        sections = [
            {"heading": "Verdict", "lead": [found["verdict"]], "text": warnings(found)},
            self.section(tables.made_of(found)),
            self.section(tables.comparisons(found, "deciding"), "forest_deciding"),
            {"heading": "Each comparison in words", "text": words, "folded": True} if words else None,
            self.section(tables.scores(found)) if len(tasks) > 1 else None,
            *(self.section(tables.task_scores(found, task), f"scores_{task}") for task in tasks),
        ]
        for panel in found["panels"]:
            table = tables.crossed(found, panel) if panel in found["crossed"] else None
            sections.append(self.section(table, *(f"panel_{panel}_{task}" for task in tasks), heading=f"Panel {panel}"))
        others = [f for f in dict.fromkeys(c["family"] for c in found["comparisons"]) if f != "deciding"]
        sections += [self.section(tables.comparisons(found, f), f"forest_{f}", folded=True) for f in others]
        sections += [self.section(None, "items"), *(self.section(t, folded=True) for t in tables.items(found))]
        for kind, heading in (("losses", "Training loss by step"), ("scale", "Is it all the size of the start?")):
            sections.append(self.section(None, *(f"{kind}_{task}" for task in tasks), heading=heading))
        sections += [self.section(tables.fairness(found, task), f"rates_{task}") for task in tasks]
        sections += [{"heading": "How it was measured", "text": _how(found)}, self.section(tables.costs(found))]
        return [section for section in sections if section is not None] + _missing(found)

    def section(
        self, table: tables.Table | None, *names: str, heading: str = "", folded: bool = False
    ) -> Section | None:
        """Figures, drawn now and into their files too, with a table under them; None where there is nothing."""
        section: Section = {"folded": folded}
        drawn = [self.drawn[name] for name in names if name in self.drawn]
        if drawn:
            figures = [{"svg": self._figure(one), "caption": one[2]} for one in drawn]
            section |= {"heading": heading or drawn[0][1], "figures": figures}
        if table is not None and table.rows:
            with atomic_file(self._file("tables", table.name, "tex")) as scratch:
                scratch.write_text(tables.latex(table), encoding="utf-8")
            section |= {"heading": table.title, "head": table.head, "rows": table.rows, "notes": table.notes}
        return section if "heading" in section else None

    def _figure(self, drawn: Drawn) -> str:
        name, title, _, draw = drawn
        figure = draw()
        for kind in ("svg", "png"):
            with atomic_file(self._file("figures", name, kind)) as scratch:
                save_figure(figure, scratch, kind)
        return svg_text(self._file("figures", name, "svg"), title)

    def _file(self, folder: str, name: str, kind: str) -> Path:
        file = self.out / folder / f"{re.sub(r'[^A-Za-z0-9.=-]+', '_', name)}.{kind}"
        self.written.add(file)
        return file


def _how(found: dict[str, Any]) -> list[str]:
    tuning, seeds = found["tuning"], found["seeds"]
    lr, scales = (", ".join(f"{v:g}" for v in tuning[n]) for n in ("lr", "a_scale"))
    return [
        f"{len(seeds)} training seeds ({', '.join(map(str, seeds))}). All starts are tuned on the same grid (lr {lr}; A × "
        f"{scales}), the same rows held out and the same tuning seeds ({', '.join(map(str, tuning['seeds']))}), and each is "
        "trained at its own best. Where some start's best rate is an end of the grid, the grid grows for all.",
        "A difference is taken over training seeds × test items, paired in both, and both count as samples (Clark 1973's quasi-F "
        "as an interval, Satterthwaite's degrees of freedom). p values of one family are adjusted together (Holm).",
        "Better and worse: adjusted p below .05. The same: the 90% interval lies within the margin. Cannot tell: neither. Not yet: "
        "before all seeds are in, or with fewer than three.",
    ]


def _missing(found: dict[str, Any]) -> list[Section]:
    planned = len(found["seeds"])
    holes = [
        (
            f"{task}: {name}",
            "not tuned yet" if start["chosen"] is None else f"{start.get('trained', 0)} of {planned} seeds",
        )
        for task, value in found["tasks"].items()
        for name, start in value["starts"].items()
        if start.get("trained", 0) < planned
    ]
    sections: list[Section] = []
    if holes:
        text = ["Nothing is said of these starts until all their seeds are in; the same command goes on."]
        sections.append({"heading": "What is missing", "head": ["start", "is at"], "rows": holes, "notes": text})
    if found["failures"]:
        rows = [(f["cell"], f["error"]) for f in found["failures"]]
        sections.append({"heading": "What failed", "head": ["cell", "of"], "rows": rows})
    return sections
