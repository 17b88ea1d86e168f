"""Rows longer than what a model reads are refused with the row and the limit; rotary and linear positions have none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from conftest import save
from torch import nn

import pkt
from pkt.models import decoder_layers, position_limit, spec_of
from pkt.training import evaluate
from pkt.training import run as training

SMALL: dict[str, Any] = {"vocab_size": 67}


def made(kind: str) -> Any:
    import transformers as tf

    few = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
    config: Any = {
        "gpt2": lambda: tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=24, **SMALL),
        "opt": lambda: tf.OPTConfig(**few, ffn_dim=16, max_position_embeddings=24, word_embed_proj_dim=16, **SMALL),
        "gpt_neo": lambda: tf.GPTNeoConfig(
            hidden_size=16,
            num_layers=2,
            num_heads=2,
            attention_types=[[["global"], 2]],
            max_position_embeddings=24,
            **SMALL,
        ),
        "gptj": lambda: tf.GPTJConfig(n_embd=16, n_layer=2, n_head=2, rotary_dim=4, n_positions=24, **SMALL),
        "codegen": lambda: tf.CodeGenConfig(
            n_embd=16, n_layer=2, n_head=4, rotary_dim=4, n_positions=24, n_ctx=24, **SMALL
        ),
        "openai-gpt": lambda: tf.OpenAIGPTConfig(n_embd=16, n_layer=2, n_head=2, n_positions=24, **SMALL),
        "ctrl": lambda: tf.CTRLConfig(n_embd=16, n_layer=2, n_head=2, dff=16, n_positions=24, **SMALL),
        "biogpt": lambda: tf.BioGptConfig(**few, intermediate_size=16, max_position_embeddings=24, **SMALL),
        "mpt": lambda: tf.MptConfig(d_model=16, n_layers=2, n_heads=2, max_seq_len=24, **SMALL),
        "roberta": lambda: tf.RobertaConfig(
            **few, intermediate_size=16, max_position_embeddings=26, pad_token_id=1, is_decoder=True, **SMALL
        ),
        "bloom": lambda: tf.BloomConfig(hidden_size=16, n_layer=2, n_head=2, **SMALL),
        "xglm": lambda: tf.XGLMConfig(
            d_model=16, num_layers=2, attention_heads=2, ffn_dim=16, max_position_embeddings=24, **SMALL
        ),
        "falcon": lambda: tf.FalconConfig(**few, alibi=True, max_position_embeddings=24, **SMALL),
        "llama": lambda: tf.LlamaConfig(**few, intermediate_size=16, max_position_embeddings=24, **SMALL),
    }[kind]()
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    "kind", ["gpt2", "opt", "gpt_neo", "gptj", "codegen", "openai-gpt", "ctrl", "biogpt", "mpt", "roberta"]
)
def test_the_limit_is_where_the_model_itself_ends(kind: str) -> None:
    model = made(kind)
    limit = position_limit(model, decoder_layers(model))
    assert limit == 24
    ids = torch.randint(3, 60, (1, 26))
    with torch.no_grad():
        assert model(ids[:, :24]).logits.shape[1] == 24
        with pytest.raises((IndexError, RuntimeError)):
            model(ids[:, :25])


@pytest.mark.parametrize("kind", ["bloom", "xglm", "falcon", "llama"])
def test_positions_without_an_end_bound_nothing(kind: str) -> None:
    model = made(kind)
    assert position_limit(model, decoder_layers(model)) is None
    with torch.no_grad():
        assert model(torch.randint(3, 60, (1, 60))).logits.isfinite().all()


def test_tables_of_pictures_bound_no_text() -> None:
    model = nn.Module()
    model.text, model.tower = nn.Module(), nn.Module()
    model.text.embed_tokens = nn.Embedding(9, 4)
    model.text.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    model.tower.position_embedding = nn.Embedding(5, 4)
    model.get_input_embeddings = lambda: model.text.embed_tokens  # type: ignore[method-assign, assignment]
    assert position_limit(model, "text.layers") is None
    model.text.wpe = nn.Embedding(7, 4)
    assert position_limit(model, "text.layers") == 7


def test_every_command_refuses_the_row_before_the_work(
    tmp_path: Path, tokenizer: Any, extraction_dir: Path, student_dir: Path
) -> None:
    model = zoo.gpt2(vocab=len(tokenizer))  # 64 positions
    folder = save(model, tmp_path / "gpt2", tokenizer)
    row = {"prompt": "1 + 2 = ", "completion": "3 " * 90}
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "short one"}) + "\n" + json.dumps(row) + "\n")
    rows = pkt.load_seeds(tmp_path / "rows.jsonl", tokenizer)
    refused = r"rows\.jsonl:2: the row has \d+ tokens, and .* only 64 positions; cut rows with max_length=64 \(--max-length 64\)"
    assert spec_of(folder).positions == 64
    with pytest.raises(pkt.PktError, match=refused):
        pkt.transfer(folder, folder, tmp_path / "rows.jsonl")
    with pytest.raises(pkt.PktError, match=refused):
        evaluate(model, rows)
    with pytest.raises(pkt.PktError, match=refused):
        training.train(folder, extraction_dir, rows, tmp_path / "run")
    with pytest.raises(pkt.PktError, match=r"rows of \d+ tokens, and the model only 64 positions"):
        pkt.sensitivity(model, rows)
    with pytest.warns(pkt.PktWarning, match="1 of 2 rows is longer than 64 tokens"):
        cut = pkt.load_seeds(tmp_path / "rows.jsonl", tokenizer, max_length=64)
    assert evaluate(model, cut).nll > 0


def test_samples_for_a_check_are_cut_to_the_positions(tmp_path: Path, tokenizer: Any) -> None:
    from pkt.lora.checking import token_ids_of

    folder = save(zoo.gpt2(vocab=len(tokenizer)), tmp_path / "gpt2", tokenizer)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "1 " * 200}) + "\n")
    with pytest.warns(pkt.PktWarning, match="1 of 1 rows is longer than 64 tokens"):
        found = token_ids_of(tmp_path / "rows.jsonl", folder, spec_of(folder))
    assert found is not None
    assert [len(row) for row in found] == [64]
    with pytest.raises(pkt.PktError, match="samples hold a row of 65 tokens, and the student has only 64 positions"):
        token_ids_of([[1] * 65], folder, spec_of(folder))
