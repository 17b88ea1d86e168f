"""Tiny random models of every family pkt is tested on, each of its own class, and the families' pairs."""

from __future__ import annotations

from typing import Any

import torch

VOCAB = 67


def _config(name: str, **given: Any) -> Any:
    import transformers

    return getattr(transformers, name)(**given)


def _base(size: str, **more: Any) -> dict[str, Any]:
    """The usual fields: a teacher, or a student smaller in every direction."""
    hidden, ffn, layers, heads, kv = (32, 48, 3, 4, 2) if size == "teacher" else (16, 32, 2, 2, 1)
    return {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **more,
    }


def _without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in fields.items() if k not in names}


def _moe(size: str) -> dict[str, Any]:
    return _base(size, num_experts_per_tok=2)


def _gpt2(size: str) -> Any:
    hidden, layers, heads = (32, 3, 4) if size == "teacher" else (16, 2, 2)
    return _config(
        "GPT2Config",
        vocab_size=VOCAB,
        n_embd=hidden,
        n_layer=layers,
        n_head=heads,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )


def _opt(size: str) -> Any:
    fields = _without(_base(size), "intermediate_size", "num_key_value_heads", "head_dim")
    return _config(
        "OPTConfig",
        **fields,
        ffn_dim=_base(size)["intermediate_size"],
        word_embed_proj_dim=fields["hidden_size"],
        dropout=0.0,
    )


def _falcon(size: str, **layout: Any) -> Any:
    fields = _without(_base(size), "intermediate_size", "num_key_value_heads", "head_dim", "max_position_embeddings")
    return _config("FalconConfig", **fields, ffn_hidden_size=_base(size)["intermediate_size"], **layout)


def _deepseek(size: str) -> Any:
    fields = _without(_moe(size), "head_dim", "num_key_value_heads")
    heads = fields["num_attention_heads"]
    ranks = (16, 16) if size == "teacher" else (8, 8)
    return _config(
        "DeepseekV3Config",
        **fields,
        num_key_value_heads=heads,
        moe_intermediate_size=40 if size == "teacher" else 16,
        n_routed_experts=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        q_lora_rank=ranks[0],
        kv_lora_rank=ranks[1],
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_group=1,
        topk_group=1,
    )


# Family -> configuration of its teacher and student sizes.
FAMILIES: dict[str, Any] = {
    "Llama": lambda size: _config("LlamaConfig", **_base(size)),
    "Mistral": lambda size: _config("MistralConfig", **_base(size, sliding_window=16)),
    "Qwen2": lambda size: _config("Qwen2Config", **_without(_base(size), "head_dim")),
    "Qwen3": lambda size: _config("Qwen3Config", **_base(size)),
    "Gemma2": lambda size: _config("Gemma2Config", **_base(size, sliding_window=16, query_pre_attn_scalar=8)),
    "Gemma3 (text)": lambda size: _config(
        "Gemma3TextConfig", **_base(size, sliding_window=16, query_pre_attn_scalar=8)
    ),
    "Phi-3": lambda size: _config("Phi3Config", **_without(_base(size), "head_dim")),
    "GPT-2": _gpt2,
    "GPT-NeoX (Pythia)": lambda size: _config(
        "GPTNeoXConfig", **_without(_base(size), "num_key_value_heads", "head_dim")
    ),
    "OPT": _opt,
    "Falcon": lambda size: _falcon(size, multi_query=False, new_decoder_architecture=False, parallel_attn=True),
    "Falcon (new decoder)": lambda size: _falcon(
        size, new_decoder_architecture=True, num_kv_heads=_base(size)["num_key_value_heads"]
    ),
    "OLMo2": lambda size: _config("Olmo2Config", **_without(_base(size), "head_dim")),
    "SmolLM3": lambda size: _config("SmolLM3Config", **_without(_base(size), "head_dim")),
    "Granite": lambda size: _config("GraniteConfig", **_without(_base(size), "head_dim")),
    "Mixtral": lambda size: _config("MixtralConfig", **_moe(size), num_local_experts=4),
    "Qwen3-MoE": lambda size: _config(
        "Qwen3MoeConfig", **_moe(size), num_experts=4, moe_intermediate_size=40 if size == "teacher" else 16
    ),
    "GPT-OSS": lambda size: _config("GptOssConfig", **_moe(size), num_local_experts=4, sliding_window=16),
    "DeepSeek-V3": _deepseek,
}


def model(family: str, size: str = "teacher", **change: Any) -> Any:
    """A random model of a family in fp32, its experts in the implementation that fp64 has too."""
    from transformers import AutoModelForCausalLM

    from pkt.models import quiet

    config = FAMILIES[family](size)
    for key, value in change.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    with quiet():
        made = AutoModelForCausalLM.from_config(config).eval()
    if hasattr(made, "set_experts_implementation"):
        made.set_experts_implementation("eager")
    for parameter in made.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return made
