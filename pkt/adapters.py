"""The PEFT adapter folder: its key names, its configuration, and the matrices in it. Reads and writes without PEFT."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pkt.errors import PktError, short_list
from pkt.files import read_json, safetensors_header, sha256, write_json, write_tensors
from pkt.models import EXPERT_PARAMETERS, PEFT_EMBEDDINGS, Kind, ModelSpec

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
RECORD = "pkt"  # key of pkt's record in the configuration's auto_mapping

# Fields of LoraConfig that make an adapter more than a low-rank change of whole matrices.
NOT_PLAIN = {
    "use_dora": "DoRA",
    "lora_bias": "biases in LoRA",
    "modules_to_save": "modules_to_save",
    "trainable_token_indices": "trainable tokens",
    "layer_replication": "layer replication",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "velora_config": "VeLoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}


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


def wrapped_names(parameters: Iterable[str]) -> dict[str, str]:
    """Experts' parameter -> the module that holds its factors: PEFT nests wrappers, the first registered is innermost."""
    names: dict[str, list[str]] = {}
    for parameter in sorted(parameters, key=lambda p: -EXPERT_PARAMETERS.index(p.rpartition(".")[2])):
        names.setdefault(parameter.rpartition(".")[0], []).append(parameter)
    return {p: owner + ".base_layer" * depth for owner, found in names.items() for depth, p in enumerate(found)}


def in_peft(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Factors as PEFT has them; experts' A [experts, rank, in] as [experts · rank, in], B as [out, rank · experts]."""
    return (A, B) if A.ndim == 2 else (A.flatten(0, 1), B.permute(1, 2, 0).flatten(1))


def from_peft(A: Tensor, B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The inverse of `in_peft`, as views; factors of no experts as they are."""
    return (A.unflatten(0, (experts, -1)), B.unflatten(1, (-1, experts)).permute(2, 0, 1)) if experts else (A, B)


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
            f"{what} does not fit {student.name} ({len(faults)} modules):\n  {short_list(faults)}\nuse the student it was made for"
        )


def read_adapter(folder: str | Path, *, where: str = "") -> tuple[Adapter, dict[str, Any]]:
    """Read any LoRA folder of PEFT's; every scale is folded into B. Returns the adapter and the raw configuration.

    Raises `PktError` for what pkt cannot represent as plain LoRA: other methods, DoRA, LoRA biases, modules_to_save.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise PktError(f"{folder} has no {CONFIG}; name an adapter folder{where}")
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise PktError(f"{folder / CONFIG} is not an adapter's configuration; copy the folder again")
    pickled = folder / "adapter_model.bin"
    if (folder / WEIGHTS).is_file() or not pickled.is_file():
        safetensors_header(folder / WEIGHTS)
        return adapter_from_state(load_file(str(folder / WEIGHTS)), config, str(folder)), config
    try:
        state = torch.load(pickled, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types for a bad pickle
        raise PktError(
            f"{pickled} is a pickle that cannot be loaded safely; save the adapter as safetensors"
        ) from error
    return adapter_from_state(state, config, str(folder)), config


def adapter_from_state(state: Mapping[str, Tensor], config: Mapping[str, Any], what: str) -> Adapter:
    """The adapter in a PEFT state dict (adapter names removed), with the configuration's scales folded into B."""
    if config.get("peft_type") != "LORA":
        found_type = config.get("peft_type")
        method = f"is a {found_type} adapter" if found_type else f"has no peft_type in its {CONFIG}"
        raise PktError(f"{what} {method}; pkt handles LoRA")
    for key, name in NOT_PLAIN.items():
        if config.get(key):
            raise PktError(f"{what} uses {name}, which plain LoRA factors cannot represent; train without it")
    if config.get("bias", "none") != "none":
        raise PktError(f"{what} trained biases (bias={config['bias']!r}), which plain LoRA factors cannot represent")
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_(embedding_)?([AB])(\.weight)?", key)
        if match:
            found.setdefault(match[1], {})[("e" if match[2] else "") + match[3]] = tensor
    expert = _experts_in(found, config, what)
    kind: Kind = "conv1d" if config.get("fan_in_fan_out") else "linear"
    pairs: dict[str, Pair] = {}
    for place, parts in found.items():
        module = expert.get(place, place)
        embedding = "eA" in parts or "eB" in parts
        a, b = (parts.get("eA"), parts.get("eB")) if embedding else (parts.get("A"), parts.get("B"))
        if a is None or b is None:
            raise PktError(f"{what}: {module} has only one of its two LoRA factors; the file is incomplete")
        if not (a.isfinite().all() and b.isfinite().all()):
            raise PktError(
                f"{what}: the LoRA factors of {module} contain NaN or Inf; training diverged before it was saved"
            )
        try:
            rank = int(_setting("rank_pattern", module, config["r"], config)) if place in expert else a.shape[0]
            scale = _scale(module, rank, config)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PktError(
                f"{what}: its {CONFIG} gives {module} no scale (lora_alpha is {config.get('lora_alpha', 'missing')}); copy the "
                "adapter's configuration again"
            ) from error
        if place in expert:
            if rank < 1 or len(a) % rank or b.shape[1] != len(a):
                raise PktError(
                    f"{what}: {module} holds no whole number of experts of rank {rank}; the folder was changed"
                )
            a, b = from_peft(a, b, len(a) // rank)
        work = torch.float64 if b.dtype == torch.float64 else torch.float32
        pairs[module] = Pair(a.to(work), b.to(work) * scale, "embedding" if embedding else kind)
    if not pairs:
        raise PktError(f"{what} holds no LoRA factors")
    return Adapter(pairs, str(config.get("base_model_name_or_path") or ""))


def _experts_in(places: Iterable[str], config: Mapping[str, Any], what: str) -> dict[str, str]:
    """Module of PEFT's -> the experts' parameter whose factors it holds. PEFT finds parameters by the ends of their names."""
    targeted = sorted(config.get("target_parameters") or ())
    unknown = [t for t in targeted if "." not in t or t.rpartition(".")[2] not in EXPERT_PARAMETERS]
    if unknown:
        raise PktError(
            f"{what} uses target_parameters ({', '.join(unknown[:5])}), and pkt knows those of experts, by names such as "
            f"{', '.join(f'experts.{name}' for name in EXPERT_PARAMETERS)}; train without the others"
        )
    owners = {place: re.sub(r"(\.base_layer)+$", "", place) for place in places}
    parameters = [
        f"{owner}.{name}"
        for owner in dict.fromkeys(owners.values())
        for name in EXPERT_PARAMETERS
        if any(f".{owner}.{name}".endswith(f".{t}") for t in targeted)
    ]
    found = {place: parameter for parameter, place in wrapped_names(parameters).items()}
    holding = {parameter.rpartition(".")[0] for parameter in parameters}
    apart = set(found) ^ {place for place, owner in owners.items() if owner in holding}
    if apart:
        raise PktError(
            f"{what}: its target_parameters and its weights name different experts ({min(apart)}); copy the folder again"
        )
    return found


def _setting(pattern: str, module: str, default: Any, config: Mapping[str, Any]) -> float:
    """r or lora_alpha of a module, by the first of a pattern's keys that ends its name."""
    for key, value in (config.get(pattern) or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return float(value)
    return float(default)


def _scale(module: str, rank: int, config: Mapping[str, Any]) -> float:
    alpha = _setting("alpha_pattern", module, config["lora_alpha"], config)
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
