"""The command line: a thin skin over pkt's functions. Results go to stdout, progress and errors to stderr."""

from __future__ import annotations

import enum
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pkt.errors import PktError
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
_debug = False
_command = ""  # the one that runs


class KeepScores(str, enum.Enum):
    none = "none"
    tiles = "tiles"
    full = "full"


class Layers(str, enum.Enum):
    sensitivity = "sensitivity"
    first = "first"
    last = "last"
    random = "random"


class Select(str, enum.Enum):
    window = "window"
    rows_cols = "rows_cols"
    weights = "weights"
    blocks = "blocks"
    random = "random"


class Split(str, enum.Enum):
    b = "b"
    sqrt = "sqrt"


class Mode(str, enum.Enum):
    paired = "paired"
    residual = "residual"
    add = "add"


class Loss(str, enum.Enum):
    answer = "answer"
    all = "all"


Teacher = Annotated[
    str, typer.Argument(help="Teacher: a checkpoint directory or a model on the Hub.", show_default=False)
]
Student = Annotated[
    str, typer.Argument(help="Student: a checkpoint directory or a model on the Hub.", show_default=False)
]
SeedFile = Annotated[
    Path,
    typer.Argument(help='JSONL rows of {"messages"}, {"prompt", "completion"} or {"text"}.', show_default=False),
]
OutDir = Annotated[Path, typer.Option("--out", help="Folder to write; it must not exist yet.", show_default=False)]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a folder that pkt wrote.")]
LayersOption = Annotated[
    str,
    typer.Option("--layers", help="sensitivity, first, last, random, or teacher layers such as 0,1,4,7."),
]
SelectOption = Annotated[
    Select,
    typer.Option(
        "--select",
        help="The part of each matrix with the most sensitivity: a contiguous window, rows and columns, the best "
        "single weights in their order, blocks; or a random window.",
    ),
]
ModulesOption = Annotated[
    str,
    typer.Option(
        "--modules",
        help="all, attention, ffn, embedding, or roles (q, k, v, o, gate, up, down): a list such as all,-k,-v; or a regular "
        "expression on module names.",
    ),
]
MapOption = Annotated[
    list[str] | None,
    typer.Option(
        "--map",
        help="TEACHER=STUDENT, such as 'a.*.fc1=b.*.mlp.up': only these pairs. Once for each.",
        show_default=False,
    ),
]
PartialOption = Annotated[
    bool, typer.Option("--partial", help="Where the teacher is smaller, feed what fits and leave zeros.")
]
VocabularyOption = Annotated[
    bool, typer.Option("--map-vocabulary", help="Feed embeddings and head by the tokens both tokenizers have.")
]
RolesOption = Annotated[
    Path | None,
    typer.Option("--roles", help='JSON file of names pkt does not know: {"fc_up": ["up", "ffn"]}.', show_default=False),
]
AlignOption = Annotated[bool, typer.Option("--align-heads", help="Windows of q, k, v and o never cut a head.")]
RankOption = Annotated[int, typer.Option("--rank", help="Rank of every LoRA pair.")]
EnergyOption = Annotated[
    float | None,
    typer.Option("--energy", help="Instead of --rank: catch this share of each region's energy, up to --max-rank."),
]
MaxRankOption = Annotated[int, typer.Option("--max-rank", help="Largest rank with --energy.")]
SplitOption = Annotated[
    Split, typer.Option("--split", help="b: the singular values go into B; sqrt: half on each side.")
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
LossOption = Annotated[Loss, typer.Option("--loss", help="Tokens that count: the answers, or all.")]
LengthOption = Annotated[int, typer.Option("--max-length", help="Longest row in tokens; the rest is cut off.")]
BatchOption = Annotated[
    int, typer.Option("--batch-size", help="Seeds scored at once; the result does not depend on it.")
]
DropoutOption = Annotated[
    float | None,
    typer.Option(
        "--dropout",
        help="LoRA dropout; default: 0.05, or 0 where experts are adapted, since PEFT has no dropout for them.",
        show_default=False,
    ),
]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu, cuda, ...; default: a GPU when there is one.")]
DtypeOption = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; default: the checkpoint's.")
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pkt {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    global _debug, _command
    _debug, _command = debug, context.invoked_subcommand or ""


def _layers(text: str) -> str | list[int]:
    if text in Layers.__members__:
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise PktError(
            f"--layers {text!r}: give {', '.join(Layers.__members__)}, or numbers such as 0,1,4,7"
        ) from error


def _dtype(text: str | None) -> Any:
    import torch

    if text is None:
        return None
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if text not in known:
        raise PktError(f"--dtype {text!r} is unknown; choose one of {', '.join(known)}")
    return known[text]


def _device(text: str | None) -> Any:
    import torch

    from pkt.models import checked_device

    if text is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    return checked_device(text)


def next_line(command: str) -> None:
    """What to type next, on one line whatever its length, so that it can be copied."""
    out_console.print(f"next: {command}", highlight=False, markup=False, soft_wrap=True)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False))


@app.command(rich_help_panel="The main path")
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
    layers: LayersOption = "sensitivity",
    select: SelectOption = Select.window,
    modules: ModulesOption = "all",
    align_heads: AlignOption = False,
    map_: MapOption = None,
    partial: PartialOption = False,
    map_vocabulary: VocabularyOption = False,
    roles: RolesOption = None,
    rank: RankOption = 16,
    energy: EnergyOption = None,
    max_rank: MaxRankOption = 64,
    split: SplitOption = Split.b,
    loss: LossOption = Loss.answer,
    max_length: LengthOption = 2048,
    batch_size: BatchOption = 8,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    device_memory: Annotated[
        str | None,
        typer.Option("--device-memory", help="Use at most this much there, such as 16GB; default: what is free."),
    ] = None,
    host_memory: Annotated[
        str | None, typer.Option("--host-memory", help="Use at most this much of the host's; default: what is free.")
    ] = None,
    scratch: Annotated[
        Path | None,
        typer.Option("--scratch", help="Folder for activations that fit in no memory; default: beside OUT."),
    ] = None,
    keep_scores: Annotated[
        KeepScores, typer.Option("--keep-scores", help="Keep the scores in OUT, for pkt plan with other options.")
    ] = KeepScores.none,
    force: Force = False,
    json_: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON on stdout, and one line per layer on stderr.")
    ] = False,
) -> None:
    """Score the teacher on the seeds, cut out what matters in the student's shape, write it as a LoRA folder.

    The teacher may be larger than the memory: it is read one layer at a time. The same command continues an interrupted run.
    """
    import dataclasses

    import pkt

    given = _seed_sets(seeds, tasks)
    shown: list[Any] = []

    def show(plan: Any) -> None:
        shown.append(plan)
        typer.echo(str(plan))

    found = pkt.transfer(
        teacher,
        student,
        given,
        out=out,
        layers=_layers(layers),
        select=select.value,
        modules=modules,
        align_heads=align_heads,
        module_map=map_ or None,
        partial=partial,
        map_vocabulary=map_vocabulary,
        roles=roles,
        rank=rank,
        energy=energy,
        max_rank=max_rank,
        split=split.value,
        loss=loss.value,
        max_length=max_length,
        batch_size=batch_size,
        seed=seed,
        force=force,
        device=_device(device),
        dtype=_dtype(dtype),
        device_memory=device_memory,
        host_memory=host_memory,
        scratch=scratch,
        keep_scores=keep_scores.value,
        progress=not json_,
        on_memory=None if json_ else lambda memory: err_console.print(*memory.lines(), sep="\n", highlight=False),
        on_plan=None if json_ else show,
        on_tick=(lambda tick: typer.echo(json.dumps(dataclasses.asdict(tick)), err=True)) if json_ else None,
    )
    results = {str(out / name): ext for name, ext in found.items()} if isinstance(found, dict) else {str(out): found}
    if json_:
        rows = [
            {
                "out": folder,
                "pairs": len(ext.pairs),
                "rank": ext.rank,
                "layers": ext.plan.layer_map,
                "energies": ext.energies,
            }
            for folder, ext in results.items()
        ]
        _print_json(rows if isinstance(found, dict) else rows[0])
        return
    for folder, ext in results.items():
        there = "" if shown else "the result of this command is there already: "
        out_console.print(f"{folder}: {there}{ext}", highlight=False)
        next_line(f"pkt train {shlex.quote(student)} {shlex.quote(folder)} DATA.jsonl --out RUN")


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
def sensitivity(
    teacher: Teacher,
    seeds: SeedFile,
    out: Annotated[Path, typer.Option("--out", help="File to write (.safetensors).", show_default=False)],
    tile: Annotated[int | None, typer.Option("--tile", help="Keep sums over tile x tile blocks only.")] = None,
    loss: LossOption = Loss.answer,
    max_length: LengthOption = 2048,
    batch_size: BatchOption = 8,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Score every parameter of the teacher on the seeds and save the scores."""
    from pkt.files import os_errors
    from pkt.models import Model, check_tokenizer
    from pkt.ops import working_dtype
    from pkt.scoring import score_seeds
    from pkt.seeds import load_seeds

    if out.exists():
        raise PktError(f"{out} exists already; name another file")
    with os_errors(f"writing {out}"):
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
    named = Model.of(teacher)
    named.check()
    check_tokenizer(named.tokenizer, named.spec)
    rows = load_seeds(seeds, named.tokenizer, loss=loss.value, max_length=max_length)
    rows.check_vocabulary(named.spec.vocab_size, teacher)
    recorded = named.identified(progress=True)
    model = named.load(dtype=_dtype(dtype), device=_device(device), dequantize=True)
    if dtype is None:
        model = model.to(working_dtype(model.dtype, model.device))
    sens = score_seeds(model, rows, batch_size=batch_size, tile=tile, recorded=recorded)
    sens.save(out)
    out_console.print(f"{out}: {sens}", highlight=False)


@app.command(rich_help_panel="Step by step")
def plan(
    scores: Annotated[Path, typer.Argument(help="Scores written by pkt sensitivity.", show_default=False)],
    teacher: Teacher,
    student: Student,
    out: Annotated[Path | None, typer.Option("--out", help="File to write the plan to (.json).")] = None,
    layers: LayersOption = "sensitivity",
    select: SelectOption = Select.window,
    modules: ModulesOption = "all",
    align_heads: AlignOption = False,
    map_: MapOption = None,
    partial: PartialOption = False,
    map_vocabulary: VocabularyOption = False,
    roles: RolesOption = None,
    seed: SeedOption = 0,
    json_: JsonFlag = False,
) -> None:
    """Choose layers and regions from saved scores, and show them."""
    import pkt

    made = pkt.plan(
        pkt.Sensitivity.load(scores),
        teacher,
        student,
        layers=_layers(layers),
        select=select.value,
        modules=modules,
        align_heads=align_heads,
        module_map=map_ or None,
        partial=partial,
        map_vocabulary=map_vocabulary,
        roles=roles,
        seed=seed,
    )
    if out is not None:
        made.to_json(out)
    if json_:
        typer.echo(made.to_json())
    else:
        typer.echo(str(made))


@app.command(rich_help_panel="Step by step")
def extract(
    teacher: Teacher,
    plan: Annotated[Path, typer.Argument(help="Plan written by pkt plan --out.", show_default=False)],
    out: OutDir,
    rank: RankOption = 16,
    energy: EnergyOption = None,
    max_rank: MaxRankOption = 64,
    split: SplitOption = Split.b,
    seed: SeedOption = 0,
    force: Force = False,
) -> None:
    """Cut a plan's regions out of the teacher and factorize them into a LoRA folder."""
    import pkt
    from pkt.files import check_output_folder

    check_output_folder(out, force=force)
    made = pkt.TransferPlan.from_json(plan)
    ext = pkt.extract(teacher, made, rank=rank, energy=energy, max_rank=max_rank, split=split.value, seed=seed)
    ext.save(out, force=force)
    out_console.print(f"{out}: {ext}", highlight=False)


@app.command(rich_help_panel="Step by step")
def inject(
    student: Student,
    extraction: Annotated[Path, typer.Argument(help="Folder written by pkt transfer.", show_default=False)],
    out: OutDir,
    mode: Annotated[Mode, typer.Option("--mode", help="How step 0 stays the student.")] = Mode.paired,
    dropout: DropoutOption = None,
    alpha: Annotated[
        float | None, typer.Option("--alpha", help="lora_alpha at the extraction's rank; default: every scale is 1.")
    ] = None,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale by alpha / sqrt(r) instead of alpha / r.")] = False,
    save_residual: Annotated[
        Path | None,
        typer.Option("--save-residual", help="Folder for the complete base of --mode residual; default: OUT/base."),
    ] = None,
    force: Force = False,
) -> None:
    """Write the injected adapter as a folder that any trainer can start from (residual: its base too)."""
    from pkt.training import write_injected

    written = write_injected(
        student,
        extraction,
        out,
        mode=mode.value,
        dropout=dropout,
        alpha=alpha,
        rslora=rslora,
        save_residual=save_residual,
        force=force,
    )
    for line in written:
        out_console.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command(rich_help_panel="The main path")
def train(
    student: Student,
    extraction: Annotated[Path, typer.Argument(help="Folder written by pkt transfer.", show_default=False)],
    data: Annotated[Path, typer.Argument(help="Training rows, in the form of the seeds.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Run folder; the same command resumes an unfinished run.")],
    mode: Annotated[Mode, typer.Option("--mode", help="How step 0 stays the student.")] = Mode.paired,
    epochs: Annotated[float, typer.Option("--epochs")] = 3.0,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Rows per step.")] = 64,
    micro_batch: Annotated[int, typer.Option("--micro-batch", help="Rows in memory at once.")] = 8,
    lr: Annotated[float, typer.Option("--lr", help="Peak learning rate.")] = 3e-4,
    dropout: DropoutOption = None,
    warmup: Annotated[float, typer.Option("--warmup", help="Steps, or a share of them below 1.")] = 0.0,
    max_length: LengthOption = 2048,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", help="Stop after so many steps; default: when the epochs are done.")
    ] = None,
    save_steps: Annotated[int, typer.Option("--save-steps", help="Steps between checkpoints.")] = 50,
    seed: SeedOption = 0,
    force: Annotated[bool, typer.Option("--force", help="Start over; what pkt wrote in OUT is removed.")] = False,
) -> None:
    """Inject an extraction into the student and train it with transformers' Trainer (the paper's settings)."""
    from pkt.training import train as run

    run(
        student,
        extraction,
        data,
        out,
        mode=mode.value,
        epochs=epochs,
        batch_size=batch_size,
        micro_batch=micro_batch,
        lr=lr,
        dropout=dropout,
        warmup=warmup,
        max_length=max_length,
        max_steps=max_steps,
        save_steps=save_steps,
        seed=seed,
        force=force,
    )
    out_console.print(f"{out}: trained; logs for TensorBoard in {out / 'logs'}", highlight=False)
    next_line(f"pkt finalize {shlex.quote(str(out))} --out ADAPTER")


@app.command(rich_help_panel="The main path")
def finalize(
    run: Annotated[
        Path, typer.Argument(help="Run folder, or any trainer's output folder or checkpoint.", show_default=False)
    ],
    out: OutDir,
    student: Annotated[
        str | None, typer.Option("--student", help="The original student, if the run does not say.")
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="Recompress to this rank; default: exact.")] = None,
    no_embeddings: Annotated[
        bool, typer.Option("--no-embeddings", help="Leave embedding and head out, for servers that refuse them.")
    ] = False,
    merge: Annotated[
        Path | None, typer.Option("--merge", help="Also write the whole student with the adapter merged in.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Of the factors: float32, bfloat16 or float16.")] = "float32",
    extraction: Annotated[
        Path | None, typer.Option("--extraction", help="What a residual adapter started from, if its folder lacks it.")
    ] = None,
    samples: Annotated[
        Path | None, typer.Option("--samples", help="JSONL rows to check the logits on; default: random tokens.")
    ] = None,
    no_check: Annotated[bool, typer.Option("--no-check", help="Do not load the student to check the logits.")] = False,
    force: Force = False,
    json_: JsonFlag = False,
) -> None:
    """Write one plain LoRA folder for the original student, and check it against the trained model."""
    import dataclasses

    import pkt

    done = pkt.finalize(
        run,
        out,
        student=student,
        rank=rank,
        embeddings=not no_embeddings,
        merge=merge,
        dtype=_dtype(dtype),
        extraction=extraction,
        samples=samples,
        check=not no_check,
        force=force,
    )
    ranks = sorted({p.rank for p in done.pairs.values()})
    if json_:
        check = None if done.check is None else dataclasses.asdict(done.check)
        found = {"out": str(out), "modules": len(done.pairs), "ranks": ranks, "base": done.base, "mode": done.mode}
        _print_json({**found, "check": check, "lost": done.lost, "left_out": done.dropped})
        return
    lines = [f"{out}: a plain LoRA of {len(done.pairs)} modules, rank {ranks[-1]}, for {done.base}", *done.report()]
    if merge is not None:
        lines.append(f"{merge}: the whole model, the adapter merged in")
    for line in lines:
        out_console.print(line, highlight=False, soft_wrap=True)


@app.command(rich_help_panel="The main path")
def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint directory or a model on the Hub.", show_default=False)],
    data: Annotated[Path, typer.Argument(help="Held-out rows, in the form of the seeds.", show_default=False)],
    adapter: Annotated[Path | None, typer.Option("--adapter", help="A LoRA folder to load on the model.")] = None,
    exact_match: Annotated[bool, typer.Option("--exact-match", help="Also decode and compare final answers.")] = False,
    max_length: LengthOption = 2048,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first rows.")] = None,
    device: DeviceOption = None,
    json_: JsonFlag = False,
) -> None:
    """Mean negative log-likelihood of the answers, and exact match, on held-out rows."""
    from pkt.lora.injection import load_with_adapter
    from pkt.models import load_tokenizer
    from pkt.seeds import load_seeds
    from pkt.training.evaluation import evaluate as run

    tokenizer = load_tokenizer(model)
    rows = load_seeds(data, tokenizer, max_length=max_length, limit=limit)
    result = run(
        load_with_adapter(model, adapter, device=_device(device)), rows, tokenizer=tokenizer, exact_match=exact_match
    )
    if json_:
        _print_json(
            {"rows": result.rows, "tokens": result.tokens, "nll": result.nll, "exact_match": result.exact_match}
        )
        return
    text = f"{result.rows} rows, {result.tokens} answer tokens: NLL {result.nll:.4f} nats per token"
    if result.exact_match is not None:
        text += f", exact match {100 * result.exact_match:.1f}%"
    out_console.print(text, highlight=False)


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
        _print_json(found)
        return
    for key, value in found.items():
        out_console.print(f"[bold]{key}[/bold]:", end=" ")
        out_console.print(str(value), highlight=False, markup=False, soft_wrap=True)


@app.command(rich_help_panel="Look")
def report(
    folder: Annotated[Path, typer.Argument(help="An extraction folder.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", help="HTML file; default: report.html in the folder.")] = None,
) -> None:
    """Write a page with the layers' sensitivity, the regions chosen and what they catch."""
    from pkt.reporting import write_report

    out_console.print(str(write_report(folder, out)), highlight=False)


@app.command(rich_help_panel="Look")
def models(
    model: Annotated[str | None, typer.Argument(help="A model: show what pkt finds in it.", show_default=False)] = None,
    json_: JsonFlag = False,
) -> None:
    """Formats and architectures that work here and why not; or each kind of matrix of a model and what it is taken for."""
    from pkt.models import described, spec_of, supported

    if model is not None:
        spec = spec_of(model)
        head, rows = ("matrix", "shape", "role"), [tuple(row) for row in described(spec)]
    else:
        head, rows = ("what", "here", "why"), [(name, "yes" if here else "no", why) for name, here, why in supported()]
    if json_:
        _print_json([dict(zip(head, row, strict=True)) for row in rows])
        return
    table = Table(*head, box=None, header_style="bold")
    for row in rows:
        table.add_row(*row)
    out_console.print(table)
    if model is not None:
        tied = ", head tied to the embedding" if spec.tied else ""
        out_console.print(
            f"{spec.model_type}: {spec.num_layers} decoder layers at {spec.layers}{tied}", highlight=False
        )


@app.command(rich_help_panel="Look")
def env(json_: JsonFlag = False) -> None:
    """Versions, devices, and which implementation each op will use and why."""
    from pkt.reporting import environment

    found = environment()
    if json_:
        _print_json(found)
        return
    for key, value in found["versions"].items():
        out_console.print(f"{key:13} {value}", highlight=False)
    table = Table("op", "device", "implementation", "why", box=None, header_style="bold")
    for row in found["ops"]:
        table.add_row(row["op"], row["device"], row["implementation"], row["why"])
    out_console.print(table)


@app.command(rich_help_panel="Start here")
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for what the demo makes.")] = Path("pkt-demo"),
    seeds: Annotated[int, typer.Option("--seeds", help="Training seeds per method.", min=1)] = 3,
    force: Force = False,
) -> None:
    """Two minutes: measure a tiny teacher, cut, inject, train and compare with controls. Needs no network."""
    from pkt.demo import run_demo

    run_demo(out, seeds=seeds, force=force, console=out_console)


def main() -> None:
    """Entry point: one red line for what the user can mend, exit code 1; 130 for Ctrl-C."""
    try:
        app()
    except (PktError, OSError) as error:
        if _debug:
            raise
        err_console.print("error:", style="bold red", end=" ")
        err_console.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)
    except SystemExit as done:
        if done.code in (130, 143):  # Ctrl-C, by typer, and SIGTERM
            err_console.print(_stopped(), style="red")
        raise


def _stopped() -> str:
    """What there is to say after Ctrl-C."""
    from pkt.transferring.checkpoints import run_path

    words = [word for argument in sys.argv for word in argument.split("=", 1)]
    if _command not in ("transfer", "train") or "--out" not in words[:-1]:
        return "stopped"
    out = Path(words[words.index("--out") + 1])
    saved = run_path(out).is_dir() if _command == "transfer" else any(out.glob("checkpoint-*"))
    if not saved:
        return "stopped before anything was saved"
    return f"stopped; the same command continues{', without --force' if '--force' in sys.argv else ''}"
