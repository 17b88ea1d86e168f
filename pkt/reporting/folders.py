"""What `pkt inspect` says of a folder: what it is, where it came from, and what to do next.

Told by JSON and the headers of safetensors files, without torch; only whether an adapter fits a student, and how one was
injected that says nothing of itself, takes more.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pkt.cards import extraction_summary, start_summary, start_words
from pkt.errors import PktError
from pkt.files import MANIFEST, read_json, run_path
from pkt.manifest import STARTS, name_kind, read_manifest, spoken_name, tasks_in
from pkt.models.adapter_files import (
    CONFIG,
    PICKLE,
    WEIGHTS,
    Origin,
    changes_nothing,
    origin_of,
    read_config,
    read_ranks,
    without_initial,
)


def inspect_folder(folder: str | Path, student: str | None = None) -> dict[str, Any]:
    """What an adapter folder is, where it came from, whether it fits a student, and what to do next."""
    folder = Path(folder)
    if not folder.exists() and run_path(folder).is_dir():
        folder = run_path(folder)
    if not folder.is_dir():
        raise PktError(f"{folder} is not a folder; name one that pkt or PEFT wrote")
    if (folder / "run.json").is_file():
        return {"folder": str(folder), **_unfinished(folder)}
    tasks = tasks_in(folder)
    if tasks and not (folder / CONFIG).is_file():
        return {"folder": str(folder), **_describe_tasks(folder, tasks)}
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else {}
    kind = manifest.get("kind")
    if kind is None and not (folder / CONFIG).is_file():
        raise PktError(f"{folder} holds neither {MANIFEST} nor {CONFIG}; pkt knows nothing about it")
    ranks = _ranks(folder) if (folder / CONFIG).is_file() else {}
    try:
        found = {"folder": str(folder), **_describe(folder, kind, manifest, ranks)}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise PktError(f"{folder / MANIFEST} is damaged ({type(error).__name__}: {error}); make it again") from error
    if ranks:
        found["modules"] = len(ranks)
        found["ranks"] = sorted({*ranks.values()})
        if student is not None:
            found["fits"] = f"yes: every module has its place in {_check_fit(folder, student)}"
    return found


def _ranks(folder: Path) -> dict[str, int]:
    """Module -> rank; of a pickle, which says nothing before it is loaded, by loading it."""
    if (folder / WEIGHTS).is_file() or not (folder / PICKLE).is_file():
        return read_ranks(folder, read_config(folder))
    from pkt.adapters import read_adapter

    return {module: pair.rank for module, pair in read_adapter(folder)[0].pairs.items()}


def _check_fit(folder: Path, student: str) -> str:
    """The name of a student in which every module has its place. Raises `PktError` for another one."""
    from pkt.adapters import check_fit, read_adapter, split_tied
    from pkt.models import spec_of

    spec = spec_of(student)
    check_fit(split_tied(read_adapter(folder)[0], spec.head if spec.tied else None).pairs, spec, str(folder))
    return spec.name


def _unfinished(folder: Path) -> dict[str, str]:
    """What an unfinished run is, how far it came, and how it goes on. Raises `PktError` for a folder that is none."""
    value = read_json(folder / "run.json")
    inputs = value.get("inputs") if isinstance(value, dict) else None
    parts = len(list(folder.glob("step-*.safetensors")))
    given = inputs if isinstance(inputs, dict) else {}
    settings = {spoken_name(k): v for k, v in given.items() if v is not None and not isinstance(v, (dict, list))}
    options = ", ".join(f"{k} {v}" for k, v in settings.items() if len(str(v)) < 40)
    over = "with --force it starts over; the folder may be deleted"
    if given.get("kind") == "targets":
        passes = len(value.get("execution", {}).get("micro_batches", ()))
        return {
            "is": f"an unfinished reading of a teacher's distributions: {parts} of {passes} passes are finished",
            "teacher": str(given["teacher"]),
            "next": f"the same pkt teach command continues it; {over}",
        }
    if given.get("kind") == "transplant":
        return {
            "is": f"an unfinished transplant: {parts} layers are cut",
            "options": options,
            "next": f"the same pkt transplant command continues it; {over}",
        }
    teacher, student = given.get("teacher"), given.get("student", {})
    if not isinstance(teacher, dict) or not isinstance(student, dict):
        raise PktError(f"{folder / 'run.json'} is damaged; start over with --force, or delete {folder}")
    what, command = ("transfer", "transfer") if student else ("scoring", "sensitivity")
    return {
        "is": f"an unfinished {what}: {parts} of {teacher.get('num_layers', 0) + 2} parts are finished",
        "teacher": str(teacher.get("name")),
        **({"student": str(student.get("name"))} if student else {}),
        "options": options,
        "next": f"the same pkt {command} command continues it; {over if student else 'or delete the folder'}",
    }


def _describe_tasks(folder: Path, tasks: list[str]) -> dict[str, Any]:
    """The results of several tasks, each by what it is and the teacher's layers it comes from."""
    found: dict[str, Any] = {"is": f"results of several tasks: {', '.join(tasks)}"}
    for name in tasks:
        manifest = read_manifest(folder / name)
        layers = manifest.get("plan", {}).get("layer_map")
        found[name] = f"{name_kind(manifest)}, from the teacher's layers {layers}" if layers else name_kind(manifest)
    return {**found, "next": f"name one of them: pkt inspect {shlex.quote(str(folder / tasks[0]))}"}


def _describe(folder: Path, kind: str | None, manifest: dict[str, Any], ranks: dict[str, int]) -> dict[str, Any]:
    """is, student and next of a folder; for an extraction also where it came from."""
    if kind in _DESCRIBED:
        return _DESCRIBED[kind](folder, manifest, ranks)
    if kind is not None and not ranks:
        return {"is": f"a folder of pkt's ({kind})", "next": "look at the files in it"}
    return _foreign(folder)


def _check_modules(folder: Path, ranks: dict[str, int], tied_head: str | None, *listed: Any) -> list[int]:
    """The ranks of a folder's own modules; refuses a manifest that lists others than the weights."""
    own = {module: rank for module, rank in ranks.items() if module != tied_head}
    if not all(own.keys() == set(names) for names in listed):
        raise PktError(
            f"{folder}: {MANIFEST} and the weights list different modules; the folder was changed, make it again"
        )
    return [*own.values()]


def _extraction(folder: Path, manifest: dict[str, Any], ranks: dict[str, int]) -> dict[str, Any]:
    plan, energies = manifest["plan"], manifest["energies"]
    try:
        teacher, base = str(plan["teacher"]["name"]), str(plan["student"]["name"])
        planned = [entry["target"] for entry in plan["entries"]]
    except (KeyError, TypeError) as error:
        raise PktError(f"{folder / MANIFEST} is damaged: the plan is incomplete ({error}); make it again") from error
    own = _check_modules(folder, ranks, plan["student"].get("tied_head"), manifest["kinds"], energies, planned)
    return {
        "is": "an extraction: the start of a student's LoRA, not yet trained",
        "teacher": teacher,
        "student": base,
        "seeds": manifest.get("seeds", {}).get("source"),
        "holds": extraction_summary(own, energies, manifest.get("unsettled", {})),
        "next": _train_line(base, folder),
    }


def _start(folder: Path, manifest: dict[str, Any], ranks: dict[str, int]) -> dict[str, Any]:
    student, kept = manifest["student"], manifest["mode"] == "add"
    own = _check_modules(folder, ranks, student.get("tied_head"), manifest["kinds"])
    told = start_words(manifest["kind"], manifest.get("control"))
    changed = kept and not changes_nothing(folder, manifest["kinds"])
    return {
        "is": f"a {manifest['kind']}: {told}, as an ordinary LoRA" + (" that is kept" if kept else ""),
        "student": student.get("name"),
        **manifest.get("told", {}),
        "holds": start_summary(own, manifest["energies"], changed),
        "next": f"{_train_line(str(student.get('name')), folder)}, or serve it as it is",
    }


def _train_line(student: str, folder: Path) -> str:
    return f"pkt train {shlex.quote(student)} {shlex.quote(str(folder))} DATA.jsonl --out RUN"


def _run(folder: Path, manifest: dict[str, Any], ranks: dict[str, int]) -> dict[str, Any]:
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


def _adapter(folder: Path, manifest: dict[str, Any], ranks: dict[str, int]) -> dict[str, Any]:
    # Servers of LoRA know modules; how many take parameters of experts nobody here has tried.
    others = "" if read_json(folder / CONFIG).get("target_parameters") else ", vLLM or any LoRA server"
    return {
        "is": f"a plain LoRA finalized by pkt (it was injected as {manifest['mode']})",
        "student": manifest["base"],
        "next": f"load it with PeftModel.from_pretrained{others}",
    }


def _model(folder: Path, manifest: dict[str, Any], ranks: dict[str, int]) -> dict[str, Any]:
    if "content" in manifest:
        return {
            "is": "a whole model: a student with what a teacher learnt added",
            "student": manifest.get("student"),
            **manifest["told"],
            "next": "load it with AutoModelForCausalLM.from_pretrained, or train it",
        }
    what = {
        "residual-base": "the shifted base (W − B₀A₀) of a residual injection; only its own adapter makes it the student",
        "model": "a whole model: a student with a finalized adapter merged in",
    }[manifest["kind"]]
    student = str(manifest.get("student") or manifest.get("base"))
    return {"is": what, "student": student, "next": "load it with AutoModelForCausalLM.from_pretrained"}


def _shrunk(folder: Path, manifest: dict[str, Any], ranks: dict[str, int]) -> dict[str, Any]:
    return {
        "is": "a model of a larger one's own units, to be healed by training on general text",
        **manifest["told"],
        "next": f"heal it: pkt train {shlex.quote(str(folder))} TEXT.jsonl --full --out HEALED; then: pkt transplant TEACHER "
        f"HEALED SEEDS.jsonl --base {shlex.quote(str(manifest['teacher'].get('name')))} --out DIR",
    }


def _targets(folder: Path, manifest: dict[str, Any], ranks: dict[str, int]) -> dict[str, Any]:
    from pkt.targets import Targets  # which takes torch: it checks that the masses sum to one

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
    config = read_config(folder)
    origin, next_ = origin_of(folder, config), _finalize_line(folder)
    if origin is None:
        # Nothing says how it was injected, so that its factors are looked at.
        from pkt.lora import read_source

        try:
            source = read_source(folder)
        except PktError as error:
            base = str(config.get("base_model_name_or_path") or "")
            return {"is": "a LoRA adapter that pkt did not write", "student": base, "next": str(error)}
        origin = Origin(source.mode, source.student, source.how)
    elif origin.mode == "residual" and origin.initial is None:
        next_ = without_initial(str(folder))
    return {
        "is": f"a trained adapter, injected by pkt as {origin.mode} (known from {origin.how})",
        "student": origin.student,
        "next": next_,
    }


_DESCRIBED: dict[str | None, Callable[[Path, dict[str, Any], dict[str, int]], dict[str, Any]]] = {
    "extraction": _extraction,
    **dict.fromkeys(STARTS, _start),
    "run": _run,
    "adapter": _adapter,
    "residual-base": _model,
    "shrunk": _shrunk,
    "model": _model,
    "targets": _targets,
}
