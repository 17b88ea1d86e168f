"""Models published under a multimodal class stay of that class: only their text decoder is fed, and nothing of them is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lifecycle
import oracle
import pytest
import torch
import transformers
import zoo
from safetensors.torch import load_file

import pkt
from pkt.lora import load_with_adapter
from pkt.models import Model, load_model
from pkt.options import PlanOptions
from pkt.planning import Pairing
from pkt.seeds import Example, Seeds

TOWER = {"hidden_size": 16, "intermediate_size": 32, "depth": 1, "num_heads": 2, "patch_size": 4}


def qwen(size: str) -> Any:
    text = zoo.base(size, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]})
    vision = {
        **TOWER,
        "out_hidden_size": text["hidden_size"],
        "fullatt_block_indexes": [0],
    }
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen35(size: str) -> Any:
    text = zoo.base(size)
    text |= {
        "layer_types": ["full_attention"] * text["num_hidden_layers"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    vision = {
        **TOWER,
        "out_hidden_size": text["hidden_size"],
        "num_position_embeddings": 16,
    }
    return transformers.Qwen3_5ForConditionalGeneration(
        transformers.Qwen3_5Config(text_config=text, vision_config=vision)
    )


VIT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def gemma(size: str) -> Any:
    config = transformers.Gemma3Config(
        text_config=zoo.base(size, sliding_window=16), vision_config=VIT, mm_tokens_per_image=4
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def llava(size: str) -> Any:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**zoo.base(size)),
        vision_config=transformers.CLIPVisionConfig(**VIT),
        image_token_index=66,
    )
    return transformers.LlavaForConditionalGeneration(config)


def mllama(size: str) -> Any:
    text = zoo.base(size, cross_attention_layers=[1], num_hidden_layers=4 if size == "teacher" else 2)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_global_layers": 1,
        "attention_heads": 2,
    }
    vision |= {
        "image_size": 8,
        "patch_size": 4,
        "vision_output_dim": 32,
        "intermediate_layers_indices": [0],
        "max_num_tiles": 1,
    }
    vision |= {"supported_aspect_ratios": [[1, 1]]}
    return transformers.MllamaForConditionalGeneration(
        transformers.MllamaConfig(text_config=text, vision_config=vision)
    )


MADE = {"Qwen2.5-VL": qwen, "Qwen3.5": qwen35, "Gemma3": gemma, "LLaVA": llava, "Mllama": mllama}


def saved(make: Any, size: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model = make(size).float().eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("name", MADE)
def test_only_the_text_of_its_own_class_is_seen(name: str, tmp_path: Path) -> None:
    found = Model.of(saved(MADE[name], "student", tmp_path / "model"))
    model: Any = found.skeleton()
    assert type(model).__name__ == found.config.architectures[0]
    assert found.spec.num_layers == 2
    decoder = {n for n, _ in model.named_modules() if n.startswith(found.spec.layers.rpartition(".")[0])}
    outside = {t.module for t in found.spec.targets} - decoder - {found.spec.head}
    assert not outside
    plan = Pairing(found.spec, found.spec, PlanOptions())
    assert not {t.module for t in plan.targets} - decoder - {found.spec.head}
    if name == "Mllama":
        # Its layer 1 attends to images alone.
        assert {t.layer for t in plan.targets} == {0, None}
    assert {"q", "k", "v", "o", "gate", "up", "down", "embed"} <= {
        r for t in found.spec.targets for r, _ in t.roles()
    } | {"q"}


# The files of Gemma 3 and LLaVA have names of their own, which transformers maps; they are streamed by the same mapping, and a
# warning that one is loaded whole would fail.
@pytest.mark.parametrize("name", ["Qwen3.5", "Gemma3", "LLaVA"])
def test_a_student_keeps_its_class_and_its_tower(name: str, tmp_path: Path) -> None:
    samples = oracle.token_samples(3, longest=12)
    examples = [Example(ids, [-100] * n + ids[n:], ids[:n], "", i) for i, (ids, n) in enumerate(samples, 1)]
    teacher, student = (saved(MADE[name], size, tmp_path / size) for size in ("teacher", "student"))
    ext = pkt.transfer(teacher, student, Seeds(examples, "seeds.jsonl", 3), rank=4, progress=False)
    assert "the student is multimodal" in ext.plan.notes[0]
    assert all(Model.of(folder).is_stored_one_by_one for folder in (teacher, student))
    truth = oracle.sensitivity(load_model(teacher), oracle.batched(samples, 1))
    layers = Model.of(teacher).spec.layers
    scored = torch.tensor(ext.plan.layer_scores)
    wanted = torch.stack([sum(t.sum() for n, t in truth.items() if n.startswith(f"{layers}.{i}.")) for i in range(3)])
    assert torch.allclose(scored.double(), wanted.double(), rtol=1e-4)
    model = pkt.inject(student, ext)
    lifecycle.steps(model, 3)
    pkt.finalize(model, tmp_path / "adapter", student=student, merge=tmp_path / "merged")
    trained = lifecycle.logits(model)
    served = load_with_adapter(student, tmp_path / "adapter")
    assert type(served.get_base_model()).__name__ == Model.of(student).config.architectures[0]
    for of in (served, load_model(tmp_path / "merged")):
        assert float((lifecycle.logits(of) - trained).abs().max()) <= 1e-3 * float(trained.abs().max())
    before, after = (load_file(folder / "model.safetensors") for folder in (student, tmp_path / "merged"))
    assert before.keys() == after.keys()
    tower = [n for n in before if "visual" in n or "vision" in n]
    assert tower
    assert all(torch.equal(before[n], after[n]) for n in tower)
    assert (tmp_path / "merged" / "preprocessor_config.json").is_file()
