"""How far a study is while it runs: jobs done, jobs in all if no grid grows further, and about how long the rest takes."""

from __future__ import annotations

import time

from pkt.studying.estimating import Sizes, Work, rate_here, works
from pkt.studying.layout import UNTRAINED, Job, Layout
from pkt.studying.store import Store

JOBS = ("start", "tune", "train")  # tests are made with what they test
DOUBT = 0.05  # of what is to be made: by so much work at the estimate's pace the first jobs are held back


class Pace:
    """Counts jobs as they end. The rest is given by the plan's estimate, at the pace that jobs of a kind had until now."""

    def __init__(self, layout: Layout, store: Store) -> None:
        self.layout, self.store = layout, store
        self.sizes = Sizes(layout)
        self.rate, _ = rate_here(layout, self.sizes)
        self.done, self.ended, self.last = 0, set[str](), time.monotonic()
        self.took: dict[str, float] = {}  # by kind of cell, and what was estimated of it
        self.given: dict[str, float] = {}
        self.untrained = sum(job.kind == UNTRAINED for job in layout.jobs(store))
        self.left: dict[str, Work] = {}
        self._look()
        self.doubt = DOUBT * sum(work.seconds(self.rate) for work in self.left.values())

    def _look(self) -> None:
        """What is left as things stand: trainings are known once rates are chosen, and a grid may have grown."""
        found = {work.key: work for work in works(self.layout, self.store, self.sizes, known=True)}
        there = {key for key, work in found.items() if work.cell is not None and self.store.has(work.cell)}
        self.left = {key: work for key, work in found.items() if key not in there | self.ended}

    @property
    def jobs(self) -> int:
        """That are left."""
        return self.untrained + sum(work.kind in JOBS for work in self.left.values())

    def ahead(self) -> str:
        """What there is to do."""
        return f"{self.jobs} jobs, about {spoken(self.seconds())}" if self.jobs else "nothing is missing"

    def told(self, job: Job) -> str:
        """Of a job that just ended: which it is, of how many, and what is left."""
        keys = {cell.key for cell in job.cells}
        if keys - self.left.keys():
            self._look()
        now = time.monotonic()
        self.took[job.kind] = self.took.get(job.kind, 0.0) + now - self.last
        made = sum(self.left.pop(key).seconds(self.rate) for key in keys & self.left.keys())
        self.given[job.kind] = self.given.get(job.kind, 0.0) + made
        self.last, self.done, self.ended = now, self.done + 1, self.ended | keys
        self.untrained -= job.kind == UNTRAINED
        return f"job {self.done} of {self.done + self.jobs}, about {spoken(self.seconds())} left"

    def seconds(self) -> float:
        """Of all that is left."""
        overall = self._pace(sum(self.took.values()), sum(self.given.values()))
        found = 0.0
        for work in self.left.values():
            kind = "train" if work.kind == "test" else work.kind
            pace = self._pace(self.took[kind], self.given[kind]) if kind in self.took else overall
            found += work.seconds(self.rate) * pace
        return found

    def _pace(self, took: float, given: float) -> float:
        return (took + self.doubt) / (given + self.doubt) if given + self.doubt else 1.0


def spoken(seconds: float) -> str:
    """A time, as roughly as it is known."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
