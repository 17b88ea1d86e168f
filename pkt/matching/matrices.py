"""A model's matrices by role and layer, as the matching compares them: fp32, the gain of the norm before them folded in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pkt.errors import PktError
from pkt.models import NORMS, POSITION_TABLES, Model, ModelSpec, Runs, Target, layer_of, unit_offset

# Roles whose input is a norm's output, and which norm's: that before the attention, the FFN or the head.
_NORMED = {
    "q": "attention",
    "k": "attention",
    "v": "attention",
    "gate": "ffn",
    "up": "ffn",
    "router": "ffn",
    "head": "head",
}


class Matrices:
    """Weights of a model or checkpoint by (role, layer); a checkpoint is read a matrix at a time.

    shapes: every parameter's name and shape. others: matrices with units that no LoRA here holds: tables of positions, and
    routers that are no linear layer.
    """

    def __init__(self, model: Any) -> None:
        self.model = Model.of(model)
        self.spec: ModelSpec = self.model.spec
        self.shapes = self.model.shapes
        self.others = (*_positions(self.spec), *_routers(self.spec, self.shapes))
        self.index: dict[tuple[str, int | None], tuple[Target, Runs]] = {}
        self._read: tuple[str, Tensor] | None = None
        self._sound: set[str] = set()  # parameters that were seen to be finite
        for target in (*self.spec.targets, *self.others):
            for role, rows in target.roles():
                if role and not target.doubt:
                    self.index.setdefault((role, target.layer), (target, rows))

    def has(self, role: str, layer: int | None) -> bool:
        return (role, layer) in self.index

    def experts(self, layer: int) -> int:
        found = self.index.get(("down", layer))
        return 0 if found is None else found[0].experts

    def parameter(self, name: str) -> Tensor:
        """A parameter by its name. Raises `PktError` for NaN or Inf: no match and no change can be told by such weights."""
        found = self.model.tensor(name)
        if name not in self._sound and found.is_floating_point():
            if not bool(found.isfinite().all()):
                raise PktError(f"{self.spec.name}: {name} holds NaN or Inf; the checkpoint is damaged, copy it again")
            self._sound.add(name)
        return found

    def same(self, other: Matrices) -> bool:
        """Whether every parameter has the same values; the first that differs ends the reading."""
        return self.shapes == other.shapes and all(
            torch.equal(self.parameter(name).float(), other.parameter(name).float()) for name in self.shapes
        )

    def raw(self, role: str, layer: int | None, expert: int | None = None) -> Tensor:
        """[out, in] in the stored type, only this role's rows of a fused projection."""
        target, rows = self.index[role, layer]
        matrix = target.oriented(self._tensor(target), expert)
        return matrix if rows == ((0, matrix.shape[0]),) else torch.cat([matrix[a:b] for a, b in rows])

    def _tensor(self, target: Target) -> Tensor:
        """The parameter; experts that lie in one are kept until another is read, as they are asked for one after another."""
        if not target.experts:
            return self.parameter(target.parameter)
        if self._read is None or self._read[0] != target.parameter:
            self._read = None
            self._read = target.parameter, self.parameter(target.parameter)
        return self._read[1]

    def folded(self, role: str, layer: int | None, units: Tensor, expert: int | None = None) -> Tensor:
        """[out, units] fp32: these input columns, the gain of the norm before them multiplied in.

        units: indices, or directions [hidden, units] of which each is a unit.
        """
        whole, gain = self.raw(role, layer, expert), self.gain(_NORMED.get(role, ""), layer)
        if units.is_floating_point():
            return (whole.float() if gain is None else whole * gain) @ units
        return whole[:, units].float() if gain is None else whole[:, units] * gain[units]

    def _rising(self, role: str, layer: int, units: Tensor, expert: int | None = None) -> Tensor:
        """[in, units] fp32: these output rows of a matrix that writes hidden units."""
        whole = self.raw(role, layer, expert)
        return whole.float().t() @ units if units.is_floating_point() else whole[units].float().t()

    def gain(self, before: str, layer: int | None) -> Tensor | None:
        """The gain [hidden] of the norm before the attention, the FFN or the head; None where it is not known."""
        name = self.norm(before, layer)
        return None if name is None else self.parameter(name).float() + unit_offset(self.spec.model_type)

    def norm(self, before: str, layer: int | None) -> str | None:
        """The name of that gain's parameter."""
        home = "" if layer is None else f"{self.spec.layers}.{layer}."
        for name in NORMS.get(before, ()):
            found = [p for p in self.shapes if p.startswith(home) and p.endswith(f".{name}.weight")]
            found = [p for p in found if len(self.shapes[p]) == 1 and (layer is not None or ".layers." not in p)]
            if found:
                return found[0]
        return None

    @property
    def hidden(self) -> int:
        return self.index["embed", None][0].shape[1]

    def head_dim(self) -> int | None:
        return self.spec.head_dim

    def heads(self, layer: int) -> tuple[int, int]:
        """(query heads, key/value heads) of a layer; (0, 0) where they are not known."""
        size = self.spec.head_dim
        if size is None or not all(self.has(role, layer) for role in ("q", "k", "v", "o")):
            return 0, 0
        rows = [sum(b - a for a, b in self.index[role, layer][1]) for role in ("q", "k")]
        return rows[0] // size, rows[1] // size

    def neurons(self, layer: int, units: Tensor, expert: int | None = None) -> Tensor:
        """[FFN neurons, features] fp32: gate row, up row and down column of each, on these hidden units."""
        parts = [self.folded(role, layer, units, expert) for role in ("gate", "up") if self.has(role, layer)]
        return torch.cat([*parts, self._rising("down", layer, units, expert)], 1)

    def groups(self, layer: int, units: Tensor) -> Tensor:
        """[key/value heads, features] fp32: the rows of k and v of each, on these hidden units."""
        heads = self.heads(layer)[1]
        return torch.cat([self.folded(role, layer, units).reshape(heads, -1) for role in ("k", "v")], 1)

    def queries(self, layer: int, units: Tensor) -> Tensor:
        """[query heads, features] fp32: the rows of q and the columns of o of each, on these hidden units."""
        heads = self.heads(layer)[0]
        out = self._rising("o", layer, units).reshape(heads, -1)
        return torch.cat([self.folded("q", layer, units).reshape(heads, -1), out], 1)


def _positions(spec: ModelSpec) -> Iterator[Target]:
    """Tables of learned positions."""
    for target in spec.targets:
        if target.kind == "embedding" and not target.role and target.module.rpartition(".")[2] in POSITION_TABLES:
            yield dataclasses.replace(target, role="positions")


def _routers(spec: ModelSpec, shapes: dict[str, tuple[int, ...]]) -> Iterator[Target]:
    """Matrices [experts, hidden] beside experts, in a module that is no linear layer."""
    known = {target.parameter for target in spec.targets}
    beside = {t.module.rpartition(".")[0].rpartition(".")[0]: t.experts for t in spec.targets if t.experts}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if module == name or name in known or len(shape) != 2 or shape[0] != beside.get(module.rpartition(".")[0]):
            continue
        layer = layer_of(module, spec.layers)
        yield Target(module, "linear", (shape[0], shape[1]), "router", "router", layer)
