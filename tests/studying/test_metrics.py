"""Figures of rows against what they are said to be, and data sets as rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import pkt
from pkt import PktError
from pkt.models import load_model, load_tokenizer
from pkt.seeds import IGNORE, load_seeds
from pkt.studying import convert
from pkt.studying.judging import longest_wins
from pkt.studying.metrics import choices, cut, figure, groups_of, matches, measured, references_of, rouge_l
from pkt.training import final_answer

ASSETS = Path(pkt.__file__).parent / "demo" / "assets"


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def read(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def student() -> tuple[Any, Any]:
    return load_model(ASSETS / "student", dtype=torch.float32), load_tokenizer(ASSETS / "student")


def test_the_likeliest_choice_is_that_of_plain_transformers(student: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = student
    chat = [("Is it A or B?", "A"), ("And now, B or A, or C after all?", "B"), ("What?", "C"), ("A?", "A"), ("B", "C")]
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in chat]
    seeds = load_seeds(write(tmp_path / "rows.jsonl", rows), tokenizer)
    letters = {e.answer.strip()[0]: next(label for label in e.labels if label != IGNORE) for e in seeds}
    assert sorted(letters) == ["A", "B", "C"]
    expected = []
    for example in seeds:
        place = next(i for i, label in enumerate(example.labels) if label != IGNORE)
        logits = model(torch.tensor([example.input_ids[:place]])).logits[0, -1]
        best = max(letters, key=lambda letter: float(logits[letters[letter]].detach()))
        expected.append(best == example.answer.strip()[0])
    assert choices(model, seeds, batch_size=2) == expected
    found, texts = measured(model, tokenizer, seeds, ("nll", "choice"), answer="mark", max_new_tokens=4)
    assert not texts
    assert figure("choice", found["choice"]) == sum(expected) / 5
    assert figure("nll", found["nll"]) == pytest.approx(
        sum(s for s, _ in found["nll"]) / sum(n for _, n in found["nll"])
    )


def test_of_several_references_the_best_counts(student: tuple[Any, Any], tmp_path: Path) -> None:
    _, tokenizer = student
    asked = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It is Four!"}]
    rows = [{"messages": asked, "references": ["It is Four!", "4", "FOUR, it is"]}, {"messages": asked}]
    seeds = load_seeds(write(tmp_path / "rows.jsonl", rows), tokenizer)
    known = references_of(seeds)
    assert known == [["It is Four!", "4", "FOUR, it is"], ["It is Four!"]]
    assert matches("four it is.", known[0], "words")
    assert not matches("four it is.", known[1], "words")
    assert matches("it is FOUR", known[1], "words")
    for wrong in ("4", [], [4]):
        rows[1]["references"] = wrong
        with pytest.raises(PktError, match=r"rows\.jsonl:2: references must be a list of texts"):
            references_of(load_seeds(write(tmp_path / "rows.jsonl", rows), tokenizer))


def test_an_answer_ends_at_the_first_stop() -> None:
    text = "So the answer is 4.\n\nQuestion: And 5?\nAnswer: 9"
    assert cut(text, ("Answer:", "\n\nQuestion:")) == "So the answer is 4."
    assert cut(text, ("nowhere",)) == cut(text, ()) == text
    assert final_answer(cut(text, ("Question:",)), "number") == "4"


def test_rouge_l_is_that_of_the_reference_package() -> None:
    """F of the longest common subsequence of stemmed words: 5 of 6 and 6, and 2 of 2 and 3."""
    pytest.importorskip("rouge_score")
    assert rouge_l("the cat sat on the mat", "The cat is on the mat.") == pytest.approx(5 / 6)
    assert rouge_l("he runs", "He was running!") == pytest.approx(2 * 2 / (2 + 3))
    assert rouge_l("", "something") == 0.0


def test_a_study_measures_references_and_stops(student: tuple[Any, Any], tmp_path: Path) -> None:
    """What the model writes, once, through every metric that reads it; without references the row's answer is one."""
    model, tokenizer = student
    asked = [{"role": "user", "content": "What is 2+3?"}, {"role": "assistant", "content": "5"}]
    seeds = load_seeds(write(tmp_path / "plain.jsonl", [{"messages": asked}]), tokenizer)
    options: dict[str, Any] = {"answer": "words", "max_new_tokens": 6}
    _, (text,) = measured(model, tokenizer, seeds, ("exact_match",), **options)
    row = {"messages": asked, "references": ["5", text.upper() + "!"]}
    both = load_seeds(write(tmp_path / "both.jsonl", [row]), tokenizer)
    assert measured(model, tokenizer, seeds, ("exact_match",), **options)[0] == {"exact_match": [False]}
    assert measured(model, tokenizer, both, ("exact_match",), **options)[0] == {"exact_match": [True]}
    half = text[: len(text) // 2]
    stopped = measured(model, tokenizer, both, ("exact_match", "longest_wins"), **options, stop=(text[len(half) :],))
    assert stopped[1] == [half]
    assert stopped[0] == {"exact_match": [False], "longest_wins": longest_wins([half], ["5"])}


def test_choices_that_begin_alike_are_refused(student: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = student
    rows = [{"prompt": "Say:", "completion": f" {answer}"} for answer in ("A", "A.")]
    with pytest.raises(PktError, match="its 2 answers have 1"):
        choices(model, load_seeds(write(tmp_path / "rows.jsonl", rows), tokenizer))


def test_groups(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": "a", "subject": "x"}, {"text": "b", "subject": "y"}, {"text": "c"}]
    file = write(tmp_path / "rows.jsonl", rows)
    assert groups_of(str(file), 2) == ["x", "y"]
    with pytest.raises(PktError, match="1 rows have no group"):
        groups_of(str(file), 3)
    assert groups_of(str(write(tmp_path / "none.jsonl", [{"text": "a"}, {"text": "b"}])), 2) is None
    assert groups_of(str(write(tmp_path / "one.jsonl", [{"text": "a", "group": "x"}] * 2)), 2) is None


def test_gsm8k_as_the_paper_asks_it(tmp_path: Path) -> None:
    data = write(tmp_path / "test.jsonl", [{"question": "How many?", "answer": "Two and two.\n#### 1,004"}])
    shown = write(
        tmp_path / "train.jsonl",
        [{"messages": [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "It is one.\n#### 1"}]}],
    )
    assert convert("gsm8k", data, tmp_path / "zero.jsonl") == 1
    assert read(tmp_path / "zero.jsonl")[0]["messages"] == [
        {"role": "user", "content": "Answer the following question.\n\nQuestion: How many?"},
        {"role": "assistant", "content": "Two and two.\n#### 1,004"},
    ]
    convert("gsm8k", data, tmp_path / "one.jsonl", shots=1, examples=shown)
    assert read(tmp_path / "one.jsonl")[0]["messages"][0]["content"] == (
        "Answer the following questions.\n\nQuestion: One?\nAnswer: It is one. So the answer is 1.\n\nQuestion: How many?"
    )


def test_mmlu_as_the_paper_asks_it(tmp_path: Path) -> None:
    item = {"subject": "high_school_physics", "question": "Up?", "choices": ["yes", "no", "it\ndepends", "4"]}
    data = write(tmp_path / "test.jsonl", [{**item, "answer": "2"}, {**item, "subject": "law", "answer": "D"}])
    dev = write(
        tmp_path / "dev.jsonl", [{**item, "question": "Down?", "answer": 1}, {**item, "subject": "law", "answer": "A"}]
    )
    assert convert("mmlu", data, tmp_path / "rows.jsonl", shots=1, examples=dev) == 2
    first, second = read(tmp_path / "rows.jsonl")
    assert (first["group"], second["group"]) == ("high_school_physics", "law")
    asked, said = (message["content"] for message in first["messages"])
    assert asked == (
        "The following are multiple choice questions (with answers) about  high school physics.\n\n"
        "Down?\nA. yes\nB. no\nC. it\ndepends\nD. 4\nAnswer: B\n\n"
        "Up?\nA. yes\nB. no\nC. it\ndepends\nD. 4\nAnswer:"
    )
    assert said == "C"
    assert second["messages"][1]["content"] == "D"


def test_super_ni_as_the_paper_asks_it(tmp_path: Path) -> None:
    row = {"definition": "Translate.", "input": "oui", "output": ["yes", "yeah"], "task": "t1"}
    convert("super_ni", write(tmp_path / "d.jsonl", [row]), tmp_path / "rows.jsonl")
    assert read(tmp_path / "rows.jsonl") == [
        {
            "group": "t1",
            "references": ["yes", "yeah"],
            "messages": [
                {"role": "user", "content": "Translate.\n\nInput: oui\n\nOutput:"},
                {"role": "assistant", "content": "yes"},
            ],
        }
    ]


@pytest.mark.parametrize(
    ("source", "row", "shots", "said"),
    [
        ("gsm8k", {"question": "x", "answer": "none"}, 0, "the answer has no number"),
        ("gsm8k", {"question": "x"}, 0, "no text under 'answer'"),
        ("gsm8k", {"messages": [{"role": "user"}]}, 0, "one question and one answer"),
        ("gsm8k", {"question": "x", "answer": "#### 1"}, 2, "needs a file of examples"),
        (
            "mmlu",
            {"subject": "s", "question": "x", "choices": ["a", "b"], "answer": "C"},
            0,
            "none of the choices A, B",
        ),
        ("mmlu", {"subject": "s", "question": "x", "choices": ["a"], "answer": "A"}, 0, "two to four choices"),
        ("mmlu", {"subject": "s", "question": "x", "choices": ["a", "b"], "answer": ""}, 0, "none of the choices"),
        ("super_ni", {"definition": "x", "input": "y", "output": 3, "task": "t"}, 0, "no text under 'output'"),
    ],
)
def test_what_is_not_the_data_set_is_refused(source: Any, row: Any, shots: int, said: str, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", [row])
    with pytest.raises(PktError, match=said):
        convert(source, data, tmp_path / "out.jsonl", shots=shots)
    assert not (tmp_path / "out.jsonl").exists()
