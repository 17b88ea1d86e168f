"""The kernels that can serve `pkt::linear_sensitivity_` and its tile sums on a GPU: today's, and others that must first
prove themselves on the device at hand (`trials`, `choosing`)."""

from __future__ import annotations

import importlib
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

STANDARD = "triton"
# Name -> its module; the first is today's, against which the others are held.
MODULES: dict[str, str] = {
    STANDARD: "pkt_kernels.linear_sensitivity",
    "gluon": "pkt_kernels.linear_sensitivity_hopper",
    "clustered": "pkt.ops.clustered",
}


class Kernel(Protocol):
    """What a module of `MODULES` has; the standard one has no `obstacle` and no `serves`."""

    def linear_sensitivity(
        self, acc: Tensor, w: Tensor, x: Tensor, dy: Tensor, starts: Tensor, lens: Tensor, power: int, weighted: bool
    ) -> None: ...

    def linear_sensitivity_tiles(
        self,
        tiles: Tensor,
        w: Tensor,
        x: Tensor,
        dy: Tensor,
        starts: Tensor,
        lens: Tensor,
        tile: int,
        power: int,
        weighted: bool,
    ) -> None: ...

    def obstacle(self, device: torch.device) -> str | None:
        """Why it cannot run there, or None."""

    def serves(self, dtype: torch.dtype, tile: int) -> bool:
        """Whether it has a form for rows of that type and for such tile sums (0: for the scores)."""


class Kind(NamedTuple):
    """What a kernel is compiled for, and so tried for: tile is 0 for the scores themselves."""

    tile: int
    dtype: torch.dtype
    power: int
    weighted: bool

    def __str__(self) -> str:
        what = f"sums of {self.tile}x{self.tile}" if self.tile else "scores"
        summand = "|θ·g|" if self.weighted else "|g|"
        return f"{what}, {str(self.dtype).removeprefix('torch.')}, {summand}{'²' if self.power == 2 else ''}"


def kernel(name: str) -> Kernel:
    module: Kernel = importlib.import_module(MODULES[name])
    return module


def run(
    name: str, kind: Kind, out: Tensor, w: Tensor, x: Tensor, dy: Tensor, seq_starts: Tensor, seq_lens: Tensor
) -> None:
    """out += what the kind sums, by that kernel; raises NoFormError, before anything is written, where it has no form."""
    if kind.tile:
        kernel(name).linear_sensitivity_tiles(out, w, x, dy, seq_starts, seq_lens, kind.tile, kind.power, kind.weighted)
    else:
        kernel(name).linear_sensitivity(out, w, x, dy, seq_starts, seq_lens, kind.power, kind.weighted)


def obstacle(name: str, device: torch.device) -> str | None:
    """Why that kernel cannot run there, or None."""
    try:
        return kernel(name).obstacle(device)
    except Exception as error:  # its language is an experimental part of Triton, and moves
        return f"it does not import ({type(error).__name__}: {error})"
