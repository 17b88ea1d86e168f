"""The trainers and tools people already use, on injected models and finalized adapters."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from lifecycle import IDS, extraction, logits, no_warnings, save_quietly, steps, student

import pkt
from pkt.adapters import read_adapter
from pkt.lora import load_with_adapter
from pkt.models import load_model
from pkt.models.adapter_files import INITIAL
from pkt.training import write_injected

ROWS = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in IDS.repeat(6, 1)]


@pytest.fixture(scope="module", params=["untied", "tied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return request.param == "tied"


@pytest.fixture(scope="module")
def ext(tied: bool) -> Any:
    return extraction("llama", tied)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tied: bool) -> Path:
    folder = tmp_path_factory.mktemp("student") / "llama"
    student("llama", tied).save_pretrained(folder)
    return folder


def second_halves(model: Any) -> dict[str, torch.Tensor]:
    base = model.get_base_model()
    found = {}
    for name, parameter in base.named_parameters():
        if ".lora_" in name:
            dim = 0 if "lora_A" in name or "embedding_A" in name else 1
            found[name] = parameter.detach().chunk(2, dim)[1].clone()
    return found


def trainer(model: Any, out: Path, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=6,
        save_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
        seed=3,
        **options,
    )
    return Trainer(model=model, args=arguments, train_dataset=ROWS)


def train(model: Any, out: Path, resume: Path | None = None, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(model, out, **options).train(resume_from_checkpoint=None if resume is None else str(resume))


@pytest.mark.parametrize("mode", ["paired", "residual"])
def test_trainer_with_checkpoint_and_resume(folder: Path, ext: Any, tmp_path: Path, mode: Any) -> None:
    model = pkt.inject(folder, ext, mode=mode, dropout=0.1)
    frozen = second_halves(model)
    train(model, tmp_path / "run")
    again = pkt.inject(folder, ext, mode=mode, dropout=0.1)
    train(again, tmp_path / "again", resume=tmp_path / "run" / "checkpoint-3")
    assert torch.equal(logits(again.eval()), logits(model.eval()))
    if mode == "paired":
        assert all(torch.equal(frozen[k], v) for k, v in second_halves(again).items())
    ext.save(tmp_path / "ext")
    # The checkpoint alone: its record says how it was injected.
    start = tmp_path / "ext" if mode == "residual" else None
    done = pkt.finalize(tmp_path / "again" / "checkpoint-6", tmp_path / "out", extraction=start)
    assert done.mode == mode
    assert (logits(load_with_adapter(folder, tmp_path / "out")) - logits(model)).abs().max() <= 1e-4


def test_weight_decay_is_harmless(folder: Path, ext: Any, tmp_path: Path) -> None:
    model = pkt.inject(folder, ext)
    frozen = second_halves(model)
    train(model, tmp_path / "run", weight_decay=0.5)
    assert any(not torch.equal(frozen[k], v) for k, v in second_halves(model).items())
    pkt.finalize(tmp_path / "run" / "checkpoint-6", tmp_path / "out")
    assert (logits(load_with_adapter(folder, tmp_path / "out")) - logits(model.eval())).abs().max() <= 1e-4


DISTRIBUTED = """
import sys
import torch
from accelerate import Accelerator
sys.path.insert(0, sys.argv[1])
import lifecycle, pkt

def train(accelerator):
    assert accelerator.num_processes == 2 and torch.distributed.get_backend() == "gloo"
    model = pkt.inject(sys.argv[2], sys.argv[3])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    rows = lifecycle.IDS.chunk(2)[accelerator.process_index]
    for _ in range(3):
        accelerator.backward(model(input_ids=rows, labels=rows).loss)
        optimizer.step()
        optimizer.zero_grad()
    plain = accelerator.unwrap_model(model)
    if accelerator.is_main_process:
        lifecycle.save_quietly(plain, sys.argv[4])
        pkt.finalize(model, sys.argv[4] + "-memory")
    sums = accelerator.gather(sum(p.double().sum() for n, p in plain.named_parameters() if ".lora_" in n)[None])
    assert sums[0] == sums[1]

accelerator = Accelerator(cpu=True)
try:
    train(accelerator)
    accelerator.wait_for_everyone()
finally:
    # A process that exits with its group alive may abort: gloo's threads are still running.
    accelerator.free_memory()
    accelerator.end_training()
"""


@pytest.mark.parametrize("tied", ["tied"], indirect=True)
def test_accelerate_with_two_processes(folder: Path, ext: Any, tmp_path: Path) -> None:
    ext.save(tmp_path / "ext")
    (tmp_path / "script.py").write_text(DISTRIBUTED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    given = [Path(__file__).parent, folder, tmp_path / "ext", tmp_path / "trained"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = processes.run([*launch, tmp_path / "script.py", *given], env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    model = pkt.inject(folder, ext)
    frozen = second_halves(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    from peft import PeftModel

    found = PeftModel.from_pretrained(load_model(folder), str(tmp_path / "trained"))
    halves = second_halves(found)  # of the tied head too, which PEFT keeps as a copy
    assert all(torch.equal(v, halves[k]) for k, v in frozen.items())
    # Two halves of the batch on two processes are the whole batch on one.
    assert (logits(found.eval()) - logits(model.eval())).abs().max() <= 1e-4
    pkt.finalize(tmp_path / "trained", tmp_path / "out")
    for out in (tmp_path / "out", tmp_path / "trained-memory"):
        assert (logits(load_with_adapter(folder, out)) - logits(model)).abs().max() <= 1e-4


def test_gradient_checkpointing(folder: Path, ext: Any) -> None:
    plain = pkt.inject(folder, ext)
    expected = steps(plain, 4)
    model = pkt.inject(folder, ext)
    frozen = second_halves(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    found = steps(model, 4)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 1e-5
    assert all(torch.equal(frozen[k], v) for k, v in second_halves(model).items())


@pytest.mark.parametrize("tied", ["tied"], indirect=True)
def test_torch_compile(folder: Path, ext: Any, tmp_path: Path) -> None:
    plain = pkt.inject(folder, ext)
    expected = steps(plain, 3)
    model = pkt.inject(folder, ext)
    frozen = second_halves(model)
    # aot_eager traces forward and backward as inductor does, without its minutes of code generation.
    found = steps(torch.compile(model, backend="aot_eager"), 3)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 1e-5
    assert all(torch.equal(frozen[k], v) for k, v in second_halves(model).items())
    pkt.finalize(torch.compile(model, backend="aot_eager"), tmp_path / "out")
    assert (logits(load_with_adapter(folder, tmp_path / "out")) - logits(model)).abs().max() <= 1e-4


def test_bf16_autocast(folder: Path, ext: Any, tmp_path: Path) -> None:
    model = pkt.inject(folder, ext, dropout=0.1)
    frozen = second_halves(model)
    with torch.autocast("cpu", torch.bfloat16):
        losses = steps(model, 10)
    assert losses[-1] < losses[0]
    assert all(torch.equal(frozen[k], v) for k, v in second_halves(model).items())
    pkt.finalize(model, tmp_path / "out")
    assert (logits(load_with_adapter(folder, tmp_path / "out")) - logits(model)).abs().max() <= 1e-4


def final(folder: Path, ext: Any, out: Path, count: int) -> torch.Tensor:
    """A finalized adapter in `out`; returns the trained model's logits."""
    model = pkt.inject(folder, ext)
    steps(model, count, lr=1e-2)
    pkt.finalize(model, out)
    return logits(model)


def test_peft_loads_switches_and_merges(folder: Path, ext: Any, tied: bool, tmp_path: Path) -> None:
    """Two finalized adapters in one PeftModel: set_adapter, disable_adapter, add_weighted_adapter, merge_and_unload."""
    from peft import PeftModel

    expected = {name: final(folder, ext, tmp_path / name, count) for name, count in (("one", 2), ("two", 6))}
    base = logits(load_model(folder))
    with no_warnings():
        model = PeftModel.from_pretrained(load_model(folder), str(tmp_path / "one"), adapter_name="one").eval()
    with warnings.catch_warnings():
        # PEFT warns of a tied head in any second adapter, its own included.
        warnings.simplefilter("ignore" if tied else "error", UserWarning)
        warnings.simplefilter("ignore", FutureWarning)
        model.load_adapter(str(tmp_path / "two"), "two")
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        if not (tied and name == "two"):
            assert (logits(model) - expected[name]).abs().max() <= 1e-4
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    if tied:
        return  # PEFT ties neither a second adapter's head nor a merged one; `pkt finalize --merge` does
    model.add_weighted_adapter(["one", "two"], [0.25, 0.75], "mixed", combination_type="cat")
    model.set_adapter("mixed")
    changes = [read_adapter(tmp_path / name)[0].pairs for name in ("one", "two")]
    mixed = load_model(folder)
    for module in changes[0]:
        weight = mixed.get_submodule(module).weight
        weight.data += 0.25 * changes[0][module].delta() + 0.75 * changes[1][module].delta()
    assert (logits(model) - logits(mixed)).abs().max() <= 1e-4
    model.set_adapter("two")
    assert (logits(model.merge_and_unload()) - expected["two"]).abs().max() <= 1e-4


def test_injected_models_merge_in_peft(folder: Path, ext: Any) -> None:
    for mode in ("paired", "residual"):
        model = pkt.inject(folder, ext, mode=mode)
        steps(model, 3)
        expected = logits(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = model.merge_and_unload()
        assert (logits(merged) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("tied", ["untied"], indirect=True)
def test_peft_converts_a_residual_adapter_to_the_same_change(folder: Path, tmp_path: Path) -> None:
    """PEFT's own conversion (for linear modules; it leaves embeddings out) and ours give one ΔW."""
    source = extraction(rank=4)
    linear = {m: p for m, p in source.pairs.items() if p.kind == "linear"}
    source.pairs, source.energies = linear, {m: source.energies[m] for m in linear}
    source.plan.entries = [e for e in source.plan.entries if e.target in linear]
    source.save(tmp_path / "ext")
    write_injected(folder, tmp_path / "ext", tmp_path / "start", mode="residual")
    model = pkt.inject(folder, source, mode="residual")
    steps(model, 3, lr=1e-2)
    save_quietly(model, tmp_path / "trained")
    ours = pkt.finalize(tmp_path / "trained", tmp_path / "out", extraction=tmp_path / "ext")
    model.peft_config["default"].init_lora_weights = "pissa"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(
            str(tmp_path / "theirs"), path_initial_model_for_weight_conversion=str(tmp_path / "start" / INITIAL)
        )
    theirs, _ = read_adapter(tmp_path / "theirs")
    assert theirs.pairs.keys() == ours.pairs.keys()
    for module, pair in ours.pairs.items():
        delta = theirs.pairs[module].delta()
        assert (pair.delta() - delta).norm() <= 1e-5 * delta.norm().clamp_min(1e-3)
