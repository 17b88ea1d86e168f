"""From rows to token ids and labels, and what malformed rows get."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import write_rows

import pkt
from pkt.seeds import IGNORE, Seeds


class Plain:
    """A tokenizer without a chat template, fast or slow, one token a character."""

    chat_template = None
    eos_token, eos_token_id, pad_token_id = "\x03", 3, 0

    def __init__(self, fast: bool) -> None:
        self.is_fast = fast

    def __call__(self, text: str, add_special_tokens: bool = True, return_offsets_mapping: bool = False) -> Any:
        ids = [ord(c) for c in text]
        offsets = [(i, i + 1) for i in range(len(text))]
        if add_special_tokens:
            ids, offsets = [1, *ids], [(0, 0), *offsets]
        return {"input_ids": ids, "offset_mapping": offsets}


def text_of(seeds: Seeds, row: int, counted: bool) -> str:
    example = seeds[row]
    return "".join(
        chr(i) for i, label in zip(example.input_ids, example.labels, strict=True) if (label != IGNORE) == counted
    )


CHAT = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}


@pytest.mark.parametrize("fast", [True, False])
def test_the_papers_template_where_there_is_none(tmp_path: Path, fast: bool) -> None:
    path = write_rows(tmp_path / "s.jsonl", CHAT, {"prompt": "ab", "completion": "cd"}, {"text": "efg"})
    seeds = pkt.load_seeds(path, Plain(fast))
    assert text_of(seeds, 0, True) == "4\x03"
    assert text_of(seeds, 0, False) == "\x01<|user|>\n2+2?\n\n<|assistant|>\n"
    assert text_of(seeds, 1, True) == "cd\x03"
    assert text_of(seeds, 2, True) == "efg\x03"
    assert [len(e.prompt_ids) for e in seeds] == [30, 3, 1]
    everything = pkt.load_seeds(path, Plain(fast), loss="all")
    assert all(IGNORE not in e.labels for e in everything)
    assert everything.fingerprint != seeds.fingerprint


@pytest.mark.parametrize("fast", [True, False])
def test_every_assistant_turn_counts(tmp_path: Path, fast: bool) -> None:
    turns = [("user", "a"), ("assistant", "B"), ("user", "c"), ("assistant", "D")]
    path = write_rows(tmp_path / "s.jsonl", {"messages": [{"role": r, "content": c} for r, c in turns]})
    seeds = pkt.load_seeds(path, Plain(fast))
    assert text_of(seeds, 0, True) == "B\x03D\x03"
    assert seeds[0].answer == "D\x03"


def test_the_tokenizers_chat_template(tokenizer: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "s.jsonl", CHAT)
    example = pkt.load_seeds(path, tokenizer)[0]
    whole = tokenizer.apply_chat_template(CHAT["messages"], tokenize=False)
    prompt = tokenizer.apply_chat_template(CHAT["messages"][:1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(example.input_ids) == whole
    assert tokenizer.decode(example.prompt_ids) == prompt
    assert tokenizer.decode([t for t in example.labels if t != IGNORE]) == whole[len(prompt) :]


def test_batches_are_padded_on_the_right_and_the_fingerprint_is_of_the_tokens(
    tokenizer: Any, seed_file: Path, tmp_path: Path
) -> None:
    seeds = pkt.load_seeds(seed_file, tokenizer)
    batches = seeds.batches(4)
    assert [len(b["labels"]) for b in batches] == [4, 2]
    for batch in batches:
        lengths = batch["attention_mask"].sum(1)
        for row, length in enumerate(lengths):
            assert batch["attention_mask"][row, :length].all()
            assert (batch["labels"][row, length:] == IGNORE).all()
    copy = tmp_path / "elsewhere.jsonl"
    copy.write_bytes(seed_file.read_bytes().replace(b"\n", b"\r\n\n"))
    assert pkt.load_seeds(copy, tokenizer).fingerprint == seeds.fingerprint


def test_lines_end_at_newlines_only(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text(
        json.dumps({"text": "a\u2028b\u0085c"}, ensure_ascii=False) + "\n\n" + json.dumps({"text": "de"}),
        encoding="utf-8",
    )
    seeds = pkt.load_seeds(path, Plain(True))
    assert [e.line for e in seeds] == [1, 3]


def test_truncation_keeps_targets_or_says_so(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "s.jsonl", {"prompt": "a" * 10, "completion": "b" * 10})
    assert text_of(pkt.load_seeds(path, Plain(True), max_length=15), 0, True) == "b" * 4
    with pytest.raises(pkt.PktError, match=r"s\.jsonl:1: no target token is left after truncation to 11 of 22 tokens"):
        pkt.load_seeds(path, Plain(True), max_length=11)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must be an object"),
        ({"question": "x"}, "keys"),
        ({"messages": []}, "must be a list"),
        ({"messages": [{"role": "user"}]}, 'message 0 must have a "role"'),
        ({"messages": [{"role": "user", "content": "a"}]}, "no assistant message"),
        ({"messages": [{"role": "assistant", "content": " "}]}, "no assistant message"),
        ({"prompt": "a", "completion": ""}, "is empty"),
        ({"prompt": 3, "completion": "b"}, "must be strings"),
        ({"text": ""}, "not empty"),
        ({"text": 7}, "must be a string"),
        ({"text": "a\ud800"}, "half of a surrogate pair at character 1"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_malformed_rows_name_file_and_line(tmp_path: Path, row: Any, message: str) -> None:
    path = write_rows(tmp_path / "bad.jsonl", {"text": "good"}, row)
    with pytest.raises(pkt.PktError, match=rf"bad\.jsonl:2: .*{message}"):
        pkt.load_seeds(path, Plain(True))


def test_files_that_are_none(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(pkt.PktError, match="does not exist"):
        pkt.load_seeds(tmp_path / "no.jsonl", tokenizer)
    with pytest.raises(pkt.PktError, match="is not a file"):
        pkt.load_seeds(tmp_path, tokenizer)
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(pkt.PktError, match="has no rows"):
        pkt.load_seeds(tmp_path / "empty.jsonl", tokenizer)
    (tmp_path / "binary.jsonl").write_bytes(b'{"text": "\xff\xfe"}\n')
    with pytest.raises(pkt.PktError, match=r"binary\.jsonl:1: not UTF-8"):
        pkt.load_seeds(tmp_path / "binary.jsonl", tokenizer)
    with pytest.raises(pkt.PktError, match="loss='some'"):
        pkt.load_seeds(tmp_path / "empty.jsonl", tokenizer, loss="some")  # type: ignore[arg-type]


def test_a_token_the_model_does_not_have_names_the_line(tokenizer: Any, seed_file: Path) -> None:
    seeds = pkt.load_seeds(seed_file, tokenizer)
    with pytest.raises(pkt.PktError, match=r"seeds\.jsonl:1: token id \d+ does not exist in the model \(5 tokens\)"):
        seeds.check_vocabulary(5, "the model")
