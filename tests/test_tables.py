"""What a value prints: a table in a terminal, the same in a notebook, a line as an element of something."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
import torch
import zoo

import pkt
from pkt.tables import aligned, fitted


class Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows:
            self.rows[-1][-1] += data


def cells(html: str) -> list[list[str]]:
    parser = Cells()
    parser.feed(html.partition("</table>")[0])
    return parser.rows


def test_columns_are_of_one_width() -> None:
    assert aligned([("a", "bb"), ("ccc", "d")]) == ["a    bb", "ccc  d"]
    assert aligned([]) == []


def test_what_the_path_returns_prints_as_small_tables() -> None:
    torch.manual_seed(0)
    teacher, student = zoo.llama(hidden=32, layers=3), zoo.llama(hidden=16, layers=2)
    ids = torch.randint(0, 50, (2, 6))
    sens = pkt.sensitivity(teacher, [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}])
    plan = pkt.plan(sens, teacher, student)
    ext = pkt.extract(teacher, plan, rank=2)
    lineage = pkt.lineage(teacher, student)
    for value in (sens, plan, ext, lineage):
        assert "\n" not in repr(value)
        assert repr(value).startswith(type(value).__name__ + "(")
        table = value.table()
        assert cells(value._repr_html_()) == [list(row) for row in table[:25]]
        printed = str(value).splitlines()
        assert [line.split()[0] for line in printed[: len(table)]] == [row[0].split()[0] for row in table]
        assert printed[len(table) :] == value.summary()
    assert abs(sum(float(row[2][:-1]) for row in sens.table()[1:]) - 100) < 0.05 * len(sens.table())
    (q,) = [row for row in ext.table() if row[0] == "q_proj"]
    assert q[1:3] == ("2", "2")


def test_a_long_table_is_cut_in_a_notebook_and_says_so() -> None:
    torch.manual_seed(0)
    teacher, student = zoo.llama(hidden=32, layers=4), zoo.llama(hidden=16, layers=4)
    ids = torch.randint(0, 50, (1, 6))
    sens = pkt.sensitivity(teacher, [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}])
    plan = pkt.plan(sens, teacher, student)
    rows = len(plan.table()) - 1
    assert rows > 24
    assert f"... and {rows - 24} rows more; print() shows all" in plan._repr_html_()


def test_a_table_on_a_console_cuts_nothing_off_and_reads_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    rows = [["a start [old]", "0.110 ± 0.016", "61% ± 4"], ["[/red]", "0.2", ""]]
    Console(width=30).print(fitted(["", "NLL before training", "right"], rows))
    shown = capsys.readouterr().out
    assert "a start [old]" in shown
    assert "[/red]" in shown
    assert "…" not in shown
    assert "".join(shown.split()).count("0.016") == 1
