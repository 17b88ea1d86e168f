"""The file of a teacher's targets: words of ids and counts, what is refused, and what it takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ASSETS
from oracle import seeds

import pkt
from pkt.files import MANIFEST
from pkt.seeds import Seeds
from pkt.targets import FILE, Targets, file_digest, packed, row_digest, unpacked, word_bytes, write_targets

ENTRIES: dict[str, Any] = {"form": "draws", "size": 4, "vocabulary": 67, "tokenizer": "t"}


def parts(rows: Seeds, counts: list[int]) -> list[dict[str, torch.Tensor]]:
    """Targets of every answer token of each row: so many draws of the ids 1, 2, ..."""
    found = []
    for row in rows:
        answers = sum(label != -100 for label in row.labels[1:])
        ids, many = torch.arange(1, len(counts) + 1).repeat(answers), torch.tensor(counts * answers)
        found.append(
            {
                "distinct": torch.full((answers,), len(counts), dtype=torch.uint8),
                "words": packed(ids, many, 4, word_bytes(67, 4)),
                "rows": torch.tensor([list(row_digest(row))], dtype=torch.uint8),
                "answers": torch.tensor([answers], dtype=torch.int32),
            }
        )
    return found


def test_words_hold_ids_and_counts_whatever_the_vocabulary() -> None:
    generator = torch.Generator().manual_seed(0)
    for vocabulary, draws, width in (
        (67, 1, 1),
        (512, 64, 2),
        (1024, 64, 2),
        (128_256, 64, 3),
        (262_144, 64, 3),
        (10**6, 999, 4),
    ):
        assert word_bytes(vocabulary, draws) == width
        ids = torch.randint(0, vocabulary, (500,), generator=generator)
        counts = torch.randint(1, draws + 1, (500,), generator=generator)
        ids[0], counts[0], ids[1], counts[1] = vocabulary - 1, draws, 0, 1
        words = packed(ids, counts, draws, width)
        assert words.shape == (500, width)
        back = unpacked(words, draws)
        assert torch.equal(back[0], ids)
        assert torch.equal(back[1], counts)


def test_no_answer_token_takes_more_than_200_bytes_at_64_draws_from_128k_tokens() -> None:
    # All draws differ at worst: a byte says how many, and each is a word.
    assert 64 * word_bytes(128_256, 64) + 1 <= 200


def test_what_is_written_is_read_and_its_parts_are_joined(tmp_path: Path) -> None:
    rows = seeds(3)
    write_targets(tmp_path / "t", parts(rows, [3, 1]), ENTRIES)
    found = Targets.load(tmp_path / "t")
    assert found.places(rows) == [0, 1, 2]
    assert found.places(Seeds([rows[2], rows[0]], "other.jsonl", 3)) == [2, 0]
    row = found.row(1)
    assert row.ids.tolist() == [[1, 2]] * len(row.ids)
    assert row.weights.tolist() == [[0.75, 0.25]] * len(row.ids)
    assert found.top_id == 2


def test_rows_alike_take_their_targets_in_order() -> None:
    rows = seeds(2)
    twice = Seeds([rows[0], rows[1], rows[0]], "twice.jsonl", 3)
    joined = {name: torch.cat([part[name] for part in parts(twice, [4])]) for name in parts(twice, [4])[0]}
    found = Targets("draws", 4, 67, "t", joined)
    assert found.places(twice) == [0, 1, 2]
    assert found.places(Seeds([rows[0]] * 3, "thrice.jsonl", 3)) == [0, 2, 2]


def test_rows_that_changed_and_other_rows_are_refused(tmp_path: Path) -> None:
    rows = seeds(3)
    write_targets(tmp_path / "t", parts(rows, [3, 1]), ENTRIES)
    found = Targets.load(tmp_path / "t")
    with pytest.raises(pkt.PktError, match=r"seeds.jsonl:4: the row changed since .*t were made \(1 of 4 rows did\)"):
        found.places(seeds(4))
    with pytest.raises(pkt.PktError, match="are of other rows than"):
        found.places(seeds(3, seed=5))


@pytest.mark.parametrize("counts", [[3, 2], [1, 2]])
def test_counts_that_do_not_sum_are_refused(counts: list[int], tmp_path: Path) -> None:
    write_targets(tmp_path / "t", parts(seeds(2), counts), ENTRIES)
    with pytest.raises(pkt.PktError, match="the probabilities of answer token 0 do not sum to one"):
        Targets.load(tmp_path / "t")


def test_probabilities_that_do_not_sum_are_refused(tmp_path: Path) -> None:
    rows = seeds(1)
    answers = sum(label != -100 for label in rows[0].labels[1:])
    good = {
        "ids": torch.arange(2, dtype=torch.int32).repeat(answers, 1),
        "probabilities": torch.tensor([0.5, 0.25]).repeat(answers, 1),
        "rest": torch.full((answers,), 0.25),
        **{name: parts(rows, [4])[0][name] for name in ("rows", "answers")},
    }
    entries = {**ENTRIES, "form": "top", "size": 2}
    write_targets(tmp_path / "good", [good], entries)
    assert Targets.load(tmp_path / "good").row(0).rest is not None
    for number, (name, value) in enumerate((("rest", 0.3), ("probabilities", -0.2), ("probabilities", float("nan")))):
        bad = {**good, name: good[name].clone()}
        bad[name].view(-1)[2] = value
        write_targets(tmp_path / str(number), [bad], entries)
        with pytest.raises(pkt.PktError, match=r"the probabilities of answer token [12] do not sum to one"):
            Targets.load(tmp_path / str(number))


def test_damage_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "t"
    write_targets(out, parts(seeds(2), [3, 1]), ENTRIES)
    whole = (out / FILE).read_bytes()
    for data, words in ((whole[:-5], "truncated"), (whole[:-5] + bytes(5), "is damaged"), (b"", "truncated")):
        (out / FILE).write_bytes(data)
        with pytest.raises(pkt.PktError, match=words):
            Targets.load(out)
    (out / FILE).unlink()
    with pytest.raises(pkt.PktError, match="is missing"):
        Targets.load(out)
    with pytest.raises(pkt.PktError, match=r"has no pkt\.json"):
        Targets.load(ASSETS / "teacher")
    # Ids beyond the vocabulary that the manifest names.
    (out / FILE).write_bytes(whole)
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["sha256"] == file_digest(out / FILE)
    (out / MANIFEST).write_text(json.dumps({**manifest, "vocabulary": 2}))
    with pytest.raises(pkt.PktError, match="token ids beyond the vocabulary of 2"):
        Targets.load(out)
