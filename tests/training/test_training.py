"""`pkt train`: one writer a folder, resuming from what is whole, and nothing that diverged is called trained."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ASSETS, save
from safetensors.torch import load_file

import pkt
from pkt.adapters import WEIGHTS
from pkt.files import MANIFEST
from pkt.models import load_model
from pkt.options import Training
from pkt.seeds import Seeds, load_seeds
from pkt.training import fit, folder
from pkt.training import run as training
from pkt.training.trainer import largest_divisor


@pytest.fixture(scope="module")
def rows(tokenizer: Any) -> Seeds:
    return load_seeds(ASSETS / "data" / "train.jsonl", tokenizer, limit=10)


@pytest.fixture(scope="module")
def train(student_dir: Path, extraction_dir: Path, rows: Seeds) -> Any:
    def run(out: Path, **options: Any) -> Any:
        settings: Any = {"max_steps": 6, "batch_size": 2, "micro_batch": 2, "save_steps": 2, "lr": 1e-3, **options}
        given = (settings.pop("student", student_dir), settings.pop("extraction", extraction_dir))
        return training.train(*given, rows, out, quietly=True, **settings)

    return run


@pytest.fixture(scope="module")
def finished(train: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "finished"
    train(out)
    return out


def unfinished(run: Path, out: Path) -> dict[str, Any]:
    """A copy of a finished run as a kill before its end leaves it; returns its settings."""
    shutil.copytree(run, out)
    manifest = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(json.dumps({**manifest, "finished": False}))
    (out / WEIGHTS).unlink()
    settings: dict[str, Any] = manifest["settings"]
    return settings


def test_a_second_run_in_the_same_folder_is_refused(train: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def fit(*args: Any, **options: Any) -> float:
        with pytest.raises(pkt.PktError, match="another run is writing"):
            train(tmp_path / "run")
        return 0.0

    monkeypatch.setattr(training, "fit", fit)
    train(tmp_path / "run")
    assert json.loads((tmp_path / "run" / MANIFEST).read_text())["finished"]
    assert not (tmp_path / "run" / "lock").exists()


def test_a_run_goes_on_from_its_last_complete_checkpoint(
    train: Any, finished: Path, tmp_path: Path, capsys: Any
) -> None:
    def truncate(file: Path) -> None:
        file.write_bytes(file.read_bytes()[:-100])

    out = tmp_path / "run"
    settings = unfinished(finished, out)
    assert folder.start_run(out, settings) == str(out / "checkpoint-6")
    for name, damage, words in (
        (WEIGHTS, truncate, "truncated"),
        (WEIGHTS, Path.unlink, "is missing"),
        ("trainer_state.json", truncate, "not valid JSON"),
        ("trainer_state.json", Path.unlink, "does not exist"),
        ("optimizer.pt", truncate, "optimizer.pt is missing or truncated"),
    ):
        file = out / "checkpoint-6" / name
        whole = file.read_bytes()
        damage(file)
        assert folder.start_run(out, settings) == str(out / "checkpoint-4")
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1
        assert "checkpoint-6 is incomplete" in said
        assert words in said
        file.write_bytes(whole)
    shutil.rmtree(out / "checkpoint-6")
    (out / "checkpoint-6").mkdir()  # as a disk that was full from its first byte leaves it
    (out / "checkpoint-best").mkdir()
    train(out)
    one, two = (load_file(folder / WEIGHTS) for folder in (finished, out))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_resumed_run_takes_the_same_steps_and_reports_the_loss_of_all(
    train: Any, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pkt.training.finite import FiniteTrainer

    steps: list[int] = []
    plain = FiniteTrainer.training_step

    def step(self: Any, *args: Any, **options: Any) -> Any:
        steps.append(self.state.global_step + 1)
        return plain(self, *args, **options)

    monkeypatch.setattr(FiniteTrainer, "training_step", step)
    expected = json.loads((finished / MANIFEST).read_text())["train_loss"]
    assert expected == pytest.approx(mean_of_the_log(finished / "checkpoint-6"), rel=1e-3)
    for left, done in ((6, []), (4, [5, 6])):
        out = tmp_path / f"run-{left}"
        unfinished(finished, out)
        for number in range(left + 2, 8, 2):
            shutil.rmtree(out / f"checkpoint-{number}")
        train(out)
        assert steps == done
        assert json.loads((out / MANIFEST).read_text())["train_loss"] == expected
        one, two = (load_file(folder / WEIGHTS) for folder in (finished, out))
        assert all(torch.equal(one[key], two[key]) for key in one)


def mean_of_the_log(checkpoint: Path) -> float:
    """The mean loss as Trainer logged it, each step."""
    losses = [line["loss"] for line in json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]]
    assert len(losses) == 6
    return sum(losses) / len(losses)


def test_a_full_disk_is_one_error_and_the_same_call_continues(
    train: Any, finished: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    size = (finished / "checkpoint-4" / WEIGHTS).stat().st_size
    before, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        with pytest.raises(pkt.PktError, match="file-size limit"):
            train(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    # The adapter fits the next time, but not the optimizer.
    plain = torch.save
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda value, file, *rest, **options: plain(value, "/dev/full"))
        with pytest.raises(pkt.PktError, match="No space left on device; free some space"):
            train(tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint-2" / WEIGHTS).is_file()
    train(tmp_path / "run")
    one, two = (load_file(folder / WEIGHTS) for folder in (finished, tmp_path / "run"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_weights_are_as_readable_as_the_rest(finished: Path) -> None:
    for where in (finished, finished / "checkpoint-6"):
        modes = {stat.S_IMODE((where / name).stat().st_mode) for name in (WEIGHTS, "adapter_config.json")}
        assert len(modes) == 1


def test_divergence_is_an_error_that_names_the_step(
    train: Any, rows: Seeds, student_dir: Path, tmp_path: Path, tokenizer: Any
) -> None:
    broken = load_model(student_dir)
    broken.lm_head.weight.data[0, 0] = float("nan")
    save(broken, tmp_path / "broken", tokenizer)
    with pytest.raises(pkt.PktError, match=r"the loss is nan at step 1\. Lower the learning rate \(lr=0\.001\)"):
        train(tmp_path / "run", student=tmp_path / "broken")
    assert not json.loads((tmp_path / "run" / MANIFEST).read_text())["finished"]
    # A gradient that is not finite never reaches the weights.
    model = load_model(student_dir)
    calls: list[int] = []
    model.lm_head.weight.register_hook(
        lambda grad: calls.append(1) or (grad * float("inf") if len(calls) == 3 else grad)
    )
    with pytest.raises(pkt.PktError, match="the norm of the gradient is inf at step 3"):
        fit(model, rows, tmp_path / "fit", Training(9.0, 2, max_steps=4, lr=1e-3, save_steps=None), quietly=True)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"lr": float("inf")},
        {"lr": float("nan")},
        {"lr": 1e30},
        {"epochs": float("nan")},
        {"epochs": 0.0},
        {"warmup": -5.0},
        {"warmup": float("nan")},
        {"seed": -1},
        {"seed": 2**32},
        {"dropout": 1.0},
        {"dropout": float("nan")},
        {"max_steps": 0},
        {"max_steps": -5},
        {"batch_size": 0},
        {"micro_batch": 0},
        {"save_steps": 0},
    ],
    ids=str,
)
def test_impossible_numbers_are_refused_before_anything_is_made(
    train: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    (name,) = options
    with pytest.raises(pkt.PktError, match=name):
        train(tmp_path / "run", **options)
    assert list(tmp_path.iterdir()) == []


def test_the_batch_size_is_honoured(rows: Seeds, student_dir: Path, tmp_path: Path, capsys: Any) -> None:
    model, seen = load_model(student_dir), []
    model.register_forward_pre_hook(lambda _, args, given: seen.append(len(given["input_ids"])), with_kwargs=True)
    fit(model, rows, tmp_path, Training(1.0, 5, 3, lr=1e-3, save_steps=None))
    assert seen == [1] * 10
    assert "1 rows in memory at once: the most up to 3 that divide a batch of 5" in capsys.readouterr().err
    for batch, limit, found in ((64, 8, 8), (64, 100, 64), (12, 5, 4), (7, 6, 1)):
        assert largest_divisor(batch, limit) == found


def test_a_step_has_as_many_rows_however_many_gpus_are_visible(
    rows: Seeds, student_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 3))
    model, seen = load_model(student_dir), []
    model.register_forward_pre_hook(lambda _, args, given: seen.append(len(given["input_ids"])), with_kwargs=True)
    fit(model, rows, tmp_path, Training(1.0, 4, 2, lr=1e-3, save_steps=None), quietly=True)
    assert seen == [2] * 5  # ten rows, in steps of four, four and two


def test_folders_of_other_kinds(
    train: Any, finished: Path, extraction_dir: Path, student_dir: Path, tmp_path: Path
) -> None:
    for out in (extraction_dir, extraction_dir / "run", student_dir, student_dir.parent):
        with pytest.raises(pkt.PktError, match="name an output folder apart from it"):
            train(out, force=True)
    with pytest.raises(pkt.PktError, match="is a training run, not an extraction"):
        train(tmp_path / "run", extraction=finished)
    shutil.copytree(extraction_dir, tmp_path / "ext")
    with pytest.raises(pkt.PktError, match="holds an extraction, not a training run"):
        train(tmp_path / "ext")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(pkt.PktError, match="did not write"):
        train(tmp_path / "mine", force=True)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_force_starts_over(train: Any, finished: Path, tmp_path: Path, monkeypatch: Any) -> None:
    out = tmp_path / "my run"
    shutil.copytree(finished, out)
    with pytest.raises(pkt.PktError, match=r"finished run; finalize it \(pkt finalize '.*my run' --out DIR\)"):
        train(out)
    monkeypatch.setattr(training, "fit", lambda *args, **options: options["resume_from"] or 0.5)
    train(out, lr=1e-2, force=True)
    assert json.loads((out / MANIFEST).read_text())["train_loss"] == 0.5
    assert not list(out.glob("checkpoint-*"))
