"""The application without its commands: the global options, and how a command speaks."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from pkt.errors import PktError
from pkt.progress import is_silent, silence
from pkt.version import __version__

if TYPE_CHECKING:
    from pkt.ranks import Ranks

# What several ranks do together, and what one of them does while the others wait.
SHARED, ALONE = ("transfer", "sensitivity", "train"), ("transplant", "start")


class Application(typer.Typer):
    """Every command has --quiet, whatever else it takes."""

    def command(  # type: ignore[override]
        self, *args: Any, **options: Any
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        register = super().command(*args, **options)

        def added(function: Callable[..., Any]) -> Callable[..., Any]:
            own = [
                p.replace(kind=p.KEYWORD_ONLY) for p in inspect.signature(function, eval_str=True).parameters.values()
            ]
            flag = typer.Option("--quiet", help="Results, warnings and errors only.")
            quiet = inspect.Parameter(
                "quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, flag]
            )

            @functools.wraps(function)
            def run(*, quiet: bool, **given: Any) -> Any:
                silence(quiet)
                return function(**given)

            run.__signature__ = inspect.Signature([*own, quiet])  # type: ignore[attr-defined]
            run.__annotations__ = {}
            register(run)
            return function

        return added


app = Application(
    name="pkt",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Move task knowledge from a large language model into a small one through parameters.\n\n"
    "Start with [bold]pkt demo[/bold]; then [bold]pkt lineage TEACHER STUDENT[/bold], which says what to do next: "
    "[bold]pkt transplant[/bold] or a plain LoRA; [bold]pkt train[/bold] and [bold]pkt finalize[/bold].",
)
out_console = Console()
err_console = Console(stderr=True)


@dataclass
class State:
    """Of the one command that runs. stopped: what there is to say when it is; ranks: who does it together."""

    debug: bool = False
    stopped: str = "stopped"
    ranks: Ranks | None = None

    @property
    def first(self) -> bool:
        """Whether this process is the one that speaks."""
        return self.ranks is None or self.ranks.first


state = State()


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pkt {__version__}")
        raise typer.Exit


def launched() -> bool:
    """Whether torchrun, or what sets the same variables, started this process as one of several."""
    named = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    return named and os.environ["WORLD_SIZE"] != "1"


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=show_version)
    ] = False,
) -> None:
    state.debug = debug
    if state.ranks is not None:
        _share(context, state.ranks)


def _share(context: typer.Context, ranks: Ranks) -> None:
    """Let one rank alone do what is not shared out, and refuse what nobody would start several processes for."""
    name = context.invoked_subcommand
    if name in SHARED:
        return
    if name not in ALONE:
        raise PktError(f"pkt {name} is the work of one process: start it without torchrun")
    if not ranks.first:
        ranks.all_of(None)
        raise typer.Exit
    remark(f"pkt {name} is the work of one process: rank 0 does it, and the others wait")

    def end() -> None:
        with contextlib.suppress(PktError):
            ranks.all_of(None)

    context.call_on_close(end)


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


def remark(text: str) -> None:
    """A line beside the result, which is not its part."""
    err_console.print(text, highlight=False, markup=False, soft_wrap=True)


def next_line(command: str) -> None:
    """What to type next; nothing with --quiet."""
    if not is_silent():
        say(f"next: {command}")


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False))
