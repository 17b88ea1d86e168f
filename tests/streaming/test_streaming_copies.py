"""Copies beside the computation: that nothing is read before it is there, nor overwritten while in use, and on whose stream.

No GPU is needed for the order: `Late` stands in for one, a device whose side stream does nothing until somebody waits for it. What
is read too early is NaN then, and the calls it is given are the protocol that `pkt.streaming.streams` states. The tests at the
end run the same on a GPU, on a stream and a device that are not the default ones.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import zoo
from test_streaming import streamed
from torch import Tensor

from pkt.streaming import Boundaries, activations, loader
from pkt.streaming.loader import HostTensors, Loader
from pkt.streaming.streams import Streams

CPU = torch.device("cpu")


class Late(Streams):
    """A device with a memory of its own whose copies come as late as they may, and a note of every call."""

    apart = True

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.queue: list[Callable[[], Any]] = []
        self.done = self.marks = 0
        self.local, self.lock = threading.local(), threading.RLock()

    @property
    def here(self) -> str:
        """Whose stream a call is given to: the computation's, or the side stream, from the caller's thread or another."""
        return "side" if getattr(self.local, "side", False) else "main"

    def note(self, *what: Any) -> None:
        with self.lock:
            self.calls.append((self.here, *what))

    def bind_thread(self) -> None:
        self.note("bind", threading.current_thread().name)

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        self.local.side = True
        try:
            yield
        finally:
            self.local.side = False

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        fresh = torch.empty(tuple(shape), dtype=dtype)
        fresh.view(-1).view(torch.uint8).fill_(255)  # NaN in every type
        return fresh

    def copy(self, target: Tensor, source: Tensor) -> None:
        assert self.here == "side", "a copy on the computation's stream"
        self.note("copy", target.untyped_storage().data_ptr())
        with self.lock:
            self.queue.append(lambda: target.copy_(source))

    def mark(self) -> Any:
        with self.lock:
            self.marks += 1
            self.note("mark", self.marks)
            return self.here, self.marks, len(self.queue)

    def wait(self, event: Any) -> None:
        if event is not None:
            self.note("wait", event[1])
            if self.here == "main":
                self.run(event)

    def settle(self, event: Any) -> None:
        if event is not None:
            self.note("settle", event[1])
            self.run(event)

    def lend(self, tensor: Tensor) -> None:
        self.note("lend", tensor.untyped_storage().data_ptr(), threading.current_thread().name)

    def run(self, event: Any) -> None:
        with self.lock:
            while event[0] == "side" and self.done < event[2]:
                self.queue[self.done]()
                self.queue[self.done] = lambda: None
                self.done += 1


def kinds(calls: list[tuple[Any, ...]]) -> list[str]:
    return [f"{call[0]} {call[1]}" for call in calls]


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[Late]:
    """Every loader and store of activations is on such a device, each with streams of its own."""
    made: list[Late] = []

    def streams_of(device: torch.device) -> Streams:
        made.append(Late())
        return made[-1]

    for module in (loader, activations):
        monkeypatch.setattr(module, "streams_of", streams_of)
    return made


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("widened", [False, True])
def test_weights_are_lent_to_the_stream_that_computes_and_not_overwritten_while_it_does(
    prefetch: bool, widened: bool, late: list[Late]
) -> None:
    model = torch.nn.ParameterDict({name: torch.randn(8, 4) for name in "abcd"})
    names = [(name,) for name in model]
    wanted = dict.fromkeys(model, torch.float64 if widened else torch.float32)
    weights = Loader(HostTensors(model), CPU, wanted, prefetch=prefetch, resident=False)
    (streams,) = late
    for name, then in zip(names, [*names[1:], None], strict=True):
        found = weights.get(name, then)[name[0]]
        assert found.dtype == wanted[name[0]]
        assert torch.equal(found.float(), model[name[0]])
        weights.release(name)
    weights.close()
    calls = streams.calls
    if prefetch:
        assert calls[[call[1] for call in calls].index("bind")][2].startswith("pkt-weights")
    # Lent by the thread that computes, on its own stream, whoever has read them.
    lends = [call for call in calls if call[1] == "lend"]
    assert len(lends) == len(names)
    assert {(call[0], call[3]) for call in lends} == {("main", threading.current_thread().name)}
    # Two buffers serve all, and each is written again only after what was marked when it was released.
    assert len({call[2] for call in lends}) <= (2 if prefetch else 1)
    released = [call[2] for call in calls if call[:2] == ("main", "mark")]
    waited = [call[2] for call in calls if call[:2] == ("side", "wait")]
    assert waited == released[: len(waited)]
    assert len(waited) == len(names) - len({call[2] for call in lends})


def test_a_buffer_of_another_size_is_dropped_only_when_nobody_uses_it(late: list[Late]) -> None:
    model = torch.nn.ParameterDict({"a": torch.randn(8, 4), "b": torch.randn(80, 4)})
    weights = Loader(HostTensors(model), CPU, dict.fromkeys(model, torch.float32), prefetch=False, resident=False)
    weights.get(("a",))
    weights.release(("a",))
    release = late[0].calls[-1]
    weights.get(("b",))
    assert ("main", "settle", release[2]) in late[0].calls or ("side", "settle", release[2]) in late[0].calls
    weights.close()


def test_boundaries_leave_and_come_back_in_order(tmp_path: Path, late: list[Late]) -> None:
    store = Boundaries(CPU, ["host", "disk"], tmp_path, behind=False)
    (streams,) = late
    hidden = [torch.randn(2, 3) for _ in range(2)]
    store.put(0, 0, hidden[0])
    # What made it, then the copy.
    assert kinds(streams.calls) == ["main mark", "side wait", "side copy", "side mark"]
    assert streams.calls[0][2] == streams.calls[1][2]
    store.put(0, 1, hidden[1])
    streams.calls.clear()
    assert torch.equal(store.get(0, 0, (0, 1)), hidden[0])
    once = ["main mark", "side wait", "side wait", "side copy", "side mark"]
    assert kinds(streams.calls) == [*once, *once, "main wait"]
    assert streams.calls[-1][2] == streams.calls[4][2]
    streams.calls.clear()
    # It is on its way already.
    assert torch.equal(store.get(0, 1), hidden[1])
    assert kinds(streams.calls) == ["main wait"]
    # Two at most are on their way out, and a file is written when they are out.
    streams.calls.clear()
    store.put(1, 0, hidden[0])
    assert kinds(streams.calls)[0] == "main settle"
    assert kinds(streams.calls)[-1] == "main settle"
    assert torch.equal(store.get(1, 0), hidden[0])
    store.close()
    assert not list(tmp_path.iterdir())


BATCHES = oracle.batched(oracle.token_samples(7), 7)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A teacher, and its scores where host and device are one memory."""
    folder = tmp_path_factory.mktemp("plain")
    zoo.llama(True).save_pretrained(folder)
    return folder, streamed(folder, BATCHES, folder)


@pytest.mark.parametrize("place", ["device", "host", "disk"])
@pytest.mark.parametrize("prefetch", [True, False])
def test_late_copies_change_no_byte(place: Any, prefetch: bool, plain: Any, tmp_path: Path, late: list[Late]) -> None:
    found = streamed(plain[0], BATCHES, tmp_path, place=place, prefetch=prefetch)
    assert sum(call[1] == "copy" for streams in late for call in streams.calls) > 5
    assert all(torch.equal(plain[1][name], found[name]) for name in found)
    assert not list(tmp_path.glob("boundary-*"))
