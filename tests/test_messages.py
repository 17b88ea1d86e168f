"""Messages name the true cause and stay short; what one command leaves, the next one takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from commands import fails, run
from conftest import ASSETS, save
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import pkt
from pkt.errors import short_list
from pkt.extraction import Extraction
from pkt.files import MANIFEST
from pkt.models import load_model, spec_of


@pytest.fixture(scope="module")
def scores(teacher_dir: Path, seed_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scores") / "scores.safetensors"
    run("sensitivity", teacher_dir, seed_file, "--out", out)
    return out


@pytest.fixture(scope="module")
def multi(teacher_dir: Path, student_dir: Path, seed_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks' extractions with their scores."""
    out = tmp_path_factory.mktemp("multi") / "multi"
    tasks = ("--seeds", f"math={seed_file}", "--seeds", f"code={seed_file}")
    run("transfer", teacher_dir, student_dir, *tasks, "--out", out, "--rank", 4, "--keep-scores", "full")
    return out


def test_a_long_list_is_cut() -> None:
    assert short_list(["a", "b"]) == "a; b"
    assert short_list([str(i) for i in range(300)]) == "0; 1; 2; and 297 more"


def test_misfits_are_listed_by_kind(tmp_path: Path, tokenizer: Any, teacher_dir: Path, extraction_dir: Path) -> None:
    wide = save(
        zoo.llama(hidden=96, layers=4, heads=6, kv=3, ffn=192, vocab=len(tokenizer)), tmp_path / "wide", tokenizer
    )
    with pytest.raises(pkt.PktError) as caught:
        pkt.transfer(teacher_dir, wide, ASSETS / "data" / "seeds.jsonl")
    text = str(caught.value)
    assert "(30 of 30 matrices)" in text
    assert "(and 3 like it)" in text
    assert "\n" not in text
    with pytest.raises(pkt.PktError, match="does not fit") as caught:
        pkt.inject(load_model(wide), extraction_dir)
    assert str(caught.value).endswith("more; use the student it was made for")
    assert "\n" not in str(caught.value)


def test_a_map_that_matches_nothing_is_named(teacher_dir: Path, student_dir: Path, seed_file: Path) -> None:
    good = "model.layers.*.mlp.up_proj=model.layers.*.mlp.up_proj"
    for pairs in (["--map", "a.*.b=model.layers.*.mlp.upp"], ["--map", good, "--map", "a.*.b=model.layers.*.mlp.upp"]):
        said = fails("transfer", teacher_dir, student_dir, seed_file, "--out", "nowhere", *pairs)
        assert "module_map (--map) names model.layers.*.mlp.upp, no matrix of the student's" in said
        assert "modules='all'" not in said


def test_a_file_with_more_than_its_header_says_is_too_long(
    teacher_dir: Path, student_dir: Path, seed_file: Path, tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "long"
    shutil.copytree(teacher_dir, folder)
    with open(folder / "model.safetensors", "ab") as file:
        file.write(b"more")
    assert "goes on for 4 bytes after its last tensor" in fails(
        "transfer", folder, student_dir, seed_file, "--out", tmp_path / "out"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_scores_that_are_none_are_refused(
    value: float, scores: Path, teacher_dir: Path, student_dir: Path, tmp_path: Path
) -> None:
    with safe_open(scores, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(scores)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = value
    save_file(tensors, tmp_path / "s.safetensors", metadata)
    said = fails("plan", tmp_path / "s.safetensors", teacher_dir, student_dir)
    assert f"s.safetensors: the scores of {name} are not all finite and positive" in said


def test_the_road_step_by_step_keeps_its_seeds(
    scores: Path, teacher_dir: Path, student_dir: Path, seed_file: Path, tmp_path: Path
) -> None:
    said = run("plan", scores, teacher_dir, student_dir, "--out", tmp_path / "plan.json")
    assert f"next: pkt extract {teacher_dir} {tmp_path / 'plan.json'} --out DIR" in said
    said = run("extract", teacher_dir, tmp_path / "plan.json", "--out", tmp_path / "ext", "--rank", 4)
    assert f"next: pkt train {student_dir} {tmp_path / 'ext'} DATA.jsonl --out RUN" in said
    found = Extraction.load(tmp_path / "ext")
    assert found.provenance["seeds"]["source"] == str(seed_file)
    assert str(seed_file) in run("inspect", tmp_path / "ext")
    card = (tmp_path / "ext" / "README.md").read_text()
    assert found.provenance["seeds"]["fingerprint"][:16] in card
    assert "unknown" not in card


def test_samples_in_place_of_batches_are_told(seed_file: Path, tokenizer: Any) -> None:
    model, rows = zoo.llama(vocab=len(tokenizer)), pkt.load_seeds(seed_file, tokenizer, limit=2)
    given: list[tuple[list[Any], str]] = [
        (
            [json.loads(line) for line in seed_file.read_text().splitlines()],
            "rows of text; read them with pkt.load_seeds",
        ),
        ([{"input_ids": e.input_ids, "labels": e.labels} for e in rows], "gives samples, not batches"),
        ([{"input_ids": torch.tensor(e.input_ids), "labels": torch.tensor(e.labels)} for e in rows], "not batches"),
    ]
    for batches, words in given:
        with pytest.raises(pkt.PktError, match=words):
            pkt.sensitivity(model, batches, progress=False)
    with pytest.raises(pkt.PktError, match=r"a tokenizer is needed, .* not NoneType"):
        pkt.load_seeds(seed_file, None)


def test_what_several_tasks_leave_is_taken_up(
    multi: Path, teacher_dir: Path, student_dir: Path, tmp_path: Path, seed_file: Path
) -> None:
    from_folder = run("plan", multi / "math", teacher_dir, student_dir, "--json")
    assert from_folder == run("plan", multi / "math" / "scores.safetensors", teacher_dir, student_dir, "--json")
    said = run("inspect", multi)
    assert "results of several tasks: code, math" in said
    assert "math: an extraction, from the teacher's layers" in said
    assert "results of several tasks: code, math" in Path(run("report", multi).strip()).read_text(encoding="utf-8")
    trained = fails("train", student_dir, multi, seed_file, "--out", tmp_path / "run")
    assert f"holds the results of several tasks; name one of them: {multi / 'code'}" in trained
    assert "is a folder without scores.safetensors" in fails("plan", teacher_dir, teacher_dir, student_dir)
    assert run("report", multi / "math" / "scores.safetensors").strip() == str(multi / "math" / "scores.html")


@pytest.mark.parametrize("mode", ["paired", "residual", "add"])
def test_what_inject_wrote_is_trained_like_its_extraction(
    mode: str, extraction_dir: Path, student_dir: Path, seed_file: Path, tmp_path: Path
) -> None:
    run("inject", student_dir, extraction_dir, "--out", tmp_path / "start", "--mode", mode, "--alpha", 8)
    options = ("--max-steps", 2, "--batch-size", 2, "--micro-batch", 2, "--lr", 1e-3)
    run("train", student_dir, tmp_path / "start", seed_file, "--out", tmp_path / "one", *options)
    run("train", student_dir, extraction_dir, seed_file, "--out", tmp_path / "two", "--mode", mode, *options)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-7)
    assert "is a training run, not an extraction" in fails(
        "train", student_dir, tmp_path / "one", seed_file, "--out", tmp_path / "three"
    )


def test_an_injected_adapter_that_was_trained_is_no_start(
    extraction_dir: Path, student_dir: Path, seed_file: Path, tmp_path: Path
) -> None:
    run("inject", student_dir, extraction_dir, "--out", tmp_path / "start")
    file = tmp_path / "start" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("lora_B.weight"))
    tensors[name][0, 0] += 1
    save_file(tensors, file, {"format": "pt"})
    said = fails("train", student_dir, tmp_path / "start", seed_file, "--out", tmp_path / "run")
    assert "was trained since it was injected" in said


def test_a_path_in_brackets_is_said_whole(teacher_dir: Path, scores: Path, student_dir: Path, tmp_path: Path) -> None:
    place = tmp_path / f"ä run [old] {'x' * 60}"
    run("plan", scores, teacher_dir, student_dir, "--modules", "attention", "--out", tmp_path / "plan.json")
    said = run("extract", teacher_dir, tmp_path / "plan.json", "--rank", 2, "--out", place)
    assert f"{place}: " in said.splitlines()[0]
    assert f"next: pkt train {student_dir} '{place}' DATA.jsonl" in said
    assert "\x1b" not in said


def test_what_prints_stays_a_line(
    scores: Path,
    teacher_dir: Path,
    student_dir: Path,
    extraction_dir: Path,
    seed_file: Path,
    tmp_path: Path,
    tokenizer: Any,
) -> None:
    sens = pkt.Sensitivity.load(scores)
    ext = Extraction.load(extraction_dir)
    run("train", student_dir, extraction_dir, seed_file, "--out", tmp_path / "run", "--max-steps", 1, "--batch-size", 1)
    done = pkt.finalize(tmp_path / "run", tmp_path / "adapter", check=False)
    given: list[Any] = [
        sens,
        pkt.plan(sens, teacher_dir, student_dir),
        ext,
        next(iter(ext.pairs.values())),
        ext.adapter(),
        done,
        pkt.load_seeds(seed_file, tokenizer),
        spec_of(teacher_dir),
        pkt.lineage(teacher_dir, student_dir, progress=False),
        pkt.Start("start", ext.pairs, ext.plan.student, "paired"),
    ]
    for value in given:
        text = repr(value)
        assert len(text) < 300, text
        assert len(text.splitlines()) == 1, text


def test_tables_padded_to_other_sizes_name_what_feeds_them(
    tmp_path: Path, tokenizer: Any, student_dir: Path, seed_file: Path
) -> None:
    teacher = save(
        zoo.llama(hidden=48, layers=4, heads=6, kv=3, ffn=96, vocab=len(tokenizer) + 61), tmp_path / "t", tokenizer
    )
    ext = pkt.transfer(teacher, student_dir, seed_file, rank=4, progress=False)
    assert any("vocabularies differ" in note and "--map-vocabulary" in note for note in ext.plan.notes)
    mapped = pkt.transfer(teacher, student_dir, seed_file, rank=4, progress=False, map_vocabulary=True)
    assert len(mapped.pairs) == len(ext.pairs) + 2


def test_a_tokenizer_with_a_token_more_than_the_table(tmp_path: Path, tokenizer: Any, seed_file: Path) -> None:
    import copy

    longer = copy.deepcopy(tokenizer)
    longer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    size = len(tokenizer)
    teacher = save(zoo.llama(layers=3, vocab=size), tmp_path / "t", longer)
    student = save(zoo.llama(hidden=32, layers=2, ffn=64, vocab=size), tmp_path / "s", longer)
    plain = pkt.transfer(teacher, student, seed_file, rank=4, progress=False)
    mapped = pkt.transfer(teacher, student, seed_file, rank=4, progress=False, map_vocabulary=True)
    assert set(mapped.pairs) == set(plain.pairs)
    used = tmp_path / "used.jsonl"
    used.write_text(
        seed_file.read_text().splitlines()[0] + "\n" + json.dumps({"text": "a <image_soft_token> b"}) + "\n"
    )
    refused = rf"used\.jsonl:2: token id {size} does not exist in .* \({size} tokens\)"
    with pytest.raises(pkt.PktError, match=refused):
        pkt.transfer(teacher, student, used)
    for command in (
        ["sensitivity", teacher, used, "--out", tmp_path / "s.safetensors"],
        ["evaluate", student, used],
    ):
        assert "used.jsonl:2: token id" in fails(*command)
    assert (tmp_path / "s.safetensors").exists() is False
    assert not (tmp_path / MANIFEST).exists()
