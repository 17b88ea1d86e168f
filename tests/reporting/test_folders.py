"""`pkt inspect` tells every folder by its JSON and headers, without torch, and the same as loading it would."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from commands import fails, run

import pkt
from pkt.adapters import CONFIG, WEIGHTS, Pair, read_adapter
from pkt.extraction import Start
from pkt.manifest import manifest_of

OLD = Path(__file__).parents[1] / "data" / "old"
WITHOUT_TORCH = """
import sys
from pkt.cli.commands import app
for folder in sys.argv[1:]:
    app(["inspect", folder, "--json"], standalone_mode=False)
app(["models"], standalone_mode=False)
assert "torch" not in sys.modules
"""


def pair(rows: int, cols: int, rank: int, *, kind: Any = "linear", zero: bool = False) -> Pair:
    b = torch.zeros(rows, rank) if zero else torch.randn(rows, rank)
    return Pair(torch.randn(rank, cols), b, kind)


def experts(count: int, rows: int, cols: int, rank: int) -> Pair:
    return Pair(torch.randn(count, rank, cols), torch.randn(count, rows, rank), "linear")


def start(folder: Path, pairs: dict[str, Pair], kind: str = "start", **student: Any) -> Path:
    made = Start(kind, pairs, {"name": "student", **student}, "add", dict.fromkeys(pairs, 0.5))
    made.save(folder)
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """One of every kind."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    tables = {"model.embed_tokens": pair(6, 20, 2, kind="embedding"), "model.layers.0.mlp.up_proj": pair(5, 6, 3)}
    start(tmp_path / "start", tables, tied_head="lm_head")
    start(tmp_path / "transplant", {"a.q_proj": pair(4, 6, 2, zero=True)}, "transplant")
    mixed = {f"l.0.mlp.experts.{n}": experts(3, 4, 6, 2) for n in ("gate_up_proj", "down_proj")}
    start(tmp_path / "experts", {**mixed, "l.0.q_proj": pair(4, 6, 5)})
    shutil.copytree(tmp_path / "extraction", tmp_path / "adapter")
    manifest = manifest_of("adapter", {"mode": "paired", "base": "student"})
    (tmp_path / "adapter" / "pkt.json").write_text(json.dumps(manifest))
    for name in ("one", "two"):
        shutil.copytree(tmp_path / "extraction", tmp_path / "tasks" / name)
    inputs = {"teacher": {"name": "teacher", "num_layers": 2}, "option rank": 3, "seeds": [1]}
    for name, value in {"scores": inputs, "cutting": {"kind": "transplant", "option rank": 3}}.items():
        (tmp_path / f".{name}.run").mkdir()
        (tmp_path / f".{name}.run" / "run.json").write_text(json.dumps({"format": "pkt-run-2", "inputs": value}))
    return {name: tmp_path / name for name in EXPECTED}


EXPECTED = {
    "extraction": "an extraction: the start of a student's LoRA, not yet trained",
    "transplant": "a transplant: what a teacher learnt, cut to this student, as an ordinary LoRA that is kept",
    "start": "a start: a start of the student's own, as an ordinary LoRA that is kept",
    "experts": "a start: a start of the student's own, as an ordinary LoRA that is kept",
    "run": "a training run (paired, unfinished)",
    "run/checkpoint-2": "a trained adapter, injected by pkt as paired (known from",
    "residual": "a training run (residual, finished)",
    "adapter": "a plain LoRA finalized by pkt (it was injected as paired)",
    "unfinished": "an unfinished transfer: 1 of 4 parts are finished",
    "scores": "an unfinished scoring: 0 of 4 parts are finished",
    "cutting": "an unfinished transplant: 0 layers are cut",
    "tasks": "results of several tasks: one, two",
}


def test_every_folder_is_told_without_torch(folders: dict[str, Path]) -> None:
    done = processes.run([sys.executable, "-c", WITHOUT_TORCH, *folders.values()])
    assert done.returncode == 0, done.stderr
    told = dict(zip(EXPECTED, map(json.loads, done.stdout.splitlines()[: len(EXPECTED)]), strict=True))
    for name, words in EXPECTED.items():
        assert told[name]["is"].startswith(words), told[name]
        if (folders[name] / CONFIG).is_file():
            pairs = read_adapter(folders[name])[0].pairs
            assert told[name]["modules"] == len(pairs)
            assert told[name]["ranks"] == sorted({p.rank for p in pairs.values()})
    for name in ("extraction", "start", "transplant", "experts"):
        loaded = pkt.Extraction.load(folders[name]) if name == "extraction" else Start.load(folders[name])
        assert [told[name]["holds"]] == loaded.summary()
    assert "neutral" in told["transplant"]["holds"]
    assert "changed" in told["start"]["holds"]


def test_a_folder_that_was_changed_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(folders["experts"] / WEIGHTS, folders["start"] / WEIGHTS)
    assert "list different modules" in fails("inspect", folders["start"])
    (folders["extraction"] / WEIGHTS).write_bytes(b"1234")
    assert "is truncated" in fails("inspect", folders["extraction"])
    file = folders["transplant"] / "pkt.json"
    entries = {
        "mode": "add",
        "student": {"name": "s"},
        "kinds": {"a.q_proj": "linear"},
        "energies": {"a.q_proj": "much"},
    }
    file.write_text(json.dumps(manifest_of("transplant", entries)))
    assert "pkt.json is damaged" in fails("inspect", folders["transplant"])
    (tmp_path / ".scores.run" / "run.json").write_text('{"inputs": {"teacher": 3}}')
    assert "run.json is damaged" in fails("inspect", folders["scores"])


def test_a_residual_adapter_without_its_start(folders: dict[str, Path], tmp_path: Path) -> None:
    """An adapter moved out of its run is still pkt's; what is missing to finalize it is said."""
    moved = tmp_path / "else" / "where" / "moved"
    shutil.copytree(folders["residual"], moved, ignore=shutil.ignore_patterns("pkt.json", "pkt_initial"))
    said = run("inspect", moved)
    assert "injected by pkt as residual" in said
    assert "without its initial factors" in said
