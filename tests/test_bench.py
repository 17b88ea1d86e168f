"""The benches: what they keep when they are killed, the goals' table, and a rehearsal of the GPU's slot without a GPU."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pkt import ops

ROOT = Path(__file__).parents[1]
STEPS = (
    "build",
    "assert",
    "warm",
    "smoke",
    "tune",
    "stream",
    "kernels",
    "rsvd",
    "profile",
    "model",
    "tests",
    "sanitizer",
    "racecheck",
)
MEBIBYTE = 2**20


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of bench/."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module


# --- measuring ------------------------------------------------------------------------------------------------------


def test_a_rival_that_has_used_up_its_budget_runs_no_more(bench: Any) -> None:
    measuring = bench("measuring")
    ran = {"quick": 0, "slow": 0, "once": 0}

    def rival(name: str, seconds: float) -> Any:
        def run() -> str:
            ran[name] += 1
            time.sleep(seconds)
            return name

        return run

    rivals = {name: rival(name, seconds) for name, seconds in (("quick", 0.0), ("slow", 0.15), ("once", 0.5))}
    found, failed = measuring.measure(measuring.Clock("cpu"), rivals, rounds=5, budget=0.4)
    assert failed == {}
    # Two more than are kept: one that warms up, one whose memory is watched.
    assert {name: len(one.times) for name, one in found.items()} == {"quick": 5, "slow": 3, "once": 1}
    assert ran == {"quick": 7, "slow": 5, "once": 1}
    assert found["once"].median >= 0.5
    assert found["slow"].value == "slow"


def test_a_rival_that_fails_is_told_and_ours_is_raised(bench: Any) -> None:
    measuring = bench("measuring")

    def broken() -> None:
        raise RuntimeError("no such kernel")

    found, failed = measuring.measure(measuring.Clock("cpu"), {"pkt": int, "theirs": broken}, 2, 1.0)
    assert list(found) == ["pkt"]
    assert failed == {"theirs": "RuntimeError: no such kernel"}
    with pytest.raises(RuntimeError, match="no such kernel"):
        measuring.measure(measuring.Clock("cpu"), {"pkt": broken, "theirs": int}, 2, 1.0)


def test_the_peak_is_what_was_taken_inside(bench: Any) -> None:
    measuring = bench("measuring")
    kept = torch.ones(16 * MEBIBYTE, dtype=torch.uint8)
    with measuring.Peak() as peak:
        for _ in range(3):
            taken = torch.ones(64 * MEBIBYTE, dtype=torch.uint8)
            time.sleep(0.05)
            del taken
    assert 60 * MEBIBYTE <= peak.bytes <= 70 * MEBIBYTE
    assert len(kept) == 16 * MEBIBYTE


KILLED = """
import sys, time
sys.path[:0] = [{bench!r}, {root!r}]
from pathlib import Path
from measuring import Report
report = Report(Path(sys.argv[1]), "cpu", what="x" * 100_000)
for number in range(10_000_000):
    report.add({{"group": "one", "number": number}})
"""


def test_a_report_is_readable_whenever_its_bench_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    code = KILLED.format(bench=str(ROOT / "bench"), root=str(ROOT))
    child = subprocess.Popen([sys.executable, "-c", code, str(path)])
    while child.poll() is None and not (path.is_file() and '"number": 20' in path.read_text()):
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    found = json.loads(path.read_text())
    assert found["complete"] is False
    assert [row["number"] for row in found["rows"]][:21] == list(range(21))


# --- smoke ----------------------------------------------------------------------------------------------------------


def test_the_smoke_run_has_every_op(bench: Any) -> None:
    assert set(bench("smoke").CASES) == set(bench("measuring").implementations("cpu"))


def test_the_smoke_run_finds_a_wrong_answer(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smoke, measuring = bench("smoke"), bench("measuring")
    report = measuring.Report(tmp_path / "smoke_cpu.json", "cpu")
    assert smoke.check("best_window", torch.device("cpu"), report)
    assert smoke.check("rsvd", torch.device("cpu"), report)
    assert report.content["failures"] == []
    right = ops.best_window
    monkeypatch.setattr(ops, "best_window", lambda *args: (right(*args)[0] + 1, right(*args)[1]))
    monkeypatch.setattr(ops, "rsvd", lambda a, rank: [x * float("nan") for x in torch.ops.pkt.rsvd(a, rank)])
    smoke.check("best_window", torch.device("cpu"), report)
    smoke.check("rsvd", torch.device("cpu"), report)
    assert [row["passed"] for row in report.rows] == [True] * 4 + [False] * 4
    assert math.isnan(smoke.worst([0.0, float("nan"), 0.0]))
    assert len(json.loads((tmp_path / "smoke_cpu.json").read_text())["failures"]) == 4
    assert report.finish() == 1


def test_torch_s_own_operations_may_not_serve_on_a_gpu(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    smoke = bench("smoke")
    used = {"rsvd": ("torch", "pkt._C has no cuda part"), "best_window": ("Triton", "compute capability 8.0 or above")}
    monkeypatch.setattr(smoke, "implementations", lambda device: used)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert smoke.unserved(torch.device("cuda")) == ["rsvd uses torch: pkt._C has no cuda part"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert smoke.unserved(torch.device("cuda")) == ["torch sees no CUDA device"]


# --- goals ----------------------------------------------------------------------------------------------------------


def write(folder: Path, name: str, rows: list[dict[str, Any]], **facts: Any) -> None:
    (folder / f"{name}.json").write_text(json.dumps({"complete": True, "rows": rows, **facts}))


def test_the_goals_of_a_gpu(bench: Any, tmp_path: Path) -> None:
    goals = bench("goals")
    times = {"pkt": 2.0, "one plain product": 1.6, "unfused per-sample loop": 9.0}
    write(
        tmp_path,
        "kernels_cuda",
        [
            *(
                {"group": "linear_sensitivity 4096x4096 32x512", "rival": rival, "ms": ms, "peak_bytes": 2**25}
                for rival, ms in times.items()
            ),
            {"group": "abs_accumulate 11008x4096", "rival": "pkt", "ms": 1.0, "of_copy": 0.93},
            {"group": "best_window 13824x5120 -> 11008x4096", "rival": "pkt", "failed": "out of memory"},
        ],
        complete=False,
    )
    steps = [("kernels", "killed at its limit of 71 s"), ("stream", "passed")]
    (tmp_path / "steps.jsonl").write_text(
        "".join(json.dumps({"step": step, "said": said}) + "\n" for step, said in steps)
    )
    row = {"row": "13B resident", "seconds": 9.5, "peak_bytes": 37e9, "weights_bytes": 26e9, "boundaries_bytes": 7e9}
    write(tmp_path, "stream_cuda", [{**row, "predicted_seconds": 2.4, "reserved_bytes": 40e9}])
    files = goals.Files(tmp_path, "cuda")
    lines = {line.what: line for part in goals.GOALS["cuda"] for line in part(files)}
    met = {what: line.met for what, line in lines.items()}
    assert met == {
        "linear_sensitivity_ 4096x4096 32x512, rate of one product": False,
        "linear_sensitivity_ 4096x4096 32x512, against the loop": True,
        "linear_sensitivity_ 4096x4096 32x512, beside acc": False,
        "abs_accumulate 11008x4096, of copy bandwidth": True,
        "best_window": None,
        "rsvd": None,
        "rsvd's quality": None,
        "13B resident, end to end": True,
        "13B resident, peak": False,
        "13B streamed": None,
        "34B from host memory": None,
        "the rest of kernels: its file is not complete": None,
    }
    assert lines["linear_sensitivity_ 4096x4096 32x512, rate of one product"].found == "80% (the floor, 70%, is met)"
    assert lines["best_window"].found == "not measured (kernels: killed at its limit of 71 s)"
    assert lines["34B from host memory"].found == "not measured"
    assert lines["13B resident, peak"].found == "37.0 GB (40.0 GB reserved)"
    text = goals.table(list(lines.values()))
    assert text.count("NOT MET") == 3
    assert "met" not in re.sub("floor, 70%, is met", "", goals.table(list(lines.values()), rehearsal=True))


def test_the_goals_of_a_cpu(bench: Any, tmp_path: Path) -> None:
    goals = bench("goals")
    stages = {"end to end": 21.0, "scores": 1.4, "windows": 200.0, "factors": 40.0}
    write(tmp_path, "end_to_end_cpu", [{"stage": stage, "ratio": ratio} for stage, ratio in stages.items()])
    rivals = {"pkt::rsvd iters=2": (10, 0.97), "pkt::rsvd": (40, 0.997), "torch.svd_lowrank niter=4": (72, 0.99)}
    rows = [
        {"group": "4096x4096 rank 16", "rival": rival, "ms": ms, "energy_of_best": energy}
        for rival, (ms, energy) in rivals.items()
    ]
    write(tmp_path, "rsvd_cpu", [*rows, {"group": "4096x4096 full SVD", "rival": "torch.linalg.svd", "ms": 2100.0}])
    ways = {"pkt": 160.0, "dense twin": 100.0, "one sample at a time": 900.0}
    group = "S of a mixture of experts"
    write(tmp_path, "experts_cpu", [{"group": group, "rival": rival, "ms": ms} for rival, ms in ways.items()])
    lines = {line.what: line for part in goals.GOALS["cpu"] for line in part(goals.Files(tmp_path, "cpu"))}
    assert lines[f"{group}, of its dense twin's time"].found == "1.60× (one sample at a time: 9.00×)"
    assert lines[f"{group}, of its dense twin's time"].met is False
    assert lines["scores, against the straightforward algorithm"].met is False
    assert lines["end to end, against the straightforward algorithm"].met is True
    # The setting that is twice as fast finds less.
    assert lines["rsvd bf16 4096×4096, pkt::rsvd against svd_lowrank"].found == "1.8×"
    assert lines["rsvd bf16 4096×4096, against the full SVD"].met is True
    assert lines["every op"].found == "not measured"
    assert lines["the demo's descendant"].met is None


def test_the_goals_of_the_demo(bench: Any, tmp_path: Path) -> None:
    goals = bench("goals")
    general = [
        {"a": "transplant", "b": name, "figure": "general", "high": high} for name, high in (("x", -1), ("y", 0.1))
    ]
    found = {
        "seeds": 5,
        "comparisons": general,
        "goals": {
            "step 0: NLL, goal 0.5": 0.51,
            "after training: NLL, goal 0.7": 0.4,
            "best control": "x",
            "after training met": True,
            "forgets less than every control": False,
        },
    }
    (tmp_path / "demo_cpu.json").write_text(json.dumps(found))
    begin, after, less = goals.demo_on_cpu(goals.Files(tmp_path, "cpu"))
    assert (begin.found, begin.met) == ("0.510×", False)
    assert (after.found, after.met) == ("0.400× (x)", True)
    assert (less.found, less.met) == ("not surely than by y", False)


# --- the slot -------------------------------------------------------------------------------------------------------


def slot(root: Path, out: Path, **environment: str) -> tuple[int, str, float]:
    """Exit status, output and seconds of bench/gpu.sh."""
    begin = time.monotonic()
    done = subprocess.run(
        ["bash", str(root / "bench" / "gpu.sh")],
        env={**os.environ, "PYTHON": sys.executable, "DEVICE": "cpu", "OUT": str(out), **environment},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr, time.monotonic() - begin


def stand_ins(command: str = "true", **others: str) -> dict[str, str]:
    return {f"STAND_IN_{step}": others.get(step, command) for step in STEPS}


def said(out: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    return {row["step"]: row["said"] for row in rows}


def untils(output: str) -> dict[str, int]:
    return {step: int(second) for step, second in re.findall(r"^== (\w+): until second (\d+) of", output, re.M)}


def logs(out: Path) -> dict[str, str]:
    with tarfile.open(out / "logs.tar.gz") as archive:
        files = {member.name: archive.extractfile(member) for member in archive.getmembers() if member.isfile()}
        return {Path(name).stem: file.read().decode() for name, file in files.items() if file is not None}


def test_every_step_runs_in_order_within_the_deadline(tmp_path: Path) -> None:
    status, output, _ = slot(ROOT, tmp_path, **stand_ins("echo done by a stand-in"))
    assert status == 0, output
    assert said(tmp_path) == dict.fromkeys(STEPS, "passed")
    assert list(untils(output)) == list(STEPS)
    # The shares add up to the deadline.
    assert list(untils(output).values()) == sorted(untils(output).values())
    assert untils(output)["racecheck"] == 530
    assert logs(tmp_path) == dict.fromkeys(STEPS, "done by a stand-in\n")
    assert output.splitlines()[-1].startswith("34B from host memory")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs.tar.gz", "steps.jsonl"]


def test_steps_are_selected_and_share_the_whole_deadline(tmp_path: Path) -> None:
    status, output, _ = slot(ROOT, tmp_path, STEPS="stream build assert", **stand_ins())
    assert status == 0, output
    assert list(untils(output)) == ["build", "assert", "stream"]
    assert untils(output)["stream"] == 530
    status, output, _ = slot(ROOT, tmp_path, STEPS="build smok", **stand_ins())
    assert status == 2
    assert "there is no step smok" in output


@pytest.mark.parametrize("step", ["build", "assert"])
def test_nothing_is_measured_when_an_op_has_no_kernel(step: str, tmp_path: Path) -> None:
    failing = {step: "echo no kernel: rsvd uses torch; exit 1"}
    status, output, _ = slot(ROOT, tmp_path, **stand_ins(**failing))
    assert status == 1
    assert said(tmp_path)[step] == "failed with status 1"
    later = STEPS[STEPS.index(step) + 1 :]
    assert {said(tmp_path)[name] for name in later} == {f"not run: {step} failed"}
    assert "no kernel: rsvd uses torch" in output
    assert f"FAILED: {step} (failed with status 1)" in output
    assert re.search(rf"13B resident .* not measured \(stream: not run: {step} failed\)", output)


def test_a_step_that_fails_stops_no_other(tmp_path: Path) -> None:
    status, output, _ = slot(ROOT, tmp_path, **stand_ins(smoke="exit 3", rsvd="exit 4"))
    assert status == 1
    failed = {"smoke": "failed with status 3", "rsvd": "failed with status 4"}
    assert said(tmp_path) == {step: failed.get(step, "passed") for step in STEPS}
    assert re.findall(r"^FAILED: (\w+)", output, re.M) == ["smoke", "rsvd"]


@pytest.mark.slow
def test_a_step_that_hangs_is_killed_and_the_deadline_holds(tmp_path: Path) -> None:
    stubborn = "trap '' INT TERM; echo begun; (sleep 1000; echo never) & while true; do sleep 1; done"
    others = stand_ins(stream=stubborn, kernels="echo begun; sleep 1000", model="sleep 1")
    status, output, seconds = slot(ROOT, tmp_path, DEADLINE="40", STEPS="stream kernels model", **others)
    assert status == 1
    assert seconds < 41
    found = said(tmp_path)
    assert found["stream"].startswith("killed at its limit"), output
    assert found["kernels"].startswith("killed at its limit"), output
    assert found["model"] == "passed"
    assert logs(tmp_path)["stream"] == "begun\n"
    assert re.search(r"34B from host memory .* not measured \(stream: killed at its limit of \d+ s\)", output)


KILLED_IN_A_GROUP = """
import sys, time
sys.path.insert(0, "bench")
import bench_kernels

def hangs(bench):
    bench.report.rows.append({"group": "never saved", "rival": "pkt"})
    time.sleep(10_000)

bench_kernels.GROUPS = {"accumulate": bench_kernels.bench_accumulate, "hangs": hangs}
sys.argv = ["bench_kernels.py", "--device", "cpu", "--tiny", "--groups", "accumulate,hangs"]
bench_kernels.main()
"""


@pytest.mark.slow
def test_a_bench_killed_in_a_group_leaves_the_groups_before_it(tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(KILLED_IN_A_GROUP)
    command = f"{sys.executable} {tmp_path / 'killed.py'}"
    status, output, _ = slot(
        ROOT, tmp_path / "out", DEADLINE="90", STEPS="kernels assert", **stand_ins(kernels=command)
    )
    assert status == 1, output
    found = json.loads((tmp_path / "out" / "kernels_tiny.json").read_text())
    assert found["complete"] is False
    assert {row["group"].split(" ")[0] for row in found["rows"]} == {"abs_accumulate"}
    assert re.search(r"^abs_accumulate 128x64, of copy bandwidth .* rehearsed$", output, re.M)
    assert re.search(r"^best_window .* not measured \(kernels: killed at its limit of \d+ s\)", output, re.M)


@pytest.mark.slow
def test_a_rehearsal_of_the_gpu_s_slot(tmp_path: Path) -> None:
    """Every step's twin, in a copy, so that building leaves nothing in the checkout."""
    copy, out = tmp_path / "pkt", tmp_path / "out"
    leave = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("bench", "csrc", "kernels", "pkt", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=leave)
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    # Many times the slot: this machine may be busy, and what is rehearsed is not its speed.
    status, output, _ = slot(copy, out, DEADLINE="5300", PYTHONPATH="")
    assert status == 0, output[-6000:]
    found = said(out)
    assert list(found) == list(STEPS)
    assert found.pop("sanitizer") == found.pop("racecheck") == "not run: there is no GPU"
    assert set(found.values()) == {"passed"}, output[-6000:]
    assert list((copy / "pkt").glob("_C*.so"))

    files = sorted(path.name for path in out.iterdir())
    benches = [f"{name}_tiny.json" for name in ("kernels", "kernels_tiny", "profile", "rsvd", "stream")] + [
        "smoke_cpu.json"
    ]
    assert files == sorted([*benches, "logs.tar.gz", "steps.jsonl"])
    assert all(path.stat().st_size < 16 * MEBIBYTE for path in out.iterdir())
    assert set(logs(out)) == set(STEPS) - {"sanitizer", "racecheck"}
    for name in benches:
        report = json.loads((out / name).read_text())
        assert report["complete"], name
        assert report["rows"], name
        assert report["implementations"]["rsvd"] == "C++"
    # The whole table is there, its last lines the output's.
    table = output[output.index("A REHEARSAL") :]
    assert "not measured" not in table, table
    assert "rsvd 200x160 rank 16 odd column" in table
    assert output.splitlines()[-1].startswith("34B from host memory, peak")


def test_a_layer_of_a_batch_waits_for_nothing_and_launches_little_beside_its_products(bench: Any) -> None:
    count_launches = bench("count_launches")
    bare = count_launches.by_kind(count_launches.of_layer(count_launches.WORKS["forward and dX alone"]))
    ours = count_launches.by_kind(count_launches.of_layer(count_launches.WORKS["sensitivity, elements"]))
    assert ours["products"] == bare["products"] == 14
    assert ours["pkt's kernels"] == 7
    assert ours["waits for the device"] == 0
    # Of each use of a weight the sum of dy, by which what is not finite is found; of a norm its products, and their sums.
    assert ours["elementwise and sums"] - bare["elementwise and sums"] <= 20


def test_a_layer_of_a_transfer_launches_little_beside_its_batches_and_waits_a_few_times(bench: Any) -> None:
    count_launches = bench("count_launches")
    of_batch = sum(count_launches.of_layer(count_launches.WORKS["sensitivity, elements"]).values())
    launches, asked = count_launches.of_transfer_layer()
    # The regions and factors of seven matrices, and one check of every gradient; no batch adds to what is asked.
    assert sum(launches.values()) - 4 * of_batch <= 150
    assert asked <= 7


@pytest.mark.slow
def test_the_whole_comparison_runs_in_tiny_shapes(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "bench" / "bench_end_to_end.py"), "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "end_to_end_tiny.json").read_text())
    assert found["complete"]
    assert found["same_windows"]
    assert [row["stage"] for row in found["rows"]][:4] == ["scores", "windows", "factors", "end to end"]
    assert found["rows"][3]["naive_s"] == pytest.approx(sum(row["naive_s"] for row in found["rows"][:3]))


def test_the_comparison_of_experts_runs_in_tiny_shapes(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "bench" / "bench_experts.py"), "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "experts_tiny.json").read_text())
    assert found["complete"]
    assert [row["rival"] for row in found["rows"]] == ["pkt", "dense twin", "one sample at a time"]
    assert all("failed" not in row for row in found["rows"])


@pytest.mark.slow
def test_the_lineage_of_a_large_pair_runs_in_tiny_shapes(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "bench" / "bench_lineage.py"), "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {row["pair"]: row for row in json.loads((tmp_path / "lineage_tiny.json").read_text())["rows"]}
    assert {pair: row["verdict"] for pair, row in found.items()} == {"stranger": "no lineage", "descendant": "descends"}
    assert found["descendant"]["layers_right"]
    assert found["descendant"]["hidden_right"] == found["descendant"]["evidence"]["hidden units"]["of"]


@pytest.mark.slow
def test_a_real_pair_is_rehearsed_in_its_step(tmp_path: Path) -> None:
    status, output, _ = slot(ROOT, tmp_path, STEPS="descendant", DEADLINE="600")
    assert status == 0, output
    assert said(tmp_path) == {"descendant": "passed"}
    found = json.loads((tmp_path / "descendant_tiny.json").read_text())
    assert found["complete"]
    assert found["lineage"]["verdict"] == "descends"
    assert found["lineage"]["found again"]["hidden"] == "84 of 84"
    assert {row["method"]: len(row["after"]["task"]) for row in found["rows"]} == dict.fromkeys(
        ["transplant", "re-pruned teacher", "plain LoRA", "noise of the same size", "neutral"], 2
    )
    assert len(found["comparisons"]) == 8
    by = {row["method"]: row["before"]["task"] for row in found["rows"]}
    assert by["neutral"] == pytest.approx(by["plain LoRA"], abs=0.05)


def test_a_real_pair_without_rows_is_not_run(tmp_path: Path) -> None:
    status, output, _ = slot(ROOT, tmp_path, STEPS="descendant", DEVICE="cuda", GSM8K="", PYTHON="true")
    assert status == 0, output
    assert said(tmp_path) == {"descendant": "not run: GSM8K does not name a file of rows"}


@pytest.mark.slow
def test_the_comparison_of_shared_out_ranks_runs_on_a_few_rows(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "bench" / "bench_ranks.py"), "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "ranks_tiny.json").read_text())
    uniform, *others = found["rows"]
    assert [row["way"] for row in found["rows"]] == ["uniform", "energy", "sensitivity"]
    assert {uniform["ranks"]["least"], uniform["ranks"]["most"]} == {32}
    for row in others:
        assert 0.99 * uniform["parameters"] <= row["parameters"] <= uniform["parameters"]
    assert others[0]["energy"] > uniform["energy"]
