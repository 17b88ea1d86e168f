"""Tables of text: aligned in a terminal, HTML in a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

_SHOWN = 24  # rows of a notebook's table; print() shows all


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line for each row, columns of one width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def fitted(head: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> Any:
    """A table for a rich console: as wide as that, nothing cut off, names whole, and no markup in what it holds."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", title=title)
    for number, name in enumerate(head):
        table.add_column(Text(name), overflow="fold", no_wrap=number == 0)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def by_last_name(names: Iterable[str]) -> dict[str, list[str]]:
    """Modules (or their weights) of one last name, which is what tells kinds of matrices apart in every architecture."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.removesuffix(".weight").rpartition(".")[2], []).append(name)
    return found


class Tabular:
    """A value that prints as a table with lines under it, and that a notebook shows as one."""

    def table(self) -> list[tuple[str, ...]]:
        """The head and the rows; empty where there is nothing to tell."""
        raise NotImplementedError

    def summary(self) -> list[str]:
        """What is said under the table."""
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n".join([*aligned(self.table()), *self.summary()])

    def _repr_html_(self) -> str:
        head, *rows = self.table() or [()]
        more = [f"... and {len(rows) - _SHOWN} rows more; print() shows all"] if len(rows) > _SHOWN else []
        cells = ["".join(f"<th>{escape(c)}</th>" for c in head)]
        cells += ["".join(f"<td>{escape(c)}</td>" for c in row) for row in rows[:_SHOWN]]
        table = "".join(f"<tr>{row}</tr>" for row in cells)
        return f"<table>{table}</table>" + "".join(f"<div>{escape(line)}</div>" for line in [*more, *self.summary()])
