"""What pkt needs for some commands only: one clear error where it is missing, before anything is made."""

from __future__ import annotations

import sys
from pathlib import Path

import processes
import pytest
from conftest import ASSETS

import pkt
from pkt.demo import run_demo
from pkt.reporting import new_figure, page, write_report


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_pictures_and_pages_name_what_they_need(
    package: str, extraction_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as an import that finds nothing
    for make in (
        lambda: new_figure(1, 1, 1),
        lambda: page("title", []),
        lambda: write_report(extraction_dir, tmp_path / "report.html"),
        lambda: run_demo(tmp_path / "demo"),
    ):
        with pytest.raises(pkt.PktError, match=rf"{package} is needed to .*pip install 'pkt-transfer\[report\]'"):
            make()
    assert list(tmp_path.iterdir()) == []


def test_training_names_what_it_needs(
    student_dir: Path, extraction_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pkt.training import train

    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(pkt.PktError, match=r"tensorboard is needed .*pip install 'pkt-transfer\[train\]'"):
        train(student_dir, extraction_dir, ASSETS / "data" / "train.jsonl", tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


REST = """
import sys
for package in ("matplotlib", "jinja2", "tensorboard"):
    sys.modules[package] = None
import pkt
from pkt.reporting import environment, inspect_folder
assert environment()["versions"]["pkt"] == pkt.__version__
assert inspect_folder(sys.argv[2])["is"].startswith("an extraction")
assert pkt.inject(sys.argv[1], sys.argv[2]).peft_config
"""


def test_everything_else_does_without(student_dir: Path, extraction_dir: Path) -> None:
    done = processes.run([sys.executable, "-c", REST, student_dir, extraction_dir])
    assert done.returncode == 0, done.stderr
