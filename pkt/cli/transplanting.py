"""For a student that descends from its teacher's base: see that it does, and move what the teacher learnt."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from pkt.cli.application import app, next_line, print_json, remark, resumable, say
from pkt.cli.flags import Force, JsonFlag, SeedFile, Student, Teacher
from pkt.errors import PktError


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
        shared = None if found.tokens is None else len(found.tokens)
        evidence = [e.__dict__ for e in found.evidence]
        print_json({"verdict": found.verdict, "reason": found.reason, "shared_tokens": shared, "evidence": evidence})
        return
    say(str(found))
    both = f"{shlex.quote(teacher)} {shlex.quote(student)}"
    if found.kin:
        next_line(f"pkt transplant {both} SEEDS.jsonl --base BASE --out DIR   (BASE: what the teacher was tuned from)")
    else:
        say(
            "what a teacher learnt moves to students that descend from its base; for strangers train a plain LoRA "
            f"(or, to study the paper's start: pkt transfer {both} SEEDS.jsonl --out DIR)"
        )
        next_line(f"pkt train {shlex.quote(student)} DATA.jsonl --out RUN")


@app.command(rich_help_panel="The main path")
def transplant(
    teacher: Teacher,
    student: Student,
    seeds: SeedFile,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for the LoRA; it must not exist yet.", show_default=False),
    ] = None,
    merge: Annotated[
        Path | None,
        typer.Option(
            "--merge", help="Folder for the whole student with all of it added, norms too.", show_default=False
        ),
    ] = None,
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
    rank: Annotated[
        str, typer.Option("--rank", metavar="NUMBER|full", help="Rank of every LoRA pair; full: no truncation.")
    ] = "32",
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
    """Put what the teacher learnt into a student that descends from its base: a LoRA that is kept, or the whole student.

    The seeds only choose how much of it is kept. The same command continues an interrupted run.
    """
    import pkt
    from pkt.files import run_path

    folder = out or merge
    if folder is None:
        raise PktError("name what to write: --out DIR for a LoRA, --merge DIR for the whole student, or both")
    with resumable(run_path(folder).is_dir, force=force):
        start = pkt.transplant(
            teacher, student, seeds, base=base, adapter=adapter, out=out, merge=merge, rank=_rank(rank),
            lineage=lineage_file, seed=seed, control=cast(Any, control), alpha=alpha, anyway=anyway, force=force,
            progress=not json_,
        )  # fmt: skip
    if json_:
        names = ("alpha", "own_alpha", "losses", "control", "transplant")
        wrote = {"out": out and str(out), "merged": merge and str(merge)}
        print_json({**wrote, **{n: start.provenance[n] for n in names if n in start.provenance}})
        return
    _tell(start, out, merge, student)


def _rank(text: str) -> Any:
    if text != "full" and not text.isdigit():
        raise PktError(f"--rank {text!r}: give a whole number of at least 1, or full")
    return text if text == "full" else int(text)


def _tell(start: Any, out: Path | None, merge: Path | None, student: str) -> None:
    found = start.provenance
    if found["content"] == "difference":
        card = f" (its card names {found['named']})" if found["named"] else ""
        remark(
            "no base was given, so the whole difference to the teacher was moved, which undoes what the student learnt since it "
            f"was cut; --base moves what the teacher learnt alone{card}"
        )
    for name, value in found["told"].items():
        say(f"{name}: {value}")
    lost = {n: size for n, size in found["left_out"].items() if size}
    if lost:
        where = f"in {merge} alone" if merge else "not in a LoRA"
        say(f"{where}: the change of {len(lost)} norms, biases and the like, such as {next(iter(lost))}")
    if merge:
        say(f"{merge}: the whole student with the change added; any trainer goes on from it")
    if out is None:
        next_line(f"pkt evaluate {shlex.quote(str(merge))} TEST.jsonl, or train it as it is")
        return
    say(f"{out}: {start.summary()[0]}")
    next_line(f"pkt train {shlex.quote(student)} {shlex.quote(str(out))} DATA.jsonl --out RUN, or serve it as it is")
