"""A study on Ray: what it makes is what one process makes; a worker that dies costs its own job."""

from __future__ import annotations

import importlib.util
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
from test_study import SMALL, open_study_folder, products

from pkt.studying import Cluster, Job, Layout, Store, open_study, study
from pkt.studying.engines import run_study

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray")
    source = open_study_folder() / "general.jsonl"
    text = "".join(source.read_text(encoding="utf-8").splitlines(keepends=True)[:4])
    (folder / "general.jsonl").write_text(text, encoding="utf-8")
    study_text = SMALL.replace("demo:data/general.jsonl", str(folder / "general.jsonl"))
    for old, new in (("lr: [1e-3, 4e-3]", "lr: [1e-3]"), ("extend: 1", "extend: 0"), ("seeds: 3", "seeds: 2")):
        assert old in study_text
        study_text = study_text.replace(old, new)
    (folder / "small.yaml").write_text(study_text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module", autouse=True)
def ray(small: Path) -> Any:
    import ray

    # Two GPUs that are only pretended: what is tested is who gets which.
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    ray.init(
        num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}},
    )  # fmt: skip
    yield ray
    ray.shutdown()


def test_what_ray_makes_is_what_one_process_makes(small: Path) -> None:
    found = study(small / "small.yaml", small / "far", engine="ray", cluster=Cluster(cpus=1))
    assert not found["failures"]
    study(small / "small.yaml", small / "near")
    far, near = products(small / "far"), products(small / "near")
    assert far["results"] == near["results"]
    assert far["stats"] == near["stats"]
    assert far["cells"] == near["cells"]


def test_a_worker_that_dies_costs_its_job(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first group of jobs ends its process; every other job is done, and the next run does the rest."""
    from pkt.studying import engines

    layout, store = Layout(open_study(small / "small.yaml")), Store(small / "killed")
    victim: list[str] = []

    def far(given: Any, jobs: list[Job], folder: str) -> str | None:
        if "pissa" in str(jobs[0]) and jobs[0].kind == "start":
            os._exit(9)
        return engines._far(given, jobs, folder)

    told: list[tuple[str, str | None]] = []
    real = engines._far
    monkeypatch.setattr(engines, "_far", far)
    whole = run_study(layout, store, Cluster(cpus=1), lambda job, error: told.append((str(job), error)))
    assert not whole
    failed = {job: error for job, error in told if error is not None}
    assert list(failed) == ["start sums pissa"]
    assert "its worker ended" in str(failed["start sums pissa"])
    assert any(job.startswith("tune sums lora") for job, error in told if error is None)
    monkeypatch.setattr(engines, "_far", real)
    assert run_study(layout, store, Cluster(cpus=1), lambda job, error: victim.append(str(job)))
    assert "start sums pissa" in victim


def test_each_job_has_a_gpu_of_its_own(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pkt.studying import engines

    seen = small / "seen"
    seen.mkdir()

    def far(given: Any, jobs: list[Job], folder: str) -> str | None:
        import time
        import uuid

        begin = time.time()
        time.sleep(1)
        line = f"{os.environ['CUDA_VISIBLE_DEVICES']} {os.getpid()} {begin} {time.time()}"
        (Path(folder) / uuid.uuid4().hex).write_text(line)
        return "only looked at"

    monkeypatch.setattr(engines, "_far", far)
    groups = [[Job("tune", (), start=str(i))] for i in range(6)]
    layout = Layout(open_study(small / "small.yaml"))
    Cluster(cpus=1, gpus=1)(layout, Store(seen), groups, lambda job, error: None)
    lines = [file.read_text().split() for file in seen.iterdir()]
    assert len(lines) == 6
    assert {gpu for gpu, *_ in lines} == {"0", "1"}
    assert len({pid for _, pid, *_ in lines}) == 6
    for gpu in "01":
        times = sorted((float(begin), float(end)) for g, _, begin, end in lines if g == gpu)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(times))
