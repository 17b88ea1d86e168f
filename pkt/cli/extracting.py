"""From a teacher and seeds to an extraction: in one command, or step by step."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from pkt.cli.application import app, next_line, print_json, resumable, say, state
from pkt.cli.flags import Force, JsonFlag, OutDir, Rescore, SeedFile, Student, Teacher, takes
from pkt.errors import PktError
from pkt.options import Execution, Factorization, KeepScores, Limits, PlanOptions, Reading
from pkt.progress import tell


@app.command(rich_help_panel="The main path")
@takes(PlanOptions, Factorization, Reading, Execution, Limits)
def transfer(
    teacher: Teacher,
    student: Student,
    out: OutDir,
    seeds: Annotated[
        Path | None,
        typer.Argument(help='JSONL rows of {"messages"}, {"prompt", "completion"} or {"text"}.', show_default=False),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--seeds", help="NAME=FILE, once for each task: one extraction each, in OUT/NAME.", show_default=False
        ),
    ] = None,
    keep_scores: Annotated[
        KeepScores, typer.Option("--keep-scores", help="Keep the scores in OUT, for pkt plan with other options.")
    ] = "none",
    rescore: Rescore = False,
    force: Force = False,
    json_: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON on stdout, and one line per layer on stderr.")
    ] = False,
    **options: Any,
) -> None:
    """Score the teacher on the seeds, cut out what matters in the student's shape, write it as a LoRA folder.

    The teacher may be larger than the memory: it is read one layer at a time. The same command continues an interrupted run.
    """
    import pkt
    from pkt.files import run_path

    shown: list[Any] = []

    def show(plan: Any) -> None:
        shown.append(plan)
        typer.echo(str(plan))

    if not json_ and state.first:
        _tell_kin(teacher, student, seeds)
    with resumable(run_path(out).is_dir, force=force):
        found = pkt.transfer(
            teacher,
            student,
            _seed_sets(seeds, tasks),
            out=out,
            keep_scores=keep_scores,
            resume=not rescore,
            force=force,
            progress=not json_,
            on_memory=None if json_ else _print_memory,
            on_plan=None if json_ else show,
            on_tick=(lambda tick: typer.echo(json.dumps(dataclasses.asdict(tick)), err=True)) if json_ else None,
            group=state.ranks,
            **options,
        )
    if found is None:  # another rank has it
        return
    several = isinstance(found, dict)
    results = {str(out / name): ext for name, ext in found.items()} if several else {str(out): found}
    if json_:
        rows = [_as_row(folder, ext) for folder, ext in results.items()]
        print_json(rows if several else rows[0])
        return
    for folder, ext in results.items():
        there = "" if shown else "the result of this command is there already: "
        say(f"{folder}: {there}{ext.summary()[0]}")
        next_line(f"pkt train {shlex.quote(student)} {shlex.quote(folder)} DATA.jsonl --out RUN")


def _tell_kin(teacher: str, student: str, seeds: Path | None) -> None:
    """A line where the student looks like the teacher's descendant, so that transplant would do better."""
    from pkt.matching import looks_kin

    try:
        found = looks_kin(teacher, student)
    except PktError:
        return  # the transfer says what is wrong
    if found is not None:
        file = "SEEDS.jsonl" if seeds is None else shlex.quote(str(seeds))
        tell(
            f"the student looks like a descendant of the teacher (its neurons match at {found.cosine:.2f}, by chance "
            f"{found.chance:.2f}); for such pairs transplant does better: pkt transplant {shlex.quote(teacher)} "
            f"{shlex.quote(student)} {file} --base BASE --out DIR"
        )


def _print_memory(memory: Any) -> None:
    tell(*memory.lines())


def _as_row(folder: str, ext: Any) -> dict[str, Any]:
    return {
        "out": folder,
        "pairs": len(ext.pairs),
        "rank": ext.rank,
        "layers": ext.plan.layer_map,
        "energies": ext.energies,
    }


def _seed_sets(seeds: Path | None, tasks: list[str] | None) -> Any:
    """The one file, or the files by task name."""
    if (seeds is None) == (not tasks):
        raise PktError("name the seeds once: SEEDS.jsonl, or --seeds NAME=FILE for each of several tasks")
    if seeds is not None:
        return seeds
    named: dict[str, Path] = {}
    for text in tasks or ():
        name, equals, file = text.partition("=")
        if not equals or not name or not file:
            raise PktError(f"--seeds {text!r}: write NAME=FILE, such as math=math.jsonl")
        if name in named:
            raise PktError(f"--seeds names {name!r} twice; give each task its own name")
        named[name] = Path(file)
    return named


@app.command(rich_help_panel="Step by step")
@takes(Reading, Execution, Limits)
def sensitivity(
    teacher: Teacher,
    seeds: SeedFile,
    out: Annotated[Path, typer.Option("--out", help="File to write (.safetensors).", show_default=False)],
    tile: Annotated[int | None, typer.Option("--tile", help="Keep sums over tile x tile blocks only.")] = None,
    measure: Annotated[
        str, typer.Option("--measure", help="theta_grad (what pkt plan takes), grad, fisher or theta_grad_squared.")
    ] = "theta_grad",
    rescore: Rescore = False,
    json_: JsonFlag = False,
    **options: Any,
) -> None:
    """Score every parameter of the teacher on the seeds and save the scores.

    Teacher and scores may be larger than the memory. The same command continues an interrupted run.
    """
    from pkt.files import run_path
    from pkt.transferring import Listeners, score_checkpoint

    with resumable(run_path(out).is_dir, force=False):
        told = Listeners() if json_ else Listeners(on_memory=_print_memory)
        sens = score_checkpoint(
            teacher,
            seeds,
            out,
            tile=tile,
            measure=measure,
            listeners=told,
            resume=not rescore,
            group=state.ranks,
            **options,
        )
    if sens is None:  # another rank has it
        return
    if json_:
        print_json({"out": str(out), "measure": measure, "parameters": len(sens), "losses": sens.losses})
        return
    say(f"{out}: {sens.summary()[0]}")
    if measure == "theta_grad":
        next_line(f"pkt plan {shlex.quote(str(out))} {shlex.quote(teacher)} STUDENT --out PLAN.json")


@app.command(rich_help_panel="Step by step")
@takes(PlanOptions)
def plan(
    scores: Annotated[Path, typer.Argument(help="Scores written by pkt sensitivity.", show_default=False)],
    teacher: Teacher,
    student: Student,
    out: Annotated[Path | None, typer.Option("--out", help="File to write the plan to (.json).")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a plan that is there.")] = False,
    json_: JsonFlag = False,
    **options: Any,
) -> None:
    """Choose layers and regions from saved scores, and show them."""
    import pkt
    from pkt.files import check_output_file

    if out is not None:
        check_output_file(out, "pkt-plan", force=force)
    made = pkt.plan(pkt.Sensitivity.load(scores), teacher, student, **options)
    if out is not None:
        made.to_json(out)
    typer.echo(made.to_json() if json_ else str(made))
    if out is not None and not json_:
        next_line(f"pkt extract {shlex.quote(teacher)} {shlex.quote(str(out))} --out DIR")


@app.command(rich_help_panel="Step by step")
@takes(Factorization)
def extract(
    teacher: Teacher,
    plan: Annotated[Path, typer.Argument(help="Plan written by pkt plan --out.", show_default=False)],
    out: OutDir,
    student: Annotated[
        str | None,
        typer.Option("--student", help="Check that the plan fits it; default: the plan's own, where it is here."),
    ] = None,
    force: Force = False,
    json_: JsonFlag = False,
    **options: Any,
) -> None:
    """Cut a plan's regions out of the teacher and factorize them into a LoRA folder."""
    import pkt
    from pkt.files import check_output_folder

    check_output_folder(out, force=force)
    made = pkt.TransferPlan.from_json(plan)
    named = str(made.student["name"])
    if student is None and (Path(named) / "config.json").is_file():
        student = named
    ext = pkt.extract(teacher, made, student=student, **options)
    ext.save(out, force=force)
    if json_:
        print_json(_as_row(str(out), ext))
        return
    say(f"{out}: {ext.summary()[0]}")
    next_line(f"pkt train {shlex.quote(ext.plan.student['name'])} {shlex.quote(str(out))} DATA.jsonl --out RUN")


@app.command("import", rich_help_panel="Step by step")
def import_(
    folder: Annotated[
        Path, typer.Argument(help="Folder of the authors' released code (adapter_model.bin).", show_default=False)
    ],
    out: OutDir,
    student: Annotated[
        str | None, typer.Option("--student", help="The model it is for, if its files do not say.")
    ] = None,
    trained_from: Annotated[
        Path | None,
        typer.Option(
            "--trained-from", help="Of a folder that was trained since: what was extracted, or its -delta twin."
        ),
    ] = None,
    force: Force = False,
    json_: JsonFlag = False,
) -> None:
    """Read what the method's authors' released code extracted, as a LoRA folder that pkt trains and finalizes."""
    from pkt.extraction import import_released

    start = import_released(folder, out, student=student, trained_from=trained_from, force=force)
    if json_:
        print_json({"out": str(out), "pairs": len(start.pairs), "rank": start.rank, "student": start.student["name"]})
        return
    say(f"{out}: {start.summary()[0]}")
    name = shlex.quote(str(start.student["name"]))
    next_line(f"pkt train {name} {shlex.quote(str(out))} DATA.jsonl --out RUN")
