"""PEFT's adapter folder by its configuration and the header of its weights: what it is, told without torch and without PEFT."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from pkt.errors import PktError
from pkt.files import MANIFEST, read_json, safetensors_header
from pkt.manifest import read_manifest
from pkt.models.tables import EXPERT_PARAMETERS
from pkt.options import Mode

WEIGHTS, CONFIG, PICKLE = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"
RECORD = "pkt"  # key of pkt's record in the configuration's auto_mapping
MODES: tuple[Mode, ...] = get_args(Mode)
SHIFTED = "pkt_residual"  # in the configuration of a base whose weights are W − B₀A₀
INITIAL = "pkt_initial"  # folder with the factors that a residual adapter started from

# Fields of LoraConfig that make an adapter more than a low-rank change of whole matrices.
NOT_PLAIN = {
    "use_dora": "DoRA",
    "lora_bias": "biases in LoRA",
    "modules_to_save": "modules_to_save",
    "trainable_token_indices": "trainable tokens",
    "layer_replication": "layer replication",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "velora_config": "VeLoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}


def read_config(folder: Path, *, where: str = "") -> dict[str, Any]:
    """The configuration of an adapter folder. Raises `PktError` where there is none; `where`: what to name instead."""
    if not (folder / CONFIG).is_file():
        lacks = f"has no {CONFIG}" if folder.is_dir() else "is a file" if folder.exists() else "does not exist"
        raise PktError(f"{folder} {lacks}; name an adapter folder{where}")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise PktError(f"{folder / CONFIG} is not an adapter's configuration; copy the folder again")
    return config


def check_plain(config: Mapping[str, Any], what: str) -> None:
    """Refuse what plain LoRA factors do not represent: other methods, DoRA, LoRA biases, modules_to_save."""
    if config.get("peft_type") != "LORA":
        found_type = config.get("peft_type")
        method = f"is a {found_type} adapter" if found_type else f"has no peft_type in its {CONFIG}"
        raise PktError(f"{what} {method}; pkt handles LoRA")
    for key, name in NOT_PLAIN.items():
        if config.get(key):
            raise PktError(f"{what} uses {name}, which plain LoRA factors cannot represent; train without it")
    if config.get("bias", "none") != "none":
        raise PktError(f"{what} trained biases (bias={config['bias']!r}), which plain LoRA factors cannot represent")


@dataclass(frozen=True)
class Factors:
    """The keys of one module's factors in a state dict of PEFT's."""

    a: str
    b: str
    embedding: bool


def factors_in(keys: Iterable[str], what: str) -> dict[str, Factors]:
    """Module of PEFT's -> its factors. Raises `PktError` for one without the other, and for none at all."""
    found: dict[str, dict[str, str]] = {}
    for key in keys:
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_(embedding_)?([AB])(\.weight)?", key)
        if match:
            found.setdefault(match[1], {})[("e" if match[2] else "") + match[3]] = key
    factors = {}
    for place, parts in found.items():
        kind = "e" if "eA" in parts or "eB" in parts else ""
        if kind + "A" not in parts or kind + "B" not in parts:
            raise PktError(f"{what}: {place} has only one of its two LoRA factors; the file is incomplete")
        factors[place] = Factors(parts[kind + "A"], parts[kind + "B"], bool(kind))
    if not factors:
        raise PktError(f"{what} holds no LoRA factors")
    return factors


def wrapped_names(parameters: Iterable[str]) -> dict[str, str]:
    """Experts' parameter -> the module that holds its factors: PEFT nests wrappers, the first registered is innermost."""
    names: dict[str, list[str]] = {}
    for parameter in sorted(parameters, key=lambda p: -EXPERT_PARAMETERS.index(p.rpartition(".")[2])):
        names.setdefault(parameter.rpartition(".")[0], []).append(parameter)
    return {p: owner + ".base_layer" * depth for owner, found in names.items() for depth, p in enumerate(found)}


def experts_in(places: Iterable[str], config: Mapping[str, Any], what: str) -> dict[str, str]:
    """Module of PEFT's -> the experts' parameter whose factors it holds. PEFT finds parameters by the ends of their names."""
    given = config.get("target_parameters") or ()
    if not isinstance(given, (list, tuple, set)) or not all(isinstance(t, str) for t in given):
        raise PktError(f"{what}: the target_parameters of its {CONFIG} are no list of names; copy the folder again")
    targeted = sorted(given)
    unknown = [t for t in targeted if "." not in t or t.rpartition(".")[2] not in EXPERT_PARAMETERS]
    if unknown:
        raise PktError(
            f"{what} uses target_parameters ({', '.join(unknown[:5])}), and pkt knows those of experts, by names such as "
            f"{', '.join(f'experts.{name}' for name in EXPERT_PARAMETERS)}; train without the others"
        )
    owners = {place: re.sub(r"(\.base_layer)+$", "", place) for place in places}
    parameters = [
        f"{owner}.{name}"
        for owner in dict.fromkeys(owners.values())
        for name in EXPERT_PARAMETERS
        if any(f".{owner}.{name}".endswith(f".{t}") for t in targeted)
    ]
    found = {place: parameter for parameter, place in wrapped_names(parameters).items()}
    holding = {parameter.rpartition(".")[0] for parameter in parameters}
    apart = set(found) ^ {place for place, owner in owners.items() if owner in holding}
    if apart:
        raise PktError(
            f"{what}: its target_parameters and its weights name different experts ({min(apart)}); copy the folder again"
        )
    return found


def setting(pattern: str, module: str, default: Any, config: Mapping[str, Any]) -> float:
    """r or lora_alpha of a module, by the first of a pattern's keys that ends its name."""
    for key, value in (config.get(pattern) or {}).items():
        try:
            found = re.match(rf"(.*\.)?({key})$", module)
        except re.error as error:
            raise ValueError(f"{key!r} is not a regular expression") from error
        if found:
            return _number(value)
    return _number(default)


def _number(value: Any) -> float:
    """PEFT computes with what the file holds, so that a word is no number here either."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def read_ranks(folder: Path, config: Mapping[str, Any]) -> dict[str, int]:
    """Module, or experts' parameter -> rank, from the header of the folder's weights. Raises `PktError` as reading them does."""
    check_plain(config, str(folder))
    stored = safetensors_header(folder / WEIGHTS).tensors
    factors = factors_in(stored, str(folder))
    experts = experts_in(factors, config, str(folder))
    ranks: dict[str, int] = {}
    for place, names in factors.items():
        a, b = stored[names.a].shape, stored[names.b].shape
        if not (len(a) == len(b) == 2 and a[0] == b[1]):
            raise PktError(f"{folder}: the LoRA factors of {place} are {list(a)} and {list(b)}; copy the folder again")
        ranks[place] = a[0]
    try:
        own = {m: int(setting("rank_pattern", m, config["r"], config)) for m in experts.values()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PktError(f"{folder / CONFIG} says no rank of its experts; copy the folder again") from error
    return {experts.get(place, place): own.get(experts.get(place, place), rank) for place, rank in ranks.items()}


def changes_nothing(folder: Path, modules: Iterable[str]) -> bool:
    """Whether B of every one of these modules is zero, read up to the first byte that is not."""
    stored, wanted = safetensors_header(folder / WEIGHTS).tensors, set(modules)
    factors = factors_in(stored, str(folder))
    experts = experts_in(factors, read_config(folder), str(folder))
    places = [stored[names.b] for place, names in factors.items() if experts.get(place, place) in wanted]
    with open(folder / WEIGHTS, "rb") as file:
        for place in places:
            file.seek(place.begin)
            left = place.end - place.begin
            while left:
                chunk = file.read(min(left, 1 << 20))
                if chunk.strip(b"\0"):
                    return False
                left -= len(chunk)
    return True


@dataclass(frozen=True)
class Origin:
    """How an adapter was injected, as files say it."""

    mode: str  # paired, residual, add or plain
    student: str | None  # the original student, as it was named
    how: str  # what the mode was recognised by
    record: dict[str, Any] = field(default_factory=dict)
    initial: Path | None = None  # folder with the initial factors of a residual adapter


def record_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """pkt's record in an adapter's configuration, or None."""
    mapping = config.get("auto_mapping")
    record = mapping.get(RECORD) if isinstance(mapping, dict) else None
    return record if isinstance(record, dict) and record.get("mode") in MODES else None


def origin_of(folder: Path, config: Mapping[str, Any]) -> Origin | None:
    """How the adapter in a folder was injected, by its run, its record or its base; None where only its factors could tell.

    Raises `PktError` for an extraction, which is not trained, and for an adapter of another run.
    """
    run = next((f for f in (folder, *folder.absolute().parents[:2]) if (f / MANIFEST).is_file()), None)
    manifest = {} if run is None else read_manifest(run)
    kind = manifest.get("kind")
    if kind == "extraction" and run == folder:
        raise PktError(
            f"{folder} is an extraction, not a trained adapter; train it first (pkt train), or load it with PEFT as it is"
        )
    record = record_of(config) or {}
    # The base a residual folder was trained on, when pkt wrote it as a complete student.
    named = str(config.get("base_model_name_or_path") or "")
    base = Path(named) if named else None
    shifted = read_json(base / "config.json") if base and (base / "config.json").is_file() else {}
    shifted = shifted.get(SHIFTED) if isinstance(shifted, dict) else None
    if kind == "run":
        mode, student, how = str(manifest["mode"]), manifest.get("student"), f"{run}/{MANIFEST}"
        if record and record["mode"] != mode:
            raise PktError(
                f"{folder} was injected as {record['mode']}, but {how} says {mode}; it belongs to another run"
            )
    elif kind == "adapter" and run == folder:
        mode, student, how = "plain", named, f"its {MANIFEST}"
    elif record:
        mode, student, how = record["mode"], record.get("student"), f"the record in its {CONFIG}"
    elif isinstance(shifted, dict):
        mode, student, how = "residual", shifted.get("student"), f"the shifted base it was trained on, {base}"
        record = {"initial": shifted.get("initial")}
    else:
        return None
    places = [f / INITIAL for f in (run, base) if f is not None] if mode == "residual" else []
    return Origin(mode, student, how, record, next((p for p in places if (p / CONFIG).is_file()), None))


def without_initial(where: str) -> str:
    """Why a residual adapter cannot be finalized."""
    return (
        f"{where} is a residual adapter without its initial factors, so its change cannot be computed; finalize it inside "
        "its run folder, or name the extraction it started from (--extraction DIR)"
    )
