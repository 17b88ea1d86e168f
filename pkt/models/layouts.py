"""Which rows of a matrix are which role's, and which way it lies: what its name promises, held against the sizes of its module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pkt.models.tables import FUSED, GATED, HEAD_COLUMNS, HEAD_ROWS, SIZED, Fused, Runs, role_of

# Roles of experts' parameters -> hidden rows are twice as many as `down` has columns.
_UP = {"gate_up": 2, "gate": 1, "up": 1}


@dataclass(frozen=True)
class Place:
    """The module that a matrix is a child of: its sizes say how the matrix lies."""

    module: nn.Module
    name: str
    config: Any

    def size(self, *names: str) -> int | None:
        """The first of these sizes that the module has, or else its configuration."""
        for where in (self.module, getattr(self.module, "config", None), self.config):
            for name in names:
                found = _setting(where, name)
                if isinstance(found, int) and not isinstance(found, bool):
                    return found
        return None

    def product(self, sizes: str) -> int | None:
        """Sizes that the module itself has, multiplied ("n_groups*ssm_state_size"); None where it lacks one."""
        found = 1
        for name in sizes.split("*"):
            where = self.config if name.startswith("config.") else self.module
            size = getattr(where, name.removeprefix("config."), None)
            if not isinstance(size, int):
                return None
            found *= size
        return found

    @property
    def heads(self) -> int | None:
        return self.size("num_heads", "num_attention_heads", "n_heads", "n_head")

    def head(self, *, value: bool) -> int | None:
        """Rows of one head of q and k, or of v: columns of o."""
        found = self.size("v_head_dim", "head_dim") if value else self.size("qk_head_dim", "head_dim")
        hidden = self.size("hidden_size")
        return found or (hidden // self.heads if hidden and self.heads else None)

    def mixer(self) -> str:
        """What kind of mixer the module is, one of `pkt.models.tables.MIXERS`; empty for attention and for what mixes nothing."""
        if hasattr(self.module, "slope_rate"):
            return "linear"
        convolutions = [name for name, child in self.module.named_children() if isinstance(child, nn.Conv1d)]
        if convolutions:
            return "ssm" if hasattr(self.module, "ssm_state_size") else "conv" if convolutions == ["conv"] else "delta"
        return "cross" if "cross" in self.name or "encoder_attn" in self.name else ""

    def beside(self, role: str) -> tuple[int, int] | None:
        """[out, in] of the matrix of this role in the same module."""
        for name, child in self.module.named_children():
            weight = getattr(child, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim == 2 and role_of(f"{self.name}.{name}")[0] == role:
                if isinstance(child, nn.Linear):
                    return child.out_features, child.in_features
                return weight.shape[1], weight.shape[0]
        return None


def _setting(where: Any, name: str) -> Any:
    try:
        return getattr(where, name, None)
    except RuntimeError:  # a configuration whose layers differ in it (Gemma 4)
        return None


def runs_of(
    layout: Fused, rows: int, place: Place | None, heads: int | None, head: int | None
) -> tuple[tuple[str, Runs], ...]:
    """The rows of each role; nothing when they do not come out even."""
    groups: int
    kv = 0
    if layout.sizes:
        found = [None if place is None else place.product(size) for size in layout.sizes]
        sizes = {role: size or 0 for role, size in zip(layout.roles, found, strict=True)}
    elif "k" in layout.roles:
        if not heads or not head or rows % head or (rows // head - heads) % 2:
            return ()
        kv = (rows // head - heads) // 2
        sizes = {"q": heads * head, "k": kv * head, "v": kv * head}
    else:
        sizes = dict.fromkeys(layout.roles, rows // len(layout.roles))
    if layout.groups in ("kv_heads", "heads", "rows"):
        groups = {"kv_heads": kv, "heads": heads or 0, "rows": rows // len(layout.roles)}[str(layout.groups)]
    else:
        groups = layout.groups if isinstance(layout.groups, int) else (place and place.product(layout.groups)) or 0
    if groups < 1 or sum(sizes.values()) != rows or any(size < groups or size % groups for size in sizes.values()):
        return ()
    runs: dict[str, list[tuple[int, int]]] = {role: [] for role in layout.roles}
    start = 0
    for _ in range(groups):
        for role in layout.roles:
            runs[role].append((start, start + sizes[role] // groups))
            start += sizes[role] // groups
    return tuple((role, tuple(runs[role])) for role in layout.roles)


@dataclass(frozen=True)
class Lying:
    """What a matrix is for, and how it lies."""

    role: str
    group: str
    parts: tuple[tuple[str, Runs], ...] = ()
    head: int = 0  # rows of a head of q, k and v, or columns of one of o
    doubt: str = ""  # why its rows cannot be told apart, so that only a matrix of the same shape may feed it


def lying(module: str, shape: tuple[int, int], place: Place, model_type: str) -> Lying:
    """What a linear layer is for and how its rows lie, by its name and by the sizes of the module around it."""
    last = module.rpartition(".")[2]
    role, group = role_of(module)
    sized = SIZED.get(f"{model_type}:{last}") or SIZED.get(last)
    if sized is not None:
        parts = next((p for layout in sized if (p := runs_of(layout, shape[0], place, None, None))), ())
        if parts:
            return Lying("", "attention", parts)
        if role != "qkv":
            return Lying("", group, doubt="its rows are not told apart by the sizes of its module")
    mixer = place.mixer()
    if mixer and group == "attention":
        fused = "its rows are not told apart in this kind of module" if role in FUSED else ""
        return Lying(f"{mixer}_{role}", group, doubt=fused)
    if group == "attention":
        return _in_attention(role, shape, place, _fused(model_type, last, role))
    if group == "ffn":
        return _in_ffn(role, shape, place, _fused(model_type, last, role))
    return Lying(role, group)


def _fused(model_type: str, last: str, role: str) -> Fused | None:
    return FUSED.get(f"{model_type}:{last}") or FUSED.get(last) or FUSED.get(role)


def _in_attention(role: str, shape: tuple[int, int], place: Place, layout: Fused | None) -> Lying:
    heads, head = place.heads, place.head(value=role in ("v", "o"))
    rows = shape[1] if role in HEAD_COLUMNS else shape[0]
    if layout is not None:
        parts = runs_of(layout, shape[0], place, heads, head)
        return Lying(role, "attention", parts, head or 0, "" if parts else "its rows are no whole heads of q, k and v")
    if not heads or not head or role not in (*HEAD_ROWS, *HEAD_COLUMNS):
        return Lying(role, "attention")
    if role == "q":
        out = place.beside("o")
        if rows == 2 * heads * head and (out is None or out[1] == heads * (place.head(value=True) or head)):
            return Lying(role, "attention", runs_of(GATED, rows, place, heads, head), head)
        beside = out is not None and out[1] // (place.head(value=True) or head) == rows // head
        if rows != heads * head and not beside:
            return Lying(role, "attention", doubt=f"{rows} rows are not those of {heads} heads of {head}")
    if rows % head:
        return Lying(role, "attention", doubt=f"{rows} is no whole number of heads of {head}")
    return Lying(role, "attention", head=head)


def _in_ffn(role: str, shape: tuple[int, int], place: Place, layout: Fused | None) -> Lying:
    prefix = "shared_" if role.startswith("shared_") else ""
    down = place.beside(f"{prefix}down")
    bare = role.removeprefix(prefix)
    if bare in _UP and down is None:
        # A gate of attention's output bears the FFN's name.
        attention = any(place.beside(r) is not None for r in HEAD_ROWS)
        return Lying("o_gate", "attention", head=place.head(value=True) or 0) if attention else Lying("", "other")
    parts = () if layout is None else runs_of(layout, shape[0], place, None, None)
    if bare in _UP and down is not None and shape[0] != _UP[bare] * down[1]:
        return Lying(role, "ffn", doubt=f"{shape[0]} rows are not those of {down[1]} neurons")
    return Lying(role, "ffn", parts)


def lies_transposed(module: nn.Module, stacked: Mapping[str, Tensor], hidden: int | None) -> tuple[bool, str]:
    """Whether experts' parameters are [experts, in, out], by their shapes and what their module says; and why that is in doubt.

    Their module declares it (`is_transposed`) or says nothing (Llama 4); shapes that fit one way only decide then.
    """
    declared = getattr(module, "is_transposed", None)
    fitting = [way for way in (False, True) if _fits(stacked, way, hidden)]
    if declared in fitting:
        return bool(declared), ""
    if declared is None and len(fitting) == 1:
        return fitting[0], ""
    if declared is None and fitting:
        return False, "its shape does not tell its rows from its columns"
    return bool(declared), "its shape is not that of experts of the model's width"


def _fits(stacked: Mapping[str, Tensor], transposed: bool, hidden: int | None) -> bool:
    shapes = {role_of(key)[0]: tuple(p.shape[1:][::-1] if transposed else p.shape[1:]) for key, p in stacked.items()}
    down = shapes.get("down")
    for role, (rows, cols) in shapes.items():
        if role in _UP and down is not None and (rows != _UP[role] * down[1] or cols != down[0]):
            return False
        if hidden and (rows if role == "down" else cols) != hidden and down is None:
            return False
    return True
