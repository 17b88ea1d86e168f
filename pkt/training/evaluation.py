"""How well a model does on held-out rows: mean negative log-likelihood of the answers, and exact match by greedy decoding."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from pkt.errors import PktError
from pkt.scoring import per_sample_loss
from pkt.seeds import IGNORE, Example, Seeds, collate

MARK = "####"


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
    batch_size: int = 32,
    max_new_tokens: int = 128,
) -> Evaluation:
    """Evaluate `model` on tokenized rows.

    exact_match: also decode greedily and compare final answers (after "####" when the row has it, else the whole text).
    Needs the tokenizer, and rows with a prompt.

    Raises `PktError` for rows with tokens that the model does not have, and for a loss that is not finite.
    """
    losses = row_losses(model, data, batch_size=batch_size)
    matches = row_matches(model, data, tokenizer, max_new_tokens=max_new_tokens) if exact_match else None
    loss, tokens = sum(loss for loss, _ in losses), sum(count for _, count in losses)
    share = None if matches is None else sum(matches) / len(data)
    return Evaluation(len(data), tokens, loss / max(1, tokens), share)


@torch.no_grad()
def row_losses(model: Any, data: Seeds, *, batch_size: int = 32) -> list[tuple[float, int]]:
    """Of each row the negative log-likelihood of its answer's tokens, summed, in nats, and how many they are.

    Raises `PktError` for rows with tokens that the model does not have, and for a loss that is not finite.
    """
    data.check_vocabulary(model.get_input_embeddings().weight.shape[0], "the model")
    device = next(model.parameters()).device
    found: dict[int, tuple[float, int]] = {}
    order = sorted(range(len(data)), key=lambda i: len(data[i].input_ids))
    with _measured(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = {k: v.to(device) for k, v in collate([data[i] for i in chosen], data.pad_id).items()}
            labels = batch.pop("labels")
            counts = (labels[:, 1:] != IGNORE).sum(1)
            losses = per_sample_loss(model(**batch, use_cache=False).logits, labels).double() * counts
            found |= dict(zip(chosen, zip(losses.tolist(), counts.tolist(), strict=True), strict=True))
    total = sum(loss for loss, _ in found.values())
    if not math.isfinite(total):
        raise PktError(
            f"the loss on {data.source} is {total}; the model's weights are damaged or its training diverged"
        )
    return [found[i] for i in range(len(data))]


@torch.no_grad()
def row_matches(model: Any, data: Seeds, tokenizer: Any, *, max_new_tokens: int = 128) -> list[bool]:
    """Whether each row's final answer is the one that greedy decoding ends with. Needs the tokenizer, and rows with a prompt."""
    if tokenizer is None or not all(e.prompt_ids for e in data):
        raise PktError("exact match needs the tokenizer and rows with a prompt")
    with _measured(model):
        texts = generate(model, tokenizer, list(data), batch_size=256, max_new_tokens=max_new_tokens)
    return [final_answer(t) == final_answer(_plain(e.answer, tokenizer)) for t, e in zip(texts, data, strict=True)]


@contextlib.contextmanager
def _measured(model: Any) -> Iterator[None]:
    """In eval mode inside, then as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def generate(model: Any, tokenizer: Any, examples: list[Example], *, batch_size: int, max_new_tokens: int) -> list[str]:
    """Greedy continuations of the examples' prompts."""
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    texts: dict[int, str] = {}
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt_ids))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = max(len(examples[i].prompt_ids) for i in chosen)
        ids = torch.full((len(chosen), longest), pad)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(chosen):
            prompt = examples[i].prompt_ids
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
        )
        for i, row in zip(chosen, out[:, longest:].tolist(), strict=True):
            texts[i] = tokenizer.decode(row, skip_special_tokens=True)
    return [texts[i] for i in range(len(examples))]


def _plain(answer: str, tokenizer: Any) -> str:
    for token in tokenizer.all_special_tokens:
        answer = answer.replace(token, "")
    return answer


def final_answer(text: str) -> str:
    """What follows "####", up to the end of its line; the stripped text where there is none."""
    if MARK not in text:
        return text.strip()
    match = re.match(r"\s*([^\n]*)", text.rsplit(MARK, 1)[1])
    return match[1].strip().rstrip(".") if match else ""
