"""Signs of life: silence is noticed, and nothing else is taken for it."""

from __future__ import annotations

import datetime
import os
import queue
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import ASSETS
from test_torchrun import ENVIRONMENT, end, until, workers

from pkt import heartbeats
from pkt.heartbeats import DONE, Heartbeat

SHORTLY = datetime.timedelta(seconds=30)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeats, "BEAT", 0.02)
    monkeypatch.setattr(heartbeats, "MISSES", 25)


@pytest.fixture
def store() -> dist.Store:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=SHORTLY)


def client(store: dist.Store) -> dist.Store:
    return dist.PrefixStore("pkt/alive", store.clone())


def test_a_rank_that_falls_silent_is_named_and_one_that_is_done_is_not_missed(store: dist.Store) -> None:
    told: queue.Queue[int | None] = queue.Queue()
    others = client(store)
    others.set("1", "7")
    heart = Heartbeat(client(store), 0, 2, told.put)
    assert told.get(timeout=20) == 1
    heart.close()
    others.set("1", DONE)
    heart = Heartbeat(client(store), 0, 2, told.put)
    time.sleep(0.8)
    assert told.empty()
    heart.close()
    assert others.get("0") == DONE.encode()


def test_ranks_that_compute_for_long_miss_nobody(store: dist.Store) -> None:
    told: queue.Queue[int | None] = queue.Queue()
    hearts = [Heartbeat(client(store), rank, 3, told.put) for rank in range(3)]
    begin = time.monotonic()
    while time.monotonic() - begin < 1.5:  # with Python's lock, three times as long as may be missed
        pass
    for heart in hearts:
        heart.close()
        time.sleep(0.6)
    assert told.empty()


@pytest.fixture
def keeper() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that keeps the store, and its port."""
    text = (
        "import torch.distributed as dist, time\n"
        "store = dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)\n"
        "print(store.port, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, int(process.stdout.readline())
        process.kill()


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL], ids=["silent", "closed"])
def test_a_store_that_does_not_answer_is_told_and_one_that_is_gone_ends_the_watch(
    how: signal.Signals, keeper: tuple[subprocess.Popen[str], int]
) -> None:
    told: queue.Queue[int | None] = queue.Queue()
    process, port = keeper
    stores = [dist.TCPStore("127.0.0.1", port, is_master=False) for _ in range(2)]
    hearts = [Heartbeat(store, rank, 2, told.put) for rank, store in enumerate(stores)]
    time.sleep(0.1)
    os.kill(process.pid, how)
    if how == signal.SIGSTOP:
        assert [told.get(timeout=20) for _ in hearts] == [None, None]
    else:
        time.sleep(0.8)
    for heart in hearts:
        heart.close()
    assert told.empty()


# pkt with signs of life so quick that a test can wait for one that does not come.
QUICK = (
    "import pkt.heartbeats\npkt.heartbeats.BEAT, pkt.heartbeats.MISSES = 0.2, 15\nfrom pkt.cli import main\nmain()\n"
)


@pytest.mark.long
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_stands_still_ends_all(stopped: int, teacher_dir: Path, student_dir: Path, tmp_path: Path) -> None:
    """As one of a machine that vanishes: it closes no connection, and it says nothing."""
    lines = (ASSETS / "data" / "train.jsonl").read_text().splitlines()[:60]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "quick.py").write_text(QUICK)
    out, torchrun = tmp_path / "out", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    given = [teacher_dir, student_dir, tmp_path / "rows.jsonl", "--out", out, "--rank", "4", "--batch-size", "1"]
    command = [sys.executable, *torchrun, tmp_path / "quick.py", "transfer", *given]
    process = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=ENVIRONMENT,
    )
    pids = workers(process.pid)
    until(out, 2, process)
    os.kill(pids[stopped], signal.SIGSTOP)
    # torchrun kills it at last, 30 s after it asked it to end.
    lines = [line for line in end(process, within=60) if re.match("error|stopped", line)]
    assert len(lines) == 1, lines
    assert f"rank {stopped} has given no sign of life" in lines[0]
    assert not out.exists()
