"""Which part of a teacher's matrix has the student's shape, and which of its layers (docs/method.md §2, §3)."""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from pkt import ops
from pkt.errors import PktError
from pkt.files import sha256
from pkt.models import Runs
from pkt.options import LayerChoice, Select

T = TypeVar("T")
BLOCK = 64
# Longer lists of runs are gathered by an index, and packed in JSON.
_MANY = 64
_MOST_RUNS = 64 << 20  # bytes of them


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

    def lies_in(self, shape: tuple[int, int]) -> bool:
        """Whether it is a part of a matrix of this shape, as large as it says; a file may hold anything."""
        rows, cols = self.shape
        if min(rows, cols) < 1:
            return False
        if self.mask is not None:
            return self.source_shape == shape and int(self._bits().sum()) == rows * cols
        return all(
            sum(b - a for a, b in axis) == size and all(0 <= a < b <= most for a, b in axis)
            for axis, size, most in ((self.rows, rows, shape[0]), (self.cols, cols, shape[1]))
        )

    def _bits(self) -> np.ndarray[Any, Any]:
        assert self.mask is not None
        assert self.source_shape is not None
        packed = np.frombuffer(_inflated(self.mask, math.prod(self.source_shape) // 8 + 1), np.uint8)
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
        value = np.frombuffer(_inflated(value, _MOST_RUNS), "<i8").reshape(-1, 2).tolist()
    return tuple((int(a), int(b)) for a, b in value)


def _inflated(text: str, most: int) -> bytes:
    """Packed bytes, no more than `most`. Raises `ValueError` for what is not packed by us."""
    try:
        return zlib.decompressobj().decompress(base64.b64decode(text), most)
    except zlib.error as error:
        raise ValueError(str(error)) from error


def _packed_bits(bits: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(zlib.compress(np.packbits(bits).tobytes(), 6)).decode()


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


# A work that asks for the values of tensors, one after another, is told each on the CPU, and ends with its result.
Asking: TypeAlias = Generator[Tensor, Tensor, T]


def together(works: Iterable[Asking[T]]) -> list[T]:
    """The results of works that each ask as often as the others or less; all wait for the device together, once a question."""
    found: dict[int, T] = {}
    asking: list[tuple[int, Asking[T]]] = list(enumerate(works))
    told: list[Tensor | None] = [None] * len(asking)
    while asking:
        still, questions = [], []
        for (number, work), answer in zip(asking, told, strict=True):
            try:
                questions.append(next(work) if answer is None else work.send(answer))
            except StopIteration as end:
                found[number] = end.value
            else:
                still.append((number, work))
        asking, told = still, [*_answered(questions)]
    return [found[number] for number in sorted(found)]


def _answered(questions: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of any dtypes on the CPU, those of one dtype by one copy."""
    answers: dict[int, Tensor] = {}
    for dtype in {question.dtype for question in questions}:
        mine = [i for i, question in enumerate(questions) if question.dtype == dtype]
        answers |= zip(mine, ops.fetched([questions[i] for i in mine]), strict=True)
    return [answers[i] for i in range(len(questions))]


@dataclass(frozen=True)
class Wanted:
    """What a region is chosen for: a matrix [n, m] and the shape wanted of it.

    tile: the scores are sums over tile x tile. steps: offsets of a window are multiples of these. seed and name draw a random
    window.
    """

    source_shape: tuple[int, int]
    shape: tuple[int, int]
    tile: int | None = None
    steps: tuple[int, int] = (1, 1)
    seed: int = 0
    name: str = ""


class Strategy:
    """A way to choose a region by its scores (docs/method.md §3).

    A new one is a class here, a row of `STRATEGIES` and a word of `pkt.options.Select`.

    takes_tiles: tile sums suffice. cuts_windows: `steps` can keep heads whole. keeps_rows: a row of the region is a row of the
    source, so that a vocabulary can be mapped. per_place: the region depends on the student's matrix and not on scores alone.
    """

    takes_tiles = False
    cuts_windows = False
    keeps_rows = True
    per_place = False

    def choose(self, score: Tensor, wanted: Wanted) -> Asking[Region]:
        """The region, smaller than the matrix, by S [n, m] or its tile sums; an `Asking`, for the device's answers."""
        raise NotImplementedError

    def choosing_bytes(self, elements: int) -> int:
        """What `choose` takes at most besides the scores of so many elements."""
        return 4 * elements

    def cut_bytes(self, elements: int, itemsize: int) -> int:
        """What the region of a matrix takes at most; a window is a view."""
        return itemsize * elements


class Window(Strategy):
    """The contiguous window with the largest sum."""

    takes_tiles = cuts_windows = True

    def choose(self, score: Tensor, wanted: Wanted) -> Asking[Region]:
        tile = wanted.tile
        score, counts, steps = (score, wanted.shape, wanted.steps) if tile is None else _on_tiles(score, wanted, tile)
        row, col = (yield ops.best_window(score, *counts, *steps)[0]).tolist()
        return window(row * (tile or 1), col * (tile or 1), *wanted.shape)

    def choosing_bytes(self, elements: int) -> int:
        return 0

    def cut_bytes(self, elements: int, itemsize: int) -> int:
        return 0


class RandomWindow(Window):
    """A window drawn from the seed and the name of what it feeds: the control for the others."""

    per_place = True

    def choose(self, score: Tensor, wanted: Wanted) -> Asking[Region]:
        pairs = zip(wanted.source_shape, wanted.shape, wanted.steps, strict=True)
        choices = [((length - size) // step + 1, step) for length, size, step in pairs]
        rng = _drawing(wanted)
        row, col = (int(rng.integers(count)) * step for count, step in choices)
        yield from ()
        return window(row, col, *wanted.shape)


def _best_blocks(score: Tensor, counts: Sequence[int], sides: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The numbers of the blocks of rows and of columns with the largest sums, ascending.

    On a GPU by one pass of exact sums. On a CPU that is slower than fp64 sums of both axes, beside other work by much.
    """
    if score.device.type != "cpu":
        return ops.best_blocks(score, counts[0], counts[1], sides[0], sides[1])
    lines = (ops.double_sum(score, 1), ops.double_sum(score, 0))
    whole = [line[: len(line) // side * side].view(-1, side).sum(1) for line, side in zip(lines, sides, strict=True)]
    return _top_tensor(whole[0], counts[0]), _top_tensor(whole[1], counts[1])


class RowsCols(Strategy):
    """The rows and the columns with the largest sums, each in their order."""

    def choose(self, score: Tensor, wanted: Wanted) -> Asking[Region]:
        rows, cols = _best_blocks(score, wanted.shape, (1, 1))
        rows, cols = (yield torch.cat((rows, cols))).split([len(rows), len(cols)])
        return Region(wanted.shape, runs(rows.tolist()), runs(cols.tolist()))


class Blocks(Strategy):
    """As `RowsCols`, in blocks of neighbours."""

    takes_tiles = True

    def choose(self, score: Tensor, wanted: Wanted) -> Asking[Region]:
        if wanted.tile is not None:
            yield from ()
            return self._of_tiles(score, wanted, wanted.tile)
        # An axis that is not cut is all of its rows: one block of them would leave fewer bits to the other's sums.
        lengths = list(zip(wanted.source_shape, wanted.shape, strict=True))
        sides = [1 if length == size else block_side(length, size) for length, size in lengths]
        counts = [size // side for (_, size), side in zip(lengths, sides, strict=True)]
        rows, cols = _best_blocks(score, counts, sides)
        chosen = (yield torch.cat((rows, cols))).split([len(rows), len(cols)])
        rows_of, cols_of = (
            runs([i * side for i in picked.tolist()], side) for picked, side in zip(chosen, sides, strict=True)
        )
        return Region(wanted.shape, rows_of, cols_of)

    def _of_tiles(self, score: Tensor, wanted: Wanted, tile: int) -> Region:
        score, counts, _ = _on_tiles(score, wanted, tile)
        chosen = zip(_best_blocks(score, counts, (1, 1)), wanted.source_shape, wanted.shape, strict=True)
        rows, cols = (
            ((0, length),) if length == size else runs([i * tile for i in picked.tolist()], tile)
            for picked, length, size in chosen
        )
        return Region(wanted.shape, rows, cols)


class Weights(Strategy):
    """The largest single weights, laid out in their order."""

    keeps_rows = False

    def choose(self, score: Tensor, wanted: Wanted) -> Asking[Region]:
        keep = torch.zeros(math.prod(wanted.source_shape), dtype=torch.bool)
        keep[_top_tensor(score.flatten().cpu(), math.prod(wanted.shape))] = True
        yield from ()
        return Region(wanted.shape, mask=_packed_bits(keep.numpy()), source_shape=wanted.source_shape)

    def choosing_bytes(self, elements: int) -> int:
        return 32 * elements  # they are sorted


class RandomWeights(Weights):
    """Single weights drawn from the seed and the name of what they feed, laid out in their order: the paper's lowest bar."""

    takes_tiles = per_place = True

    def choose(self, score: Tensor, wanted: Wanted) -> Asking[Region]:
        keep = np.zeros(math.prod(wanted.source_shape), np.bool_)
        keep[: math.prod(wanted.shape)] = True
        _drawing(wanted).shuffle(keep)
        yield from ()
        return Region(wanted.shape, mask=_packed_bits(keep), source_shape=wanted.source_shape)


STRATEGIES: dict[str, Strategy] = {
    "window": Window(),
    "rows_cols": RowsCols(),
    "weights": Weights(),
    "blocks": Blocks(),
    "random": RandomWindow(),
    "random_weights": RandomWeights(),
}


def _drawing(wanted: Wanted) -> np.random.Generator:
    return np.random.default_rng(int(sha256(str(wanted.seed), wanted.name)[:16], 16))


def select_region(score: Tensor, select: Select, wanted: Wanted) -> Region:
    """The region of a matrix [n, m] in the student's shape, by S [n, m] or its tile sums."""
    return together([selecting(score, select, wanted)])[0]


def selecting(score: Tensor, select: Select, wanted: Wanted) -> Asking[Region]:
    """`select_region`, for `together`."""
    if wanted.shape == wanted.source_shape:
        return window(0, 0, *wanted.shape)
    strategy = STRATEGIES[select]
    if wanted.tile is not None and not strategy.takes_tiles:
        able = ", ".join(name for name, s in STRATEGIES.items() if s.takes_tiles)
        raise PktError(f"select={select!r} needs the scores' elements, and these are tile sums; choose one of {able}")
    return (yield from strategy.choose(score, wanted))


def _on_tiles(score: Tensor, wanted: Wanted, tile: int) -> tuple[Tensor, tuple[int, int], tuple[int, int]]:
    """The tile sums to choose among, how many are wanted on each axis, and the steps in tiles."""
    counts, steps = [], []
    for length, size, step in zip(wanted.source_shape, wanted.shape, wanted.steps, strict=True):
        if length != size and size % tile:
            raise PktError(
                f"{wanted.name}: {size} of {length} cannot be cut from {tile} x {tile} tile sums; use a tile that divides it"
            )
        if length != size and step != 1 and step % tile:
            raise PktError(
                f"{wanted.name}: heads of {step} do not lie on {tile} x {tile} tiles; use a tile that divides {step}"
            )
        counts.append(-(-size // tile))
        steps.append(1 if length == size else max(1, step // tile))
    # A ragged last tile is no whole tile: it can only be part of an uncut axis.
    pairs = zip(score.shape, wanted.source_shape, wanted.shape, strict=True)
    whole = [held if length == size else length // tile for held, length, size in pairs]
    return score[: whole[0], : whole[1]], (counts[0], counts[1]), (steps[0], steps[1])


def select_layers(
    choice: str | Sequence[int], teacher_layers: int, student_layers: int, scores: Tensor | None, *, seed: int = 0
) -> list[int]:
    """The teacher layer that feeds each student layer, in their original order (docs/method.md §2)."""
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
