"""Comparisons that can be believed: a study from a YAML file or a preset."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pkt.cli.application import app, err_console, next_line, out_console, print_json, resumable, say
from pkt.cli.flags import JsonFlag, Student
from pkt.progress import is_silent, tell
from pkt.tables import fitted


def _place(help_: str) -> Any:
    return typer.Option(help=help_, show_default=False, rich_help_panel="What a preset is filled with")


@app.command(rich_help_panel="Compare")
def study(
    named: Annotated[
        str, typer.Argument(metavar="FILE|PRESET", help="A YAML file, or demo, quick, paper or paper-teachers.")
    ] = "demo",
    out: Annotated[Path, typer.Option("--out", help="Folder of the study; what it holds is not made again.")] = Path(
        "pkt-study"
    ),
    plan: Annotated[bool, typer.Option("--plan", help="Say what will be made, and make nothing.")] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Make only what this names: a task, a start or task/start, with * and ?; again for more."),
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="Write the results of what is there.")] = False,
    engine: Annotated[
        Literal["auto", "serial", "ray"], typer.Option(help="serial: one job after another; ray: many at once.")
    ] = "auto",
    address: Annotated[
        str | None, typer.Option(help="A Ray cluster's; default: this machine.", show_default=False)
    ] = None,
    cpus: Annotated[int, typer.Option(help="CPUs of a job, with ray.", min=1)] = 1,
    gpus: Annotated[float, typer.Option(help="GPUs of a job, with ray; a share, too.", min=0)] = 0.0,
    student: Annotated[str | None, _place("The student.")] = None,
    teacher: Annotated[str | None, _place("The teacher.")] = None,
    base: Annotated[str | None, _place("What the teacher was tuned from.")] = None,
    seeds: Annotated[Path | None, _place("Rows that starts are made of.")] = None,
    train: Annotated[Path | None, _place("Rows to learn from; the last are held out to choose rates.")] = None,
    test: Annotated[Path | None, _place("Rows that decide.")] = None,
    general: Annotated[Path | None, _place("General text, to see what is forgotten.")] = None,
    data: Annotated[Path | None, _place("Folder of the paper's data; docs/data.md says what is in it.")] = None,
    json_: JsonFlag = False,
) -> None:
    """Compare starts on your models and rows: tuned alike, over several seeds, with intervals and a verdict in words."""
    from pkt.studying import Cluster, Layout, open_study

    paths = {"seeds": seeds, "train": train, "test": test, "general": general, "data": data}
    given = {"student": student, "teacher": teacher, "base": base}
    given |= {name: None if file is None else str(file.absolute()) for name, file in paths.items()}
    layout = Layout(open_study(named, given, planned=plan), only or ())
    if plan:
        _show_plan(layout, out, json_)
        return
    found = _run(layout, out, engine=engine, cluster=Cluster(address, cpus, gpus), only_report=report, shown=not json_)
    if json_:
        print_json(found)
    else:
        _show(found)
        say(f"{out}: report.html, stats.json, results.csv, rows.csv.gz, figures, tables")
    _end(found)


def _run(layout: Any, out: Path, *, shown: bool, **options: Any) -> dict[str, Any]:
    """shown: a line for each job that ended, with how many there are and about how long they will take."""
    from pkt.studying import Pace, Store, run_layout

    begin, pace = time.perf_counter(), None
    if shown and not options.get("only_report") and not is_silent():
        layout.check()
        pace = Pace(layout, Store(out))
        tell(pace.ahead())

    def show(job: Any, error: str | None) -> None:
        if pace is not None:
            failed = "" if error is None else f": failed: {error}"
            tell(f"{time.perf_counter() - begin:6.0f} s  {pace.told(job)}: {job}{failed}")

    with resumable(lambda: (out / "cells").is_dir(), force=False):
        return run_layout(layout, out, told=show, **options)


def _end(found: dict[str, Any]) -> None:
    """Exit code 1, and the first of what failed, where something did."""
    if found["failures"]:
        first = found["failures"][0]
        err_console.print(
            f"{len(found['failures'])} jobs failed, first: {first['cell']}: {first['error']}",
            style="red", highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
        raise typer.Exit(1)


@app.command(rich_help_panel="Compare")
def compare(
    student: Student,
    extraction: Annotated[
        Path, typer.Argument(help="Folder of pkt transfer, transplant or start.", show_default=False)
    ],
    train: Annotated[
        Path, typer.Argument(help="Rows to learn from; some are held out to choose rates.", show_default=False)
    ],
    test: Annotated[Path, typer.Argument(help="Rows that decide.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Folder of the study; what it holds is not made again.")] = Path(
        "pkt-compare"
    ),
    general: Annotated[
        Path | None, typer.Option(help="General text, to see what is forgotten.", show_default=False)
    ] = None,
    seeds: Annotated[int, typer.Option(help="Trainings of each start; no verdict below 3.", min=1)] = 5,
    epochs: Annotated[float, typer.Option(help="Times that every row is learnt from.", min=0.01)] = 3.0,
    batch_size: Annotated[int, typer.Option(help="Rows per step.", min=1)] = 32,
    exact_match: Annotated[
        bool, typer.Option("--exact-match", help="Decide by final answers, not by the loss.")
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say what will be made, and make nothing.")] = False,
    json_: JsonFlag = False,
) -> None:
    """Ask of a start that you have whether it pays: against plain LoRA, PiSSA and its own controls, tuned alike."""
    from pkt.studying import Layout, as_study, as_yaml, comparison, recommended

    content, left_out = comparison(
        student, extraction, train, test,
        general=general, seeds=seeds, epochs=epochs, batch_size=batch_size, exact_match=exact_match,
    )  # fmt: skip
    layout = Layout(as_study(content))
    for line in left_out:
        tell(line)
    if plan:
        _show_plan(layout, out, json_)
        return
    found = _run(layout, out, shown=not json_)
    (out / "compare.yaml").write_text(as_yaml(content), encoding="utf-8")
    sentence, command = recommended(found, content)
    if json_:
        print_json({**found, "left_out": left_out, "sentence": sentence, "recommended": command})
    else:
        _show(found)
        say(f"{out}: report.html, stats.json, compare.yaml, which pkt study takes")
        say(sentence)
        next_line(command)
    _end(found)


@app.command(rich_help_panel="Compare")
def rows(
    source: Annotated[Literal["gsm8k", "mmlu", "super_ni"], typer.Argument(help="Which data set it is.")],
    data: Annotated[Path, typer.Argument(help="Its JSONL file.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="JSONL file to write.", show_default=False)],
    shots: Annotated[int, typer.Option(help="Examples before each question.", min=0)] = 0,
    examples: Annotated[Path | None, typer.Option(help="Where they are taken from.", show_default=False)] = None,
    json_: JsonFlag = False,
) -> None:
    """Turn a published data set into rows, with the prompts of the paper's evaluation."""
    from pkt.files import check_output_file
    from pkt.studying import convert

    # Rows bear no mark of pkt's, so a file that is there is never replaced.
    check_output_file(out, "pkt-rows")
    count = convert(source, data, out, shots=shots, examples=examples)
    if json_:
        print_json({"out": str(out), "rows": count})
    else:
        say(f"{out}: {count} rows")


def _show_plan(layout: Any, out: Path, json_: bool) -> None:
    from pkt.studying import plan_of, spoken

    found = plan_of(layout, out)
    if json_:
        print_json(found)
        return
    words = {"start": "starts", "tune": "tunings", "train": "trainings", "test": "tests"}
    cells = ", ".join(f"{count} {words[kind]}" for kind, count in found["cells"].items())
    say(f"{found['study']}: {cells}, if no grid grows; {sum(found['there'].values())} of them are there")
    for reading in found["readings"]:
        say(f"one reading of {reading['teacher']} makes {reading['starts']} start{'s' * (reading['starts'] != 1)}")
    if any(found["seconds"].values()):
        each = ", ".join(f"{words[kind]} {spoken(seconds)}" for kind, seconds in found["seconds"].items())
        say(f"about {spoken(sum(found['seconds'].values()))} one after another: {each}")
        machine = found["machine"]
        by = ", ".join(
            f"{words[kind]} that are there: × {value:.2g}" for kind, value in machine["corrected_by"].items()
        )
        rate = f"{machine['operations_a_second'] / 1e9:,.0f} billion operations a second ({machine['name']})"
        say(f"counted by operations, at {rate}{f'; corrected by the {by}' if by else ''}")
        if found["h100_seconds"] > 3600:
            say(f"on an H100 about {found['h100_seconds'] / 3600:,.0f} hours, by what its maker says of it")
        say(f"{found['disk_bytes'] / 1e6:,.0f} MB on disk")
    for name, what in found["assumed"].items():
        say(f"assumed, since it is not here: {name}: {what}")
    now = Counter(found["next"]).most_common()
    for line, count in now[:10]:
        say(f"  {line}" + (f", {count} draws" if count > 1 else ""))
    if len(now) > 10:
        say(f"  and {sum(count for _, count in now[10:])} more can begin now")
    if found["missing"]:
        say(f"{len(found['missing'])} models and files are to be given or fetched first")
    else:
        next_line("the same command without --plan")


def _show(found: dict[str, Any]) -> None:
    from pkt.studying import summing

    for task, value in found["tasks"].items():
        decides = value["decides"]
        metric = summing.split(decides)[1]
        head = (task, "lr, A ×", decides, "general", f"{found['of']} minus it")
        rows = []
        for name, start in value["starts"].items():
            c = summing.comparison(found, "deciding", task, name)
            measured = [
                f"{summing.text(kind, summing.before(start, figure))} → {summing.mean_text(found, start, figure, spread=False)}"
                for figure, kind in ((decides, metric), ("general.nll", "nll"))
            ]
            against = "" if c is None else f"{c['word']} {summing.interval_text(c)}"
            rows.append((name, summing.setting_text(start), *(text.strip(" →") for text in measured), against))
        out_console.print(fitted(head, rows))
    if not any(
        "general" in start.get("before", {}) for value in found["tasks"].values() for start in value["starts"].values()
    ):
        say("no general text was measured, so what was forgotten is not known (general: in the study, or --general)")
    say(found["verdict"])
