"""What a decoder layer costs a batch of `pkt.sensitivity` in launches, copies and waits for the device, counted, not timed.

    python bench/count_launches.py [--out DIR]

Every operation that torch dispatches is counted, in a tiny Llama on the CPU: their number depends on neither the size nor, but for
attention, the device. What a batch and layer take is the difference of differences: two layers or three, one batch or two.
Recomputed activations and factors are not in it: the model is resident. Writes DIR/launches_cpu.json and prints a row a kind.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from measuring import RESULTS, Report  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import pkt  # noqa: E402

# Neither launches nor copies: they make another view of the same memory.
VIEWS = {"view", "_unsafe_view", "detach", "t", "transpose", "slice", "expand", "unsqueeze", "select", "split", "alias"}
KINDS = {
    "products": {"mm", "bmm", "addmm"},
    "waits for the device": {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"},
    "copies": {"_to_copy", "copy_", "clone", "cat", "slice_backward"},
}


def kind_of(op: str) -> str:
    namespace, name = op.split(".")[:2]
    if namespace == "pkt":
        return "pkt's kernels"
    if "attention" in name:
        return "attention"
    return next((kind for kind, names in KINDS.items() if name in names), "elementwise and sums")


class Counting(TorchDispatchMode):
    """Counts what is dispatched, views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(function).split(".")[1] not in VIEWS:
            self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def model_of(layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "vocab_size": 128}
    return LlamaForCausalLM(
        LlamaConfig(**shape, num_hidden_layers=layers, max_position_embeddings=64, use_cache=False)
    ).eval()


IDS = torch.arange(64).view(4, 16)


def sensitivity(model: Any, batches: int, tile: int | None = None) -> None:
    loader = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}] * batches
    pkt.sensitivity(model, loader, tile=tile, progress=False)


def bare(model: Any, batches: int) -> None:
    """Forward and the gradients of activations: what nothing that scores can do without."""
    model.requires_grad_(False)
    for _ in range(batches):
        embedded = model.get_input_embeddings()(IDS).requires_grad_()
        model(inputs_embeds=embedded, attention_mask=torch.ones_like(IDS), labels=IDS).loss.backward()


WORKS: dict[str, Callable[[Any, int], None]] = {
    "forward and dX alone": bare,
    "sensitivity, elements": sensitivity,
    "sensitivity, tile sums": functools.partial(sensitivity, tile=16),
}


def of_layer(work: Callable[[Any, int], None]) -> Counter[str]:
    """Op -> how often a layer of a batch dispatches it."""
    total: Counter[str] = Counter()
    for layers, batches, sign in ((3, 2, 1), (3, 1, -1), (2, 2, -1), (2, 1, 1)):
        model = model_of(layers)
        with Counting() as counting:
            work(model, batches)
        for op, count in counting.counts.items():
            total[op] += sign * count
    return Counter({op: count for op, count in total.items() if count})


def by_kind(ops: Counter[str]) -> Counter[str]:
    kinds: Counter[str] = Counter()
    for op, count in ops.items():
        kinds[kind_of(op)] += count
    return kinds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    report = Report(options.out / "launches_cpu.json", "cpu")
    for name, work in WORKS.items():
        ops = of_layer(work)
        kinds = by_kind(ops)
        report.add({"work": name, "launches": sum(ops.values()), "kinds": kinds, "ops": ops})
        print(
            f"{name:24} {sum(ops.values()):4} a layer of a batch:",
            ", ".join(f"{n} {k}" for k, n in kinds.most_common()),
            flush=True,
        )
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
