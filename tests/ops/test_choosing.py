"""Which kernel serves the sensitivity on a GPU, with stand-ins on the CPU for the device, the kernels and their trials."""

from __future__ import annotations

import json
import multiprocessing
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import commands
import pytest
import stand_in_kernels
import torch
from stand_in_kernels import SHAPES, install

import pkt
from pkt.ops import candidates, choosing, trials
from pkt.ops.candidates import Kind

CPU = torch.device("cpu")
KIND = Kind(0, torch.bfloat16, 1, True)
LARGE, SMALL = SHAPES


SCRIPTED = Path(__file__).with_name("scripted_trials.py")
FASTER = {"faster": {"ms": {LARGE: 1.0}, "standard_ms": {LARGE: 2.0}}}


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Sets the stage: stage("faster", ...) makes those the candidates; returns what was started and what is kept."""
    return lambda *names, **options: set_stage(monkeypatch, tmp_path, *names, **options)


def set_stage(monkeypatch: Any, folder: Path, *names: str, driver: str = "580.1", script: Path = SCRIPTED) -> Any:
    log = folder / "log"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.delenv("PKT_KERNEL", raising=False)
    monkeypatch.setattr(candidates, "MODULES", install(*names))
    monkeypatch.setattr(
        choosing, "COMMAND", (sys.executable, *(["-S"] if script == SCRIPTED else []), str(script), str(log))
    )
    monkeypatch.setattr(choosing, "facts", lambda device: {"device": "H200", "driver": driver})
    monkeypatch.setattr(choosing, "_found", {})
    return SimpleNamespace(
        starts=lambda: log.read_text().splitlines() if log.exists() else [],
        kept=lambda: [json.loads(file.read_text()) for file in (folder / "cache").rglob("*.json")],
    )


def test_the_fastest_of_those_that_are_right_is_chosen_and_kept(stage: Callable[..., Any], monkeypatch: Any) -> None:
    seen = stage("slow", "same", "faster", "fastest", "differs")
    assert choosing.chosen(KIND, LARGE, CPU) == "fastest"
    assert choosing.chosen(KIND, "large, short", CPU) == "triton"  # never timed
    assert seen.starts() == ["slow same faster fastest differs"]
    (kept,) = seen.kept()
    assert set(kept) == {"scores, bfloat16, |θ·g|"}
    # Another process reads it.
    monkeypatch.setattr(choosing, "_found", {})
    assert choosing.chosen(KIND, LARGE, CPU) == "fastest"
    assert len(seen.starts()) == 1
    assert {(row.kernel, row.of_standard, row.said) for row in choosing.table(CPU)} == {
        ("slow", "1.50", "not used: fastest is faster"),
        ("same", "0.99", "not used: fastest is faster"),
        ("faster", "0.70", "not used: fastest is faster"),
        ("fastest", "0.50", "used"),
        ("differs", "", "never used: it differs"),
    }


def test_what_is_not_faster_is_never_used(stage: Callable[..., Any]) -> None:
    stage("slow", "same", "differs")
    assert choosing.chosen(KIND, LARGE, CPU) == "triton"
    assert {row.said for row in choosing.table(CPU)} == {"not used: triton is faster", "never used: it differs"}


def test_the_trials_themselves(stage: Callable[..., Any], monkeypatch: Any) -> None:
    """In their own process, with kernels that take their time; the machine may be busy."""
    stage("faster", "slow", "differs", "fails", script=Path(stand_in_kernels.__file__))
    monkeypatch.setattr(choosing, "CANDIDATE_LIMIT", 60.0)
    found = choosing.found(KIND, CPU, limit=240.0)
    assert choosing.chosen(KIND, LARGE, CPU) == choosing.chosen(KIND, SMALL, CPU) == "faster"
    assert found["slow"]["ms"][LARGE] > found["slow"]["standard_ms"][LARGE]
    assert found["differs"]["refused"].startswith("it differs by 1.")
    assert found["fails"] == {"refused": "RuntimeError: PassManager::run failed"}
    stage("no memory")
    _, said = trials.trials(["no memory"], KIND, CPU, {})
    assert said["later"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 1 GiB"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("differs", r"it differs by 1\.\de-03 at 130x72"),
        ("nan", "it differs by nan at 130x72"),
        ("wanders", "it gave two results for the same input at 130x72"),
        ("outside", "it writes outside its scores at 130x72"),
        ("no form", "it has no form for any of the cases"),
        ("fails", "RuntimeError: PassManager::run failed"),
    ],
)
def test_what_a_trial_refuses(name: str, reason: str, stage: Callable[..., Any]) -> None:
    stage(name, "faster")
    begins, said, *rest = trials.trials([name, "faster"], KIND, CPU, {})
    assert begins == {"begins": name}
    assert re.fullmatch(reason, said["refused"])
    # An error may leave the device unusable, so that nobody else is tried beside it.
    assert rest == ([] if name == "fails" else [{"begins": "faster"}, {"name": "faster", "ms": {}, "standard_ms": {}}])


def test_one_that_hangs_or_faults_is_refused_and_the_next_has_its_turn(
    stage: Callable[..., Any], monkeypatch: Any
) -> None:
    seen = stage("hangs", "dies", "faster")
    monkeypatch.setattr(choosing, "CANDIDATE_LIMIT", 0.5)
    assert choosing.chosen(KIND, LARGE, CPU) == "faster"
    assert seen.starts() == ["hangs dies faster", "dies faster", "faster"]
    said = {row.kernel: row.said for row in choosing.table(CPU)}
    assert said["hangs"] in ("never used: it did not end within 0 s", "never used: it did not end within 1 s")
    assert said["dies"] == "never used: its process ended with status 11 (a kernel faulted)"
    assert choosing._ended(-11, "Fatal Python error: Segmentation fault\n\n  File x.py\n").endswith(
        "by signal 11 (Fatal Python error: Segmentation fault)"
    )


def test_the_whole_check_ends_in_time(stage: Callable[..., Any]) -> None:
    stage("faster", "hangs", "slow")
    begin = time.monotonic()
    found = choosing.found(KIND, CPU, limit=1.0)
    assert time.monotonic() - begin < 5
    assert found["slow"] == {"refused": "its turn did not come within 1 s"}
    assert choosing.chosen(KIND, LARGE, CPU) in ("faster", "triton")  # on a busy machine nobody may have had a turn
    assert choosing.LIMIT < 20


def test_a_reason_of_the_moment_is_not_kept(stage: Callable[..., Any], monkeypatch: Any) -> None:
    seen = stage("no memory")
    assert choosing.chosen(KIND, LARGE, CPU) == choosing.chosen(KIND, LARGE, CPU) == "triton"
    assert len(seen.starts()) == 1
    assert seen.kept() == [{str(KIND): {}}]
    monkeypatch.setattr(choosing, "COMMAND", (sys.executable, "-S", "-c", "raise SystemExit('no GPU for you')"))
    assert choosing.found(KIND, CPU) == {"no memory": {"later": "the trials could not begin"}}
    monkeypatch.setattr(choosing, "COMMAND", ("/no/such/python",))
    assert choosing.found(KIND, CPU) == {"no memory": {"later": "the trials could not begin"}}


@pytest.mark.parametrize("text", ["import triton_of_another_time", "import triton; triton.moved.away"])
def test_a_candidate_that_does_not_import_is_told_and_left(
    text: str, stage: Callable[..., Any], monkeypatch: Any, tmp_path: Path
) -> None:
    seen = stage()
    (tmp_path / "moved_kernel.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(candidates.MODULES, "moved", "moved_kernel")
    assert choosing.chosen(KIND, LARGE, CPU) == "triton"
    assert seen.starts() == []
    assert choosing.table(CPU)[0].said.startswith("not used: it does not import (")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "\x00",
        json.dumps({str(KIND): 3}),
        json.dumps({str(KIND): {"faster": None}}),
        json.dumps({str(KIND): {"faster": {"ms": {LARGE: "0.1"}, "standard_ms": {LARGE: 1.0}}}}),
        json.dumps({str(KIND): {"faster": {"ms": {LARGE: -1.0}, "standard_ms": {LARGE: 1.0}}}}),
        json.dumps({str(KIND): {"faster": {"ms": [1.0]}}}),
    ],
)
def test_a_damaged_cache_is_tried_anew(content: str, stage: Callable[..., Any], monkeypatch: Any) -> None:
    seen = stage("faster")
    file = choosing.cache_file(CPU)
    assert file is not None
    file.parent.mkdir(parents=True)
    file.write_text(content)
    monkeypatch.setattr(choosing, "_try", lambda *_: FASTER)
    assert choosing.table(CPU)[0].said.startswith("not tried yet")
    assert choosing.chosen(KIND, LARGE, CPU) == "faster"
    assert seen.kept() == [{str(KIND): FASTER}]


def test_another_driver_is_tried_anew_and_the_old_choice_stays(stage: Callable[..., Any], monkeypatch: Any) -> None:
    for driver, starts in (("580.1", 1), ("580.2", 2), ("580.1", 2)):
        seen = stage("faster", driver=driver)
        assert choosing.chosen(KIND, LARGE, CPU) == "faster"
        assert len(seen.starts()) == starts
    assert len(seen.kept()) == 2


def test_what_a_choice_depends_on(monkeypatch: Any) -> None:
    pytest.importorskip("triton")
    made = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: made)
    choosing.facts.cache_clear()
    assert choosing.facts(CPU) == {
        "device": "NVIDIA H200",
        "capability": "9.0",
        "multiprocessors": "132",
        "driver": choosing.facts(CPU)["driver"],
        "torch": torch.__version__,
        "triton": sys.modules["triton"].__version__,
        "kernels": choosing.source_hash(),
    }
    choosing.facts.cache_clear()


@pytest.mark.parametrize("home", ["unwritable", "relative", "a file"])
def test_it_works_where_nothing_can_be_kept(
    home: str, stage: Callable[..., Any], monkeypatch: Any, tmp_path: Path
) -> None:
    stage("faster")
    where = {"unwritable": "/proc/nowhere", "relative": "cache", "a file": str(tmp_path / "file")}[home]
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", where)
    monkeypatch.setattr(choosing, "_try", lambda *_: FASTER)
    assert choosing.chosen(KIND, LARGE, CPU) == "faster"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def use(folder: Path, results: Any) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_stage(monkeypatch, folder, "faster")
        results.put(choosing.chosen(KIND, LARGE, CPU))


def test_of_two_processes_at_once_one_tries(tmp_path: Path, stage: Callable[..., Any]) -> None:
    seen = stage("faster")
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    processes = [context.Process(target=use, args=(tmp_path, results)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [results.get() for _ in processes] == ["faster"] * 2
    for process in processes:
        process.join()
    assert len(seen.starts()) == 1


def test_nothing_is_tried_where_nobody_can_run(stage: Callable[..., Any]) -> None:
    seen = stage("elsewhere")
    assert choosing.chosen(KIND, LARGE, CPU) == "triton"
    assert seen.starts() == seen.kept() == []
    assert [row.said for row in choosing.table(CPU)] == ["not used: its compute capability is 8.0, not 9.0"]
    for kind in (Kind(64, torch.bfloat16, 1, True), KIND):
        stage("faster")
        assert (choosing.chosen(kind, LARGE, CPU) == "triton") == (kind.tile == 64)


def given(n: int = 5, m: int = 7) -> list[torch.Tensor]:
    torch.manual_seed(0)
    lens = torch.tensor([4, 6])
    return [torch.zeros(n, m), torch.randn(n, m), torch.randn(10, m), torch.randn(10, n), lens.cumsum(0) - lens, lens]


def test_a_kernel_is_forced_by_name(stage: Callable[..., Any], monkeypatch: Any) -> None:
    stage("faster", "fails", "no form", "elsewhere")
    pytest.importorskip("triton")
    monkeypatch.setenv("PKT_KERNEL", "fails")
    with pytest.raises(RuntimeError, match="PassManager"):
        choosing.launch(KIND, *given())
    for name in ("faster", "no form", "triton"):
        monkeypatch.setenv("PKT_KERNEL", name)
        acc, *rest = given()
        choosing.launch(KIND, acc, *rest)
        assert acc.any()
    monkeypatch.setenv("PKT_KERNEL", "elsewhere")
    with pytest.raises(pkt.PktError, match="'elsewhere', which does not run on this GPU: its compute capability"):
        choosing.launch(KIND, *given())
    monkeypatch.setenv("PKT_KERNEL", "fastest")
    message = "PKT_KERNEL is 'fastest'; it must be one of triton, faster, fails, no form, elsewhere"
    with pytest.raises(pkt.PktError, match=message):
        choosing.launch(KIND, *given())
    assert commands.fails("env") == message


def test_on_a_cpu_nothing_of_it_happens(stage: Callable[..., Any], monkeypatch: Any) -> None:
    seen = stage("faster")
    monkeypatch.setattr(choosing, "launch", None)
    monkeypatch.setenv("PKT_KERNEL", "nobody")
    acc, *rest = given()
    pkt.ops.linear_sensitivity_(acc, *rest)
    assert acc.any()
    assert seen.starts() == seen.kept() == []
    monkeypatch.delenv("PKT_KERNEL")
    assert "nothing to choose" in commands.run("env", "--tune")
    assert json.loads(commands.run("env", "--json"))["kernels"] == []


def test_env_says_what_was_chosen_and_tunes_on_demand(stage: Callable[..., Any], monkeypatch: Any) -> None:
    stage("faster", "differs")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    monkeypatch.setattr(pkt.ops, "implementation", lambda op, device: ("Triton", "a stand-in"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    tried = FASTER | {"differs": {"refused": "it differs by 3.0e-02"}}
    monkeypatch.setattr(choosing, "_try", lambda names, *_: {name: tried[name] for name in names})
    assert "not tried yet" in commands.run("env")
    text = commands.run("env", "--tune")
    assert "never used: it differs by 3.0e-02" in text
    assert "0.50" in text
    rows = json.loads(commands.run("env", "--json"))["kernels"]
    assert {(row["kernel"], row["said"]) for row in rows} == {
        ("faster", "used"),
        ("differs", "never used: it differs by 3.0e-02"),
    }


def test_classes_of_shapes() -> None:
    assert set(trials.SHAPES) == {
        trials.shape_class(n, m, samples * tokens, samples) for n, m, samples, tokens in trials.SHAPES.values()
    }
    assert trials.shape_class(4096, 4096, 0, 0) == "large, long"
    assert trials.shape_class(11008, 4096, 4096, 32) == "huge, short"
