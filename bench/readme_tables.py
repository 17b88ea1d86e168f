"""Write the README's tables from bench/results/*.json (`--check`: only say whether they are what the files give)."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


def load(name: str) -> dict | None:
    path = RESULTS / name
    return json.loads(path.read_text()) if path.is_file() else None


def demo_table() -> str:
    found = load("demo_cpu.json")
    if found is None:
        return "(no run is committed yet)"
    spread = lambda values: stdev(values) if len(values) > 1 else 0.0  # noqa: E731
    lines = ["| start | lr | test NLL | exact match |", "|---|---|---|---|"]
    for name, key in (("student before training", "untrained"), ("teacher", "teacher")):
        lines.append(f"| {name} | | {found[key]['nll']:.3f} | {100 * found[key]['exact_match']:.1f}% |")
    guess = found["guess"]
    lines.append(f"| always answering {guess['answer']} | | | {100 * guess['exact_match']:.1f}% |")
    for name, r in found["methods"].items():
        matches = [100 * m for m in r["exact_match"]]
        nll, match = (f"{mean(v):.{d}f}{u} ± {spread(v):.{d}f}" for v, d, u in ((r["nll"], 3, ""), (matches, 1, "%")))
        lines.append(f"| {name} | {r['lr']:g} | {nll} | {match} |")
    return "\n".join([*lines, "", *(f"- {line}" for line in found["verdict"])])


def bench_table() -> str:
    found = load("end_to_end_cpu.json")
    if found is None:
        return "(no run is committed yet)"
    lines = [
        f"On {found['threads']} CPU cores, {found['what']},",
        "against the straightforward algorithm (`bench/naive.py`), with the same windows:",
        "",
        "| stage | straightforward | pkt | ratio |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {r['stage']} | {r['naive_s']:.2f} s | {r['pkt_s']:.2f} s | {r['ratio']:.1f}× |" for r in found["rows"]
    ]
    real = load("real_cpu.json")
    if real is not None:
        lines += [
            "",
            f"SmolLM2-135M-Instruct scored on {real['seeds']} GSM8K seeds ({real['tokens']} tokens), cut to a 12-layer student and "
            f"factorized: {real['transfer_s']:.0f} s, peak memory {real['peak_rss_bytes'] / 2**30:.1f} GiB (`make real`).",
        ]
    return "\n".join(lines)


def families_table() -> str:
    found = load("families.json")
    if found is None:
        return "(no run is committed yet)"
    lines = ["| family | S against autograd | read from disk | fed in a student of its own kind |", "|---|---|---|---|"]
    for name, row in found.items():
        fed = ", ".join(row.get("fed", ())) + "".join(f"; {note}" for note in row.get("notes", ()))
        error = "not reached" if row["error"] is None else f"{row['error']:.0e}"
        state = fed if row["passed"] else f"**fails**: {row.get('reason', 'see the test')}"
        lines.append(f"| {name} (`{row['class']}`) | {error} | {row.get('read', '')} | {state} |")
    return "\n".join(lines)


def main() -> int:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    new = text
    for name, table in (("demo table", demo_table()), ("bench table", bench_table()), ("families", families_table())):
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)"
        new = re.sub(pattern, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", new, flags=re.S)
    if "--check" in sys.argv:
        if new != text:
            print("README.md's tables are not what bench/results gives; run python bench/readme_tables.py")
        return int(new != text)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
