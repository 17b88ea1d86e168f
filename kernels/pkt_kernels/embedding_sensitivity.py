"""Sensitivity of an embedding table: the gradients of a token's uses in one sample are summed before |·|.

    acc[v, d] += |w[v, d]|^p · Σ_j | Σ_{r in sample j, ids[r] = v} dy[r, d] |^p        (docs/method.md §1; p = 1, or 2)

ids [R] int64, dy [R, d]; sample j owns rows seq_starts[j] .. + seq_lens[j], other rows are never read.
Unweighted, |w|^p is left out.

How it runs: rows are sorted by (token, sample), stably. The program at the first row of a token walks all rows of that
token, closes a sum at each change of sample, and is the only one to write the token's row: no atomics, one order of
summation. Programs at other rows leave at once, so nothing about the ids is needed on the host.
Bytes: dy once, and for each token that occurs a row of w, and one of acc read and written. Limit: memory bandwidth,
and for one token that makes up most of the batch, the latency of reading its rows one after another.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pkt_kernels import launch
from pkt_kernels.measure import raised

# Sorts after every key: rows of no sample, and ids outside the table.
NO_KEY = torch.iinfo(torch.int64).max


@triton.jit
def _key_kernel(
    keys_ptr, ids_ptr, seq_starts_ptr, seq_lens_ptr,
    R, V, num_samples, stride_ids,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """keys[r] = ids[r] · num_samples + j for every row of sample j (a program a sample)."""
    sample = tl.program_id(0)
    start = tl.maximum(tl.load(seq_starts_ptr + sample), 0)
    end = tl.minimum(start + tl.load(seq_lens_ptr + sample), R)
    for first in range(start, end, BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R).to(tl.int64)
        mask = rows < end
        ids = tl.load(ids_ptr + rows * stride_ids, mask=mask, other=-1)
        tl.store(keys_ptr + rows, ids * num_samples + sample, mask=mask & (ids >= 0) & (ids < V))


@triton.jit
def _embedding_sensitivity_kernel(
    acc_ptr, w_ptr, dy_ptr, keys_ptr, rows_ptr,
    R, V, D, num_samples,
    stride_av, stride_ad, stride_wv, stride_wd, stride_dr, stride_dd,
    POWER: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0)
    key = tl.load(keys_ptr + first)
    token = key // num_samples
    token_keys = token * num_samples
    previous = tl.load(keys_ptr + first - 1, mask=first > 0, other=-1)
    if (token < V) & (previous < token_keys):
        # How many sorted rows hold this token.
        count = 0
        found = BLOCK_R
        while found == BLOCK_R:
            offs = first + count + tl.arange(0, BLOCK_R)
            keys = tl.load(keys_ptr + offs, mask=offs < R, other=-1)
            found = tl.sum(((keys >= token_keys) & (keys < token_keys + num_samples)).to(tl.int32))
            count += found

        offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        offs_d = offs_d.to(tl.int64)
        running = tl.zeros((BLOCK_D,), dtype=tl.float32)  # Σ_j |g_j|^POWER
        partial = tl.zeros((BLOCK_D,), dtype=tl.float32)  # g_j so far
        for i in range(first, first + count):
            row = tl.load(rows_ptr + i)
            partial += tl.load(dy_ptr + row * stride_dr + offs_d * stride_dd, mask=mask_d, other=0.0).to(tl.float32)
            following = tl.load(keys_ptr + i + 1, mask=i + 1 < R, other=-1)
            if following != tl.load(keys_ptr + i):
                running += raised(partial, POWER)
                partial = tl.zeros((BLOCK_D,), dtype=tl.float32)
        if WEIGHTED:
            w = tl.load(w_ptr + token * stride_wv + offs_d * stride_wd, mask=mask_d, other=0.0).to(tl.float32)
            running *= raised(w, POWER)
        acc_ptrs = acc_ptr + token * stride_av + offs_d * stride_ad
        acc = tl.load(acc_ptrs, mask=mask_d, other=0.0)
        tl.store(acc_ptrs, acc + running, mask=mask_d)


def embedding_sensitivity(
    acc: torch.Tensor,
    w: torch.Tensor,
    ids: torch.Tensor,
    dy: torch.Tensor,
    seq_starts: torch.Tensor,
    seq_lens: torch.Tensor,
    power: int = 1,
    weighted: bool = True,
) -> None:
    """acc [V, d] += |w|^power ⊙ Σ_j |scatter-add of sample j's dy at its ids|^power, in place; acc fp32."""
    rows, samples = ids.numel(), seq_starts.numel()
    if rows == 0 or samples == 0 or w.numel() == 0:
        return
    vocabulary, width = w.shape
    keys = torch.full((rows,), NO_KEY, dtype=torch.int64, device=ids.device)
    with launch.on_device(ids):
        _key_kernel[(samples,)](keys, ids, seq_starts.contiguous(), seq_lens.contiguous(), rows, vocabulary, samples,
                                ids.stride(0), BLOCK_R=1024, num_warps=4, **launch.OPTIONS)  # fmt: skip
        keys, order = torch.sort(keys, stable=True)
        block_d = launch.power_of_two(width, 32, 1024)
        _embedding_sensitivity_kernel[(rows, triton.cdiv(width, block_d))](
            acc, w, dy, keys, order,
            rows, vocabulary, width, samples,
            *acc.stride(), *w.stride(), *dy.stride(),
            POWER=power, WEIGHTED=weighted, BLOCK_D=block_d, BLOCK_R=128, num_warps=4, **launch.OPTIONS,
        )  # fmt: skip
