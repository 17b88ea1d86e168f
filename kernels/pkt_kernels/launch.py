"""What the launchers ask of a device. Tensors on the CPU are for Triton's interpreter (``TRITON_INTERPRET=1``)."""

from __future__ import annotations

import contextlib
import functools
import os

import torch

# Triton decides once, when it is imported, whether kernels are compiled or interpreted.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

# A product and a sum may be rounded once. Said at every launch, because Triton's default is about to change.
OPTIONS = {"enable_fp_fusion": True}


class NoFormError(Exception):
    """The kernel has no form for these arguments. Nothing was written, so the caller may compute the same otherwise."""


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; the interpreter stands in for a Hopper GPU, so that it runs the paths with descriptors."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def power_of_two(size: int, smallest: int, largest: int) -> int:
    """The smallest power of two that holds `size`, kept between two bounds."""
    return max(smallest, min(largest, 1 << (size - 1).bit_length()))
