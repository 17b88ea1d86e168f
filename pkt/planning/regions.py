"""Which part of a teacher's matrix has the student's shape, and which of its layers (METHOD, sections 2 and 3)."""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from pkt import ops
from pkt.errors import PktError
from pkt.files import sha256
from pkt.models import Runs
from pkt.options import LayerChoice, Select

BLOCK = 64
# Longer lists of runs are gathered by an index, and packed in JSON.
_MANY = 64


@dataclass(frozen=True)
class Region:
    """A part of a matrix [out, in]: the product of row runs and column runs [start, stop), or single weights.

    A contiguous window has one run on each axis. For single weights `mask` packs one bit per element of the source.
    Row runs need not ascend: rows are taken in the runs' order.
    """

    shape: tuple[int, int]
    rows: Runs = ()
    cols: Runs = ()
    mask: str | None = None
    source_shape: tuple[int, int] | None = None

    def cut(self, matrix: Tensor) -> Tensor:
        """The region of a matrix; a view for a contiguous window, a copy in the matrix's dtype otherwise."""
        if self.mask is not None:
            return matrix[torch.from_numpy(self._bits()).to(matrix.device)].view(self.shape)
        return _take(_take(matrix, self.rows, 0), self.cols, 1)

    def put(self, matrix: Tensor, piece: Tensor) -> None:
        """Write a piece of this region's shape into a matrix, the inverse of `cut`."""
        if len(self.rows) == len(self.cols) == 1:
            self.cut(matrix).copy_(piece)
            return
        rows, cols = (torch.from_numpy(_positions(axis)).to(matrix.device) for axis in (self.rows, self.cols))
        matrix[rows[:, None], cols] = piece.to(matrix.dtype)

    def inside(self, rows: Runs, source_shape: tuple[int, int]) -> Region:
        """This region of a matrix made of some rows of another, as a region of that other one."""
        if rows == ((0, source_shape[0]),):
            return self
        if self.mask is None:
            return Region(self.shape, through(rows, self.rows), self.cols)
        bits = np.zeros(source_shape, bool)
        bits[_positions(rows)] = self._bits()
        return Region(self.shape, mask=_packed_bits(bits), source_shape=source_shape)

    def _bits(self) -> np.ndarray[Any, Any]:
        assert self.mask is not None
        assert self.source_shape is not None
        packed = np.frombuffer(zlib.decompress(base64.b64decode(self.mask)), np.uint8)
        return np.unpackbits(packed, count=math.prod(self.source_shape)).astype(bool).reshape(self.source_shape)

    def describe(self) -> str:
        """One cell of the plan's table."""
        if self.mask is not None:
            return f"{self.shape[0] * self.shape[1]} single weights"
        if len(self.rows) == len(self.cols) == 1:
            (a, b), (c, d) = self.rows[0], self.cols[0]
            return f"[{a}:{b}, {c}:{d}]"
        return f"{self.shape[0]} rows in {len(self.rows)} runs, {self.shape[1]} columns in {len(self.cols)} runs"

    def to_json(self) -> dict[str, Any]:
        if self.mask is not None:
            return {"shape": self.shape, "mask": self.mask, "source_shape": self.source_shape}
        value = {"shape": self.shape, "rows": _packed_runs(self.rows), "cols": _packed_runs(self.cols)}
        return value if self.source_shape is None else {**value, "source_shape": self.source_shape}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Region:
        source = value.get("source_shape")
        return cls(
            shape=tuple(value["shape"]),
            rows=_unpacked_runs(value.get("rows", ())),
            cols=_unpacked_runs(value.get("cols", ())),
            mask=value.get("mask"),
            source_shape=None if source is None else tuple(source),
        )


def window(row: int, col: int, rows: int, cols: int) -> Region:
    return Region((rows, cols), ((row, row + rows),), ((col, col + cols),))


def runs(index: Sequence[int], width: int = 1) -> Runs:
    """Starts of `width` elements each -> maximal runs [start, stop), in their order."""
    merged: list[list[int]] = []
    for start in index:
        if merged and merged[-1][1] == start:
            merged[-1][1] = start + width
        else:
            merged.append([start, start + width])
    return tuple((a, b) for a, b in merged)


def _take(matrix: Tensor, axis: Runs, dim: int) -> Tensor:
    if len(axis) == 1:
        (a, b) = axis[0]
        return matrix.narrow(dim, a, b - a)
    if len(axis) > _MANY:
        return matrix.index_select(dim, torch.from_numpy(_positions(axis)).to(matrix.device))
    return torch.cat([matrix.narrow(dim, a, b - a) for a, b in axis], dim)


def _positions(axis: Runs) -> np.ndarray[Any, Any]:
    """Every position of the runs, in their order, int64."""
    if not axis:
        return np.zeros(0, np.int64)
    return np.concatenate([np.arange(a, b, dtype=np.int64) for a, b in axis])


def through(outer: Runs, inner: Runs) -> Runs:
    """The positions `inner` of the list of positions `outer`, as runs."""
    if len(outer) == len(inner) == 1:
        return ((outer[0][0] + inner[0][0], outer[0][0] + inner[0][1]),)
    return runs(_positions(outer)[_positions(inner)].tolist())


def _packed_runs(axis: Runs) -> Runs | str:
    if len(axis) <= _MANY:
        return axis
    return base64.b64encode(zlib.compress(np.asarray(axis, "<i8").tobytes(), 6)).decode()


def _unpacked_runs(value: Any) -> Runs:
    if isinstance(value, str):
        value = np.frombuffer(zlib.decompress(base64.b64decode(value)), "<i8").reshape(-1, 2).tolist()
    return tuple((int(a), int(b)) for a, b in value)


def _packed_bits(bits: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(zlib.compress(np.packbits(bits).tobytes(), 6)).decode()


def select_region(
    score: Tensor,
    source_shape: tuple[int, int],
    shape: tuple[int, int],
    strategy: Select,
    *,
    tile: int | None = None,
    steps: tuple[int, int] = (1, 1),
    seed: int = 0,
    name: str = "",
) -> Region:
    """The region of a matrix [n, m] in the student's shape, by one of METHOD's strategies.

    score: S of the matrix [n, m], or its tile sums when `tile` is given (window and blocks only). steps: offsets of a window
    are multiples of these. seed and name make the random window.
    """
    (n, m), (rows, cols) = source_shape, shape
    if (rows, cols) == (n, m):
        return window(0, 0, n, m)
    if strategy == "random":
        choices = (n - rows) // steps[0] + 1, (m - cols) // steps[1] + 1
        rng = np.random.default_rng(int(sha256(str(seed), name)[:16], 16))
        return window(int(rng.integers(choices[0])) * steps[0], int(rng.integers(choices[1])) * steps[1], rows, cols)
    if tile is not None:
        return _from_tiles(score, source_shape, shape, strategy, tile, steps, name)
    if strategy == "window":
        row, col = (int(i) for i in ops.best_window(score, rows, cols, *steps)[0])
        return window(row, col, rows, cols)
    if strategy == "rows_cols":
        return Region(shape, runs(_top(ops.double_sum(score, 1), rows)), runs(_top(ops.double_sum(score, 0), cols)))
    if strategy == "blocks":
        return _best_blocks(_axis_blocks(score, 1, rows), _axis_blocks(score, 0, cols), source_shape, shape)
    if strategy == "weights":
        keep = torch.zeros(n * m, dtype=torch.bool)
        keep[_top_tensor(score.flatten().cpu(), rows * cols)] = True
        return Region(shape, mask=_packed_bits(keep.numpy()), source_shape=source_shape)
    raise PktError(f"select={strategy!r} is unknown; choose one of {', '.join(get_args(Select))}")


def _top_tensor(values: Tensor, count: int) -> Tensor:
    """The positions of the `count` largest values in ascending order; the first wins a tie."""
    return values.sort(descending=True, stable=True).indices[:count].sort().values


def _top(values: Tensor, count: int) -> list[int]:
    picked: list[int] = _top_tensor(values, count).tolist()
    return picked


def block_side(length: int, wanted: int) -> int:
    """The block for cutting `wanted` of `length`: the largest divisor of both, up to 64; of `wanted` alone if that is 1."""
    if length == wanted:
        return length
    common = math.gcd(length, wanted)
    side = next(b for b in range(min(BLOCK, common), 0, -1) if common % b == 0)
    return side if side > 1 else next(b for b in range(min(BLOCK, wanted), 0, -1) if wanted % b == 0)


def select_experts(scores: Tensor, count: int) -> list[int]:
    """The `count` most sensitive experts of a teacher's layer, in their original order, as `select_layers` does for layers."""
    return _top(scores, count)


def _axis_blocks(score: Tensor, summed: int, wanted: int) -> Tensor:
    """Sums over the whole blocks of one axis, fp64 [length // block]."""
    line = ops.double_sum(score, summed)
    side = block_side(len(line), wanted)
    return line[: len(line) // side * side].view(-1, side).sum(1)


def _best_blocks(row_sums: Tensor, col_sums: Tensor, source_shape: tuple[int, int], shape: tuple[int, int]) -> Region:
    chosen = []
    for sums, length, wanted in zip((row_sums, col_sums), source_shape, shape, strict=True):
        side = block_side(length, wanted)
        chosen.append(runs([i * side for i in _top(sums, wanted // side)], side))
    return Region(shape, chosen[0], chosen[1])


def _from_tiles(
    score: Tensor,
    source_shape: tuple[int, int],
    shape: tuple[int, int],
    strategy: Select,
    tile: int,
    steps: tuple[int, int],
    name: str,
) -> Region:
    if strategy not in ("window", "blocks"):
        raise PktError(f"select={strategy!r} needs the scores' elements, and these are tile sums; use window or blocks")
    sides = []
    for length, wanted, step in zip(source_shape, shape, steps, strict=True):
        if length == wanted:
            sides.append((-(-length // tile), 1))
        elif wanted % tile == 0:
            sides.append((wanted // tile, max(1, step // tile) if step % tile == 0 or step == 1 else 0))
        else:
            raise PktError(
                f"{name}: {wanted} of {length} cannot be cut from {tile} x {tile} tile sums; use a tile that divides it"
            )
        if sides[-1][1] == 0:
            raise PktError(
                f"{name}: heads of {step} do not lie on {tile} x {tile} tiles; use a tile that divides {step}"
            )
    # A ragged last tile is no whole tile: it can only be part of an uncut axis.
    whole = [score.shape[i] if source_shape[i] == shape[i] else source_shape[i] // tile for i in (0, 1)]
    score = score[: whole[0], : whole[1]]
    (rows, row_step), (cols, col_step) = sides
    if strategy == "window":
        row, col = (int(i) for i in ops.best_window(score, rows, cols, row_step, col_step)[0])
        return window(row * tile, col * tile, *shape)
    chosen = []
    for axis, count in ((1, rows), (0, cols)):
        length, wanted = source_shape[1 - axis], shape[1 - axis]
        picked = _top(ops.double_sum(score, axis), count)
        chosen.append(((0, length),) if length == wanted else runs([i * tile for i in picked], tile))
    return Region(shape, chosen[0], chosen[1])


def select_layers(
    choice: str | Sequence[int], teacher_layers: int, student_layers: int, scores: Tensor | None, *, seed: int = 0
) -> list[int]:
    """The teacher layer that feeds each student layer, in their original order (METHOD, section 2)."""
    if not isinstance(choice, str):
        chosen = [int(i) for i in choice]
        if len(chosen) != student_layers:
            raise PktError(f"layers lists {len(chosen)} teacher layers; the student has {student_layers}")
        bad = [i for i in chosen if not 0 <= i < teacher_layers]
        if bad:
            raise PktError(f"layers {bad} do not exist; the teacher's are 0 to {teacher_layers - 1}")
        return chosen
    if teacher_layers < student_layers:
        raise PktError(
            f"the teacher has {teacher_layers} layers, fewer than the student's {student_layers}; choose a deeper teacher"
        )
    if choice == "first":
        return list(range(student_layers))
    if choice == "last":
        return list(range(teacher_layers - student_layers, teacher_layers))
    if choice == "random":
        rng = np.random.default_rng(int(sha256(str(seed), "layers")[:16], 16))
        return sorted(int(i) for i in rng.choice(teacher_layers, student_layers, replace=False))
    if choice == "sensitivity":
        assert scores is not None
        return _top(scores, student_layers)
    raise PktError(
        f"layers={choice!r} is unknown; choose one of {', '.join(get_args(LayerChoice))}, or list the layers"
    )
