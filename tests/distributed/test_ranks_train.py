"""Training by ranks: the steps of one process, whatever the number of ranks; and injected models in scripts of the user's own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import ASSETS
from groups import Group
from safetensors.torch import load_file

import pkt
from pkt.ranks import Ranks
from pkt.training.sharing import RowsOfRank, micro_batches

TRAINING = {"batch_size": 4, "micro_batch": 2, "epochs": 2, "dropout": 0.0, "report_to": "none", "quietly": True}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    yield from started(2, tmp_path_factory.mktemp("store"))


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Group]:
    yield from started(3, tmp_path)


def started(world: int, folder: Path) -> Iterator[Group]:
    group = Group(world, folder)
    assert group(as_torchrun) == [None] * world
    yield group
    assert group.end() == [0] * world


def as_torchrun(group: Any) -> None:
    """What accelerate looks at, in a process group that is there already."""
    ranks = Ranks.of(group)
    named = {"RANK": ranks.rank, "LOCAL_RANK": ranks.rank, "WORLD_SIZE": ranks.world, "LOCAL_WORLD_SIZE": ranks.world}
    os.environ.update({name: str(value) for name, value in named.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")


def train(group: Any, student: Path, extraction: Path | None, data: Path, out: Path, **options: Any) -> list[str]:
    pkt.train(student, extraction, data, out, group=group, **{**TRAINING, **options})
    return []


def train_with(group: Any, options: dict[str, Any], *given: Any) -> list[str]:
    return train(group, *given, **options)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Nine rows to learn from, so that of an epoch's last step one rank has no row; and three that are held out."""
    folder = tmp_path_factory.mktemp("rows")
    lines = (ASSETS / "data" / "train.jsonl").read_text().splitlines()
    for name, part in (("rows", lines[:9]), ("held-out", lines[9:12])):
        (folder / name).write_text("\n".join(part) + "\n")
    return [folder / "rows", folder / "held-out"]


def losses(out: Path) -> list[float]:
    state = json.loads(max(out.glob("checkpoint-*/trainer_state.json"), key=os.path.getmtime).read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 6, "held_out": True, "eval_steps": 2},
        {"mode": "residual", "max_steps": 3, "group_by_length": True},
        {"batch_size": 3, "max_steps": 3},
    ],
    ids=["held-out rows", "residual, by length", "a batch that two do not divide"],
)
def test_steps_are_those_of_one_process(
    two: Group, student_dir: Path, extraction_dir: Path, rows: list[Path], options: dict[str, Any], tmp_path: Path
) -> None:
    compare(two, options, (student_dir, extraction_dir, *rows), tmp_path)


def test_three_ranks_share_what_they_do_not_divide(
    three: Group, student_dir: Path, extraction_dir: Path, rows: list[Path], tmp_path: Path
) -> None:
    """Four rows a step, and one in an epoch's last: two ranks have none of it."""
    compare(three, {"max_steps": 6, "micro_batch": 1}, (student_dir, extraction_dir, *rows), tmp_path)


def compare(group: Group, options: dict[str, Any], files: tuple[Path, ...], tmp_path: Path) -> None:
    """A training by one process and by a group of ranks: the same losses and weights, step by step."""
    *given, held_out = files
    options = {**options, "held_out": held_out if options.get("held_out") else None, "save_steps": 1}
    train_with(None, options, *given, tmp_path / "one")
    assert group(train_with, options, *given, tmp_path / "many") == [[]] * group.world
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "many")]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert torch.allclose(weight, weights[1][name], rtol=1e-3, atol=2e-5), name
    manifests = [json.loads((tmp_path / name / "pkt.json").read_text()) for name in ("one", "many")]
    assert manifests[1]["train_loss"] == pytest.approx(manifests[0]["train_loss"], rel=1e-4)
    assert manifests[1]["settings"]["ranks"] == group.world
    if options["held_out"]:
        looks = [manifest["held_out"]["looks"] for manifest in manifests]
        assert [nll for _, nll in looks[1]] == pytest.approx([nll for _, nll in looks[0]], rel=1e-4)


def train_until(group: Any, step: int, *given: Any) -> None:
    """A training that fails in a step, on every rank."""
    from pkt.training.finite import FiniteTrainer

    plain = FiniteTrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise pkt.PktError("no more power")
        return plain(self, *args, **kwargs)

    with patch.object(FiniteTrainer, "training_step", training_step):
        train_with(group, *given)


def test_a_stopped_training_goes_on_with_the_same_number_of_ranks(
    two: Group, student_dir: Path, extraction_dir: Path, rows: list[Path], tmp_path: Path
) -> None:
    options = {"max_steps": 5, "save_steps": 2, "dropout": 0.2}
    given = options, student_dir, extraction_dir, rows[0]
    assert two(train_with, *given, tmp_path / "calm") == [[], []]
    assert {told.text for told in two(train_until, 3, *given, tmp_path / "many")} == {"no more power"}
    (checkpoint,) = (tmp_path / "many").glob("checkpoint-*")
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {file.name for file in checkpoint.iterdir()}
    with pytest.raises(pkt.PktError, match=r"another run \(ranks: 2 there, None here\)"):
        train_with(None, *given, tmp_path / "many")
    assert two(train_with, *given, tmp_path / "many") == [[], []]
    names = ("adapter_model.safetensors", "pkt.json")
    calm, many = ([(tmp_path / out / name).read_bytes() for name in names] for out in ("calm", "many"))
    assert calm == many


def train_other(group: Any, rows: list[Path], *given: Any) -> None:
    """Rank 1 reads other rows."""
    student, extraction, out = given
    train_with(group, {"max_steps": 1}, student, extraction, rows[Ranks.of(group).rank], out)


def test_what_ranks_cannot_train_on_is_refused(
    two: Group, student_dir: Path, extraction_dir: Path, rows: list[Path], tmp_path: Path
) -> None:
    told = two(train_other, rows, student_dir, extraction_dir, tmp_path / "out")
    assert {f.text for f in told} == {
        "rank 1 has other inputs than rank 0 (data changed); give every rank the same files"
    }
    (alone, *_) = two(train_alone, student_dir, extraction_dir, rows[0], tmp_path / "out")
    assert "one of several processes (WORLD_SIZE)" in alone.text
    assert not (tmp_path / "out").exists()


def train_alone(group: Any, *given: Any) -> None:
    train_with(None, {"max_steps": 1}, *given)


def accelerated(group: Any, student: Path, extraction: Path) -> dict[str, Any]:
    """A script of a user's own: a few steps of accelerate on an injected student, each rank with rows of its own."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = pkt.inject(student, extraction)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    torch.manual_seed(accelerator.process_index)
    for _ in range(3):
        ids = torch.randint(0, 60, (2, 8))
        accelerator.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()
    plain = accelerator.unwrap_model(model)
    after = {n: p.detach() for n, p in plain.named_parameters() if "lora_" in n}
    return {"wrapped": type(model).__name__, "before": before, "after": after}


def test_frozen_halves_stay_in_a_script_of_accelerate(two: Group, student_dir: Path, extraction_dir: Path) -> None:
    found = two(accelerated, student_dir, extraction_dir)
    assert [each["wrapped"] for each in found] == ["DistributedDataParallel"] * 2
    first, second = found
    for name, before in first["before"].items():
        after, axis = first["after"][name], 0 if "lora_A" in name or "embedding_A" in name else 1
        assert torch.equal(after, second["after"][name]), name
        half = before.shape[axis] // 2
        for moves, start in ((True, 0), (False, half)):
            part = [t.narrow(axis, start, half) for t in (before, after)]
            assert torch.equal(*part) != moves, (name, moves)


def test_every_row_of_a_step_is_some_ranks() -> None:
    for rows, at_once, world, count in ((4, 2, 2, 9), (64, 8, 3, 130), (3, 1, 2, 7), (2, 2, 3, 5)):
        ranks = [Ranks() for _ in range(world)]
        for number, each in enumerate(ranks):
            each.rank, each.world = number, world
        batches = [list(RowsOfRank(list(range(count)), rows, at_once, each)) for each in ranks]
        micro = micro_batches(rows, at_once, world)
        assert {len(own) for own in batches} == {micro * -(-count // rows)}
        assert max(len(batch) for own in batches for batch in own) <= at_once
        for step in range(-(-count // rows)):
            mine = [batch for own in batches for batch in own[step * micro : (step + 1) * micro]]
            real = sorted(row for batch in mine for row in batch if row >= 0)
            assert real == list(range(step * rows, min(count, (step + 1) * rows)))


def sharded(group: Any, student: Path, extraction: Path) -> list[float]:
    """Losses of three steps of an injected student, its weights in parts by FSDP2 where there is a group."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model: Any = pkt.inject(student, extraction, mode="residual")
    if group is not None:
        mesh = init_device_mesh("cpu", (Ranks.of(group).world,))
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    ids = torch.randint(0, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    found = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss))
    return found


def test_a_residual_injection_trains_in_parts(two: Group, student_dir: Path, extraction_dir: Path) -> None:
    one = sharded(None, student_dir, extraction_dir)
    for many in two(sharded, student_dir, extraction_dir):
        assert many == pytest.approx(one, rel=1e-5)
