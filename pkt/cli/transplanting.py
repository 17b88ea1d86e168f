"""For a student that descends from its teacher's base: see that it does, and move what the teacher learnt."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from pkt.cli.application import app, err_console, next_line, out_console, print_json, resumable, say
from pkt.cli.flags import Force, JsonFlag, OutDir, SeedFile, Student, Teacher


@app.command(rich_help_panel="The main path")
def lineage(
    teacher: Teacher,
    student: Student,
    out: Annotated[
        Path | None, typer.Option("--out", help="JSON file for the match of every unit.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the samples and of what chance gives.")] = 0,
    force: Force = False,
    json_: JsonFlag = False,
) -> None:
    """Say whether the student descends from the teacher, by their weights alone, and which of its units are whose."""
    import pkt
    from pkt.files import check_output_file

    if out is not None:
        check_output_file(out, "pkt-lineage", force=force)
    found = pkt.lineage(teacher, student, seed=seed, progress=not json_)
    if out is not None:
        found.save(out)
    if json_:
        print_json({"verdict": found.verdict, "reason": found.reason, "evidence": [e.__dict__ for e in found.evidence]})
        return
    say(str(found))
    both = f"{shlex.quote(teacher)} {shlex.quote(student)}"
    if found.kin:
        next_line(f"pkt transplant {both} SEEDS.jsonl --base BASE --out DIR   (BASE: what the teacher was tuned from)")
    else:
        say("what a teacher learnt moves to students that descend from its base; for strangers train a plain LoRA")
        next_line(f"pkt transfer {both} SEEDS.jsonl --out DIR   (the paper's start, for those who study it)")


@app.command(rich_help_panel="The main path")
def transplant(
    teacher: Teacher,
    student: Student,
    seeds: SeedFile,
    out: OutDir,
    base: Annotated[
        str | None,
        typer.Option(
            "--base", help="What the teacher was tuned from: only what it learnt since is moved.", show_default=False
        ),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
            "--adapter", help="A LoRA of TEACHER, which is then the base: it is cut exactly.", show_default=False
        ),
    ] = None,
    rank: Annotated[int, typer.Option("--rank", help="Rank of every LoRA pair.")] = 32,
    lineage_file: Annotated[
        Path | None, typer.Option("--lineage", help="A file of pkt lineage for this pair.", show_default=False)
    ] = None,
    control: Annotated[
        str | None,
        typer.Option(
            "--control",
            help="What to hold the transplant against: wrong-units, noise, neutral or repruned.",
            show_default=False,
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            "--alpha",
            help="How much is kept; else the best of 0, ¼, ½, ¾, 1, 1½ by the seeds, and of 2, 3, 4 while the loss falls.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of everything random.")] = 0,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Go on without lineage, or where every scale harms.")
    ] = False,
    force: Force = False,
    json_: JsonFlag = False,
) -> None:
    """Put what the teacher learnt into a student that descends from its base: a LoRA that is kept, before any training.

    The seeds only choose how much of it is kept. The same command continues an interrupted run.
    """
    import pkt
    from pkt.transferring import run_path

    with resumable(run_path(out).is_dir, force=force):
        start = pkt.transplant(
            teacher, student, seeds, base=base, adapter=adapter, out=out, rank=rank, lineage=lineage_file, seed=seed,
            control=cast(Any, control), alpha=alpha, anyway=anyway, force=force, progress=not json_,
        )  # fmt: skip
    if json_:
        names = ("alpha", "own_alpha", "losses", "control", "transplant")
        print_json({"out": str(out), **{n: start.provenance[n] for n in names if n in start.provenance}})
        return
    _tell(start, out, student)


def _tell(start: Any, out: Path, student: str) -> None:
    found = start.provenance
    if found["content"] == "difference":
        card = f" (its card names {found['named']})" if found["named"] else ""
        err_console.print(
            "no base was given, so the whole difference to the teacher was moved, which undoes what the student learnt since it "
            f"was cut; --base moves what the teacher learnt alone{card}",
            highlight=False,
        )
    for name, value in found["told"].items():
        out_console.print(f"{name}: {value}", highlight=False, markup=False, soft_wrap=True)
    lost = {n: size for n, size in found["left_out"].items() if size}
    if lost:
        say(f"not in a LoRA: the change of {len(lost)} norms and biases, such as {next(iter(lost))}")
    say(f"{out}: {start}")
    next_line(f"pkt train {shlex.quote(student)} {shlex.quote(str(out))} DATA.jsonl --out RUN, or serve it as it is")
