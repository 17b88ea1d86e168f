"""What `pkt inspect` says of a folder: what it is, where it came from, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pkt.adapters import CONFIG, check_fit, read_adapter, split_tied
from pkt.errors import PktError
from pkt.extraction import Extraction, Start
from pkt.files import MANIFEST, read_json
from pkt.lora import read_source
from pkt.manifest import name_kind, read_manifest, tasks_in
from pkt.models import spec_of
from pkt.targets import Targets
from pkt.transferring import describe_run, run_path


def inspect_folder(folder: str | Path, student: str | None = None) -> dict[str, Any]:
    """What an adapter folder is, where it came from, whether it fits a student, and what to do next."""
    folder = Path(folder)
    if not folder.exists() and run_path(folder).is_dir():
        folder = run_path(folder)
    if not folder.is_dir():
        raise PktError(f"{folder} is not a folder; name one that pkt or PEFT wrote")
    if (folder / "run.json").is_file():
        return {"folder": str(folder), **describe_run(folder)}
    tasks = tasks_in(folder)
    if tasks and not (folder / CONFIG).is_file():
        return {"folder": str(folder), **_describe_tasks(folder, tasks)}
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


def _describe_tasks(folder: Path, tasks: list[str]) -> dict[str, Any]:
    """The results of several tasks, each by what it is and the teacher's layers it comes from."""
    found: dict[str, Any] = {"is": f"results of several tasks: {', '.join(tasks)}"}
    for name in tasks:
        manifest = read_manifest(folder / name)
        layers = manifest.get("plan", {}).get("layer_map")
        found[name] = f"{name_kind(manifest)}, from the teacher's layers {layers}" if layers else name_kind(manifest)
    return {**found, "next": f"name one of them: pkt inspect {shlex.quote(str(folder / tasks[0]))}"}


def _describe(folder: Path, kind: str | None, manifest: dict[str, Any]) -> dict[str, Any]:
    """is, student and next of a folder; for an extraction also where it came from."""
    if kind in _DESCRIBED:
        return _DESCRIBED[kind](folder, manifest)
    if kind is not None and not (folder / CONFIG).is_file():
        return {"is": f"a folder of pkt's ({kind})", "next": "look at the files in it"}
    return _foreign(folder)


def _extraction(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    ext = Extraction.load(folder)
    base = ext.plan.student["name"]
    return {
        "is": "an extraction: the start of a student's LoRA, not yet trained",
        "teacher": ext.plan.teacher["name"],
        "student": base,
        "seeds": ext.provenance.get("seeds", {}).get("source"),
        "holds": str(ext),
        "next": _train_line(base, folder),
    }


def _start(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    start = Start.load(folder)
    return {
        "is": f"a {manifest['kind']}: {start.how}, as an ordinary LoRA"
        + (" that is kept" if start.mode == "add" else ""),
        "student": start.student.get("name"),
        **start.provenance.get("told", {}),
        "holds": str(start),
        "next": f"{_train_line(str(start.student.get('name')), folder)}, or serve it as it is",
    }


def _train_line(student: str, folder: Path) -> str:
    return f"pkt train {shlex.quote(student)} {shlex.quote(str(folder))} DATA.jsonl --out RUN"


def _run(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    if not manifest["settings"].get("epochs"):
        return {
            "is": f"an adapter injected by pkt ({manifest['mode']}), to be trained by any PEFT trainer",
            "student": manifest["student"],
            "next": "train it, then: pkt finalize TRAINER_OUTPUT --out ADAPTER",
        }
    finished = manifest.get("finished")
    if manifest["mode"] == "full":
        place = shlex.quote(str(folder))
        return {
            "is": f"a training run of all weights ({'finished: a whole model' if finished else 'unfinished'})",
            "student": manifest["student"],
            "next": f"pkt evaluate {place} TEST.jsonl" if finished else "the same pkt train command resumes it",
        }
    return {
        "is": f"a training run ({manifest['mode']}, {'finished' if finished else 'unfinished'})",
        "student": manifest["student"],
        "next": _finalize_line(folder) if finished else "the same pkt train command resumes it",
    }


def _finalize_line(folder: Path) -> str:
    return f"pkt finalize {shlex.quote(str(folder))} --out ADAPTER"


def _adapter(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    # Servers of LoRA know modules; how many take parameters of experts nobody here has tried.
    others = "" if read_json(folder / CONFIG).get("target_parameters") else ", vLLM or any LoRA server"
    return {
        "is": f"a plain LoRA finalized by pkt (it was injected as {manifest['mode']})",
        "student": manifest["base"],
        "next": f"load it with PeftModel.from_pretrained{others}",
    }


def _model(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    if "content" in manifest:
        return {
            "is": "a whole model: a student with what a teacher learnt added",
            "student": manifest["base"],
            **manifest["told"],
            "next": "load it with AutoModelForCausalLM.from_pretrained, or train it",
        }
    what = {
        "residual-base": "the shifted base (W − B₀A₀) of a residual injection; only its own adapter makes it the student",
        "model": "a whole model: a student with a finalized adapter merged in",
    }[manifest["kind"]]
    student = str(manifest.get("student") or manifest.get("base"))
    return {"is": what, "student": student, "next": "load it with AutoModelForCausalLM.from_pretrained"}


def _shrunk(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    return {
        "is": "a model of a larger one's own units, to be healed by training on general text",
        **manifest["told"],
        "next": f"heal it: pkt train {shlex.quote(str(folder))} TEXT.jsonl --full --out HEALED; then: pkt transplant TEACHER "
        f"HEALED SEEDS.jsonl --base {shlex.quote(str(manifest['teacher'].get('name')))} --out DIR",
    }


def _targets(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    found = Targets.load(folder)
    return {
        "is": "a teacher's next-token distributions for the answers of rows",
        "teacher": manifest.get("teacher", {}).get("name"),
        "rows": manifest.get("rows", {}).get("source"),
        "holds": str(found),
        "next": f"pkt train STUDENT DATA.jsonl --teacher-targets {shlex.quote(str(folder))} --mix 0.5 --out RUN",
    }


def _foreign(folder: Path) -> dict[str, Any]:
    """An adapter without pkt.json: a trainer's, of what pkt injected, or not pkt's at all."""
    try:
        source = read_source(folder)
    except PktError as error:
        base = read_adapter(folder)[0].base
        return {"is": "a LoRA adapter that pkt did not write", "student": base, "next": str(error)}
    return {
        "is": f"a trained adapter, injected by pkt as {source.mode} (known from {source.how})",
        "student": source.student,
        "next": _finalize_line(folder),
    }


_DESCRIBED: dict[str | None, Callable[[Path, dict[str, Any]], dict[str, Any]]] = {
    "extraction": _extraction,
    **dict.fromkeys(Start.KINDS, _start),
    "run": _run,
    "adapter": _adapter,
    "residual-base": _model,
    "shrunk": _shrunk,
    "model": _model,
    "targets": _targets,
}
