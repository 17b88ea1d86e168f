"""Which of two answers a judge prefers: AlpacaFarm's win rate against the rows' own answers, by any OpenAI-compatible endpoint or a
model here, and the judge that says "the longer one", which costs nothing and is what a win rate must be held against.

Every item is judged in both orders, since judges favour a place; an item's score is the mean of the two, a tie half a win.
Verdicts are written as they come, so that an endpoint that goes away costs what it did not say.
"""

from __future__ import annotations

import functools
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pkt.errors import PktError
from pkt.files import os_errors
from pkt.models import load_model, load_tokenizer
from pkt.seeds import Seeds, read_rows

TEMPLATE = 1  # raised by hand when what a judge is asked changes
_ASKED = (
    "Two answers to an instruction follow. Say which one a careful person would prefer.\n\nInstruction:\n{question}\n\n"
    "Answer A:\n{a}\n\nAnswer B:\n{b}\n\nReply with one letter: A, B, or C if neither is better."
)
_SAID = re.compile(r"\W*(?:[Aa]nswer\W+)?([ABC])\b")
_SCORES = {"A": 1.0, "B": 0.0, "C": 0.5}
_TRIES, _PAUSE = 3, 1.0  # of an endpoint that fails, and seconds before the second


@dataclass(frozen=True)
class Judge:
    """model: its name at an OpenAI-compatible endpoint (https://…/v1), or where there is none a model or folder here; key: the
    environment variable that holds the endpoint's key; at_once: questions asked at a time."""

    model: str
    endpoint: str | None = None
    key: str = "OPENAI_API_KEY"
    at_once: int = 4


def longest_wins(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """Of each item 1 where the answer is longer than the reference, ½ where it is as long."""
    lengths = [(len(a.strip()), len(b.strip())) for a, b in zip(answers, references, strict=True)]
    return [0.5 if a == b else float(a > b) for a, b in lengths]


def instructions(rows: Seeds, tokenizer: Any) -> list[str]:
    """What each row asks, without a template's marks where the row is a conversation."""
    found = []
    for example, (_, row) in zip(rows, read_rows(rows.source), strict=False):
        messages = row.get("messages")
        if isinstance(messages, list):
            asked = [m["content"] for m in messages[:-1] if isinstance(m, dict) and isinstance(m.get("content"), str)]
            found.append("\n\n".join(asked))
        else:
            found.append(str(tokenizer.decode(example.prompt_ids, skip_special_tokens=True)))
    return found


def win_rates(
    judge: Judge, questions: Sequence[str], answers: Sequence[str], references: Sequence[str], kept: Path
) -> list[float]:
    """Of each item how often the judge prefers the answer to the reference, over both orders; a reply that says neither is a tie.

    kept: JSONL file of what was said, a line an item; what it holds is not asked again. Raises `PktError` for an endpoint that does
    not answer, with how many items are judged.
    """
    said = _read(kept, len(answers))
    left = [i for i in range(len(answers)) if i not in said]
    ask = _local(judge.model) if judge.endpoint is None else functools.partial(_asked_over_http, judge)

    def both(i: int) -> tuple[str, str]:
        texts = {"question": questions[i], "a": answers[i], "b": references[i]}
        return ask(_ASKED.format(**texts)), ask(_ASKED.format(**texts | {"a": references[i], "b": answers[i]}))

    kept.parent.mkdir(parents=True, exist_ok=True)
    pool = ThreadPoolExecutor(1 if judge.endpoint is None else max(1, judge.at_once))
    try:
        with os_errors(f"writing {kept}"), kept.open("a", encoding="utf-8") as file:
            for i, replies in zip(left, pool.map(both, left), strict=True):
                said[i] = replies
                file.write(json.dumps({"item": i, "said": replies}) + "\n")
                file.flush()
    except _DownError as error:
        raise PktError(
            f"the judge at {judge.endpoint} does not answer ({error}); {len(said)} of {len(answers)} items are judged and kept: "
            "run the same command again when it does"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
    return [(score(said[i][0]) + 1.0 - score(said[i][1])) / 2 for i in range(len(answers))]


def score(reply: str) -> float:
    """1 for the first answer, 0 for the second, ½ for neither or a reply that does not say."""
    found = _SAID.match(reply)
    return _SCORES[found[1]] if found else 0.5


def _read(kept: Path, count: int) -> dict[int, tuple[str, str]]:
    """What was said before; the last line may have been cut off by a kill, which is then asked again."""
    found: dict[int, tuple[str, str]] = {}
    if not kept.is_file():
        return found
    whole = kept.read_bytes().rpartition(b"\n")[0]
    for line in whole.decode("utf-8").split("\n") if whole else ():
        value = json.loads(line)
        if value["item"] < count:
            found[value["item"]] = (value["said"][0], value["said"][1])
    with os_errors(f"writing {kept}"):
        kept.write_bytes(whole + b"\n" if whole else b"")
    return found


class _DownError(Exception):
    """An endpoint that does not answer, or not with what was asked for."""


def _asked_over_http(judge: Judge, text: str) -> str:
    """The reply of an endpoint, asked up to three times where it is busy, broken or away."""
    body = {"model": judge.model, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 8}
    headers = {"Content-Type": "application/json"}
    if os.environ.get(judge.key):
        headers["Authorization"] = f"Bearer {os.environ[judge.key]}"
    url = f"{str(judge.endpoint).rstrip('/')}/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    reason = ""
    for attempt in range(_TRIES):
        time.sleep(attempt * _PAUSE)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return str(json.load(answer)["choices"][0]["message"]["content"] or "")
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {error.reason}"
            if error.code != 429 and error.code < 500:
                break
        except (OSError, ValueError) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        except (KeyError, IndexError, TypeError):
            reason = "its reply has no choices[0].message.content"
            break
    raise _DownError(reason)


@functools.lru_cache(1)
def _local(name: str) -> Callable[[str], str]:
    """A judge here: the letter that it gives the most probability after its template's mark."""
    model, tokenizer = load_model(name, dtype=torch.float32), load_tokenizer(name)
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    letters = {letter: tokenizer(letter, add_special_tokens=False)["input_ids"][-1] for letter in "AB"}
    if len(set(letters.values())) < 2:
        raise PktError(f"{name} cannot judge: its tokenizer does not tell A from B")

    @torch.no_grad()
    def ask(text: str) -> str:
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"]])
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits[0, -1].float()
        a, b = (float(logits[token]) for token in letters.values())
        return "C" if a == b else "A" if a > b else "B"

    return ask
