"""pkt.json: kinds and formats, and what two identities differ in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import pkt
from pkt.files import MANIFEST
from pkt.manifest import KINDS, difference, manifest_of, name_kind, read_manifest, versions


def written(folder: Path, value: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / MANIFEST).write_text(json.dumps(value))
    return folder


def test_a_difference_names_both_values_where_they_say_something() -> None:
    then = {"option rank": 8, "seeds": "a" * 64, "roles": [1, 2], "same": {"x": [1]}, "gone": None}
    now = {"option rank": 16, "seeds": "b" * 64, "roles": (1, 3), "same": {"x": (1,)}, "dtype": "bf16"}
    assert difference(then, now) == [
        "dtype: None there, bf16 here",
        "rank: 8 there, 16 here",
        "roles changed",
        "seeds changed",
    ]
    assert difference(now, now) == []


def test_a_training_run_of_an_older_pkt_is_read(tmp_path: Path) -> None:
    """Its format's name was also that of an unfinished transfer; what it says is unchanged."""
    run = manifest_of("run", {"mode": "paired", "student": "s", "settings": {}})
    assert run["format"] == "pkt-training-1"
    assert read_manifest(written(tmp_path / "new", run)) == run
    old = {**run, "format": "pkt-run-1"}
    assert read_manifest(written(tmp_path / "old", old)) == old
    formats = [f for kind in KINDS.values() for f in {kind.format}]
    assert "pkt-run-1" not in formats


@pytest.mark.parametrize("kind", KINDS)
def test_a_format_of_another_version_is_refused(kind: str, tmp_path: Path) -> None:
    found = {**manifest_of(kind, {name: form() for name, form in KINDS[kind].entries.items()}), "format": "pkt-x-9"}
    with pytest.raises(pkt.PktError, match="'pkt-x-9', which this pkt"):
        read_manifest(written(tmp_path / "x", found))
    assert name_kind(found) == KINDS[kind].words


def test_versions_come_from_the_packages_themselves() -> None:
    import torch

    assert versions()["torch"] == torch.__version__
    assert versions()["pkt"] == pkt.__version__
