"""pkt against the straightforward algorithm (`bench/naive.py`): same teacher, seeds, threads and answer; a row per stage.

    python bench/bench_end_to_end.py            # writes bench/results/end_to_end_cpu.json and prints the table

Teacher 768/2048/8 layers, student 512/1408/6 layers, vocabulary 8192, 8 seeds of 128 tokens, fp32, random weights. No row is
written of a stage whose answer is not the other side's. The straightforward window search takes over a minute, so it runs once,
and that side's end to end is the sum of its three stages; pkt's is measured as a whole.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import naive
import torch
from measuring import RESULTS, Clock, Measured, Report, Run, kind_of, measure

import pkt

RANK = 16
# Runs of a stage at most, and seconds after which there are no more.
ROUNDS, BUDGET = 3, 12.0
Shape = tuple[int, int, int, int]
TEACHER, STUDENT, VOCABULARY, TOKENS = (768, 2048, 8, 12), (512, 1408, 6, 8), 8192, 128
TINY_TEACHER, TINY_STUDENT, TINY_VOCABULARY, TINY_TOKENS = (48, 96, 3, 4), (32, 64, 2, 4), 64, 16
NUMPY = "windows, the straightforward loop over NumPy scalars"


def llama(shape: Shape, vocabulary: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, ffn, layers, heads = shape
    torch.manual_seed(hidden)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
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

    def __init__(self, teacher: Shape, student: Shape, vocabulary: int, tokens: int) -> None:
        self.teacher, self.student = llama(teacher, vocabulary), llama(student, vocabulary)
        self.layers = teacher[2], student[2]
        ids = torch.randint(0, vocabulary, (8, tokens), generator=torch.Generator().manual_seed(0))
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

    def naive_scores(self) -> None:
        self.found["naive scores"] = naive.scores(self.teacher, self.samples)

    def naive_windows(self) -> None:
        total = self.found["naive scores"]
        self.found["pairs"] = self.naive_pairs(naive.layer_ranking(total, *self.layers))
        self.found["naive windows"] = naive.windows(total, self.found["pairs"])

    def naive_numpy_windows(self) -> None:
        found = self.found
        found["numpy windows"] = naive.windows(found["naive scores"], found["pairs"], over_numpy=True)

    def naive_factors(self) -> None:
        found = self.found
        found["naive factors"] = naive.factors(self.weights, found["pairs"], found["naive windows"], RANK)

    def pkt_scores(self) -> None:
        self.found["pkt scores"] = pkt.sensitivity(self.teacher, [self.batch], progress=False)

    def pkt_windows(self) -> None:
        self.found["plan"] = pkt.plan(self.found["pkt scores"], self.teacher, self.student)

    def pkt_factors(self) -> None:
        self.found["ext"] = pkt.extract(self.teacher, self.found["plan"], rank=RANK, progress=False)

    def pkt_end_to_end(self) -> None:
        self.pkt_scores()
        self.pkt_windows()
        self.pkt_factors()

    # Each says what is wrong with a stage's answers, or nothing.

    def check_scores(self) -> str | None:
        for name, theirs in self.found["naive scores"].items():
            error = float((self.found["pkt scores"][name] - theirs).norm() / theirs.norm().clamp_min(1e-30))
            if not error <= 1e-4:
                return f"the scores of {name} differ by {error:.1e}"
        return None

    def check_windows(self) -> str | None:
        found = self.found
        regions = {f"{e.source}.weight": e.region for e in found["plan"].entries}
        if {name for name, _ in found["pairs"]} != set(regions):
            return "other layers or matrices are fed"
        for (name, _), place in zip(found["pairs"], found["naive windows"], strict=True):
            ours = regions[name].rows[0][0], regions[name].cols[0][0]
            if ours != place:
                return f"the window of {name} is at {ours}, the straightforward one at {place}"
        return None

    def check_numpy_windows(self) -> str | None:
        same = self.found["numpy windows"] == self.found["naive windows"]
        return None if same else "the loops over torch and over NumPy scalars differ"

    def check_factors(self) -> str | None:
        found = self.found
        entries = {f"{e.source}.weight": e for e in found["plan"].entries}
        for (name, _), (b, a) in zip(found["pairs"], found["naive factors"], strict=True):
            entry = entries[name]
            region, pair = entry.region.cut(self.weights[name]), found["ext"].pairs[entry.target]
            ours = pair.B @ pair.A
            ours = ours.t() if entry.kind == "embedding" else ours
            theirs, mine = float((region - b @ a).norm() ** 2), float((region - ours).norm() ** 2)
            if mine > 1.01 * theirs:
                return f"the factors of {name} leave {mine:.3e} where the straightforward ones leave {theirs:.3e}"
        return None


def row(stage: str, theirs: float, their_runs: int, ours: Measured) -> dict[str, Any]:
    found = {"stage": stage, "naive_s": theirs, "naive_runs": their_runs, "pkt_s": ours.median}
    found |= {"pkt_runs": len(ours.times), "ratio": theirs / ours.median}
    print(f"{stage:54} naive {theirs:8.3f} s   pkt {ours.median:8.3f} s   {theirs / ours.median:7.1f} x", flush=True)
    return found


def compare(case: Case, report: Report) -> None:
    """A row a stage, saved as soon as it is there."""
    clock, seconds = Clock("cpu"), 0.0

    def timed(rivals: dict[str, Run], check: Callable[[], str | None]) -> dict[str, Measured]:
        found, _ = measure(clock, rivals, ROUNDS, BUDGET)
        wrong = check()
        if wrong:
            raise SystemExit(f"{wrong}: no figure is written for it")
        return found

    windows: Measured | None = None
    for stage in ("scores", "windows", "factors"):
        sides: dict[str, Run] = {side: getattr(case, f"{side}_{stage}") for side in ("pkt", "naive")}
        found = timed(sides, getattr(case, f"check_{stage}"))
        theirs, ours = found["naive"], found["pkt"]
        seconds += theirs.median
        report.add(row(stage, theirs.median, len(theirs.times), ours))
        windows = ours if stage == "windows" else windows
    whole = timed({"pkt": case.pkt_end_to_end}, lambda: None)["pkt"]
    report.add({**row("end to end", seconds, 1, whole), "naive_is": "the sum of its stages"})
    assert windows is not None
    loop = timed({"naive": case.naive_numpy_windows}, case.check_numpy_windows)["naive"]
    report.add(row(NUMPY, loop.median, len(loop.times), windows))
    report.save(same_windows=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="shapes that show whether it runs, and nothing else")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    what = (
        "tiny shapes"
        if options.tiny
        else "teacher 768/2048/8 layers -> student 512/1408/6 layers, vocabulary 8192, 8 x 128 tokens, fp32"
    )
    tiny = TINY_TEACHER, TINY_STUDENT, TINY_VOCABULARY, TINY_TOKENS
    case = Case(*tiny) if options.tiny else Case(TEACHER, STUDENT, VOCABULARY, TOKENS)
    report = Report(options.out / f"end_to_end_{kind_of('cpu', options.tiny)}.json", "cpu", what=what)
    try:
        compare(case, report)
    except SystemExit as error:
        report.fail("answers", error)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
