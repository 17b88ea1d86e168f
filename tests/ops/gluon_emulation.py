"""Enough of Gluon to run a warp-specialised kernel on the CPU, for Triton interprets none: each partition is a thread, shared
memory starts as NaN, a tensor copy lands as soon as it is issued and a product is computed as late as it may be, so that a
stage that is given up too early holds something else, and a missing arrival shows as a wait without an end.
"""

from __future__ import annotations

import random
import re
import threading
import time
import types
from typing import Any

import torch
from torch import Tensor

SECONDS = 20.0  # that nobody waits without a fault
_changed = threading.Condition()
_program = threading.local()
_faults: list[BaseException] = []


def _pause() -> None:
    """Somebody else's turn, now and then."""
    if random.random() < 0.2:
        time.sleep(random.random() * 2e-4)


class Pointer:
    def __init__(self, tensor: Tensor, offset: Any = None) -> None:
        self.tensor = tensor
        self.offset = tensor.storage_offset() if offset is None else offset
        elements = tensor.untyped_storage().nbytes() // tensor.element_size()
        self.memory = tensor.as_strided((elements,), (1,), 0)

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.tensor, self.offset + more)


def load(pointer: Pointer, mask: Any = True, other: Any = 0) -> Tensor:
    mask = torch.as_tensor(mask)
    found = pointer.memory[torch.where(mask, torch.as_tensor(pointer.offset), 0)]
    return torch.where(mask, found, torch.tensor(other, dtype=found.dtype))


def store(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
    offsets, value = torch.broadcast_tensors(pointer.offset, value)
    mask = mask.expand(offsets.shape)
    pointer.memory[offsets[mask]] = value[mask].to(pointer.memory.dtype)


class Shared:
    """Shared memory, or a part of it."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def index(self, i: Any) -> Any:
        return self.value[int(i)] if isinstance(self.value, list) else Shared(self.value[int(i)])

    def reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        assert dtype == self.value.dtype
        return Shared(self.value.view(shape))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.value.permute(order))


class Barrier:
    """An mbarrier: `count` arrivals and all announced bytes end a phase."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0

    def change(self, arrivals: int, announced: int) -> None:
        _pause()
        with _changed:
            self.pending -= arrivals
            self.bytes += announced
            assert self.pending >= 0, "more arrivals than the barrier expects"
            if self.pending == 0 and self.bytes == 0:
                self.phase += 1
                self.pending = self.count
            _changed.notify_all()


def _init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.pending = count


def _wait(barrier: Barrier, parity: Any) -> None:
    _pause()
    with _changed:
        done = _changed.wait_for(lambda: bool(_faults) or barrier.phase % 2 != int(parity), SECONDS)
        assert done, "a wait without an end"
        if _faults:
            raise SystemExit


class Descriptor:
    """A tensor descriptor as the kernel sees it, and what the copy engine does with it."""

    def __init__(self, made: Any) -> None:
        self.made, self.dtype, self.layout = made, made.base.dtype, made.layout
        elements = 1
        for size in made.block_shape:
            elements *= size
        nbytes = elements * made.base.element_size()
        self.block_type = types.SimpleNamespace(nbytes=nbytes, shape=list(made.block_shape))

    def block(self, coordinates: list[Any]) -> Tensor:
        shape, strides, box = self.made.shape, self.made.strides, self.made.block_shape
        at = [int(c) for c in coordinates]
        size = self.made.base.element_size()
        rows, columns = torch.arange(box[2]), torch.arange(box[3])
        inside = all(0 <= at[d] < shape[d] for d in range(2))
        there = (at[2] + rows < shape[2])[:, None] & (at[3] + columns < shape[3])[None, :] & inside
        # In bytes, as the engine adds them: modulo 2^64.
        first = sum(c * s for c, s in zip(at, strides, strict=True)) * size % 2**64 // size
        if first >= 2**63 // size:
            first -= 2**64 // size
        memory = Pointer(self.made.base)
        places = memory.offset + first + rows[:, None] * strides[2] + columns[None, :]
        return torch.where(there, memory.memory[torch.where(there, places, 0)], 0).view(box)


def fetch(descriptor: Descriptor, coordinates: list[Any], barrier: Barrier, to: Shared) -> None:
    to.value.copy_(descriptor.block(coordinates))
    barrier.change(0, -descriptor.block_type.nbytes)


class Product:
    """An accumulator and the products into it that are under way."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.queue = value, []  # type: tuple[Tensor, list[Any]]

    def finish(self, but: int) -> None:
        while len(self.queue) > but:
            a, b, use = self.queue.pop(0)
            product = a.value.float() @ b.value.float()
            self.value = self.value + product if use else product


def mma(a: Shared, b: Shared, into: Product, use_acc: Any, is_async: bool) -> Product:
    assert is_async
    into.queue.append((a, b, bool(use_acc)))
    return into


def mma_init(value: Any) -> Product:
    return value if isinstance(value, Product) else Product(value)


def mma_wait(outstanding: int, deps: list[Product]) -> Any:
    (product,) = deps
    _pause()
    product.finish(outstanding)
    return product.value if outstanding == 0 else product


def asm(text: str, constraints: str, given: list[Tensor], *_: Any, **__: Any) -> Tensor:
    if text == "abs.f32 $0, $1;":
        return given[0].abs()
    assert text == "fma.rn.f32 $0, $1, $1, $2;"
    return given[0] * given[0] + given[1]


def warp_specialize(partitions: list[Any], warps: list[int], registers: list[int]) -> None:
    assert len(partitions) == len(warps) + 1 == len(registers) + 1
    here = _program.index, _program.count

    def work(function: Any, arguments: Any) -> None:
        _program.index, _program.count = here
        try:
            function(*arguments)
        except SystemExit:
            pass  # another has the fault
        except BaseException as error:
            with _changed:
                _faults.append(error)
                _changed.notify_all()

    threads = [threading.Thread(target=work, args=partition) for partition in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def allocate(dtype: Any, shape: list[int], layout: Any) -> Shared:
    return Shared(
        [Barrier() for _ in range(shape[0])] if dtype == torch.int64 else torch.full(shape, float("nan"), dtype=dtype)
    )


GL = types.SimpleNamespace(
    constexpr=int,
    float32=torch.float32,
    int32=torch.int32,
    int64=torch.int64,
    abs=torch.abs,
    arange=lambda first, last, layout: torch.arange(first, last),
    zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
    sum=lambda value, axis: value.sum(axis),
    reshape=lambda value, shape: value.reshape(shape),
    convert_layout=lambda value, layout: value,
    minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
    maximum=lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
    cdiv=lambda a, b: -(-a // b),
    static_range=range,
    program_id=lambda axis: _program.index,
    num_programs=lambda axis=0: _program.count,
    load=load,
    store=store,
    allocate_shared_memory=allocate,
    warp_specialize=warp_specialize,
    inline_asm_elementwise=asm,
    **{
        name: lambda *_, **__: None
        for name in ("SliceLayout", "BlockedLayout", "NVMMASharedLayout", "NVMMADistributedLayout")
    },
)
MBARRIER = types.SimpleNamespace(
    init=_init,
    wait=_wait,
    expect=lambda barrier, size: barrier.change(1, size),
    arrive=lambda barrier, pred=True: barrier.change(1, 0) if pred else None,
    MBarrierLayout=lambda: None,
)


def emulated(module: types.ModuleType, kernel: str) -> Any:
    """The module's kernel as launchers call it, `kernel[grid](...)`, from the source that Gluon compiles."""
    names: dict[str, Any] = {
        **vars(module),
        "gl": GL,
        "mbarrier": MBARRIER,
        "_fetch": fetch,
        "warpgroup_mma": mma,
        "warpgroup_mma_init": mma_init,
        "warpgroup_mma_wait": mma_wait,
    }
    for name, value in vars(module).items():
        if type(value).__name__ == "constexpr":
            names[name] = True if name == "_RENAMED" else value.value
        elif type(value).__name__ == "GluonJITFunction":
            names[name] = types.FunctionType(value.fn.__code__, names, name)

    class Launched:
        def __getitem__(self, grid: tuple[int]) -> Any:
            return lambda *given, **options: self.run(grid[0], given, options)

        def run(self, programs: int, given: tuple[Any, ...], options: dict[str, Any]) -> None:
            options = {name: value for name, value in options.items() if re.fullmatch("[A-Z_]+", name)}
            _faults.clear()
            for index in range(programs):
                _program.index, _program.count = index, programs
                arguments = [
                    Descriptor(a) if hasattr(a, "block_shape") else Pointer(a) if isinstance(a, Tensor) else a
                    for a in given
                ]
                names[kernel](*arguments, **options)
                if _faults:
                    raise _faults[0]

    return Launched()
