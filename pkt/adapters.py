"""The PEFT adapter folder: its key names, its configuration, and the matrices in it. Reads and writes without PEFT."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pkt.errors import PktError, short_list
from pkt.files import safetensors_header, sha256, write_json, write_tensors
from pkt.models import PEFT_EMBEDDINGS, Kind, ModelSpec
from pkt.models.adapter_files import (
    CONFIG,
    PICKLE,
    WEIGHTS,
    check_plain,
    experts_in,
    factors_in,
    read_config,
    setting,
    wrapped_names,
)
from pkt.tables import by_last_name

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Pair:
    """One module's LoRA factors: delta = B A for a linear layer [out, in], (B A)ᵀ for an embedding [vocabulary, d].

    Those of experts in one parameter [experts, out, in] have the experts in front; its name is then the module's.
    """

    A: Tensor  # [rank, in], or [rank, vocabulary]
    B: Tensor  # [out, rank], or [d, rank]
    kind: Kind

    def __repr__(self) -> str:
        return f"Pair(A {list(self.A.shape)}, B {list(self.B.shape)}, {self.kind})"

    @property
    def rank(self) -> int:
        return self.A.shape[-2]

    @property
    def experts(self) -> int:
        return self.A.shape[0] if self.A.ndim == 3 else 0

    def delta(self) -> Tensor:
        """The change of the module's weight in the parameter's own layout, in the factors' dtype."""
        product = self.B @ self.A
        return product if self.kind == "linear" else product.mT

    def each(self) -> Iterator[tuple[Tensor, Tensor]]:
        """A and B, of each expert where there are experts."""
        yield from zip(self.A, self.B, strict=True) if self.experts else [(self.A, self.B)]


def parameter_name(module: str, pair: Pair | None) -> str:
    """The parameter that a pair changes."""
    return module if pair is not None and pair.experts else f"{module}.weight"


def in_peft(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Factors as PEFT has them; experts' A [experts, rank, in] as [experts · rank, in], B as [out, rank · experts]."""
    return (A, B) if A.ndim == 2 else (A.flatten(0, 1), B.permute(1, 2, 0).flatten(1))


def from_peft(A: Tensor, B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The inverse of `in_peft`, as views; factors of no experts as they are."""
    return (A.unflatten(0, (experts, -1)), B.unflatten(1, (-1, experts)).permute(2, 0, 1)) if experts else (A, B)


def pairs_table(pairs: Mapping[str, Pair], energies: Mapping[str, float]) -> list[tuple[str, ...]]:
    """A row for each kind of matrix: how many, their ranks, and the mean share of energy that their factors keep, where known."""
    rows: list[tuple[str, ...]] = [("modules", "how many", "rank", "energy kept")]
    for name, modules in by_last_name(pairs).items():
        ranks = sorted({pairs[m].rank for m in modules})
        kept = [energies[m] for m in modules if m in energies]
        span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        rows.append((name, str(len(modules)), span, f"{100 * sum(kept) / len(kept):.1f}%" if kept else ""))
    return rows


@dataclass
class Adapter:
    """A LoRA adapter with its scale folded into B (alpha = rank for every module)."""

    pairs: dict[str, Pair]
    base: str
    tied_head: str | None = None
    fan_in_fan_out: bool = field(init=False)

    def __post_init__(self) -> None:
        # PEFT sees by itself how the parameters of experts lie.
        self.fan_in_fan_out = any(p.kind == "conv1d" and not p.experts for p in self.pairs.values())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.pairs)} modules for {self.base or 'a model in memory'})"

    def tensors(self) -> dict[str, Tensor]:
        """PEFT's keys. A tied head has the embedding's pair transposed, as PEFT itself saves it."""
        out: dict[str, Tensor] = {}
        wrapped = wrapped_names(m for m, p in self.pairs.items() if p.experts)
        for module, pair in self.pairs.items():
            if pair.kind == "embedding":
                out[f"{PREFIX}{module}.lora_embedding_A"] = pair.A
                out[f"{PREFIX}{module}.lora_embedding_B"] = pair.B
                if self.tied_head is not None:
                    out[f"{PREFIX}{self.tied_head}.lora_A.weight"] = pair.B.t()
                    out[f"{PREFIX}{self.tied_head}.lora_B.weight"] = pair.A.t()
            else:
                place = wrapped.get(module, module)
                out[f"{PREFIX}{place}.lora_A.weight"], out[f"{PREFIX}{place}.lora_B.weight"] = in_peft(pair.A, pair.B)
        return out

    def config(
        self,
        *,
        dropout: float = 0.0,
        multiple: int = 1,
        alpha: float | None = None,
        rslora: bool = False,
    ) -> dict[str, Any]:
        """The fields of PEFT's LoraConfig for these pairs, `multiple` times as wide (2 for paired injection).

        alpha: of every module at the pairs' own rank; None makes every scale 1.
        """
        ranks = {module: pair.rank * multiple for module, pair in self.pairs.items()}
        embedding = next((m for m, p in self.pairs.items() if p.kind == "embedding"), None)
        tied = self.tied_head if embedding is not None else None
        rank = max(ranks.values())
        others = {m: r for m, r in ranks.items() if r != rank}
        if tied is not None and embedding in others:
            others[tied] = others[embedding]

        def alpha_of(r: int) -> float:
            if alpha is None:
                return r**0.5 if rslora else r
            return alpha * (multiple**0.5 if rslora else multiple)

        parameters = sorted(m for m, p in self.pairs.items() if p.experts)
        modules = sorted(self.pairs.keys() - parameters)
        targets: list[str] | str = modules
        if tied is not None and embedding is not None and embedding.split(".")[-1] not in PEFT_EMBEDDINGS:
            # PEFT finds such a table tied only through the head, and forgets the head when a list of names is saved.
            targets = "|".join(re.escape(m) for m in [*modules, tied])
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base or None,
            "r": rank,
            "lora_alpha": alpha_of(rank),
            "lora_dropout": dropout,
            "use_rslora": rslora,
            "target_modules": targets,
            "rank_pattern": others,
            "alpha_pattern": {m: alpha_of(r) for m, r in others.items()} if alpha is None else {},
            "fan_in_fan_out": self.fan_in_fan_out,
            "bias": "none",
            "inference_mode": True,
            "init_lora_weights": True,
            "ensure_weight_tying": tied is not None,
            **({"target_parameters": parameters} if parameters else {}),
        }

    def padded(self) -> Adapter:
        """Every pair at the largest rank, filled up with zeros: the same adapter without rank or alpha patterns."""
        rank = max(p.rank for p in self.pairs.values())
        pairs = {}
        for module, pair in self.pairs.items():
            more = rank - pair.rank
            a, b = nn.functional.pad(pair.A, (0, 0, 0, more)), nn.functional.pad(pair.B, (0, more))
            pairs[module] = Pair(a, b, pair.kind)
        return Adapter(pairs, self.base, self.tied_head)

    def fingerprint(self) -> str:
        """A hash of every factor, in the order of the modules' names."""
        return sha256(*(t.cpu().contiguous().numpy().tobytes() for t in self._flat()))

    def _flat(self) -> Iterator[Tensor]:
        for module in sorted(self.pairs):
            yield self.pairs[module].A
            yield self.pairs[module].B

    def write(self, folder: Path) -> None:
        """Write the two files PEFT reads. The caller makes the folder atomic."""
        write_tensors(folder / WEIGHTS, self.tensors())
        write_json(folder / CONFIG, self.config())


def fits(pairs: Mapping[str, Pair], student: ModelSpec) -> list[str]:
    """What keeps the pairs from fitting the student, one line a module."""
    places = student.by_module()
    faults = []
    for module, pair in pairs.items():
        place = places.get(module)
        if place is None:
            faults.append(f"{module}: {student.name} has no such matrix")
            continue
        rows, cols = place.shape if place.kind != "embedding" else place.shape[::-1]
        experts = [place.experts] if place.experts else []
        given, wanted = [*pair.B.shape[:-1], pair.A.shape[-1]], [*experts, rows, cols]
        if given != wanted:
            faults.append(f"{module}: the factors are for {given}, the student has {wanted}")
    return faults


def check_fit(pairs: Mapping[str, Pair], student: ModelSpec, what: str) -> None:
    faults = fits(pairs, student)
    if faults:
        raise PktError(
            f"{what} does not fit {student.name} ({len(faults)} modules): {short_list(faults)}; use the student it was made for"
        )


def read_adapter(folder: str | Path, *, where: str = "") -> tuple[Adapter, dict[str, Any]]:
    """Read any LoRA folder of PEFT's; every scale is folded into B. Returns the adapter and the raw configuration.

    Raises `PktError` for what pkt cannot represent as plain LoRA: other methods, DoRA, LoRA biases, modules_to_save.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    config = read_config(folder, where=where)
    pickled = folder / PICKLE
    if (folder / WEIGHTS).is_file() or not pickled.is_file():
        safetensors_header(folder / WEIGHTS)
        return adapter_from_state(load_file(str(folder / WEIGHTS)), config, str(folder)), config
    try:
        state = torch.load(pickled, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types for a bad pickle
        raise PktError(
            f"{pickled} is a pickle that cannot be loaded safely; save the adapter as safetensors"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise PktError(f"{pickled} does not hold an adapter's tensors by name; copy the folder again")
    return adapter_from_state(state, config, str(folder)), config


def adapter_from_state(state: Mapping[str, Tensor], config: Mapping[str, Any], what: str) -> Adapter:
    """The adapter in a PEFT state dict (adapter names removed), with the configuration's scales folded into B."""
    check_plain(config, what)
    found = factors_in(state, what)
    expert = experts_in(found, config, what)
    kind: Kind = "conv1d" if config.get("fan_in_fan_out") else "linear"
    pairs: dict[str, Pair] = {}
    apart: list[str] = []
    for place, names in found.items():
        module = expert.get(place, place)
        a, b = state[names.a], state[names.b]
        if not (a.ndim == b.ndim == 2 and len(a) == b.shape[1] and a.is_floating_point() and b.is_floating_point()):
            raise PktError(
                f"{what}: the LoRA factors of {module} are {list(a.shape)} and {list(b.shape)} ({a.dtype}), which multiply to no "
                "matrix; the file is damaged, copy it again"
            )
        if not (a.isfinite().all() and b.isfinite().all()):
            raise PktError(
                f"{what}: the LoRA factors of {module} contain NaN or Inf; training diverged before it was saved"
            )
        try:
            rank = int(setting("rank_pattern", module, config.get("r", 8), config))  # 8 is PEFT's own
            scale = _scale(module, rank, config)
            if not math.isfinite(scale):
                raise ValueError(scale)
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise PktError(
                f"{what}: its {CONFIG} gives {module} no scale (lora_alpha is {config.get('lora_alpha', 'missing')}); copy the "
                "adapter's configuration again"
            ) from error
        if place not in expert and rank != len(a):
            apart.append(f"{module} has factors of rank {len(a)}, and its {CONFIG} says {rank}")
        if place in expert:
            if rank < 1 or len(a) % rank or b.shape[1] != len(a):
                raise PktError(
                    f"{what}: {module} holds no whole number of experts of rank {rank}; the folder was changed"
                )
            a, b = from_peft(a, b, len(a) // rank)
        work = torch.float64 if b.dtype == torch.float64 else torch.float32
        pairs[module] = Pair(a.to(work), b.to(work) * scale, "embedding" if names.embedding else kind)
    if apart:
        raise PktError(f"{what}: {apart[0]}; they are of two adapters, copy the folder again")
    return Adapter(pairs, str(config.get("base_model_name_or_path") or ""))


def _scale(module: str, rank: int, config: Mapping[str, Any]) -> float:
    alpha = setting("alpha_pattern", module, config["lora_alpha"], config)
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def product_norm(b: Tensor, a: Tensor) -> float:
    """The Frobenius norm of b a for thin b [n, r] and a [r, m], in fp64 and without the product."""
    r_b = torch.linalg.qr(b.double(), mode="r")[1]
    r_a = torch.linalg.qr(a.double().t(), mode="r")[1]
    return float((r_b @ r_a.t()).norm())


def split_tied(adapter: Adapter, head: str | None) -> Adapter:
    """Drop a tied head's copy of the embedding's pair; refuse one that training moved away from it."""
    embedding = next((p for p in adapter.pairs.values() if p.kind == "embedding"), None)
    if head is None or embedding is None or head not in adapter.pairs:
        return adapter
    copy = adapter.pairs[head]
    # The difference as one product, so that nothing of the table's size is made.
    apart = product_norm(torch.cat([embedding.B, -copy.A.t()], 1), torch.cat([embedding.A, copy.B.t()]))
    if apart > 1e-5 * max(product_norm(embedding.B, embedding.A), 1e-30):
        raise PktError(
            f"the adapters of the tied embedding and {head} have moved apart, so no adapter of the tied student equals this "
            "one; train a model made by pkt.inject, which keeps them one"
        )
    pairs = {m: p for m, p in adapter.pairs.items() if m != head}
    return Adapter(pairs, adapter.base, head)


def apply_kinds(adapter: Adapter, kinds: Mapping[str, Kind]) -> Adapter:
    """The adapter with each module's kind taken from the student (a folder says fan_in_fan_out once for all)."""
    pairs = {m: Pair(p.A, p.B, kinds.get(m, p.kind)) for m, p in adapter.pairs.items()}
    return Adapter(pairs, adapter.base, adapter.tied_head)


def kinds_of(student: ModelSpec, modules: Iterable[str]) -> dict[str, Kind]:
    places = student.by_module()
    return {m: places[m].kind for m in modules if m in places}
