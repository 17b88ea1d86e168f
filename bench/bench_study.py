"""Runs `pkt study demo` and keeps what it found, which README's "Does it help?" is made of.

python bench/bench_study.py                  # writes bench/results/study_demo.json; six minutes of a quiet core
python bench/bench_study.py --of FOLDER      # keeps what an earlier run in FOLDER found
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from measuring import RESULTS, machine

from pkt.studying import study


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", type=Path, help="a folder that the study was run into")
    parser.add_argument("--out", type=Path, default=RESULTS / "study_demo.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pkt-study-") as folder:
        found = study("demo", options.of or folder, told=lambda job, error: print(job, error or "", flush=True))
    if found["failures"] or found["verdict"].startswith("Not yet"):
        print(found["verdict"], *found["failures"])
        return 1
    # Losses by step and single items are for the study's own page.
    for value in found["tasks"].values():
        for start in value["starts"].values():
            start.pop("losses")
    for comparison in found["comparisons"]:
        comparison["items"].pop("flipped", None)
    kept = {**found, "made_on": {name: machine("cpu")[name] for name in ("device", "machine", "torch")}}
    options.out.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
