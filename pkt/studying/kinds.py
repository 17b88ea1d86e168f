"""The kinds of starts that a study compares, and their options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pkt.options import How, LayerChoice, Mode, Select


@dataclass(frozen=True)
class StartOptions:
    """Of every kind of start. seeds_of: the task whose seeds it is made of, when not its own, or "next": of each task the one
    after it; seeds: how many of them; extra_steps: the share of further training steps, by which a start that costs nothing is
    charged for what others cost, or "cost": what `compare.of` costs (`pkt.studying.costs`); teacher_targets: what `pkt teach`
    made of the training rows, and mix its share of the loss: the distillation arm."""

    kind: ClassVar[str]
    seeds_of: str | None = None
    seeds: int | None = None
    extra_steps: float | Literal["cost"] = 0.0
    teacher_targets: str | None = None
    mix: float = 0.5

    @property
    def drawn(self) -> bool:
        """Whether it is drawn anew for each training seed."""
        return False

    @property
    def needs_seeds(self) -> bool:
        return False


@dataclass(frozen=True)
class PlainLora(StartOptions):
    """PEFT's LoRA, or another of its `init_lora_weights`."""

    kind: ClassVar[str] = "lora"
    init: str = "default"
    modules: str = "all"


@dataclass(frozen=True)
class OwnStart(StartOptions):
    """`pkt start`."""

    kind: ClassVar[str] = "start"
    how: How = "spectral"

    @property
    def drawn(self) -> bool:
        return self.how in ("lora", "eva")

    @property
    def needs_seeds(self) -> bool:
        return self.how in ("lora-ga", "eva", "spectral")


@dataclass(frozen=True)
class Transfer(StartOptions):
    """`pkt transfer`: the paper's method, its panels and its lowest bars."""

    kind: ClassVar[str] = "transfer"
    teacher: str = ""
    layers: LayerChoice = "sensitivity"
    select: Select = "window"
    modules: str = "all"
    align_heads: bool = False
    map_vocabulary: bool = False
    mode: Mode = "paired"

    @property
    def drawn(self) -> bool:
        return self.layers == "random" or self.select in ("random", "random_weights")

    @property
    def needs_seeds(self) -> bool:
        return True


@dataclass(frozen=True)
class Transplant(StartOptions):
    """`pkt transplant` and its controls. base, adapter: a model or a LoRA's folder; kept: the folder of a transplant, whose control
    it is, at its α: no α is tried and no seed read."""

    kind: ClassVar[str] = "transplant"
    teacher: str = ""
    base: str | None = None
    adapter: str | None = None
    control: Literal["wrong-units", "noise", "neutral", "repruned"] | None = None
    anyway: bool = False
    kept: str | None = None

    @property
    def drawn(self) -> bool:
        return self.control in ("wrong-units", "noise")

    @property
    def needs_seeds(self) -> bool:
        return self.kept is None


@dataclass(frozen=True)
class FolderStart(StartOptions):
    """An extraction, transplant or start that is there already."""

    kind: ClassVar[str] = "folder"
    path: str = ""
    mode: Mode | None = None


KINDS: dict[str, type[StartOptions]] = {
    each.kind: each for each in (PlainLora, OwnStart, Transfer, Transplant, FolderStart)
}
