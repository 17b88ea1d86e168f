"""A task of lm-evaluation-harness as a test of a study: for real where it is installed, and with a stand-in everywhere."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from harness_task import write_task
from made_up import one_test

import pkt
from pkt import PktError
from pkt.extraction import Start
from pkt.lora import draw_pairs, inject, mode_of
from pkt.models import load_model, load_tokenizer, spec_of_model
from pkt.options import Lora
from pkt.planning import adapted
from pkt.studying import Layout, open_study, study
from pkt.studying.harness import Harness, harness_items

ASSETS = Path(pkt.__file__).parent / "demo" / "assets"
STUDY = one_test("local: {lm_eval: {task: pkt_local, include: tasks}}", decides="local.lm_eval")


def local_task(folder: Path) -> Path:
    """Which of two sums is right."""
    folder.mkdir()
    rows = [{"question": f"What is {i}+1?", "choices": [f" {i}+1={i + 1}.", " 1+1=9."]} for i in range(2, 6)]
    return write_task(folder, rows)


@pytest.mark.slow
def test_a_study_of_a_task_of_the_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    local_task(tmp_path / "tasks")
    (tmp_path / "s.yaml").write_text(STUDY, encoding="utf-8")
    found = study(tmp_path / "s.yaml", tmp_path / "out")
    assert not found["failures"]
    task = found["tasks"]["sums"]
    shares = [run["local"]["lm_eval"] for start in task["starts"].values() for run in start["after"]]
    shares.append(task["untrained"]["student"]["local"]["lm_eval"])
    assert all(share * 4 == int(share * 4) for share in shares)
    assert {c["family"] for c in found["comparisons"]} == {"deciding"}
    wrong = Harness("pkt_local", "f1", include=str(tmp_path / "tasks"))
    with pytest.raises(PktError, match="no number under 'f1' for each item; known are acc"):
        harness_items(load_model(ASSETS / "student"), load_tokenizer(ASSETS / "student"), wrong)


class Stand:
    """In place of the harness: what it is called with, and samples as it returns them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, samples: dict[str, Any]) -> None:
        self.samples, self.given, self.tied = samples, {}, None
        names = ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface", "lm_eval.tasks")
        root, models, hf, tasks = map(types.ModuleType, names)
        root.simple_evaluate = self.evaluate  # type: ignore[attr-defined]
        hf.HFLM = self.wrap  # type: ignore[attr-defined]
        tasks.TaskManager = lambda include_path: f"manager of {include_path}"  # type: ignore[attr-defined]
        for module in (root, models, hf, tasks):
            monkeypatch.setitem(sys.modules, module.__name__, module)

    def wrap(self, pretrained: Any, tokenizer: Any, batch_size: int) -> Any:
        pretrained.tie_weights()  # as the harness does
        return pretrained

    def evaluate(self, **given: Any) -> dict[str, Any]:
        self.given = given
        return {"samples": self.samples}


def test_the_items_are_those_of_one_filter_in_the_tasks_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def sample(i: int, name: str, value: Any) -> dict[str, Any]:
        return {"doc_id": i, "filter": name, "exact_match": value, "resps": ["x"]}

    samples = {
        "b": [sample(1, "strict", 0.0), sample(0, "strict", 1.0), sample(0, "loose", 1.0)],
        "a": [sample(0, "strict", True)],
    }
    stand = Stand(monkeypatch, samples)
    model = zoo.llama()
    assert harness_items(model, None, Harness("t", "exact_match", shots=2, limit=3, include="f")) == [1.0, 1.0, 0.0]
    assert stand.given["tasks"] == ["t"]
    assert (stand.given["num_fewshot"], stand.given["limit"]) == (2, 3)
    assert stand.given["task_manager"] == "manager of f"
    samples["a"] = [sample(0, "loose", 0.25)]
    assert harness_items(model, None, Harness("t", "exact_match", filter="loose")) == [0.25, 1.0]
    with pytest.raises(PktError, match="lm_eval: t has no number under 'acc' for each item; known are exact_match"):
        harness_items(model, None, Harness("t"))


def test_the_harness_ties_no_adapted_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tied student's adapters of its table and of its head stay two; afterwards the model has its own method again."""
    Stand(monkeypatch, {"t": [{"doc_id": 0, "acc": 1.0}]})
    student = zoo.llama(True)
    lora = Lora(rank=2)
    pairs = draw_pairs(student, adapted(spec_of_model(student), "all"), lora, 1.0)
    model = inject(student, Start("start", pairs, {}), mode=mode_of(lora))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    ids = torch.arange(8)[None]
    before = model(input_ids=ids).logits
    method = model.tie_weights.__func__
    assert harness_items(model, None, Harness("t")) == [1.0]
    assert torch.equal(model(input_ids=ids).logits, before)
    assert model.tie_weights.__func__ is method


def test_where_it_is_not_installed_the_study_says_so_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    local_task(tmp_path / "tasks")
    (tmp_path / "s.yaml").write_text(STUDY, encoding="utf-8")
    with pytest.raises(PktError, match=r"pip install 'pkt-transfer\[lm-eval\]'"):
        study(tmp_path / "s.yaml", tmp_path / "out")
    for old, new, told in (
        ("{lm_eval:", "{data: demo:data/test.jsonl, lm_eval:", "needs data, or a task of lm_eval, and not both"),
        (
            "decides: local.lm_eval",
            "decides: local.acc",
            "local.acc is measured by no test; did you mean local.lm_eval",
        ),
    ):
        (tmp_path / "s.yaml").write_text(STUDY.replace(old, new), encoding="utf-8")
        with pytest.raises(PktError, match=told):
            open_study(tmp_path / "s.yaml")


def test_a_changed_task_file_is_another_test(tmp_path: Path) -> None:
    folder = local_task(tmp_path / "tasks")
    (tmp_path / "s.yaml").write_text(STUDY, encoding="utf-8")

    def key() -> str:
        layout = Layout(open_study(tmp_path / "s.yaml"))
        return layout.test(layout.study.student, "local", "sums").key

    before = key()
    assert key() == before
    (folder / "test.jsonl").write_text("{}\n")
    assert key() != before
