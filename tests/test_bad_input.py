"""Bad input, to commands and to functions: each gets one `PktError` that says what, where and what to do."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import zoo
from commands import PKT, empty_beside, fails, run
from conftest import ASSETS, save, write_rows
from safetensors.torch import load_file, save_file

import pkt
from pkt.files import MANIFEST, atomic_file, atomic_folder
from pkt.models import Model, load_tokenizer, spec_of
from pkt.training.evaluation import evaluate


@pytest.fixture(scope="module")
def scored(teacher_dir: Path, seed_file: Path, tokenizer: Any) -> Any:
    from pkt.models import load_model
    from pkt.scoring import score_seeds

    return score_seeds(load_model(teacher_dir), pkt.load_seeds(seed_file, tokenizer, limit=2), progress=False)


def test_scores_and_plans_of_another_teacher(
    scored: Any, teacher_dir: Path, student_dir: Path, tmp_path: Path, tokenizer: Any
) -> None:
    made = pkt.plan(scored, teacher_dir, student_dir)
    with pytest.raises(
        pkt.PktError, match=r"the plan was made from another model .* num_layers: 4 there, 2 here, shapes changed"
    ):
        pkt.extract(student_dir, made, rank=4, progress=False)
    other = zoo.llama(hidden=48, layers=4, heads=6, kv=3, ffn=96, vocab=len(tokenizer) // 2)
    with pytest.raises(pkt.PktError, match=r"the scores was made|the scores were made|another model .* vocab_size"):
        pkt.plan(scored, save(other, tmp_path / "other", tokenizer), student_dir)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 5}, "layers=5: give one of"),
        ({"layers": [0.5, 1]}, "a list of the teacher's layers"),
        ({"layer_map": {0: 1, 1: 2}}, "a list of the teacher's layers"),
        ({"seed": 2**64}, "seed=.* must be a whole number"),
        ({"modules": ["q"]}, "must be a string"),
    ],
)
def test_options_of_a_plan(scored: Any, teacher_dir: Path, student_dir: Path, options: Any, message: str) -> None:
    with pytest.raises(pkt.PktError, match=message):
        pkt.plan(scored, teacher_dir, student_dir, **options)


def test_one_layer_may_feed_several(teacher_dir: Path, student_dir: Path, seed_file: Path, tmp_path: Path) -> None:
    ext = pkt.transfer(teacher_dir, student_dir, seed_file, out=tmp_path / "out", layers=[1, 1], rank=2, progress=False)
    assert ext.plan.layer_map == [1, 1]
    pkt.Extraction.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float32"}, "is not a torch.dtype"),
        ({"device": "nonsense"}, "is not a device"),
        ({"device": "meta"}, "pkt runs on cpu and cuda"),
        ({"rank": 4.5}, "must be whole numbers"),
        ({"scratch": "/proc/nope"}, "making the folder /proc/nope"),
        ({"host_memory": "1KB", "device_memory": "1GB"}, "allow more with --host-memory"),
    ],
)
def test_options_of_a_transfer(
    teacher_dir: Path, student_dir: Path, seed_file: Path, tmp_path: Path, options: Any, message: str
) -> None:
    with pytest.raises(pkt.PktError, match=message):
        pkt.transfer(teacher_dir, student_dir, seed_file, out=tmp_path / "out", progress=False, **options)
    assert list(tmp_path.iterdir()) == []


def test_tokenizers_that_number_tokens_differently(
    teacher_dir: Path, student_dir: Path, seed_file: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(student_dir, tmp_path / "student"))
    file = other / "tokenizer.json"
    value = json.loads(file.read_text())
    vocab = value["model"]["vocab"]
    names = [n for n in vocab if n.isalpha()][:2]
    vocab[names[0]], vocab[names[1]] = vocab[names[1]], vocab[names[0]]
    file.write_text(json.dumps(value))
    plain, swapped = (pkt.transfer(teacher_dir, s, seed_file, rank=2, progress=False) for s in (student_dir, other))
    assert not any("other ids" in note for note in plain.plan.notes)
    assert any("gives 2 tokens other ids" in note for note in swapped.plan.notes)


@pytest.mark.parametrize(
    ("file", "value", "message"),
    [
        ("config.json", {"hidden_size": "big"}, "not a model transformers can read|no model can be built"),
        ("config.json", {"num_attention_heads": 0}, "not a model transformers can read|no model can be built"),
        ("model.safetensors.index.json", [], "does not say which file holds which weight"),
        ("model.safetensors.index.json", {}, "does not say which file holds which weight"),
    ],
)
def test_damaged_model_folders(
    teacher_dir: Path, student_dir: Path, seed_file: Path, tmp_path: Path, file: str, value: Any, message: str
) -> None:
    folder = Path(shutil.copytree(teacher_dir, tmp_path / "teacher"))
    if file == "config.json":
        value = json.loads((folder / file).read_text()) | value
    else:
        (folder / "model.safetensors").unlink()
    (folder / file).write_text(json.dumps(value))
    with pytest.raises(pkt.PktError, match=message):
        pkt.transfer(folder, student_dir, seed_file, progress=False)


def test_a_folder_that_is_not_there_and_no_hub() -> None:
    for name in ("models/techer", "owner/nope"):
        with pytest.raises(pkt.PktError, match="there is no such folder here, and the Hub does not give it either"):
            Model.of(name).config  # noqa: B018
        with pytest.raises(pkt.PktError, match=name):
            load_tokenizer(name)


def test_a_damaged_record_of_a_run_keeps_what_is_finished(
    teacher_dir: Path, student_dir: Path, seed_file: Path, tmp_path: Path
) -> None:
    def stop(tick: Any) -> None:
        if tick.phase == "backward":
            raise KeyboardInterrupt

    arguments: Any = (teacher_dir, student_dir, seed_file)
    with pytest.raises(KeyboardInterrupt):
        pkt.transfer(*arguments, out=tmp_path / "out", rank=2, progress=False, on_tick=stop)
    run = tmp_path / ".out.run"
    steps = sorted(p.name for p in run.glob("step-*"))
    assert steps
    (run / "run.json").write_text("{oops")
    with pytest.raises(pkt.PktError, match="start over with --force, or delete"):
        pkt.transfer(*arguments, out=tmp_path / "out", rank=2, progress=False)
    assert sorted(p.name for p in run.glob("step-*")) == steps


def test_a_meta_model_has_a_spec_but_no_weights() -> None:
    model = zoo.llama().to("meta")
    assert spec_of(model).num_layers
    with pytest.raises(pkt.PktError, match="meta"):
        pkt.sensitivity(model, [{"input_ids": torch.ones(1, 3, dtype=torch.int64), "labels": torch.ones(1, 3)}])


class TestBadInput:
    """Each gets one `PktError`, and nothing half-written is left behind."""

    @pytest.fixture
    def transfer(self, teacher_dir: Path, student_dir: Path, seed_file: Path, tmp_path: Path) -> Any:
        def failing(teacher: Any = teacher_dir, student: Any = student_dir, seeds: Any = seed_file, *extra: Any) -> str:
            message = fails("transfer", teacher, student, seeds, "--out", tmp_path / "out", "--rank", 4, *extra)
            assert empty_beside(tmp_path / "out")
            return message

        return failing

    @pytest.fixture
    def broken(self, teacher_dir: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(teacher_dir, tmp_path / "broken"))

    def test_malformed_and_empty_seeds(self, transfer: Any, tmp_path: Path) -> None:
        good = {"text": "one two"}
        assert "s.jsonl:2: not valid JSON" in transfer(seeds=write_rows(tmp_path / "s.jsonl", good, "{oops"))
        assert "has no rows" in transfer(seeds=write_rows(tmp_path / "e.jsonl"))
        assert "does not exist" in transfer(seeds=tmp_path / "missing.jsonl")

    def test_models_that_cannot_be_evaluated(self, student_dir: Path, seed_file: Path, tokenizer: Any) -> None:
        rows = pkt.load_seeds(seed_file, tokenizer)
        model = zoo.llama(vocab=len(tokenizer))
        with torch.no_grad():
            model.model.norm.weight[0] = float("nan")
        with pytest.raises(pkt.PktError, match=r"the loss on .*seeds\.jsonl is nan"):
            evaluate(model, rows)
        with pytest.raises(pkt.PktError, match="does not exist in the model"):
            evaluate(zoo.llama(vocab=20), rows)
        assert "pkt runs on cpu and cuda" in fails("evaluate", student_dir, seed_file, "--device", "meta")

    def test_a_row_without_target_tokens(
        self, transfer: Any, teacher_dir: Path, student_dir: Path, seed_file: Path
    ) -> None:
        message = transfer(teacher_dir, student_dir, seed_file, "--max-length", 4)
        assert "seeds.jsonl:1: no target token is left after truncation" in message

    def test_tokenizer_and_model_that_disagree(self, transfer: Any, tmp_path: Path, tokenizer: Any) -> None:
        model = zoo.llama(hidden=48, layers=4, heads=6, kv=3, ffn=96, vocab=100)
        message = transfer(teacher=save(model, tmp_path / "small-vocabulary", tokenizer))
        assert re.search(r"seeds\.jsonl:1: token id \d+ does not exist in .*small-vocabulary \(100 tokens\)", message)

    def test_a_teacher_without_tokenizer(self, transfer: Any, broken: Path) -> None:
        for file in broken.glob("tokenizer*"):
            file.unlink()
        assert "no usable tokenizer" in transfer(teacher=broken)

    def test_a_teacher_smaller_than_the_student(
        self, transfer: Any, student_dir: Path, tmp_path: Path, tokenizer: Any
    ) -> None:
        model = zoo.llama(hidden=32, layers=2, heads=4, kv=2, ffn=48, vocab=len(tokenizer))
        message = transfer(teacher=save(model, tmp_path / "small", tokenizer))
        assert "model.layers.0.mlp.gate_proj [64, 32]" in message
        assert "48 < 64" in message

    def test_truncated_missing_and_foreign_shards(self, transfer: Any, broken: Path) -> None:
        weights = broken / "model.safetensors"
        data = weights.read_bytes()
        weights.write_bytes(data[: len(data) // 2])
        assert "model.safetensors is truncated" in transfer(teacher=broken)
        weights.write_bytes(b"not a checkpoint at all")
        assert "truncated or not a safetensors file" in transfer(teacher=broken)
        weights.unlink()
        assert "has no model.safetensors" in transfer(teacher=broken)
        (broken / "model.safetensors.index.json").write_text(
            '{"weight_map": {"lm_head.weight": "model-1.safetensors"}}'
        )
        assert "model-1.safetensors is missing" in transfer(teacher=broken)

    def test_an_incomplete_checkpoint(self, transfer: Any, broken: Path) -> None:
        weights = load_file(broken / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, broken / "model.safetensors", {"format": "pt"})
        assert "model.layers.1.mlp.up_proj.weight" in transfer(teacher=broken)

    def test_weights_that_are_not_finite(self, transfer: Any, broken: Path) -> None:
        weights = load_file(broken / "model.safetensors")
        weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
        save_file(weights, broken / "model.safetensors", {"format": "pt"})
        message = transfer(teacher=broken)
        assert re.search(
            r"seeds\.jsonl:\d is nan; parameter model.layers.1.mlp.up_proj.weight itself holds NaN", message
        )

    def test_pickles_only_when_they_load_safely(
        self, broken: Path, transfer: Any, student_dir: Path, seed_file: Path, tmp_path: Path
    ) -> None:
        weights = load_file(broken / "model.safetensors")
        (broken / "model.safetensors").unlink()

        class Evil:
            def __reduce__(self) -> Any:
                return os.mkdir, (str(tmp_path / "was-here"),)

        torch.save({"x": Evil()}, broken / "pytorch_model.bin")
        assert "cannot be loaded safely" in transfer(teacher=broken)
        assert not (tmp_path / "was-here").exists()
        torch.save(weights, broken / "pytorch_model.bin")
        with pytest.warns(pkt.PktWarning, match="is loaded whole, not layer by layer: its weights are a pickle"):
            run("transfer", broken, student_dir, seed_file, "--out", tmp_path / "out", "--rank", 4)

    def test_output_folders_in_use(self, teacher_dir: Path, student_dir: Path, seed_file: Path, tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.tex").write_text("years of work")
        for extra in ((), ("--force",)):
            assert "pkt did not write" in fails(
                "transfer", teacher_dir, student_dir, seed_file, "--out", tmp_path / "mine", *extra
            )
        assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
        assert "is a file" in fails(
            "transfer", teacher_dir, student_dir, seed_file, "--out", tmp_path / "mine" / "thesis.tex"
        )
        assert "pkt did not write" in fails("finalize", tmp_path / "mine", "--out", tmp_path / "mine")

    def test_models_that_are_none(self, transfer: Any, tmp_path: Path, seed_file: Path, extraction_dir: Path) -> None:
        assert "does not exist" in transfer(teacher=tmp_path / "nowhere")
        assert "is a file" in transfer(teacher=seed_file)
        assert "config.json does not exist" in transfer(teacher=seed_file.parent)
        assert "is an adapter folder" in transfer(student=extraction_dir)

    def test_wrong_options(self, transfer: Any, teacher_dir: Path, student_dir: Path, seed_file: Path) -> None:
        where = (teacher_dir, student_dir, seed_file)
        assert "--layers 'middle'" in transfer(*where, "--layers", "middle")
        assert "do not exist" in transfer(*where, "--layers", "0,9")
        assert "is unknown" in transfer(*where, "--dtype", "int8")
        assert "rank" in transfer(*where, "--rank", 0)
        assert "above the smaller side" in transfer(*where, "--rank", 17)
        assert "energy" in transfer(*where, "--energy", 2)
        assert "batch_size" in transfer(*where, "--batch-size", 0)
        assert "not a device" in transfer(*where, "--device", "toaster")

    def test_folders_that_are_something_else(
        self, student_dir: Path, extraction_dir: Path, tmp_path: Path, teacher_dir: Path
    ) -> None:
        data = ASSETS / "data" / "train.jsonl"
        assert "no pkt.json" in fails("train", student_dir, student_dir, data, "--out", tmp_path / "run")
        assert "does not fit" in fails("train", teacher_dir, extraction_dir, data, "--out", tmp_path / "run")
        assert not (tmp_path / "run").exists()
        assert "is an extraction, not a trained adapter" in fails("finalize", extraction_dir, "--out", tmp_path / "a")
        assert "is a model, not an adapter folder" in fails("finalize", student_dir, "--out", tmp_path / "a")
        assert "does not fit" in fails("inspect", extraction_dir, "--student", teacher_dir)
        assert "not a file of sensitivities" in fails(
            "plan", student_dir / "model.safetensors", teacher_dir, student_dir
        )
        assert empty_beside(tmp_path / "a")

    def test_a_finished_or_foreign_run_is_refused(
        self, student_dir: Path, extraction_dir: Path, tmp_path: Path
    ) -> None:
        data = ASSETS / "data" / "train.jsonl"
        command = (
            "train",
            student_dir,
            extraction_dir,
            data,
            "--out",
            tmp_path / "run",
            "--max-steps",
            1,
            "--batch-size",
            2,
        )
        run(*command)
        assert "finished run" in fails(*command)
        assert "another run (lr: 0.0003 there, 1.0 here)" in fails(*command, "--lr", 1)

    def test_a_full_disk_leaves_nothing(
        self, teacher_dir: Path, student_dir: Path, seed_file: Path, tmp_path: Path
    ) -> None:
        def small_files() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

        command = [*PKT, "transfer", str(teacher_dir), str(student_dir), str(seed_file), "--rank", "4"]
        done = processes.run([*command, "--out", tmp_path / "out"], preexec_fn=small_files)
        assert done.returncode == 1
        assert "writing" in done.stderr
        assert "limit" in done.stderr
        assert "Traceback" not in done.stderr
        assert empty_beside(tmp_path / "out")

    def test_no_space_is_named_and_an_earlier_result_survives(self, tmp_path: Path) -> None:
        def full() -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with atomic_folder(tmp_path / "out") as scratch:
            (scratch / MANIFEST).write_text("{}")
        with (
            pytest.raises(pkt.PktError, match="No space left on device; free some space"),
            atomic_folder(tmp_path / "out", force=True),
        ):
            full()
        assert (tmp_path / "out" / MANIFEST).read_text() == "{}"
        with pytest.raises(pkt.PktError, match="No space left"), atomic_file(tmp_path / "file"):
            full()
        assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_keywords_and_flags_are_named_after_the_options() -> None:
    import dataclasses
    import inspect

    from pkt.cli.flags import takes
    from pkt.options import Execution, Factorization, Limits, PlanOptions, Reading

    plan, transfer = (PlanOptions,), (PlanOptions, Factorization, Reading, Execution, Limits)
    for function, subjects in ((pkt.plan, plan), (pkt.extract, (Factorization,)), (pkt.transfer, transfer)):
        keywords = inspect.signature(function).parameters
        for field in (f for subject in subjects for f in dataclasses.fields(subject)):
            assert keywords[field.name].default == field.default, (function, field.name)

    @takes(*transfer)
    def command(**options: Any) -> None: ...

    flags = set(inspect.signature(command).parameters) - {"context"}
    fields = {f.name for subject in transfer for f in dataclasses.fields(subject)}
    assert flags == fields - {"prefetch"}


def test_a_flag_that_another_one_makes_useless_is_refused(
    teacher_dir: Path, student_dir: Path, seed_file: Path, tmp_path: Path
) -> None:
    words = ("transfer", teacher_dir, student_dir, seed_file, "--out", tmp_path / "o")
    for rank in (4, 16):
        assert "--rank has no part in it" in fails(*words, "--energy", 0.5, "--rank", rank)
        assert "--rank has no part in it" in fails(*words, "--rank", rank, "--energy", 0.5)
    assert "--max-rank bounds" in fails(*words, "--max-rank", 8)
    assert not (tmp_path / "o").exists()


def test_plan_replaces_nothing_but_a_plan(
    teacher_dir: Path, student_dir: Path, seed_file: Path, tmp_path: Path
) -> None:
    scores, out = tmp_path / "s.safetensors", tmp_path / "p.json"
    run("sensitivity", teacher_dir, seed_file, "--out", scores)
    run("plan", scores, teacher_dir, student_dir, "--out", out)
    before = out.read_bytes()
    assert "is there already" in fails("plan", scores, teacher_dir, student_dir, "--out", out)
    run("plan", scores, teacher_dir, student_dir, "--out", out, "--force", "--select", "random")
    assert out.read_bytes() != before
    for name in ("model.safetensors", "config.json"):
        kept = (teacher_dir / name).read_bytes()
        refused = fails("plan", scores, teacher_dir, student_dir, "--out", teacher_dir / name, "--force")
        assert "holds something else" in refused
        assert (teacher_dir / name).read_bytes() == kept


def test_an_adapter_that_is_not_there_is_told_from_a_folder_of_something_else(tmp_path: Path, seed_file: Path) -> None:
    (tmp_path / "empty").mkdir()
    said = {"gone": "does not exist", "empty": "has no adapter_config.json"}
    for name, gist in said.items():
        assert f"{name} {gist}; name an adapter folder" in fails("finalize", tmp_path / name, "--out", tmp_path / "o")
    assert "is a file; name an adapter folder" in fails("finalize", seed_file, "--out", tmp_path / "o")


def test_lineage_and_transplant_of_strangers_in_words(tmp_path: Path) -> None:
    from conftest import ASSETS

    pair = (ASSETS / "teacher", ASSETS / "student")
    shown = run("lineage", *pair, "--out", tmp_path / "l.json")
    assert "no lineage: " in shown
    assert f"next: pkt train {pair[1]} DATA.jsonl" in shown
    swapped = run("lineage", ASSETS / "descendant", ASSETS / "teacher")
    assert "the student is the wider, 168 hidden units against 84: are the two swapped?" in swapped
    assert (tmp_path / "l.json").is_file()
    refused = fails("transplant", *pair, ASSETS / "data" / "seeds.jsonl", "--out", tmp_path / "t")
    assert "there is nothing to transplant between these models" in refused
    assert "\n" not in refused
    assert empty_beside(tmp_path / "t")
