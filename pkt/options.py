"""What a user may ask for, one frozen value a subject: the functions' keywords and the commands' flags bear its fields' names.

Refused here is what can be refused by itself; what depends on a strategy or a model, by those who know it. Nothing here imports
torch, so that the command line knows its flags at once.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from pkt.errors import PktError

LayerChoice: TypeAlias = Literal["sensitivity", "first", "last", "random"]
Select: TypeAlias = Literal["window", "rows_cols", "weights", "blocks", "random", "random_weights"]
Split: TypeAlias = Literal["b", "sqrt"]
Svd: TypeAlias = Literal["fast", "adaptive", "exact"]
Loss: TypeAlias = Literal["answer", "all"]
KeepScores: TypeAlias = Literal["none", "tiles", "full"]
Mode: TypeAlias = Literal["paired", "residual", "add"]
RecipeName: TypeAlias = Literal["pkt", "paper"]
TrainModules: TypeAlias = Literal["extracted", "all"]
TrainingLoss: TypeAlias = Literal["answer", "last", "all"]
RowTemplate: TypeAlias = Literal["chat", "paper"]
Precision: TypeAlias = Literal["auto", "fp32", "bf16", "fp16"]
How: TypeAlias = Literal["lora", "pissa", "lora-ga", "eva", "spectral"]
Score: TypeAlias = Literal["sensitivity", "activation", "magnitude", "random"]
AnswerRule: TypeAlias = Literal["mark", "number", "words", "paper"]


@dataclass(frozen=True)
class PlanOptions:
    """Which layers and regions of a teacher feed which matrices of a student; `pkt.plan` says what each means.

    module_map: the teacher's pattern by the student's. roles: lines of `pkt.models.ROLES`. map_vocabulary: whether rows of the
    tables are mapped; which, the tokenizers say.
    """

    layers: str | Sequence[int] = "sensitivity"
    select: Select = "window"
    modules: str = "all"
    align_heads: bool = False
    module_map: Mapping[str, str] | None = None
    partial: bool = False
    map_vocabulary: bool = False
    roles: Mapping[str, tuple[str, str]] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.select not in get_args(Select):
            raise PktError(f"select={self.select!r} is unknown; choose one of {', '.join(get_args(Select))}")
        object.__setattr__(self, "layers", _layers(self.layers))
        if not isinstance(self.modules, str):
            raise PktError(f"modules={self.modules!r} must be a string, such as 'attention,-v' or a regular expression")
        _check_seed(self.seed)

    def as_dict(self) -> dict[str, Any]:
        """As they are recorded: what came later only when used, so that results made without it stay what they were."""
        value: dict[str, Any] = {
            "layers": self.layers if isinstance(self.layers, str) else list(self.layers),
            "select": self.select,
            "modules": self.modules,
            "align_heads": self.align_heads,
            "seed": self.seed,
        }
        if self.module_map is not None:
            value["module_map"] = dict(self.module_map)
        if self.partial:
            value["partial"] = True
        if self.map_vocabulary:
            value["map_vocabulary"] = True
        if self.roles is not None:
            value["roles"] = {name: list(line) for name, line in sorted(self.roles.items())}
        return value


@dataclass(frozen=True)
class Factorization:
    """How a region becomes a LoRA pair: at a fixed rank or, with `energy`, at the smallest that catches this share of it.

    With `energy`, `rank` is not used; without, `max_rank` is not. split "b": B = UΣ, A = Vᵀ; "sqrt": √Σ on each side. svd:
    "fast" takes four steps; "adaptive" as many as leave the directions where they are; "exact" is LAPACK's.
    """

    rank: int = 16
    max_rank: int = 64
    energy: float | None = None
    split: Split = "b"
    seed: int = 0
    svd: Svd = "fast"

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or not isinstance(self.max_rank, int):
            raise PktError(f"rank={self.rank!r} and max_rank={self.max_rank!r} must be whole numbers")
        if self.rank < 1 or self.max_rank < 1:
            raise PktError(f"rank={self.rank} and max_rank={self.max_rank} must be at least 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise PktError(f"energy={self.energy} must be in (0, 1]: the share of each matrix's squared norm to catch")
        if self.split not in get_args(Split):
            raise PktError(f"split={self.split!r} is unknown; choose 'b' (the paper's) or 'sqrt' (PiSSA's)")
        if self.svd not in get_args(Svd):
            raise PktError(f"svd={self.svd!r} is unknown; choose one of {', '.join(get_args(Svd))}")
        _check_seed(self.seed)

    @property
    def largest(self) -> int:
        """The largest rank that a pair may have."""
        return self.rank if self.energy is None else self.max_rank

    def as_dict(self) -> dict[str, Any]:
        """As they are recorded; what came later only when used."""
        return {k: v for k, v in asdict(self).items() if (k, v) != ("svd", "fast")}


@dataclass(frozen=True)
class Starting:
    """A start that needs no teacher: which, and at what size. a_scale: A's, against PEFT's or an orthonormal one's."""

    how: How = "lora"
    rank: int = 32
    a_scale: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.how not in get_args(How):
            raise PktError(f"how={self.how!r} is unknown; choose one of {', '.join(get_args(How))}")
        if not isinstance(self.rank, int) or self.rank < 1:
            raise PktError(f"rank={self.rank!r} must be a whole number of at least 1")
        if not 0 < self.a_scale < math.inf:
            raise PktError(f"a_scale={self.a_scale} must be positive and finite")
        _check_seed(self.seed)


@dataclass(frozen=True)
class Shrinking:
    """By what the units of a smaller model are chosen; seed: of what is random."""

    score: Score = "sensitivity"
    seed: int = 0

    def __post_init__(self) -> None:
        _check_choice("score", self.score, Score)
        _check_seed(self.seed)


@dataclass(frozen=True)
class Reading:
    """How rows become samples: the tokens whose loss counts, and the longest row in tokens."""

    loss: Loss = "answer"
    max_length: int = 2048


@dataclass(frozen=True)
class Execution:
    """How the teacher is computed with, which changes the last bits of its scores.

    batch_size: samples at once, at most. device: default, where a model in memory is, else the CPU. dtype: a torch.dtype;
    default, the checkpoint's.
    """

    batch_size: int = 8
    device: Any = None
    dtype: Any = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise PktError(f"batch_size={self.batch_size} must be at least 1")


@dataclass(frozen=True)
class Memory:
    """What a reading of a teacher may take, in bytes or as "16GB"; default, what is free."""

    device_memory: int | str | None = None
    host_memory: int | str | None = None


@dataclass(frozen=True)
class Limits(Memory):
    """What a transfer may take, which changes no byte of its result.

    scratch: a folder for activations that fit in no memory. prefetch: read a layer ahead.
    """

    scratch: str | Path | None = None
    prefetch: bool = True


@dataclass(frozen=True)
class Training:
    """How a model is trained: AdamW without weight decay, over `epochs` of the rows or `max_steps` of them.

    batch_size: rows of a step, on whatever devices; micro_batch: rows in memory at once, at most. lr: at its peak; warmup: steps
    to it, or a share of them below 1; scheduler: transformers' name. save_steps: steps between checkpoints, None for none and no
    logs. precision: of the products, "auto" for bf16 on a GPU that has it and fp32 elsewhere. gradient_checkpointing: compute
    activations twice rather than keep them. group_by_length: rows of like lengths together. report_to: names of transformers'
    integrations, joined by commas, or "none". eval_steps: steps between looks at held-out rows; default, save_steps.
    """

    epochs: float = 3.0
    batch_size: int = 64
    micro_batch: int = 8
    lr: float = 3e-4
    warmup: float = 0.0
    scheduler: str = "linear"
    max_steps: int | None = None
    save_steps: int | None = 50
    seed: int = 0
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    group_by_length: bool = False
    report_to: str = "tensorboard"
    eval_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise PktError(f"{name}={getattr(self, name)} must be positive and finite")
        if self.lr > 1:
            raise PktError(
                f"lr={self.lr} is too large: Adam moves every weight by about lr in each step; 3e-4 is usual"
            )
        for name in ("batch_size", "micro_batch", "save_steps", "max_steps", "eval_steps"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise PktError(f"{name}={count} must be at least 1")
        if not 0 <= self.warmup < math.inf:
            raise PktError(f"warmup={self.warmup} must be a number of steps, or a share of them below 1")
        if not 0 <= self.seed < 2**32:
            raise PktError(f"seed={self.seed} must be from 0 to {2**32 - 1}")
        _check_choice("precision", self.precision, Precision)

    def later(self) -> dict[str, Any]:
        """What came later and changes a result, only when used: runs made without it are the same runs."""
        found = {"precision": self.precision, "group_by_length": self.group_by_length}
        return {name: value for name, value in found.items() if value not in ("auto", False)}


def _check_choice(name: str, given: Any, choices: Any) -> None:
    if given not in get_args(choices):
        raise PktError(f"{name}={given!r} is unknown; choose one of {', '.join(get_args(choices))}")


@dataclass(frozen=True)
class Recipe:
    """What a recipe settles of a training, unless it is said otherwise; None: not settled.

    mode: how an extraction is injected. lr, warmup, gradient_checkpointing: as in `Training`. train_modules: which matrices learn
    beside the extracted ones, from B = 0. a_scale: A of a LoRA that starts at B = 0, times PEFT's. loss: the tokens that count, of
    all answers, of the last one, or all. template: how messages become text, by the tokenizer's own chat template where it has
    one, or as the paper's authors train.
    """

    mode: Mode | None = None
    lr: float | None = None
    warmup: float | None = None
    gradient_checkpointing: bool | None = None
    train_modules: TrainModules | None = None
    a_scale: float | None = None
    loss: TrainingLoss | None = None
    template: RowTemplate | None = None

    def __post_init__(self) -> None:
        for name, choices in (("train_modules", TrainModules), ("loss", TrainingLoss), ("template", RowTemplate)):
            if getattr(self, name) is not None:
                _check_choice(name, getattr(self, name), choices)
        if self.a_scale is not None and not 0 < self.a_scale < math.inf:
            raise PktError(f"a_scale={self.a_scale} must be positive and finite; 1, 3 and 8 are usual")

    def over(self, recipe: str) -> Recipe:
        """These settings, and the rest as the recipe of this name has it."""
        _check_choice("recipe", recipe, RecipeName)
        return replace(RECIPES[recipe], **{name: value for name, value in vars(self).items() if value is not None})


# The paper's: what its authors' trainer does (docs/choices.md says where pkt does otherwise, and why).
RECIPES: Mapping[str, Recipe] = {
    "pkt": Recipe(
        warmup=0.0, gradient_checkpointing=False, train_modules="extracted", a_scale=3.0, loss="answer", template="chat"
    ),
    "paper": Recipe("residual", 3e-4, 0.03, True, "all", 1.0, "last", "paper"),
}


@dataclass(frozen=True)
class Lora:
    """A LoRA that starts without an extraction.

    init: PEFT's `init_lora_weights`, "default" for its True. alpha: lora_alpha; None makes the scale 1. modules: as in a plan.
    """

    init: str = "default"
    rank: int = 16
    alpha: float | None = None
    modules: str = "all"

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise PktError(f"rank={self.rank!r} must be a whole number of at least 1")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise PktError(f"alpha={self.alpha} must be positive and finite; leave it out for a scale of 1")


def _layers(given: Any) -> str | tuple[int, ...]:
    choices = ", ".join(get_args(LayerChoice))
    if isinstance(given, str):
        if given not in get_args(LayerChoice):
            raise PktError(f"layers={given!r} is unknown; choose one of {choices}, or list the layers")
        return given
    try:
        if not isinstance(given, Sequence):
            raise TypeError
        return tuple(operator.index(i) for i in given)
    except TypeError:
        raise PktError(f"layers={given!r}: give one of {choices}, or a list of the teacher's layers") from None


def _check_seed(seed: Any) -> None:
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise PktError(f"seed={seed!r} must be a whole number from 0 to 2**63 - 1")
