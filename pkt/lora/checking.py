"""A finalized adapter on the original student, by plain PEFT, against the trained model: their logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pkt.adapters import parameter_name
from pkt.errors import PktError
from pkt.lora.recognition import Source
from pkt.lora.record import name_of, parameter_of, subtract
from pkt.lora.wrapping import put_adapter, unwrapped
from pkt.models import ModelSpec, load_model, load_tokenizer, spec_of
from pkt.progress import bar
from pkt.seeds import load_seeds

# Largest logit difference of an exact result, relative to the largest logit: fp32, and half precision, where the base itself
# was rounded when B₀A₀ left it.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


@dataclass(frozen=True)
class Check:
    """The result on the original student against the trained model, on a few samples."""

    samples: int
    tokens: int
    gap: float  # largest difference of a logit
    scale: float  # largest logit
    agreement: float  # share of positions with the same most likely token

    def __str__(self) -> str:
        return (
            f"against the trained model on {self.samples} samples ({self.tokens} tokens): logits differ by at most {self.gap:.1e} "
            f"(they reach {self.scale:.1f}), the same next token at {100 * self.agreement:.1f}% of positions"
        )


@torch.no_grad()
def self_check(
    model_or_dir: Any, source: Source, written: Path, student: Any, samples: Sequence[Sequence[int]] | None = None
) -> Check:
    """Logits of the written adapter on the original student, by plain PEFT, against those of the trained model."""
    in_memory = isinstance(model_or_dir, nn.Module)
    base: Any = student
    if not isinstance(student, nn.Module):
        base = load_model(student, dtype=dtype_of(model_or_dir) if in_memory else None)
    if samples is None:
        samples = _random_samples(spec_of(base).vocab_size or 2)
    names = [parameter_name(m, p) for m, p in source.adapter.pairs.items()]
    # A trainer's checkpoint may carry base weights, and a residual one needs its base shifted: both are undone.
    found = {n: weight for n in names if base is student and (weight := parameter_of(base, n)) is not None}
    kept = {n: weight.detach().clone() for n, weight in found.items()}
    final = _with_adapter(base, written, samples)
    if in_memory:
        trained = _logits(unwrapped(model_or_dir), samples)
    else:
        if source.initial is not None:
            subtract(base, source.initial)
        trained = _with_adapter(base, Path(model_or_dir), samples)
    for name, weight in kept.items():
        found[name].copy_(weight)
    gap = max(float((x - y).abs().max()) for x, y in zip(final, trained, strict=True))
    same = [(x.argmax(-1) == y.argmax(-1)).float() for x, y in zip(final, trained, strict=True)]
    agreement, scale = torch.cat(same, 1).mean(), max(float(y.abs().max()) for y in trained)
    return Check(len(samples), sum(len(s) for s in samples), gap, scale, float(agreement))


def _with_adapter(base: Any, folder: Path, samples: Sequence[Sequence[int]]) -> list[Tensor]:
    model = put_adapter(base, folder)
    try:
        return _logits(model, samples)
    finally:
        model.unload()


def _logits(model: Any, samples: Sequence[Sequence[int]]) -> list[Tensor]:
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    found = []
    try:
        with bar("checking the logits", len(samples), unit="samples") as advance:
            for sample in samples:
                ids = torch.tensor([list(sample)], device=device)
                found.append(model(ids, use_cache=False).logits.float().cpu())
                advance(len(found))
        return found
    finally:
        model.train(training)


def token_ids_of(samples: Any, student: Any, spec: ModelSpec) -> list[list[int]] | None:
    """The first rows of a file as token ids, or the ids given; raises `PktError` for what a model cannot read."""
    if samples is None:
        return None
    if isinstance(samples, (str, Path)):
        name = student if not isinstance(student, nn.Module) else name_of(student)
        read = load_seeds(samples, load_tokenizer(name), limit=8, max_length=min(2048, spec.positions or 2048))
        samples = [example.input_ids for example in read]
    try:
        rows = [torch.as_tensor(row) for row in samples]
        sound = all(r.ndim == 1 and len(r) and not r.is_floating_point() and r.min() >= 0 for r in rows)
    except (TypeError, ValueError, RuntimeError):
        sound = False
    if not sound or not rows:
        raise PktError(
            "samples must be one or more rows of token ids, such as [[5, 17, 3]], or the path of a JSONL file"
        )
    largest = max(int(r.max()) for r in rows)
    if spec.vocab_size is not None and largest >= spec.vocab_size:
        raise PktError(f"samples hold the token id {largest}, but the student embeds only {spec.vocab_size}")
    longest = max(len(r) for r in rows)
    if spec.positions is not None and longest > spec.positions:
        raise PktError(f"samples hold a row of {longest} tokens, and the student has only {spec.positions} positions")
    return [r.tolist() for r in rows]


def _random_samples(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (4, 16), generator=generator).tolist()


def dtype_of(model: Any) -> torch.dtype:
    base = unwrapped(model).get_base_model()
    return next(
        (p.dtype for n, p in base.named_parameters() if ".lora_" not in n and p.is_floating_point()), torch.float32
    )
