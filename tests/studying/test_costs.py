"""What a start costs, against counts by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import zoo

import pkt
from pkt.models import Model, spec_of_model
from pkt.studying import Layout, open_study
from pkt.studying.costs import SEARCH, share, size
from pkt.studying.schema import FolderStart, OwnStart, PlainLora, StartOptions, Transfer, Transplant

DATA = Path(pkt.__file__).parent / "demo" / "assets" / "data"
STUDY = """student: demo:student
teachers: {large: demo:teacher}
tasks:
  sums: {train: demo:data/train.jsonl, rows: 20, held_out: 4, seeds: demo:data/seeds.jsonl,
         tests: {problems: {data: demo:data/test.jsonl, limit: 4}}, decides: problems.nll}
starts:
  pkt: {kind: transfer, teacher: large, seeds: 3}
  lora: {kind: lora, extra_steps: cost}
training: {epochs: 3}
compare: {of: pkt}
"""


def test_a_token_is_multiplied_by_every_matrix_once() -> None:
    for tied in (False, True):
        model = zoo.llama(tied)
        table = model.get_output_embeddings().weight.numel()
        layers = sum(p.numel() for n, p in model.model.layers.named_parameters() if n.endswith("proj.weight"))
        assert size(spec_of_model(model)) == layers + table


@pytest.mark.parametrize(
    ("start", "units"),
    [
        (Transfer(teacher="t"), 4),
        (Transplant(teacher="t"), SEARCH),
        (OwnStart(how="spectral"), 3 + SEARCH),
        (OwnStart(how="lora-ga"), 3),
        (OwnStart(how="eva"), 1),
        (OwnStart(how="pissa"), 0),
        (PlainLora(init="corda"), 1),
        (PlainLora(), 0),
        (FolderStart(path="f"), 0),
    ],
)
def test_what_each_kind_costs(start: StartOptions, units: int) -> None:
    """In passes of a token, of the teacher's where it is read; a training step takes two of the student's."""
    student, teacher = (spec_of_model(zoo.llama(layers=layers)) for layers in (2, 5))
    ratio = size(teacher) / size(student) if isinstance(start, Transfer) else 1
    found = share(start, student, teacher, seeds=100, learnt=1000)
    assert found == pytest.approx(units * ratio * 100 / (2 * 1000), abs=1e-3)


def test_a_lora_trains_longer_by_what_the_start_costs(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(STUDY, encoding="utf-8")
    layout = Layout(open_study(tmp_path / "s.yaml"))
    sizes = [size(Model.of(m).spec) for m in (layout.study.student, layout.study.teachers["large"])]
    tokens = sum(len(row.input_ids) for row in layout.seeds("sums", layout.starts["pkt"]))
    learnt = 3 * sum(len(row.input_ids) for row in layout.learnt("sums"))
    cost = 4 * sizes[1] * tokens / (2 * sizes[0] * learnt)
    assert layout.extra("sums", "pkt") == 0
    assert layout.extra("sums", "lora") == pytest.approx(cost, abs=1e-3)
