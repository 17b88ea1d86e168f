"""The design's goals: what the JSON files of a folder say of each, met or not. What no file says is not measured.

    python bench/goals.py                                    # the CPU's, from bench/results
    python bench/goals.py --device cuda FOLDER               # the GPU's, from what bench/gpu.sh left there
    python bench/goals.py --device cuda --rehearsal FOLDER   # the GPU's rows from files of tiny shapes: only whether they print

The exit status is 0: a goal that is not met is a finding, not a fault of the run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """One row of the table; `met` is None where nothing was measured."""

    what: str
    goal: str
    found: str
    met: bool | None


class Files:
    """A folder's JSON files, and why one that is not there is not."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        steps = folder / "steps.jsonl"
        said = [json.loads(line) for line in steps.read_text().splitlines()] if steps.is_file() else []
        self.said = {row["step"]: row["said"] for row in said}

    def load(self, bench: str) -> dict[str, Any]:
        path = self.folder / f"{bench}_{self.kind}.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def rows(self, bench: str) -> list[Row]:
        """Of the rivals and cases that ran."""
        return [row for row in self.load(bench).get("rows", ()) if "failed" not in row]

    def missing(self, bench: str, what: str, goal: str) -> Line:
        told = self.said.get(bench, "")
        return Line(what, goal, "not measured" + (f" ({bench}: {told})" if told not in ("", "passed") else ""), None)


def groups(rows: list[Row], *begin: str) -> dict[str, dict[str, Row]]:
    """Group -> rival -> row, of the groups whose names begin so."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["group"].startswith(begin):
            found.setdefault(row["group"], {})[row.get("rival", "")] = row
    return found


def at_least(what: str, found: float, limit: float, form: str = "{:.1f}×") -> Line:
    return Line(what, f"≥ {form.format(limit)}", form.format(found), found >= limit)


def at_most(what: str, found: float, limit: float, form: str = "{:.1f}×", more: str = "") -> Line:
    return Line(what, f"≤ {form.format(limit)}", form.format(found) + more, found <= limit)


def one_or_missing(lines: list[Line], missing: Line) -> list[Line]:
    return lines or [missing]


# --- on a GPU -------------------------------------------------------------------------------------------------------


def linear_sensitivity(files: Files) -> Iterator[Line]:
    what, goal = "linear_sensitivity_", "≥ 85% of one product (floor 70%); ≥ 4× the loop; no gradient-sized buffer"
    lines = []
    for group, rivals in groups(files.rows("kernels"), "linear_sensitivity ").items():
        ours, product = rivals.get("pkt"), rivals.get("one plain product")
        loop = rivals.get("unfused per-sample loop")
        if ours is None or product is None:
            continue
        name = group.removeprefix("linear_sensitivity ")
        rate = product["ms"] / ours["ms"]
        floor = " (the floor, 70%, is met)" if 0.70 <= rate < 0.85 else ""
        lines.append(Line(f"{what} {name}, rate of one product", "≥ 85%", f"{rate:.0%}{floor}", rate >= 0.85))
        if loop is not None:
            lines.append(at_least(f"{what} {name}, against the loop", loop["ms"] / ours["ms"], 4.0))
        n, m = map(int, name.split(" ")[0].split("x"))
        form = "{:.1f} MiB"
        # A gradient in the weights' type would be this large; anything near it is one.
        lines.append(at_most(f"{what} {name}, beside acc", ours["peak_bytes"] / 2**20, n * m / 2**20, form))
    yield from one_or_missing(lines, files.missing("kernels", what, goal))


def memory_bound(files: Files) -> Iterator[Line]:
    rows = files.rows("kernels")
    ours = [r["pkt"] for g, r in groups(rows, "abs_accumulate ").items() if "pkt" in r and "of_copy" in r["pkt"]]
    lines = [at_least(f"{row['group']}, of copy bandwidth", 100 * row["of_copy"], 90, "{:.0f}%") for row in ours]
    yield from one_or_missing(lines, files.missing("kernels", "abs_accumulate_", "≥ 90% of copy bandwidth"))
    ours = [rivals["pkt"] for rivals in groups(rows, "best_window ").values() if "pkt" in rivals]
    lines = [at_most(f"{row['group']}, of one read of S", 1 / row["of_copy"], 4.0) for row in ours]
    yield from one_or_missing(lines, files.missing("kernels", "best_window", "≤ 4× one read of S"))


def rsvd(files: Files) -> Iterator[Line]:
    rows, lines = files.rows("rsvd"), []
    for group, rivals in groups([r for r in rows if " rank 16" in r["group"]], "").items():
        ours, theirs = rivals.get("pkt::rsvd"), rivals.get("torch.svd_lowrank niter=4")
        if ours is None or "of_copy" not in ours:
            continue
        lines.append(at_most(f"rsvd {group}, of its readings' time", 1 / ours["of_copy"], 2.0))
        if theirs is not None:
            lines.append(at_least(f"rsvd {group}, against svd_lowrank", theirs["ms"] / ours["ms"], 10.0))
            full = next(iter(groups(rows, f"{group.split(' ')[0]} full SVD").values()), {})
            what = f"rsvd {group}, against the full SVD"
            slow = [at_least(what, row["ms"] / ours["ms"], 1000.0, "{:.0f}×") for row in full.values()]
            lines += one_or_missing(slow, files.missing("rsvd", what, "≥ 1000×"))
    goal = "≤ 2× its readings; ≥ 10× svd_lowrank; ≥ 1000× the full SVD"
    yield from one_or_missing(lines, files.missing("rsvd", "rsvd", goal))
    spectra = [row for row in rows if row["group"] == "quality, 5 readings"]
    lines = []
    if spectra:
        worst = max(row["excess_block_krylov"] for row in spectra)
        energy = next(row["captured_of_best"] for row in spectra if row["spectrum"] == "1/i")
        lines = [
            at_most("rsvd, ‖X − BA‖² over the optimum, worst spectrum", 1 + worst, 1.01, "{:.4f}×"),
            at_least("rsvd, energy of the optimum's for σ = 1/i", 100 * energy, 99.99, "{:.4f}%"),
        ]
    yield from one_or_missing(lines, files.missing("rsvd", "rsvd's quality", "≤ 1.01× the optimum; ≥ 99.99% for 1/i"))


def stream(files: Files) -> Iterator[Line]:
    rows = {row["row"]: row for row in files.rows("stream")}
    for name, seconds, size in (
        ("13B resident", 10, None),
        ("13B streamed", 10, 10e9),
        ("34B from host memory", 60, 16e9),
    ):
        limit = "weights + boundaries + 10%" if size is None else f"{size / 1e9:.0f} GB"
        row = rows.get(name)
        if row is None:
            yield files.missing("stream", name, f"≤ {seconds} s, {limit}")
            continue
        size = size or 1.1 * (row["weights_bytes"] + row["boundaries_bytes"])
        told = row.get("predicted_seconds")
        more = "" if told is None else f" ({told:.1f} s at the trial's rate of products)"
        yield at_most(f"{name}, end to end", row["seconds"], seconds, "{:.1f} s", more)
        reserved = row.get("reserved_bytes")
        more = "" if reserved is None else f" ({reserved / 1e9:.1f} GB reserved)"
        yield at_most(f"{name}, peak", row["peak_bytes"] / 1e9, size / 1e9, "{:.1f} GB", more)


# --- on a CPU -------------------------------------------------------------------------------------------------------


def end_to_end(files: Files) -> Iterator[Line]:
    rows = {row["stage"]: row for row in files.rows("end_to_end")}
    for stage, limit in (("end to end", 20.0), ("scores", 1.5), ("windows", 1.0), ("factors", 1.0)):
        what = f"{stage}, against the straightforward algorithm"
        if stage in rows:
            yield at_least(what, rows[stage]["ratio"], limit)
        else:
            yield files.missing("end_to_end", what, f"≥ {limit}×")


def compiled(files: Files) -> Iterator[Line]:
    lines = []
    for group, rivals in groups(files.rows("kernels"), "").items():
        for rival, row in rivals.items():
            if rival.startswith("torch.compile"):
                ours = rivals["pkt, tile sums" if rival.endswith("tile sums") else "pkt"]
                what = f"{group}{', tile sums' if rival.endswith('tile sums') else ''}, against torch.compile"
                lines.append(at_least(what, row["ms"] / ours["ms"], 1.0, "{:.2f}×"))
    yield from one_or_missing(lines, files.missing("kernels", "every op", "≥ torch.compile of its formula"))


def rsvd_on_cpu(files: Files) -> Iterator[Line]:
    rows = files.rows("rsvd")
    rivals = groups(rows, "4096x4096 rank 16").get("4096x4096 rank 16", {})
    theirs = rivals.get("torch.svd_lowrank niter=4")
    if theirs is None:
        goal = "≥ 2× svd_lowrank at equal energy; ≥ 50× the full SVD"
        yield files.missing("rsvd", "rsvd bf16 4096×4096", goal)
        return
    # At equal energy: the fastest of our settings that finds no less than theirs does.
    enough = [row for name, row in rivals.items() if name.startswith("pkt::") and _finds_as_much(row, theirs)]
    ours = min(enough, key=lambda row: row["ms"], default=None)
    if ours is None:
        yield Line("rsvd bf16 4096×4096, against svd_lowrank", "≥ 2.0×", "less energy at every setting", False)
        return
    yield at_least(f"rsvd bf16 4096×4096, {ours['rival']} against svd_lowrank", theirs["ms"] / ours["ms"], 2.0)
    for row in next(iter(groups(rows, "4096x4096 full SVD").values()), {}).values():
        yield at_least("rsvd bf16 4096×4096, against the full SVD", row["ms"] / ours["ms"], 50.0, "{:.0f}×")


def _finds_as_much(row: Row, other: Row) -> bool:
    return bool(row["energy_of_best"] >= other["energy_of_best"])


def stream_on_cpu(files: Files) -> Iterator[Line]:
    found = files.load("stream")
    if "goals" not in found:
        yield files.missing("stream", "streamed transfer of a 1.3B teacher", "time, memory and bytes read")
        return
    for name, limit in found["goals"].items():
        yield at_most(f"streamed transfer of a 1.3B teacher, {name}", found[name], limit, "{:.2f}")


def ranks_on_cpu(files: Files) -> Iterator[Line]:
    found, what = files.load("distributed"), "a transfer by two ranks, of two cores"
    if "efficiency" not in found:
        yield files.missing("distributed", what, "≥ 0.85")
        return
    yield at_least(what, found["efficiency"], found["goal"]["efficiency"], "{:.2f}")


def lineage_on_cpu(files: Files) -> Iterator[Line]:
    rows = files.rows("lineage")
    for row in rows:
        what = f"lineage of an 8B-shaped pair, {row['pair']}"
        yield at_most(f"{what}, time", row["seconds"], 600, "{:.0f} s")
        yield at_most(f"{what}, memory", row["peak_bytes"] / 1e9, 4.0, "{:.2f} GB")
    if not rows:
        yield files.missing("lineage", "lineage of an 8B-shaped pair", "≤ 600 s, ≤ 4 GB")


def experts(files: Files) -> Iterator[Line]:
    rivals = groups(files.rows("experts"), "").get("S of a mixture of experts", {})
    ours, dense, alone = (rivals.get(name) for name in ("pkt", "dense twin", "one sample at a time"))
    what, goal = "S of a mixture of experts", "≤ 1.5× its dense twin of equal active parameters"
    if ours is None or dense is None:
        yield files.missing("experts", what, goal)
        return
    more = "" if alone is None else f" (one sample at a time: {alone['ms'] / dense['ms']:.2f}×)"
    yield at_most(f"{what}, of its dense twin's time", ours["ms"] / dense["ms"], 1.5, "{:.2f}×", more)


def demo_on_cpu(files: Files) -> Iterator[Line]:
    """What was set before any control of the demo was run."""
    found = files.load("demo")
    if not found:
        yield files.missing(
            "demo", "the demo's descendant", "≤ 0.5 of the student's NLL at once, ≤ 0.7 of every control's after"
        )
        return
    goals, what = found["goals"], f"the demo's descendant, {found['seeds']} seeds"
    begin, after = (
        next(v for k, v in goals.items() if k.startswith(name)) for name in ("step 0: ", "after training: ")
    )
    yield at_most(f"{what}: NLL before training, of the student's", begin, 0.5, "{:.3f}×")
    best = goals["best control"]
    yield Line(f"{what}: NLL after training, of the best control's", "≤ 0.700×, intervals apart",
               f"{after:.3f}× ({best})", goals["after training met"])  # fmt: skip
    less = [c for c in found["comparisons"] if c["a"] == "transplant" and c["figure"] == "general"]
    told = ", ".join(c["b"] for c in less if c["high"] >= 0)
    yield Line(f"{what}: general text forgotten less than by", "every control",
               f"not surely than by {told}" if told else "every control", goals["forgets less than every control"])  # fmt: skip


def cut_short(files: Files) -> Iterator[Line]:
    for bench in ("stream", "kernels", "rsvd", "end_to_end", "experts"):
        # Files of runs before `complete` was written say nothing.
        if files.load(bench).get("complete") is False:
            yield files.missing(bench, f"the rest of {bench}: its file is not complete", "")


GOALS: dict[str, tuple[Callable[[Files], Iterator[Line]], ...]] = {
    "cuda": (linear_sensitivity, memory_bound, rsvd, stream, cut_short),
    "cpu": (
        end_to_end,
        experts,
        compiled,
        rsvd_on_cpu,
        stream_on_cpu,
        ranks_on_cpu,
        lineage_on_cpu,
        demo_on_cpu,
        cut_short,
    ),
}


def table(lines: list[Line], *, rehearsal: bool = False) -> str:
    words = {True: "rehearsed" if rehearsal else "met", False: "rehearsed" if rehearsal else "NOT MET", None: "-"}
    rows = [("what", "goal", "found", ""), *((x.what, x.goal, x.found, words[x.met]) for x in lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS)
    parser.add_argument("--device", choices=GOALS, default="cpu", help="whose goals, and whose files")
    parser.add_argument("--rehearsal", action="store_true", help="with cuda: read the files of tiny shapes")
    options = parser.parse_args()
    if options.rehearsal:
        print("A REHEARSAL in tiny shapes: these figures say nothing of a GPU.")
    files = Files(options.folder, "tiny" if options.rehearsal else options.device)
    lines = [line for goals in GOALS[options.device] for line in goals(files)]
    print(table(lines, rehearsal=options.rehearsal))
    return 0


if __name__ == "__main__":
    sys.exit(main())
