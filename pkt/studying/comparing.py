"""`pkt compare`: the study for somebody who has an extraction, a transplant or a start, and what to do with its outcome."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path
from typing import Any

import yaml

from pkt.errors import PktError
from pkt.files import as_path
from pkt.seeds import read_rows
from pkt.studying import summing
from pkt.studying.schema import Study, read_study

OURS, TASK = "yours", "rows"
_HELD_OUT = 64


def comparison(
    student: str | Path,
    folder: str | Path,
    train: str | Path,
    test: str | Path,
    *,
    general: str | Path | None = None,
    seeds: int = 5,
    epochs: float = 3.0,
    batch_size: int = 32,
    exact_match: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """The study, as the content of a YAML file, and what it leaves out and why.

    Beside the folder's own start: plain LoRA, also with a quarter more steps, PiSSA, and, where its models and seeds are here, the
    controls of its kind: a random window of random layers; wrong units and noise of the same size. All have its rank.

    Raises `PktError` for a folder of anything else and for rows too few to hold some out.
    """
    from pkt.extraction import Extraction, open_start

    made = open_start(folder)
    rows, *_ = (sum(1 for _ in read_rows(file)) for file in (train, test, general) if file is not None)
    if rows < 8:
        raise PktError(
            f"{train} has {rows} rows; a comparison learns from some and chooses rates by others: give 8 or more"
        )
    starts: dict[str, Any] = {
        OURS: {"kind": "folder", "path": _absolute(folder)},
        "lora": {"kind": "lora"},
        "lora, longer": {"kind": "lora", "extra_steps": 0.25},
        "pissa": {"kind": "start", "how": "pissa"},
    }
    found, left_out = made.provenance, []
    file = str(found.get("seeds", {}).get("source", ""))
    teacher = made.plan.teacher if isinstance(made, Extraction) else found.get("teacher", {})
    name = str(teacher.get("name", ""))
    here = {"teacher": bool(name) and Path(name).is_dir(), "seeds": Path(file).is_file()}
    controls = _controls(made, _absolute(folder))
    needed = ("teacher", "seeds") if isinstance(made, Extraction) else ("teacher",)
    missing = [what for what in needed if not here[what]]
    teachers = {}
    if controls and not missing:
        starts |= controls
        teachers = {"teacher": _absolute(name)}
    elif controls:
        verb = "is" if len(missing) == 1 else "are"
        left_out = [f"left out: {' and '.join(controls)}: the {' and the '.join(missing)} they need {verb} not here"]
    metrics = ["nll", "exact_match"] if exact_match else ["nll"]
    task = {
        "train": _absolute(train),
        "held_out": min(_HELD_OUT, rows // 4),
        "tests": {"test": {"data": _absolute(test), "metrics": metrics}},
        "decides": "test.exact_match" if exact_match else "test.nll",
        **({"seeds": _absolute(file)} if here["seeds"] else {}),
    }
    study: dict[str, Any] = {
        "study": "compare",
        "student": _absolute(student),
        "tasks": {TASK: task},
        "starts": starts,
        "training": {
            "rank": made.rank,
            "epochs": float(epochs),
            "batch_size": batch_size,
            "micro_batch": min(8, batch_size),
        },
        "rates": {"lr": [3e-4, 1e-3, 3e-3], "a_scale": [3.0], "seeds": [1000], "epochs": 0.5, "extend": 1},
        "seeds": seeds,
        "compare": {"of": OURS},
    }
    if teachers:
        study["teachers"] = teachers
    if general is not None:
        study["general"] = _absolute(general)
    return study, left_out


def as_study(content: dict[str, Any]) -> Study:
    """`comparison`'s content as the study that it is in a file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "compare.yaml"
        file.write_text(as_yaml(content), encoding="utf-8")
        return read_study(file, source="the comparison")


def as_yaml(content: dict[str, Any]) -> str:
    return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def recommended(stats: dict[str, Any], content: dict[str, Any]) -> tuple[str, str]:
    """A sentence, and the command that trains what did best: the folder, unless a control is better than it by the verdict."""
    task = stats["tasks"][TASK]
    words = {
        name: verdict["word"]
        for name in task["starts"]
        if name != OURS and (verdict := summing.comparison(stats, "deciding", TASK, name)) is not None
    }
    beaten_by = [name for name, word in words.items() if word == "worse"]
    beats = [name for name, word in words.items() if word == "better"]
    if beaten_by:
        best = min(beaten_by, key=lambda name: _mean(stats, name, task["decides"]))
        said = f"{best} does better than your start on these rows: train it instead."
    elif words and len(beats) == len(words):
        best, said = OURS, "Your start does better than every control on these rows."
    elif beats:
        rest = ", ".join(f"{name} ({word})" for name, word in words.items() if word != "better")
        best, said = OURS, f"Your start does better than {', '.join(beats)}; not shown to: {rest}."
    else:
        rest = ", ".join(f"{name} ({word})" for name, word in words.items())
        best, said = OURS, f"Nothing shows that your start helps on these rows: {rest}. Plain LoRA costs less."
    return said, _command(best, task["starts"][best], content)


def _mean(stats: dict[str, Any], name: str, decides: str) -> float:
    """The mean of the deciding figure over seeds, the lower the better."""
    found = summing.values(stats, stats["tasks"][TASK]["starts"][name], decides)
    value = sum(found) / max(1, len(found))
    return value if decides.endswith("nll") else -value


def _command(name: str, start: dict[str, Any], content: dict[str, Any]) -> str:
    fitting, told = content["training"], content["starts"][name]
    chosen = start.get("chosen") or {}
    epochs = fitting["epochs"] * (1 + told.get("extra_steps", 0.0))
    words = ["pkt", "train", content["student"]]
    before: list[str] = []
    if told["kind"] == "folder":
        words.append(told["path"])
    elif told["kind"] != "lora":
        before = [
            "pkt",
            "start",
            content["student"],
            "--how",
            told["how"],
            "--rank",
            str(fitting["rank"]),
            "--out",
            "START",
        ]
        words.append("START")
    words += [
        content["tasks"][TASK]["train"],
        "--out",
        "RUN",
        "--epochs",
        f"{epochs:g}",
        "--batch-size",
        str(fitting["batch_size"]),
    ]
    words += ["--dropout", "0"]
    if told["kind"] == "lora":
        words += ["--rank", str(fitting["rank"])]
    if "lr" in chosen:
        words += ["--lr", f"{chosen['lr']:g}"]
    if told["kind"] == "lora" and "a_scale" in chosen:
        words += ["--a-scale", f"{chosen['a_scale']:g}"]
    return " && ".join(shlex.join(line) for line in (before, words) if line)


def _controls(made: Any, folder: str) -> dict[str, dict[str, Any]]:
    """What a start of this kind is held against, made from the same teacher and seeds."""
    from pkt.extraction import Extraction

    if isinstance(made, Extraction):
        modules = str(made.plan.options.get("modules", "all"))
        drawn = {"layers": "random", "select": "random", "modules": modules}
        return {"random window": {"kind": "transfer", "teacher": "teacher", **drawn}}
    if made.kind != "transplant" or made.provenance.get("options", {}).get("control"):
        return {}
    source = {key: _absolute(made.provenance[key]) for key in ("base", "adapter") if made.provenance.get(key)}
    common = {"kind": "transplant", "teacher": "teacher", "kept": folder, **source}
    return {"wrong units": {**common, "control": "wrong-units"}, "noise": {**common, "control": "noise"}}


def _absolute(place: str | Path) -> str:
    """A path as it is from anywhere; a name on the Hub as it stands."""
    path = as_path(place, "a path")
    return str(path.absolute()) if path.exists() else str(place)
