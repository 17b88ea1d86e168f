"""What the options of a plan mean: the modules it chooses, the map of names, the tokens that two vocabularies share."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from pkt.errors import PktError
from pkt.models import EXPERT_PARAMETERS, FUSED, NAMED_ROLES, Model, ModelSpec, Runs, Target, shared_vocabulary
from pkt.options import PlanOptions
from pkt.planning.regions import STRATEGIES, runs

GROUPS = ("all", "attention", "ffn", "embedding")

ModuleMap: TypeAlias = Mapping[str, str] | Sequence[str]
Vocabulary: TypeAlias = tuple[Runs, Runs]  # rows of the teacher's tables, and the student's rows they feed


def read_vocabulary(wanted: bool | tuple[Any, Any], teacher: Model, student: Model) -> Vocabulary | None:
    """The rows that the two tokenizers share, or None when they are not wanted."""
    if wanted is False:
        return None
    if wanted is True:
        if not (teacher.is_named and student.is_named):
            raise PktError("map_vocabulary=True reads the tokenizers of two directories; pass (teacher's, student's)")
        wanted = teacher.tokenizer, student.tokenizer
    # A tokenizer may have tokens beyond its model's table (Gemma 3's has one).
    most = [model.spec.vocab_size or math.inf for model in (teacher, student)]
    shared = [pair for pair in shared_vocabulary(*wanted) if pair[0] < most[0] and pair[1] < most[1]]
    if not shared:
        raise PktError("the two tokenizers share no token, so nothing can be mapped; leave map_vocabulary out")
    return runs([t for t, _ in shared]), runs([s for _, s in shared])


def check_options(options: PlanOptions) -> None:
    """Refuse a list of modules that means nothing, and options that their strategy cannot serve."""
    strategy = STRATEGIES[options.select]
    if options.align_heads and not strategy.cuts_windows:
        raise PktError(f"align_heads concerns windows; select={options.select!r} does not cut windows")
    if options.map_vocabulary and not strategy.keeps_rows:
        raise PktError(
            f"select={options.select!r} lays single weights out in the teacher's order, which a mapped vocabulary changes"
        )
    if _role_list(options.modules) is None:
        try:
            re.compile(options.modules)
        except re.error as error:
            raise PktError(
                f"modules={options.modules!r} is neither a list of {', '.join(GROUPS)} and roles "
                f"({', '.join(sorted(NAMED_ROLES))}) nor a regular expression: {error}"
            ) from error


def read_map(given: ModuleMap | None) -> dict[str, str] | None:
    """Teacher's pattern by student's pattern."""
    if given is None:
        return None
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
        if name not in GROUPS and name not in NAMED_ROLES:
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


def dense_beside_experts(student: ModelSpec, wanted: Sequence[Target]) -> list[Target]:
    """The dense FFNs of a student with experts: PEFT reads gate_proj and the like there as names of old for the experts'."""
    beside = any(t.experts for t in student.targets)
    return [t for t in wanted if beside and t.group == "ffn" and not t.experts]


def adapted(student: ModelSpec, modules: str) -> list[Target]:
    """The matrices of a student that a LoRA of these `modules` adapts, each as a whole. Raises `PktError` where there are none."""
    check_options(PlanOptions(modules=modules))
    chosen = [t for t in student.targets if chosen_parts(t, modules)]
    unnamed = [t for t in chosen if t.experts and t.module.rpartition(".")[2] not in EXPERT_PARAMETERS]
    beyond = [t for t in chosen if t.unadaptable]
    left_out = {t.module for t in (*dense_beside_experts(student, chosen), *unnamed, *beyond)}
    found = [t for t in chosen if t.module not in left_out]
    if not found:
        like = student.targets[0].module if student.targets else "(it has none)"
        raise PktError(
            f"modules={modules!r} chooses none of the student's matrices that PEFT adapts; their names are like {like}"
        )
    return found
