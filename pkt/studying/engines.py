"""What runs a study's jobs: one after another in this process, or Ray, on one machine of many GPUs or a cluster."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pkt.extras import needs
from pkt.studying.layout import Job, Layout
from pkt.studying.schema import Transfer
from pkt.studying.store import Store
from pkt.studying.work import failure, run_job, scan

Engine = Literal["auto", "serial", "ray"]
Told = Callable[[Job, str | None], None]  # a job that ended, and what it failed of


def run_study(
    layout: Layout, store: Store, engine: Callable[[Layout, Store, list[list[Job]], Told], None], told: Told
) -> bool:
    """Run all jobs until nothing more can be made; whether everything was. A job that failed is not tried again here."""
    failed: set[str] = set()

    def note(job: Job, error: str | None) -> None:
        if error is not None:
            failed.update(cell.key for cell in job.cells)
            store.fail(job.cells[-1], error)
        told(job, error)

    while True:
        jobs = [job for job in layout.jobs(store) if not failed.intersection(c.key for c in job.cells)]
        if not jobs:
            return not failed
        engine(layout, store, together(layout, jobs), note)


def together(layout: Layout, jobs: Iterable[Job]) -> list[list[Job]]:
    """Jobs as what one process runs: the transfers of one teacher share a reading of it."""
    groups: dict[Any, list[Job]] = {}
    for job in jobs:
        start = layout.starts.get(job.start)
        shared = isinstance(start, Transfer) and job.kind == "start"
        key = (start.teacher, start.map_vocabulary) if shared else id(job)  # type: ignore[union-attr]
        groups.setdefault(key, []).append(job)
    return list(groups.values())


def run_group(layout: Layout, jobs: list[Job], store: Store) -> None:
    if len(jobs) > 1:
        scan(layout, jobs, store)
    else:
        run_job(layout, jobs[0], store)


def serial(layout: Layout, store: Store, groups: list[list[Job]], told: Told) -> None:
    """One after another, here."""
    for group in groups:
        try:
            run_group(layout, group, store)
            error = None
        except Exception as fault:
            error = failure(fault)
        for job in group:
            told(job, error)


@dataclass(frozen=True)
class Cluster:
    """Ray's: address of a cluster, or none for this machine; CPUs and GPUs (a share of one, too) that a job takes."""

    address: str | None = None
    cpus: int = 1
    gpus: float = 0.0

    @contextlib.contextmanager
    def started(self) -> Iterator[None]:
        """Inside, Ray is there; one that ran before goes on."""
        needs("ray", "ray", "run a study on several GPUs or machines")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        if ray.is_initialized():
            yield
            return
        threads = {"OMP_NUM_THREADS": str(self.cpus)}
        ray.init(
            address=self.address, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
            runtime_env={"env_vars": threads},
        )  # fmt: skip
        try:
            yield
        finally:
            ray.shutdown()

    def __call__(self, layout: Layout, store: Store, groups: list[list[Job]], told: Told) -> None:
        import ray

        # In the decorator: only so has each job a process of its own, and leaves no memory of a GPU behind.
        remote = ray.remote(num_gpus=self.gpus, num_cpus=self.cpus, max_calls=1, max_retries=0)(_far)
        flying = {remote.remote(layout.study, group, str(store.folder)): group for group in groups}
        while flying:
            for ref in ray.wait(list(flying), num_returns=1)[0]:
                group = flying.pop(ref)
                try:
                    error = ray.get(ref)
                except ray.exceptions.RayError as fault:
                    error = f"its worker ended: {str(fault).splitlines()[0]}"
                for job in group:
                    told(job, error)


def _far(study: Any, jobs: list[Job], folder: str) -> str | None:
    """A group of jobs in a process of its own; what it failed of."""
    from pathlib import Path

    try:
        run_group(Layout(study), jobs, Store(Path(folder)))
    except Exception as fault:
        return failure(fault)
    return None
