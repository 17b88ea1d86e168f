"""Every tiny random model that tests run on: the usual ones, each family's teacher and student, and those for lineages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VOCAB = 67
_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(
    tied: bool = False,
    *,
    hidden: int = 48,
    layers: int = 3,
    heads: int = 4,
    kv: int = 2,
    ffn: int = 80,
    vocab: int = 67,
) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        attention_bias=False,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def gpt2(*, hidden: int = 32, layers: int = 2, heads: int = 4, vocab: int = 67) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocab,
        n_embd=hidden,
        n_layer=layers,
        n_head=heads,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


class MLP(nn.Module):
    """A classifier that has nothing to do with language."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 24), nn.LayerNorm(24), nn.ReLU(inplace=True), nn.Linear(24, 5))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


def gpt2_without_dropout(tied: bool, **size: int) -> Any:
    from transformers import GPT2LMHeadModel

    config = gpt2(**size).config
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    config.tie_word_embeddings = tied
    torch.manual_seed(1)
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def mistral() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(1)
    return MistralForCausalLM(
        MistralConfig(
            **_SMALL,
            sliding_window=5,
        )
    ).eval()


def gemma() -> Any:
    """Tied, scaled embeddings, and layers that alternate between sliding and full attention."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(2)
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            **_SMALL,
            head_dim=8,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ).eval()


def mixture() -> Any:
    """Fused experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(3)
    model = MixtralForCausalLM(
        MixtralConfig(
            **{**_SMALL, "intermediate_size": 24, "num_hidden_layers": 2},
            num_local_experts=4,
        )
    ).eval()
    model.set_experts_implementation("eager")
    return model


def trained_like(kind: str, *, seed: int = 0, tied: bool = False, **size: int) -> Any:
    """A model of a family with 6 layers of 64 hidden units, its weights spread like those of a trained one."""
    import transformers

    common = {
        "vocab_size": 400,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        **size,
    }
    more = {"num_key_value_heads": 4, "head_dim": 8, "tie_word_embeddings": tied, "pad_token_id": 0, "eos_token_id": 1}
    config = {
        "llama": lambda: transformers.LlamaConfig(**common, **more),
        "qwen3": lambda: transformers.Qwen3Config(**common, **more),
        "gemma2": lambda: transformers.Gemma2Config(**common, **more),
        "gemma3": lambda: transformers.Gemma3TextConfig(**common, **more),
        "mixtral": lambda: transformers.MixtralConfig(**common, **more, num_local_experts=4),
        "phi3": lambda: transformers.Phi3Config(**common, **more),
        "gpt2": lambda: transformers.GPT2Config(
            n_inner=common["intermediate_size"],
            tie_word_embeddings=True,
            **{name: value for name, value in common.items() if name != "intermediate_size"},
        ),
    }[kind]()
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            # Gains that differ, so that one taken for another shows.
            p.add_(torch.randn_like(p) * (0.3 if p.ndim == 1 else 0.02))
    return model


def _config(name: str, **given: Any) -> Any:
    import transformers

    return getattr(transformers, name)(**given)


def base(size: str, **more: Any) -> dict[str, Any]:
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
    return base(size, num_experts_per_tok=2)


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
    fields = _without(base(size), "intermediate_size", "num_key_value_heads", "head_dim")
    return _config(
        "OPTConfig",
        **fields,
        ffn_dim=base(size)["intermediate_size"],
        word_embed_proj_dim=fields["hidden_size"],
        dropout=0.0,
    )


def _falcon(size: str, **layout: Any) -> Any:
    fields = _without(base(size), "intermediate_size", "num_key_value_heads", "head_dim", "max_position_embeddings")
    return _config("FalconConfig", **fields, ffn_hidden_size=base(size)["intermediate_size"], **layout)


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
    "Llama": lambda size: _config("LlamaConfig", **base(size)),
    "Mistral": lambda size: _config("MistralConfig", **base(size, sliding_window=16)),
    "Qwen2": lambda size: _config("Qwen2Config", **_without(base(size), "head_dim")),
    "Qwen3": lambda size: _config("Qwen3Config", **base(size)),
    "Gemma2": lambda size: _config("Gemma2Config", **base(size, sliding_window=16, query_pre_attn_scalar=8)),
    "Gemma3 (text)": lambda size: _config("Gemma3TextConfig", **base(size, sliding_window=16, query_pre_attn_scalar=8)),
    "Phi-3": lambda size: _config("Phi3Config", **_without(base(size), "head_dim")),
    "GPT-2": _gpt2,
    "GPT-NeoX (Pythia)": lambda size: _config(
        "GPTNeoXConfig", **_without(base(size), "num_key_value_heads", "head_dim")
    ),
    "OPT": _opt,
    "Falcon": lambda size: _falcon(size, multi_query=False, new_decoder_architecture=False, parallel_attn=True),
    "Falcon (new decoder)": lambda size: _falcon(
        size, new_decoder_architecture=True, num_kv_heads=base(size)["num_key_value_heads"]
    ),
    "OLMo2": lambda size: _config("Olmo2Config", **_without(base(size), "head_dim")),
    "SmolLM3": lambda size: _config("SmolLM3Config", **_without(base(size), "head_dim")),
    "Granite": lambda size: _config("GraniteConfig", **_without(base(size), "head_dim")),
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
