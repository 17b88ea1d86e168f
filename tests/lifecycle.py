"""What the tests of injecting, training and finalizing share: small students of every kind, extractions, a training loop."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import oracle
import torch
import zoo

import pkt

IDS = torch.randint(0, 67, (4, 12), generator=torch.Generator().manual_seed(5))
# PEFT has one fan_in_fan_out flag for a model with Conv1D layers and a linear head, and says that it sets it right.
MIXED_LAYOUT = "fan_in_fan_out is set to"


def student(arch: str = "llama", tied: bool = False) -> Any:
    """A model without dropout of its own, so that only LoRA's is left in training mode."""
    if arch == "llama":
        return zoo.llama(tied, hidden=32, layers=2, heads=4, kv=2, ffn=64)
    return zoo.gpt2_without_dropout(tied, hidden=32, layers=2)


def teacher(arch: str = "llama", tied: bool = False) -> Any:
    return zoo.llama(tied) if arch == "llama" else zoo.gpt2_without_dropout(tied, hidden=48, layers=3)


def extraction(arch: str = "llama", tied: bool = False, **options: Any) -> Any:
    """An extraction for `student(arch, tied)`; ranks differ between modules unless a rank is asked for."""
    source, target = teacher(arch, tied), student(arch, tied)
    sens = pkt.sensitivity(source, oracle.batched(oracle.token_samples(4), 2), progress=False)
    plan = pkt.plan(sens, source, target)
    return pkt.extract(source, plan, progress=False, **(options or {"energy": 0.4, "max_rank": 6}))


def steps(model: Any, count: int = 20, lr: float = 3e-3, **forward: Any) -> list[float]:
    """Train on one batch; returns the losses."""
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(count):
        loss = model(input_ids=IDS, labels=IDS, **forward).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits.float()


def save_quietly(model: Any, folder: Path) -> None:
    """As a trainer saves: PEFT's defaults, which add the base embeddings to the file and say so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder))


@contextlib.contextmanager
def no_warnings(*, mixed_layout: bool = False) -> Iterator[None]:
    """Fail on any warning but FutureWarning, which transformers and peft give each other, and PEFT's on mixed layouts."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        if mixed_layout:
            warnings.filterwarnings("ignore", message=MIXED_LAYOUT)
        yield


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
