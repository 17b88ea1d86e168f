"""`pkt sensitivity`: a checkpoint's scores, a layer at a time into a file, are those of `pkt.sensitivity` in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import pytest
from commands import fails, run

import pkt
from pkt.models import Model, load_model, load_tokenizer
from pkt.ops import MEASURES
from pkt.streaming import Engine, NotLayeredError
from pkt.transferring import Listeners, score_checkpoint

LIMITS = ("--device-memory", "3MB", "--host-memory", "3MB")


def in_memory(teacher: Path, seed_file: Path, measure: str = "theta_grad", tile: int | None = None) -> Any:
    seeds = pkt.load_seeds(seed_file, load_tokenizer(teacher))
    return pkt.sensitivity(load_model(teacher), seeds, measure=measure, tile=tile, progress=False)


def check(found: Any, expected: Any) -> None:
    assert set(found) == set(expected)
    assert max(oracle.relative_error(found[name], expected[name]) for name in expected) < 1e-5
    assert found.losses == pytest.approx(expected.losses)
    assert (found.measure, found.tile, found.layers) == (expected.measure, expected.tile, expected.layers)
    assert {name: found.shapes[name] for name in expected} == expected.shapes


@pytest.mark.parametrize("measure", MEASURES)
def test_the_command_streams_every_measure(
    measure: str, teacher_dir: Path, seed_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(self: Model, **options: Any) -> Any:
        raise AssertionError("the teacher is loaded whole")

    out = tmp_path / "made" / "scores.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(Model, "load", load)
        said = run("sensitivity", teacher_dir, seed_file, "--out", out, "--measure", measure, *LIMITS)
    assert "streamed, micro-batches" in said
    check(pkt.Sensitivity.load(out), in_memory(teacher_dir, seed_file, measure))
    assert list(out.parent.iterdir()) == [out]


def test_tiles(teacher_dir: Path, seed_file: Path, tmp_path: Path) -> None:
    run("sensitivity", teacher_dir, seed_file, "--out", tmp_path / "s", "--tile", 16, *LIMITS)
    check(pkt.Sensitivity.load(tmp_path / "s"), in_memory(teacher_dir, seed_file, tile=16))
    for wrong, message in (
        (("--tile", 0), "tile=0 must be at least 1"),
        (("--measure", "gradient"), "measure='gradient' is unknown"),
        (("--batch-size", 0), "batch_size=0"),
        (("--device-memory", "1kB"), "--device-memory"),
    ):
        assert message in fails("sensitivity", teacher_dir, seed_file, "--out", tmp_path / "x", *wrong)
    assert "is there already" in fails("sensitivity", teacher_dir, seed_file, "--out", tmp_path / "s")
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_an_interrupted_one_goes_on(teacher_dir: Path, seed_file: Path, tmp_path: Path) -> None:
    calm = score_checkpoint(teacher_dir, seed_file, tmp_path / "calm", listeners=Listeners(progress=False))
    phases: list[str] = []

    def stop(now: Any) -> None:
        if (now.phase, now.layer) == ("backward", 2):
            raise KeyboardInterrupt

    def note(now: Any) -> None:
        phases.append(f"{now.phase} {now.layer}")

    with pytest.raises(KeyboardInterrupt):
        score_checkpoint(teacher_dir, seed_file, tmp_path / "s", listeners=Listeners(False, on_tick=stop))
    said = run("inspect", tmp_path / "s")
    assert "an unfinished scoring: 2 of 6 parts" in said
    assert "the same pkt sensitivity command continues it" in " ".join(said.split())
    with pytest.raises(pkt.PktError, match="measure: theta_grad there, grad here"):
        score_checkpoint(teacher_dir, seed_file, tmp_path / "s", measure="grad")
    score_checkpoint(teacher_dir, seed_file, tmp_path / "s", listeners=Listeners(False, on_tick=note))
    assert "backward 3" not in phases
    assert (tmp_path / "s").read_bytes() == (tmp_path / "calm").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calm", "s"]
    assert calm.provenance["teacher"]["num_layers"] == 4


def test_what_cannot_be_streamed_is_scored_whole(
    teacher_dir: Path, seed_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Engine, *args: Any, **options: Any) -> Any:
        raise NotLayeredError("its layers share parameters")

    monkeypatch.setattr(Engine, "run", refuse)
    for tile in (None, 16):
        out = tmp_path / f"s-{tile}"
        with pytest.warns(pkt.PktWarning, match="scored whole, not layer by layer: its layers share parameters"):
            score_checkpoint(
                teacher_dir, seed_file, out, measure="fisher", tile=tile, listeners=Listeners(progress=False)
            )
        check(pkt.Sensitivity.load(out), in_memory(teacher_dir, seed_file, "fisher", tile))
