"""Published data sets as rows of pkt's own form, with the prompts that the paper's evaluation had (open-instruct, 2023)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pkt.errors import PktError
from pkt.files import atomic_file
from pkt.seeds import read_rows
from pkt.training import final_answer

Source = Literal["gsm8k", "mmlu", "super_ni"]
LETTERS = "ABCD"


def convert(source: Source, data: Path, out: Path, *, shots: int = 0, examples: Path | None = None) -> int:
    """Write rows {"messages", "group"} made of a data set's JSONL file; returns how many.

    gsm8k: {"question", "answer"} or {"messages"}, answers that end in "#### N". mmlu: {"subject", "question", "choices",
    "answer"}, the answer a letter or its number. super_ni: {"definition", "input", "output", "task"}, the output a text
    or several that are right, which become "references". shots: examples put before each question, the first of the file `examples`
    (of mmlu, of the same subject).
    """
    if shots < 0 or (shots and examples is None):
        raise PktError(f"shots={shots} needs a file of examples to take them from (--examples)")
    given = [] if examples is None else list(read_rows(examples))
    makers = {"gsm8k": _gsm8k, "mmlu": _mmlu, "super_ni": _super_ni}
    rows = list(makers[source](data, shots, examples, given))
    if not rows:
        raise PktError(f"{data} has no rows")
    with atomic_file(out) as scratch:
        scratch.write_text(
            "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8", newline="\n"
        )
    return len(rows)


def _chat(question: str, answer: str, group: str | None = None) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages} if group is None else {"group": group, "messages": messages}


def _text(row: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(row.get(key), str):
        raise PktError(f"{where}: no text under {key!r}; is this the data set it is taken for?")
    return str(row[key])


def _problem(row: dict[str, Any], where: str) -> tuple[str, str]:
    if "messages" in row:
        try:
            question, answer = (str(message["content"]) for message in row["messages"])
        except (TypeError, KeyError, ValueError):
            raise PktError(f"{where}: a problem is one question and one answer") from None
        return question, answer
    return _text(row, "question", where), _text(row, "answer", where)


def _gsm8k(
    data: Path, shots: int, examples: Path | None, given: Sequence[tuple[int, dict[str, Any]]]
) -> Iterator[dict[str, Any]]:
    shown = ""
    for number, row in given[:shots]:
        question, answer = _problem(row, f"{examples}:{number}")
        told = answer.rsplit("####", 1)[0].strip()
        shown += f"Question: {question}\nAnswer: {told} So the answer is {final_answer(answer, 'number')}.\n\n"
    head = "Answer the following question" + ("s.\n\n" if shots else ".\n\n")
    for number, row in read_rows(data):
        question, answer = _problem(row, f"{data}:{number}")
        if not final_answer(answer, "number"):
            raise PktError(f"{data}:{number}: the answer has no number")
        yield _chat(f"{head}{shown}Question: {question}", answer)


def _asked(row: dict[str, Any], where: str) -> tuple[str, str]:
    """The question with its choices, and the letter of the right one."""
    question, options = _text(row, "question", where), row.get("choices")
    if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS):
        raise PktError(f"{where}: a question has two to four choices")
    right = str(row.get("answer")).strip()
    letter = LETTERS[int(right)] if right.isdigit() and int(right) < len(options) else right
    if letter not in LETTERS[: len(options)] or not letter:
        raise PktError(f"{where}: the answer {right!r} is none of the choices {', '.join(LETTERS[: len(options)])}")
    listed = "".join(f"\n{name}. {text}" for name, text in zip(LETTERS, options, strict=False))
    return f"{question}{listed}\nAnswer:", letter


def _mmlu(
    data: Path, shots: int, examples: Path | None, given: Sequence[tuple[int, dict[str, Any]]]
) -> Iterator[dict[str, Any]]:
    for number, row in read_rows(data):
        where = f"{data}:{number}"
        subject = _text(row, "subject", where)
        mine = [(n, r) for n, r in given if r.get("subject") == subject][:shots]
        if len(mine) < shots:
            raise PktError(f"{examples} has {len(mine)} examples of {subject}; {shots} are asked for")
        shown = "".join(f"{q} {a}\n\n" for q, a in (_asked(r, f"{examples}:{n}") for n, r in mine))
        question, letter = _asked(row, where)
        head = f"The following are multiple choice questions (with answers) about  {subject.replace('_', ' ')}.\n\n"
        yield _chat(f"{head}{shown}{question}", letter, subject)


def _super_ni(
    data: Path, shots: int, examples: Path | None, given: Sequence[tuple[int, dict[str, Any]]]
) -> Iterator[dict[str, Any]]:
    if shots:
        raise PktError("super_ni is asked without examples, as the paper's evaluation did")
    for number, row in read_rows(data):
        where = f"{data}:{number}"
        output = row.get("output")
        answer = output[0] if isinstance(output, list) and output else output
        if not isinstance(answer, str) or (isinstance(output, list) and not all(isinstance(o, str) for o in output)):
            raise PktError(f"{where}: no text under 'output'")
        question = f"{_text(row, 'definition', where)}\n\nInput: {_text(row, 'input', where)}\n\nOutput:"
        row_ = _chat(question, answer, _text(row, "task", where))
        yield row_ | {"references": output} if isinstance(output, list) and len(output) > 1 else row_
