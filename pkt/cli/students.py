"""What is done with an extraction: inject, train, finalize, evaluate."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from pkt.cli.application import app, next_line, out_console, print_json, resumable
from pkt.cli.flags import Device, Force, JsonFlag, MaxLength, OutDir, Student, read_dtype
from pkt.options import AnswerRule, Mode

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
    for line in written:
        out_console.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command(rich_help_panel="The main path")
def train(
    student: Student,
    extraction: Annotated[Path, typer.Argument(help="Folder written by pkt transfer.", show_default=False)],
    data: Annotated[Path, typer.Argument(help="Training rows, in the form of the seeds.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Run folder; the same command resumes an unfinished run.")],
    mode: ModeFlag = None,
    epochs: Annotated[float, typer.Option("--epochs")] = 3.0,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Rows per step.")] = 64,
    micro_batch: Annotated[int, typer.Option("--micro-batch", help="Rows in memory at once.")] = 8,
    lr: Annotated[
        float | None, typer.Option("--lr", help="Peak learning rate; default: 3e-4, half of it for a transplant.")
    ] = None,
    dropout: DropoutOption = None,
    warmup: Annotated[float, typer.Option("--warmup", help="Steps, or a share of them below 1.")] = 0.0,
    max_length: MaxLength = 2048,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", help="Stop after so many steps; default: when the epochs are done.")
    ] = None,
    save_steps: Annotated[int, typer.Option("--save-steps", help="Steps between checkpoints.")] = 50,
    seed: Annotated[int, typer.Option("--seed", help="Seed of everything random.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Start over; what pkt wrote in OUT is removed.")] = False,
) -> None:
    """Inject an extraction into the student and train it with transformers' Trainer (the paper's settings)."""
    from pkt.training import train as run

    with resumable(lambda: any(out.glob("checkpoint-*")), force=force):
        run(
            student,
            extraction,
            data,
            out,
            mode=mode,
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
        out_console.print(line, highlight=False, soft_wrap=True)


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
            help="What --exact-match compares: what follows #### (else the whole answer), or the last number.",
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
    from pkt.manifest import recorded_day
    from pkt.models import load_tokenizer
    from pkt.seeds import load_seeds
    from pkt.training import evaluate as run

    tokenizer = load_tokenizer(model)
    # What a template printed while the adapter was trained is printed again.
    today = None if adapter is None else recorded_day(adapter / MANIFEST)
    rows = load_seeds(data, tokenizer, max_length=max_length, limit=limit, today=today)
    loaded = load_with_adapter(model, adapter, device=device)
    result = run(loaded, rows, tokenizer=tokenizer, exact_match=exact_match, answer=answer)
    if json_:
        found = {"rows": result.rows, "tokens": result.tokens, "nll": result.nll, "exact_match": result.exact_match}
        print_json(found if rows.today is None else {**found, "today": rows.today.isoformat()})
        return
    text = f"{result.rows} rows, {result.tokens} answer tokens: NLL {result.nll:.4f} nats per token"
    if result.exact_match is not None:
        text += f", exact match {100 * result.exact_match:.1f}%"
    out_console.print(text, highlight=False)
