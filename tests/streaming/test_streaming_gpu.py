"""A teacher scored on a GPU: the CPU's windows, the same bytes every time, and no more memory than was planned.

What can be shown without a GPU runs on the CPU too, as the same test. What cannot has its twin elsewhere: where weights are
already (`test_devices`), the order of copies (`test_streaming_copies`), an out-of-memory that halves (`test_streaming`), which
backward passes are asked to be deterministic (`test_attention`).
"""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import zoo
from oracle import seeds
from test_streaming import streamed
from torch import Tensor

import pkt
from pkt import ops
from pkt.models import checked_device
from pkt.scoring import attention
from pkt.transferring.checkpoints import RunFolder

gpu = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=gpu)]
WIDE: Any = {"hidden": 512, "ffn": 1408}


def windows(ext: Any) -> list[Any]:
    return [ext.plan.layer_map, [(e.source, e.target, e.region) for e in ext.plan.entries]]


def student() -> Any:
    return zoo.llama(hidden=36, layers=2, heads=3, kv=1, ffn=48)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    zoo.llama(True, layers=4).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("device", DEVICES)
def test_every_way_gives_the_windows_of_a_cpu(device: str, teacher: Path, tmp_path: Path) -> None:
    """In fp32 the two best windows of these matrices are further apart than two devices round, so they must be the same."""
    rows, options = seeds(), {"rank": 4, "batch_size": 3, "progress": False}
    expected = pkt.transfer(teacher, student(), rows, **options)
    model = pkt.models.load_model(teacher, device=device)
    for given in (teacher, model):
        assert windows(pkt.transfer(given, student(), rows, device=device, **options)) == windows(expected)
    batches = oracle.batched(oracle.token_samples(7), 7)
    truth = oracle.sensitivity(zoo.llama(True, layers=4), batches)
    whole = pkt.sensitivity(model, batches, device=device, progress=False)
    ways: list[dict[str, Any]] = [{"resident": True}, {}, {"place": "device"}, {"place": "disk"}, {"prefetch": False}]
    for way in ways:
        found = streamed(teacher, batches, tmp_path, device=checked_device(device), **way)
        for name, score in truth.items():
            assert oracle.relative_error(found[name], score) < 1e-5, (way, name)
            assert oracle.relative_error(whole[name].cpu(), score) < 1e-5, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_same_run_gives_the_same_bytes(device: str, tied: bool, tmp_path: Path, record_property: Any) -> None:
    """Wide enough for attention's fused backward passes, with padding (masks) and without; S of all parameters, twice.

    On a GPU it also notes what the order costs: the same scores with it and without, in seconds.
    """
    model = zoo.llama(tied, layers=3, heads=4, kv=2, **({"hidden": 64, "ffn": 96} if device == "cpu" else WIDE))
    model = model.to(device, torch.float32 if device == "cpu" else torch.bfloat16)
    batches = oracle.batched(oracle.token_samples(8, longest=24 if device == "cpu" else 400), 8)
    where = checked_device(device)
    model.save_pretrained(tmp_path / "teacher")

    def runs() -> list[dict[str, Tensor]]:
        return [
            dict(pkt.sensitivity(model, batches, device="cpu", progress=False)),
            streamed(tmp_path / "teacher", batches, tmp_path, device=where),
        ]

    first = runs()
    for again in (runs() for _ in range(3)):
        for one, other in zip(first, again, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)
    if device == "cuda":
        for kind in ("ordered", "unordered"):
            with pytest.MonkeyPatch.context() as patched:
                if kind == "unordered":
                    patched.setattr(attention.OneOrder, "_begin", lambda self, *gradients: None)
                begin = time.perf_counter()
                pkt.sensitivity(model, batches, device="cpu", progress=False)
                record_property(f"seconds {kind}", time.perf_counter() - begin)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_meet_are_added_in_one_order(device: str) -> None:
    torch.manual_seed(0)
    index, rows = torch.randint(0, 5, (4000,)), torch.randn(4000, 33)
    exact = torch.zeros(5, 33, dtype=torch.float64).index_add_(0, index, rows.double())
    found = []
    for _ in range(5):
        acc = torch.zeros(5, 33, device=device)
        ops.add_rows_(acc, index.to(device), rows.to(device))
        found.append(acc.cpu())
    assert oracle.relative_error(found[0], exact) < 1e-5
    assert all(torch.equal(found[0], other) for other in found)


@gpu
def test_a_stream_of_ones_own(teacher: Path, tmp_path: Path) -> None:
    """The loader's thread has another current stream than the caller: what it brings is handed to the caller's."""
    batches, device = oracle.batched(oracle.token_samples(7), 7), checked_device("cuda")
    plain = streamed(teacher, batches, tmp_path, device=device)
    for place in ("host", "disk"):
        with torch.cuda.stream(torch.cuda.Stream()):
            found = streamed(teacher, batches, tmp_path, device=device, place=place)
        assert all(torch.equal(plain[name], found[name]) for name in plain), place


@gpu
def test_a_gpu_that_is_not_the_current_one(teacher: Path, tmp_path: Path) -> None:
    """Nothing is put on the current one: its context, pinned memory and streams are the second's."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU here")
    batches = oracle.batched(oracle.token_samples(7), 7)
    plain = streamed(teacher, batches, tmp_path, device=torch.device("cuda:0"))
    gc.collect()
    before = torch.cuda.memory_allocated(0)
    torch.cuda.reset_peak_memory_stats(0)
    found = streamed(teacher, batches, tmp_path, device=torch.device("cuda:1"))
    assert torch.cuda.max_memory_allocated(0) == before
    assert max(oracle.relative_error(found[name], plain[name]) for name in plain) < 1e-5


def fresh() -> int:
    """Bytes that live tensors take, with nothing cached beside them and a new peak."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def warm(**options: Any) -> None:
    """The same on two layers: libraries have their workspaces afterwards."""
    pkt.transfer(zoo.llama(layers=2, **WIDE).cuda(), student(), seeds(4, 200), rank=4, progress=False, **options)


@gpu
def test_a_model_that_is_there_is_not_copied() -> None:
    """`device="cuda"` names the device of a model on cuda:0: at its peak the run has one copy of the weights."""
    warm(device="cuda")
    before = fresh()
    model = zoo.llama(layers=24, **WIDE).cuda()
    weights = torch.cuda.memory_allocated() - before
    pkt.transfer(model, student(), seeds(4, 40), rank=4, progress=False, device="cuda")
    assert torch.cuda.max_memory_allocated() - before < 1.2 * weights


@gpu
def test_what_is_planned_is_what_is_taken(tmp_path: Path) -> None:
    """The allocator's reserve, which is what other programs see gone, against the plan."""
    zoo.llama(layers=24, **WIDE).save_pretrained(tmp_path / "teacher")
    warm(device="cuda")
    fresh()
    before, planned = torch.cuda.memory_reserved(), []
    options: Any = {"rank": 4, "progress": False, "device": "cuda", "device_memory": "400MB", "host_memory": "8GB"}
    pkt.transfer(tmp_path / "teacher", student(), seeds(16, 200), on_memory=planned.append, **options)
    assert not planned[0].resident
    assert torch.cuda.max_memory_reserved() - before <= planned[0].device_total <= 400_000_000


@gpu
def test_an_allocation_that_fails_halves_the_micro_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit lies between what one sample and what eight at once take: the run must halve, finish, and find the same."""
    model, rows = zoo.llama(layers=2, **WIDE).cuda(), seeds(8, 400)
    options: Any = {"rank": 4, "progress": False, "device": "cuda", "device_memory": "40GB"}
    peaks = {}
    for size in (1, 8):
        fresh()
        calm = pkt.transfer(model, student(), rows, batch_size=size, **options)
        peaks[size] = torch.cuda.max_memory_reserved()
    assert peaks[8] > 1.3 * peaks[1]
    resized: list[str] = []
    plain = RunFolder.resized
    monkeypatch.setattr(RunFolder, "resized", lambda self, sizes, why: resized.append(why) or plain(self, sizes, why))
    fresh()
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction((peaks[1] + peaks[8]) / 2 / total)
    try:
        found = pkt.transfer(model, student(), rows, batch_size=8, out=tmp_path / "out", **options)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert resized
    assert set(resized) == {"out of memory"}
    assert windows(found) == windows(calm)
