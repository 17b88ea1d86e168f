"""The tables of a study's report, from stats.json; as HTML by `pkt.reporting.page`, and as LaTeX here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pkt.studying.summing import (
    before,
    comparison,
    difference_text,
    interval_text,
    is_variant,
    mean_text,
    measured_in,
    split,
    steps_to_make,
    text,
    values,
)

# What a control stands for -> what the gain might be made of, if the control does as well.
EXPLANATIONS = {
    "plain": "training longer, from nothing",
    "size": "the size of the start",
    "units": "the teacher's weights, on whichever units",
    "region": "the teacher's weights, whichever they are",
    "off-task": "the teacher, whatever task it is asked about",
    "neutral": "the factors alone, their change not kept",
    "repruned": "the tuned teacher, cut once more",
    "own": "the student's own weights or gradients",
}


COSTS = ["trainable", "made in", "as steps", "trained in"]


@dataclass(frozen=True)
class Table:
    """name: of its file."""

    name: str
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    notes: Sequence[str] = ()


def made_of(found: dict[str, Any]) -> Table | None:
    """What the gain is made of: a row for each thing it might be, and whether its control rules that out."""
    tasks = list(found["tasks"])
    each = {c["control"]: c["role"] for c in found["comparisons"] if c["family"] == "deciding"}
    order = [*EXPLANATIONS, *(role for role in each.values() if role not in EXPLANATIONS)]
    rows = []
    for control, role in sorted(each.items(), key=lambda pair: order.index(pair[1])):
        some = [comparison(found, "deciding", task, control) for task in tasks]
        words = [c["word"] if c else "not yet" for c in some]
        better = all(word == "better" for word in words)
        other = list(dict.fromkeys(word for word in words if word != "better"))
        rows.append(
            [
                EXPLANATIONS.get(role, "what this start gives as well"), control, *(interval_text(c) if c else "" for c in some),
                "ruled out" if better else f"not ruled out: {', '.join(other)}",
            ]
        )  # fmt: skip
    figures = [f"{found['of']} minus it, {task}: {value['decides']}" for task, value in found["tasks"].items()]
    notes = [
        "Each control has all that its row names and lacks the rest. Where one does as well, the gain may be nothing else.",
    ]
    head = ["the gain might be", "control", *figures, ""]
    return Table("made_of", "What the gain is made of", head, rows, notes) if rows else None


def scores(found: dict[str, Any]) -> Table:
    """The paper's table: untrained models and every start, all figures of all tasks, mean ± SD over the training seeds."""
    tasks = found["tasks"]
    names = {task: [n for n in measured_in(value) if split(n)[0] != "general"] for task, value in tasks.items()}
    several = len(tasks) > 1
    head = ["", *(f"{task}: {name}" if several else name for task in tasks for name in names[task])]
    shares = [split(value["decides"])[1] != "nll" for value in tasks.values()]
    average = several and all(shares)
    rows = []
    for model in dict.fromkeys(model for value in tasks.values() for model in value["untrained"]):
        figures = [_untrained(tasks[task], model, name) for task in tasks for name in names[task]]
        deciding = [untrained_value(value, model, value["decides"]) for value in tasks.values()]
        rows.append([f"untrained {model}", *figures, *([_average(deciding)] if average else [])])
    for start in (n for n in next(iter(tasks.values()))["starts"] if not is_variant(found, n)):
        figures = [mean_text(found, tasks[task]["starts"][start], name) for task in tasks for name in names[task]]
        deciding = [_mean(found, value["starts"][start], value["decides"]) for value in tasks.values()]
        rows.append([start, *figures, *([_average(deciding)] if average else [])])
    notes = [f"Mean ± standard deviation over {len(found['seeds'])} training seeds, each start at its own rate."]
    if average:
        head.append("average")
        notes.append("The average is over the deciding figure of each task.")
    return Table("scores", "Every start, all tasks", head, rows, notes)


def _mean(found: dict[str, Any], start: dict[str, Any], name: str) -> float | None:
    some = values(found, start, name)
    return sum(some) / len(some) if some else None


def _average(some: list[float | None]) -> str:
    known = [value for value in some if value is not None]
    return text("share", sum(known) / len(known)) if len(known) == len(some) else ""


def untrained_value(task: dict[str, Any], model: str, name: str) -> float | None:
    test, metric = split(name)
    value = task["untrained"].get(model, {}).get(test, {}).get(metric)
    return None if value is None else float(value)


def _untrained(task: dict[str, Any], model: str, name: str) -> str:
    return text(split(name)[1], untrained_value(task, model, name))


def task_scores(found: dict[str, Any], task: str, *, costs: bool = True) -> Table:
    """One task: before and after training, general text and how much of it is forgotten, and what each start costs."""
    value = found["tasks"][task]
    decides, general = value["decides"], "general.nll"
    metric = split(decides)[1]
    forgets = general in measured_in(value)
    base = untrained_value(value, "student", general)
    others = [name for name in measured_in(value) if name not in (decides, general)]
    head = ["", f"{decides} before", "after", *(f"{name} after" for name in others)]
    head += [*(["general NLL before", "after", "forgotten"] if forgets else [])]
    head += COSTS if costs else []
    rows = [
        [
            f"untrained {m}", _untrained(value, m, decides), "", *(_untrained(value, m, name) for name in others),
            *([_untrained(value, m, general), "", ""] * forgets), *([""] * len(COSTS) * costs),
        ]
        for m in value["untrained"]
    ]  # fmt: skip
    for name, start in value["starts"].items():
        if is_variant(found, name):
            continue
        kept: list[str] = []
        more = [mean_text(found, start, other) for other in others]
        if forgets:
            after = _mean(found, start, general)
            lost = "" if after is None or base is None else difference_text("nll", after - base)
            kept = [text("nll", before(start, general)), mean_text(found, start, general), lost]
        rows.append(
            [
                name,
                text(metric, before(start, decides)),
                mean_text(found, start, decides),
                *more,
                *kept,
                *(_cost(start) if costs else []),
            ]
        )
    notes = [
        f"{value['rows']} rows learnt from, {value['held_out']} held out to choose rates.",
        *(["Forgotten: the loss on general text after training minus the untrained student's."] if forgets else []),
        *(["As steps: the seconds that making the start took, in training steps of this start."] if costs else []),
    ]
    return Table(f"scores_{task}", f"{task}: before, after and what it costs", head, rows, notes)


def _cost(start: dict[str, Any]) -> list[str]:
    def seconds(name: str) -> str:
        return "" if start.get(name) is None else f"{start[name]:.1f} s"

    steps, trainable = steps_to_make(start), start.get("trainable")
    return [
        "" if trainable is None else f"{trainable:,}",
        seconds("seconds_to_make"),
        "" if steps is None else f"{steps:.0f}",
        seconds("seconds_to_train"),
    ]


def comparisons(found: dict[str, Any], family: str) -> Table:
    """All comparisons of one family, whose p values are adjusted together."""
    rows = [
        [
            c["task"], f"{c['test']}.{c['metric']}", c["control"], interval_text(c), f"{c['p']:.2g}", f"{c['adjusted']:.2g}",
            c["word"], difference_text(c["metric"], c["detectable"]).lstrip("+"), _seeds(c),
        ]
        for c in found["comparisons"]
        if c["family"] == family
    ]  # fmt: skip
    head = [
        "task", "figure", f"{found['of']} minus", "difference, interval", "p", "adjusted", "word", "would have seen",
        "seeds for the margin",
    ]  # fmt: skip
    notes = [f"{len(rows)} comparisons, adjusted together (Holm); intervals count seeds and items as samples."]
    return Table(f"comparisons_{family}", f"Comparisons: {family}", head, rows, notes)


def _seeds(c: dict[str, Any]) -> str:
    if not c["margin"]:
        return ""
    return "more items" if c["seeds_for_margin"] is None else str(c["seeds_for_margin"])


def fairness(found: dict[str, Any], task: str) -> Table | None:
    """How rates were chosen: held-out loss at every rate, what was chosen, and what else is equal."""
    starts = {name: start for name, start in found["tasks"][task]["starts"].items() if start["curve"]}
    lrs = sorted({point["lr"] for start in starts.values() for point in start["curve"]})
    rows = []
    for name, start in starts.items():
        chosen = start["chosen"]
        rows.append(
            [
                name, *(_best_at(start, lr) for lr in lrs), *(f"{chosen[n]:g}" if chosen else "" for n in ("lr", "a_scale")),
                "yes" if start["at_the_end"] else "", len(start["curve"]), sum(p["nll"] is None for p in start["curve"]),
                "" if start.get("clipped") is None else f"{100 * start['clipped']:.0f}%",
            ]
        )  # fmt: skip
    head = ["", *(f"lr {lr:g}" for lr in lrs), "chosen", "A ×", "at an end", "tunings", "diverged", "clipped steps"]
    tuning = found["tuning"]
    notes = [
        "Held-out loss after tuning, at the best scale of A. The same rates, scales, rows, order, steps and tuning seeds "
        f"({', '.join(map(str, tuning['seeds']))}) for every start; none of these trainings is reported.",
        "Clipped steps: of the reported trainings, those whose gradient was longer than 1 and was shortened to it.",
    ]
    return Table(f"fairness_{task}", f"{task}: how rates were chosen", head, rows, notes) if rows else None


def _best_at(start: dict[str, Any], lr: float) -> str:
    some = [point["nll"] for point in start["curve"] if point["lr"] == lr]
    known = [value for value in some if value is not None]
    return f"{min(known):.3f}" if known else "diverged" if some else ""


def crossed(found: dict[str, Any], panel: str) -> Table:
    """Whose seeds a start is made of × the task it is trained on: gains over plain LoRA, the task's own marked."""
    value = found["crossed"][panel]
    by = {(cell["seeds_of"], cell["task"]): cell for cell in value["cells"]}
    tasks = list(dict.fromkeys(task for _, task in by))
    rows = []
    for seeds_of in dict.fromkeys(s for s, _ in by):
        cells = [by.get((seeds_of, task)) for task in tasks]
        shown = ["" if c is None else interval_text(c) + (" (own)" if c["task"] == seeds_of else "") for c in cells]
        rows.append([f"seeds of {seeds_of}", *shown])
    notes = [f"Gain over {value['plain']}, positive is better."]
    for task, part in value["shares"].items():
        said = "cannot be said: the gain of its own seeds may be nothing" if part is None else (
            f"{100 * part['share']:.0f}% [{100 * part['low']:.0f}, {100 * part['high']:.0f}]"
        )  # fmt: skip
        notes.append(f"{task}: the share of the gain that needs no information of the task: {said}.")
    return Table(f"crossed_{panel}", f"Panel {panel}: seeds of another task", ["", *tasks], rows, notes)


def items(found: dict[str, Any]) -> Iterator[Table]:
    """Of each deciding comparison the items that differ most."""
    for c in found["comparisons"]:
        if c["family"] != "deciding" or not c["items"].get("flipped"):
            continue
        rows = [
            [row["item"], row["question"], row["answer"], *(text(c["metric"], row[n]) for n in ("ours", "control"))]
            for row in c["items"]["flipped"]
        ]
        what = "loss" if c["metric"] == "nll" else "share of the seeds that are right"
        head = ["item", "question", "right answer", c["of"], c["control"]]
        title = f"{c['task']}: items on which {c['of']} and {c['control']} differ most ({what})"
        yield Table(f"items_{c['task']}_{c['control']}", title, head, rows)


def costs(found: dict[str, Any]) -> Table:
    value = found["costs"]
    rows = [
        [kind, v["cells"], f"{v['seconds'] / 3600:.2f} h" if v["seconds"] > 600 else f"{v['seconds']:.0f} s", _bytes(v)]
        for kind, v in value["kinds"].items()
    ]
    mixed = [f"{name} {'/'.join(some)}" for name, some in value["versions"].items() if len(some) > 1]
    with_ = ", ".join(f"{name} {some[0]}" for name, some in value["versions"].items() if len(some) == 1)
    notes = [f"Made on {', '.join(value['devices'])} with {with_}."]
    if mixed or len(value["devices"]) > 1:
        notes.append(
            f"Mixed: {'; '.join([*mixed, *value['devices'][1:]])}. What is compared was not all made with the same."
        )
    notes.append(
        "Most memory: of the process that made the cells, until then; of a GPU where there is one. All cells in the folder count."
    )
    return Table("costs", "What it cost", ["cells", "how many", "time", "most memory"], rows, notes)


def _bytes(kind: dict[str, Any]) -> str:
    return f"{kind['peak_bytes'] / 1e9:.2f} GB" if kind["peak_bytes"] else ""


def markdown(table: Table) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (table.head, ["---"] * len(table.head), *table.rows)]
    return "\n".join([*lines, "", *(note for note in table.notes)])


_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "×": r"$\times$", "…": r"\ldots{}", "≤": r"$\leq$",
    "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip


def tex(value: Any) -> str:
    return "".join(_TEX.get(char, char) for char in str(value))


def latex(table: Table) -> str:
    """A table of the package booktabs, to be \\input."""
    lines = [
        "% \\usepackage{booktabs}",
        f"\\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}",
        "\\toprule",
        " & ".join(map(tex, table.head)) + r" \\",
        "\\midrule",
        *(" & ".join(map(tex, row)) + r" \\" for row in table.rows),
        "\\bottomrule",
        "\\end{tabular}",
        *(f"% {note}" for note in table.notes),
    ]
    return "\n".join(lines) + "\n"
