"""Which layers of hybrids feed which: lists of mixed classes are found, and layers of a kind feed each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import transformers
import zoo

import pkt
from pkt.models import described, spec_of
from pkt.options import PlanOptions
from pkt.planning import Pairing
from pkt.seeds import Example, Seeds


def config_of(name: str, size: str = "teacher", **fields: Any) -> Any:
    return getattr(transformers, name)(**zoo.base(size, **fields))


def jamba(size: str, layers: int, **fields: Any) -> Any:
    """Attention in layers 1, 5, 9, ...; Mamba in the others."""
    sizes = {
        "mamba_d_state": 4,
        "mamba_dt_rank": 4 if size == "teacher" else 2,
        "num_experts": 2,
        "expert_layer_period": 99,
    }
    period = {"attn_layer_period": 4, "attn_layer_offset": 1, "expert_layer_offset": 98}
    return config_of("JambaConfig", size, num_hidden_layers=layers, **sizes, **period, **fields)


MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 2, "mamba_expand": 2}
ZAMBA2 = {
    "mamba_d_state": 4,
    "mamba_headdim": 8,
    "n_mamba_heads": 8,
    "mamba_ngroups": 1,
    "mamba_expand": 2,
    "attention_head_dim": 16,
    "adapter_rank": 4,
    "use_shared_attention_adapter": True,
    "num_mem_blocks": 1,
    "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (lambda: jamba("teacher", 6), 6),
        (lambda: config_of("Zamba2Config", num_hidden_layers=4, **ZAMBA2), 4),
        (lambda: config_of("BambaConfig", attn_layer_indices=[1], **MAMBA2), 3),
        (lambda: config_of("FalconH1Config", mamba_d_ssm=64, **MAMBA2), 3),
        (lambda: config_of("Qwen3_5TextConfig", layer_types=["linear_attention", "full_attention", "linear_attention"],
                           **LINEAR), 3),
        (lambda: config_of("GraniteMoeHybridConfig", layer_types=["mamba", "attention", "mamba"], num_local_experts=2,
                           shared_intermediate_size=16, **MAMBA2), 3),
        (lambda: config_of("RecurrentGemmaConfig", lru_width=32, block_types=["recurrent", "recurrent", "attention"]), 3),
        (lambda: config_of("Lfm2Config", layer_types=["conv", "full_attention", "conv"]), 3),
    ],
    ids=["Jamba", "Zamba2", "Bamba", "Falcon-H1", "Qwen3.5", "Granite", "RecurrentGemma", "LFM2"],
)  # fmt: skip
def test_layers_of_mixed_classes_are_found(config: Any, count: int) -> None:
    spec = spec_of(config())
    assert spec.layers == "model.layers"
    assert spec.num_layers == count


def pairing(teacher: Any, student: Any, **options: Any) -> Pairing:
    return Pairing(spec_of(teacher), spec_of(student), PlanOptions(**options))


def test_hybrids_of_different_depth_pair_layers_of_a_kind() -> None:
    found = pairing(jamba("teacher", 8), jamba("student", 4))
    scores = torch.tensor([5.0, 1, 9, 2, 8, 7, 6, 0])  # attention: 1 and 5
    assert found.choose_layers(scores) == [2, 5, 4, 6]
    assert [list(found.layers_for(place)) for place in range(4)] == [[0, 2, 3, 4], [1, 5], [2, 3, 4, 6], [3, 4, 6, 7]]
    assert pairing(jamba("teacher", 8), jamba("student", 4), layers="first").fixed == [0, 1, 2, 3]
    assert pairing(jamba("teacher", 8), jamba("student", 4), layers="last").fixed == [4, 5, 6, 7]
    assert pairing(jamba("teacher", 8), jamba("student", 4), layers=[7, 1, 6, 0]).fixed == [7, 1, 6, 0]
    with pytest.raises(pkt.PktError, match=r"layers\.0\.mamba\.in_proj .*the teacher has no matrix in that place"):
        pairing(jamba("teacher", 8), jamba("student", 4), layers=[1, 1, 6, 0])


def test_a_transformer_is_fed_by_a_hybrids_attention_layers() -> None:
    llama = config_of("LlamaConfig", "student")
    assert pairing(jamba("teacher", 8), llama).choose_layers(torch.arange(8.0)) == [1, 5]
    # Every layer has an FFN.
    assert pairing(jamba("teacher", 8), llama, modules="ffn").choose_layers(torch.arange(8.0)) == [6, 7]
    with pytest.raises(pkt.PktError, match=r"3 of the student's layers .* only 2 of .*\(1, 5\).* \(--layers 0,2,5"):
        pairing(jamba("teacher", 8), config_of("LlamaConfig", "student", num_hidden_layers=3))
    named = pairing(jamba("teacher", 8), config_of("LlamaConfig", "student", num_hidden_layers=3), layers=[1, 5, 5])
    assert named.fixed == [1, 5, 5]


def test_a_hybrid_is_transferred_by_kinds(tmp_path: Path) -> None:
    samples = oracle.token_samples(3, longest=12)
    examples = [Example(ids, [-100] * n + ids[n:], ids[:n], "", i) for i, (ids, n) in enumerate(samples, 1)]
    made = []
    for size, layers in (("teacher", 6), ("student", 3)):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(jamba(size, layers)).eval()
        model.set_experts_implementation("eager")
        for parameter in model.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
        made.append(model)
    sens = pkt.sensitivity(made[0], oracle.batched(samples, 1), progress=False)
    plan = pkt.plan(sens, *made)
    ext = pkt.transfer(*made, Seeds(examples, "seeds.jsonl", 3), rank=2, progress=False)
    assert ext.plan.layer_map == plan.layer_map
    assert plan.layer_map[1] in (1, 5)
    assert not {1, 5} & {plan.layer_map[0], plan.layer_map[2]}
    assert {(e.source, e.target, e.region) for e in ext.plan.entries} == {
        (e.source, e.target, e.region) for e in plan.entries
    }
    assert any("dt_proj" in note and "left out" in note for note in plan.notes)
    assert not any(name.endswith("dt_proj") for name in ext.pairs)
    pkt.inject(made[1], ext)


def test_layers_that_lack_a_role_feed_none_that_has_it() -> None:
    """Gemma 3n's last layers take their keys from earlier ones."""
    teacher = transformers.AutoModelForCausalLM.from_config(config_of("LlamaConfig", num_hidden_layers=4))
    for layer in teacher.model.layers[2:3]:
        del layer.self_attn.k_proj
    llama = config_of("LlamaConfig", "student")
    assert pairing(teacher, llama).choose_layers(torch.tensor([1.0, 0.0, 9.0, 2.0])) == [0, 3]
    assert pairing(teacher, llama, modules="all,-k").choose_layers(torch.tensor([1.0, 0.0, 9.0, 2.0])) == [2, 3]


def test_a_second_stack_is_left_out_with_a_line() -> None:
    made = []
    for size in ("teacher", "student"):
        model = transformers.AutoModelForCausalLM.from_config(config_of("LlamaConfig", size))
        model.model.draft = torch.nn.ModuleList([type(model.model.layers[0])(model.config, 0)])
        made.append(model)
    found = pairing(*made)
    assert not any("draft" in t.module for t in found.targets)
    assert any(
        note.startswith("model.draft.0.self_attn.q_proj is left out: it is in another list") for note in found.notes
    )


def test_what_cannot_be_adapted_is_refused_before_the_teacher_is_read() -> None:
    def mamba(size: str, layers: int) -> Any:
        fields = {"num_heads": 8 if size == "teacher" else 4, "state_size": 4, "n_groups": 1}
        return config_of("Mamba2Config", size, num_hidden_layers=layers, **fields)

    found = pairing(mamba("teacher", 3), mamba("student", 2))
    assert {t.suffix for t in found.targets if t.layer is not None} == {"mixer.in_proj"}
    assert any(note.startswith("mixer.out_proj of 2 layers is left out: PEFT's adapters") for note in found.notes)
    with pytest.raises(pkt.PktError, match=r"leaves nothing to transfer: mixer\.out_proj"):
        pairing(mamba("teacher", 3), mamba("student", 2), modules=r"out_proj")


def test_rows_that_cannot_be_told_apart_are_left_out_with_a_line() -> None:
    """Qwen3-Next's blocks between models of other head counts are cut by their parts; a teacher's odd q is not cut at all."""
    teacher = transformers.AutoModelForCausalLM.from_config(config_of("LlamaConfig"))
    for layer in teacher.model.layers:
        layer.self_attn.q_proj = torch.nn.Linear(32, 20, bias=False)
    student = transformers.AutoModelForCausalLM.from_config(config_of("LlamaConfig", "student"))
    found = pairing(teacher, student)
    assert "self_attn.q_proj" not in {t.suffix for t in found.targets}
    assert any("self_attn.q_proj of 2 layers is left out: the teacher's" in note for note in found.notes)


JETMOE = {"num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 2, "num_experts_per_tok": 1}


def test_experts_in_a_form_unknown_are_left_out_with_a_line() -> None:
    jetmoe = {who: config_of("JetMoeConfig", who, **JETMOE) for who in ("teacher", "student")}
    theirs = "mlp.input_linear.weight, mlp.output_linear.weight, self_attention.experts.input_linear.weight"
    found = pairing(jetmoe["teacher"], jetmoe["student"])
    notes = [note for note in found.notes if "experts" in note]
    assert [note.partition(" (")[0] for note in notes] == [
        f"the {who}'s experts are left out: they lie in a form unknown to pkt" for who in ("teacher", "student")
    ]
    assert all(theirs in note for note in notes)
    rows = {name: role for name, _, role in described(spec_of(jetmoe["student"]))}
    assert rows["model.layers.*.mlp.input_linear.weight"] == "experts in a form unknown to pkt: left alone"
    dbrx = {"d_model": 16, "n_heads": 2, "n_layers": 1, "vocab_size": 64}
    ffn = {"ffn_hidden_size": 24, "moe_num_experts": 2, "moe_top_k": 1, "hidden_size": 16}
    attention = {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}
    spec = spec_of(transformers.DbrxConfig(**dbrx, ffn_config=ffn, attn_config=attention))
    assert spec.unknown == dict.fromkeys([f"ffn.experts.mlp.{w}" for w in ("w1", "v1", "w2")], (48, 16))
    # Experts that pkt knows, their biases and their routers are not told of.
    assert not spec_of(config_of("GptOssConfig", num_local_experts=2)).unknown
    assert not spec_of(config_of("DeepseekV3Config", n_routed_experts=4, num_experts_per_tok=2)).unknown
