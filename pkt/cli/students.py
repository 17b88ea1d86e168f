"""What is done with an extraction: inject, train, finalize, evaluate."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from pkt.cli.application import app, next_line, print_json, remark, resumable, say, state
from pkt.cli.flags import Device, Force, JsonFlag, MaxLength, OutDir, Student, read_dtype, takes
from pkt.options import (
    AnswerRule,
    Lora,
    Mode,
    Precision,
    Recipe,
    RecipeName,
    RowTemplate,
    Training,
    TrainingLoss,
    TrainModules,
)

DropoutOption: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--dropout",
        help="LoRA dropout; default: 0.05, or 0 where experts are adapted, since PEFT has no dropout for them.",
        show_default=False,
    ),
]


ModeFlag: TypeAlias = Annotated[
    Mode | None,
    typer.Option(
        "--mode", help="How step 0 stays the student; default: paired, and add for a transplant, which is kept."
    ),
]


@app.command(rich_help_panel="Step by step")
def inject(
    student: Student,
    extraction: Annotated[Path, typer.Argument(help="Folder written by pkt transfer.", show_default=False)],
    out: OutDir,
    mode: ModeFlag = None,
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
    json_: JsonFlag = False,
) -> None:
    """Write the injected adapter as a folder that any trainer can start from (residual: its base too)."""
    from pkt.training import write_injected

    written = write_injected(
        student,
        extraction,
        out,
        mode=mode,
        dropout=dropout,
        alpha=alpha,
        rslora=rslora,
        save_residual=save_residual,
        force=force,
    )
    if json_:
        print_json({"out": str(out), "written": list(written)})
        return
    for line in written:
        say(line)


_RECIPE_SAYS = "default: as the recipe has it"

# By the names of the fields of `Training`, `Recipe` and `Lora`.
_TRAINING: dict[str, Any] = {
    "epochs": Annotated[float, typer.Option("--epochs", help="Times that every row is learnt from.")],
    "batch_size": Annotated[int, typer.Option("--batch-size", help="Rows per step.")],
    "micro_batch": Annotated[int, typer.Option("--micro-batch", help="Rows in memory at once.")],
    "lr": Annotated[
        float | None,
        typer.Option("--lr", help="Peak learning rate; default: 3e-4, half of it for a transplant, 5e-5 with --full."),
    ],
    "warmup": Annotated[
        float | None, typer.Option("--warmup", help=f"Steps, or a share of them below 1; {_RECIPE_SAYS}, 0 or 0.03.")
    ],
    "max_steps": Annotated[
        int | None, typer.Option("--max-steps", help="Stop after so many steps; default: when the epochs are done.")
    ],
    "save_steps": Annotated[int, typer.Option("--save-steps", help="Steps between checkpoints.")],
    "seed": Annotated[int, typer.Option("--seed", help="Seed of everything random.")],
    "precision": Annotated[
        Precision, typer.Option("--precision", help="Of the products; auto: bf16 on a GPU that has it, else fp32.")
    ],
    "gradient_checkpointing": Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            help=f"Compute activations twice rather than keep them; {_RECIPE_SAYS}.",
        ),
    ],
    "group_by_length": Annotated[bool, typer.Option("--group-by-length", help="Rows of like lengths together.")],
    "eval_steps": Annotated[
        int | None, typer.Option("--eval-steps", help="Steps between looks at --held-out; default: as --save-steps.")
    ],
    "report_to": Annotated[
        str, typer.Option("--report-to", help="tensorboard, wandb, mlflow, ... (joined by commas), or none.")
    ],
    "mode": Annotated[
        Mode | None,
        typer.Option(
            "--mode",
            help="How step 0 stays the student; default: paired, residual in the paper's recipe, add for what is kept.",
        ),
    ],
    "train_modules": Annotated[
        TrainModules | None,
        typer.Option("--train-modules", help=f"all: the matrices that were not extracted learn too; {_RECIPE_SAYS}."),
    ],
    "a_scale": Annotated[
        float | None,
        typer.Option(
            "--a-scale", help="A of what was not extracted, times PEFT's; default: 3, in the paper's recipe 1."
        ),
    ],
    "loss": Annotated[
        TrainingLoss | None,
        typer.Option("--loss", help=f"Tokens that count: the answers, the last one, or all; {_RECIPE_SAYS}."),
    ],
    "template": Annotated[
        RowTemplate | None,
        typer.Option("--template", help=f"chat: the tokenizer's own; paper: as its authors train; {_RECIPE_SAYS}."),
    ],
    "init": Annotated[
        str | None,
        typer.Option("--init", help="Without an extraction: PEFT's init_lora_weights (gaussian, pissa, ...)."),
    ],
    "rank": Annotated[int | None, typer.Option("--rank", help="Without an extraction: the LoRA's; default 16.")],
    "alpha": Annotated[
        float | None, typer.Option("--alpha", help="Without an extraction: lora_alpha; default: a scale of 1.")
    ],
    "modules": Annotated[
        str | None,
        typer.Option("--modules", help="Without an extraction: the matrices adapted, as in pkt plan; default all."),
    ],
}


@app.command(rich_help_panel="The main path")
@takes(Training, Recipe, unsaid=Lora, own_flags=_TRAINING)
def train(
    student: Student,
    extraction: Annotated[
        Path,
        typer.Argument(
            metavar="EXTRACTION_OR_DATA",
            help="Folder of pkt transfer, transplant or start; or at once the training rows, for plain LoRA.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Run folder; the same command resumes an unfinished run.")],
    data: Annotated[
        Path | None, typer.Argument(metavar="DATA", help="Training rows, after an extraction.", show_default=False)
    ] = None,
    recipe: Annotated[
        RecipeName, typer.Option("--recipe", help="paper: what the paper's authors train with (docs/choices.md).")
    ] = "pkt",
    held_out: Annotated[
        Path | None,
        typer.Option(
            "--held-out", help="Rows to measure on as it trains; the best weights are kept.", show_default=False
        ),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Train all weights instead of a LoRA, and write a whole model.")
    ] = False,
    teacher_targets: Annotated[
        Path | None,
        typer.Option("--teacher-targets", help="Folder of pkt teach for these rows.", show_default=False),
    ] = None,
    mix: Annotated[
        float | None,
        typer.Option("--mix", help="The teacher's share of the loss, 0 to 1; 0.5 is usual.", show_default=False),
    ] = None,
    dropout: DropoutOption = None,
    max_length: MaxLength = 2048,
    force: Annotated[bool, typer.Option("--force", help="Start over; what pkt wrote in OUT is removed.")] = False,
    json_: JsonFlag = False,
    **options: Any,
) -> None:
    """Start a LoRA in the student, from an extraction or plainly, and train it (or, with --full, all weights) with transformers."""
    from pkt.manifest import read_manifest
    from pkt.training import train as run

    # One path after the student: the rows alone.
    begun, rows = (None, extraction) if data is None else (extraction, data)
    with resumable(lambda: any(out.glob("checkpoint-*")), force=force):
        run(
            student,
            begun,
            rows,
            out,
            recipe=recipe,
            held_out=held_out,
            full=full,
            teacher_targets=teacher_targets,
            mix=mix,
            dropout=dropout,
            max_length=max_length,
            force=force,
            group=state.ranks,
            **options,
        )
    if json_:
        found = read_manifest(out)
        print_json({"out": str(out), "train_loss": found.get("train_loss"), "held_out": found.get("held_out")})
        return
    logs = f"; logs for TensorBoard in {out / 'logs'}" if "tensorboard" in options["report_to"] else ""
    say(f"{out}: trained{logs}")
    place = shlex.quote(str(out))
    next_line(f"pkt evaluate {place} TEST.jsonl" if full else f"pkt finalize {place} --out ADAPTER")


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
        dtype=read_dtype(dtype),
        extraction=extraction,
        samples=samples,
        check=not no_check,
        force=force,
    )
    ranks = sorted({p.rank for p in done.pairs.values()})
    if json_:
        check = None if done.check is None else dataclasses.asdict(done.check)
        found = {"out": str(out), "modules": len(done.pairs), "ranks": ranks, "base": done.base, "mode": done.mode}
        print_json({**found, "check": check, "lost": done.lost, "left_out": done.dropped})
        return
    lines = [f"{out}: a plain LoRA of {len(done.pairs)} modules, rank {ranks[-1]}, for {done.base}", *done.report()]
    if merge is not None:
        lines.append(f"{merge}: the whole model, the adapter merged in")
    for line in lines:
        say(line)


@app.command(rich_help_panel="The main path")
def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint directory or a model on the Hub.", show_default=False)],
    data: Annotated[Path, typer.Argument(help="Held-out rows, in the form of the seeds.", show_default=False)],
    adapter: Annotated[Path | None, typer.Option("--adapter", help="A LoRA folder to load on the model.")] = None,
    exact_match: Annotated[bool, typer.Option("--exact-match", help="Also decode and compare final answers.")] = False,
    answer: Annotated[
        AnswerRule,
        typer.Option(
            "--answer",
            help="What --exact-match compares: what follows #### (else the whole answer), the last number, words without case "
            "and punctuation, or the last number as the paper took it.",
        ),
    ] = "mark",
    max_length: MaxLength = 2048,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first rows.")] = None,
    device: Device = None,
    json_: JsonFlag = False,
) -> None:
    """Mean negative log-likelihood of the answers, and exact match, on held-out rows."""
    from pkt.files import MANIFEST
    from pkt.lora import load_with_adapter
    from pkt.manifest import read_manifest, recorded_day
    from pkt.models import load_tokenizer
    from pkt.seeds import load_seeds
    from pkt.training import evaluate as run

    if adapter is not None and (adapter / MANIFEST).is_file() and read_manifest(adapter).get("kind") == "extraction":
        remark(f"{adapter} is an extraction, not trained: what is measured is the student changed by it at once")
    tokenizer = load_tokenizer(model)
    # What a template printed while the adapter was trained is printed again.
    today = None if adapter is None else recorded_day(adapter / MANIFEST)
    rows = load_seeds(data, tokenizer, max_length=max_length, limit=limit, today=today)
    loaded = load_with_adapter(model, adapter, device=device)
    result = run(loaded, rows, tokenizer=tokenizer, exact_match=exact_match, answer=answer, progress=not json_)
    if json_:
        found = {"rows": result.rows, "tokens": result.tokens, "nll": result.nll, "exact_match": result.exact_match}
        print_json(found if rows.today is None else {**found, "today": rows.today.isoformat()})
        return
    text = f"{result.rows} rows, {result.tokens} answer tokens: NLL {result.nll:.4f} nats per token"
    if result.exact_match is not None:
        text += f", exact match {100 * result.exact_match:.1f}%"
    say(text)
