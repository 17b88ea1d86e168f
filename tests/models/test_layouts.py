"""Which rows and axes of a matrix are which role's, in families whose names alone would not tell."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from pkt.models import UNADAPTABLE, Target, spec_of, spec_of_model
from pkt.models.huggingface import skeleton

BASE = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LINEAR = {
    "linear_num_value_heads": 8,
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 6,
}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 2, "mamba_expand": 2}


def config_of(name: str, **fields: Any) -> Any:
    return getattr(transformers, name)(**{**BASE, **fields})


def target_of(config: Any, end: str) -> Target:
    return next(t for t in spec_of(config).targets if t.module.endswith(end))


def rows_of(target: Target) -> dict[str, list[int]]:
    return {role: [i for a, b in runs for i in range(a, b)] for role, runs in target.parts}


def shares(*sizes: int) -> list[list[int]]:
    """Rows one after another."""
    return [t.tolist() for t in torch.arange(sum(sizes)).split(list(sizes))]


@pytest.mark.parametrize("name", ["Qwen3NextConfig", "Qwen3_5TextConfig", "Qwen3_5MoeTextConfig"])
def test_a_gated_q_proj_has_its_queries_and_gates_by_heads(name: str) -> None:
    more = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16} if "5Text" not in name else {}
    target = target_of(config_of(name, **LINEAR, layer_types=["full_attention"] * 2, **more), "0.self_attn.q_proj")
    by_head = torch.arange(64).view(4, 2, 8)
    assert rows_of(target) == {"q": by_head[:, 0].flatten().tolist(), "q_gate": by_head[:, 1].flatten().tolist()}
    assert target.head == 8


def test_qwen3_next_blocks_lie_as_its_own_code_orders_them() -> None:
    config = config_of(
        "Qwen3NextConfig",
        **LINEAR,
        layer_types=["linear_attention"] * 2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    )
    mixer: Any = skeleton(config, "").get_submodule("model.layers.0.linear_attn")
    qkvz, ba = (torch.arange(getattr(mixer, n).out_features)[None, None] for n in ("in_proj_qkvz", "in_proj_ba"))
    query, key, value, z, b, a = (t.flatten().tolist() for t in mixer.fix_query_key_value_ordering(qkvz, ba))
    assert rows_of(target_of(config, "0.linear_attn.in_proj_qkvz")) == {
        "delta_q": query,
        "delta_k": key,
        "delta_v": value,
        "delta_z": z,
    }
    assert rows_of(target_of(config, "0.linear_attn.in_proj_ba")) == {"delta_b": b, "delta_a": a}
    assert target_of(config, "0.linear_attn.out_proj").role == "delta_o"


DEEPSEEK = {"q_lora_rank": 16, "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}
SSM = ("ssm_z", "ssm_x", "ssm_B", "ssm_C", "ssm_dt")

# Configuration, matrix, its roles, their rows: what `split`, `chunk` and `view` of the modeling file say.
BY_HAND: list[tuple[str, dict[str, Any], str, tuple[str, ...], list[list[int]]]] = [
    ("Qwen3_5TextConfig", LINEAR | {"layer_types": ["linear_attention"] * 2}, "in_proj_qkv",
     ("delta_q", "delta_k", "delta_v"), shares(16, 16, 48)),
    ("MambaConfig", {"state_size": 4, "time_step_rank": 3}, "in_proj", ("ssm_x", "ssm_z"), shares(48, 48)),
    ("MambaConfig", {"state_size": 4, "time_step_rank": 3}, "x_proj", ("ssm_dt", "ssm_B", "ssm_C"), shares(3, 4, 4)),
    ("Mamba2Config", {"num_heads": 8, "state_size": 4, "n_groups": 2}, "in_proj", SSM, shares(64, 64, 8, 8, 8)),
    ("BambaConfig", MAMBA2 | {"attn_layer_indices": [1]}, "in_proj", SSM, shares(64, 64, 8, 8, 8)),
    ("JambaConfig", {"mamba_d_state": 4, "mamba_dt_rank": 3, "num_experts": 2, "attn_layer_offset": 1,
                     "attn_layer_period": 2}, "in_proj", ("ssm_x", "ssm_z"), shares(64, 64)),
    ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}, "conv.in_proj", ("conv_B", "conv_C", "conv_x"),
     shares(32, 32, 32)),
    ("DeepseekV3Config", DEEPSEEK, "kv_a_proj_with_mqa", ("kv_a", "k_rope"), shares(12, 4)),
    ("DeepseekV3Config", DEEPSEEK, "kv_b_proj", ("k_b", "v_b"),
     [torch.arange(56).view(4, 14)[:, :8].flatten().tolist(), torch.arange(56).view(4, 14)[:, 8:].flatten().tolist()]),
    ("MiniMaxConfig", {"layer_types": ["linear_attention"] * 2, "num_local_experts": 2}, "qkv_proj",
     ("linear_q", "linear_k", "linear_v"), [torch.arange(96).view(4, 3, 8)[:, i].flatten().tolist() for i in range(3)]),
    ("BloomConfig", {}, "query_key_value", ("q", "k", "v"),
     [torch.arange(96).view(4, 3, 8)[:, i].flatten().tolist() for i in range(3)]),
    ("MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 2}, "Wqkv", ("q", "k", "v"), shares(32, 32, 32)),
    ("GraniteMoeSharedConfig", {"shared_intermediate_size": 20, "num_local_experts": 2}, "shared_mlp.input_linear",
     ("shared_gate", "shared_up"), shares(20, 20)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "end", "roles", "rows"), BY_HAND, ids=[f"{c[0]}-{c[2]}" for c in BY_HAND])
def test_fused_projections_lie_as_their_modeling_file_cuts_them(
    name: str, fields: dict[str, Any], end: str, roles: tuple[str, ...], rows: list[list[int]]
) -> None:
    target = target_of(config_of(name, **fields), end)
    assert rows_of(target) == dict(zip(roles, rows, strict=True))
    assert not target.doubt


def test_heads_of_latent_attention_have_their_own_sizes() -> None:
    config = config_of("DeepseekV3Config", **DEEPSEEK)
    assert [
        (t.role, t.head) for t in (target_of(config, "0.self_attn.q_b_proj"), target_of(config, "0.self_attn.o_proj"))
    ] == [
        ("q_b", 12),
        ("o", 6),
    ]
    assert target_of(config, "0.self_attn.q_a_proj").head == 0


def test_a_gate_of_attentions_output_is_no_ffn() -> None:
    spec = spec_of(config_of("AfmoeConfig", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16))
    found = {t.suffix: (t.role, t.group) for t in spec.targets if t.layer == 0 and t.suffix.endswith("gate_proj")}
    assert found["self_attn.gate_proj"] == ("o_gate", "attention")
    assert found["mlp.gate_proj"] == ("gate", "ffn")


def test_rows_that_are_no_whole_heads_have_no_parts() -> None:
    model = skeleton(config_of("LlamaConfig"), "")
    attention: Any = model.get_submodule("model.layers.0.self_attn")
    attention.q_proj = nn.Linear(32, 20, device="meta")
    mlp: Any = model.get_submodule("model.layers.1.mlp")
    mlp.up_proj = nn.Linear(32, 96, device="meta")
    found = spec_of_model(model).by_module()
    assert "20 rows are not those of 4 heads of 8" in found["model.layers.0.self_attn.q_proj"].doubt
    assert "96 rows are not those of 48 neurons" in found["model.layers.1.mlp.up_proj"].doubt
    assert not found["model.layers.1.self_attn.q_proj"].doubt


class Experts(nn.Module):
    def __init__(self, up: tuple[int, int], down: tuple[int, int], **said: bool) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(2, *up))
        self.down_proj = nn.Parameter(torch.empty(2, *down))
        for name, value in said.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    ("experts", "kind", "doubt"),
    [
        (Experts((48, 32), (32, 24)), "linear", ""),
        (Experts((32, 48), (24, 32)), "conv1d", ""),
        (Experts((32, 48), (24, 32), is_transposed=True), "conv1d", ""),
        (Experts((32, 48), (24, 32), is_transposed=False), "linear", "its shape is not that of experts"),
        (Experts((40, 32), (32, 24)), "linear", "its shape is not that of experts"),
    ],
)
def test_experts_lie_as_their_shapes_fit(experts: nn.Module, kind: str, doubt: str) -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([experts])
    for target in spec_of_model(model).targets:
        assert target.kind == kind
        assert doubt in target.doubt
        assert bool(doubt) == bool(target.doubt)


def test_llama_4s_experts_are_fed_and_left_out_by_their_axes() -> None:
    config = config_of("Llama4TextConfig", intermediate_size=24, num_local_experts=2, interleave_moe_layer_step=1)
    target = target_of(config, "0.feed_forward.experts.gate_up_proj")
    assert (target.kind, target.shape) == ("conv1d", (48, 32))
    assert rows_of(target) == {"gate": list(range(24)), "up": list(range(24, 48))}
    assert "PEFT takes these experts" in target.unadaptable


def test_what_peft_refuses_is_known_without_it() -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba as check

    refused = []
    for kind in transformers.CONFIG_MAPPING:
        try:
            check(LoraConfig(), SimpleNamespace(config=SimpleNamespace(model_type=kind)), "out_proj")
        except ValueError:
            refused.append(kind)
    assert refused
    assert all("out_proj" in UNADAPTABLE[kind] for kind in refused)


def test_an_adapter_of_what_is_named_would_change_nothing() -> None:
    """Mamba's dt_proj: PEFT wraps it without a word, and the module multiplies by its weight all the same."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = config_of("MambaConfig", state_size=4, time_step_rank=3)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(12)[None]

    def logits(of: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = of(input_ids=ids).logits
        return found.clone()

    before = logits(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["dt_proj"], init_lora_weights=False))
    assert torch.equal(logits(adapted), before)
    assert {t.module.rpartition(".")[2] for t in spec_of(config).targets if t.unadaptable} == set(UNADAPTABLE["mamba"])
