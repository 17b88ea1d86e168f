"""How ranks come by the weights: what is decided from what they hold, and what is said of it."""

from __future__ import annotations

import pytest

from pkt.streaming import SharedReading

GB = 1_000_000_000


def reading(cache: int, *, weights: int = 140 * GB, passes: int = 2) -> SharedReading:
    """Two ranks with a 70B teacher's layers of 1.7 GB."""
    return SharedReading((12 * GB, 14 * GB), (0, 0), cache, weights, 1_700_000_000, passes)


@pytest.mark.parametrize(
    ("cache", "passes", "way", "said"),
    [
        (140 * GB, 2, "once", "read once on each machine: 140 GB stay in the page cache, which has 140 GB"),
        (
            139 * GB,
            2,
            "together",
            "read twice on each machine: 140 GB are too much for the page cache, which has 139 GB, but",
        ),
        (6 * GB, 1, "together", "read once on each machine: 140 GB are too much"),
        (5 * GB, 2, "apart", "each rank reads the weights twice from the disk: 140 GB are too much"),
        (0, 1, "apart", "each rank reads the weights once from the disk"),
    ],
)
def test_who_reads_is_decided_by_what_is_left(cache: int, passes: int, way: str, said: str) -> None:
    found = reading(cache, passes=passes)
    assert found.way == way
    first, second = found.lines()
    assert first.startswith(
        "2 ranks, each with its share of the seeds: each holds 12 GB to 14 GB of the device; the first one's"
    )
    assert said in second


def test_of_weights_in_memory_and_of_hosts_beside_devices() -> None:
    found = SharedReading((12 * GB,) * 8, (3 * GB, *[2 * GB] * 7), GB, 0, 0, 2)
    (line,) = found.lines()
    assert (
        "8 ranks, each with its share of the seeds: each holds 12 GB of the device and 2 GB to 3 GB of the host;"
        in line
    )
