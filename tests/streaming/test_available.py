"""How much memory is free: the machine's, and what control groups of either version leave of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkt.streaming.available import free_memory

GB = 10**9


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group(folder: str, version: int, limit: str | int, taken: int, files: int) -> dict[str, str]:
    names = (
        ("memory.max", "memory.current", "")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    )
    return {
        f"{folder}/{names[0]}": f"{limit}\n",
        f"{folder}/{names[1]}": f"{taken}\n",
        f"{folder}/memory.stat": f"anon 1\n{names[2]}inactive_file {files}\n{names[2]}active_file 0\n",
    }


MACHINE = {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable:   {64 * GB // 1024} kB\n"}


@pytest.mark.parametrize(
    ("groups", "free"),
    [
        ({}, 64 * GB // 1024 * 1024),
        ({"proc/self/cgroup": "0::/\n"}, 64 * GB // 1024 * 1024),  # no memory controller
        ({"proc/self/cgroup": "0::/job/step\n", **group("sys/fs/cgroup/job/step", 2, "max", 1, 0)}, 64 * GB // 1024 * 1024),
        # A job's limit is of the group around the step's; files that it read count as free.
        (
            {
                "proc/self/cgroup": "0::/job/step\n",
                **group("sys/fs/cgroup/job/step", 2, "max", 9 * GB, 0),
                **group("sys/fs/cgroup/job", 2, 16 * GB, 9 * GB, 4 * GB),
            },
            11 * GB,
        ),
        # In a container the path is the host's.
        ({"proc/self/cgroup": "4:memory:/docker/1a\n0::/\n", **group("sys/fs/cgroup/memory", 1, 8 * GB, 3 * GB, 1 * GB)}, 6 * GB),
        ({"proc/self/cgroup": "0::/\n", **group("sys/fs/cgroup", 2, 2 * GB, 3 * GB, 0)}, 0),  # over its limit already
    ],
)  # fmt: skip
def test_free_memory(groups: dict[str, str], free: int, tmp_path: Path) -> None:
    assert free_memory(write(tmp_path, {**MACHINE, **groups})) == free


def test_this_machine() -> None:
    assert free_memory() > 2**20
