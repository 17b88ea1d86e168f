"""A student out of a teacher's own units, to which every later fine-tune of the teacher can be moved."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from pkt.cli.application import app, next_line, print_json, say
from pkt.cli.flags import Force, JsonFlag, OutDir, Teacher, takes
from pkt.options import Execution, Limits, Reading, Score
from pkt.progress import tell


@app.command(rich_help_panel="The main path")
@takes(Reading, Execution, Limits)
def shrink(
    teacher: Teacher,
    out: OutDir,
    seeds: Annotated[
        Path | None,
        typer.Argument(help="JSONL rows of general text, for sensitivity and activation.", show_default=False),
    ] = None,
    like: Annotated[
        str | None,
        typer.Option("--like", help="A model of the family, or its config.json: its shape.", show_default=False),
    ] = None,
    params: Annotated[
        str | None,
        typer.Option("--params", help="About so many parameters, such as 60M, in the teacher's proportions."),
    ] = None,
    score: Annotated[
        Score,
        typer.Option(
            "--score",
            help="By what units are chosen: S on the seeds; |W| × its input (Wanda; the teacher whole in memory); |W|; chance.",
        ),
    ] = "sensitivity",
    seed: Annotated[int, typer.Option("--seed", help="Seed of --score random.")] = 0,
    force: Force = False,
    json_: JsonFlag = False,
    **options: Any,
) -> None:
    """Cut a smaller model out of the teacher's own units: its layers, hidden units, neurons and heads that matter most.

    It is to be healed by training on general text; then `pkt transplant` moves to it whatever the teacher is tuned to.
    """
    import pkt

    def show(memory: Any) -> None:
        tell(*memory.lines())

    made = pkt.shrink(
        teacher, seeds, like=like, params=params, out=out, score=score, seed=seed, force=force, progress=not json_,
        on_memory=None if json_ else show, **options,
    )  # fmt: skip
    if json_:
        print_json(
            {
                "out": str(out),
                "parameters": made.parameters,
                "shape": made.shape.__dict__,
                "layers": made.lineage.layers,
            }
        )
        return
    say(f"{out}: {made}")
    say(
        "it is to be healed on general text before it is used; then pkt transplant moves to it what its teacher is tuned to"
    )
    next_line(f"pkt train {shlex.quote(str(out))} TEXT.jsonl --full --out HEALED")
