"""What pkt knows of architectures by name: what each matrix is for, how fused ones lie, how files call them.

An architecture that uses other names is taught to pkt by a line in `ROLES` (here, or in a JSON file of the same form given to
`roles=`), a fused projection with another layout by a line in `FUSED` (docs/adding-an-architecture.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pkt.errors import PktError
from pkt.files import read_json

Kind: TypeAlias = Literal["linear", "conv1d", "embedding"]

Runs: TypeAlias = tuple[tuple[int, int], ...]

# Last part, or last two parts, of a module's or expert parameter's name -> (role, group). `modules=` of pkt.plan selects by
# role or group; matrices of one role feed each other whatever they are called.
ROLES: dict[str, tuple[str, str]] = {
    "q_proj": ("q", "attention"),
    "q_a_proj": ("q_a", "attention"),
    "q_b_proj": ("q_b", "attention"),
    "k_proj": ("k", "attention"),
    "v_proj": ("v", "attention"),
    "o_proj": ("o", "attention"),
    "out_proj": ("o", "attention"),
    "wo": ("o", "attention"),
    "attn.c_proj": ("o", "attention"),
    "attention.dense": ("o", "attention"),
    "self_attention.dense": ("o", "attention"),
    "self_attn.dense": ("o", "attention"),
    "c_attn": ("qkv", "attention"),
    "qkv_proj": ("qkv", "attention"),
    "Wqkv": ("qkv", "attention"),
    "wqkv": ("qkv", "attention"),
    "query_key_value": ("qkv", "attention"),
    "gate_proj": ("gate", "ffn"),
    "up_proj": ("up", "ffn"),
    "down_proj": ("down", "ffn"),
    "gate_up_proj": ("gate_up", "ffn"),
    "w1": ("gate", "ffn"),
    "w3": ("up", "ffn"),
    "w2": ("down", "ffn"),
    "c_fc": ("up", "ffn"),
    "mlp.c_proj": ("down", "ffn"),
    "fc1": ("up", "ffn"),
    "fc2": ("down", "ffn"),
    "fc_in": ("up", "ffn"),
    "fc_out": ("down", "ffn"),
    "shared_mlp.input_linear": ("shared_gate_up", "ffn"),
    "shared_mlp.output_linear": ("shared_down", "ffn"),
    "dense_h_to_4h": ("up", "ffn"),
    "dense_4h_to_h": ("down", "ffn"),
    # An expert that every token visits is not one of those a router chooses between.
    **{
        f"{shared}.{role}_proj": (f"shared_{role}", "ffn")
        for shared in ("shared_expert", "shared_experts")
        for role in ("gate", "up", "down")
    },
}


@dataclass(frozen=True)
class Fused:
    """How the rows of a fused projection lie: `groups` blocks one after another, each with its share of every role in order.

    groups: "kv_heads": as many as there are k (and v) heads, the queries of a group in front of its k and v; "rows": a row of
    each role by turns; another word: a size of the module that owns the projection. sizes: the rows of each role in all, as
    sizes of that module multiplied; without them those of q, k and v follow from the head counts, and others share alike.
    """

    roles: tuple[str, ...]
    groups: int | str = 1
    sizes: tuple[str, ...] = ()


# Role, module's name, or "model_type:name" -> layout; the most special one counts. Head counts follow from the shapes.
FUSED: dict[str, Fused] = {
    "qkv": Fused(("q", "k", "v")),
    "gate_up": Fused(("gate", "up")),
    "shared_gate_up": Fused(("shared_gate", "shared_up")),
    "query_key_value": Fused(("q", "k", "v"), "kv_heads"),
    "wqkv": Fused(("q", "k", "v"), "kv_heads"),
    "gpt_bigcode:c_attn": Fused(("q", "k", "v"), "kv_heads"),
    "codegen:qkv_proj": Fused(("q", "v", "k"), 4),
}

# The rows of a q_proj twice as high as its heads: of each head its queries, then the gate of its output.
GATED = Fused(("q", "q_gate"), "heads")

# Projections whose rows only the sizes of their module tell apart, by name or "model_type:name": the first that adds up counts.
SIZED: dict[str, tuple[Fused, ...]] = {
    "in_proj_qkvz": (
        Fused(
            ("delta_q", "delta_k", "delta_v", "delta_z"),
            "num_k_heads",
            ("key_dim", "key_dim", "value_dim", "value_dim"),
        ),
    ),
    "in_proj_ba": (Fused(("delta_b", "delta_a"), "num_k_heads", ("num_v_heads", "num_v_heads")),),
    "in_proj_qkv": (Fused(("delta_q", "delta_k", "delta_v"), 1, ("key_dim", "key_dim", "value_dim")),),
    "in_proj": (
        Fused(
            ("ssm_z", "ssm_x", "ssm_B", "ssm_C", "ssm_dt"),
            1,
            (
                "intermediate_size",
                "intermediate_size",
                "n_groups*ssm_state_size",
                "n_groups*ssm_state_size",
                "num_heads",
            ),
        ),
        Fused(("ssm_x", "ssm_z"), 1, ("intermediate_size", "intermediate_size")),
        Fused(("conv_B", "conv_C", "conv_x"), 1, ("config.hidden_size",) * 3),
    ),
    "zamba:in_proj": (Fused(("ssm_x", "ssm_z"), "rows", ("intermediate_size", "intermediate_size")),),
    "x_proj": (Fused(("ssm_dt", "ssm_B", "ssm_C"), 1, ("time_step_rank", "ssm_state_size", "ssm_state_size")),),
    "minimax:qkv_proj": (
        Fused(("linear_q", "linear_k", "linear_v"), "num_attention_heads", ("num_attention_heads*head_dim",) * 3),
    ),
    "kv_b_proj": (Fused(("k_b", "v_b"), "num_heads", ("num_heads*qk_nope_head_dim", "num_heads*v_head_dim")),),
    "kv_a_proj_with_mqa": (Fused(("kv_a", "k_rope"), 1, ("kv_lora_rank", "qk_rope_head_dim")),),
}

# Mixers that are no attention over a model's own tokens: what their matrices' roles begin with, so that none feeds attention.
MIXERS = ("ssm", "delta", "conv", "linear", "cross")

# All that `modules=` may name.
NAMED_ROLES = frozenset(
    {role for role, _ in ROLES.values()}
    | {
        role
        for layout in (*FUSED.values(), GATED, *(f for found in SIZED.values() for f in found))
        for role in layout.roles
    }
    | {f"{mixer}_{role}" for mixer in MIXERS for role in ("q", "k", "v", "o")}
    | {"embed", "head", "o_gate"}
)

# Rows (q, k, v) or columns (o) of these roles are heads side by side.
HEAD_ROWS = ("q", "k", "v", "q_gate", "q_b")

HEAD_COLUMNS = ("o",)

# Matrices that an adapter of PEFT's would not change, or that PEFT refuses, by the model_type: their module hands their weight
# itself to a kernel, past the adapter. PEFT's own list is of the out_proj of five of these.
UNADAPTABLE: dict[str, tuple[str, ...]] = {
    "mamba": ("x_proj", "dt_proj", "out_proj"),
    "falcon_mamba": ("x_proj", "dt_proj", "out_proj"),
    "mamba2": ("out_proj",),
    "falcon_h1": ("out_proj",),
    "nemotron_h": ("out_proj",),
    "bamba": ("out_proj",),
    "granitemoehybrid": ("out_proj",),
    "zamba2": ("out_proj",),
    "jamba": ("dt_proj",),
}

# How checkpoints name what transformers has renamed since: part of a parameter's name -> in the files.
RENAMED = {"lm_head.weight": "embed_out.weight", ".mlp.": ".block_sparse_moe."}

# The matrices that files hold for each expert -> the 3-D parameter transformers joins them into, in this order.
EXPERT_FILES = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}

# 3-D parameters of experts that PEFT can adapt, as every module registers them: its adapter files say it by nesting alone.
EXPERT_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")

# Tables that PEFT knows by name.
PEFT_EMBEDDINGS = ("embed_tokens", "lm_head")

# Tables of positions: a row longer than one cannot be read. XGLM's grows, under a name of its own.
POSITION_TABLES = (
    "wpe",
    "embed_positions",
    "position_embedding",
    "position_embeddings",
    "positions_embed",
    "pos_encoding",
)

# Names of settings that count modules or sizes, and more than any model has.
LARGEST = (
    (r"(layers?|blocks|depth)$", 2_000),
    (r"(experts|heads?)$", 20_000),
    (r"(hidden_size|intermediate_size|ffn_dim|d_model|d_ff|n_embd|n_inner|head_dim|vocab_size)$", 20_000_000),
)

# Settings that make logits something else than the head's product (Gemma 2, Granite, Cohere).
LOGIT_SETTINGS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


def known(name: str, table: Mapping[str, Any]) -> str | None:
    parts = name.split(".")
    return next((key for key in (".".join(parts[-2:]), parts[-1]) if key in table), None)


def role_of(module: str, roles: Mapping[str, tuple[str, str]] = ROLES) -> tuple[str, str]:
    key = known(module, roles)
    return ("", "other") if key is None else roles[key]


def read_roles(roles: Mapping[str, Any] | str | Path) -> dict[str, tuple[str, str]]:
    """Lines for `ROLES`. Raises `PktError` for what is not of their form."""
    value = read_json(Path(roles)) if isinstance(roles, (str, Path)) else roles
    known = sorted({role for role, _ in ROLES.values()})
    if not isinstance(value, Mapping):
        raise PktError(f'{roles}: a role file is a JSON object such as {{"fc_up": ["up", "ffn"]}}')
    lines = {}
    for name, line in value.items():
        if not isinstance(line, (list, tuple)) or len(line) != 2 or line[0] not in known:
            raise PktError(
                f'roles: {name!r} has {line!r}; give [role, group] such as ["up", "ffn"], role one of {", ".join(known)}'
            )
        if line[1] not in ("attention", "ffn"):
            raise PktError(f"roles: {name!r} has the group {line[1]!r}; choose attention or ffn")
        lines[str(name)] = (str(line[0]), str(line[1]))
    return lines


# What follows the norm -> names of its module, the most telling first: Gemma 2 and 3 norm the attention's output too.
NORMS: dict[str, tuple[str, ...]] = {
    "attention": ("input_layernorm", "ln_1", "attention_norm", "self_attn_layer_norm", "ln_attn"),
    "ffn": ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2", "ffn_norm", "final_layer_norm", "ln_mlp"),
    "head": ("norm", "ln_f", "final_layernorm", "final_layer_norm"),
}


def unit_offset(model_type: str) -> float:
    """What a norm adds to its stored gain: Gemma's are stored around zero."""
    return 1.0 if model_type.startswith(("gemma", "recurrent_gemma")) else 0.0


# What a configuration calls its sizes, beside the names that `attribute_map` gives them.
SIZES: dict[str, tuple[str, ...]] = {
    "hidden": ("hidden_size", "word_embed_proj_dim"),
    "neurons": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "neurons of an expert": ("moe_intermediate_size",),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "experts at once": ("num_experts_per_tok",),
    "layers": ("num_hidden_layers",),
    "heads": ("num_attention_heads",),
    "groups": ("num_key_value_heads", "num_kv_heads"),
}

# Norms within the attention; over one head each, or (OLMo 2) over all heads together.
HEAD_NORMS = ("q_norm", "k_norm")


def embedding_scale(config: Any) -> float:
    """What a model multiplies its embeddings by that follows from their width: Gemma, by its square root."""
    return float(config.hidden_size) ** 0.5 if str(config.model_type).startswith(("gemma", "recurrent_gemma")) else 1.0
