"""From rows to token ids and labels, and what malformed rows get."""

from __future__ import annotations

import copy
import datetime
import json
import re
import time
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
    path = write_rows(tmp_path / "s.jsonl", {"prompt": "a" * 10, "completion": "b" * 10}, {"text": "c"})
    said = re.escape(f"{path}: 1 of 2 rows is longer than 15 tokens and cut there; max_length (--max-length)")
    with pytest.warns(pkt.PktWarning, match=said):
        cut = pkt.load_seeds(path, Plain(True), max_length=15)
    assert text_of(cut, 0, True) == "b" * 4
    assert [e.cut for e in cut] == [True, False]
    assert not any(e.cut for e in pkt.load_seeds(path, Plain(True), max_length=22))  # as long as may be
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
        seeds.check_fits(5, None, "the model")


# --- chat templates as they are found in the wild -------------------------------------------------------------------

USER, ANSWER = {"role": "user", "content": "2 plus 3?"}, {"role": "assistant", "content": "It is 5."}
MORE, LAST = {"role": "user", "content": "And 1?"}, {"role": "assistant", "content": "6."}
ROLES = "{{ '<|user|>\n' + m.content + '\n' }}"
ASKS = "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"


def with_template(tokenizer: Any, template: str) -> Any:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def said(tokenizer: Any, example: Any) -> list[str]:
    """The runs of tokens that are the model's to say."""
    runs: list[list[int]] = [[]]
    for label in example.labels:
        if label != IGNORE:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def a_turn(assistant: str, asks: str = ASKS) -> str:
    each = f"{{% if m.role == 'assistant' %}}{assistant}{{% else %}}{ROLES}{{% endif %}}"
    return f"{{% for m in messages %}}{each}{{% endfor %}}{asks}"


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        # The question opens a thought that a finished answer does not show (DeepSeek-R1-Distill).
        (
            a_turn(
                "{{ '<|assistant|>' + m.content.split('</think>')[-1] + '<|eos|>' }}",
                "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}",
            ),
            [USER, ANSWER],
            ["It is 5.<|eos|>"],
        ),
        # Only the last turn shows an empty thought (Qwen3).
        (
            a_turn(
                "{{ '<|assistant|>\n' + ('<think>\n\n</think>\n\n' if loop.last else '') + m.content + '<|eos|>' }}"
            ),
            [USER, ANSWER, MORE, LAST],
            ["It is 5.<|eos|>", "<think>\n\n</think>\n\n6.<|eos|>"],
        ),
        # The last turn is closed by another token than the ones before it (GPT-OSS).
        (
            a_turn("{{ '<|assistant|>\n' + m.content + ('<|eos|>' if loop.last else '<|unk|>') }}"),
            [USER, ANSWER, MORE, LAST],
            ["It is 5.<|unk|>", "6.<|eos|>"],
        ),
    ],
    ids=["R1", "Qwen3", "GPT-OSS"],
)
def test_turns_that_are_rendered_otherwise_when_they_are_not_the_last(
    tokenizer: Any, tmp_path: Path, template: str, messages: list[Any], expected: list[str]
) -> None:
    chosen = with_template(tokenizer, template)
    example = pkt.load_seeds(write_rows(tmp_path / "s.jsonl", {"messages": messages}), chosen)[0]
    assert said(chosen, example) == expected
    assert chosen.decode(example.input_ids) == chosen.apply_chat_template(messages, tokenize=False)


TOOLS = [{"type": "function", "function": {"name": "addnumbers", "parameters": {}}}]


def test_tools_are_shown_to_the_model_or_refused(tokenizer: Any, tmp_path: Path) -> None:
    shows = "{% if tools %}{{ 'TOOLS ' + tools[0].function.name + '\n' }}{% endif %}"
    chosen = with_template(tokenizer, shows + tokenizer.chat_template)
    path = write_rows(tmp_path / "s.jsonl", {"messages": [USER, ANSWER], "tools": TOOLS})
    example = pkt.load_seeds(path, chosen)[0]
    assert chosen.decode(example.input_ids).startswith("TOOLS addnumbers\n")
    assert said(chosen, example) == ["It is 5.<|eos|>"]
    with pytest.raises(pkt.PktError, match=r's\.jsonl:1: .*does not show the row\'s "tools"'):
        pkt.load_seeds(path, tokenizer)
    with pytest.raises(pkt.PktError, match=r"need a tokenizer with a chat template"):
        pkt.load_seeds(path, Plain(True))
    for nothing in (None, []):
        pkt.load_seeds(write_rows(tmp_path / "n.jsonl", {"messages": [USER, ANSWER], "tools": nothing}), tokenizer)


def test_tool_calls_as_the_api_writes_them(tokenizer: Any, tmp_path: Path) -> None:
    called = "{{ 'CALL ' + m.tool_calls[0].function.arguments.a + '<|eos|>' }}"
    calls = f"{{% if m.tool_calls %}}{called}{{% else %}}{{{{ m.content + '<|eos|>' }}}}{{% endif %}}"
    chosen = with_template(tokenizer, a_turn("{{ '<|assistant|>\n' }}" + calls))
    call = {"function": {"name": "f", "arguments": json.dumps({"a": "7"})}}
    row = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "5"}, LAST]
    example = pkt.load_seeds(write_rows(tmp_path / "s.jsonl", {"messages": row}), chosen)[0]
    assert said(chosen, example) == ["CALL 7<|eos|>", "6.<|eos|>"]


def test_contents_in_parts_and_rows_of_messages(tokenizer: Any, tmp_path: Path) -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "2 plus"}, {"type": "text", "text": " 3?"}]}
    path = write_rows(
        tmp_path / "s.jsonl",
        {"messages": [USER, ANSWER]},
        {"messages": [parts, ANSWER]},
        {"prompt": [USER], "completion": [ANSWER]},
    )
    first, second, third = pkt.load_seeds(path, tokenizer)
    assert first.input_ids == second.input_ids == third.input_ids
    assert first.labels == second.labels == third.labels
    path = write_rows(tmp_path / "t.jsonl", {"prompt": [USER, ANSWER, MORE], "completion": [LAST]})
    assert said(tokenizer, pkt.load_seeds(path, tokenizer)[0]) == ["6.<|eos|>"]
    image = {"role": "user", "content": [{"type": "image", "url": "x"}]}
    with pytest.raises(pkt.PktError, match=r'message 0 must have a "role"'):
        pkt.load_seeds(write_rows(tmp_path / "u.jsonl", {"messages": [image, ANSWER]}), tokenizer)


class Begins(Plain):
    bos_token = "\x01"


@pytest.mark.parametrize("fast", [True, False])
def test_a_rendered_text_gets_no_second_end_or_beginning(tmp_path: Path, fast: bool) -> None:
    rows = ({"text": "\x01ab\x03"}, {"text": "ab"}, {"prompt": "\x01a", "completion": "b\x03"})
    seeds = pkt.load_seeds(write_rows(tmp_path / "s.jsonl", *rows), Begins(fast))
    assert [e.input_ids for e in seeds] == [[1, 97, 98, 3]] * 3


@pytest.mark.parametrize("fast", [True, False])
def test_the_papers_template_strips_contents(tmp_path: Path, fast: bool) -> None:
    row = {"messages": [{"role": "user", "content": " 2+2? \n"}, {"role": "assistant", "content": "4 \n"}]}
    found, plain = (pkt.load_seeds(write_rows(tmp_path / "s.jsonl", r), Plain(fast))[0] for r in (row, CHAT))
    assert (found.input_ids, found.labels) == (plain.input_ids, plain.labels)


def test_the_date_of_a_template_is_bound(tokenizer: Any, tmp_path: Path) -> None:
    dated = with_template(tokenizer, "{{ strftime_now('%d %b %Y') + '\n' }}" + tokenizer.chat_template)
    path = write_rows(tmp_path / "s.jsonl", CHAT)
    day = datetime.date(2026, 1, 2)
    seeds = pkt.load_seeds(path, dated, today=day)
    assert dated.decode(seeds[0].input_ids).startswith("02 Jan 2026\n")
    assert seeds.today == day
    assert pkt.load_seeds(path, tokenizer, today=day).today is None


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x", "takes more than 1 s"),
        ("{{ 'x' * 10**10 }}", "more text than memory allows"),
    ],
)
def test_a_template_that_does_not_end_is_stopped(tokenizer: Any, tmp_path: Path, template: str, message: str) -> None:
    path = write_rows(tmp_path / "s.jsonl", CHAT)
    begin = time.process_time()
    with pytest.raises(pkt.PktError, match=rf"s\.jsonl:1: the chat template .*{message}"):
        pkt.load_seeds(path, with_template(tokenizer, template))
    assert time.process_time() - begin < 3


@pytest.mark.parametrize("form", ["text", "prompt", "messages"])
def test_no_more_of_a_huge_row_is_read_than_can_be_kept(tokenizer: Any, tmp_path: Path, form: str) -> None:
    huge = "word " * 10_000_000
    row = {
        "text": {"text": huge},
        "prompt": {"prompt": "a", "completion": huge},
        "messages": {"messages": [USER, {"role": "assistant", "content": huge}]},
    }[form]
    small = json.loads(json.dumps(row).replace(huge, "word " * 4000))
    begin = time.process_time()
    with pytest.warns(pkt.PktWarning, match="1 of 1 rows is longer than 512 tokens"):
        found = pkt.load_seeds(write_rows(tmp_path / "s.jsonl", row), tokenizer, max_length=512)[0]
    assert time.process_time() - begin < 5
    with pytest.warns(pkt.PktWarning):
        expected = pkt.load_seeds(write_rows(tmp_path / "t.jsonl", small), tokenizer, max_length=512)[0]
    assert (found.input_ids, found.labels) == (expected.input_ids, expected.labels)


def test_a_folder_serves_as_tokenizer(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "tok")
    path = write_rows(tmp_path / "s.jsonl", CHAT)
    assert pkt.load_seeds(path, tmp_path / "tok")[0].input_ids == pkt.load_seeds(path, tokenizer)[0].input_ids
