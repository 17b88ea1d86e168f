"""Several extractions of several tasks from one reading of the teacher: each is what it is alone, also after a kill."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from oracle import seeds
from safetensors.torch import load_file, save_file

import pkt
from pkt.options import Execution, Factorization, Limits, PlanOptions
from pkt.transferring import Listeners, Recipe, transfer_recipes

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["transformers.models.llama.modeling_llama", "pkt.transferring", "oracle"])
ONE, OTHER = {"rank": 4}, {"select": "random", "layers": "random", "modules": "attention", "rank": 3, "seed": 5}
SETTINGS: dict[str, Any] = {"execution": Execution(3), "limits": Limits(host_memory="1100kB")}


def recipe(rank: int = 4, seed: int = 0, **options: Any) -> Recipe:
    return Recipe(PlanOptions(seed=seed, **options), Factorization(rank, seed=seed))


def tasks() -> dict[str, Any]:
    return {"a": seeds(4), "b": seeds(3, seed=1)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    zoo.llama(hidden=48, layers=4, heads=4, kv=2, ffn=64).save_pretrained(tmp_path / "teacher")
    zoo.llama(hidden=36, layers=2, heads=3, kv=1, ffn=48).save_pretrained(tmp_path / "student")
    return tmp_path


def several(folder: Path, out: str | None = "several", kill_at: str = "", order: int = 1, **options: Any) -> Any:
    def tick(now: Any) -> None:
        if f"{now.phase} {now.layer}" == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    return transfer_recipes(
        folder / "teacher",
        folder / "student",
        dict(list(tasks().items())[::order]),
        {"window": recipe(**ONE), "random": recipe(**OTHER)},
        out=None if out is None else folder / out,
        listeners=Listeners(progress=False, on_tick=tick, **options),
        **SETTINGS,
    )


def killed(folder: Path, moment: str) -> None:
    torch.set_num_threads(1)
    several(folder, kill_at=moment)


def alone(folder: Path, task: str, options: dict[str, Any], **more: Any) -> Path:
    out = folder / f"{task}-{options.get('select', 'window')}"
    models = folder / "teacher", folder / "student"
    pkt.transfer(*models, tasks()[task], out=out, batch_size=3, host_memory="1100kB", progress=False, **options, **more)
    return out


def test_recipes_in_one_reading_are_each_what_it_is_alone_also_after_kills(folder: Path) -> None:
    torch.set_num_threads(1)
    for moment in ("backward 3", "backward 1"):
        process = SERVER.Process(target=killed, args=(folder, moment))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert (folder / ".several.run").is_dir()
    with pytest.raises(pkt.PktError, match="their order changed"):
        several(folder, order=-1)
    found = several(folder)
    assert sorted(found) == [("a", "random"), ("a", "window"), ("b", "random"), ("b", "window")]
    for task in "ab":
        for name, options in (("window", ONE), ("random", OTHER)):
            made, expected = folder / "several" / task / name, alone(folder, task, options)
            assert {p.name: p.read_bytes() for p in made.iterdir()} == {
                p.name: p.read_bytes() for p in expected.iterdir()
            }
    assert not (folder / ".several.run").exists()
    assert several(folder)["a", "window"].plan == found["a", "window"].plan


def test_the_teacher_is_read_once_and_its_scores_are_shown(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pkt.streaming import Engine

    passes: list[int] = []
    plain = Engine.run
    monkeypatch.setattr(Engine, "run", lambda self, *a, **k: passes.append(1) or plain(self, *a, **k))
    shown: dict[str, dict[str, torch.Tensor]] = {"a": {}, "b": {}}

    def scores(task: str, part: Any) -> None:
        shown[task].update({name: score.clone() for name, score in part.items()})

    several(folder, out=None, on_scores=scores)
    assert passes == [1]
    alone(folder, "a", ONE, keep_scores="full")
    kept = load_file(folder / "a-window" / "scores.safetensors")
    assert set(kept) == set(shown["a"]) == set(shown["b"])
    assert all(torch.equal(kept[name], shown["a"][name]) for name in kept)


def test_a_recipe_without_a_name_stands_alone(folder: Path) -> None:
    models = folder / "teacher", folder / "student"
    for recipes, message in (
        ({}, "no recipes"),
        ({"": recipe(), "x": recipe()}, "cannot name a recipe's folder"),
        ({"../x": recipe()}, "cannot name a recipe's folder"),
    ):
        with pytest.raises(pkt.PktError, match=message):
            transfer_recipes(*models, {"": seeds(2)}, recipes, out=folder / "out")
    named = {"x": recipe(), "y": recipe(select="blocks")}
    quiet = Listeners(progress=False)
    transfer_recipes(*models, {"": seeds(2)}, named, out=folder / "out", keep_scores="tiles", listeners=quiet)
    assert sorted(p.name for p in (folder / "out").iterdir()) == ["scores.safetensors", "x", "y"]
    changed = {**named, "y": recipe(select="random")}
    with pytest.raises(pkt.PktError, match="select: blocks there, random here"):
        transfer_recipes(*models, {"": seeds(2)}, changed, out=folder / "out", listeners=quiet)


def test_a_finished_result_of_another_teacher_or_type_is_refused(folder: Path) -> None:
    alone(folder, "a", ONE)
    alone(folder, "a", ONE)
    with pytest.raises(pkt.PktError, match=r"dtype: None there, torch\.float16 here"):
        alone(folder, "a", ONE, dtype=torch.float16)
    weights = load_file(folder / "teacher" / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, folder / "teacher" / "model.safetensors", {"format": "pt"})
    with pytest.raises(pkt.PktError, match="teacher's weights changed"):
        alone(folder, "a", ONE)


def test_the_plan_says_what_the_run_folder_takes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo.llama(hidden=256, layers=4, ffn=512, vocab=67).save_pretrained(folder / "teacher")
    zoo.llama(hidden=128, layers=2, ffn=256, vocab=67).save_pretrained(folder / "student")
    plans: list[Any] = []
    largest = 0

    def tick(now: Any) -> None:
        nonlocal largest
        largest = max(largest, sum(file.stat().st_size for file in (folder / ".out.run").iterdir() if file.is_file()))

    def transfer() -> None:
        transfer_recipes(
            folder / "teacher",
            folder / "student",
            {"": seeds(4)},
            {"": recipe(8)},
            out=folder / "out",
            keep_scores="full",
            listeners=Listeners(progress=False, on_memory=plans.append, on_tick=tick),
        )

    transfer()
    told = plans[0].folder
    # The parts lie there once until the last of them is joined, which no tick sees.
    seen = sum(told.values()) - told["scores to keep"] // 2
    assert 0.8 * seen < largest < 1.1 * seen
    assert f"checkpoints on disk: about {sum(told.values()) / 1e6:.3g} MB (pairs" in "\n".join(plans[0].lines())

    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    shutil.rmtree(folder / "out")
    with pytest.raises(pkt.PktError, match=r"will need up to [0-9.]+ MB more and its disk has 1 MB free"):
        transfer()
    assert not (folder / ".out.run").exists()


def test_only_what_is_wanted_is_made(folder: Path) -> None:
    """Of two tasks and two recipes, two pairs: each as it is when all four are made; the whole model's way too."""
    only = {("a", "window"), ("b", "random")}
    recipes = {"window": recipe(**ONE), "random": recipe(**OTHER)}
    models = folder / "teacher", folder / "student"
    quiet = {"listeners": Listeners(progress=False), **SETTINGS}
    every = several(folder, out=None)
    some = transfer_recipes(*models, tasks(), recipes, only=only, **quiet)
    assert set(some) == only
    for result, extraction in some.items():
        assert extraction.plan == every[result].plan
        for name, pair in extraction.pairs.items():
            assert torch.equal(pair.A, every[result].pairs[name].A)
    transfer_recipes(*models, tasks(), recipes, only=only, out=folder / "some", **quiet)
    assert sorted(str(f.parent.relative_to(folder / "some")) for f in (folder / "some").rglob("pkt.json")) == [
        str(Path("a") / "window"), str(Path("b") / "random"),
    ]  # fmt: skip
