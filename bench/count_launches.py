"""What a decoder layer costs a batch, and its phases a `pkt.transfer`, in launches, copies and waits, counted, not timed.

    python bench/count_launches.py [--out DIR]

Every operation that torch dispatches is counted, in a tiny Llama on the CPU: their number depends on neither the size nor, but for
attention, the device. What a batch and layer take is the difference of differences: two layers or three, one batch or two.
Recomputed activations and factors are not in it: the model is resident.

A transfer of four batches is counted by phase, with how often it asks for tensors' values: on a GPU each question is a wait, but
for those about the host's own tensors. An op of pkt is one launch here, a part's factors too. Writes DIR/launches_cpu.json and
prints a row a kind.
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
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import pkt  # noqa: E402

SHAPE = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "vocab_size": 128}
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
    return LlamaForCausalLM(
        LlamaConfig(**SHAPE, num_hidden_layers=layers, max_position_embeddings=64, use_cache=False)
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


class Asking(TorchFunctionMode):
    """Counts the questions about tensors' values; several that `ops.fetched` answers at once are one."""

    NAMES = frozenset({"item", "tolist", "cpu", "nonzero", "unique", "__bool__", "__int__", "__float__", "__index__"})

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.answered: set[int] = set()
        self.kept: list[Any] = []

    def fetched(self, tensors: Any) -> list[Any]:
        self.count += 1
        found = [tensor.clone() for tensor in tensors]
        self.kept += found  # so that no other tensor is taken for one of them
        self.answered |= set(map(id, found))
        return found

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(function, "__name__", "") in self.NAMES and id(args[0]) not in self.answered
        return function(*args, **(kwargs or {}))


def of_transfer(layers: int) -> dict[str, tuple[Counter[str], int]]:
    """By phase, what a transfer from a teacher of so many layers to a student of one less dispatches, and how often it asks."""
    from synthetic import seeds
    from transformers import LlamaConfig

    student = LlamaConfig(**(SHAPE | {"hidden_size": 32, "intermediate_size": 88}), num_hidden_layers=layers - 1)
    model, rows = model_of(layers), seeds(8, 16, SHAPE["vocab_size"])
    found: dict[str, tuple[Counter[str], int]] = {}
    fetched = pkt.ops.fetched
    with Asking() as asking, Counting() as counting:

        def ended(tick: Any) -> None:
            launches, asked = found.get(tick.phase, (Counter(), 0))
            found[tick.phase] = launches + counting.counts, asked + asking.count
            counting.counts, asking.count = Counter(), 0

        def started(memory: Any) -> None:
            counting.counts, asking.count = Counter(), 0

        pkt.ops.fetched = asking.fetched
        try:
            pkt.transfer(
                model,
                student,
                rows,
                rank=4,
                batch_size=2,
                device="cpu",
                progress=False,
                on_memory=started,
                on_tick=ended,
            )
        finally:
            pkt.ops.fetched = fetched
    return found


def of_transfer_layer() -> tuple[Counter[str], int]:
    """What a layer more adds to the backward phase of a transfer: its batches, its regions and its factors."""
    (more, asked), (less, before) = (of_transfer(layers)["backward"] for layers in (4, 3))
    return more - less, asked - before


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
    works = {f"transfer, {phase}": found for phase, found in of_transfer(4).items()}
    works["transfer, backward of one layer"] = of_transfer_layer()
    for name, (ops, asked) in works.items():
        report.add({"work": name, "launches": sum(ops.values()), "asked": asked, "kinds": by_kind(ops), "ops": ops})
        print(f"{name:32} {sum(ops.values()):5} launches, values asked for {asked} times", flush=True)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
