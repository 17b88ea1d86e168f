"""What there is to look at: folders, models, this machine; and the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pkt.cli.application import app, out_console, print_json, say
from pkt.cli.flags import Force, JsonFlag
from pkt.tables import fitted


@app.command(rich_help_panel="Look")
def inspect(
    folder: Annotated[Path, typer.Argument(help="Any folder pkt wrote, or a LoRA folder.", show_default=False)],
    student: Annotated[str | None, typer.Option("--student", help="Also check that it fits this model.")] = None,
    json_: JsonFlag = False,
) -> None:
    """Say what a folder is, where it came from, and what to do next."""
    from pkt.reporting import inspect_folder

    found = inspect_folder(folder, student)
    if json_:
        print_json(found)
        return
    for key, value in found.items():
        out_console.print(f"[bold]{key}[/bold]:", end=" ")
        say(str(value))


@app.command(rich_help_panel="Look")
def report(
    folder: Annotated[
        Path, typer.Argument(help="Any folder pkt wrote, a LoRA folder, or a file of scores.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="HTML file; default: report.html in the folder, or beside the file.")
    ] = None,
    json_: JsonFlag = False,
) -> None:
    """Write a page: where S lies, regions and what they catch; lineage, the loss at each α; how a training went; ..."""
    from pkt.reporting import write_report

    path = str(write_report(folder, out))
    if json_:
        print_json({"out": path})
    else:
        say(path)


@app.command(rich_help_panel="Look")
def models(
    model: Annotated[str | None, typer.Argument(help="A model: show what pkt finds in it.", show_default=False)] = None,
    json_: JsonFlag = False,
) -> None:
    """Formats and architectures that work here and why not; or each kind of matrix of a model and what it is taken for."""
    if model is not None:
        from pkt.models import described, spec_of

        spec = spec_of(model)
        head, rows = ("matrix", "shape", "role"), [tuple(row) for row in described(spec)]
    else:
        from pkt.support import supported

        head, rows = ("what", "here", "why"), [(name, "yes" if here else "no", why) for name, here, why in supported()]
    if json_:
        print_json([dict(zip(head, row, strict=True)) for row in rows])
        return
    out_console.print(fitted(head, rows))
    if model is not None:
        tied = ", head tied to the embedding" if spec.tied else ""
        say(f"{spec.model_type}: {spec.num_layers} decoder layers at {spec.layers}{tied}")


@app.command(rich_help_panel="Look")
def env(
    tune: Annotated[
        bool, typer.Option("--tune", help="Try the GPU's kernels against each other now; what was found is kept.")
    ] = False,
    json_: JsonFlag = False,
) -> None:
    """Versions, devices, which implementation each op will use and why, and what the GPU's kernels were found to be."""
    from pkt.reporting import environment

    found = environment(tune=tune)
    if json_:
        print_json(found)
        return
    for key, value in found["versions"].items():
        say(f"{key:13} {value}")
    head = ("op", "device", "implementation", "why")
    out_console.print(fitted(head, [[row[name] for name in head] for row in found["ops"]]))
    for row in found["kernels"]:
        share = f"{row['of_standard']} of triton's time, " if row["of_standard"] else ""
        line = "{device}  {kernel:7} {kind:30} {shape:12} ".format(**row) + share + row["said"]
        say(line)
    if tune and not found["kernels"]:
        say("There is nothing to choose: no GPU here has more than one kernel.")


@app.command(rich_help_panel="Start here")
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for what the demo makes.")] = Path("pkt-demo"),
    seeds: Annotated[
        int, typer.Option("--seeds", help="Training seeds per method; the committed figures have 5.", min=2)
    ] = 3,
    force: Force = False,
    json_: JsonFlag = False,
) -> None:
    """A few minutes: who descends from a tiny teacher, what it gives them, and every control beside it. Needs no network."""
    from pkt.demo import run_demo

    if json_:
        print_json(run_demo(out, seeds=seeds, force=force, console=Console(quiet=True)))
    else:
        run_demo(out, seeds=seeds, force=force, console=out_console)
