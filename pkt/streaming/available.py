"""How much memory this process can take: the machine's, and no more than its control group (a container, a batch job) leaves."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

# Of a control group's folder, by version: its limit, what is taken, and in memory.stat what files take, which can be dropped.
_V2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that can be taken without swapping, or being killed for it. root: where proc and sys are."""
    return min([_of_machine(root), *_of_groups(root)])


def _of_machine(root: Path) -> int:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    except (OSError, StopIteration):
        return int(os.sysconf("SC_PHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))


def _of_groups(root: Path) -> Iterator[int]:
    """What each group around this process leaves; one without a limit, or that does not tell, is left out."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / "sys/fs/cgroup" / controllers
        limit, taken, files = _V1 if controllers else _V2
        # Inside a container the path is the host's, and the container's own group is the top.
        for folder in (top / path.strip("/"), *(top / path.strip("/")).parents):
            with contextlib.suppress(OSError, ValueError):  # "max" is no number
                most = int((folder / limit).read_text())
                stat = dict(each.split() for each in (folder / "memory.stat").read_text().splitlines())
                yield max(0, most - int((folder / taken).read_text()) + sum(int(stat.get(name, 0)) for name in files))
            if folder == top:
                break
