"""Injection: step 0 is the student, only what should move moves, and what cannot be injected is refused in words."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import zoo
from lifecycle import IDS, contents, extraction, logits, no_warnings, save_quietly, steps, student

import pkt
from pkt.adapters import CONFIG
from pkt.lora import load_with_adapter
from pkt.models import load_model
from pkt.training import write_injected

KINDS = [(arch, tied) for arch in ("llama", "gpt2") for tied in (False, True)]


@pytest.fixture(scope="module")
def ext() -> Any:
    return extraction()


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student") / "llama"
    student().save_pretrained(folder)
    return folder


def halves(model: Any, name: str = "default") -> dict[str, torch.Tensor]:
    """The second half of every factor of an adapter."""
    found = {}
    for key, value in model.named_parameters():
        if f".{name}" in key and ".lora_" in key:
            dim = 0 if "lora_A" in key or "embedding_A" in key else 1
            found[key] = value.detach().chunk(2, dim)[1].clone()
    return found


@pytest.mark.parametrize(("arch", "tied"), KINDS)
def test_step_zero_with_dropout_and_autocast(arch: str, tied: bool) -> None:
    plain = student(arch, tied)
    expected = logits(plain)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        rounded = plain(input_ids=IDS).logits.float()
    model = pkt.inject(plain, extraction(arch, tied), dropout=0.5).train()
    assert (logits(model) - expected).abs().max() <= 1e-5
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = model(input_ids=IDS).logits.float()
    # The halves cancel up to one rounding of their bf16 sum; autocast itself moves the logits by `rounded - expected`.
    assert (found - rounded).norm() <= 0.5 * (rounded - expected).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_step_zero_in_half_precision(dtype: torch.dtype) -> None:
    plain = student().to(dtype)
    expected = logits(plain)
    model = pkt.inject(plain, extraction(rank=4))
    assert (logits(model) - expected).norm() <= 2 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize(("arch", "tied"), KINDS)
def test_only_the_first_half_moves(arch: str, tied: bool) -> None:
    model = pkt.inject(student(arch, tied), extraction(arch, tied), dropout=0.1)
    before = halves(model)
    steps(model, 3)
    after = halves(model)
    assert before
    assert all(torch.equal(before[k], after[k]) for k in before)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(student(arch, tied)))


def test_a_tied_head_is_one_with_its_embedding() -> None:
    for arch in ("llama", "gpt2"):
        model = pkt.inject(student(arch, True), extraction(arch, True))
        assert not any("lm_head" in n for n, p in model.named_parameters() if p.requires_grad)
        steps(model, 2)
        embedding, head = (
            f() for f in (model.get_base_model().get_input_embeddings, model.get_base_model().get_output_embeddings)
        )
        assert torch.equal(head.lora_A["default"].weight, embedding.lora_embedding_B["default"].t())
        expected = logits(model)
        merged = model.merge_and_unload()
        assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
        assert (logits(merged) - expected).abs().max() <= 1e-4


def test_merge_and_unmerge_a_tied_table() -> None:
    model = pkt.inject(student("llama", True), extraction("llama", True))
    steps(model, 2)
    expected = logits(model)
    table = model.get_base_model().get_input_embeddings().weight
    before = table.clone()
    model.merge_adapter()
    assert (logits(model) - expected).abs().max() <= 1e-4
    model.unmerge_adapter()
    assert (table - before).abs().max() <= 1e-6
    assert (logits(model) - expected).abs().max() <= 1e-4


def test_beside_other_adapters(student_folder: Path, ext: Any) -> None:
    """A second adapter under its own name: the first one is not touched, and each can be chosen."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load_model(student_folder), LoraConfig(r=4, target_modules=["q_proj"]), adapter_name="mine")
    steps(model, 2)
    mine = logits(model)
    with pytest.raises(pkt.PktError, match=r"shift the base under the other adapters of this model \(mine\)"):
        pkt.inject(model, ext, mode="residual", adapter_name="math")
    with no_warnings():
        model = pkt.inject(model, ext, adapter_name="math")
    plain = logits(load_model(student_folder))
    assert model.active_adapters == ["math"]
    assert (logits(model) - plain).abs().max() <= 1e-5
    before = halves(model, "math")
    steps(model, 3)
    assert all(torch.equal(v, halves(model, "math")[k]) for k, v in before.items())
    trained = logits(model)
    assert (trained - plain).abs().max() > 1e-2
    model.set_adapter("mine")
    assert torch.equal(logits(model), mine)
    model.set_adapter("math")
    assert torch.equal(logits(model), trained)


def test_a_second_adapter_of_a_tied_student() -> None:
    model = pkt.inject(student("llama", True), extraction("llama", True), adapter_name="first")
    steps(model, 2)
    first = logits(model)
    model = pkt.inject(model, extraction("llama", True, rank=3), adapter_name="second")
    assert (logits(model) - logits(student("llama", True))).abs().max() <= 1e-5
    steps(model, 2)
    model.set_adapter("first")
    assert torch.equal(logits(model), first)


def test_a_reloaded_checkpoint_is_armed_again(student_folder: Path, ext: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    model = pkt.inject(student_folder, ext)
    steps(model, 2)
    save_quietly(model, tmp_path / "half-way")
    expected = logits(model)
    steps(model, 2)
    model = PeftModel.from_pretrained(load_model(student_folder), str(tmp_path / "half-way"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", pkt.PktWarning)
        assert pkt.inject(model, ext) is model
    assert torch.equal(logits(model), expected)
    before = halves(model)
    steps(model, 2)
    assert all(torch.equal(v, halves(model)[k]) for k, v in before.items())


def test_a_moved_second_half_is_reported(student_folder: Path, ext: Any, tmp_path: Path) -> None:
    """Trained by PEFT alone, both halves move; the result is still exact."""
    from peft import PeftModel

    save_quietly(pkt.inject(student_folder, ext), tmp_path / "start")
    model = PeftModel.from_pretrained(load_model(student_folder), str(tmp_path / "start"), is_trainable=True)
    steps(model, 4, lr=3e-2)
    save_quietly(model, tmp_path / "trained")
    assert pkt.finalize(tmp_path / "trained", tmp_path / "out").check.gap <= 1e-4
    with pytest.warns(pkt.PktWarning, match=r"has moved by up to \d+\.\d% .* harmless"):
        pkt.inject(model, ext)


@pytest.mark.parametrize("with_tables", [False, True], ids=["without tables", "with tables"])
def test_a_residual_checkpoint_is_armed_again(
    student_folder: Path, ext: Any, tmp_path: Path, with_tables: bool
) -> None:
    """Also from a file that carries the tables' shifted weights, which PEFT loads into the base."""
    from peft import PeftModel

    model = pkt.inject(student_folder, ext, mode="residual")
    steps(model, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "trained", save_embedding_layers=with_tables)
    again = PeftModel.from_pretrained(load_model(student_folder), str(tmp_path / "trained"))
    with pytest.raises(pkt.PktError, match="the base under it is not shifted"):
        pkt.finalize(again, tmp_path / "out")
    with pytest.raises(pkt.PktError, match="was injected with mode='residual', not 'paired'"):
        pkt.inject(again, ext)
    again = pkt.inject(again, ext, mode="residual")
    assert (logits(again) - logits(model)).abs().max() <= 1e-5
    assert pkt.inject(again, ext, mode="residual") is again  # the base is shifted once only
    assert (logits(again) - logits(model)).abs().max() <= 1e-5
    other = load_model(student_folder)
    for parameter in other.parameters():
        parameter.data.mul_(1.1)
    if with_tables:
        return
    with pytest.raises(pkt.PktError, match=r"neither the student .* nor its shifted base"):
        pkt.inject(PeftModel.from_pretrained(other, str(tmp_path / "trained")), ext, mode="residual")


def test_arming_what_is_not_ours(student_folder: Path, ext: Any) -> None:
    from peft import LoraConfig, get_peft_model

    plain = get_peft_model(load_model(student_folder), LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(pkt.PktError, match="was not made by pkt"):
        pkt.inject(plain, ext)
    with pytest.raises(pkt.PktError, match="started from another extraction"):
        pkt.inject(pkt.inject(student_folder, ext), extraction(rank=2))


@pytest.mark.parametrize("mode", ["paired", "residual", "add"])
def test_a_configuration_of_your_own(student_folder: Path, tmp_path: Path, mode: Any) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    ext = extraction(rank=4)
    rank = 8 if mode == "paired" else 4
    config = LoraConfig(
        r=rank, lora_alpha=5, use_rslora=True, lora_dropout=0.2, target_modules=["q_proj", "down_proj", "lm_head"]
    )
    model = get_peft_model(load_model(student_folder), config).eval()
    with pytest.warns(pkt.PktWarning, match=r"not used, because the adapter does not target them: model\.embed_tokens"):
        pkt.initialize_lora_weights(model, ext, mode=mode)
    gap = (logits(model) - logits(load_model(student_folder))).abs().max()
    assert gap > 1e-2 if mode == "add" else gap <= 1e-5
    steps(model, 3)
    assert pkt.finalize(model, tmp_path / "out", student=student_folder).check.gap <= 1e-4
    save_quietly(model, tmp_path / "trained")
    done = pkt.finalize(tmp_path / "trained", tmp_path / "from folder", extraction=ext if mode == "residual" else None)
    assert done.mode == mode
    assert done.check.gap <= 1e-4
    again = PeftModel.from_pretrained(load_model(student_folder), str(tmp_path / "trained"))
    again = pkt.inject(again, ext, mode=mode).eval()
    assert (logits(again) - logits(model)).abs().max() <= 1e-5


def test_a_configuration_that_does_not_fit(student_folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    ext = extraction(rank=4)
    model = get_peft_model(load_model(student_folder), LoraConfig(r=4, target_modules=["q_proj"]))
    with (
        pytest.raises(
            pkt.PktError, match=r"set r and rank_pattern: model\.layers\.0\.self_attn\.q_proj: r=4, needed 8"
        ),
        pytest.warns(),
    ):
        pkt.initialize_lora_weights(model, ext)
    with pytest.raises(pkt.PktError, match="has no adapter 'other'"):
        pkt.initialize_lora_weights(model, ext, adapter_name="other")
    model = get_peft_model(student("llama", True), LoraConfig(r=8, target_modules=["embed_tokens"]))
    with (
        pytest.raises(pkt.PktError, match="tied to lm_head; target both, with ensure_weight_tying=True"),
        pytest.warns(),
    ):
        pkt.initialize_lora_weights(model, extraction("llama", True, rank=4))


def test_bad_options(student_folder: Path, ext: Any) -> None:
    for options, words in (
        ({"mode": "both"}, "mode='both' is unknown"),
        ({"dropout": 1.0}, r"dropout=1\.0 must be"),
        ({"alpha": 0.0}, "alpha=0.0 must be positive"),
        ({"alpha": float("nan")}, "alpha=nan must be positive"),
        ({"dropout": float("nan")}, "dropout=nan must be"),
    ):
        with pytest.raises(pkt.PktError, match=words):
            pkt.inject(student_folder, ext, **options)


def test_a_model_that_was_wrapped_already(student_folder: Path, ext: Any) -> None:
    plain = load_model(student_folder)
    model = pkt.inject(plain, ext)
    for mode in ("paired", "residual"):
        with pytest.raises(pkt.PktError, match=r"has been wrapped already.*pass the PeftModel"):
            pkt.inject(plain, ext, mode=mode)
    with pytest.raises(pkt.PktError, match="has been wrapped already"):
        pkt.initialize_lora_weights(plain, ext)
    assert pkt.inject(model, ext) is model


def test_a_student_without_weights(ext: Any) -> None:
    model = student().to("meta")
    with pytest.raises(pkt.PktError, match=r"on the meta device, without values \(model\.embed_tokens"):
        pkt.inject(model, ext)
    assert not hasattr(model, "peft_config")


def test_arguments_of_other_types(student_folder: Path, ext: Any) -> None:
    for wrong in (None, 5, ext.plan):
        with pytest.raises(pkt.PktError, match=f"a student .* is needed, not {type(wrong).__name__}"):
            pkt.inject(wrong, ext)
        with pytest.raises(
            pkt.PktError, match=f"an extraction or a transplant, .* is needed, not {type(wrong).__name__}"
        ):
            pkt.inject(student_folder, wrong)


def test_a_student_that_does_not_fit_lists_modules_and_counts_the_rest(ext: Any) -> None:
    from lifecycle import teacher

    with pytest.raises(pkt.PktError, match=r"\(16 modules\):") as raised:
        pkt.inject(teacher(), ext)
    listed = [module for module in ext.pairs if f" {module}: " in str(raised.value)]
    assert listed == list(ext.pairs)[:3]
    assert str(raised.value).endswith("; and 13 more; use the student it was made for")
    with pytest.raises(pkt.PktError, match="has no such matrix"):
        pkt.inject(student("gpt2"), ext)


@pytest.mark.parametrize("mode", ["paired", "residual", "add"])
def test_the_written_start(student_folder: Path, ext: Any, tmp_path: Path, mode: Any) -> None:
    """A folder any PEFT trainer can start from: loads without a warning, and is the student at step 0."""
    from peft import AutoPeftModelForCausalLM

    ext.save(tmp_path / "ext")
    before = contents(student_folder)
    write_injected(student_folder, tmp_path / "ext", tmp_path / "start", mode=mode, alpha=6.0)
    with no_warnings():
        model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "start", is_trainable=True).eval()
    gap = (logits(model) - logits(load_model(student_folder))).abs().max()
    assert gap > 1e-2 if mode == "add" else gap <= 1e-5
    assert json.loads((tmp_path / "start" / CONFIG).read_text())["lora_alpha"] == (12 if mode == "paired" else 6)
    steps(model, 3)
    save_quietly(model, tmp_path / "output" / "checkpoint-3")
    # A foreign output folder knows its base (residual: which knows the rest) and its record, nothing else of pkt's.
    done = pkt.finalize(tmp_path / "output" / "checkpoint-3", tmp_path / "out")
    assert done.mode == mode
    assert done.check.gap <= 1e-4
    assert contents(student_folder) == before


@pytest.mark.parametrize(("arch", "tied"), [("gpt2", False), ("gpt2", True), ("llama", True)])
def test_the_written_residual_start_of_other_layouts(tmp_path: Path, arch: str, tied: bool) -> None:
    """Conv1D and tied tables: the initial factors are read back from the folder alone."""
    student(arch, tied).save_pretrained(tmp_path / "student")
    extraction(arch, tied).save(tmp_path / "ext")
    write_injected(tmp_path / "student", tmp_path / "ext", tmp_path / "start", mode="residual")
    model = load_with_adapter(tmp_path / "start" / "base", tmp_path / "start")
    assert (logits(model) - logits(load_model(tmp_path / "student"))).abs().max() <= 1e-5
    done = pkt.finalize(tmp_path / "start", tmp_path / "out")
    assert done.check.gap <= 1e-4
    assert max(float(p.delta().abs().max()) for p in done.pairs.values()) <= 1e-5


def test_save_residual_is_for_residual(student_folder: Path, ext: Any, tmp_path: Path) -> None:
    ext.save(tmp_path / "ext")
    with pytest.raises(pkt.PktError, match="--save-residual writes the base of mode='residual'"):
        write_injected(student_folder, tmp_path / "ext", tmp_path / "start", save_residual=tmp_path / "base")
    assert not (tmp_path / "start").exists()


def test_the_residual_base_lies_apart_and_appears_with_its_adapter(
    student_folder: Path, ext: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    from safetensors import SafetensorError

    ext.save(tmp_path / "ext")
    where = (student_folder, tmp_path / "ext")
    for out, base in (("j", "j"), ("j", "j/base"), ("j/start", "j"), ("ext/start", "j"), ("j", "ext/base")):
        with pytest.raises(pkt.PktError, match="name an output folder apart from it"):
            write_injected(*where, tmp_path / out, mode="residual", save_residual=tmp_path / base)
    kind = type(student())
    plain = kind.save_pretrained

    def full(*args: Any, **options: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    for base in (tmp_path / "base", None):
        monkeypatch.setattr(kind, "save_pretrained", full)
        with pytest.raises(pkt.PktError, match="No space left on device"):
            write_injected(*where, tmp_path / "start", mode="residual", save_residual=base)
        assert [p.name for p in tmp_path.iterdir()] == ["ext"]
    monkeypatch.setattr(kind, "save_pretrained", plain)
    for force in (False, True):
        write_injected(*where, tmp_path / "start", mode="residual", save_residual=tmp_path / "base", force=force)
    assert len({f.stat().st_mode for f in (*(tmp_path / "start").glob("*.*"), *(tmp_path / "base").glob("*.*"))}) == 1
    with pytest.raises(pkt.PktError, match="replace it with --force"):
        write_injected(*where, tmp_path / "start")


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_student(tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install pkt-transfer[clients])")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    # bitsandbytes packs 4-bit weights on the CPU in blocks of 64.
    size = {"hidden": 64, "ffn": 128}
    zoo.llama(layers=2, **size).save_pretrained(tmp_path / "student")
    source, target = zoo.llama(**size), zoo.llama(layers=2, **size)
    sens = pkt.sensitivity(source, oracle.batched(oracle.token_samples(4), 2), progress=False)
    ext = pkt.extract(source, pkt.plan(sens, source, target), rank=4, progress=False)
    config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_compute_dtype=torch.float32)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "student", quantization_config=config)

    # In eval mode bitsandbytes packs weights for bf16 products where the CPU has them and no gradient is asked for: then the same
    # model gives other logits before and after its embedding is frozen.
    plain = load().train()
    expected = logits(plain)
    model = pkt.inject(plain, ext)
    assert (logits(model) - expected).abs().max() <= 1e-5
    frozen = halves(model)
    losses = steps(model, 5)
    assert losses[-1] < losses[0]
    assert all(torch.equal(v, halves(model)[k]) for k, v in frozen.items())
    done = pkt.finalize(model, tmp_path / "out", student=tmp_path / "student")
    assert done.check.gap > 0  # the quantization's error, stated and not refused
    with pytest.raises(pkt.PktError, match="which are quantized here"):
        pkt.inject(load(), ext, mode="residual")
    own = get_peft_model(load(), LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(pkt.PktError, match=r"initialize before quantizing(.|\n)*q_proj: .* of u?int8"):
        pkt.initialize_pissa_weights(own)
