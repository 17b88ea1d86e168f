"""How well a model does on held-out rows: mean negative log-likelihood of the answers, and exact match by greedy decoding."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pkt.errors import PktError
from pkt.models import decoder_layers, position_limit, rows_apart, unwrap
from pkt.options import AnswerRule
from pkt.progress import bar
from pkt.scoring import per_sample_loss
from pkt.seeds import IGNORE, Example, Seeds, collate
from pkt.training.answers import Stops, expected_answers, final_answer


@dataclass(frozen=True)
class Evaluation:
    """nll: nats per answer token, over all answer tokens of all rows; exact_match: share of rows, or None if not asked."""

    rows: int
    tokens: int
    nll: float
    exact_match: float | None = None


def evaluate(
    model: Any,
    data: Seeds,
    *,
    tokenizer: Any = None,
    exact_match: bool = False,
    answer: AnswerRule = "mark",
    batch_size: int = 32,
    max_new_tokens: int = 128,
    progress: bool = False,
) -> Evaluation:
    """Evaluate `model` on tokenized rows.

    exact_match: also decode greedily, up to the model's own stop tokens or what ends a turn in the chat template, and compare
    final answers as `answer` says: "mark", what follows "####" when the row has it, else the whole text; "number", the last
    number (`pkt.training.final_answer`). Needs the tokenizer, and rows with a prompt.

    Raises `PktError` for rows with tokens or positions that the model does not have, and for a loss that is not finite.
    """
    matches = None
    if exact_match:
        matches = row_matches(model, data, tokenizer, answer=answer, max_new_tokens=max_new_tokens, progress=progress)
    losses = row_losses(model, data, batch_size=batch_size, progress=progress)
    loss, tokens = sum(loss for loss, _ in losses), sum(count for _, count in losses)
    share = None if matches is None else sum(matches) / len(data)
    return Evaluation(len(data), tokens, loss / max(1, tokens), share)


@torch.no_grad()
def row_losses(model: Any, data: Seeds, *, batch_size: int = 32, progress: bool = False) -> list[tuple[float, int]]:
    """Of each row the negative log-likelihood of its answer's tokens, summed, in nats, and how many they are.

    Raises `PktError` for rows with tokens or positions that the model does not have, and for a loss that is not finite.
    """
    data.check_fits(model.get_input_embeddings().weight.shape[0], _positions(model), "the model")
    device = next(model.parameters()).device
    found: dict[int, tuple[float, int]] = {}
    order = sorted(range(len(data)), key=lambda i: len(data[i].input_ids))
    with (
        _measured(model),
        rows_apart(model),
        bar("measuring", len(order), unit="rows", shown=progress) as advance,
    ):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = {k: v.to(device) for k, v in collate([data[i] for i in chosen], data.pad_id).items()}
            labels = batch.pop("labels")
            counts = (labels[:, 1:] != IGNORE).sum(1)
            losses = per_sample_loss(model(**batch, use_cache=False).logits, labels).double() * counts
            found |= dict(zip(chosen, zip(losses.tolist(), counts.tolist(), strict=True), strict=True))
            advance(len(found))
    total = sum(loss for loss, _ in found.values())
    if not math.isfinite(total):
        raise PktError(
            f"the loss on {data.source} is {total}; the model's weights are damaged or its training diverged"
        )
    return [found[i] for i in range(len(data))]


@torch.no_grad()
def row_matches(
    model: Any,
    data: Seeds,
    tokenizer: Any,
    *,
    answer: AnswerRule = "mark",
    max_new_tokens: int = 128,
    progress: bool = False,
) -> list[bool]:
    """Whether each row's final answer (`evaluate` says what that is) is the one that greedy decoding ends with.

    Needs the tokenizer, and rows with a prompt.
    """
    check_answerable(model, data, tokenizer)
    wanted = expected_answers(data, Stops.of(model, tokenizer), tokenizer, answer)
    texts = answers_of(model, data, tokenizer, max_new_tokens=max_new_tokens, progress=progress)
    return [final_answer(text, answer) == right for text, right in zip(texts, wanted, strict=True)]


@torch.no_grad()
def answers_of(
    model: Any, data: Seeds, tokenizer: Any, *, max_new_tokens: int = 128, progress: bool = False
) -> list[str]:
    """Each row's answer by greedy decoding. Raises `PktError` for rows that cannot be answered."""
    check_answerable(model, data, tokenizer)
    with _measured(model):
        return generate(model, tokenizer, list(data), batch_size=256, max_new_tokens=max_new_tokens, progress=progress)


def check_answerable(model: Any, data: Seeds, tokenizer: Any) -> None:
    """Raises `PktError` for rows without a prompt, and prompts that leave no position to answer in."""
    limit = _positions(model)
    if tokenizer is None or not all(e.prompt_ids for e in data):
        raise PktError("exact match, like all that decodes, needs the tokenizer and rows with a prompt")
    for index, example in enumerate(data):
        if limit is not None and len(example.prompt_ids) >= limit:
            raise PktError(
                f"{data.where(index)}: the prompt of {len(example.prompt_ids)} tokens leaves none of the model's {limit} positions "
                "to answer in; shorten it"
            )


@contextlib.contextmanager
def _measured(model: Any) -> Iterator[None]:
    """In eval mode inside, then as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def generate(
    model: Any,
    tokenizer: Any,
    examples: list[Example],
    *,
    batch_size: int,
    max_new_tokens: int,
    progress: bool = False,
) -> list[str]:
    """Greedy continuations of the examples' prompts, up to the end of the turn as `Stops.of` finds it."""
    device = next(model.parameters()).device
    stops = Stops.of(model, tokenizer)
    rows, limit = model.get_input_embeddings().weight.shape[0], _positions(model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    pad = pad if pad < rows else 0
    texts: dict[int, str] = {}
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt_ids))
    with bar("answering", len(order), unit="rows", shown=progress) as advance:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            longest = max(len(examples[i].prompt_ids) for i in chosen)
            ids = torch.full((len(chosen), longest), pad)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(chosen):
                prompt = examples[i].prompt_ids
                ids[row, longest - len(prompt) :] = torch.tensor(prompt)
                mask[row, longest - len(prompt) :] = 1
            with rows_apart(model):
                out = model.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    max_new_tokens=max_new_tokens if limit is None else min(max_new_tokens, limit - longest),
                    do_sample=False,
                    pad_token_id=pad,
                    eos_token_id=list(stops.ids) or None,
                    **({"stop_strings": [stops.text], "tokenizer": tokenizer} if stops.text else {}),
                )
            for i, row in zip(chosen, out[:, longest:].tolist(), strict=True):
                texts[i] = stops.said(row, tokenizer)
            advance(len(texts))
    return [texts[i] for i in range(len(examples))]


def _positions(model: Any) -> int | None:
    plain = unwrap(model)
    return position_limit(plain, decoder_layers(plain))
