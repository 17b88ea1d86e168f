"""A study on two Ray nodes, both on this machine: both work, and one that is lost costs the jobs it had."""

from __future__ import annotations

import importlib.util
import os
import time
from pathlib import Path
from typing import Any

import pytest
from test_study import SMALL, open_study_folder

from pkt.studying import Cluster, Job, Layout, Store, engines, open_study

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
]


@pytest.fixture
def nodes() -> Any:
    import ray
    from ray.cluster_utils import Cluster as Nodes

    paths = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    found = Nodes(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    found.second = found.add_node(num_cpus=1)
    ray.init(
        address=found.address, log_to_driver=False, logging_level="ERROR",
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}},
    )  # fmt: skip
    yield found
    ray.shutdown()
    found.shutdown()


def test_two_nodes_share_the_jobs_and_one_that_is_lost_costs_its_own(
    nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_study_folder() / "general.jsonl"
    (tmp_path / "small.yaml").write_text(SMALL.replace("demo:data/general.jsonl", str(source)), encoding="utf-8")
    seen = tmp_path / "seen"
    seen.mkdir()

    def far(given: Any, jobs: list[Job], folder: str) -> str | None:
        import ray

        node = ray.get_runtime_context().get_node_id()
        (Path(folder) / str(jobs[0].start)).write_text(node)
        while node == lost:
            time.sleep(0.2)
        return None

    lost = nodes.second.node_id
    monkeypatch.setattr(engines, "_far", far)
    told: dict[str, str | None] = {}

    def note(job: Job, error: str | None) -> None:
        told[job.start] = error
        # The other node has done all the rest; this one is at a job that does not end.
        if len(told) == 5:
            nodes.remove_node(nodes.second)

    groups = [[Job("tune", (), start=str(i))] for i in range(6)]
    layout = Layout(open_study(tmp_path / "small.yaml"))
    Cluster(cpus=1)(layout, Store(seen), groups, note)
    ran = {file.name: file.read_text() for file in seen.iterdir()}
    assert len(set(ran.values())) == 2
    failed = {name: error for name, error in told.items() if error is not None}
    assert len(failed) == 1
    (name,) = failed
    assert ran[name] == lost
    assert "its worker ended" in str(failed[name])
