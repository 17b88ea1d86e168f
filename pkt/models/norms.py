"""Which norm stands before which matrices, by the names that architectures give them."""

from __future__ import annotations

# What follows the norm -> names of its module, the most telling first: Gemma 2 and 3 norm the attention's output too.
NORMS: dict[str, tuple[str, ...]] = {
    "attention": ("input_layernorm", "ln_1", "attention_norm", "self_attn_layer_norm", "ln_attn"),
    "ffn": ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2", "ffn_norm", "final_layer_norm", "ln_mlp"),
    "head": ("norm", "ln_f", "final_layernorm", "final_layer_norm"),
}


def unit_offset(model_type: str) -> float:
    """What a norm adds to its stored gain: Gemma's are stored around zero."""
    return 1.0 if model_type.startswith(("gemma", "recurrent_gemma")) else 0.0
