"""The command line that makes again what a folder of pkt's holds, from what is recorded in its manifest."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any


def command_of(manifest: Mapping[str, Any]) -> str | None:
    """The line, quoted for a shell. None where the folder does not record all of it: an older pkt's, or made of what is no file."""
    words = _LINES.get(str(manifest.get("kind")), _none)(manifest)
    return None if words is None else shlex.join(["pkt", *words])


def flags(given: Mapping[str, Any]) -> list[str]:
    """Options as the command line has them: --name VALUE, --name or --no-name; a list of pairs as one flag for each."""
    found: list[str] = []
    for name, value in given.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, (list, tuple)):
            found += [word for each in value for word in (f"--{flag}", str(each))]
        elif value is not None:
            found += [f"--{flag}", str(value)]
    return found


def _none(manifest: Mapping[str, Any]) -> None:
    return None


def _extraction(manifest: Mapping[str, Any]) -> list[str] | None:
    plan, made = manifest["plan"], manifest.get("factorization", {})
    given = {**plan["options"], **made}
    if "roles" in given:  # of a file that is not recorded
        return None
    given.pop("rank" if given.get("energy") is not None else "max_rank", None)
    if not isinstance(given["layers"], str):
        given["layers"] = ",".join(map(str, given["layers"]))
    if "module_map" in given:
        given["map"] = [f"{theirs}={ours}" for theirs, ours in given.pop("module_map").items()]
    if str(manifest.get("dtype")).startswith("torch."):
        given["dtype"] = str(manifest["dtype"]).removeprefix("torch.")
    files = (_name(plan["teacher"], "TEACHER"), _name(plan["student"], "STUDENT"), _seeds(manifest))
    return ["transfer", *files, *_true(given), "--out", "DIR"]


def _transplant(manifest: Mapping[str, Any], out: str = "--out") -> list[str]:
    given = {name: manifest.get(name) for name in ("base", "adapter")} | manifest.get("options", {})
    files = (_name(manifest.get("teacher"), "TEACHER"), _name(manifest.get("student"), "STUDENT"), _seeds(manifest))
    return ["transplant", *files, *_true(given), out, "DIR"]


def _start(manifest: Mapping[str, Any]) -> list[str] | None:
    if "how" not in manifest:
        return None
    files = [_name(manifest["student"], "STUDENT"), *([_seeds(manifest)] if manifest.get("seeds") else [])]
    return ["start", *files, *_true(manifest["options"]), "--out", "DIR"]


def _run(manifest: Mapping[str, Any]) -> list[str] | None:
    given = dict(manifest.get("given") or {})
    if not given or "scheduler" in given:  # which no flag has
        return None
    files = [given.pop(name) for name in ("student", "extraction", "data") if name in given]
    return ["train" if "epochs" in manifest["settings"] else "inject", *files, *flags(given), "--out", "DIR"]


def _adapter(manifest: Mapping[str, Any], *more: str) -> list[str] | None:
    given = dict(manifest.get("given") or {})
    if not given:
        return None
    return ["finalize", given.pop("model_or_dir"), *flags(given), "--out", "DIR", *more]


def _model(manifest: Mapping[str, Any]) -> list[str] | None:
    if "content" not in manifest:
        return _adapter(manifest, "--merge", "MERGED")
    # Beside a LoRA the scale is chosen without norms and biases: it is named here, so that it is the same either way.
    if "student" not in manifest:
        return None
    options = {**manifest["options"], "alpha": manifest["alpha"]}
    return _transplant({**manifest, "student": {"name": manifest["student"]}, "options": options}, "--merge")


def _true(given: Mapping[str, Any]) -> list[str]:
    """Of options whose flags have no opposite, and of which the seed is 0 unless given."""
    return flags({name: value for name, value in given.items() if value is not False and (name, value) != ("seed", 0)})


def _name(model: Any, stands_for: str) -> str:
    return str((model or {}).get("name") or stands_for)


def _seeds(manifest: Mapping[str, Any]) -> str:
    return str((manifest.get("seeds") or {}).get("source") or "SEEDS.jsonl")


_LINES: dict[str, Any] = {
    "extraction": _extraction,
    "transplant": _transplant,
    "start": _start,
    "run": _run,
    "adapter": _adapter,
    "model": _model,
}
