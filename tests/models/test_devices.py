"""The device a name means, resolved where it enters: weights that are there already stay where they are."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
import zoo
from torch._subclasses.fake_tensor import FakeTensorMode

import pkt
from pkt.models import checked_device
from pkt.streaming import open_teacher


def on_two_gpus(monkeypatch: pytest.MonkeyPatch, current: int) -> None:
    """What torch says on a machine with two GPUs, without one."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("cpu", "cpu"), ("cpu:0", "cpu"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0"), (torch.device("cuda"), "cuda:1")],
)
def test_a_device_is_what_its_tensors_say(name: Any, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_two_gpus(monkeypatch, current=1)
    assert checked_device(name) == torch.device(meant)


def test_a_model_that_is_there_already_is_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.llama()
    assert open_teacher(model, checked_device("cpu:0")).source is None
    on_two_gpus(monkeypatch, current=0)
    with FakeTensorMode():
        there = torch.nn.ParameterDict({"weight": torch.nn.Parameter(torch.empty(3, 4, device="cuda:0"))})
        assert open_teacher(there, checked_device("cuda")).source is None
        assert open_teacher(there, checked_device("cuda:1")).source is not None


def test_scores_are_kept_on_the_device_that_is_named() -> None:
    model, batches = zoo.llama(), oracle.batched(oracle.token_samples(2), 2)
    scores = pkt.sensitivity(model, batches, device="cpu:0", progress=False)
    assert {score.device for score in scores.values()} == {torch.device("cpu")}
    with pytest.raises(pkt.PktError, match="is not a device"):
        pkt.sensitivity(model, batches, device="toaster", progress=False)
