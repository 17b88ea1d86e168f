"""What a plan needs to know of a model, found in its module tree: the decoder layers, and every matrix with its role.

Nothing here names a model class: layers are the largest list of like modules, roles come from the tables by name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pkt.errors import PktError
from pkt.files import sha256
from pkt.manifest import difference
from pkt.models.layouts import Place, lies_transposed, lying, runs_of
from pkt.models.positions import position_limit
from pkt.models.tables import FUSED, LOGIT_SETTINGS, ROLES, UNADAPTABLE, Kind, Runs, known, read_roles, role_of


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
    head: int = 0  # rows of one head of q, k or v, columns of one of o, where they are known
    doubt: str = ""  # why its rows or axes cannot be told apart, so that nothing may be cut from it or for it
    unadaptable: str = ""  # why no adapter can change it

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
    multimodal: str = ""  # the name of its class, where that reads more than text
    unknown: Mapping[str, tuple[int, ...]] = field(
        default_factory=dict
    )  # shapes of experts' parameters that are no targets
    positions: int | None = None  # the longest row in tokens, where it has a table of positions
    config: dict[str, Any] = field(repr=False, default_factory=dict)
    content: Mapping[str, str] = field(
        repr=False, default_factory=dict
    )  # hashes of weights and configuration, where asked for

    def __repr__(self) -> str:
        return f"ModelSpec({self.name}: {self.model_type}, {self.num_layers} layers, {len(self.targets)} matrices)"

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
            **self.content,
        }


def check_identity(recorded: Any, spec: ModelSpec, what: str) -> None:
    """Raises `PktError` when what is recorded of a model (`ModelSpec.identity`) is another model's; its name may differ.

    Content is compared where both have it, of the same kind of weights.
    """
    if not isinstance(recorded, dict):
        return
    apart = {"name", "tied_head", "revision"}
    if content_kind(recorded) != content_kind(spec.content):
        apart |= {"fingerprint", "configuration"}
    found = {k: v for k, v in spec.identity().items() if k in recorded and k not in apart}
    then, now = ({_SPOKEN.get(k, k): which[k] for k in found} for which in (recorded, found))
    different = difference(then, now)
    if different:
        raise PktError(
            f"{what} was made from another model ({recorded.get('name')}) than {spec.name}: {', '.join(different)}"
        )


_SPOKEN = {"fingerprint": "weights"}


def content_kind(recorded: Mapping[str, Any]) -> str:
    """Where the weights were whose hash is recorded, files or memory; empty for none, or one of an older pkt."""
    kind, colon, _ = str(recorded.get("fingerprint", "")).partition(":")
    return kind if colon else ""


def decoder_layers(model: nn.Module) -> str | None:
    """The name of the ModuleList that holds the decoder layers, or None.

    It is as long as the configuration says, or else its modules are of one class, and it is the largest such: lists inside of
    layers (experts, adapters) are smaller. Where the model says what its decoder is, no list of a tower is looked at.
    """
    config: Any = getattr(model, "config", None)
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    count = getattr(text, "num_hidden_layers", None)
    decoder = _call(model, "get_decoder")
    best, rank = None, (False, 0)
    for name, module in _lists(model, decoder) or _lists(model, None):
        as_said = len(module) == count
        if not as_said and len({type(m) for m in module}) > 1:
            continue
        found = as_said, sum(p.numel() for p in module.parameters())
        if found > rank:
            best, rank = name, found
    return best


def _lists(model: nn.Module, part: Any) -> list[tuple[str, nn.ModuleList]]:
    """The ModuleLists of a model, or of a part of it, that hold more than linear layers."""
    inside = None if part is None or part is model else {id(m) for m in part.modules()}
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and not isinstance(module[0], nn.Linear)
        and (inside is None or id(module) in inside)
    ]


def plain_head(model: Any) -> tuple[nn.Linear, nn.Module] | None:
    """(head, the model below it) when logits may be nothing but their product; only running the model confirms it."""
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "base_model"):
        return None
    head, below = model.get_output_embeddings(), model.base_model
    if below is model or type(head) is not nn.Linear or getattr(head, "bias", None) is not None:
        return None
    config = getattr(model, "config", None)
    if any(getattr(config, name, None) not in (None, 1, 1.0) for name in LOGIT_SETTINGS):
        return None
    return head, below


def tables_of(model: nn.Module) -> tuple[Any, Any]:
    """The module that embeds the tokens and the one that gives their logits; None where the model does not say."""
    return _call(model, "get_input_embeddings"), _call(model, "get_output_embeddings")


def is_tied(model: nn.Module) -> bool:
    """Whether the head's weight is the embedding's."""
    embedding, head = tables_of(model)
    return head is not None and embedding is not None and head.weight is embedding.weight


def hidden_size(model: nn.Module) -> int | None:
    """The width of the hidden states between decoder layers, as its configuration or its embedding has it."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, "hidden_size", None) or getattr(tables_of(model)[0], "embedding_dim", None)
    return None if found is None else int(found)


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


def with_roles(spec: ModelSpec, roles: Mapping[str, Any] | str | Path | None) -> ModelSpec:
    """The spec with more lines for `ROLES`: a mapping or a JSON file, {"name": ["role", "group"]}."""
    if roles is None:
        return spec
    lines = read_roles(roles)
    targets = []
    for target in spec.targets:
        if known(target.module, lines) is None or target.group == "embedding":
            targets.append(target)
            continue
        role, group = role_of(target.module, lines)
        layout = FUSED.get(target.module.split(".")[-1]) or FUSED.get(role)
        parts = () if layout is None else runs_of(layout, target.shape[0], None, spec.heads, spec.head_dim)
        targets.append(dataclasses.replace(target, role=role, group=group, parts=parts, doubt=""))
    return dataclasses.replace(spec, targets=tuple(targets))


def spec_of_model(model: nn.Module, name: str = "") -> ModelSpec:
    """The spec of a model in memory (its weights may be on the meta device)."""
    layers = decoder_layers(model)
    config: Any = getattr(model, "config", None)
    embedding, head = tables_of(model)
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads, head_dim = _heads_of(text)
    model_type = str(getattr(config, "model_type", type(model).__name__))
    text_type = str(getattr(text, "model_type", model_type))
    towers = _towers(model, config, text)

    def placed(target: Target) -> Target:
        """The target with its place in the model, and why no adapter can change it."""
        name, last = target.module, target.module.rpartition(".")[2]
        layer = layer_of(name, layers)
        unadaptable = target.unadaptable
        if last in UNADAPTABLE.get(text_type, ()):
            unadaptable = "PEFT's adapters do not reach it: its module takes its weight past them"
        return dataclasses.replace(
            target,
            layer=layer,
            suffix=name if layer is None else name[len(f"{layers}.{layer}.") if layers else len(f"{layer}.") :],
            unadaptable=unadaptable,
        )

    targets = _with_routers([placed(found) for found in _matrices(model, text, text_type, towers)])
    stack: Any = () if layers is None else model.get_submodule(layers)
    return ModelSpec(
        name=name or str(getattr(config, "name_or_path", "") or type(model).__name__),
        model_type=model_type,
        targets=tuple(targets),
        layers=layers,
        num_layers=len(stack),
        vocab_size=_rows(embedding) or getattr(text, "vocab_size", None),
        head_dim=head_dim,
        tied=is_tied(model),
        head=next((n for n, module in model.named_modules() if module is head), None),
        heads=heads,
        multimodal=type(model).__name__ if towers else "",
        unknown=dict(_unknown_experts(model, layers, {t.parameter for t in targets})),
        positions=position_limit(model, layers),
        config=config.to_dict() if hasattr(config, "to_dict") else {},
    )


def _rows(embedding: Any) -> int | None:
    """Tokens that the table has; what the configuration says of them may be another number, and none of the model's."""
    return int(embedding.num_embeddings) if isinstance(embedding, nn.Embedding) else None


def _heads_of(text: Any) -> tuple[int | None, int | None]:
    """(query heads, their size) of a configuration; None where it has none, or where its layers differ in it (Gemma 4)."""
    try:
        heads = getattr(text, "num_attention_heads", None)
    except RuntimeError:
        heads = None
    try:
        head_dim = getattr(text, "head_dim", None)
        return heads, text.hidden_size // heads if head_dim is None and heads else head_dim
    except RuntimeError:
        return heads, None


def _towers(model: nn.Module, config: Any, text: Any) -> set[int]:
    """The modules of a multimodal model that read something else than text: those outside of its decoder, embedding and head."""
    decoder = None if text is config else _call(model, "get_decoder")
    if decoder is None or decoder is model:
        return set()
    read = {id(m) for part in (decoder, *tables_of(model)) if part is not None for m in part.modules()}
    return {id(m) for m in model.modules()} - read


def _matrices(model: nn.Module, text: Any, text_type: str, towers: set[int]) -> Iterator[Target]:
    """Every matrix by its module, with what it is for and how it lies; a tied head is the embedding, a tower's are none."""
    embedding, head = tables_of(model)
    tables = {id(embedding): ("embed", "embedding"), id(head): ("head", "embedding")}
    skipped = head if is_tied(model) else None
    places = {name: Place(module, name.rpartition(".")[2], text) for name, module in model.named_modules()}
    for name, module in model.named_modules():
        if id(module) in towers:
            continue
        yield from _experts(name, module, places[name])
        kind = kind_of(module)
        if kind is None or module is skipped:
            continue
        shape = _product_shape(module, kind)
        if kind == "embedding" or id(module) in tables:
            yield Target(name, kind, shape, *(tables.get(id(module)) or role_of(name)))
        else:
            yield Target(name, kind, shape, **vars(lying(name, shape, places[name.rpartition(".")[0]], text_type)))


def _product_shape(module: Any, kind: Kind) -> tuple[int, int]:
    if kind == "linear":
        # A 4-bit layer packs its weight, so its shape says nothing.
        return int(module.out_features), int(module.in_features)
    rows, cols = module.weight.shape if kind != "conv1d" else module.weight.t().shape
    return rows, cols


def _experts(name: str, module: nn.Module, place: Place) -> Iterator[Target]:
    """Experts that lie in one 3-D parameter: [experts, out, in], or [experts, in, out]."""
    stacked = {
        key: parameter
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim == 3 and known(key, ROLES) is not None
    }
    transposed, doubt = lies_transposed(module, stacked, place.size("hidden_size"))
    for key, parameter in stacked.items():
        experts, rows, cols = parameter.shape
        role, group = role_of(key)
        layout = FUSED.get(role)
        if layout is not None and not getattr(module, "is_concatenated", True):
            layout = dataclasses.replace(layout, groups="rows")
        shape = (cols, rows) if transposed else (rows, cols)
        yield Target(
            f"{name}.{key}",
            "conv1d" if transposed else "linear",
            shape,
            role,
            group,
            experts=experts,
            parts=() if layout is None else runs_of(layout, shape[0], None, None, None),
            doubt=doubt,
            unadaptable="PEFT takes these experts for [experts, out, in], and they lie [experts, in, out]"
            if transposed and not getattr(module, "is_transposed", False)
            else "",
        )


def _unknown_experts(model: nn.Module, layers: str | None, known_as: set[str]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Weights of experts that are no targets, by their names in a layer: 2-D, or 3-D of another name (DBRX, JetMoe)."""
    for name, parameter in model.named_parameters():
        owner, _, key = name.rpartition(".")
        if name in known_as or parameter.ndim < 2 or "bias" in key or layer_of(name, layers) is None:
            continue
        if "experts" in owner.split(".") or "expert" in type(model.get_submodule(owner)).__name__.lower():
            yield name.removeprefix(f"{layers}.").partition(".")[2], tuple(parameter.shape)


def _with_routers(targets: list[Target]) -> list[Target]:
    """Matrices of no known role beside experts, with a row for each of them or for the shared one, are their routers."""
    beside = {t.module.rpartition(".")[0].rpartition(".")[0]: t.experts for t in targets if t.experts}
    return [
        dataclasses.replace(t, role="router", group="router")
        if not t.role and any(t.shape[0] in (1, n) and t.module.startswith(f"{home}.") for home, n in beside.items())
        else t
        for t in targets
    ]


def _call(model: nn.Module, method: str) -> Any:
    function: Any = getattr(model, method, None)
    if function is None:
        return None
    try:
        return function()
    except (NotImplementedError, AttributeError):
        return None


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
        roles = f"{roles} (each of its experts)" if target.experts else roles
        apart = [reason for reason in (target.doubt, target.unadaptable) if reason]
        rows.setdefault(f"{name} {shape}", (name, shape, "; ".join([roles, *apart])))
    for name, sizes in spec.unknown.items():
        left = "experts in a form unknown to pkt: left alone"
        rows[name] = (f"{spec.layers}.*.{name}", " x ".join(map(str, sizes)), left)
    return list(rows.values())
