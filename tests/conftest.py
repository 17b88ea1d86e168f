"""What the tests share: no network, two threads, and tiny models on disk with the demo's tokenizer."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores: one thread each, and in what they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
import zoo

ASSETS = Path(__file__).parents[1] / "pkt" / "demo" / "assets"


# The files that take a worker longest, which begin first so that no worker ends alone.
LONGEST = (
    "test_docs",
    "test_clients",
    "test_streaming",
    "test_ranks",
    "test_kernels_interpreter",
    "test_bad_input",
    "test_demo_workers",
    "test_finalization",
    "test_resume",
    "test_cli",
    "test_extension_build",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-families", action="store_true", help="write bench/results/families.json for docs/models.md"
    )


@pytest.fixture(scope="session")
def families_table(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Family -> what its test found; written as the source of docs/models.md with --write-families."""
    rows: dict[str, Any] = {}
    yield rows
    if request.config.getoption("--write-families"):
        path = Path(__file__).parents[1] / "bench" / "results" / "families.json"
        assert set(rows) == set(zoo.FAMILIES), "run every family's test in one process (-n 0)"
        ordered = {name: rows[name] for name in zoo.FAMILIES}
        path.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from pkt.models import load_tokenizer

    return load_tokenizer(ASSETS / "teacher")


def save(model: Any, folder: Path, tokenizer: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    model = zoo.llama(hidden=48, layers=4, heads=6, kv=3, ffn=96, vocab=len(tokenizer))
    return save(model, tmp_path_factory.mktemp("models") / "teacher", tokenizer)


@pytest.fixture(scope="session")
def student_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    model = zoo.llama(hidden=32, layers=2, heads=4, kv=2, ffn=64, vocab=len(tokenizer))
    return save(model, tmp_path_factory.mktemp("models") / "student", tokenizer)


@pytest.fixture(scope="session")
def tied_student_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    model = zoo.llama(True, hidden=32, layers=2, heads=4, kv=2, ffn=64, vocab=len(tokenizer))
    return save(model, tmp_path_factory.mktemp("models") / "tied", tokenizer)


@pytest.fixture(scope="session")
def seed_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "seeds.jsonl"
    rows = (ASSETS / "data" / "seeds.jsonl").read_text().split("\n")[:6]
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="session")
def extraction_dir(
    tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path, student_dir: Path, seed_file: Path
) -> Path:
    import pkt

    out = tmp_path_factory.mktemp("runs") / "extraction"
    pkt.transfer(teacher_dir, student_dir, seed_file, out=out, rank=4, progress=False)
    return out


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


torch.manual_seed(0)
