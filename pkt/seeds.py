"""Seed samples and training examples: rows of JSON become token ids, with labels that say which tokens count."""

from __future__ import annotations

import datetime
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from pkt.errors import PktError, PktWarning
from pkt.files import os_errors, sha256
from pkt.models import load_tokenizer, quiet
from pkt.options import RowTemplate, TrainingLoss
from pkt.templates import FORMS, Piece, Template, pieces_of

IGNORE = -100


@dataclass(frozen=True)
class Example:
    """One tokenized row. `labels` repeats `input_ids` where a token counts and is -100 elsewhere (not shifted)."""

    input_ids: list[int]
    labels: list[int]
    prompt_ids: list[int]  # what comes before the last answer; empty for {"text"}
    answer: str  # the last answer as text; the whole text for {"text"}
    line: int
    cut: bool = False  # to `max_length`


class Seeds(Sequence[Example]):
    """Tokenized examples with the fingerprint of what the model will see."""

    def __init__(self, examples: list[Example], source: str, pad_id: int, today: datetime.date | None = None) -> None:
        self.examples, self.source, self.pad_id = examples, source, pad_id
        self.today = today  # what a chat template that prints the date was told

    def __repr__(self) -> str:
        return f"Seeds({len(self)} samples, {self.tokens} tokens, {self.source})"

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        return self.examples[index]

    @cached_property
    def fingerprint(self) -> str:
        return sha256(*(json.dumps([e.input_ids, e.labels]) for e in self.examples))

    @property
    def tokens(self) -> int:
        return sum(len(e.input_ids) for e in self.examples)

    def describe(self) -> dict[str, Any]:
        """What a result records of the seeds it was made from."""
        found = {"source": self.source, "count": len(self), "tokens": self.tokens, "fingerprint": self.fingerprint}
        return found if self.today is None else {**found, "today": self.today.isoformat()}

    def where(self, index: int) -> str:
        """File and line of an example."""
        return f"{self.source}:{self.examples[index].line}"

    def check_fits(self, vocab_size: int | None, positions: int | None, model: str) -> None:
        """Raises `PktError`, naming the line, for a token id without a row in the model's embedding or a row longer than it reads.

        None: not known, or no limit.
        """
        for example in self.examples:
            top, length = max(example.input_ids), len(example.input_ids)
            if vocab_size is not None and top >= vocab_size:
                raise PktError(
                    f"{self.source}:{example.line}: token id {top} does not exist in {model} ({vocab_size} tokens); "
                    "the tokenizer and the model do not belong together"
                )
            if positions is not None and length > positions:
                raise PktError(
                    f"{self.source}:{example.line}: the row has {length} tokens, and {model} only {positions} positions; cut rows "
                    f"with max_length={positions} (--max-length {positions}), or shorten them"
                )

    def batches(self, batch_size: int) -> list[dict[str, Tensor]]:
        """Right-padded batches in file order: input_ids, attention_mask and labels, int64 [B, longest]."""
        return [collate(self.examples[i : i + batch_size], self.pad_id) for i in range(0, len(self), batch_size)]


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Pad examples on the right into one batch of int64 tensors [B, longest]."""
    longest = max(len(e.input_ids) for e in examples)
    ids = torch.full((len(examples), longest), pad_id)
    mask = torch.zeros(len(examples), longest, dtype=torch.int64)
    labels = torch.full((len(examples), longest), IGNORE)
    for row, example in enumerate(examples):
        size = len(example.input_ids)
        ids[row, :size] = torch.tensor(example.input_ids)
        labels[row, :size] = torch.tensor(example.labels)
        mask[row, :size] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def read_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    r"""(line number, row) of a JSONL file. Lines end at "\n" only: U+2028 and its like are legal inside JSON strings."""
    path = Path(path)
    if not path.is_file():
        raise PktError(
            f"{path} {'is not a file' if path.exists() else 'does not exist'}; name a JSONL file with rows {FORMS}"
        )
    with os_errors(f"reading {path}"):
        data = path.read_bytes()
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except UnicodeDecodeError as error:
            raise PktError(f"{path}:{number}: not UTF-8 text; save the file as UTF-8") from error
        except RecursionError:
            raise PktError(f"{path}:{number}: nested too deeply; each line must be one of {FORMS}") from None
        except json.JSONDecodeError as error:
            raise PktError(
                f"{path}:{number}: not valid JSON ({error.msg}); each line must be one of {FORMS}"
            ) from error
        except ValueError as error:  # a number of thousands of digits
            raise PktError(f"{path}:{number}: not JSON that can be read ({error}); mend the row") from error
        if not isinstance(row, dict):
            raise PktError(f"{path}:{number}: a row must be an object, one of {FORMS}")
        yield number, row


def load_seeds(
    path: str | Path,
    tokenizer: Any,
    *,
    loss: TrainingLoss = "answer",
    max_length: int = 2048,
    limit: int | None = None,
    today: datetime.date | None = None,
    template: RowTemplate = "chat",
) -> Seeds:
    """Read and tokenize a JSONL file of examples (docs/method.md §1, §6).

    tokenizer: a tokenizer, or the folder of a model that has one. Rows are {"messages"} (with "tools" where the chat template
    knows them), {"prompt", "completion"} (both strings or both lists of messages) or {"text"}. Messages go through the
    tokenizer's chat template when it has one and the paper's template otherwise, which strips the ends of every content; prompt
    and completion are joined as they are. A text that has its beginning or its end token already gets no second one.
    `loss="answer"` puts labels on the assistant's turns (or the completion) only, "last" on the last of them, "all" on every
    token; a {"text"} row always counts as a whole. today: the date for chat templates that print it; `Seeds.today` is the one
    that was used. template="paper" writes messages as the paper's authors train on them, whatever the tokenizer has: each turn
    ends with an empty line, the row with the end token.

    Raises `PktError` naming file and line for malformed JSON or rows, a template that does not end, a row left without a
    target token (also by truncation to `max_length` tokens), and an empty file. A `PktWarning` says how many rows were cut.
    """
    if loss not in get_args(TrainingLoss):
        raise PktError(f"loss={loss!r} is unknown; choose one of {', '.join(get_args(TrainingLoss))}")
    if template not in get_args(RowTemplate):
        raise PktError(f"template={template!r} is unknown; choose one of {', '.join(get_args(RowTemplate))}")
    if max_length < 2:
        raise PktError(f"max_length={max_length} leaves no token to predict; use at least 2")
    if limit is not None and limit < 1:
        raise PktError(f"limit={limit} leaves no rows; use at least 1")
    if isinstance(tokenizer, (str, Path)):
        tokenizer = load_tokenizer(tokenizer)
    if not callable(tokenizer):
        raise PktError(f"a tokenizer is needed, or the folder of a model that has one, not {type(tokenizer).__name__}")
    most = max_length * _longest_token(tokenizer)
    writer = Template(tokenizer, today or datetime.date.today(), most, paper=template == "paper")
    examples: list[Example] = []
    with quiet():  # tokenizers warn of rows longer than the model, before they are truncated
        for number, row in read_rows(path):
            if limit is not None and len(examples) == limit:
                break
            where = f"{path}:{number}"
            pieces, special = pieces_of(row, writer, where)
            if loss == "last":
                last = max((i for i, (_, answer) in enumerate(pieces) if answer), default=-1)
                pieces = [(text, answer and i == last) for i, (text, answer) in enumerate(pieces)]
            examples.append(_encode(pieces, special, tokenizer, loss, max_length, where, number))
    if not examples:
        raise PktError(f"{path} has no rows; add some of the form {FORMS}")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    cut = sum(example.cut for example in examples)
    if cut:
        rows = f"{cut} of {len(examples)} rows {'is' if cut == 1 else 'are'}"
        warnings.warn(
            f"{path}: {rows} longer than {max_length} tokens and cut there; max_length (--max-length) sets where",
            PktWarning,
            stacklevel=2,
        )
    # What stands in the padding does not count, but a model must have it: a tokenizer may have tokens beyond the model's.
    pad = min(pad, max(max(e.input_ids) for e in examples))
    return Seeds(examples, str(path), pad, writer.today if writer.dated else None)


def _longest_token(tokenizer: Any) -> int:
    """Characters of the longest token: no more than this many times `max_length` of a text can be kept."""
    known: dict[str, int] = getattr(tokenizer, "get_vocab", dict)()
    return max((len(token) for token in known), default=1) + 1


def _encode(
    pieces: list[Piece], special: bool, tokenizer: Any, loss: str, max_length: int, where: str, number: int
) -> Example:
    """Tokenize the joined text once, so that no token boundary depends on where the answer starts."""
    text = "".join(piece for piece, _ in pieces)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PktError(
            f"{where}: not text: half of a surrogate pair at character {error.start}; repair the row"
        ) from error
    bounds: list[tuple[int, int]] = []
    position = 0
    for piece, answer in pieces:
        if answer:
            bounds.append((position, position + len(piece)))
        position += len(piece)
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        ids: list[int] = list(encoded["input_ids"])
        # A token that carries the end of the prompt and the start of the answer belongs to the answer.
        counts = [e > s and any(s < b and a < e for a, b in bounds) for s, e in encoded["offset_mapping"]]
    else:
        ids, counts = [], []
        for index, (piece, answer) in enumerate(pieces):
            part = tokenizer(piece, add_special_tokens=False)["input_ids"]
            if special and index == 0:
                whole = tokenizer(piece)["input_ids"]
                front = whole[: len(whole) - len(part)] if whole[-len(part) :] == part else []
                ids, counts = list(front), [False] * len(front)
            ids += part
            counts += [answer] * len(part)
    while len(ids) > 1 and ids[-1] == ids[-2] == tokenizer.eos_token_id and not counts[-1] and counts[-2]:
        # A tokenizer that ends every text itself, after the end token that ends the answer.
        ids, counts = ids[:-1], counts[:-1]
    start = counts.index(True) if True in counts else len(ids)
    last = len(counts)
    while last and not counts[last - 1]:
        last -= 1
    while last and counts[last - 1]:
        last -= 1
    prompt_ids = ids[:last]
    length = len(ids)
    ids, counts = ids[:max_length], counts[:max_length]
    labels = [t if loss == "all" or counted else IGNORE for t, counted in zip(ids, counts, strict=True)]
    if all(label == IGNORE for label in labels[1:]):
        if length > max_length:
            raise PktError(
                f"{where}: no target token is left after truncation to {max_length} of {length} tokens (the answer "
                f"starts at token {start}); raise max_length (--max-length) or shorten the prompt"
            )
        raise PktError(f"{where}: no target token; the answer is empty or a single token with nothing before it")
    answer_text = pieces[-1][0] if pieces[-1][1] else next((p for p, a in reversed(pieces) if a), "")
    return Example(ids, labels, prompt_ids, answer_text, number, length > max_length)
