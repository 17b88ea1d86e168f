"""What a teacher says, for a student to learn from."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from pkt.cli.application import app, next_line, print_json, resumable, say
from pkt.cli.flags import Force, JsonFlag, Teacher, takes
from pkt.errors import PktError
from pkt.options import Execution, Memory, RowTemplate, TrainingLoss
from pkt.progress import tell


@app.command(rich_help_panel="The main path")
@takes(Execution, Memory)
def teach(
    teacher: Teacher,
    data: Annotated[Path, typer.Argument(help="The rows that the student will be trained on.", show_default=False)],
    out: Annotated[
        Path,
        typer.Option("--out", help="Folder to write; with --generate, a JSONL file.", show_default=False),
    ],
    draws: Annotated[
        int | None, typer.Option("--draws", help="Draws of each distribution; default 64.", show_default=False)
    ] = None,
    top: Annotated[
        int | None,
        typer.Option("--top", help="Instead: so many likeliest tokens, and the rest's mass.", show_default=False),
    ] = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="Instead: the teacher's own answers to the rows' prompts, as rows.")
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help="With --generate: default 512.", show_default=False)
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            help="Read the rows as this model's (the student's) chat template has them; default: the teacher's.",
            show_default=False,
        ),
    ] = None,
    loss: Annotated[
        TrainingLoss, typer.Option("--loss", help="Tokens that count: the answers, the last one, or all.")
    ] = "answer",
    template: Annotated[
        RowTemplate, typer.Option("--template", help="chat: the tokenizer's own; paper: as its authors train.")
    ] = "chat",
    max_length: Annotated[int, typer.Option("--max-length", help="Longest row in tokens; the rest is cut off.")] = 2048,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the draws.")] = 0,
    force: Force = False,
    json_: JsonFlag = False,
    **options: Any,
) -> None:
    """Write what the teacher would say at every answer token, for pkt train --teacher-targets.

    The teacher may be larger than the memory: it is read one layer at a time. The same command continues an interrupted run.
    """
    import pkt
    from pkt.files import run_path

    if generate:
        if draws is not None or top is not None:
            raise PktError("--generate writes answers, not distributions; leave --draws and --top out")
        _generate(teacher, data, out, tokenizer, max_new_tokens or 512, max_length, force, json_, options)
        return
    if max_new_tokens is not None:
        raise PktError("--max-new-tokens concerns answers; give --generate too")
    with resumable(run_path(out).is_dir, force=force):
        found = pkt.teach(
            teacher, data, out=out, draws=draws, top=top, seed=seed, tokenizer=tokenizer, loss=loss, template=template,
            max_length=max_length, force=force, progress=not json_,
            on_memory=None if json_ else lambda memory: tell(*memory.lines()),
            **options,
        )  # fmt: skip
    if json_:
        told = {"rows": len(found), "tokens": found.tokens, "nll": found.told["nll"]}
        print_json({"out": str(out), "form": found.form, "size": found.size, **told, "bytes": found.bytes_a_token})
        return
    say(f"{out}: {found}; the teacher's own NLL on these answers is {found.told['nll']:.4f} nats per token")
    next_line(
        f"pkt train STUDENT {shlex.quote(str(data))} --teacher-targets {shlex.quote(str(out))} --mix 0.5 --out RUN"
    )


def _generate(
    teacher: str,
    data: Path,
    out: Path,
    tokenizer: str | None,
    max_new_tokens: int,
    max_length: int,
    force: bool,
    json_: bool,
    options: dict[str, Any],
) -> None:
    from pkt.teaching import answer_rows

    if tokenizer is not None:
        raise PktError("--tokenizer concerns distributions; the teacher answers in its own tokens, and text is written")
    for name in ("device_memory", "host_memory"):
        if options.pop(name) is not None:
            raise PktError(f"--{name.replace('_', '-')}: to answer, the teacher is held in memory whole; leave it out")
    answer_rows(
        teacher,
        data,
        out,
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        force=force,
        progress=not json_,
        **options,
    )
    if json_:
        print_json({"out": str(out)})
        return
    say(f"{out}: the rows of {data} with the teacher's own answers")
    next_line(f"pkt train STUDENT {shlex.quote(str(out))} --out RUN")
