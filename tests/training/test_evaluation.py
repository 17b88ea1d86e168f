"""Exact match: where a turn ends, what of it is compared, and that a model which is right is said to be right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from conftest import ASSETS, save

import pkt
from pkt.models import load_model, load_tokenizer
from pkt.seeds import Seeds, load_seeds
from pkt.training import evaluate, final_answer
from pkt.training.answers import Stops
from pkt.training.evaluation import generate

TURNS = (
    "{% for m in messages %}{{ '<|user|>\\n' if m.role == 'user' else '<|assistant|>\\n' }}{{ m.content + CLOSING }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def tokenizer_closing_with(closing: str, folder: Path, *, special: bool | None = True) -> Any:
    """The demo's tokenizer with a chat template that closes a turn so; special: as a token of its own (None: as plain text)."""
    from tokenizers import AddedToken

    found = load_tokenizer(ASSETS / "teacher")
    if special is not None:
        found.backend_tokenizer.add_tokens([AddedToken(closing.strip(), special=special, normalized=False)])
    found.chat_template = TURNS.replace("CLOSING", json.dumps(closing))
    found.save_pretrained(folder)
    return load_tokenizer(folder)


def taught(rows: Seeds, vocab: int) -> Any:
    """A tiny model that has learnt the rows by heart."""
    model = zoo.llama(hidden=64, layers=2, heads=4, kv=2, ffn=96, vocab=vocab)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    batch = rows.batches(len(rows))[0]
    for _ in range(80):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def chat(folder: Path, tokenizer: Any, *answers: str) -> Seeds:
    rows = [
        {"messages": [{"role": "user", "content": f"{i} plus 3?"}, {"role": "assistant", "content": answer}]}
        for i, answer in enumerate(answers)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return load_seeds(folder / "rows.jsonl", tokenizer)


@pytest.mark.parametrize(
    ("closing", "special"),
    [("<end_of_turn>\n", True), ("<|end|>\n", False), ("</turn>\n", None)],
    ids=["Gemma", "a token that is not special", "plain words"],
)
def test_a_turn_ends_where_the_template_ends_it(closing: str, special: bool | None, tmp_path: Path) -> None:
    tokenizer = tokenizer_closing_with(closing, tmp_path / "tokenizer", special=special)
    rows = chat(tmp_path, tokenizer, "0+3=3. #### 3", "1+3=4. #### 4")
    model = taught(rows, len(tokenizer))
    found = generate(model, tokenizer, list(rows), batch_size=2, max_new_tokens=40)
    assert [text.strip() for text in found] == ["0+3=3. #### 3", "1+3=4. #### 4"]
    assert evaluate(model, rows, tokenizer=tokenizer, exact_match=True, max_new_tokens=40).exact_match == 1.0


def test_the_models_own_stop_tokens_are_kept(tmp_path: Path, tokenizer: Any) -> None:
    model = zoo.llama(vocab=len(tokenizer))
    model.generation_config.eos_token_id = [7, 9]
    assert Stops.of(model, tokenizer).ids == tuple(sorted({7, 9, tokenizer.eos_token_id}))
    model.generation_config.eos_token_id = None
    assert Stops.of(model, tokenizer).ids == (tokenizer.eos_token_id,)
    ended = tokenizer_closing_with("<end_of_turn>\n", tmp_path / "tokenizer")
    assert len(ended) - 1 in Stops.of(model, ended).ids
    assert Stops.of(model, ended).text == ""
    assert Stops((3, 5)).said([8, 9, 5, 8], tokenizer) == tokenizer.decode([8, 9])


def test_an_answer_without_a_mark_is_compared_by_its_last_number(tmp_path: Path) -> None:
    tokenizer = tokenizer_closing_with("<end_of_turn>\n", tmp_path / "tokenizer")
    said = chat(tmp_path, tokenizer, "0 plus 3: the answer is 3.", "1 plus 3: the answer is 4.")
    model = taught(said, len(tokenizer))
    other = [{"messages": [{"role": "user", "content": f"{i} plus 3?"}, {"role": "assistant", "content": f"It is {i + 3}.0"}]}
             for i in range(2)]  # fmt: skip
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, other)))
    rows = load_seeds(tmp_path / "other.jsonl", tokenizer)
    options: dict[str, Any] = {"tokenizer": tokenizer, "exact_match": True, "max_new_tokens": 40}
    assert evaluate(model, rows, **options).exact_match == 0.0
    assert evaluate(model, rows, answer="number", **options).exact_match == 1.0
    words = chat(tmp_path, tokenizer, "It is 3.", "four")
    with pytest.raises(pkt.PktError, match=r"rows\.jsonl:2: the answer has no number to compare"):
        evaluate(model, words, answer="number", **options)
    with pytest.raises(pkt.PktError, match="answer='last' is unknown; choose one of mark, number, words, paper"):
        final_answer("3", "last")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("the answer is 10.", "10"),
        ("The answer is -3.50", "-3.5"),
        ("so \N{MINUS SIGN}4 degrees", "-4"),
        ("1,234,567.0 in all", "1234567"),
        ("$1,000", "1000"),
        ("between 3,4", "4"),
        ("10-3=7 and 5-2", "2"),
        ("(-2)", "-2"),
        ("-$5.00", "-5"),
        ("about .5", "0.5"),
        ("-0.0", "0"),
        ("007", "7"),
        ("17 apples\n#### 12 apples", "12"),
        ("no number", ""),
        ("123456789012345678901234567890.10", "123456789012345678901234567890.1"),
    ],
)
def test_the_last_number_in_one_spelling(text: str, number: str) -> None:
    assert final_answer(text, "number") == number


@pytest.mark.parametrize(
    ("text", "wanted", "alike"),
    [
        ("She pays $1,004 in all.", "1004", True),
        ("The answer is 18.00.", "18", False),  # the point goes, so 1800 is meant
        ("The answer is 3.0.", "30", True),
        ("The answer is -5.", "5", True),  # a whole number's minus goes
        ("The answer is -5.5.", "-5.5", True),
        ("So 3 and then .5", "5", True),
        ("I do not know", "i do not know!", True),
    ],
)
def test_the_last_number_as_the_papers_evaluation_took_it(text: str, wanted: str, alike: bool) -> None:
    assert (final_answer(text, "paper") == final_answer(wanted, "paper")) == alike


def test_words_are_compared_without_case_punctuation_and_spaces() -> None:
    """As open-instruct's Super-NI script does; articles stay."""
    assert final_answer("  The  Answer, it's: Yes!\n", "words") == "the answer its yes"
    assert final_answer("#### x", "words") == "x"
    assert final_answer("...", "words") == ""


def test_what_follows_the_mark() -> None:
    assert final_answer("2+2 #### 4.\nor so") == "4"
    assert final_answer("#### 3 #### 5") == "5"
    assert final_answer(" as it is ") == "as it is"
    assert final_answer("nothing ####") == ""


def test_generation_stays_within_the_models_positions(tmp_path: Path, tokenizer: Any) -> None:
    model = zoo.gpt2(vocab=len(tokenizer))  # 64 positions
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "1 " * 20, "completion": "2"}) + "\n")
    rows = load_seeds(tmp_path / "rows.jsonl", tokenizer)
    assert evaluate(model, rows, tokenizer=tokenizer, exact_match=True).exact_match in (0.0, 1.0)
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    long = [*turns, {"role": "user", "content": "1 " * 80}, {"role": "assistant", "content": "3"}]
    (tmp_path / "long.jsonl").write_text(json.dumps({"messages": long}) + "\n")
    with pytest.warns(pkt.PktWarning, match="1 of 1 rows is longer than 64 tokens"):
        cut = load_seeds(tmp_path / "long.jsonl", tokenizer, max_length=64)
    with pytest.raises(
        pkt.PktError, match=r"long\.jsonl:1: the prompt of \d+ tokens leaves none of the model's 64 positions"
    ):
        evaluate(model, cut, tokenizer=tokenizer, exact_match=True)


def test_a_tokenizer_with_a_token_more_than_the_model_pads_with_one_that_is_there(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ASSETS / "teacher")
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    rows = chat(tmp_path, tokenizer, "3", "is four #### 4")
    model = load_model(save(zoo.llama(vocab=size), tmp_path / "model", tokenizer))
    assert tokenizer.pad_token_id == size
    result = evaluate(model, rows, tokenizer=tokenizer, exact_match=True, max_new_tokens=4)
    alone = [evaluate(model, Seeds([row], rows.source, rows.pad_id)) for row in rows]
    assert result.nll == pytest.approx(sum(e.nll * e.tokens for e in alone) / result.tokens, rel=1e-5)
