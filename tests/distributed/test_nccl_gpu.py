"""One rank with every exchange between ranks carried out all the same: by nccl on a GPU, and as the same tests by gloo on a CPU."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oracle
import processes
import pytest
import torch
import torch.distributed as dist
import zoo
from oracle import seeds

import pkt
from pkt.ranks import Ranks, joined

gpu = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]


class Only(Ranks):
    """A single rank that spares itself no exchange."""

    alone = False  # type: ignore[assignment]


@pytest.fixture
def only(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    """In the group that torchrun's variables make: nccl where there is a GPU, and gloo beside it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    with joined() as ranks:
        yield Only(ranks.group)


@pytest.fixture
def reduced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The devices of the tensors that torch.distributed is given to sum."""
    found: list[str] = []

    def noting(plain: Callable[..., Any]) -> Callable[..., Any]:
        def run(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
            found.append(tensor.device.type)
            return plain(tensor, *args, **options)

        return run

    for name in ("reduce", "all_reduce"):
        monkeypatch.setattr(dist, name, noting(getattr(dist, name)))
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_transfer_by_one_rank_has_the_same_bytes(
    device: str, tied: bool, only: Ranks, reduced: list[str], tmp_path: Path
) -> None:
    zoo.llama(tied, layers=4).save_pretrained(tmp_path / "teacher")
    student = zoo.llama(tied, hidden=36, layers=2, heads=3, kv=1, ffn=48)
    rows, backend = seeds(), dist.get_backend_config()
    for name, group in (("calm", None), ("only", only)):
        out, options = tmp_path / name, {"rank": 4, "batch_size": 3, "progress": False, "keep_scores": "full"}
        pkt.transfer(tmp_path / "teacher", student, rows, out=out, device=device, group=group, **options)
    calm, again = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("calm", "only"))
    assert calm == again
    assert len(calm) > 1
    # On a CPU ranks send S to its owner, and this one owns it all.
    assert set(reduced) == ({"cuda"} if device == "cuda" else set())
    assert ("nccl" in backend) == torch.cuda.is_available()


@pytest.mark.parametrize("device", DEVICES)
def test_scores_summed_over_one_rank_are_its_own(device: str, only: Ranks, reduced: list[str]) -> None:
    model, batches = zoo.llama(True).to(device), oracle.batched(oracle.token_samples(7), 3)
    whole, found = (pkt.sensitivity(model, batches, group=group, progress=False) for group in (None, only))
    assert found.losses == whole.losses
    for name, score in whole.items():
        assert torch.equal(found[name], score), name
    assert set(reduced) == {device}


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_torchrun_with_one_process_is_the_command_alone(
    device: str, teacher_dir: Path, student_dir: Path, seed_file: Path, tmp_path: Path
) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    for name, words in (("calm", []), ("only", launch)):
        given = [teacher_dir, student_dir, seed_file, "--out", tmp_path / name, "--rank", "4", "--device", device]
        done = processes.run([sys.executable, *words, "-m", "pkt", "transfer", *given], seconds=120)
        assert done.returncode == 0, done.stderr
    calm, again = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("calm", "only"))
    assert calm == again
