"""The demo's worker processes end with the demo, however it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest
import torch

from pkt.demo.workers import workers


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_workers_end_when_a_job_fails_or_a_worker_is_killed() -> None:
    before = multiprocessing.active_children()
    begin = time.monotonic()

    def run(job: Any, *given: int) -> None:
        with workers() as pool:
            first, *_ = [pool.submit(job, *given), *(pool.submit(time.sleep, 600) for _ in range(8))]
            first.result()

    with pytest.raises(ZeroDivisionError):
        run(divmod, 1, 0)
    with pytest.raises(BrokenProcessPool):
        run(os._exit, 7)
    assert time.monotonic() - begin < 300
    assert multiprocessing.active_children() == before


def test_this_process_has_one_thread_meanwhile() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with workers():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


ORPHANS = """
import os, signal, time
from pkt.demo.workers import workers
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
    with workers() as pool:
        print(*{job.result() for job in [pool.submit(os.getpid) for _ in range(20)]}, flush=True)
        time.sleep(600)
"""


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_idle_workers_end_when_the_demo_is_killed(number: int, tmp_path: object) -> None:
    script = f"{tmp_path}/script.py"
    with open(script, "w") as file:
        file.write(ORPHANS)
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as demo:
        assert demo.stdout is not None
        pids = [int(word) for word in demo.stdout.readline().split()]
        demo.send_signal(number)
        demo.stdout.close()
    assert pids
    assert wait_for(lambda: not any(alive(pid) for pid in pids)), pids
