"""How a model does on rows, item by item: loss, exact match, the likeliest of some answers, and overlap with the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pkt.errors import PktError
from pkt.extras import needs
from pkt.models import rows_apart
from pkt.options import AnswerRule
from pkt.seeds import IGNORE, Seeds, collate, read_rows
from pkt.studying.judging import longest_wins
from pkt.training import Stops, answers_of, expected_answers, final_answer, row_losses

Metric = Literal["nll", "exact_match", "choice", "rouge_l", "win_rate", "longest_wins", "lm_eval"]
LOWER = {
    "nll": True,
    **dict.fromkeys(("exact_match", "choice", "rouge_l", "win_rate", "longest_wins", "lm_eval"), False),
}
DECODED = frozenset(("exact_match", "rouge_l", "win_rate", "longest_wins"))  # made of what the model writes


def measured(
    model: Any,
    tokenizer: Any,
    rows: Seeds,
    metrics: tuple[Metric, ...],
    *,
    answer: AnswerRule,
    max_new_tokens: int,
    stop: Sequence[str] = (),
) -> tuple[dict[str, list[Any]], list[str]]:
    """By item, and what the model wrote where that is asked for.

    nll: [loss in nats, tokens]. exact_match: whether the final answer is one of the row's. choice: whether the row's answer is the
    likeliest of all answers in the file, by its first token. rouge_l: ROUGE-L's F with a stemmer (`rouge_score`), of several
    answers that are right the best. longest_wins: whether it is longer than the row's. What a judge says is not asked here.
    """
    found: dict[str, list[Any]] = {}
    texts: list[str] = []
    if "nll" in metrics:
        found["nll"] = [list(row) for row in row_losses(model, rows)]
    if "choice" in metrics:
        found["choice"] = choices(model, rows)
    if "exact_match" in metrics:
        wanted = expected_answers(rows, Stops.of(model, tokenizer), tokenizer, answer)
    if DECODED & set(metrics):
        texts = [cut(t, stop) for t in answers_of(model, rows, tokenizer, max_new_tokens=max_new_tokens)]
        known = references_of(rows)
    if "exact_match" in metrics:
        each = zip(texts, wanted, known, strict=True)
        found["exact_match"] = [matches(text, [right, *others[1:]], answer) for text, right, others in each]
    if "rouge_l" in metrics:
        found["rouge_l"] = [max(rouge_l(text, r) for r in others) for text, others in zip(texts, known, strict=True)]
    if "longest_wins" in metrics:
        found["longest_wins"] = longest_wins(texts, [others[0].strip() for others in known])
    return found, texts


def cut(text: str, stop: Sequence[str]) -> str:
    """What stands before the first of the strings that end an answer."""
    return text[: min((text.find(s) for s in stop if s in text), default=len(text))]


def matches(text: str, references: Sequence[str], answer: AnswerRule) -> bool:
    """Whether a text's final answer is that of any of the references."""
    return final_answer(text, answer) in {final_answer(reference, answer) for reference in references}


def references_of(rows: Seeds) -> list[list[str]]:
    """The answers that are right for each row: its "references", or its answer alone, without what a template puts after it.

    Raises `PktError` for what is no text.
    """
    found = []
    for example, (number, row) in zip(rows, read_rows(rows.source), strict=False):
        messages = row.get("messages") or [{"content": row.get("completion")}]
        plain = messages[-1].get("content")
        given = row.get("references", [plain if isinstance(plain, str) else example.answer])
        if not isinstance(given, list) or not given or not all(isinstance(each, str) for each in given):
            raise PktError(f"{rows.source}:{number}: references must be a list of texts, the row's answer first")
        found.append(given)
    return found


def figure(metric: str, values: list[Any]) -> float:
    """The figure of a test from its items: nll in nats a token, the others a mean."""
    if metric == "nll":
        return float(sum(loss for loss, _ in values) / max(1, sum(count for _, count in values)))
    return float(sum(values) / len(values))


@torch.no_grad()
def choices(model: Any, rows: Seeds, *, batch_size: int = 16) -> list[bool]:
    """Whether each row's answer is the likeliest of the answers that occur in the file, compared by the first token.

    One forward pass a batch, no decoding. Raises `PktError` where two answers begin with the same token.
    """
    first = [next(i for i, label in enumerate(e.labels) if label != IGNORE) for e in rows]
    tokens: dict[str, int] = {}
    for example, place in zip(rows, first, strict=True):
        tokens.setdefault(example.answer.strip(), example.labels[place])
    known = sorted(set(tokens.values()))
    if not 2 <= len(known) == len(tokens) <= 100:
        raise PktError(
            f"{rows.source}: choice compares answers by their first token, and its {len(tokens)} answers have {len(known)}; write "
            "rows whose answers are a few letters, or measure nll"
        )
    device, found = next(model.parameters()).device, []
    training = model.training
    model.eval()
    with rows_apart(model):
        for start in range(0, len(rows), batch_size):
            some = list(rows[start : start + batch_size])
            batch = {k: v.to(device) for k, v in collate(some, rows.pad_id).items() if k != "labels"}
            logits: Tensor = model(**batch, use_cache=False).logits
            for index, example in enumerate(some):
                place = first[start + index]
                best = int(logits[index, place - 1, known].argmax())
                found.append(known[best] == example.labels[place])
    model.train(training)
    return found


def rouge_l(text: str, reference: str) -> float:
    """ROUGE-L's F measure with a stemmer, as open-instruct and lm-eval score Super-NI."""
    needs("rouge_score", "study", "measure ROUGE-L")
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    return float(scorer.score(reference.strip(), text.strip())["rougeL"].fmeasure)


def groups_of(file: str, count: int) -> list[str] | None:
    """The group ("group", "subject" or "task") of each of the first rows; None where rows have none.

    Raises `PktError` where some have and some have not.
    """
    found: list[str | None] = []
    for _, row in read_rows(file):
        if len(found) == count:
            break
        found.append(next((row[k] for k in ("group", "subject", "task") if isinstance(row.get(k), str)), None))
    named = [g for g in found if g is not None]
    if not named or len(set(named)) < 2:
        return None
    if len(named) < len(found):
        raise PktError(f"{file}: {len(found) - len(named)} rows have no group, the others do; give every row one")
    return named
