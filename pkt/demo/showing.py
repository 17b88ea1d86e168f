"""What the demo found: in sentences, as a table, as a picture and a page."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pkt.demo.measuring import ASSETS, HELD_OUT, METHODS, OURS, TEACHER_ROWS, TRAIN_ROWS
from pkt.extraction import Extraction
from pkt.models import spec_of
from pkt.reporting import new_figure, page, plot_layers, plot_methods, plot_window, png_bytes
from pkt.tables import fitted

SURE = 0.05  # adjusted p below which a difference is called one
ROWS = (
    "Task rows are those that a start has seen: the teacher's own for whatever is made from the teacher (noise takes its sizes "
    "alone from it), and the training problems. No control made from the teacher has seen fewer than the transplant; plain LoRA "
    "has seen the training problems alone, so what the transplant is ahead of it by is the teacher's rows as well. The healed "
    "one was trained after its cut on the very rows of general text that healed the descendant, in as many steps at the same rate."
)
FIGURES = {"task": "NLL", "match": "right answers", "general": "general text"}


def found_of(summary: dict[str, Any], a: str, b: str, figure: str) -> dict[str, Any] | None:
    """The comparison of two methods by a figure; None where there was one seed."""
    return next((c for c in summary["comparisons"] if (c["a"], c["b"], c["figure"]) == (a, b, figure)), None)


def word(comparison: dict[str, Any] | None, *, lower_is_better: bool = True) -> str:
    if comparison is None or comparison["adjusted"] >= SURE:
        return "cannot be told from"
    return "beats" if (comparison["mean"] < 0) == lower_is_better else "loses to"


def controls() -> list[str]:
    return [name for name, method in METHODS.items() if name != OURS and not method.stranger]


def sentences(summary: dict[str, Any]) -> list[str]:
    """When a teacher helps, when it does not, and how to know."""
    methods, models = summary["methods"], summary["models"]
    ours, student = methods[OURS], models["descendant"]
    best = min(controls(), key=lambda name: methods[name]["nll_mean"])
    words = {name: word(found_of(summary, OURS, name, "task")) for name in controls()}
    beaten = sum(w == "beats" for w in words.values())
    close = [name for name, w in words.items() if w != "beats"]
    against = "every control" if not close else f"{beaten} of {len(words)} controls, not {', '.join(close)}"
    shares = _share(student["exact_match"]), _share(ours["before"]["exact_match"])
    right = "leaves right answers at {}" if len(set(shares)) == 1 else "from {} to {} right answers"
    does = (
        f"**When the student descends from the teacher's base**, the transplant alone, before any training, takes the demo's "
        f"student from NLL {student['nll']:.2f} to {ours['before']['nll']:.2f} and {right.format(*shares)}; after the same "
        f"training it reaches {ours['nll_mean']:.2f} and {_share(ours['exact_match_mean'])} where the best control ({best}) "
        f"reaches {methods[best]['nll_mean']:.2f} and {_share(methods[best]['exact_match_mean'])}: it beats "
        f"{against}{_forgetting(summary)}."
    )
    names = ("stranger: the paper's window", "stranger: plain LoRA")
    between = found_of(summary, *names, "task")
    window, plain = (methods[name]["nll_mean"] for name in names)
    does_not = (
        f"**Between strangers**, models trained apart, the paper's start {word(between)} plain LoRA with a quarter more steps: NLL "
        f"{window:.2f} and {plain:.2f}."
    )
    kin, stranger = (summary["lineage"][name] for name in ("descendant", "student"))
    know = (
        "**To know which yours is**, `pkt lineage TEACHER STUDENT` compares the weights alone, in seconds: here it says "
        f"*{kin['verdict']}* and *{stranger['verdict']}*."
    )
    return [does, does_not, know]


def _forgetting(summary: dict[str, Any]) -> str:
    more = [name for name in controls() if word(found_of(summary, OURS, name, "general")) == "loses to"]
    return f", and forgets more general text than {' and '.join(more)}" if more else ""


def verdict(summary: dict[str, Any]) -> list[str]:
    """The transplant against each control: NLL, right answers and general text, each with its interval."""
    lines = []
    pairs = [(OURS, name) for name in controls()]
    for a, b in pairs:
        parts = []
        for figure in FIGURES:
            c = found_of(summary, a, b, figure)
            if c is None:
                return ["one training seed: no difference has a spread; give --seeds 2 or more"]
            times, unit = (100, " points") if figure == "match" else (1, "")
            low, high = sorted((times * c["low"], times * c["high"]))
            sure = "" if c["adjusted"] < SURE else ", which may be chance"
            parts.append(f"{FIGURES[figure]} {times * c['mean']:+.2f}{unit} [{low:+.2f}, {high:+.2f}]{sure}")
        lines.append(f"{a} {word(found_of(summary, a, b, 'task'))} {b}: {'; '.join(parts)}")
    return lines


def _share(value: float) -> str:
    return f"{100 * value:.0f}%"


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def table_of(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    head = [
        "",
        "task rows",
        "lr",
        "A ×",
        "NLL before training",
        "right",
        "NLL after training",
        "right",
        "general text NLL",
    ]
    names = {"teacher": "teacher", "descendant": "descendant, as it is", "student": "stranger, as it is"}
    counts = {"teacher": f"{TEACHER_ROWS:,}"}
    rows = [
        [
            name,
            counts.get(name, "0"),
            "",
            "",
            f"{m['nll']:.3f}",
            _share(m["exact_match"]),
            "",
            "",
            f"{m['general']:.3f}",
        ]
        for name, m in ((name, summary["models"][key]) for key, name in names.items())
    ]
    guess = summary["guess"]
    rows.append([f"always answering {guess['answer']}", "", "", "", "", _share(guess["exact_match"]), "", "", ""])
    for name, m in summary["methods"].items():
        after = [f"{statistics.mean(m[k]):.3f} ± {_spread(m[k]):.3f}" for k in ("nll", "general")]
        matches = [100 * value for value in m["exact_match"]]
        right = f"{statistics.mean(matches):.0f}% ± {_spread(matches):.0f}"
        before = [f"{m['before']['nll']:.3f}", _share(m["before"]["exact_match"])]
        seen = f"{TEACHER_ROWS:,} + {TRAIN_ROWS}" if METHODS[name].taught else str(TRAIN_ROWS)
        rows.append([name, seen, f"{m['lr']:g}", f"{m['a_scale']:g}", *before, after[0], right, after[1]])
    return head, rows


def show(console: Any, summary: dict[str, Any]) -> None:
    from rich.markdown import Markdown

    for line in summary["sentences"]:
        console.print(Markdown(line))
    head, rows = table_of(summary)
    title = f"{summary['test_rows']} held-out problems and {summary['general_rows']} rows of general text, {summary['seeds']} seeds"
    # What each was trained with is on the page.
    shown = [0, *(n for n, name in enumerate(head) if "NLL" in name or name == "right")]
    head, *rows = [[row[n] for n in shown] for row in (head, *rows)]
    console.print(fitted(head, rows, title))
    for line in summary["verdict"]:
        console.print(line, highlight=False)


def picture_of(ext: Extraction, summary: dict[str, Any], scores: Mapping[str, Tensor]) -> bytes:
    figure, (layers, window, nll, match) = new_figure(17, 3.6, 4)
    plot_layers(layers, ext.plan)
    layers.set_title("teacher layers: sensitivity\n(dark: feeds the student)", fontsize=9)
    downs = {t.module for t in spec_of(ASSETS / "teacher").targets if t.role == "down"}
    source = next(e.source for e in ext.plan.entries if e.source in downs)
    plot_window(window, scores[f"{source}.weight"], ext.plan, source)
    methods, before = summary["methods"], summary["models"]["descendant"]
    plot_methods(nll, {n: r["nll"] for n, r in methods.items()}, before["nll"], "test NLL, lower is better")
    matches = {n: [100 * m for m in r["exact_match"]] for n, r in methods.items()}
    plot_methods(
        match,
        matches,
        100 * before["exact_match"],
        "right answers %, higher is better",
        guess=100 * summary["guess"]["exact_match"],
    )
    match.set_yticks(range(len(matches)), [""] * len(matches))
    return png_bytes(figure)


def page_of(summary: dict[str, Any], picture: bytes) -> str:
    head, rows = table_of(summary)
    plain = [line.replace("*", "").replace("`", "") for line in summary["sentences"]]
    return page(
        "pkt demo",
        [
            {"heading": "What happened", "text": plain, "picture": picture},
            {"heading": "Held-out problems", "head": head, "rows": rows, "text": summary["verdict"]},
            {"heading": "How it was measured", "text": how(summary)},
        ],
    )


def how(summary: dict[str, Any]) -> list[str]:
    return [
        f"{summary['train_rows']} training problems, {summary['epochs']:g} epochs, batch {summary['batch_size']}, rank "
        f"{summary['rank']}, all seven projections, embeddings and head; {summary['test_rows']} test problems; {summary['seeds']} "
        "training seeds. ± is the standard deviation over them. Plain LoRA makes a quarter more steps: what the other starts cost.",
        ROWS,
        f"Each method's learning rate and scale of A were chosen by one search on {HELD_OUT} problems held out from training, with "
        "a seed that is not reported (bench/tune_demo.py).",
        "Intervals are of seeds × problems (95%); a difference is called one where its p, adjusted over all controls (Holm), is "
        f"below {SURE}. Wrong units and noise are added at the transplant's α; their own best α by the seeds: "
        + ", ".join(f"{name} {a:g}" for name, a in summary["own_alpha"].items())
        + " (0 is plain LoRA).",
    ]
