"""Stand-ins for kernels that could serve `pkt::linear_sensitivity_`, on the CPU, and the trials' process that knows them.

`python stand_in_kernels.py LOG DEVICE TILE DTYPE POWER WEIGHTED NAME...` is `pkt.ops.trials.main` with them; every start is a
line of LOG.
"""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any

import torch

from pkt.ops import candidates, reference, trials

SHAPES = {"large, long": trials.Shape(96, 64, 4, 300), "small, short": trials.Shape(8, 8, 4, 16)}
# What today's kernel takes: large against what a busy machine adds.
SECONDS = 0.03


def sensitivity(seconds: float, change: Any = None) -> Any:
    """The reference as a kernel that takes so long, with `change(acc)` done to what it gives."""

    def linear_sensitivity(acc: torch.Tensor, w: torch.Tensor, *rest: Any) -> None:
        if len(w) in (96, 8):  # the timed shapes
            time.sleep(seconds)
        reference.linear_sensitivity_(acc, w, *rest)
        if change is not None:
            change(acc)

    return linear_sensitivity


def kernel(linear_sensitivity: Any, obstacle: str | None = None, dtypes: tuple[torch.dtype, ...] = ()) -> Any:
    return SimpleNamespace(
        linear_sensitivity=linear_sensitivity,
        linear_sensitivity_tiles=reference.linear_sensitivity_tiles_,
        obstacle=lambda device: obstacle,
        serves=lambda dtype, tile: tile == 0 and (not dtypes or dtype in dtypes),
    )


def fails(*_: Any) -> None:
    raise RuntimeError("PassManager::run failed\nand more")


def no_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")


def formless(*_: Any) -> None:
    from pkt_kernels.launch import NoFormError

    raise NoFormError("not this one")


class Wandering:
    """Another result every time, by more than rounding."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, acc: torch.Tensor, *rest: Any) -> None:
        self.calls += 1
        reference.linear_sensitivity_(acc, *rest)
        acc[0, 0] *= 1 + 1e-6 * self.calls


def outside(acc: torch.Tensor, *rest: Any) -> None:
    reference.linear_sensitivity_(acc, *rest)
    torch.as_strided(acc, (1,), (1,), acc.storage_offset() + acc.stride(0) * len(acc)).fill_(0.0)


KERNELS = {
    "triton": kernel(sensitivity(SECONDS)),
    "faster": kernel(sensitivity(0)),
    "slow": kernel(sensitivity(SECONDS * 3)),
    "differs": kernel(sensitivity(0, lambda acc: acc.mul_(1.001))),
    "nan": kernel(sensitivity(0, lambda acc: acc[0].fill_(float("nan")))),
    "wanders": kernel(Wandering()),
    "outside": kernel(outside),
    "fails": kernel(fails),
    "no memory": kernel(no_memory),
    "no form": kernel(formless),
    "elsewhere": kernel(sensitivity(0), obstacle="its compute capability is 8.0, not 9.0"),
}


def install(*names: str) -> dict[str, str]:
    """`MODULES` with the stand-ins of those names; one that is not there is only the name of a script's."""
    for name in names:
        sys.modules[f"stand_in_{name}"] = KERNELS.get(name, KERNELS["faster"])
    sys.modules["stand_in_triton"] = KERNELS["triton"]
    return {name: f"stand_in_{name}" for name in ("triton", *names)}


def main(log: str, *arguments: str) -> None:
    with open(log, "a") as file:
        print(*arguments[5:], file=file)
    candidates.MODULES = install(*KERNELS)
    trials.main(arguments, SHAPES)


if __name__ == "__main__":
    main(*sys.argv[1:])
