"""Whether a candidate computes what today's kernel does on this device, and how long both take: in a process of its own
(`main`), because a kernel may hang, or leave the device unusable. `choosing` starts it, reads its lines and ends it.

A line of JSON each: {"begins": name}, then {"name": name, ...} with "ms" and "standard_ms" by shape class, or "refused";
"later" in place of that is a reason of the moment (no memory), which is not kept.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pkt.ops.candidates import STANDARD, Kind, run

# Relative to today's kernel: the same products, summed in fp32 in another order.
_TOLERANCE = 1e-5
_ROUNDS = 7
# n, m and the samples' lengths of the small cases: nothing a multiple of a tile, samples empty and of one row.
_CASES = ((130, 72, (30, 0, 70, 1)), (264, 392, (100, 40, 65)), (520, 776, (513, 3, 129)), (1, 8, (5,)))


class Shape(NamedTuple):
    n: int
    m: int
    samples: int
    tokens: int


# The classes of shapes that are timed, and one of each. A small weight has fewer tiles of 128 x 128 than a GPU has
# multiprocessors; a huge one's rows do not stay in a GPU's cache; a short sample is over before its loads are under way.
SHAPES = {
    "huge, long": Shape(13824, 5120, 16, 512),
    "huge, short": Shape(13824, 5120, 64, 128),
    "large, long": Shape(4096, 4096, 16, 512),
    "large, short": Shape(4096, 4096, 64, 128),
    "small, long": Shape(1024, 1024, 16, 512),
    "small, short": Shape(1024, 1024, 64, 128),
}
_SMALL, _HUGE = 132 * 128 * 128, 1 << 25
_SHORT = 256


def shape_class(n: int, m: int, rows: int, samples: int) -> str:
    """The class of a weight and a batch: a key of `SHAPES`. Nothing on the device is asked."""
    size = "small" if n * m < _SMALL else "large" if n * m < _HUGE else "huge"
    return f"{size}, {'short' if rows < _SHORT * samples else 'long'}"


class Inputs(NamedTuple):
    w: Tensor
    x: Tensor
    dy: Tensor
    seq_starts: Tensor
    seq_lens: Tensor


def inputs(kind: Kind, n: int, m: int, lens: Sequence[int], gap: int, device: torch.device) -> Inputs:
    """Random ones; the rows of no sample hold NaN, as does an unread weight."""
    starts = [gap + sum(lens[:j]) + gap * j for j in range(len(lens))]
    rows = gap + sum(lens) + gap * len(lens)
    owned = torch.zeros(rows, 1, dtype=torch.bool)
    for start, length in zip(starts, lens, strict=True):
        owned[start : start + length] = True
    nowhere = ~owned.to(device)
    x, dy = (torch.randn(rows, width, device=device).to(kind.dtype) for width in (m, n))
    if gap:
        x, dy = (rows_.masked_fill_(nowhere, float("nan")) for rows_ in (x, dy))
    w = torch.randn(n, m, device=device).to(kind.dtype)
    if not kind.weighted:
        w.fill_(float("nan"))
    bounds = (torch.tensor(values, dtype=torch.int64, device=device) for values in (starts, lens))
    return Inputs(w, x, dy, *bounds)


def scores(kind: Kind, n: int, m: int, device: torch.device, margin: int = 0) -> tuple[Tensor, Tensor]:
    """What is added to, one, and the NaN that surrounds it."""
    if kind.tile:
        n, m = -(-n // kind.tile), -(-m // kind.tile)
    whole = torch.full((n + 2 * margin, m + 2 * margin), float("nan"), device=device)
    out = whole[margin : n + margin, margin : m + margin]
    out.fill_(1.0)
    return out, whole


def difference(name: str, kind: Kind, device: torch.device) -> str | None:
    """How the candidate differs from today's kernel on the small cases, or None."""
    from pkt_kernels.launch import NoFormError

    tried = 0
    for n, m, lens in _CASES:
        given = inputs(kind, n, m, lens, 3, device)
        wanted, _ = scores(kind, n, m, device)
        run(STANDARD, kind, wanted, *given)
        found, whole = scores(kind, n, m, device, margin=8)
        again, _ = scores(kind, n, m, device, margin=8)
        with contextlib.suppress(NoFormError):
            run(name, kind, found, *given)
            run(name, kind, again, *given)
            tried += 1
            error = float((found.double() - wanted.double()).norm() / (wanted.double() - 1.0).norm())
            if not error <= _TOLERANCE:  # NaN is not within any tolerance
                return f"it differs by {error:.1e} at {n}x{m}"
            if not torch.equal(found, again):
                return f"it gave two results for the same input at {n}x{m}"
            found.fill_(float("nan"))
            if not bool(whole.isnan().all()):
                return f"it writes outside its scores at {n}x{m}"
    return None if tried else "it has no form for any of the cases"


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def timed(name: str, kind: Kind, shape: Shape, device: torch.device) -> tuple[float, float]:
    """Median milliseconds of the candidate and of today's kernel, which take turns."""
    given = inputs(kind, shape.n, shape.m, [shape.tokens] * shape.samples, 0, device)
    out, _ = scores(kind, shape.n, shape.m, device)
    times: dict[str, list[float]] = {name: [], STANDARD: []}
    for round_ in range(1 + _ROUNDS):
        for who, taken in times.items():
            seconds = _seconds(lambda who=who: run(who, kind, out, *given), device)  # type: ignore[misc]
            if round_:  # the first warms up
                taken.append(seconds)
    return statistics.median(times[name]) * 1e3, statistics.median(times[STANDARD]) * 1e3


def trial(name: str, kind: Kind, device: torch.device, shapes: dict[str, Shape]) -> dict[str, Any]:
    """What is said of one candidate: its times, or why it is never used."""
    from pkt_kernels.launch import NoFormError

    reason = difference(name, kind, device)
    if reason is not None:
        return {"name": name, "refused": reason}
    found: dict[str, Any] = {"name": name, "ms": {}, "standard_ms": {}}
    for label, shape in shapes.items():
        with contextlib.suppress(NoFormError):
            found["ms"][label], found["standard_ms"][label] = timed(name, kind, shape, device)
    return found


def trials(
    names: Sequence[str], kind: Kind, device: torch.device, shapes: dict[str, Shape]
) -> Iterator[dict[str, Any]]:
    """Each candidate in turn, up to the first that fails: what it left of the device is not trusted."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    given = inputs(kind, 8, 8, [8], 0, device)
    run(STANDARD, kind, scores(kind, 8, 8, device)[0], *given)  # what fails here is not the candidates' fault
    for name in names:
        yield {"begins": name}
        try:
            yield trial(name, kind, device, shapes)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            yield {"name": name, "later" if "out of memory" in reason else "refused": reason}
            return


def main(arguments: Sequence[str], shapes: dict[str, Shape] = SHAPES) -> None:
    """DEVICE TILE DTYPE POWER WEIGHTED NAME...: what is found, a line each."""
    device, tile, dtype, power, weighted, *names = arguments
    kind = Kind(int(tile), getattr(torch, dtype), int(power), weighted == "True")
    torch.manual_seed(0)
    for line in trials(names, kind, torch.device(device), shapes):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
