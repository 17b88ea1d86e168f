"""What may be asked of a plan, refused before anything slow starts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from pkt.errors import PktError
from pkt.models import FUSED, ROLES, Runs, Target, load_tokenizer, read_roles, shared_vocabulary
from pkt.planning.regions import LAYER_CHOICES, STRATEGIES, runs

GROUPS = ("all", "attention", "ffn", "embedding")
_ROLES = {role for role, _ in ROLES.values()} | {r for f in FUSED.values() for r in f.roles} | {"embed", "head"}

ModuleMap: TypeAlias = Mapping[str, str] | Sequence[str]
Vocabulary: TypeAlias = tuple[Runs, Runs]  # rows of the teacher's tables, and the student's rows they feed


def read_vocabulary(wanted: bool | tuple[Any, Any], teacher: Any, student: Any) -> Vocabulary | None:
    """The rows that the two tokenizers share, or None when they are not wanted."""
    if wanted is False:
        return None
    if wanted is True:
        if not all(isinstance(m, (str, Path)) for m in (teacher, student)):
            raise PktError("map_vocabulary=True reads the tokenizers of two directories; pass (teacher's, student's)")
        wanted = load_tokenizer(teacher), load_tokenizer(student)
    shared = shared_vocabulary(*wanted)
    if not shared:
        raise PktError("the two tokenizers share no token, so nothing can be mapped; leave map_vocabulary out")
    return runs([t for t, _ in shared]), runs([s for _, s in shared])


def check_options(
    layers: str | Sequence[int],
    select: str,
    modules: str,
    align_heads: bool,
    layer_map: Sequence[int] | None,
    seed: int,
    module_map: ModuleMap | None = None,
    partial: bool = False,
    map_vocabulary: bool = False,
    roles: Any = None,
) -> dict[str, Any]:
    """Refuse an unknown option before anything slow starts; the options as they are recorded."""
    if select not in STRATEGIES:
        raise PktError(f"select={select!r} is unknown; choose one of {', '.join(STRATEGIES)}")
    if isinstance(layers, str) and layers not in LAYER_CHOICES:
        raise PktError(f"layers={layers!r} is unknown; choose one of {', '.join(LAYER_CHOICES)}, or list the layers")
    if align_heads and select not in ("window", "random"):
        raise PktError(f"align_heads concerns windows; select={select!r} does not cut windows")
    if map_vocabulary and select == "weights":
        raise PktError(
            "select='weights' lays single weights out in the teacher's order, which a mapped vocabulary changes"
        )
    if not isinstance(modules, str):
        raise PktError(f"modules={modules!r} must be a string, such as 'attention,-v' or a regular expression")
    if _role_list(modules) is None:
        try:
            re.compile(modules)
        except re.error as error:
            raise PktError(
                f"modules={modules!r} is neither a list of {', '.join(GROUPS)} and roles ({', '.join(sorted(_ROLES))}) "
                f"nor a regular expression: {error}"
            ) from error
    given = layers if layer_map is None else layer_map
    whole = (int, np.integer)
    if not isinstance(given, str) and (not isinstance(given, Sequence) or not all(isinstance(i, whole) for i in given)):
        raise PktError(f"layers={given!r}: give one of {', '.join(LAYER_CHOICES)}, or a list of the teacher's layers")
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise PktError(f"seed={seed!r} must be a whole number from 0 to 2**63 - 1")
    options: dict[str, Any] = {
        "layers": given if isinstance(given, str) else [int(i) for i in given],
        "select": select,
        "modules": modules,
        "align_heads": align_heads,
        "seed": seed,
    }
    # Recorded only when used, so that results made without them stay what they were.
    if module_map is not None:
        options["module_map"] = _read_map(module_map)
    if partial:
        options["partial"] = True
    if map_vocabulary:
        options["map_vocabulary"] = True
    if roles is not None:
        options["roles"] = {name: list(line) for name, line in sorted(read_roles(roles).items())}
    return options


def _read_map(given: ModuleMap) -> dict[str, str]:
    """Teacher's pattern by student's pattern."""
    if isinstance(given, str):
        given = [given]
    pairs = []
    for text in given.items() if isinstance(given, Mapping) else given:
        source, equals, target = text.partition("=") if isinstance(text, str) else (text[0], "=", text[1])
        if not source or not equals or not target or source.count("*") != target.count("*"):
            raise PktError(
                f"module_map: {text!r}; write TEACHER=STUDENT with as many * on each side: 'a.*.fc1=b.*.mlp.up'"
            )
        pairs.append((target.strip(), source.strip()))
    if not pairs:
        raise PktError("module_map names no pair; write TEACHER=STUDENT: 'a.*.fc1=b.*.mlp.up'")
    return dict(pairs)


def _role_list(modules: str) -> tuple[set[str], set[str]] | None:
    """(chosen, left out) groups and roles, or None for a regular expression."""
    chosen: set[str] = set()
    out: set[str] = set()
    for word in modules.split(","):
        name = word.strip().removeprefix("-")
        if name not in GROUPS and name not in _ROLES:
            return None
        named = set(FUSED[name].roles) if name in FUSED else {name}
        (out if word.strip().startswith("-") else chosen).update(named)
    return chosen or {"all"}, out


def chosen_parts(target: Target, modules: str) -> tuple[tuple[str, Runs], ...]:
    """The roles of a matrix that `modules` chooses, with their rows."""
    listed = _role_list(modules)
    if target.group == "router":
        # Its rows are the teacher's experts, most of which may not be there.
        return ()
    if listed is None:
        return target.roles() if re.search(modules, target.module) else ()
    chosen, out = listed
    whole = target.group != "other" or target.layer is not None

    def wanted(role: str) -> bool:
        names = {role, target.group} | ({"all"} if whole else set())
        return bool(names & chosen) and not names & out

    return tuple((role, rows) for role, rows in target.roles() if wanted(role))
