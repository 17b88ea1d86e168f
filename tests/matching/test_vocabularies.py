"""Teachers and students of different vocabularies: compared and changed by the tokens that both have."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from commands import run
from descent import KINDS, cut, drawn
from test_families import seeds
from torch import nn

import pkt
from pkt.matching import Lineage

SHARED, NEW = 300, 60


def tokenizer_of(words: list[str]) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(words)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token=words[0])))


def with_rows(model: Any, rows: list[int]) -> Any:
    """The model with these rows of its tables in this order; -1 for one of its own."""
    other = copy.deepcopy(model)
    chosen = torch.tensor(rows)
    tables = other.get_input_embeddings(), other.get_output_embeddings()
    tables[0].num_embeddings = tables[1].out_features = len(rows)
    for module in tables:
        own = torch.randn(len(rows), module.weight.shape[1]) * module.weight.std()
        taken = torch.where((chosen >= 0)[:, None], module.weight.data[chosen.clamp_min(0)], own)
        module.weight = nn.Parameter(taken)
    other.config.vocab_size = len(rows)
    return other


@pytest.fixture(scope="module")
def kin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A base, a teacher tuned from it, and a student cut from the base whose tokens stand elsewhere, some of them new."""
    root = tmp_path_factory.mktemp("vocabularies")
    base = zoo.trained_like("llama")
    true = drawn(base)
    generator = torch.Generator().manual_seed(1)
    rows = [-1] * NEW + torch.randperm(400, generator=generator)[:SHARED].tolist()
    rows = [rows[i] for i in torch.randperm(len(rows), generator=generator)]
    teacher = copy.deepcopy(base)
    torch.manual_seed(2)
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.02 * torch.randn_like(p))
    words = [f"w{i}" for i in range(400)]
    for name, model, vocabulary in (
        ("base", base, words),
        ("teacher", teacher, words),
        ("student", with_rows(cut(base, true), rows), [words[r] if r >= 0 else f"n{i}" for i, r in enumerate(rows)]),
    ):
        model.save_pretrained(root / name)
        tokenizer_of(vocabulary).save_pretrained(root / name)
    return {"root": root, "true": true, "rows": rows, "base": base, "teacher": teacher}


def test_shared_tokens_are_found_and_told(kin: dict[str, Any], tmp_path: Path) -> None:
    both = kin["root"] / "teacher", kin["root"] / "student"
    shown = run("lineage", *both, "--out", tmp_path / "l.json")
    assert f"the {SHARED} tokens that both have" in shown
    found = Lineage.load(tmp_path / "l.json")
    assert found.tokens == [(row, i) for i, row in enumerate(kin["rows"]) if row >= 0]
    assert found == pkt.lineage(*both, progress=False)
    for name in KINDS:
        assert getattr(found, name) == getattr(kin["true"], name), name
    assert json.loads(run("lineage", *both, "--json"))["shared_tokens"] == SHARED


def test_a_transplant_fills_only_shared_rows(kin: dict[str, Any]) -> None:
    root, rows, hidden = kin["root"], torch.tensor(kin["rows"]), kin["true"].hidden
    start = pkt.transplant(
        root / "teacher", root / "student", seeds(), base=root / "base", rank=64, alpha=1.0, anyway=True, progress=False
    )
    for name in ("model.embed_tokens", "lm_head"):
        change = (kin["teacher"].get_submodule(name).weight - kin["base"].get_submodule(name).weight).detach()
        found = start.pairs[name].delta()
        assert torch.allclose(found[rows >= 0], change[rows[rows >= 0]][:, hidden], atol=1e-5)
        assert found[rows < 0].abs().max() <= 1e-6


def test_a_padded_table_has_the_same_rows(kin: dict[str, Any], tmp_path: Path) -> None:
    """The same tokenizer, and more rows than it has tokens, as tables are padded to a round number."""
    student = with_rows(cut(kin["base"], kin["true"]), [*range(400), *[-1] * 48])
    student.save_pretrained(tmp_path / "padded")
    tokenizer_of([f"w{i}" for i in range(400)]).save_pretrained(tmp_path / "padded")
    found = pkt.lineage(kin["root"] / "teacher", tmp_path / "padded", progress=False)
    assert found.tokens is None
    assert found.hidden == kin["true"].hidden
    assert "two vocabularies" not in str(found)
    start = pkt.transplant(
        kin["teacher"], student, seeds(), base=kin["base"], rank=64, alpha=1.0, anyway=True, progress=False
    )
    assert start.pairs["lm_head"].delta()[400:].abs().max() <= 1e-6
    assert start.pairs["lm_head"].delta()[:400].abs().max() > 1e-3


def test_vocabularies_without_a_common_token(kin: dict[str, Any], tmp_path: Path) -> None:
    kin["base"].save_pretrained(tmp_path / "other")
    tokenizer_of([f"x{i}" for i in range(400)]).save_pretrained(tmp_path / "other")
    with pytest.raises(pkt.PktError, match="share no token, so their tables cannot be compared"):
        pkt.lineage(kin["root"] / "teacher", tmp_path / "other", progress=False)
