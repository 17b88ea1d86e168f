"""One HTML page: of an extraction, a transplant or a start, and by `others` of anything else that pkt writes."""

from __future__ import annotations

import base64
import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pkt.errors import PktError
from pkt.files import MANIFEST, atomic_file, check_output_file, read_json
from pkt.manifest import STARTS, tasks_in
from pkt.models.adapter_files import CONFIG
from pkt.reporting.others import again, of_adapter, of_run, of_scores, of_tasks, sensitivity_map, versions_of
from pkt.reporting.plots import canvas, check_packages, drawn, legend_below, plot_layers, plot_pairs, plot_scales

if TYPE_CHECKING:
    from pkt.extraction import Extraction, Start
    from pkt.planning import TransferPlan

PAGE = "report.html"


def page(title: str, sections: list[dict[str, Any]]) -> str:
    """One self-contained HTML page. A section has a heading and text lines, a table (head, rows) or a picture (PNG bytes)."""
    check_packages()
    from jinja2 import Environment, PackageLoader

    for section in sections:
        if "picture" in section:
            section["picture"] = base64.b64encode(section["picture"]).decode()
    environment = Environment(loader=PackageLoader("pkt.reporting", "templates"), autoescape=True)
    return environment.get_template("report.html").render(title=title, sections=sections)


def write_report(place: str | Path, out: str | Path | None = None) -> Path:
    """The HTML page of a folder that pkt wrote or knows, or of a file of scores. Raises `PktError` for anything else.

    out: default report.html in the folder, or beside the file. A study has its page: its path is returned.
    """
    place = Path(place)
    kind = _kind(place)
    path = Path(out) if out is not None else place / PAGE if place.is_dir() else place.with_suffix(".html")
    if kind == "study":
        if out is None and path.is_file():
            return path
        raise PktError(f"{place} is a study's folder; pkt study FILE --out {place} --report writes its page there")
    check_packages()
    check_output_file(path, "<!", force=True)
    sections = _sections(place, kind)
    when = datetime.datetime.fromtimestamp(_dated(place).stat().st_mtime).strftime("%Y-%m-%d %H:%M")
    sections.append({"heading": "Written", "text": [f"{when}, by the clock of the machine's files."]})
    with atomic_file(path) as scratch:
        scratch.write_text(page(f"pkt: {place.absolute().name}", sections), encoding="utf-8")
    return path


def _kind(place: Path) -> str:
    if place.is_file():
        return "scores"
    if tasks_in(place) and not (place / CONFIG).is_file():
        return "tasks"
    manifest = read_json(place / MANIFEST) if (place / MANIFEST).is_file() else {}
    return str(manifest.get("kind", "")) if isinstance(manifest, dict) else ""


def _dated(place: Path) -> Path:
    return next((place / name for name in (MANIFEST, CONFIG) if (place / name).is_file()), place)


def _sections(place: Path, kind: str) -> list[dict[str, Any]]:
    if kind == "scores":
        from pkt.scoring import Sensitivity

        return of_scores(Sensitivity.load(place))
    if kind in ("extraction", *STARTS):
        from pkt.extraction import Extraction, open_start

        made = open_start(place)
        sections = _of_extraction(made) if isinstance(made, Extraction) else _of_start(made)
        return [*sections, *versions_of(made.provenance)]
    return {"tasks": of_tasks, "run": of_run}.get(kind, of_adapter)(place)


def _of_extraction(ext: Extraction) -> list[dict[str, Any]]:
    from pkt.extraction import describe_factorization
    from pkt.planning import describe

    plan, settings = ext.plan, describe_factorization(ext)
    seeds = ext.provenance.get("seeds", {}).get("source", "")
    facts = [
        ("teacher", plan.teacher["name"]),
        ("student", plan.student["name"]),
        ("seeds", seeds),
        *plan.options.items(),
        *((k, v) for k, v in settings.items() if (k, v) != ("seed", plan.options.get("seed"))),
        *again(ext.manifest()),
    ]
    sections: list[dict[str, Any]] = [{"heading": "What was done", "head": ["", ""], "rows": facts}]
    if plan.layer_scores:
        figure, (axes,) = canvas(2.4)
        plot_layers(axes, plan)
        figures = [drawn(figure, "layers", "Σ of S of each teacher layer; dark: feeds the student")]
        sections.append({"heading": "Layers", "figures": figures, "text": plan.summary()})
    whole = {e.source: e.score / e.share for e in plan.entries if e.share > 0}
    sections.append(sensitivity_map(whole, "Σ of S over a matrix that feeds the student"))
    chances = _chances(plan)
    sections.append(_caught(plan, chances))
    rows = [
        (
            *describe(row),
            f"{100 * chances[row[0].source]:.1f}%" if row[0].source in chances else "",
            ext.pairs[row[0].target].rank,
            f"{100 * ext.energies[row[0].target]:.1f}%",
        )
        for row in plan.rows()
    ]
    head = ["source", "target", "region", "share of S", "a random one's", "rank", "energy kept"]
    return [*sections, {"heading": "Regions", "head": head, "rows": rows}]


def _caught(plan: TransferPlan, chances: dict[str, float]) -> dict[str, Any]:
    """The mean share of S of the regions of each kind of matrix, beside what a region anywhere would hold."""
    from pkt.tables import by_last_name

    shares = {e.source: e.share for e in plan.entries}
    values = {
        kind: (
            100 * sum(shares[n] for n in names) / len(names),
            100 * sum(chances[n] for n in names) / len(names),
        )
        for kind, names in by_last_name(shares).items()
        if all(n in chances for n in names)
    }
    if not values:
        text = "The teacher is not here, so that what a random region would hold is not known."
        return {"heading": "What the regions catch", "text": [text]}
    figure, (axes,) = canvas(1.0 + 0.28 * len(values))
    plot_pairs(axes, values, "% of their matrices' S")
    legend_below(figure, axes)
    caption = (
        "Mean share of S that the regions hold, beside their share of the weights, which is what a random region holds"
    )
    return {"heading": "What the regions catch", "figures": [drawn(figure, "caught", caption)]}


def _chances(plan: TransferPlan) -> dict[str, float]:
    """Source -> the share of its weights that its region has; empty where the teacher is not here to ask."""
    from pkt.models import spec_of

    if not Path(str(plan.teacher["name"])).is_dir():
        return {}
    try:
        targets = spec_of(str(plan.teacher["name"])).by_module()
    except PktError:
        return {}
    found = {}
    for e in plan.entries:
        if e.source in targets:
            rows, cols = targets[e.source].shape
            found[e.source] = e.region.shape[0] * e.region.shape[1] / (rows * cols)
    return found


def _of_start(start: Start) -> list[dict[str, Any]]:
    found = start.provenance
    facts = [("this is", start.how), ("student", start.student.get("name", "")), *found.get("told", {}).items()]
    known = [(name, found[name]) for name in ("base", "adapter") if found.get(name)]
    options = [(name, value) for name, value in found.get("options", {}).items() if value is not None]
    rows = [*facts, *known, *options, *again(start.manifest())]
    sections = [{"heading": "What was done", "head": ["", ""], "rows": rows, "text": start.summary()}]
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
    section: dict[str, Any] = {
        "heading": "Lineage",
        "head": ["units", "matched", "mean cosine", "chance"],
        "rows": rows,
        "text": [f"{found['verdict']}: {found['reason']}"],
    }
    if rows:
        figure, (axes,) = canvas(1.0 + 0.28 * len(rows))
        plot_pairs(
            axes, {e["kind"]: (e["cosine"], e["chance"]) for e in found["evidence"]}, "mean cosine of matched units"
        )
        legend_below(figure, axes)
        section["figures"] = [drawn(figure, "lineage", "How well units match, beside what chance gives for this pair")]
    return section


def _scale(found: dict[str, Any]) -> dict[str, Any]:
    losses = {float(alpha): loss for alpha, loss in found["losses"].items()}
    figure, (axes,) = canvas(2.4)
    plot_scales(axes, losses, found["alpha"])
    own = f"{found['own_alpha']:g}" if found["own_alpha"] else "0, none of it"
    text = f"Kept at α = {found['alpha']:g}; the best of those tried by the seeds: {own}."
    rows = [(f"{alpha:g}", f"{loss:.3f}") for alpha, loss in losses.items()]
    head = ["α", "loss on the seeds"]
    figures: Any = [drawn(figure, "scale", "Loss on the seeds at each α tried; circled: kept")]
    return {"heading": "How much is kept", "figures": figures, "head": head, "rows": rows, "text": [text]}
