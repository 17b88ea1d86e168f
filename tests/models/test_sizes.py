"""Configurations of sizes that no model has are refused at once, before anything of that size is made."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import zoo
from commands import fails
from conftest import save

import pkt
from pkt.models import load_model, load_tokenizer, spec_of
from pkt.seeds import Example, Seeds


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Any) -> Path:
    return save(zoo.llama(vocab=len(tokenizer)), tmp_path / "model", tokenizer)


def change(folder: Path, **settings: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers is 1e\+09, and no model has more than 2000"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers"),
        ({"num_local_experts": 10**9}, "num_local_experts"),
        ({"num_attention_heads": 10**9}, "num_attention_heads"),
        ({"hidden_size": 10**12}, "hidden_size"),
        ({"vocab_size": 1e15}, "vocab_size"),
    ],
)
def test_absurd_sizes_are_refused_at_once(settings: dict[str, Any], message: str, folder: Path) -> None:
    change(folder, **settings)
    for read in (spec_of, load_tokenizer):
        begin = time.process_time()
        with pytest.raises(pkt.PktError, match=message):
            read(folder)
        assert time.process_time() - begin < 1


def test_a_billion_layers_take_no_memory(folder: Path) -> None:
    change(folder, num_hidden_layers=10**9)
    script = (
        "import resource, sys, pkt.models, transformers.models.auto.modeling_auto, torch._dynamo\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: pkt.models.spec_of(sys.argv[1])\n"
        "except pkt.PktError: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 500 * 1024  # kB


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"hidden_act": "sillu"}, "sillu"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "spiral"),
        ({"num_key_value_heads": 0}, "ZeroDivisionError"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(settings: dict[str, Any], cause: str, folder: Path) -> None:
    change(folder, **settings)
    with pytest.raises(pkt.PktError) as caught:
        spec_of(folder)
    assert cause in str(caught.value)
    assert "no causal language model" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_model_of_another_kind_is_said_to_be_one(tmp_path: Path) -> None:
    from transformers import ViTConfig

    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(pkt.PktError, match="no causal language model for 'vit'"):
        spec_of(tmp_path)


def test_a_configuration_of_fewer_layers_than_the_files_is_told(
    folder: Path, student_dir: Path, seed_file: Path
) -> None:
    change(folder, num_hidden_layers=2)
    with pytest.warns(
        pkt.PktWarning, match=r"holds model\.layers\.2\..* \(9 tensors like it\), which its config\.json leaves out"
    ):
        pkt.transfer(folder, student_dir, seed_file, rank=2, modules="attention", progress=False)


@pytest.mark.parametrize("extra", [-3, 5])
def test_the_table_says_how_many_tokens_there_are(extra: int, folder: Path, seed_file: Path) -> None:
    """Not the configuration: a file of other rows is refused before it is read, a model in memory is taken at its table."""
    model = load_model(folder)
    rows = model.config.vocab_size
    change(folder, vocab_size=rows + extra)
    assert "the checkpoint does not fill" in fails("evaluate", folder, seed_file)
    model.config.vocab_size = rows + extra
    assert spec_of(model).vocab_size == rows
    last = Seeds([Example([1, rows - 1], [-100, rows - 1], [1], "", 1)], "rows.jsonl", 0)
    last.check_fits(spec_of(model).vocab_size, None, "the model")
    beyond = Seeds([Example([1, rows], [-100, rows], [1], "", 1)], "rows.jsonl", 0)
    with pytest.raises(pkt.PktError, match=rf"rows\.jsonl:1: token id {rows} does not exist"):
        beyond.check_fits(spec_of(model).vocab_size, None, "the model")
