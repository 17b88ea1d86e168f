"""The flags that several commands share, and the commands' `**options`, whose flags are the fields of `pkt.options`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeAlias, get_args

import typer

from pkt.cli.application import state
from pkt.errors import PktError
from pkt.options import LayerChoice, Loss, Select, Split, Svd

Teacher: TypeAlias = Annotated[
    str, typer.Argument(help="Teacher: a checkpoint directory or a model on the Hub.", show_default=False)
]
Student: TypeAlias = Annotated[
    str, typer.Argument(help="Student: a checkpoint directory or a model on the Hub.", show_default=False)
]
SeedFile: TypeAlias = Annotated[
    Path,
    typer.Argument(help='JSONL rows of {"messages"}, {"prompt", "completion"} or {"text"}.', show_default=False),
]
OutDir: TypeAlias = Annotated[
    Path, typer.Option("--out", help="Folder to write; it must not exist yet.", show_default=False)
]
JsonFlag: TypeAlias = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Force: TypeAlias = Annotated[bool, typer.Option("--force", help="Replace a folder that pkt wrote.")]
Rescore: TypeAlias = Annotated[bool, typer.Option("--rescore", help="Begin an unfinished run anew.")]


def _layers(text: str) -> str | list[int]:
    if text in get_args(LayerChoice):
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise PktError(
            f"--layers {text!r}: give {', '.join(get_args(LayerChoice))}, or numbers such as 0,1,4,7"
        ) from error


def read_dtype(text: str | None) -> Any:
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

    # A rank of several has set the GPU that is its own.
    own = f"cuda:{torch.cuda.current_device()}" if state.ranks and torch.cuda.is_available() else "cuda"
    return checked_device((own if text == "cuda" else text) or (own if torch.cuda.is_available() else "cpu"))


Device: TypeAlias = Annotated[
    str | None,
    typer.Option("--device", callback=_device, help="cpu, cuda, ...; default: a GPU when there is one."),
]
MaxLength: TypeAlias = Annotated[int, typer.Option("--max-length", help="Longest row in tokens; the rest is cut off.")]

# By the names of the fields of `pkt.options`; a field that has no flag is for callers in Python only.
_FLAGS: dict[str, Any] = {
    "layers": Annotated[
        str,
        typer.Option(
            "--layers",
            callback=_layers,
            help="sensitivity, first, last, random, or teacher layers such as 0,1,4,7.",
        ),
    ],
    "select": Annotated[
        Select,
        typer.Option(
            "--select",
            help="The part of each matrix with the most sensitivity: a contiguous window, rows and columns, the best "
            "single weights in their order, blocks; or at random a window, or single weights.",
        ),
    ],
    "modules": Annotated[
        str,
        typer.Option(
            "--modules",
            help="all, attention, ffn, embedding, or roles (q, k, v, o, gate, up, down): a list such as all,-k,-v; or a "
            "regular expression on module names.",
        ),
    ],
    "align_heads": Annotated[bool, typer.Option("--align-heads", help="Windows of q, k, v and o never cut a head.")],
    "module_map": Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            callback=lambda pairs: pairs or None,
            help="TEACHER=STUDENT, such as 'a.*.fc1=b.*.mlp.up': only these pairs. Once for each.",
            show_default=False,
        ),
    ],
    "partial": Annotated[
        bool, typer.Option("--partial", help="Where the teacher is smaller, feed what fits and leave zeros.")
    ],
    "map_vocabulary": Annotated[
        bool, typer.Option("--map-vocabulary", help="Feed embeddings and head by the tokens both tokenizers have.")
    ],
    "roles": Annotated[
        Path | None,
        typer.Option(
            "--roles", help='JSON file of names pkt does not know: {"fc_up": ["up", "ffn"]}.', show_default=False
        ),
    ],
    "seed": Annotated[int, typer.Option("--seed", help="Seed of everything random.")],
    "rank": Annotated[int, typer.Option("--rank", help="Rank of every LoRA pair.")],
    "energy": Annotated[
        float | None,
        typer.Option("--energy", help="Instead of --rank: catch this share of each region's energy, up to --max-rank."),
    ],
    "max_rank": Annotated[int, typer.Option("--max-rank", help="Largest rank with --energy.")],
    "split": Annotated[
        Split, typer.Option("--split", help="b: the singular values go into B; sqrt: half on each side.")
    ],
    "svd": Annotated[
        Svd,
        typer.Option(
            "--svd",
            help="fast: four steps, which flat spectra do not settle (a line says so); adaptive: as many as they take; exact.",
        ),
    ],
    "loss": Annotated[Loss, typer.Option("--loss", help="Tokens that count: the answers, or all.")],
    "max_length": MaxLength,
    "batch_size": Annotated[
        int, typer.Option("--batch-size", help="Seeds scored at once; the result does not depend on it.")
    ],
    "device": Device,
    "dtype": Annotated[
        str | None,
        typer.Option("--dtype", callback=read_dtype, help="float32, bfloat16 or float16; default: the checkpoint's."),
    ],
    "device_memory": Annotated[
        str | None,
        typer.Option("--device-memory", help="Use at most this much there, such as 16GB; default: what is free."),
    ],
    "host_memory": Annotated[
        str | None, typer.Option("--host-memory", help="Use at most this much of the host's; default: what is free.")
    ],
    "scratch": Annotated[
        Path | None,
        typer.Option("--scratch", help="Folder for activations that fit in no memory; default: beside OUT."),
    ],
}


def takes(
    *subjects: type, unsaid: type | None = None, own_flags: Mapping[str, Any] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command's `**options` the flags of these dataclasses' fields, with their defaults; a later one's field counts.

    unsaid: a subject whose fields are None until they are given. own_flags: what a command says of a field in its own words.
    """
    table = {**_FLAGS, **(own_flags or {})}

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(function, eval_str=True).parameters.values()
        defaults = {f.name: f.default for subject in subjects for f in dataclasses.fields(subject) if f.name in table}
        if unsaid is not None:
            defaults |= dict.fromkeys(f.name for f in dataclasses.fields(unsaid))
        flags = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=table[name])
            for name, default in defaults.items()
        ]
        context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)

        @functools.wraps(function)
        def command(*, context: typer.Context, **given: Any) -> None:
            _check_together(context)
            function(**given)

        kept = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own if p.kind is not p.VAR_KEYWORD]
        command.__signature__ = inspect.Signature([context, *kept, *flags])  # type: ignore[attr-defined]
        command.__annotations__ = {}
        return command

    return decorate


def _check_together(context: typer.Context) -> None:
    """Refuse a flag that another one leaves without a use."""

    def is_given(name: str) -> bool:
        source = context.get_parameter_source(name)
        return source is not None and source.name == "COMMANDLINE"

    if is_given("energy") and is_given("rank"):
        raise PktError("--energy finds each rank, so that --rank has no part in it; give one of them (and --max-rank)")
    if is_given("max_rank") and not is_given("energy"):
        raise PktError("--max-rank bounds the ranks that --energy finds; give --energy too, or --rank alone")
