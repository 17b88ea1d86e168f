"""What the demo found: as a table, in words, as a picture and a page."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pkt.demo.measuring import ASSETS, HELD_OUT, RATES
from pkt.extraction import Extraction
from pkt.models import spec_of
from pkt.reporting import new_figure, page, plot_layers, plot_methods, plot_window, png_bytes


def verdict(results: dict[str, dict[str, Any]]) -> list[str]:
    """PKT against each control, in words: beaten only where the means differ by more than both spreads together."""
    ours, *controls = results.items()
    lines = []
    for name, control in controls:
        difference = statistics.mean(control["nll"]) - statistics.mean(ours[1]["nll"])
        spread = _spread(control["nll"]) + _spread(ours[1]["nll"])
        if difference > spread:
            word = "beats"
        elif difference < -spread:
            word = "loses to"
        else:
            word = "cannot be told from"
        side = "lower" if difference > 0 else "higher"
        lines.append(f"PKT {word} {name}: NLL {abs(difference):.3f} {side}, spreads {spread:.3f}")
    return lines


def exact_match_note(summary: dict[str, Any]) -> str:
    """Whether the exact matches say anything: the best mean against always giving the commonest answer."""
    best = max(statistics.mean(r["exact_match"]) for r in summary["methods"].values())
    guess = summary["guess"]["exact_match"]
    if best > 2 * guess:
        return f"exact match: the best start reaches {100 * best:.1f}%, guessing {100 * guess:.1f}%"
    return (
        f"exact match says nothing here: no start gets well above always answering {summary['guess']['answer']} "
        f"({100 * guess:.1f}%); in so few steps this student learns the form of the answers, not the sums"
    )


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def table_of(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    head = ["start", "lr", "test NLL", "exact match"]
    one = summary["untrained"], summary["teacher"]
    rows = [
        [name, "", f"{e['nll']:.3f}", f"{100 * e['exact_match']:.1f}%"]
        for name, e in zip(("student before training", "teacher"), one, strict=True)
    ]
    guess = summary["guess"]
    rows.append([f"always answering {guess['answer']}", "", "", f"{100 * guess['exact_match']:.1f}%"])
    for name, result in summary["methods"].items():
        matches = [100 * m for m in result["exact_match"]]
        rows.append(
            [
                name,
                f"{result['lr']:g}",
                f"{statistics.mean(result['nll']):.3f} ± {_spread(result['nll']):.3f}",
                f"{statistics.mean(matches):.1f}% ± {_spread(matches):.1f}",
            ]
        )
    return head, rows


def show(console: Any, summary: dict[str, Any]) -> None:
    from rich.table import Table

    head, rows = table_of(summary)
    table = Table(
        *head, box=None, header_style="bold", title=f"held-out problems, mean ± spread over {summary['seeds']} seeds"
    )
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for line in summary["verdict"]:
        console.print(line, highlight=False)


def picture_of(ext: Extraction, summary: dict[str, Any], scores: Mapping[str, Tensor]) -> bytes:
    figure, (layers, window, nll, match) = new_figure(17, 3.6, 4)
    plot_layers(layers, ext.plan)
    downs = {t.module for t in spec_of(ASSETS / "teacher").targets if t.role == "down"}
    source = next(e.source for e in ext.plan.entries if e.source in downs)
    plot_window(window, scores[f"{source}.weight"], ext.plan, source)
    methods = summary["methods"]
    plot_methods(
        nll, {n: r["nll"] for n, r in methods.items()}, summary["untrained"]["nll"], "test NLL, lower is better"
    )
    matches = {n: [100 * m for m in r["exact_match"]] for n, r in methods.items()}
    plot_methods(
        match,
        matches,
        100 * summary["untrained"]["exact_match"],
        "exact match %, higher is better",
        guess=100 * summary["guess"]["exact_match"],
    )
    match.set_yticks(range(len(matches)), [""] * len(matches))
    return png_bytes(figure)


def page_of(summary: dict[str, Any], picture: bytes) -> str:
    head, rows = table_of(summary)
    return page(
        "pkt demo",
        [
            {"heading": "What happened", "picture": picture},
            {"heading": "Held-out problems", "head": head, "rows": rows, "text": summary["verdict"]},
            {
                "heading": "How it was measured",
                "text": [
                    f"{summary['train_rows']} training problems, {summary['epochs']:g} epochs, batch {summary['batch_size']}, "
                    f"rank {summary['rank']}, all seven projections, embeddings and head; {summary['test_rows']} test problems; "
                    f"{summary['seeds']} training seeds. ± is the standard deviation over them.",
                    f"Each method's learning rate was chosen from {RATES} by half as many epochs, on {HELD_OUT} problems held out "
                    "from training, with a seed that is not reported.",
                ],
            },
        ],
    )
