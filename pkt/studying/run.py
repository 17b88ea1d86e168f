"""`pkt study`: from the file to the results, whatever was there before."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pkt.errors import PktError
from pkt.extras import is_there
from pkt.files import MANIFEST, lock_folder, os_errors, write_json
from pkt.manifest import manifest_of
from pkt.studying.engines import Cluster, Engine, run_study, serial
from pkt.studying.layout import Job, Layout
from pkt.studying.page import write_page
from pkt.studying.results import write_results
from pkt.studying.schema import Study, read_study
from pkt.studying.store import Store, check_place

PRESETS = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    return sorted(file.stem for file in PRESETS.glob("*.yaml"))


def open_study(named: str | Path, given: Mapping[str, Any] | None = None, *, planned: bool = False) -> Study:
    """The study in a file, or pkt's own of this name. given: what fills a preset's places.

    planned: it is only to be planned, so that places and files may be missing.
    """
    preset = PRESETS / f"{named}.yaml"
    if str(named) in preset_names():
        return read_study(preset, given, f"preset {named}", planned=planned)
    file = Path(named)
    if not file.is_file():
        raise PktError(f"{named} is no file and no preset; presets are {', '.join(preset_names())}")
    return read_study(file, given, planned=planned)


def study(
    named: str | Path,
    out: str | Path,
    *,
    given: Mapping[str, Any] | None = None,
    engine: Engine = "auto",
    cluster: Cluster = Cluster(),  # noqa: B008  # frozen
    told: Callable[[Job, str | None], None] = lambda job, error: None,
    only: Sequence[str] = (),
    only_report: bool = False,
) -> dict[str, Any]:
    """Run what is missing of a study into `out`, and write its results; returns stats.json.

    named: a YAML file or a preset's name. The folder may hold a part of it: finished cells are never made again. told: called
    as each job ends, with what it failed of. only: patterns of tasks, starts or task/start, of which alone cells are made.
    Raises `PktError` for a study that cannot be read, before anything runs.
    """
    return run_layout(
        Layout(open_study(named, given), only), out, engine=engine, cluster=cluster, told=told, only_report=only_report
    )


def run_layout(
    layout: Layout,
    out: str | Path,
    *,
    engine: Engine = "auto",
    cluster: Cluster = Cluster(),  # noqa: B008  # frozen
    told: Callable[[Job, str | None], None] = lambda job, error: None,
    only_report: bool = False,
) -> dict[str, Any]:
    """`study`, of one that was read."""
    out = Path(out)
    _claim(out)
    store = Store(out)
    with lock_folder(out / "lock", out):
        whole = True
        if not only_report:
            layout.check()
            shutil.rmtree(out / "failed", ignore_errors=True)
            with cluster.started() if engine == "ray" else contextlib.nullcontext():
                whole = run_study(layout, store, cluster if engine == "ray" else serial, told)
            # What was not asked for (`only`) is left.
            whole = whole and next(layout.jobs(store, all_of_it=True), None) is None
        found = write_results(layout, store, out)
        if is_there("matplotlib", "jinja2"):
            write_page(found, out)
        with os_errors(f"writing {out}"):
            write_json(out / MANIFEST, manifest_of("study", {"study": layout.study.study, "finished": whole}))
    return found


def _claim(out: Path) -> None:
    """Raises `PktError` for a folder that holds something else."""
    check_place(out)
    if (out / MANIFEST).is_file():
        return
    with os_errors(f"writing {out}"):
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / MANIFEST, manifest_of("study", {"finished": False}))
