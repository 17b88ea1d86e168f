"""`pkt teach --generate`: the teacher's own answers in the place of the rows', as new rows that any student can learn from."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pkt.errors import PktError
from pkt.files import as_path, atomic_file, check_parent
from pkt.models import Model
from pkt.progress import bar
from pkt.seeds import Example, Seeds, load_seeds, read_rows
from pkt.training.evaluation import generate


def answer_rows(
    teacher: Any,
    data: str | Path,
    out: str | Path,
    *,
    tokenizer: Any = None,
    max_new_tokens: int = 512,
    max_length: int = 2048,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
    progress: bool = True,
) -> Path:
    """Write the rows of `data` with the last answer of each replaced by the teacher's own, decoded greedily, to the file `out`.

    The teacher is held in memory whole. The result is text, so the student's tokenizer may be another. Raises `PktError` for rows
    without a prompt, and for a file that is there already unless `force`.
    """
    data, out = as_path(data, "the path of a JSONL file"), as_path(out, "the path of a JSONL file")
    if out.is_dir() or (out.exists() and (not force or out.suffix != ".jsonl")):
        raise PktError(f"{out} is there already; name another file" + (", or replace it with --force" * out.is_file()))
    check_parent(out)
    if out.resolve() == data.resolve():
        raise PktError(f"{out} is the file that the prompts come from; name another")
    if max_new_tokens < 1 or batch_size < 1:
        raise PktError(f"max_new_tokens={max_new_tokens} and batch_size={batch_size} must be at least 1")
    model = Model.of(teacher)
    if tokenizer is None:
        if not model.is_named:
            raise PktError("a teacher in memory needs its tokenizer; pass tokenizer=")
        tokenizer = model.tokenizer
    rows = load_seeds(data, tokenizer, loss="last", max_length=max_length)
    _check_prompts(rows, model.spec.positions)
    loaded: nn.Module = model.load(dtype=dtype, device=device or "cpu", dequantize=True)
    texts = _answers(loaded, tokenizer, rows, batch_size, max_new_tokens, progress)
    raw = [row for _, row in read_rows(data)]
    with atomic_file(out) as scratch, open(scratch, "w", encoding="utf-8", newline="\n") as file:
        for row, text in zip(raw, texts, strict=True):
            file.write(json.dumps(_answered(row, text), ensure_ascii=False) + "\n")
    return out


def _check_prompts(rows: Seeds, positions: int | None) -> None:
    for index, example in enumerate(rows):
        if not example.prompt_ids:
            raise PktError(f"{rows.where(index)}: the row has no prompt to answer; leave rows of text alone out")
        if positions is not None and len(example.prompt_ids) >= positions:
            raise PktError(
                f"{rows.where(index)}: the prompt of {len(example.prompt_ids)} tokens leaves none of the model's {positions} "
                "positions to answer in; shorten it"
            )


def _answers(
    model: Any, tokenizer: Any, rows: Seeds, batch_size: int, max_new_tokens: int, progress: bool
) -> list[str]:
    texts: dict[int, str] = {}
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt_ids))
    with torch.no_grad(), bar("answering", len(rows), unit="rows", shown=progress) as advance:
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            examples: list[Example] = [rows[i] for i in chosen]
            found = generate(model, tokenizer, examples, batch_size=batch_size, max_new_tokens=max_new_tokens)
            texts |= dict(zip(chosen, found, strict=True))
            advance(len(texts))
    return [texts[i] for i in range(len(rows))]


def _answered(row: dict[str, Any], text: str) -> dict[str, Any]:
    """The row with another last answer."""
    made = copy.deepcopy(row)
    if "messages" in made:
        place = max(i for i, message in enumerate(made["messages"]) if message.get("role") == "assistant")
        made["messages"] = [*made["messages"][:place], {"role": "assistant", "content": text}]
    elif isinstance(made["completion"], list):
        made["completion"] = [{"role": "assistant", "content": text}]
    else:
        made["completion"] = text
    return made
