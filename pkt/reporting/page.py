"""Pictures, the HTML page of a run, and what `pkt inspect` and `pkt env` say."""

from __future__ import annotations

import base64
import io
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pkt import ops
from pkt.adapters import CONFIG, check_fit, read_adapter, split_tied
from pkt.errors import PktError
from pkt.extraction import Extraction, describe_factorization
from pkt.files import MANIFEST, atomic_file, read_json
from pkt.lora.finalization import read_source
from pkt.manifest import read_manifest, versions
from pkt.models import spec_of
from pkt.planning import TransferPlan, describe
from pkt.transferring.checkpoints import describe_run, run_path

TAKEN, LEFT = "#0b7a75", "#c9d1d3"


def new_figure(width: float, height: float, columns: int) -> Any:
    """A matplotlib figure with a row of axes; no display is needed."""
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


def plot_window(axes: Any, score: torch.Tensor, plan: TransferPlan, source: str) -> None:
    """The sensitivity map of one matrix, averaged down, with its chosen window."""
    from matplotlib.patches import Rectangle

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


def png_bytes(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def page(title: str, sections: list[dict[str, Any]]) -> str:
    """One self-contained HTML page. A section has a heading and text lines, a table (head, rows) or a picture (PNG bytes)."""
    from jinja2 import Environment, PackageLoader

    for section in sections:
        if "picture" in section:
            section["picture"] = base64.b64encode(section["picture"]).decode()
    environment = Environment(loader=PackageLoader("pkt.reporting", "templates"), autoescape=True)
    return environment.get_template("report.html").render(title=title, sections=sections)


def write_report(folder: str | Path, out: str | Path | None = None) -> Path:
    """The HTML page of an extraction folder. Raises `PktError` for a folder that is not one."""
    ext = Extraction.load(folder)
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
        (
            *describe(row),
            ext.pairs[row[0].target].rank,
            f"{100 * ext.energies[row[0].target]:.1f}%",
        )
        for row in plan.rows()
    ]
    head = ["source", "target", "region", "share of S", "rank", "energy caught"]
    sections.append({"heading": "Regions", "head": head, "rows": rows})
    sections.append({"heading": "Versions", "head": ["", ""], "rows": list(ext.provenance.get("versions", {}).items())})
    path = Path(out) if out is not None else Path(folder) / "report.html"
    with atomic_file(path) as scratch:
        scratch.write_text(page(f"pkt: {Path(folder).name}", sections), encoding="utf-8")
    return path


def inspect_folder(folder: str | Path, student: str | None = None) -> dict[str, Any]:
    """What an adapter folder is, where it came from, whether it fits a student, and what to do next."""
    folder = Path(folder)
    if not folder.exists() and run_path(folder).is_dir():
        folder = run_path(folder)
    if not folder.is_dir():
        raise PktError(f"{folder} is not a folder; name one that pkt or PEFT wrote")
    if (folder / "run.json").is_file():
        return {"folder": str(folder), **describe_run(folder)}
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else {}
    kind = manifest.get("kind")
    if kind is None and not (folder / CONFIG).is_file():
        raise PktError(f"{folder} holds neither {MANIFEST} nor {CONFIG}; pkt knows nothing about it")
    found = {"folder": str(folder), **_describe(folder, kind, manifest)}
    if (folder / CONFIG).is_file():
        adapter, _ = read_adapter(folder)
        found["modules"] = len(adapter.pairs)
        found["ranks"] = sorted({p.rank for p in adapter.pairs.values()})
        if student is not None:
            spec = spec_of(student)
            check_fit(split_tied(adapter, spec.head if spec.tied else None).pairs, spec, str(folder))
            found["fits"] = f"yes: every module has its place in {spec.name}"
    return found


def _describe(folder: Path, kind: str | None, manifest: dict[str, Any]) -> dict[str, Any]:
    """is, student and next of a folder; for an extraction also where it came from."""
    quoted = shlex.quote(str(folder))
    if kind == "extraction":
        ext = Extraction.load(folder)
        base = ext.plan.student["name"]
        return {
            "is": "an extraction: the start of a student's LoRA, not yet trained",
            "teacher": ext.plan.teacher["name"],
            "student": base,
            "seeds": ext.provenance.get("seeds", {}).get("source"),
            "holds": str(ext),
            "next": f"pkt train {shlex.quote(base)} {quoted} DATA.jsonl --out RUN",
        }
    if kind == "run" and manifest["settings"].get("epochs"):
        finished = manifest.get("finished")
        return {
            "is": f"a training run ({manifest['mode']}, {'finished' if finished else 'unfinished'})",
            "student": manifest["student"],
            "next": f"pkt finalize {quoted} --out ADAPTER" if finished else "the same pkt train command resumes it",
        }
    if kind == "run":
        return {
            "is": f"an adapter injected by pkt ({manifest['mode']}), to be trained by any PEFT trainer",
            "student": manifest["student"],
            "next": "train it, then: pkt finalize TRAINER_OUTPUT --out ADAPTER",
        }
    if kind == "adapter":
        # Servers of LoRA know modules; how many take parameters of experts nobody here has tried.
        others = "" if read_json(folder / CONFIG).get("target_parameters") else ", vLLM or any LoRA server"
        return {
            "is": f"a plain LoRA finalized by pkt (it was injected as {manifest['mode']})",
            "student": manifest["base"],
            "next": f"load it with PeftModel.from_pretrained{others}",
        }
    if kind in ("residual-base", "model"):
        what = {
            "residual-base": "the shifted base (W − B₀A₀) of a residual injection; only its own adapter makes it the student",
            "model": "a whole model: a student with a finalized adapter merged in",
        }[kind]
        student = str(manifest.get("student") or manifest.get("base"))
        return {"is": what, "student": student, "next": "load it with AutoModelForCausalLM.from_pretrained"}
    if kind is not None and not (folder / CONFIG).is_file():
        return {"is": f"a folder of pkt's ({kind})", "next": "look at the files in it"}
    try:
        source = read_source(folder)
    except PktError as error:
        base = read_adapter(folder)[0].base
        return {"is": "a LoRA adapter that pkt did not write", "student": base, "next": str(error)}
    return {
        "is": f"a trained adapter, injected by pkt as {source.mode} (known from {source.how})",
        "student": source.student,
        "next": f"pkt finalize {quoted} --out ADAPTER",
    }


def environment() -> dict[str, Any]:
    """Versions, devices, and the implementation of each op on each device here."""
    import importlib.util

    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    names = {d: torch.cuda.get_device_name(d) for d in devices if d != "cpu"}
    found = {**versions(), "threads": str(torch.get_num_threads()), "GPU": ", ".join(names.values()) or "none"}
    for module in ("triton", "bitsandbytes"):
        found[module] = "installed" if importlib.util.find_spec(module) else "not installed"
    table = []
    for op in ops.names():
        for device in devices:
            used, why = ops.implementation(op, device)
            table.append({"op": f"pkt::{op}", "device": device, "implementation": used, "why": why})
    return {"versions": found, "ops": table}


def plot_methods(
    axes: Any, results: dict[str, list[float]], reference: float, label: str, guess: float | None = None
) -> None:
    """One point per training seed and a bar at the mean, per method; a dashed line where `guess` lies."""
    for row, values in enumerate(results.values()):
        axes.plot(values, [row] * len(values), "o", color=TAKEN, alpha=0.6, markersize=5)
        axes.plot([np.mean(values)] * 2, [row - 0.25, row + 0.25], color="black", linewidth=2)
    if guess is not None:
        axes.axvline(guess, color="black", linestyle="--", linewidth=1, label="guessing the commonest answer")
        axes.legend(fontsize=7)
    axes.set_yticks(range(len(results)), list(results), fontsize=8)
    axes.invert_yaxis()
    axes.set_title(f"{label}\n(points: training seeds; untrained student {reference:.2f})", fontsize=9)
    axes.grid(axis="x", alpha=0.3)
