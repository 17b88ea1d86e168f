"""acc += |theta ⊙ grad| for any parameter, in place (docs/method.md §1); other measures: |theta^weighted ⊙ grad|^power.

acc is fp32; theta and grad have its shape, any strides and any floating dtype of at most 32 bits.

Bytes: theta and grad read once, acc read and written once: 12 a weight in bf16, 16 in fp32; unweighted, theta is not
read. Flops: 2 a weight.
Fused because torch needs three passes (the product, its absolute value, the sum) and a temporary of acc's size.
Limit: memory bandwidth. For norms and biases it is the launch, so a list of tensors goes into one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from pkt_kernels import launch
from pkt_kernels.measure import contribution

BLOCK = 4096
NUM_WARPS = 8
MAX_DIMS = 4
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _flat_kernel(
    acc_ptr, theta_ptr, grad_ptr, size,
    POWER: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    added = contribution(theta_ptr + offs, grad_ptr + offs, mask, POWER, WEIGHTED)
    acc = tl.load(acc_ptr + offs, mask=mask, other=0.0)
    tl.store(acc_ptr + offs, acc + added, mask=mask)


@triton.jit
def _strided_kernel(
    acc_ptr, theta_ptr, grad_ptr, size,
    size_1, size_2, size_3,
    stride_a0, stride_a1, stride_a2, stride_a3,
    stride_t0, stride_t1, stride_t2, stride_t3,
    stride_g0, stride_g1, stride_g2, stride_g3,
    POWER: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    i_3 = index % size_3
    index = index // size_3
    i_2 = index % size_2
    index = index // size_2
    i_1 = index % size_1
    i_0 = index // size_1
    acc_ptrs = acc_ptr + i_0 * stride_a0 + i_1 * stride_a1 + i_2 * stride_a2 + i_3 * stride_a3
    theta_ptrs = theta_ptr + i_0 * stride_t0 + i_1 * stride_t1 + i_2 * stride_t2 + i_3 * stride_t3
    grad_ptrs = grad_ptr + i_0 * stride_g0 + i_1 * stride_g1 + i_2 * stride_g2 + i_3 * stride_g3
    added = contribution(theta_ptrs, grad_ptrs, mask, POWER, WEIGHTED)
    acc = tl.load(acc_ptrs, mask=mask, other=0.0)
    tl.store(acc_ptrs, acc + added, mask=mask)


@triton.jit
def _many_kernel(
    table_ptr, num_tensors,
    THETA: tl.constexpr, GRAD: tl.constexpr, POWER: tl.constexpr, WEIGHTED: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    tensor = tl.program_id(0)
    acc_ptr = tl.load(table_ptr + tensor).to(tl.pointer_type(tl.float32))
    theta_ptr = tl.load(table_ptr + num_tensors + tensor).to(tl.pointer_type(THETA))
    grad_ptr = tl.load(table_ptr + 2 * num_tensors + tensor).to(tl.pointer_type(GRAD))
    size = tl.load(table_ptr + 3 * num_tensors + tensor)
    if ALIGNED:
        acc_ptr = tl.multiple_of(acc_ptr, 16)
        theta_ptr = tl.multiple_of(theta_ptr, 16)
        grad_ptr = tl.multiple_of(grad_ptr, 16)
    for first in range(tl.program_id(1) * BLOCK, size, tl.num_programs(1) * BLOCK):
        offs = first + tl.arange(0, BLOCK)
        mask = offs < size
        added = contribution(theta_ptr + offs, grad_ptr + offs, mask, POWER, WEIGHTED)
        acc = tl.load(acc_ptr + offs, mask=mask, other=0.0)
        tl.store(acc_ptr + offs, acc + added, mask=mask)


def abs_accumulate(
    acc: torch.Tensor, theta: torch.Tensor, grad: torch.Tensor, power: int = 1, weighted: bool = True
) -> None:
    """acc += |theta^weighted ⊙ grad|^power; three tensors of one shape, any strides."""
    if acc.numel() == 0:
        return
    sizes, strides = _merge_dimensions(acc, theta, grad)
    if len(sizes) > MAX_DIMS:
        for parts in zip(acc.unbind(0), theta.unbind(0), grad.unbind(0), strict=True):
            abs_accumulate(*parts, power, weighted)
        return
    grid = (triton.cdiv(acc.numel(), BLOCK),)
    options = {"POWER": power, "WEIGHTED": weighted, "BLOCK": BLOCK, "num_warps": NUM_WARPS, **launch.OPTIONS}
    with launch.on_device(acc):
        if len(sizes) == 1 and strides == [(1, 1, 1)]:
            _flat_kernel[grid](acc, theta, grad, acc.numel(), **options)
            return
        sizes = [1] * (MAX_DIMS - len(sizes)) + sizes
        strides = [(0, 0, 0)] * (MAX_DIMS - len(strides)) + strides
        columns = zip(*strides, strict=True)
        by_tensor = (stride for column in columns for stride in column)
        _strided_kernel[grid](acc, theta, grad, acc.numel(), *sizes[1:], *by_tensor, **options)


def abs_accumulate_many(
    accs: Sequence[torch.Tensor],
    thetas: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    power: int = 1,
    weighted: bool = True,
) -> None:
    """abs_accumulate for lists, in one launch a pair of dtypes; tensors whose strides differ go one by one."""
    groups: dict[tuple[torch.dtype, torch.dtype], list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}
    for acc, theta, grad in zip(accs, thetas, grads, strict=True):
        if acc.numel() == 0:
            continue
        sizes, strides = _merge_dimensions(acc, theta, grad)
        if len(sizes) == 1 and strides == [(1, 1, 1)]:
            groups.setdefault((theta.dtype, grad.dtype), []).append((acc, theta, grad))
        else:
            abs_accumulate(acc, theta, grad, power, weighted)
    for (theta_dtype, grad_dtype), group in groups.items():
        _accumulate_group(group, theta_dtype, grad_dtype, power, weighted)


def _accumulate_group(
    group: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    theta_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    power: int,
    weighted: bool,
) -> None:
    device = group[0][0].device
    pointers = [[tensor.data_ptr() for tensor in column] for column in zip(*group, strict=True)]
    sizes = [acc.numel() for acc, _, _ in group]
    table = torch.tensor([*pointers, sizes], dtype=torch.int64).to(device, non_blocking=True)
    aligned = all(pointer % 16 == 0 for column in pointers for pointer in column)
    # Enough programs to fill the device, however few or long the tensors are.
    programs = min(triton.cdiv(max(sizes), BLOCK), max(1, 8 * launch.multiprocessors(device) // len(group)))
    with launch.on_device(group[0][0]):
        _many_kernel[(len(group), programs)](
            table, len(group), THETA=TRITON_DTYPES[theta_dtype], GRAD=TRITON_DTYPES[grad_dtype],
            POWER=power, WEIGHTED=weighted, ALIGNED=aligned, BLOCK=BLOCK, num_warps=NUM_WARPS, **launch.OPTIONS,
        )  # fmt: skip


def _merge_dimensions(*tensors: torch.Tensor) -> tuple[list[int], list[tuple[int, ...]]]:
    """Sizes and strides (one a tensor) of the fewest dimensions that walk all tensors alike, widest stride first."""
    dims = [
        (size, strides)
        for size, *strides in zip(tensors[0].shape, *(tensor.stride() for tensor in tensors), strict=True)
        if size != 1
    ]
    dims.sort(key=lambda dim: dim[1][0], reverse=True)
    merged: list[tuple[int, tuple[int, ...]]] = []
    for size, strides in dims:
        if merged and merged[-1][1] == tuple(size * stride for stride in strides):
            merged[-1] = (merged[-1][0] * size, tuple(strides))
        else:
            merged.append((size, tuple(strides)))
    merged = merged or [(1, (1,) * len(tensors))]
    return [size for size, _ in merged], [strides for _, strides in merged]
