"""All that pkt knows about Hugging Face architectures: where the decoder layers are, what each matrix is for, how to load.

Nothing here names a model class. Layers are found in the module tree, roles by the short tables below; an architecture that
uses other names is taught to pkt by a line in `ROLES` (here, or in a JSON file of the same form given to `roles=`), a fused
projection with another layout by a line in `FUSED` (docs/adding-an-architecture.md).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from pkt.errors import PktError
from pkt.files import read_json, safetensors_header, sha256

Kind: TypeAlias = Literal["linear", "conv1d", "embedding"]
Runs: TypeAlias = tuple[tuple[int, int], ...]

# Last part, or last two parts, of a module's or expert parameter's name -> (role, group). `modules=` of pkt.plan selects by
# role or group; matrices of one role feed each other whatever they are called.
ROLES: dict[str, tuple[str, str]] = {
    "q_proj": ("q", "attention"),
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

    "kv_heads": as many groups as there are k (and v) heads, the queries of a group in front of its k and v.
    """

    roles: tuple[str, ...]
    groups: int | Literal["kv_heads", "rows"] = 1


# Role, module's name, or "model_type:name" -> layout; the most special one counts. Head counts follow from the shapes.
FUSED: dict[str, Fused] = {
    "qkv": Fused(("q", "k", "v")),
    "gate_up": Fused(("gate", "up")),
    "query_key_value": Fused(("q", "k", "v"), "kv_heads"),
    "wqkv": Fused(("q", "k", "v"), "kv_heads"),
    "gpt_bigcode:c_attn": Fused(("q", "k", "v"), "kv_heads"),
    "codegen:qkv_proj": Fused(("q", "v", "k"), 4),
}

# Rows (q, k, v) or columns (o) of these roles are heads side by side.
HEAD_ROWS = ("q", "k", "v")
HEAD_COLUMNS = ("o",)

# How checkpoints name what transformers has renamed since: part of a parameter's name -> in the files.
RENAMED = {"lm_head.weight": "embed_out.weight", ".mlp.": ".block_sparse_moe."}
# The matrices that files hold for each expert -> the 3-D parameter transformers joins them into, in this order.
EXPERT_FILES = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
# 3-D parameters of experts that PEFT can adapt, as every module registers them: its adapter files say it by nesting alone.
EXPERT_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")

# Quantizations that transformers undoes, and the packages that it takes (GGUF files: gguf).
DEQUANTIZED: dict[str, tuple[str, ...]] = {"bitsandbytes": ("bitsandbytes", "accelerate")}

# Architectures (model_type) that tests/test_families.py runs end to end. Others work by discovery, or say what is missing.
TESTED = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt2",
    "gpt_neox",
    "opt",
    "falcon",
    "olmo2",
    "smollm3",
    "granite",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v3",
)

# Tables that PEFT knows by name.
PEFT_EMBEDDINGS = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class Target:
    """One matrix that knowledge can be taken from or given to: a linear layer or an embedding table."""

    module: str
    kind: Kind
    shape: tuple[int, int]  # [out, in] of the product, whatever the parameter's layout; an embedding is [vocabulary, d]
    role: str
    group: str  # attention, ffn, embedding, router or other
    layer: int | None = None
    suffix: str = ""  # the module's name within its layer; its whole name outside the layers
    experts: int = 0  # of a 3-D parameter [experts, out, in], which `module` then names; `shape` is one expert's
    parts: tuple[tuple[str, Runs], ...] = ()  # the rows of each role of a fused projection

    @property
    def parameter(self) -> str:
        return self.module if self.experts else f"{self.module}.weight"

    @property
    def stored_shape(self) -> tuple[int, ...]:
        shape = self.shape if self.kind != "conv1d" else self.shape[::-1]
        return (self.experts, *shape) if self.experts else shape

    def roles(self) -> tuple[tuple[str, Runs], ...]:
        """(role, its rows) for every role of the matrix."""
        return self.parts or ((self.role, ((0, self.shape[0]),)),)

    def oriented(self, matrix: Tensor, expert: int | None = None) -> Tensor:
        """The parameter (or its scores), or one expert of it, as `shape`: Conv1D stores its weight [in, out]. A view."""
        matrix = matrix if expert is None else matrix[expert]
        return matrix.t() if self.kind == "conv1d" else matrix


@dataclass(frozen=True)
class ModelSpec:
    """What a plan needs to know of a model; made without its weights."""

    name: str
    model_type: str
    targets: tuple[Target, ...]
    layers: str | None  # name of the list of decoder layers
    num_layers: int
    vocab_size: int | None
    head_dim: int | None
    tied: bool
    head: str | None = None  # the module that gives the logits
    heads: int | None = None
    config: dict[str, Any] = field(repr=False, default_factory=dict)

    def by_module(self) -> dict[str, Target]:
        return {t.module: t for t in self.targets}

    def identity(self) -> dict[str, Any]:
        """What is written beside a result, and compared when it is used again."""
        shapes = sorted(f"{t.module}{list(t.stored_shape if t.experts else t.shape)}" for t in self.targets)
        return {
            "name": self.name,
            "model_type": self.model_type,
            "num_layers": self.num_layers,
            "vocab_size": self.vocab_size,
            "tied_head": self.head if self.tied else None,
            "shapes": sha256("\n".join(shapes)),
        }


def check_identity(recorded: Any, spec: ModelSpec, what: str) -> None:
    """Raises `PktError` when what is recorded of a model (`ModelSpec.identity`) is another model's; its name may differ."""
    if not isinstance(recorded, dict):
        return
    found = spec.identity()
    changed = [k for k in ("model_type", "num_layers", "vocab_size", "shapes") if recorded.get(k, found[k]) != found[k]]
    if changed:
        raise PktError(
            f"{what} was made from another model ({recorded.get('name')}) than {spec.name}: {', '.join(changed)} differ"
        )


def decoder_layers(model: nn.Module) -> str | None:
    """The name of the ModuleList that holds the decoder layers: the largest list of like modules, or None."""
    best, size = None, 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and len({type(m) for m in module}) == 1:
            parameters = sum(p.numel() for p in module.parameters())
            if parameters > size and not isinstance(module[0], nn.Linear):
                best, size = name, parameters
    return best


# Settings that make logits something else than the head's product (Gemma 2, Granite, Cohere).
_LOGIT_SETTINGS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


def plain_head(model: Any) -> tuple[nn.Linear, nn.Module] | None:
    """(head, the model below it) when logits may be nothing but their product; only running the model confirms it."""
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "base_model"):
        return None
    head, below = model.get_output_embeddings(), model.base_model
    if below is model or type(head) is not nn.Linear or getattr(head, "bias", None) is not None:
        return None
    config = getattr(model, "config", None)
    if any(getattr(config, name, None) not in (None, 1, 1.0) for name in _LOGIT_SETTINGS):
        return None
    return head, below


def layer_of(parameter: str, layers: str | None) -> int | None:
    """The decoder layer a parameter or module belongs to, or None."""
    if layers is None:
        return None
    match = re.match(re.escape(layers) + r"\.(\d+)(\.|$)" if layers else r"(\d+)(\.|$)", parameter)
    return int(match[1]) if match else None


def kind_of(module: nn.Module) -> Kind | None:
    """How a module uses its weight, or None when pkt has no fast path for it."""
    if isinstance(module, nn.Linear):
        return "linear"
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return "conv1d"
    return "embedding" if isinstance(module, nn.Embedding) else None


def _known(name: str, table: Mapping[str, Any]) -> str | None:
    parts = name.split(".")
    return next((key for key in (".".join(parts[-2:]), parts[-1]) if key in table), None)


def _role(module: str, roles: Mapping[str, tuple[str, str]] = ROLES) -> tuple[str, str]:
    key = _known(module, roles)
    return ("", "other") if key is None else roles[key]


def _fused_rows(layout: Fused, rows: int, heads: int | None, head_dim: int | None) -> tuple[tuple[str, Runs], ...]:
    """The rows of each role; nothing when they do not come out even, and the matrix is then known only as a whole."""
    groups: int
    if "q" in layout.roles:
        if not heads or not head_dim or rows % head_dim or (rows // head_dim - heads) % 2:
            return ()
        kv = (rows // head_dim - heads) // 2
        sizes = {"q": heads * head_dim, "k": kv * head_dim, "v": kv * head_dim}
        groups = kv if layout.groups == "kv_heads" else int(layout.groups)
    else:
        sizes = dict.fromkeys(layout.roles, rows // len(layout.roles))
        groups = rows // len(layout.roles) if layout.groups == "rows" else int(layout.groups)
    if groups < 1 or sum(sizes.values()) != rows or any(size < groups or size % groups for size in sizes.values()):
        return ()
    found: dict[str, list[tuple[int, int]]] = {role: [] for role in layout.roles}
    start = 0
    for _ in range(groups):
        for role in layout.roles:
            found[role].append((start, start + sizes[role] // groups))
            start += sizes[role] // groups
    return tuple((role, tuple(found[role])) for role in layout.roles)


def with_roles(spec: ModelSpec, roles: Mapping[str, Any] | str | Path | None) -> ModelSpec:
    """The spec with more lines for `ROLES`: a mapping or a JSON file, {"name": ["role", "group"]}."""
    if roles is None:
        return spec
    lines = read_roles(roles)
    targets = []
    for target in spec.targets:
        if _known(target.module, lines) is None or target.group == "embedding":
            targets.append(target)
            continue
        role, group = _role(target.module, lines)
        layout = FUSED.get(target.module.split(".")[-1]) or FUSED.get(role)
        parts = () if layout is None else _fused_rows(layout, target.shape[0], spec.heads, spec.head_dim)
        targets.append(dataclasses.replace(target, role=role, group=group, parts=parts))
    return dataclasses.replace(spec, targets=tuple(targets))


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


def spec_of_model(model: nn.Module, name: str = "") -> ModelSpec:
    """The spec of a model in memory (its weights may be on the meta device)."""
    layers = decoder_layers(model)
    config: Any = getattr(model, "config", None)
    embedding = _call(model, "get_input_embeddings")
    head = _call(model, "get_output_embeddings")
    tied = head is not None and embedding is not None and head.weight is embedding.weight
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(text, "num_attention_heads", None)
    head_dim = getattr(text, "head_dim", None)
    if head_dim is None and heads:
        head_dim = text.hidden_size // heads
    model_type = str(getattr(config, "model_type", type(model).__name__))

    def described(target: Target, layout: Fused | None = None) -> Target:
        """The target with its place in the model and the rows of its roles."""
        name, last = target.module, target.module.split(".")[-1]
        layer = layer_of(name, layers)
        layout = layout or FUSED.get(f"{model_type}:{last}") or FUSED.get(last) or FUSED.get(target.role)
        return dataclasses.replace(
            target,
            layer=layer,
            suffix=name if layer is None else name[len(f"{layers}.{layer}.") if layers else len(f"{layer}.") :],
            parts=() if layout is None else _fused_rows(layout, target.shape[0], heads, head_dim),
        )

    targets, head_name = [], None
    for module_name, module in model.named_modules():
        if module is head:
            head_name = module_name
        targets += [described(*found) for found in _experts(module_name, module)]
        kind = kind_of(module)
        if kind is None:
            continue
        weight = module.weight
        assert isinstance(weight, Tensor)
        rows, cols = weight.shape if kind != "conv1d" else weight.t().shape
        if kind == "linear":
            # A 4-bit layer packs its weight, so its shape says nothing.
            rows, cols = int(module.out_features), int(module.in_features)
        if module is head:
            if tied:
                continue
            role, group = "head", "embedding"
        elif module is embedding:
            role, group = "embed", "embedding"
        else:
            role, group = _role(module_name)
        targets.append(described(Target(module_name, kind, (rows, cols), role, group)))
    targets = _with_routers(targets)
    count = max((t.layer for t in targets if t.layer is not None), default=-1) + 1
    return ModelSpec(
        name=name or str(getattr(config, "name_or_path", "") or type(model).__name__),
        model_type=model_type,
        targets=tuple(targets),
        layers=layers,
        num_layers=count,
        vocab_size=getattr(text, "vocab_size", None) or (None if embedding is None else embedding.weight.shape[0]),
        head_dim=head_dim,
        tied=tied,
        head=head_name,
        heads=heads,
        config=config.to_dict() if hasattr(config, "to_dict") else {},
    )


def _experts(name: str, module: nn.Module) -> Iterator[tuple[Target, Fused | None]]:
    """Experts that lie in one 3-D parameter: [experts, out, in], or [experts, in, out] where their module says so."""
    for key, parameter in module._parameters.items():
        if parameter is None or parameter.ndim != 3 or _known(key, ROLES) is None:
            continue
        experts, rows, cols = parameter.shape
        kind: Kind = "conv1d" if getattr(module, "is_transposed", False) else "linear"
        role, group = _role(key)
        layout = FUSED.get(role)
        if layout is not None and not getattr(module, "is_concatenated", True):
            layout = dataclasses.replace(layout, groups="rows")
        shape = (cols, rows) if kind == "conv1d" else (rows, cols)
        yield Target(f"{name}.{key}", kind, shape, role, group, experts=experts), layout


def _with_routers(targets: list[Target]) -> list[Target]:
    """Matrices of no known role beside experts, with a row for each of them or for the shared one, are their routers."""
    beside = {t.module.rpartition(".")[0].rpartition(".")[0]: t.experts for t in targets if t.experts}
    return [
        dataclasses.replace(t, role="router", group="router")
        if not t.role and any(t.shape[0] in (1, n) and t.module.startswith(f"{home}.") for home, n in beside.items())
        else t
        for t in targets
    ]


def checked_device(device: str | torch.device) -> torch.device:
    """The device a name means. Raises `PktError` for one that pkt does not run on, or that is not here."""
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise PktError(f"{device!r} is not a device; use cpu, cuda or cuda:0") from error
    if found.type not in ("cpu", "cuda"):
        raise PktError(f"device {str(found)!r}: pkt runs on cpu and cuda")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise PktError(f"device {str(found)!r}: torch sees {torch.cuda.device_count()} CUDA devices here; use cpu")
    return found


def _call(model: nn.Module, method: str) -> Any:
    function: Any = getattr(model, method, None)
    if function is None:
        return None
    try:
        return function()
    except (NotImplementedError, AttributeError):
        return None


def spec_of(model: Any) -> ModelSpec:
    """The spec of a model, a configuration or a checkpoint directory; reads no weights.

    Raises `PktError` for a directory that is not a checkpoint.
    """
    if isinstance(model, ModelSpec):
        return model
    if isinstance(model, nn.Module):
        return spec_of_model(unwrap(model))
    name = str(model) if isinstance(model, (str, Path)) else str(getattr(model, "name_or_path", "") or "config")
    config = load_config(model) if isinstance(model, (str, Path)) else model
    return spec_of_model(skeleton(config), name)


def skeleton(config: Any) -> nn.Module:
    """The model of a configuration on the meta device: every module and shape, no weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), quiet():
        try:
            model: nn.Module = AutoModelForCausalLM.from_config(config)
        except (ValueError, KeyError) as error:
            kind = getattr(config, "model_type", type(config).__name__)
            where = getattr(config, "name_or_path", "") or "the configuration"
            raise PktError(
                f"{where}: transformers has no causal language model for {kind!r}; pkt reads decoders (AutoModelForCausalLM)"
            ) from error
        except Exception as error:  # whatever a modeling file does with numbers that make no sense
            raise PktError(
                f"{getattr(config, 'name_or_path', '') or 'the configuration'}: no model can be built from this "
                f"config.json ({type(error).__name__}: {first_line(error)}); copy it again"
            ) from error
    tie: Any = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()
    return model


def _kept_in_fp32(model: Any, dtype: torch.dtype | None) -> Callable[[str], bool]:
    """Whether transformers loads a tensor in fp32 all the same: the strict ones for both half types, the others for fp16."""
    half = list(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        half += list(getattr(model, "_keep_in_fp32_modules", None) or ())
    if dtype not in (torch.float16, torch.bfloat16) or not half:
        return lambda name: False
    found = re.compile("|".join(pattern.replace("*", ".*") for pattern in half))
    return lambda name: found.search(name) is not None


def hollow_model(config: Any, dtype: torch.dtype | None, device: torch.device) -> nn.Module:
    """The model of a configuration with its parameters on meta, in the types they are loaded in, and its computed buffers on
    `device`.

    Buffers that no checkpoint holds (rotary frequencies) are made as transformers makes them after loading.
    """
    model: Any = skeleton(config)
    for module in model.modules():
        missing = [k for k, b in module._buffers.items() if b is not None and k in module._non_persistent_buffers_set]
        for key in missing:
            module._buffers[key] = torch.empty_like(module._buffers[key], device="cpu")
        if missing:
            with torch.no_grad():
                model._init_weights(module)
        for key in missing:
            module._buffers[key] = module._buffers[key].to(device)
    kept = _kept_in_fp32(model, dtype)
    for prefix, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or dtype is None or not tensor.is_floating_point():
                continue
            if key not in module._non_persistent_buffers_set:
                tensor.data = tensor.data.to(torch.float32 if kept(f"{prefix}.{key}") else dtype)
    model.eval()
    assert isinstance(model, nn.Module)
    return model


def unwrap(model: nn.Module) -> nn.Module:
    """The plain model inside a PeftModel or a compiled or data-parallel wrapper."""
    inner: Any = getattr(model, "_orig_mod", model)
    if hasattr(inner, "get_base_model") and hasattr(inner, "peft_config"):
        inner = inner.get_base_model()
    assert isinstance(inner, nn.Module)
    return inner


def first_line(error: BaseException) -> str:
    lines = (str(error).strip() or type(error).__name__).splitlines()
    # A heading says nothing without what it announces.
    return " ".join([lines[0], *[line.strip() for line in lines[1:2]]]) if lines[0].endswith(":") else lines[0]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' loading bars and notices off the terminal: pkt says what matters itself."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def _local(path: str | Path) -> Path | None:
    """The directory a name means, or None when it must be a name on the Hub."""
    path = Path(path)
    if path.is_dir():
        return path
    if path.is_file():
        raise PktError(f"{path} is a file; name the checkpoint directory that holds it")
    if path.is_absolute() or str(path).startswith((".", "~")) or len(path.parts) != 2:
        raise PktError(f"{path} does not exist; name a checkpoint directory or a model on the Hub (owner/name)")
    return None


def load_config(path: str | Path) -> Any:
    """The configuration of a checkpoint directory or of a model on the Hub."""
    from transformers import AutoConfig

    local = _local(path)
    if local is not None:
        if (local / "adapter_config.json").is_file() and not (local / "config.json").is_file():
            raise PktError(f"{path} is an adapter folder; a model directory with a config.json is needed here")
        if _gguf(path) is None:
            read_json(local / "config.json")
    try:
        with quiet():
            config = AutoConfig.from_pretrained(str(path), **_gguf_option(path))
            if _gguf(path) is not None and hasattr(config, "quantization_config"):
                # Its weights are whole again once loaded.
                del config.quantization_config
            return config
    except Exception as error:  # a configuration class raises what it likes for values that make no sense
        raise PktError(f"{path}: {_unreadable(local, error)}") from error


def _unreadable(local: Path | None, error: Exception) -> str:
    if local is None and isinstance(error, OSError):
        return f"there is no such folder here, and the Hub does not give it either: {first_line(error)}"
    return f"not a model transformers can read: {first_line(error)}"


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a checkpoint directory or of a model on the Hub."""
    from transformers import AutoTokenizer

    _local(path)
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(str(path), **_gguf_option(path))
    except Exception as error:  # tokenizers raises bare Exception for a broken file
        raise PktError(f"{path}: no usable tokenizer there ({first_line(error)}); save one beside the model") from error


def check_checkpoint(path: str | Path) -> None:
    """Refuse a checkpoint directory with a missing, truncated or unsafe weight file, before any of it is loaded.

    Raises `PktError` naming the file. A model on the Hub is left to transformers.
    """
    local = _local(path)
    if local is None or _gguf(path) is not None:
        return
    index = local / "model.safetensors.index.json"
    if index.is_file():
        value = read_json(index)
        weight_map = value.get("weight_map") if isinstance(value, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise PktError(f"{index} does not say which file holds which weight; copy the checkpoint again")
        headers = {shard: safetensors_header(local / shard) for shard in sorted(set(weight_map.values()))}
        for name, shard in weight_map.items():
            if name not in headers[shard]:
                raise PktError(
                    f"{local / shard} lacks {name}, which {index.name} places there; copy the checkpoint again"
                )
        return
    if (local / "model.safetensors").is_file():
        safetensors_header(local / "model.safetensors")
        return
    pickles = sorted(local.glob("*.bin"))
    if not pickles:
        raise PktError(f"{path} has no model.safetensors; save the model there with save_pretrained")
    for file in pickles:
        try:
            torch.load(file, map_location="meta", weights_only=True)
        except Exception as error:  # torch.load raises many types for a bad pickle
            raise PktError(
                f"{file} is a pickle that cannot be loaded safely ({first_line(error)}); convert it to safetensors"
            ) from error


def _gguf(path: str | Path) -> Path | None:
    """The GGUF file of a directory that holds nothing else to load."""
    local = _local(path)
    if local is None or (local / "config.json").is_file():
        return None
    files = sorted(local.glob("*.gguf"))
    if len(files) > 1:
        raise PktError(f"{path} holds {len(files)} GGUF files; leave one of them there")
    return files[0] if files else None


def _gguf_option(path: str | Path) -> dict[str, Any]:
    file = _gguf(path)
    if file is None:
        return {}
    if importlib.util.find_spec("gguf") is None:
        raise PktError(f"{file} needs the package gguf to be read: pip install gguf")
    return {"gguf_file": file.name}


def check_quantization(path: str | Path) -> None:
    """Refuse a teacher whose quantized weights cannot be made whole here, from its configuration alone."""
    method = _quantization(load_config(path))
    if method is None:
        return
    if method not in DEQUANTIZED:
        raise PktError(
            f"{path} is quantized with {method}, which pkt cannot undo; convert it to bf16 or fp16 safetensors, or to GGUF"
        )
    missing = [name for name in DEQUANTIZED[method] if importlib.util.find_spec(name) is None]
    if missing:
        raise PktError(
            f"{path} is quantized with {method}; install {', '.join(missing)}, or convert it to bf16 or fp16 safetensors"
        )


def _quantization(config: Any) -> str | None:
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method", "an unnamed method") if isinstance(found, dict) else found.quant_method
    return str(getattr(method, "value", method))


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    dequantize: bool = False,
) -> Any:
    """A causal language model from a checkpoint directory or the Hub, in eval mode, in its own dtype unless one is given.

    A GGUF file is read at its dequantized weights, fp32 unless a dtype is given. dequantize: give back whole weights for a
    checkpoint of bitsandbytes too. Raises `PktError` for a damaged checkpoint, for one that leaves parameters of the model
    unset, and, with `dequantize`, for a quantization that cannot be undone.
    """
    from transformers import AutoModelForCausalLM

    check_checkpoint(path)
    quantized = _quantization(load_config(path)) is not None
    if dequantize:
        check_quantization(path)
    option = _gguf_option(path)
    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                str(path), dtype=dtype or (torch.float32 if option else "auto"), output_loading_info=True, **option
            )
            if quantized and dequantize:
                model = model.dequantize()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise PktError(f"{path}: cannot be loaded: {first_line(error)}") from error
    missing = sorted(info.get("missing_keys", ())) + sorted(str(k) for k in info.get("mismatched_keys", ()))
    if missing:
        raise PktError(
            f"{path}: the checkpoint does not fill {', '.join(missing[:5])}; it is incomplete or another model's"
        )
    return model.eval().to(device)


def fingerprint(model: Any) -> str:
    """A hash that changes when a checkpoint does: names, shapes and file ends, not every byte of a large model."""
    if isinstance(model, (str, Path)) and Path(model).is_dir():
        parts: list[bytes | str] = []
        for file in sorted([*Path(model).glob("*.safetensors"), *Path(model).glob("*.gguf")]):
            with open(file, "rb") as handle:
                parts += [file.name, str(file.stat().st_size), handle.read(1 << 16)]
                handle.seek(max(0, file.stat().st_size - (1 << 16)))
                parts.append(handle.read())
        return sha256(*parts)
    if isinstance(model, nn.Module):
        parts = []
        for name, parameter in unwrap(model).named_parameters():
            flat = parameter.detach().flatten()
            ends = torch.cat([flat[:64], flat[-64:]]).float().cpu()
            parts += [name, str(tuple(parameter.shape)), ends.numpy().tobytes()]
        return sha256(*parts)
    return sha256(json.dumps(spec_of(model).identity(), sort_keys=True))


def check_tokenizer(tokenizer: Any, spec: ModelSpec) -> None:
    """Refuse a tokenizer that can produce ids the model has no embedding for."""
    size = len(tokenizer)
    if spec.vocab_size is not None and size > spec.vocab_size:
        raise PktError(
            f"the tokenizer has {size} tokens but {spec.name} embeds only {spec.vocab_size}; "
            "use the tokenizer that was saved with the model"
        )


def shared_vocabulary(teacher: Any, student: Any) -> list[tuple[int, int]]:
    """(teacher's id, student's id) of every token both tokenizers have, by the student's id.

    Tokens are compared as strings; the marks "▁" and "Ġ" both mean a space.
    """
    spelled = {token.replace("▁", "Ġ"): index for token, index in teacher.get_vocab().items()}
    pairs = [(spelled.get(token.replace("▁", "Ġ"), -1), index) for token, index in student.get_vocab().items()]
    return sorted(((t, s) for t, s in pairs if t >= 0), key=lambda pair: pair[1])


def other_ids(teacher: Any, student: Any) -> int:
    """How many of the student tokenizer's tokens the teacher's gives another id, or does not have."""
    known = teacher.get_vocab()
    return sum(known.get(token) != index for token, index in student.get_vocab().items())


def supported() -> list[tuple[str, bool, str]]:
    """(what, whether it works here, why) for checkpoint formats and architectures."""
    rows = [
        ("safetensors", True, "read one decoder layer at a time"),
        ("pickle (*.bin)", True, "loaded whole, where that is safe; convert to safetensors to stream it"),
    ]
    for name, packages in (("GGUF", ("gguf",)), *DEQUANTIZED.items()):
        missing = [p for p in packages if importlib.util.find_spec(p) is None]
        why = "loaded whole, scored at its dequantized weights"
        rows.append((name, not missing, f"pip install {' '.join(missing)}" if missing else why))
    rows.append(("other quantizations", False, "convert to bf16 or fp16 safetensors, or to GGUF"))
    from transformers import CONFIG_MAPPING

    for name in TESTED:
        here = name in CONFIG_MAPPING
        rows.append((name, here, "tested end to end" if here else "this version of transformers does not have it"))
    rows.append(("other causal language models", True, "by discovery; `pkt models DIR` shows what is found"))
    return rows


def described(spec: ModelSpec) -> list[tuple[str, str, str]]:
    """(matrix in its place, shape, what pkt takes it for) for each kind of matrix of a model."""
    rows: dict[str, tuple[str, str, str]] = {}
    for target in spec.targets:
        name = target.module if target.layer is None else f"{spec.layers}.*.{target.suffix}"
        shape = " x ".join(map(str, (*((target.experts,) if target.experts else ()), *target.shape)))
        roles = ", ".join(role for role, _ in target.roles() if role)
        if not roles:
            roles = (
                "unknown: fed from the same name only, or by --map or --roles"
                if target.layer is not None
                else "left alone"
            )
        rows.setdefault(f"{name} {shape}", (name, shape, f"{roles} (each of its experts)" if target.experts else roles))
    return list(rows.values())


def stored_names(name: str, shape: tuple[int, ...], prefix: str) -> Iterator[list[str]]:
    """Ways in which a checkpoint may hold a parameter: the tensors whose bytes, one after another, are it."""
    names = [name, name.removeprefix(prefix)]
    names += [name.replace(now, then) for now, then in RENAMED.items() if now in name]
    yield from ([n] for n in names)
    if len(shape) == 3:
        for full in names:
            parent, _, key = full.rpartition(".")
            for parts in EXPERT_FILES.get(key, ()):
                yield [f"{parent}.{expert}.{part}.weight" for expert in range(shape[0]) for part in parts]


class Weights:
    """Parameters by name, one at a time: of a model in memory, or straight out of a safetensors checkpoint."""

    def __init__(self, model: Any) -> None:
        self.model: nn.Module | None = unwrap(model) if isinstance(model, nn.Module) else None
        self.path = model
        self.files: dict[str, Path] = {}
        if self.model is None:
            check_checkpoint(model)
            local = _local(model)
            for file in sorted(local.glob("*.safetensors")) if local else ():
                self.files.update({key: file for key in safetensors_header(file) if key != "__metadata__"})

    def __getitem__(self, name: str) -> Tensor:
        if self.model is None and name not in self.files:
            # Saved under other names (an old layout, a pickle, the Hub): let transformers map them.
            self.model = load_model(self.path, dequantize=True)
        if self.model is not None:
            try:
                return self.model.get_parameter(name).detach()
            except AttributeError as error:
                raise PktError(f"the model has no parameter {name}; the plan was made for another model") from error
        from safetensors import safe_open

        with safe_open(self.files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor
