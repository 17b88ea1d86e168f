"""S of a mixture of experts at batch 8: against its dense twin of equal active parameters, and against one sample at a time.

    python bench/bench_experts.py            # writes bench/results/experts_cpu.json and prints the rows

Mixtral's proportions in small, random weights, fp32; the twin's FFN is as wide as the experts that a token is sent to. One sample
at a time is how such a model is scored where pkt cannot follow its experts: autograd gives the whole gradient of a sample. No row
is written unless both ways give the same S.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, Bench, Report, kind_of
from torch import nn

import pkt

ROUNDS, BUDGET = 5, 30.0


@dataclass(frozen=True)
class Shape:
    hidden: int = 512
    ffn: int = 1792
    layers: int = 2
    heads: int = 8
    experts: int = 8
    chosen: int = 2
    vocabulary: int = 8192
    tokens: int = 256

    def __str__(self) -> str:
        return (
            f"{self.chosen} of {self.experts} experts, {self.hidden}/{self.ffn}/{self.layers} layers, "
            f"vocabulary {self.vocabulary}, 8 x {self.tokens} tokens"
        )

    def model(self, *, dense: bool) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

        fields = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads // 2,
            "max_position_embeddings": self.tokens,
        }
        torch.manual_seed(0)
        if dense:
            return LlamaForCausalLM(LlamaConfig(**fields, intermediate_size=self.chosen * self.ffn)).eval()
        mixture = {"num_local_experts": self.experts, "num_experts_per_tok": self.chosen}
        return MixtralForCausalLM(MixtralConfig(**fields, **mixture, intermediate_size=self.ffn)).eval()


@contextlib.contextmanager
def unfollowed(model: nn.Module) -> Iterator[None]:
    """Inside, pkt leaves the experts and their routers to autograd, as it does all modules with a forward of their own."""
    modules = [m for name, m in model.named_modules() if name.endswith((".mlp.gate", ".mlp.experts"))]
    for module in modules:
        module.forward = module.forward
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="shapes that show whether it runs, and nothing else")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    shape = Shape(32, 48, 2, 4, 4, 2, 64, 16) if options.tiny else Shape()
    mixture, dense = shape.model(dense=False), shape.model(dense=True)
    ids = torch.randint(0, shape.vocabulary, (8, shape.tokens), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}]

    def scores(model: nn.Module) -> pkt.Sensitivity:
        return pkt.sensitivity(model, batches, progress=False)

    def alone() -> pkt.Sensitivity:
        with unfollowed(mixture):
            return scores(mixture)

    report = Report(options.out / f"experts_{kind_of('cpu', options.tiny)}.json", "cpu", what=str(shape))
    ours, theirs = scores(mixture), alone()
    worst = max(float((ours[n] - one).norm() / one.norm().clamp_min(1e-30)) for n, one in theirs.items())
    if worst > 1e-4:
        report.fail("answers", ValueError(f"the two ways of scoring differ by {worst:.1e}"))
        return report.finish()
    report.save(worst_difference=worst)
    del ours, theirs
    bench = Bench(report, "cpu", ROUNDS, BUDGET)
    rivals = {
        "pkt": lambda: len(scores(mixture)),
        "dense twin": lambda: len(scores(dense)),
        "one sample at a time": lambda: len(alone()),
    }
    bench.group("S of a mixture of experts", rivals)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
