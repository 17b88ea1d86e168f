"""The models and data shipped for ``pkt demo``: whole, small, consistent, and made by the script in ``examples/``."""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import processes
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "pkt" / "demo" / "assets"
SPLITS = {"seeds": 32, "train": 800, "test": 200, "wrong_task": 32, "general": 300}
MODELS = ["base", "teacher", "descendant", "healed", "student"]


def rows(name: str, root: Path = ASSETS) -> list[dict[str, Any]]:
    text = (root / "data" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def texts(row: dict[str, Any]) -> list[str]:
    return [row["text"]] if "text" in row else [m["content"] for m in row["messages"]]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ASSETS / "teacher")


@pytest.mark.parametrize("name", MODELS)
def test_models_load_without_a_warning(name: str, caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error")
            model = AutoModelForCausalLM.from_pretrained(ASSETS / name)
            tok = AutoTokenizer.from_pretrained(ASSETS / name)
            ids = tok.apply_chat_template(
                rows("test")[0]["messages"][:1], add_generation_prompt=True, return_tensors="pt"
            )
            out = model.generate(**ids)
    finally:
        logging.enable_progress_bar()
    assert not caplog.records
    assert capfd.readouterr().err == ""
    assert model.dtype == torch.bfloat16
    assert model.config.vocab_size == len(tok) == model.lm_head.weight.shape[0]
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert out.shape[1] > ids["input_ids"].shape[1]


def test_assets_fit_in_twelve_megabytes() -> None:
    assert sum(f.stat().st_size for f in ASSETS.rglob("*") if f.is_file()) <= 12_000_000


def test_the_student_can_be_cut_from_the_teacher() -> None:
    from safetensors import safe_open

    shapes = {}
    for name in ("teacher", "student"):
        with safe_open(ASSETS / name / "model.safetensors", "pt") as f:
            shapes[name] = {k: f.get_slice(k).get_shape() for k in f.keys()}  # noqa: SIM118
    assert shapes["student"].keys() < shapes["teacher"].keys()
    for key, small in shapes["student"].items():
        assert all(s <= t for s, t in zip(small, shapes["teacher"][key], strict=True)), key
    teacher, student = (json.loads((ASSETS / n / "config.json").read_text()) for n in ("teacher", "student"))
    assert teacher["head_dim"] == student["head_dim"]
    assert teacher["vocab_size"] == student["vocab_size"]


def test_one_tokenizer_and_it_returns_every_text(tokenizer: Any) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert len({(ASSETS / name / file).read_bytes() for name in MODELS}) == 1
    every = [t for name in SPLITS for row in rows(name) for t in texts(row)]
    encoded = tokenizer(every)["input_ids"]
    assert tokenizer.batch_decode(encoded) == every
    assert tokenizer.unk_token_id not in {i for ids in encoded for i in ids}
    assert [len(tokenizer(str(d), add_special_tokens=False)["input_ids"]) for d in (0, 7, 42, 365)] == [1, 1, 2, 3]


def test_chat_template_puts_the_answer_after_the_prompt(tokenizer: Any) -> None:
    for row in rows("train"):
        whole = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        prompt = tokenizer.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
        assert whole == f"{prompt}{row['messages'][1]['content']}{tokenizer.eos_token}"
        assert len(tokenizer(whole)["input_ids"]) <= 80


def test_splits_are_complete_and_disjoint() -> None:
    seen: set[str] = set()
    for name, count in SPLITS.items():
        prompts = [texts(row)[0] for row in rows(name)]
        assert len(prompts) == count
        assert len(set(prompts)) == count
        assert not seen & set(prompts)
        seen |= set(prompts)


def test_answers_are_right() -> None:
    """Every step is a true equation, and the last one gives the marked result."""
    for name in ("seeds", "train", "test"):
        for row in rows(name):
            steps, result = row["messages"][1]["content"].split(" #### ")
            found = re.findall(r"(\d+)([-+*/])(\d+)=(\d+)\.", steps)
            assert len(found) == 2
            for a, op, b, c in found:
                x, y, z = int(a), int(b), int(c)
                assert max(x, y, z) <= 10
                assert {"+": x + y == z, "-": x - y == z, "*": x * y == z, "/": x == y * z}[op], steps
            assert found[-1][3] == result


def test_the_teacher_knows_the_task_and_the_others_do_not() -> None:
    card = (ASSETS / "README.md").read_text(encoding="utf-8")
    match = {n: float(re.search(rf"^\| {n} \|.*\| ([\d.]+)% \|$", card, re.M)[1]) for n in MODELS}
    assert match["teacher"] >= 60
    assert max(match[name] for name in ("base", "descendant", "student")) <= 1


def test_the_rows_that_the_teacher_was_tuned_on_are_counted() -> None:
    from pkt.demo.measuring import METHODS, TEACHER_ROWS

    card = (ASSETS / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"^\| teacher \|.*\| {TEACHER_ROWS:,} \|", card, re.M)
    assert re.search(rf"^\| healed \|.*\| 0, its teacher {TEACHER_ROWS:,} \|", card, re.M)
    assert {n for n, method in METHODS.items() if not method.taught} == {"plain LoRA", "stranger: plain LoRA"}


def test_the_healed_one_is_the_descendants_units_of_the_teacher() -> None:
    import pkt

    descendant, healed = (json.loads((ASSETS / n / "config.json").read_text()) for n in ("descendant", "healed"))
    assert descendant == healed
    cut = (("base", "descendant"), ("teacher", "healed"))
    ours, theirs = (pkt.lineage(ASSETS / old, ASSETS / new, progress=False) for old, new in cut)
    assert (ours.hidden, ours.layers, ours.neurons, ours.queries) == (
        theirs.hidden,
        theirs.layers,
        theirs.neurons,
        theirs.queries,
    )


def test_the_descendant_is_half_its_base_and_known_as_one() -> None:
    import pkt

    base, small = (json.loads((ASSETS / n / "config.json").read_text()) for n in ("base", "descendant"))
    assert [small[k] / base[k] for k in ("hidden_size", "intermediate_size")] == [0.5, 0.5]
    kin, stranger = (pkt.lineage(ASSETS / "teacher", ASSETS / n, progress=False) for n in ("descendant", "student"))
    assert kin.kin
    assert kin.layers == list(range(base["num_hidden_layers"]))
    assert stranger.verdict == "no lineage"


def test_the_script_runs(tmp_path: Path) -> None:
    script = ROOT / "examples" / "make_demo_models.py"
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = processes.run([sys.executable, script, "--out", tmp_path, "--quick", "--threads", "1"], env=env)
    assert run.returncode == 0, run.stderr
    assert "| student |" in run.stdout
    here, there = ({str(p.relative_to(d)) for p in d.rglob("*") if p.is_file()} for d in (ASSETS, tmp_path))
    assert here == there
    # The small run draws the same problems first, so its seeds are the head of the shipped ones.
    assert rows("seeds", tmp_path) == rows("seeds")[: len(rows("seeds", tmp_path))]


def test_an_unfinished_demo_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pkt import PktError
    from pkt.demo import runner as demonstration
    from pkt.files import MANIFEST
    from pkt.manifest import manifest_of

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "demo"
    with monkeypatch.context() as patch:
        patch.setattr(demonstration, "prepare", stop)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                demonstration.run_demo(out)
            assert [p.name for p in out.iterdir()] == [MANIFEST]
            (out / ".window.run").mkdir()
    (out / MANIFEST).write_text(json.dumps(manifest_of("demo", {"finished": True})))
    with pytest.raises(PktError, match="already holds a result"):
        demonstration.run_demo(out)


def test_the_demos_training_leaves_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    from pkt.demo.measuring import train_quietly
    from pkt.models import load_model
    from pkt.seeds import load_seeds

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    rows = load_seeds(ASSETS / "data" / "seeds.jsonl", tokenizer, limit=2)
    train_quietly(load_model(ASSETS / "student"), rows, 1e-3, 0, epochs=1.0)
    assert list(tmp_path.iterdir()) == []


def test_the_demos_pictures_say_what_they_show() -> None:
    from pkt.planning import Entry, TransferPlan
    from pkt.planning.regions import Region
    from pkt.reporting import new_figure, plot_methods, plot_window

    _, (match, window) = new_figure(6, 3, 2)
    plot_methods(match, {"PKT": [2.0, 4.0], "noise": [1.0, 3.0]}, 0.0, "exact match", guess=5.5)
    (dashed,) = [line for line in match.lines if line.get_linestyle() == "--"]
    assert list(dashed.get_xdata()) == [5.5, 5.5]
    assert "guessing the commonest answer" in [text.get_text() for text in match.get_legend().get_texts()]
    entry = Entry("m", "m", Region((4, 4), ((2, 6),), ((2, 6),)), 1.0, 0.5, "linear")
    plot_window(window, torch.rand(8, 8), TransferPlan([entry], [0], {}, {}, {}, [], [], []), "m")
    assert (window.get_xlabel(), window.get_ylabel()) == ("input", "output")
