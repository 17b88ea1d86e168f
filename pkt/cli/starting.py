"""For a student without a teacher it descends from: a start of its own."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from pkt.cli.application import app, next_line, print_json, say
from pkt.cli.flags import Force, JsonFlag, OutDir, Student
from pkt.options import How


@app.command(rich_help_panel="The main path")
def start(
    student: Student,
    out: OutDir,
    seeds: Annotated[
        Path | None,
        typer.Argument(help="JSONL rows of the task, for lora-ga, eva and spectral.", show_default=False),
    ] = None,
    how: Annotated[
        How,
        typer.Option(
            "--how",
            help="lora: random A, B = 0; pissa: the weights' leading directions; lora-ga: the gradient's; eva: the inputs'; "
            "spectral: one step in the gradient's, kept.",
        ),
    ] = "lora",
    rank: Annotated[int, typer.Option("--rank", help="Rank of every LoRA pair.")] = 32,
    a_scale: Annotated[
        float, typer.Option("--a-scale", help="A's size against PEFT's; 1, 3 and 8 belong to every tuning.")
    ] = 3.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of everything random.")] = 0,
    force: Force = False,
    json_: JsonFlag = False,
) -> None:
    """Make a start of the student's own for its LoRA: what every start from a teacher is compared with."""
    import pkt

    made = pkt.start(
        student, seeds, how=how, out=out, rank=rank, a_scale=a_scale, seed=seed, force=force, progress=not json_
    )
    if json_:
        print_json({"out": str(out), "how": how, "pairs": len(made.pairs), "mode": made.mode})
        return
    for name, value in made.provenance["told"].items():
        say(f"{name}: {value}")
    say(f"{out}: {made.summary()[0]}")
    next_line(f"pkt train {shlex.quote(student)} {shlex.quote(str(out))} DATA.jsonl --out RUN")
