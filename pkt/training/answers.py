"""What a model says and what a row says, made comparable: where a turn ends, and which part of it is the final answer."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pkt.errors import PktError
from pkt.options import AnswerRule
from pkt.seeds import Seeds
from pkt.templates import turn_end

MARK = "####"
# A minus belongs to a number only where nothing stands before it that it could be subtracted from.
_NUMBER = re.compile(r"((?<![\w)])[-\N{MINUS SIGN}])?[$€£¥]?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\w)\.\d+)")

_PAPERS = re.compile(r"[-+]?\d*\.\d+|\d+")  # open-instruct's eval/gsm/run_eval.py, 2023
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Stops:
    """What ends a turn: token ids; and the template's own words, where no token of its own does."""

    ids: tuple[int, ...]
    text: str = ""

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> Stops:
        """The model's own stop list, the tokenizer's end token, and what the chat template puts after an answer."""
        own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ids = [*(own if isinstance(own, (list, tuple)) else [own]), tokenizer.eos_token_id]
        strange = [token for token in ids if token is not None and not isinstance(token, int)]
        if strange:
            raise PktError(
                f"the model's generation_config.json has {strange[0]!r} for an eos_token_id; write a token's number"
            )
        closing = turn_end(tokenizer)
        marks = [i for i in tokenizer(closing, add_special_tokens=False)["input_ids"] if _is_mark(i, tokenizer)]
        return cls(
            tuple(sorted({token for token in (*ids, *marks[:1]) if token is not None})),
            "" if marks else closing.strip(),
        )

    def said(self, ids: Sequence[int], tokenizer: Any) -> str:
        """The text of token ids up to the end of the turn."""
        end = next((place for place, token in enumerate(ids) if token in self.ids), len(ids))
        text = str(tokenizer.decode(ids[:end], skip_special_tokens=True))
        return text.partition(self.text)[0] if self.text else text


def _is_mark(token: int, tokenizer: Any) -> bool:
    return token in tokenizer.all_special_ids or token in getattr(tokenizer, "added_tokens_decoder", {})


def expected_answers(data: Seeds, stops: Stops, tokenizer: Any, rule: AnswerRule) -> list[str]:
    """The final answers of the rows, through the tokenizer as the model's own go.

    Raises `PktError` for a row that should have a number and has none.
    """
    found = []
    for index, example in enumerate(data):
        ids = tokenizer(example.answer, add_special_tokens=False)["input_ids"]
        found.append(final_answer(stops.said(ids, tokenizer), rule))
        if rule == "number" and not found[-1]:
            raise PktError(
                f"{data.where(index)}: the answer has no number to compare; use the rule mark (--answer mark)"
            )
    return found


def final_answer(text: str, rule: AnswerRule = "mark") -> str:
    """The part of an answer that exact match compares.

    "mark": what follows the last "####" in its line, or the whole text where there is none. "number": the last number
    of that, in one spelling: 1,000.50 is 1000.5, "the answer is -3." is -3; "" where there is none. "words": the whole text in
    lower case without punctuation, its words a space apart (Super-NI's exact match). "paper": the last number as the paper's
    evaluation of GSM8K took it, which loses a whole number's minus and a decimal's point.
    """
    if rule not in get_args(AnswerRule):
        raise PktError(f"answer={rule!r} is unknown; choose one of {', '.join(get_args(AnswerRule))}")
    if rule == "words":
        return _plain(text)
    if rule == "paper":
        found = _PAPERS.findall(text.replace(",", ""))
        return _plain(found[-1] if found else text)
    if MARK in text:
        text = text.rsplit(MARK, 1)[1].strip().partition("\n")[0].strip().rstrip(".")
    if rule == "mark":
        return text.strip()
    numbers = list(_NUMBER.finditer(text))
    return _spelled(*numbers[-1].groups()) if numbers else ""


def _plain(text: str) -> str:
    return " ".join(text.lower().translate(_PUNCTUATION).split())


def _spelled(minus: str | None, digits: str) -> str:
    whole, _, rest = digits.replace(",", "").partition(".")
    whole, rest = whole.lstrip("0") or "0", rest.rstrip("0")
    value = f"{whole}.{rest}" if rest else whole
    return f"-{value}" if minus and value != "0" else value
