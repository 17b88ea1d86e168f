"""pkt against the straightforward algorithm (`bench/naive.py`): same teacher, seeds, threads and answer; a row per stage.

    python bench/bench_end_to_end.py            # writes bench/results/end_to_end_cpu.json and prints the table

Teacher 768/2048/8 layers, student 512/1408/6 layers, vocabulary 8192, 8 seeds of 128 tokens, fp32, random weights.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import naive
import pytest
import torch

import pkt

RANK = 16
OUT = Path(os.environ.get("OUT") or Path(__file__).parent / "results")
STAGES = ("scores", "windows", "factors", "end to end")
NUMPY = "windows, the straightforward loop over NumPy scalars"


def llama(hidden: int, ffn: int, layers: int, heads: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(hidden)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8192,
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=256,
        )
    ).eval()


class Case:
    """The models, the seeds, and what each side found, so that the answers can be compared."""

    def __init__(self) -> None:
        self.teacher, self.student = llama(768, 2048, 8, 12), llama(512, 1408, 6, 8)
        ids = torch.randint(0, 8192, (8, 128), generator=torch.Generator().manual_seed(0))
        self.samples = [{"input_ids": i[None], "labels": i[None]} for i in ids]
        self.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        self.weights = {n: p.detach() for n, p in self.teacher.named_parameters()}
        self.found: dict[str, Any] = {}

    def naive_pairs(self, chosen: list[int]) -> list[tuple[str, tuple[int, int]]]:
        pairs = []
        for name, parameter in self.student.named_parameters():
            if parameter.ndim == 2:
                parts = name.split(".")
                if "layers" in parts:
                    parts[2] = str(chosen[int(parts[2])])
                pairs.append((".".join(parts), tuple(parameter.shape)))
        return pairs

    def naive_scores(self) -> Any:
        self.found["naive scores"] = naive.scores(self.teacher, self.samples)

    def naive_windows(self) -> None:
        total = self.found["naive scores"]
        self.found["pairs"] = self.naive_pairs(naive.layer_ranking(total, 8, 6))
        self.found["naive windows"] = naive.windows(total, self.found["pairs"])

    def naive_numpy_windows(self) -> None:
        found = self.found
        assert naive.windows(found["naive scores"], found["pairs"], over_numpy=True) == found["naive windows"]

    def naive_factors(self) -> None:
        found = self.found
        found["naive factors"] = naive.factors(self.weights, found["pairs"], found["naive windows"], RANK)

    def pkt_scores(self) -> None:
        self.found["pkt scores"] = pkt.sensitivity(self.teacher, [self.batch], progress=False)

    def pkt_windows(self) -> None:
        self.found["plan"] = pkt.plan(self.found["pkt scores"], self.teacher, self.student)

    def pkt_factors(self) -> None:
        self.found["ext"] = pkt.extract(self.teacher, self.found["plan"], rank=RANK, progress=False)

    def run(self, side: str) -> None:
        for stage in STAGES[:3]:
            getattr(self, f"{side}_{stage}")()


@pytest.fixture(scope="session")
def case() -> Case:
    return Case()


@pytest.mark.parametrize("side", ["naive", "pkt"])
@pytest.mark.parametrize("stage", STAGES)
def test_stage(case: Case, benchmark: Any, stage: str, side: str) -> None:
    benchmark.group = stage
    work = (lambda: case.run(side)) if stage == "end to end" else getattr(case, f"{side}_{stage}")
    slow = side == "naive" and stage in ("windows", "end to end")
    benchmark.pedantic(work, rounds=1 if slow else 3, warmup_rounds=0 if slow else 1)


def test_the_loop_over_numpy(case: Case, benchmark: Any) -> None:
    benchmark.group = NUMPY
    benchmark.pedantic(case.naive_numpy_windows, rounds=1)


def test_the_answers_agree(case: Case) -> None:
    found = case.found
    regions = {(e.source + ".weight"): e for e in found["plan"].entries}
    assert {n for n, _ in found["pairs"]} == set(regions)
    for (name, _), (r, c), (b, a) in zip(found["pairs"], found["naive windows"], found["naive factors"], strict=True):
        entry = regions[name]
        assert (entry.region.rows[0][0], entry.region.cols[0][0]) == (r, c), name
        region = entry.region.cut(case.weights[name])
        pair = found["ext"].pairs[entry.target]
        ours = pair.B @ pair.A
        ours = ours.t() if entry.kind == "embedding" else ours
        theirs, mine = float((region - b @ a).norm() ** 2), float((region - ours).norm() ** 2)
        assert mine <= 1.01 * theirs, name


def summarize(report: Path) -> dict[str, Any]:
    data = json.loads(report.read_text())
    medians = {
        (b["group"], (b["params"] or {"side": "naive"})["side"]): b["stats"]["median"] for b in data["benchmarks"]
    }
    medians[NUMPY, "pkt"] = medians["windows", "pkt"]
    rows = [
        {
            "stage": s,
            "naive_s": medians[s, "naive"],
            "pkt_s": medians[s, "pkt"],
            "ratio": medians[s, "naive"] / medians[s, "pkt"],
        }
        for s in (*STAGES, NUMPY)
    ]
    return {
        "what": "teacher 768/2048/8 layers -> student 512/1408/6 layers, vocabulary 8192, 8 x 128 tokens, fp32",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "extension": "built" if (Path(pkt.__file__).parent / "_C.abi3.so").exists() else "not built",
        "same_windows": True,
        "rows": rows,
    }


def main() -> int:
    OUT.mkdir(parents=True, exist_ok=True)
    report = OUT / "end_to_end_benchmark.json"
    code = pytest.main([__file__, "-q", "-p", "no:cacheprovider", f"--benchmark-json={report}", "-o", "addopts="])
    if code:
        print("the answers differ or a stage failed: no figures are written", file=sys.stderr)
        report.unlink(missing_ok=True)
        return int(code)
    summary = summarize(report)
    report.unlink()
    (OUT / "end_to_end_cpu.json").write_text(json.dumps(summary, indent=2) + "\n")
    for row in summary["rows"]:
        print(f"{row['stage']:12} naive {row['naive_s']:8.3f} s   pkt {row['pkt_s']:8.3f} s   {row['ratio']:7.1f} x")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main())
