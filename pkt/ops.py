"""Every operation of pkt once: its schema, its fake, its torch implementation and its GPU implementation.

The dispatcher is the fallback: callers say `ops.linear_sensitivity_(...)` and never ask where the tensors are. The torch
implementations below run on any device; on CUDA the Triton kernels of `pkt_kernels` take their place when Triton is there
and the device can run them, on either device what `pkt._C` has (`implementation()` says which one each op uses, and why).
"""

from __future__ import annotations

import functools
import importlib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pkt.errors import PktError, PktWarning
from pkt.rsvd_reference import rsvd as _rsvd_torch
from pkt.rsvd_reference import rsvd_batch as _rsvd_batch_torch

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Elements of one block of a gradient on the CPU: 1 MiB of fp32 stays in a core's L2 while it is folded into the scores.
_BLOCK_ELEMENTS = 1 << 18
# And while products make it: smaller blocks leave the second thread waiting (2^18: a third slower on two).
GRADIENT_ELEMENTS = 1 << 20
# Sums in fp64 copy a block to that type: one that stays in the first caches.
_SUM_ELEMENTS = 1 << 14
# What `best_window` and sums in fp64 need besides the scores on a CPU.
SEARCH_BYTES = 48 * _BLOCK_ELEMENTS

_lib = torch.library.Library("pkt", "DEF")
_lib.define("abs_accumulate_(Tensor(a!) acc, Tensor theta, Tensor grad) -> ()")
_lib.define("abs_accumulate_many_(Tensor(a!)[] acc, Tensor[] theta, Tensor[] grad) -> ()")
_lib.define(
    "linear_sensitivity_(Tensor(a!) acc, Tensor w, Tensor x, Tensor dy, Tensor seq_starts, Tensor seq_lens) -> ()"
)
_lib.define(
    "linear_sensitivity_tiles_(Tensor(a!) tiles, Tensor w, Tensor x, Tensor dy, Tensor seq_starts, Tensor seq_lens, "
    "int tile) -> ()"
)
_lib.define(
    "embedding_sensitivity_(Tensor(a!) acc, Tensor w, Tensor ids, Tensor dy, Tensor seq_starts, Tensor seq_lens) -> ()"
)
_lib.define("best_window(Tensor score, int rows, int cols, int row_step=1, int col_step=1) -> (Tensor, Tensor)")
_lib.define("rsvd(Tensor a, int rank, int oversample=16, int iters=4, int seed=0) -> (Tensor, Tensor, Tensor, Tensor)")
_lib.define(
    "rsvd_batch(Tensor[] a, int rank, int oversample=16, int iters=4, int seed=0) -> "
    "(Tensor[], Tensor[], Tensor[], Tensor)"
)


# --- torch implementations ------------------------------------------------------------------------------------------


def _working(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _spans(seq_starts: Tensor, seq_lens: Tensor) -> list[tuple[int, int]]:
    return [(s, s + n) for s, n in zip(seq_starts.tolist(), seq_lens.tolist(), strict=True) if n]


def _abs_accumulate_torch(acc: Tensor, theta: Tensor, grad: Tensor) -> None:
    work = _working(theta, grad)
    if acc.ndim == 0:
        acc += (theta.to(work) * grad.to(work)).abs()
        return
    rows = max(1, _BLOCK_ELEMENTS * acc.shape[0] // max(1, acc.numel()))
    for a, t, g in zip(acc.split(rows), theta.split(rows), grad.split(rows), strict=True):
        a += (t.to(work) * g.to(work)).abs_()


def _abs_accumulate_many_torch(acc: list[Tensor], theta: list[Tensor], grad: list[Tensor]) -> None:
    for one in zip(acc, theta, grad, strict=True):
        _abs_accumulate_torch(*one)


def _abs_gradient_blocks(x: Tensor, dy: Tensor, seq_starts: Tensor, seq_lens: Tensor, row_multiple: int) -> Any:
    """Yield (rows, Σ_j |dY_jᵀ X_j| of those rows), one cache-sized block of rows at a time."""
    n, m = dy.shape[1], x.shape[1]
    work = _working(x, dy)
    samples = [(x[a:b].to(work), dy[a:b].to(work)) for a, b in _spans(seq_starts, seq_lens)]
    block = GRADIENT_ELEMENTS if x.device.type == "cpu" else n * m
    rows = max(1, min(n, block // max(1, m)))
    rows = -(-rows // row_multiple) * row_multiple
    grad = torch.empty(min(rows, n), m, dtype=work, device=x.device)
    total = torch.empty_like(grad)
    for top in range(0, n if samples and m else 0, rows):
        part = slice(top, min(top + rows, n))
        height = part.stop - top
        for j, (x_j, dy_j) in enumerate(samples):
            out = (grad if j else total)[:height]
            torch.mm(dy_j[:, part].t(), x_j, out=out)
            out.abs_()
            if j:
                total[:height] += out
        yield part, total[:height]


def _linear_sensitivity_torch(
    acc: Tensor, w: Tensor, x: Tensor, dy: Tensor, seq_starts: Tensor, seq_lens: Tensor
) -> None:
    for part, total in _abs_gradient_blocks(x, dy, seq_starts, seq_lens, 1):
        acc[part].addcmul_(total.to(acc.dtype), w[part].to(acc.dtype).abs())


def tile_sums(values: Tensor, tile: int) -> Tensor:
    """Sums over tile x tile blocks of the last two dims (over `tile` elements of a vector); ragged edges are kept.

    values [..., n, m] -> [..., ceil(n/tile), ceil(m/tile)], fp32.
    """
    pads = [0, -values.shape[-1] % tile]
    if values.ndim > 1:
        pads += [0, -values.shape[-2] % tile]
    padded = torch.nn.functional.pad(values, pads)
    if values.ndim == 1:
        return padded.view(-1, tile).sum(1, dtype=torch.float32)
    *lead, n, m = padded.shape
    return padded.view(*lead, n // tile, tile, m // tile, tile).sum((-3, -1), dtype=torch.float32)


def _linear_sensitivity_tiles_torch(
    tiles: Tensor, w: Tensor, x: Tensor, dy: Tensor, seq_starts: Tensor, seq_lens: Tensor, tile: int
) -> None:
    for part, total in _abs_gradient_blocks(x, dy, seq_starts, seq_lens, tile):
        total *= w[part].to(total.dtype).abs()
        tiles[part.start // tile : -(-part.stop // tile)] += tile_sums(total, tile)


def double_sum(values: Tensor, dim: int | None = None) -> Tensor:
    """Σ in fp64 of all values, or of a matrix along `dim`. On a CPU torch's own would first make an fp64 copy of the whole."""
    if values.ndim == 0 or values.device.type != "cpu":
        return values.sum(dtype=torch.float64) if dim is None else values.sum(dim, dtype=torch.float64)
    rows = max(1, _SUM_ELEMENTS * values.shape[0] // max(1, values.numel()))
    parts = (p.sum(dtype=torch.float64) if dim is None else p.sum(dim, dtype=torch.float64) for p in values.split(rows))
    return torch.cat(list(parts)) if dim == 1 else functools.reduce(Tensor.add_, parts)


def embedding_rows(
    ids: Tensor, dy: Tensor, seq_starts: Tensor, seq_lens: Tensor, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """The gradient rows an embedding gets, one per (sample, token id): ids [U], rows [U, d], summed over positions."""
    work = _working(dy)
    spans = _spans(seq_starts, seq_lens)
    if not spans:
        return ids.new_empty(0), dy.new_empty(0, dy.shape[1], dtype=work)
    keys = torch.cat([ids[a:b] + j * vocabulary for j, (a, b) in enumerate(spans)])
    rows = torch.cat([dy[a:b] for a, b in spans]).to(work)
    unique, inverse = keys.unique(return_inverse=True)
    summed = torch.zeros(len(unique), dy.shape[1], dtype=work, device=dy.device).index_add_(0, inverse, rows)
    return unique % vocabulary, summed


def _embedding_sensitivity_torch(
    acc: Tensor, w: Tensor, ids: Tensor, dy: Tensor, seq_starts: Tensor, seq_lens: Tensor
) -> None:
    touched, rows = embedding_rows(ids, dy, seq_starts, seq_lens, w.shape[0])
    acc.index_add_(0, touched, (rows * w[touched].to(rows.dtype)).abs_().to(acc.dtype))


def window_bits(rows: int, cols: int) -> int:
    """Bits of max(S) kept when S is quantized: 36, less where a window's exact sum would not fit in 62."""
    return min(36, 62 - math.ceil(math.log2(max(1, rows * cols))))


def _best_window_torch(
    score: Tensor, rows: int, cols: int, row_step: int = 1, col_step: int = 1
) -> tuple[Tensor, Tensor]:
    """Exact integer sums of every window, by prefix sums (their wrap-around cancels in the differences)."""
    exponent = torch.frexp(score.max().double()).exponent
    scale = torch.ldexp(torch.ones((), dtype=torch.float64, device=score.device), window_bits(rows, cols) - exponent)

    def quantized(part: Tensor) -> Tensor:
        return (part.double() * scale).add_(0.5).floor_().long()

    # A block of rows at a time, so that no copy of the scores exists; on a GPU, where launches cost, a larger one.
    block = _BLOCK_ELEMENTS if score.device.type == "cpu" else 64 * _BLOCK_ELEMENTS
    height = max(1, block // score.shape[1])
    # Sums over rows top .. top + rows of each column, for the last row of the block before.
    column = torch.zeros(1, score.shape[1], dtype=torch.int64, device=score.device)
    for part in score[: rows - 1].split(height):
        column += quantized(part).sum(0)
    best: list[tuple[Tensor, Tensor]] = []
    for top in range(0, score.shape[0] - rows + 1, height):
        stop = min(top + height, score.shape[0] - rows + 1)
        change = quantized(score[top + rows - 1 : stop + rows - 1])
        change[1:] -= quantized(score[top : stop - 1])
        sums = change.cumsum_(0).add_(column)
        column = sums[-1:] - quantized(score[stop - 1 : stop])
        sums = _sliding(sums[-top % row_step :: row_step], cols)[:, ::col_step]
        if not sums.numel():
            continue
        flat = sums.flatten()
        total = flat.max()
        # argmax does not promise the first of equal maxima.
        first = (
            (flat == total).to(torch.uint8).argmax() if flat.device.type == "cpu" else (flat == total).nonzero()[0, 0]
        )
        row = top + -top % row_step + first // sums.shape[1] * row_step
        best.append((total, torch.stack([row, first % sums.shape[1] * col_step])))
    totals = torch.stack([total for total, _ in best])
    # The first block of those that share the largest sum.
    found = int((totals == totals.max()).to(torch.uint8).argmax())
    return best[found][1], best[found][0]


def _sliding(values: Tensor, width: int) -> Tensor:
    """Sums of `width` neighbours in each row."""
    prefix = values.cumsum(1)
    sums = prefix[:, width - 1 :].clone()
    sums[:, 1:] -= prefix[:, : values.shape[1] - width]
    return sums


@functools.cache
def native_halves() -> frozenset[torch.dtype]:
    """The half types that this CPU multiplies itself; in the others torch is tens of times slower than in fp32."""
    here = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if not torch.backends.mkldnn.is_available():
        return frozenset()
    return frozenset(dtype for dtype, name in here.items() if getattr(torch.ops.mkldnn, name)())


def working_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type to compute in for weights of a type: fp32, which holds them exactly, for a half type a CPU cannot multiply."""
    half = dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half and device.type == "cpu" and dtype not in native_halves() else dtype


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: torch's on a GPU and on a CPU, CUDA's, C++'s, or one asked for by pkt._C."""
    told = ("out of memory", "can't allocate memory", "bad_alloc", "STATUS_ALLOC_FAILED")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(text in str(error) for text in told)


# --- which implementation runs --------------------------------------------------------------------------------------


def _import_extension() -> Any:
    try:
        return importlib.import_module("pkt._C")
    except ModuleNotFoundError as error:
        if error.name != "pkt._C":
            raise
        return None
    except ImportError as error:
        raise PktError(
            f"pkt's compiled extension is there but does not load ({error}); build it again for this torch with "
            "`pip install -e . --no-build-isolation`, or delete it to use the torch implementation"
        ) from error


_extension = _import_extension()

_TRITON: dict[str, tuple[str, str]] = {
    "abs_accumulate_": ("abs_accumulate", "abs_accumulate"),
    "abs_accumulate_many_": ("abs_accumulate", "abs_accumulate_many"),
    "linear_sensitivity_": ("linear_sensitivity", "linear_sensitivity"),
    "linear_sensitivity_tiles_": ("linear_sensitivity", "linear_sensitivity_tiles"),
    "embedding_sensitivity_": ("embedding_sensitivity", "embedding_sensitivity"),
    "best_window": ("window_search", "best_window"),
}
_TORCH: dict[str, Callable[..., Any]] = {
    "abs_accumulate_": _abs_accumulate_torch,
    "abs_accumulate_many_": _abs_accumulate_many_torch,
    "linear_sensitivity_": _linear_sensitivity_torch,
    "linear_sensitivity_tiles_": _linear_sensitivity_tiles_torch,
    "embedding_sensitivity_": _embedding_sensitivity_torch,
    "best_window": _best_window_torch,
}


@functools.cache
def _no_triton(device_index: int) -> str | None:
    """Why the Triton kernels cannot run on this CUDA device, or None when they can."""
    capability = torch.cuda.get_device_capability(device_index)
    if capability < (8, 0):
        return f"the GPU's compute capability is {capability[0]}.{capability[1]}, below 8.0"
    try:
        import triton  # noqa: F401
    except Exception as error:  # a broken Triton raises anything from ImportError to OSError
        return f"Triton does not import ({error})"
    return None


def _cuda(name: str) -> Callable[..., Any]:
    module, attribute = _TRITON[name]

    def launch(*args: Any) -> Any:
        tensors = [t for a in args for t in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(t, Tensor)]
        device = tensors[0].device
        reason = _no_triton(device.index or 0)
        if reason is not None:
            _warn_once(reason)
        elif not any(t.dtype == torch.float64 for t in tensors):
            kernel = getattr(importlib.import_module(f"pkt_kernels.{module}"), attribute)
            try:
                with torch.cuda.device(device):
                    return kernel(*args)
            except ValueError as error:  # a tile the fused kernel has no form for
                _warn_once(str(error))
        return _TORCH[name](*args)

    return launch


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"pkt uses its torch implementations on this GPU: {reason}", PktWarning, stacklevel=4)


_COMPILED_FOR_CPU = ("linear_sensitivity_", "best_window")  # beside those of _RSVD
_RSVD: dict[str, Callable[..., Any]] = {"rsvd": _rsvd_torch, "rsvd_batch": _rsvd_batch_torch}


def _register() -> set[tuple[str, str]]:
    """Register what pkt._C did not when it was loaded; returns what it did, as (op, dispatch key)."""
    compiled = set()
    for name in (*_TORCH, *_RSVD):
        for key in ("CPU", "CUDA"):
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"pkt::{name}", key):
                compiled.add((name, key))
            elif name in _RSVD:
                _lib.impl(name, _RSVD[name], key)
            else:
                _lib.impl(name, _TORCH[name] if key == "CPU" else _cuda(name), key)
    return compiled


_COMPILED = _register()


def implementation(name: str, device: str | torch.device) -> tuple[str, str]:
    """(which implementation `pkt::name` uses on that device, why), for `pkt env`."""
    device = torch.device(device)
    if (name, device.type.upper()) in _COMPILED:
        return "C++" if device.type == "cpu" else "CUDA", "pkt._C is built"
    if name in _RSVD or (name in _COMPILED_FOR_CPU and device.type == "cpu"):
        return "torch", "pkt._C is not built" if _extension is None else f"pkt._C has no {device.type} part"
    if device.type == "cuda":
        reason = _no_triton(device.index or 0)
        return ("torch", reason) if reason else ("Triton", "compute capability 8.0 or above")
    return "torch", "the CPU implementation"


# --- fakes ----------------------------------------------------------------------------------------------------------


def _fake_nothing(*args: Any) -> None:
    return None


for _name in (
    "abs_accumulate_",
    "abs_accumulate_many_",
    "linear_sensitivity_",
    "linear_sensitivity_tiles_",
    "embedding_sensitivity_",
):
    torch.library.register_fake(f"pkt::{_name}", _fake_nothing, lib=_lib)


def _fake_best_window(
    score: Tensor, rows: int, cols: int, row_step: int = 1, col_step: int = 1
) -> tuple[Tensor, Tensor]:
    return score.new_empty(2, dtype=torch.int64), score.new_empty((), dtype=torch.int64)


def _fake_rsvd(
    a: Tensor, rank: int, oversample: int = 16, iters: int = 4, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, m = a.shape
    empty = functools.partial(a.new_empty, dtype=torch.float32)
    return empty(n, rank), empty(rank), empty(m, rank), empty(4)


def _fake_rsvd_batch(
    a: Sequence[Tensor], rank: int, oversample: int = 16, iters: int = 4, seed: int = 0
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    U, S, V, _ = ([result[i] for result in map(functools.partial(_fake_rsvd, rank=rank), a)] for i in range(4))
    return U, S, V, a[0].new_empty(len(a), 4, dtype=torch.float32)


torch.library.register_fake("pkt::best_window", _fake_best_window, lib=_lib)
torch.library.register_fake("pkt::rsvd", _fake_rsvd, lib=_lib)
torch.library.register_fake("pkt::rsvd_batch", _fake_rsvd_batch, lib=_lib)


# --- checked entry points -------------------------------------------------------------------------------------------


def _require(condition: bool, op: str, message: str) -> None:
    if not condition:
        raise PktError(f"pkt::{op}: {message}")


def _shape(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def _check_scores(op: str, acc: Tensor, **others: Tensor) -> None:
    _require(acc.dtype in (torch.float32, torch.float64), op, f"the scores must be fp32, not {_shape(acc)}")
    for name, tensor in others.items():
        _require(tensor.device == acc.device, op, f"{name} is {_shape(tensor)}, the scores are on {acc.device}")
        _require(tensor.dtype in _FLOATS, op, f"{name} must be floating point, not {_shape(tensor)}")


def _check_samples(op: str, length: int, seq_starts: Tensor, seq_lens: Tensor) -> None:
    same = seq_starts.shape == seq_lens.shape and seq_starts.ndim == 1
    _require(same, op, f"seq_starts {_shape(seq_starts)} and seq_lens {_shape(seq_lens)} must be vectors of one length")
    _require(
        seq_starts.dtype == torch.int64 and seq_lens.dtype == torch.int64, op, "seq_starts and seq_lens must be int64"
    )
    if seq_starts.device.type != "cpu":
        # Read on the device, without waiting for it: a violation stops the stream with this message. The same tensors
        # come back for every layer of a batch; they are checked once.
        if getattr(seq_lens, "_pkt_checked", None) == (length, id(seq_starts), seq_starts._version, seq_lens._version):
            return
        order = seq_starts.argsort()
        ends = seq_starts + seq_lens
        good = (seq_lens >= 0).all() & (seq_starts >= 0).all() & (ends <= length).all()
        good &= (ends[order][:-1] <= seq_starts[order][1:]).all()
        torch._assert_async(good, f"pkt::{op}: seq_starts and seq_lens overlap or run past the {length} rows")
        seq_lens._pkt_checked = (length, id(seq_starts), seq_starts._version, seq_lens._version)  # type: ignore[attr-defined]
        return
    end = 0
    for start, size in sorted(zip(seq_starts.tolist(), seq_lens.tolist(), strict=True)):
        if size < 0 or start < 0 or start + size > length:
            raise PktError(f"pkt::{op}: sample rows {start}..{start + size} run past the {length} rows of the batch")
        if size and start < end:
            raise PktError(f"pkt::{op}: sample rows {start}..{start + size} overlap the sample that ends at row {end}")
        end = max(end, start + size)


def abs_accumulate_(acc: Tensor, theta: Tensor, grad: Tensor) -> None:
    """acc += |theta * grad| in fp32, in place; any shape and strides, all three of one shape (METHOD, section 1)."""
    _check_scores("abs_accumulate_", acc, theta=theta, grad=grad)
    same = acc.shape == theta.shape == grad.shape
    _require(same, "abs_accumulate_", f"shapes differ: acc {_shape(acc)}, theta {_shape(theta)}, grad {_shape(grad)}")
    torch.ops.pkt.abs_accumulate_(acc, theta, grad)


def abs_accumulate_many_(acc: Sequence[Tensor], theta: Sequence[Tensor], grad: Sequence[Tensor]) -> None:
    """`abs_accumulate_` for every (acc, theta, grad): on a GPU one launch for a list of small parameters."""
    op = "abs_accumulate_many_"
    _require(
        len(acc) == len(theta) == len(grad), op, f"lists of {len(acc)}, {len(theta)} and {len(grad)} tensors differ"
    )
    for a, t, g in zip(acc, theta, grad, strict=True):
        _check_scores(op, a, theta=t, grad=g)
        same = a.shape == t.shape == g.shape and a.device == acc[0].device
        _require(same, op, f"shapes or devices differ: acc {_shape(a)}, theta {_shape(t)}, grad {_shape(g)}")
    if acc:
        torch.ops.pkt.abs_accumulate_many_(list(acc), list(theta), list(grad))


def _check_linear(
    op: str, shape: Sequence[int], w: Tensor, x: Tensor, dy: Tensor, seq_starts: Tensor, seq_lens: Tensor
) -> None:
    _require(
        w.ndim == 2 and x.ndim == 2 and dy.ndim == 2, op, f"w {_shape(w)}, x {_shape(x)}, dy {_shape(dy)}: not 2-D"
    )
    good = x.shape[0] == dy.shape[0] and tuple(w.shape) == (dy.shape[1], x.shape[1])
    _require(good, op, f"w {_shape(w)} must be [out, in], x {_shape(x)} [rows, in] and dy {_shape(dy)} [rows, out]")
    _require(tuple(shape) == tuple(w.shape), op, f"the scores' shape does not fit w {_shape(w)}")
    _check_samples(op, x.shape[0], seq_starts, seq_lens)


def linear_sensitivity_(acc: Tensor, w: Tensor, x: Tensor, dy: Tensor, seq_starts: Tensor, seq_lens: Tensor) -> None:
    """acc += |w| * sum_j |dy_jᵀ x_j|, per sample before the absolute value (METHOD, section 1).

    acc [out, in] fp32; w [out, in]; x [rows, in]; dy [rows, out]; sample j is rows seq_starts[j] .. + seq_lens[j] (int64).
    Rows of no sample are never read.
    """
    _check_scores("linear_sensitivity_", acc, w=w, x=x, dy=dy)
    _check_linear("linear_sensitivity_", acc.shape, w, x, dy, seq_starts, seq_lens)
    torch.ops.pkt.linear_sensitivity_(acc, w, x, dy, seq_starts, seq_lens)


def linear_sensitivity_tiles_(
    tiles: Tensor, w: Tensor, x: Tensor, dy: Tensor, seq_starts: Tensor, seq_lens: Tensor, tile: int
) -> None:
    """tiles += the tile x tile sums of what `linear_sensitivity_` adds; tiles [ceil(out/tile), ceil(in/tile)] fp32."""
    op = "linear_sensitivity_tiles_"
    _check_scores(op, tiles, w=w, x=x, dy=dy)
    _require(tile >= 1, op, f"tile is {tile}; it must be at least 1")
    grid = (-(-w.shape[0] // tile), -(-w.shape[1] // tile))
    _require(tuple(tiles.shape) == grid, op, f"tiles {_shape(tiles)} must be {list(grid)} for w {_shape(w)}")
    _check_linear(op, w.shape, w, x, dy, seq_starts, seq_lens)
    torch.ops.pkt.linear_sensitivity_tiles_(tiles, w, x, dy, seq_starts, seq_lens, tile)


def embedding_sensitivity_(
    acc: Tensor, w: Tensor, ids: Tensor, dy: Tensor, seq_starts: Tensor, seq_lens: Tensor
) -> None:
    """acc += |w| * sum_j |scatter_j(dy)|: a token's positions are summed within its sample before the absolute value.

    acc, w [vocabulary, d]; ids [rows] int64; dy [rows, d]; samples as in `linear_sensitivity_`.
    """
    op = "embedding_sensitivity_"
    _check_scores(op, acc, w=w, dy=dy)
    good = w.ndim == 2 and acc.shape == w.shape and dy.ndim == 2 and dy.shape[1] == w.shape[1]
    _require(good, op, f"acc {_shape(acc)}, w {_shape(w)}, dy {_shape(dy)} do not fit together")
    _require(ids.shape == dy.shape[:1] and ids.dtype == torch.int64, op, f"ids {_shape(ids)} must be int64 [rows]")
    _require(ids.device == acc.device, op, f"ids is {_shape(ids)}, the scores are on {acc.device}")
    _check_samples(op, ids.shape[0], seq_starts, seq_lens)
    torch.ops.pkt.embedding_sensitivity_(acc, w, ids, dy, seq_starts, seq_lens)


def best_window(score: Tensor, rows: int, cols: int, row_step: int = 1, col_step: int = 1) -> tuple[Tensor, Tensor]:
    """The rows x cols window of `score` [n, m] with the largest sum (METHOD, section 3).

    Returns (offset int64 [2], its sum in quantized units int64 []). Offsets are multiples of the steps; the first in
    row-major order wins a tie. S is quantized once (`window_bits`), so sums are exact and every device agrees.
    """
    op = "best_window"
    _require(
        score.ndim == 2 and score.dtype in _FLOATS, op, f"the scores must be a floating-point matrix: {_shape(score)}"
    )
    n, m = score.shape
    _require(0 < rows <= n and 0 < cols <= m, op, f"a {rows} x {cols} window does not fit in {n} x {m}")
    _require(row_step > 0 and col_step > 0, op, f"steps must be positive, not {row_step} and {col_step}")
    offset, total = torch.ops.pkt.best_window(score.float(), rows, cols, row_step, col_step)
    return offset, total


def _check_rsvd(op: str, name: str, a: Tensor, rank: int, oversample: int, iters: int) -> None:
    _require(a.ndim == 2, op, f"{name} must be a matrix, not {_shape(a)}")
    _require(a.dtype in _FLOATS[:3], op, f"{name} must be bf16, fp16 or fp32, not {_shape(a)}")
    _require(0 < rank <= min(a.shape), op, f"rank {rank} is not between 1 and min{tuple(a.shape)}, the shape of {name}")
    good = 0 <= oversample < 2**31 and 0 <= iters < 2**31
    _require(good, op, f"oversample {oversample} and iters {iters} must be between 0 and 2**31 - 1")


def rsvd(
    a: Tensor, rank: int, oversample: int = 16, iters: int = 4, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The `rank` leading singular triplets of `a` [n, m] by a randomized SVD (Halko, Martinsson, Tropp 2011).

    bf16, fp16 or fp32, any strides: a view is neither copied nor widened as a whole. Returns fp32 U [n, rank], S [rank],
    V [m, rank] and stats [4] (`pkt.rsvd_reference` gives its layout), all on `a`'s device, the same bytes for the same seed.
    """
    _check_rsvd("rsvd", "a", a, rank, oversample, iters)
    u, s, v, stats = torch.ops.pkt.rsvd(a, rank, oversample, iters, seed)
    return u, s, v, stats


def rsvd_batch(
    a: Sequence[Tensor], rank: int, oversample: int = 16, iters: int = 4, seed: int = 0
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """`rsvd` of each matrix, of whatever shapes and dtypes, on one device: lists of U, S and V, and stats [len(a), 4].

    On the CPU the bytes of `rsvd` one by one; on a GPU the matrices share the small kernels' launches.
    """
    op = "rsvd_batch"
    for i, matrix in enumerate(a):
        _check_rsvd(op, f"a[{i}]", matrix, rank, oversample, iters)
        _require(
            matrix.device == a[0].device, op, f"a[{i}] is on {matrix.device}, a[0] on {a[0].device}; move them to one"
        )
    if not a:
        return [], [], [], torch.empty(0, 4)
    u, s, v, stats = torch.ops.pkt.rsvd_batch(list(a), rank, oversample, iters, seed)
    return u, s, v, stats
