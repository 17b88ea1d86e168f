"""One HTML page, and that of an extraction, a transplant or a start."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pkt.files import atomic_file, check_output_file
from pkt.reporting.plots import TAKEN, check_packages, new_figure, plot_layers, plot_scales, png_bytes

if TYPE_CHECKING:
    from pkt.extraction import Extraction, Start


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
    """The HTML page of an extraction, a transplant or a start. Raises `PktError` for a folder of anything else."""
    from pkt.extraction import Extraction, open_start

    made = open_start(folder)
    if out is not None:
        check_output_file(out, "<!", force=True)
    sections = _of_extraction(made) if isinstance(made, Extraction) else _of_start(made)
    sections.append(
        {"heading": "Versions", "head": ["", ""], "rows": list(made.provenance.get("versions", {}).items())}
    )
    path = Path(out) if out is not None else Path(folder) / "report.html"
    with atomic_file(path) as scratch:
        scratch.write_text(page(f"pkt: {Path(folder).name}", sections), encoding="utf-8")
    return path


def _of_extraction(ext: Extraction) -> list[dict[str, Any]]:
    from pkt.extraction import describe_factorization
    from pkt.planning import describe

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
    return [*sections, {"heading": "Regions", "head": head, "rows": rows}]


def _of_start(start: Start) -> list[dict[str, Any]]:
    found = start.provenance
    facts = [("this is", start.how), ("student", start.student.get("name", "")), *found.get("told", {}).items()]
    known = [(name, found[name]) for name in ("base", "adapter") if found.get(name)]
    options = [(name, value) for name, value in found.get("options", {}).items() if value is not None]
    sections = [
        {"heading": "What was done", "head": ["", ""], "rows": [*facts, *known, *options], "text": start.summary()}
    ]
    if "lineage" in found:
        sections.append(_lineage(found["lineage"]))
    if "losses" in found:
        sections.append(_scale(found))
    if found.get("seeds"):
        text = "No other row was read; the rows that the teacher was tuned on are behind what it learnt."
        rows = list(found["seeds"].items())
        sections.append({"heading": "Rows it was tuned on", "head": ["", ""], "rows": rows, "text": [text]})
    energies = {name: f"{100 * energy:.1f}%" for name, energy in start.energies.items()}
    rows = [(name, pair.rank, energies.get(name, "")) for name, pair in start.pairs.items()]
    sections.append({"heading": "Matrices", "head": ["matrix", "rank", "energy kept"], "rows": rows})
    if "left_out" in found:
        text = "Norms and biases do not fit a LoRA of matrices; `pkt transplant --merge` writes a student that has them too."
        rows = [
            (n, f"{size:.3g}" if size else "nothing of the teacher's fits it") for n, size in found["left_out"].items()
        ]
        sections.append({"heading": "Left out", "head": ["", "norm of its change"], "rows": rows, "text": [text]})
    return sections


def _lineage(found: dict[str, Any]) -> dict[str, Any]:
    rows = [
        (e["kind"], f"{e['matched']} of {e['total']}", f"{e['cosine']:.3f}", f"{e['chance']:.3f}")
        for e in found["evidence"]
    ]
    head = ["units", "matched", "mean cosine", "chance"]
    return {"heading": "Lineage", "head": head, "rows": rows, "text": [f"{found['verdict']}: {found['reason']}"]}


def _scale(found: dict[str, Any]) -> dict[str, Any]:
    losses = {float(alpha): loss for alpha, loss in found["losses"].items()}
    figure, (axes,) = new_figure(5, 3, 1)
    plot_scales(axes, losses, found["alpha"])
    own = f"{found['own_alpha']:g}" if found["own_alpha"] else "0, none of it"
    text = f"Kept at α = {found['alpha']:g}; the best of those tried by the seeds: {own}."
    rows = [(f"{alpha:g}", f"{loss:.3f}") for alpha, loss in losses.items()]
    head = ["α", "loss on the seeds"]
    return {"heading": "How much is kept", "picture": png_bytes(figure), "head": head, "rows": rows, "text": [text]}
