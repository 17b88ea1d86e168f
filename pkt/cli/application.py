"""The application without its commands: the global options, and how a command speaks."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console

from pkt.version import __version__

app = typer.Typer(
    name="pkt",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Move task knowledge from a large language model into a small one through parameters.\n\n"
    "Start with [bold]pkt demo[/bold]; then [bold]pkt transfer TEACHER STUDENT SEEDS.jsonl --out DIR[/bold], "
    "[bold]pkt train[/bold] and [bold]pkt finalize[/bold].",
)
out_console = Console()
err_console = Console(stderr=True)


@dataclass
class State:
    """Of the one command that runs. stopped: what there is to say when it is."""

    debug: bool = False
    stopped: str = "stopped"


state = State()


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pkt {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=show_version)
    ] = False,
) -> None:
    state.debug = debug


@contextlib.contextmanager
def resumable(is_saved: Callable[[], bool], *, force: bool) -> Iterator[None]:
    """Inside, whoever stops the command is told whether the same command continues."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        again = "stopped; the same command continues" + (", without --force" if force else "")
        state.stopped = again if is_saved() else "stopped before anything was saved"
        raise


def say(text: str) -> None:
    """A line of the result, as it is whatever its length, so that it can be copied."""
    out_console.print(text, highlight=False, markup=False, soft_wrap=True)


def next_line(command: str) -> None:
    """What to type next."""
    say(f"next: {command}")


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False))
