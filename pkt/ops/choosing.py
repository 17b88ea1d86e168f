"""Which kernel serves `pkt::linear_sensitivity_` and its tile sums on a GPU: today's, until another was right and faster there.

At the first use of a kind (what is summed, dtype, measure) on a device that has candidates, `trials` checks and times them in
a process of its own, for at most `LIMIT` seconds. The choice is kept in the user's cache folder, a file for each device,
driver, torch, Triton and source of the kernels. `PKT_KERNEL=name` forces one. On a CPU nothing of this happens.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pkt.errors import PktError
from pkt.ops import candidates, trials
from pkt.ops.candidates import STANDARD, Kind

# Seconds that a check may take, and one candidate of it: to compile, to be right and to be timed.
LIMIT, CANDIDATE_LIMIT = 18.0, 9.0
# What a candidate's time must be of today's kernel's: anything nearer is noise.
ENOUGH = 0.98
# What `pkt env --tune` tries.
USUAL = tuple(Kind(tile, torch.bfloat16, 1, True) for tile in (0, 64))
COMMAND = (
    sys.executable,
    "-X",
    "faulthandler",
    "-c",
    "import sys; from pkt.ops.trials import main; main(sys.argv[1:])",
)

Found = dict[str, dict[str, Any]]  # candidate -> what its trial said
_found: dict[tuple[torch.device, Kind], Found] = {}
_one_at_a_time = threading.Lock()


class Row(NamedTuple):
    """One line of `pkt env`: what a kernel was found to be for a kind and a class of shapes."""

    device: str
    kind: str
    shape: str
    kernel: str
    of_standard: str
    said: str


def forced() -> str | None:
    """The kernel that PKT_KERNEL names."""
    name = os.environ.get("PKT_KERNEL") or None
    if name is not None and name not in candidates.MODULES:
        raise PktError(f"PKT_KERNEL is {name!r}; it must be one of {', '.join(candidates.MODULES)}")
    return name


def launch(kind: Kind, out: Tensor, w: Tensor, x: Tensor, dy: Tensor, seq_starts: Tensor, seq_lens: Tensor) -> None:
    """out += what the kind sums, by the kernel chosen for this device and shape."""
    from pkt_kernels.launch import NoFormError

    given = (out, w, x, dy, seq_starts, seq_lens)
    name = forced()
    if name is None:
        name = (
            chosen(kind, trials.shape_class(w.shape[0], w.shape[1], len(x), seq_starts.numel()), x.device)
            if x.is_cuda
            else STANDARD
        )
    elif name != STANDARD and (reason := candidates.obstacle(name, x.device)):
        raise PktError(f"PKT_KERNEL is {name!r}, which does not run on this GPU: {reason}; unset it, or name another")
    if name != STANDARD:
        with contextlib.suppress(NoFormError):  # nothing was written
            candidates.run(name, kind, *given)
            return
    candidates.run(STANDARD, kind, *given)


def chosen(kind: Kind, shape: str, device: torch.device) -> str:
    """The fastest kernel for a class of shapes, tried now if it never was."""
    with _one_at_a_time:
        if (device, kind) not in _found:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return STANDARD  # no work may be waited for now
            _found[device, kind] = found(kind, device)
    return _fastest(_found[device, kind], shape)


def _fastest(found: Found, shape: str) -> str:
    ratios = {name: share for name, said in found.items() if (share := _of_standard(said, shape))}
    best = min(ratios, key=ratios.__getitem__, default=STANDARD)
    return best if ratios.get(best, 1.0) < ENOUGH else STANDARD


def _of_standard(said: dict[str, Any], shape: str) -> float | None:
    """A candidate's time as a share of today's kernel's, where it was right and timed."""
    mine, theirs = said.get("ms", {}).get(shape), said.get("standard_ms", {}).get(shape)
    return mine / theirs if mine and theirs else None


def found(kind: Kind, device: torch.device, *, anew: bool = False, limit: float = LIMIT) -> Found:
    """What the trials of a kind said, from the cache where they were held before."""
    others = [name for name in candidates.MODULES if name != STANDARD and candidates.obstacle(name, device) is None]
    names = [name for name in others if candidates.kernel(name).serves(kind.dtype, kind.tile)]
    if not names:
        return {}
    file = cache_file(device)
    with _lock(file, limit):
        kept = {} if anew else _read(file, str(kind))
        missing = [name for name in names if name not in kept]
        if missing:
            kept |= _try(missing, kind, device, limit)
            _write(file, str(kind), {name: said for name, said in kept.items() if "later" not in said})
    return {name: kept[name] for name in names}


def tune(device: torch.device) -> None:
    """Try every candidate again on what is usual."""
    for kind in USUAL:
        _found[device, kind] = found(kind, device, anew=True)


def table(device: torch.device) -> list[Row]:
    """What is known of every candidate on a device; nothing is tried for it."""
    rows: list[Row] = []
    file = cache_file(device)
    for name in candidates.MODULES:
        if name == STANDARD:
            continue
        if reason := candidates.obstacle(name, device):
            rows.append(Row(str(device), "", "", name, "", f"not used: {reason}"))
            continue
        before = len(rows)
        for kind in _content(file):
            rows.extend(_rows_of(name, str(device), kind, _read(file, kind)))
        if len(rows) == before:
            rows.append(Row(str(device), "", "", name, "", "not tried yet: at its first use, or by `pkt env --tune`"))
    return rows


def _rows_of(name: str, device: str, kind: str, found: Found) -> list[Row]:
    said = found.get(name, {})
    if "refused" in said:
        return [Row(device, kind, "", name, "", f"never used: {said['refused']}")]
    rows = []
    for shape in said.get("ms", {}):
        share = _of_standard(said, shape)
        used = "used" if _fastest(found, shape) == name else f"not used: {_fastest(found, shape)} is faster"
        rows.append(Row(device, kind, shape, name, f"{share:.2f}" if share else "", used))
    return rows


# --- the trials' process --------------------------------------------------------------------------------------------


def _try(names: Sequence[str], kind: Kind, device: torch.device, limit: float) -> Found:
    """Start trials until each candidate was judged or the time is over."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # else they would be timed beside our own work
    end = time.monotonic() + limit
    said: Found = {}
    while (left := [name for name in names if name not in said]) and time.monotonic() < end:
        try:
            judged = _process(left, kind, device, end)
        except OSError:  # no process can be had here: nobody is tried, and today's kernel serves
            judged = {}
        if not judged and time.monotonic() < end:
            judged = {name: {"later": "the trials could not begin"} for name in left}
        said |= judged
    for name in left:
        said.setdefault(name, {"refused": f"its turn did not come within {limit:.0f} s"})
    return said


def _process(names: Sequence[str], kind: Kind, device: torch.device, end: float) -> Found:
    """What one process says; a candidate that takes too long, or with which it ends, is refused."""
    words = [str(device), str(kind.tile), str(kind.dtype).removeprefix("torch."), str(kind.power), str(kind.weighted)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [*COMMAND, *words, *names], stdout=subprocess.PIPE, stderr=errors, text=True, env=_same_sources()
        )
        try:
            judged, current = _listen(process, end)
            if current is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=2)
                process.kill()
                process.wait()
                errors.seek(0)
                judged[current] = {"refused": _ended(process.returncode, errors.read())}
        finally:
            process.kill()
            process.wait()
    return judged


def _ended(status: int, said: str) -> str:
    """How a process ended: by which signal, or with which last words."""
    lines = [line for line in said.splitlines() if line.strip()] or ["it said nothing"]
    faults = [line for line in lines if line.startswith("Fatal Python error")]
    where = f"by signal {-status}" if status < 0 else f"with status {status}"
    return f"its process ended {where} ({(faults or lines)[-1][:160]})"


def _same_sources() -> dict[str, str]:
    """An environment in which the process imports the pkt and the kernels that this one did."""
    roots = [str(folder.parent) for folder in (Path(__file__).parents[1], _kernels())]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*roots, *filter(None, [os.environ.get("PYTHONPATH")])])}


def _listen(process: subprocess.Popen[str], end: float) -> tuple[Found, str | None]:
    """What was said up to the end of the process or of the time, and the candidate whose trial was under way."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    judged: Found = {}
    current, begun = None, time.monotonic()
    while True:
        until = min(end, begun + CANDIDATE_LIMIT) if current else end
        try:
            line = lines.get(timeout=max(until - time.monotonic(), 0.001))
        except queue.Empty:
            if current:
                judged[current] = {"refused": f"it did not end within {time.monotonic() - begun:.0f} s"}
            return judged, None
        if line is None:
            return judged, current
        with contextlib.suppress(ValueError):  # others may print too
            told = json.loads(line)
            if "begins" in told:
                current, begun = told["begins"], time.monotonic()
            else:
                judged[told.pop("name")] = told
                current = None


# --- what is kept ---------------------------------------------------------------------------------------------------


@functools.cache
def facts(device: torch.device) -> dict[str, str]:
    """What a choice depends on."""
    import triton

    properties = torch.cuda.get_device_properties(device)
    driver = Path("/proc/driver/nvidia/version")
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "driver": driver.read_text().splitlines()[0] if driver.is_file() else str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "kernels": source_hash(),
    }


def _kernels() -> Path:
    import pkt_kernels

    return Path(pkt_kernels.__file__).parent


@functools.cache
def source_hash() -> str:
    """Of the kernels' sources, of what tries them, and of pkt._C."""
    digest = hashlib.sha256()
    ours = Path(__file__).parent
    for path in sorted([*_kernels().glob("*.py"), ours / "trials.py", *ours.parent.glob("_C*.so")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def cache_file(device: torch.device) -> Path | None:
    """Where the choices for a device are kept, or None for a user without a home."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(home):
        return None
    name = hashlib.sha256(json.dumps(facts(device), sort_keys=True).encode()).hexdigest()[:16]
    return Path(home) / "pkt" / "kernels" / f"{name}.json"


@contextlib.contextmanager
def _lock(file: Path | None, limit: float) -> Iterator[None]:
    """Of two processes one tries and the other reads what it found; where nothing can be written, each tries for itself."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                handle = stack.enter_context(open(file.with_suffix(".lock"), "w"))
                end = time.monotonic() + limit + 5
                while time.monotonic() < end:
                    try:
                        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        time.sleep(0.05)
        yield


def _content(file: Path | None) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text()) if file is not None else {}
    except (OSError, ValueError):
        return {}  # it only saves time
    return content if isinstance(content, dict) else {}


def _read(file: Path | None, kind: str) -> Found:
    kept = _content(file).get(kind)
    return {name: said for name, said in kept.items() if _sound(said)} if isinstance(kept, dict) else {}


def _sound(said: Any) -> bool:
    """Whether that is what a trial says, so that a damaged file chooses nothing."""
    if not isinstance(said, dict):
        return False
    times = [said.get(key) for key in ("ms", "standard_ms")]
    timed = all(isinstance(t, dict) and all(isinstance(v, float) and v > 0 for v in t.values()) for t in times)
    return timed or isinstance(said.get("refused"), str)


def _write(file: Path | None, kind: str, kept: Found) -> None:
    if file is None:
        return
    scratch = file.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):
        content = _content(file) | {kind: kept}
        scratch.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        os.replace(scratch, file)
    with contextlib.suppress(OSError):
        scratch.unlink(missing_ok=True)
