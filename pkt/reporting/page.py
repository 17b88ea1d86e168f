"""One HTML page, and that of an extraction."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from pkt.extraction import Extraction, describe_factorization
from pkt.files import atomic_file, check_output_file
from pkt.planning import describe
from pkt.reporting.plots import TAKEN, check_packages, new_figure, plot_layers, png_bytes


def page(title: str, sections: list[dict[str, Any]]) -> str:
    """One self-contained HTML page. A section has a heading and text lines, a table (head, rows) or a picture (PNG bytes)."""
    check_packages()
    from jinja2 import Environment, PackageLoader

    for section in sections:
        if "picture" in section:
            section["picture"] = base64.b64encode(section["picture"]).decode()
    environment = Environment(loader=PackageLoader("pkt.reporting", "templates"), autoescape=True)
    return environment.get_template("report.html").render(title=title, sections=sections)


def write_report(folder: str | Path, out: str | Path | None = None) -> Path:
    """The HTML page of an extraction folder. Raises `PktError` for a folder that is not one."""
    ext = Extraction.load(folder)
    if out is not None:
        check_output_file(out, "<!", force=True)
    plan = ext.plan
    sections: list[dict[str, Any]] = []
    facts = [
        ("teacher", plan.teacher["name"]),
        ("student", plan.student["name"]),
        ("seeds", ext.provenance.get("seeds", {}).get("source", "")),
        *plan.options.items(),
        *((k, v) for k, v in describe_factorization(ext).items() if (k, v) != ("seed", plan.options.get("seed"))),
    ]
    sections.append({"heading": "What was done", "head": ["", ""], "rows": facts})
    if plan.layer_scores:
        figure, (left, right) = new_figure(9, 3, 2)
        plot_layers(left, plan)
        right.hist([100 * e for e in ext.energies.values()], bins=20, color=TAKEN)
        right.set_title("energy of each region caught by its factors (%)", fontsize=9)
        sections.append({"heading": "Layers and energies", "picture": png_bytes(figure), "text": plan.summary()})
    rows = [
        (*describe(row), ext.pairs[row[0].target].rank, f"{100 * ext.energies[row[0].target]:.1f}%")
        for row in plan.rows()
    ]
    head = ["source", "target", "region", "share of S", "rank", "energy caught"]
    sections.append({"heading": "Regions", "head": head, "rows": rows})
    sections.append({"heading": "Versions", "head": ["", ""], "rows": list(ext.provenance.get("versions", {}).items())})
    path = Path(out) if out is not None else Path(folder) / "report.html"
    with atomic_file(path) as scratch:
        scratch.write_text(page(f"pkt: {Path(folder).name}", sections), encoding="utf-8")
    return path
