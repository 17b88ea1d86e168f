"""Two larger clients on the demo pair: TRL's SFTTrainer and the evaluation harness. Run by `make test-slow`."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ASSETS
from harness_task import write_task

import pkt
from pkt.lora import load_with_adapter
from pkt.models import load_model

pytestmark = pytest.mark.slow
STUDENT = ASSETS / "student"
HINT = "{} is not installed (pip install pkt-transfer[clients])"


def rows(name: str, count: int) -> list[dict[str, Any]]:
    lines = (ASSETS / "data" / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:count]]


@pytest.fixture(scope="module")
def ext(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without the head: SFTTrainer multiplies by its weight directly and refuses an adapter on it."""
    out = tmp_path_factory.mktemp("transfer") / "ext"
    options = {"rank": 8, "modules": r"layers|embed_tokens", "progress": False}
    pkt.transfer(ASSETS / "teacher", STUDENT, ASSETS / "data" / "seeds.jsonl", out=out, **options)
    return out


def sft(model: Any, tokenizer: Any, out: Path, resume: bool = False) -> Any:
    """TRL's own trainer with its own defaults (gradient checkpointing, chat template), two checkpoints."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(out),
        max_steps=6,
        save_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        max_length=128,
        bf16=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows("train", 32)), processing_class=tokenizer
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("mode", ["paired", "residual"])
def test_trl(ext: Path, tmp_path: Path, tokenizer: Any, mode: Any) -> None:
    pytest.importorskip("trl", reason=HINT.format("trl"))
    model = pkt.inject(load_model(STUDENT, dtype=torch.float32), ext, mode=mode)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_B" in n}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = sft(model, tokenizer, tmp_path / "out")
    trained = trainer.model.eval()
    if mode == "paired":
        for name, parameter in trained.named_parameters():
            if name in frozen:
                assert torch.equal(parameter.chunk(2, 1)[1], frozen[name].chunk(2, 1)[1])
    ids = torch.tensor([tokenizer(rows("test", 1)[0]["messages"][0]["content"])["input_ids"]])
    with torch.no_grad():
        expected = trained(ids).logits
    # The last checkpoint of its output folder, as SFTTrainer wrote it; the student is stored in bf16, trained in fp32.
    pkt.finalize(
        tmp_path / "out" / "checkpoint-6", tmp_path / "adapter", extraction=ext if mode == "residual" else None
    )
    with torch.no_grad():
        found = load_with_adapter(STUDENT, tmp_path / "adapter", dtype=torch.float32)(ids).logits
    assert (found - expected).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max()))


def test_lm_eval(ext: Path, tmp_path: Path, tokenizer: Any) -> None:
    """The harness as a library, on a local task file, with `peft=`: its log-likelihoods are ours, not the base model's."""
    pytest.importorskip("lm_eval", reason=HINT.format("lm_eval"))
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = pkt.inject(load_model(STUDENT, dtype=torch.float32), ext)
    for parameter in (p for n, p in model.named_parameters() if "lora_B" in n or "embedding_B" in n):
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    pkt.finalize(model, tmp_path / "adapter", student=STUDENT)
    documents = []
    for row in rows("test", 4):
        question, answer = (m["content"] for m in row["messages"])
        documents.append({"question": question, "choices": [f" {answer}", " 1+1=2. #### 2"]})
    write_task(tmp_path, documents)
    manager = TaskManager(include_path=str(tmp_path))

    def likelihoods(**options: Any) -> list[float]:
        harness = HFLM(pretrained=str(STUDENT), dtype="float32", device="cpu", batch_size=1, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = simple_evaluate(model=harness, tasks=["pkt_local"], task_manager=manager, bootstrap_iters=0)
        samples = sorted(found["samples"]["pkt_local"], key=lambda s: s["doc_id"])
        return [float(r[0]) for s in samples for r in s["filtered_resps"]]

    served, base = likelihoods(peft=str(tmp_path / "adapter")), likelihoods()
    ours = []
    with torch.no_grad():
        for document in documents:
            start = len(tokenizer(document["question"])["input_ids"])
            for choice in document["choices"]:
                ids = torch.tensor([tokenizer(document["question"] + choice)["input_ids"]])
                logs = model.eval()(ids).logits.log_softmax(-1)[0, start - 1 : -1]
                ours.append(float(logs.gather(1, ids[0, start:, None]).sum()))
    assert served == pytest.approx(ours, abs=1e-2)
    assert max(abs(a - b) for a, b in zip(served, base, strict=True)) > 0.1
