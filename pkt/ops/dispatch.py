"""Every operation of pkt once: its schema, its fake, and the implementation that each device gets.

The dispatcher is the fallback: callers say `ops.linear_sensitivity_(...)` and never ask where the tensors are. The torch
implementations of `reference` run on any device; on CUDA the Triton kernels of `pkt_kernels` take their place when Triton is
there and the device can run them, on either device what `pkt._C` has (`implementation()` says which one each op uses, and why).
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pkt.errors import PktError, PktWarning
from pkt.ops import choosing, reference, rsvd_reference
from pkt.ops.candidates import Kind

_lib = torch.library.Library("pkt", "DEF")
# What a measure adds: |theta^weighted * g_j|^power of each sample j (`reference.MEASURES` names the combinations).
_MEASURE = "int power=1, bool weighted=True"
_SAMPLES = "Tensor seq_starts, Tensor seq_lens"
_lib.define(f"abs_accumulate_(Tensor(a!) acc, Tensor theta, Tensor grad, {_MEASURE}) -> ()")
_lib.define(f"abs_accumulate_many_(Tensor(a!)[] acc, Tensor[] theta, Tensor[] grad, {_MEASURE}) -> ()")
_lib.define(f"linear_sensitivity_(Tensor(a!) acc, Tensor w, Tensor x, Tensor dy, {_SAMPLES}, {_MEASURE}) -> ()")
# One of the kernels that `choosing` can give the op above; of pkt._C, on CUDA alone.
_lib.define(
    f"linear_sensitivity_clustered_(Tensor(a!) acc, Tensor w, Tensor x, Tensor dy, {_SAMPLES}, {_MEASURE}) -> ()"
)
_lib.define(
    f"linear_sensitivity_tiles_(Tensor(a!) tiles, Tensor w, Tensor x, Tensor dy, {_SAMPLES}, int tile, {_MEASURE}) -> ()"
)
_lib.define(f"embedding_sensitivity_(Tensor(a!) acc, Tensor w, Tensor ids, Tensor dy, {_SAMPLES}, {_MEASURE}) -> ()")
_lib.define("best_window(Tensor score, int rows, int cols, int row_step=1, int col_step=1) -> (Tensor, Tensor)")
_lib.define("best_blocks(Tensor score, int rows, int cols, int row_block=1, int col_block=1) -> (Tensor, Tensor)")
_lib.define("rsvd(Tensor a, int rank, int oversample=16, int iters=4, int seed=0) -> (Tensor, Tensor, Tensor, Tensor)")
_lib.define(
    "rsvd_batch(Tensor[] a, int rank, int oversample=16, int iters=4, int seed=0) -> "
    "(Tensor[], Tensor[], Tensor[], Tensor)"
)


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
    "best_blocks": ("window_search", "best_blocks"),
}


def _chosen_scores(
    acc: Tensor, w: Tensor, x: Tensor, dy: Tensor, starts: Tensor, lens: Tensor, power: int = 1, weighted: bool = True
) -> None:
    dtype = torch.promote_types(x.dtype, dy.dtype)
    choosing.launch(Kind(0, dtype, power, weighted), acc, w, x, dy, starts, lens)


def _chosen_tiles(
    tiles: Tensor,
    w: Tensor,
    x: Tensor,
    dy: Tensor,
    starts: Tensor,
    lens: Tensor,
    tile: int,
    power: int = 1,
    weighted: bool = True,
) -> None:
    dtype = torch.promote_types(x.dtype, dy.dtype)
    choosing.launch(Kind(tile, dtype, power, weighted), tiles, w, x, dy, starts, lens)


# Ops that several kernels can serve.
_CHOSEN: dict[str, Callable[..., Any]] = {
    "linear_sensitivity_": _chosen_scores,
    "linear_sensitivity_tiles_": _chosen_tiles,
}
_TORCH: dict[str, Callable[..., Any]] = {
    "abs_accumulate_": reference.abs_accumulate_,
    "abs_accumulate_many_": reference.abs_accumulate_many_,
    "linear_sensitivity_": reference.linear_sensitivity_,
    "linear_sensitivity_tiles_": reference.linear_sensitivity_tiles_,
    "embedding_sensitivity_": reference.embedding_sensitivity_,
    "best_window": reference.best_window,
    "best_blocks": reference.best_blocks,
}


@functools.cache
def no_triton(device_index: int) -> str | None:
    """Why the Triton kernels cannot run on this CUDA device, or None when they can."""
    capability = torch.cuda.get_device_capability(device_index)
    if capability < (8, 0):
        return f"the GPU's compute capability is {capability[0]}.{capability[1]}, below 8.0"
    try:
        import triton  # noqa: F401
    except Exception as error:  # a broken Triton raises anything from ImportError to OSError
        return f"Triton does not import ({error})"
    return None


def triton_or_torch(name: str) -> Callable[..., Any]:
    """What runs `name` on CUDA: its kernel, or its torch implementation where there is no Triton, for fp64, and for what
    the kernel says it has no form for. Any other error is a bug, and never a reason to be slow."""
    module, attribute = _TRITON[name]

    def run(*args: Any) -> Any:
        tensors = [t for a in args for t in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(t, Tensor)]
        reason = no_triton(tensors[0].device.index)
        if reason is not None:
            warn_once(f"pkt uses its torch implementations on this GPU: {reason}")
        elif not any(t.dtype == torch.float64 for t in tensors):
            from pkt_kernels.launch import NoFormError

            kernel = _CHOSEN.get(name) or getattr(importlib.import_module(f"pkt_kernels.{module}"), attribute)
            try:
                return kernel(*args)
            except NoFormError as error:
                warn_once(f"pkt::{name} runs in torch, more slowly, on this GPU: {error}")
        return _TORCH[name](*args)

    return run


@functools.cache
def warn_once(message: str) -> None:
    warnings.warn(message, PktWarning, stacklevel=4)


_RSVD: dict[str, Callable[..., Any]] = {"rsvd": rsvd_reference.rsvd, "rsvd_batch": rsvd_reference.rsvd_batch}


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
                _lib.impl(name, _TORCH[name] if key == "CPU" else triton_or_torch(name), key)
    return compiled


_COMPILED = _register()


def names() -> tuple[str, ...]:
    """Every op, as `implementation` takes them."""
    return (*_TORCH, *_RSVD)


def implementation(name: str, device: str | torch.device) -> tuple[str, str]:
    """(which implementation `pkt::name` uses on that device, why), for `pkt env`."""
    device = torch.device(device)
    if (name, device.type.upper()) in _COMPILED:
        return "C++" if device.type == "cpu" else "CUDA", "pkt._C is built"
    if device.type == "cuda" and name in _TRITON:
        reason = no_triton(torch.cuda.current_device() if device.index is None else device.index)
        return ("torch", reason) if reason else ("Triton", "compute capability 8.0 or above")
    return "torch", "pkt._C is not built" if _extension is None else f"pkt._C has no {device.type} part"


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


def _fake_best_blocks(
    score: Tensor, rows: int, cols: int, row_block: int = 1, col_block: int = 1
) -> tuple[Tensor, Tensor]:
    return score.new_empty(rows, dtype=torch.int64), score.new_empty(cols, dtype=torch.int64)


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
torch.library.register_fake("pkt::best_blocks", _fake_best_blocks, lib=_lib)
torch.library.register_fake("pkt::rsvd", _fake_rsvd, lib=_lib)
torch.library.register_fake("pkt::rsvd_batch", _fake_rsvd_batch, lib=_lib)
