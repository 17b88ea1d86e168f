"""Put an extraction into a student as a PEFT LoRA, so that step 0 is still the student (METHOD, section 5).

paired    one adapter of twice the rank, A = [A₀; A₀], B = [B₀, −B₀]: the halves cancel exactly. Only the first half gets a
          gradient, so a trainer moves BA away from B₀A₀ while −B₀A₀ stays. The student's weights are not touched, and every
          checkpoint is a LoRA of the original student.
residual  the paper's and PiSSA's way: W − B₀A₀ in the base, computed in fp32 and rounded once.
add       no counterweight: the student is changed at once.

What was done is recorded twice: in the adapter's own configuration (PEFT saves it, so any trainer's checkpoint says how to
read it), and, for `residual`, in the configuration of the base whose weights were shifted.

PiSSA is `residual` with the model's own factors (`initialize_pissa_weights`).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from pkt.adapters import RECORD, Adapter, Pair, check_fit, from_peft, parameter_name, read_adapter, split_tied
from pkt.errors import PktError, PktWarning
from pkt.extraction import Extraction
from pkt.extraction.factorization import BATCH, factorize_all
from pkt.files import as_path
from pkt.models import Kind, Model, ModelSpec, load_model, quiet, spec_of_model
from pkt.options import Factorization

Mode: TypeAlias = Literal["paired", "residual", "add"]
MODES: tuple[Mode, ...] = ("paired", "residual", "add")
ADAPTER = "default"
DROPOUT = 0.05  # the paper's
SHIFTED = "pkt_residual"  # in the configuration of a base whose weights are W − B₀A₀
# Relative movement of the second half that rounding to bf16 cannot explain.
MOVED = 2.0**-7


def inject(
    student: Any,
    ext: Extraction | str | Path,
    *,
    mode: Mode = "paired",
    adapter_name: str = ADAPTER,
    dropout: float = 0.0,
    alpha: float | None = None,
    rslora: bool = False,
) -> Any:
    """Wrap `student` (a model, a checkpoint directory or a PeftModel) with the extraction's LoRA. Returns a PeftModel to train.

    In `paired` and `residual` the model's function is the student's at step 0 (paired: to 1e-5 in fp32, dropout included).
    A model given in memory is wrapped in place, as PEFT does; only `residual` changes its weights. A PeftModel gets one more
    adapter, `adapter_name`, made the active one (not in `residual`, which would shift the base under the others). A PeftModel
    that has the adapter already, such as a reloaded checkpoint, is armed again: gradient masks of `paired`, the shifted base
    of `residual`; nothing else changes. alpha: as in LoraConfig, of every module at the extraction's rank; None makes every
    scale 1.

    The second half of `paired` gets no gradient; weight decay, or training without pkt, moves it. That is harmless, and a
    `PktWarning` says so when the checkpoint is armed again. Raises `PktError` listing every module of the extraction that the
    student does not have in that shape, for a base that another injection has shifted, and for dropout on experts, for which
    PEFT has none.
    """
    check_settings(mode, dropout, alpha)
    if not isinstance(ext, Extraction):
        ext = Extraction.load(ext)
    checked_dropout(ext.pairs, dropout)
    if not isinstance(student, nn.Module):
        student = load_model(as_path(student, "a student (a model, or the path of its checkpoint)"))
    wrapped = _is_peft_model(student)
    if wrapped and adapter_name in student.peft_config:
        return _arm_again(student, ext, mode, adapter_name)
    if wrapped and mode == "residual":
        others = ", ".join(student.peft_config)
        raise PktError(
            f"mode='residual' would shift the base under the other adapters of this model ({others}); use mode='paired'"
        )
    spec = spec_of_base(student) if wrapped else spec_of_model(student)
    check_fit(ext.pairs, spec, "the extraction")
    _check_unshifted(student)
    _check_weights(student.get_base_model() if wrapped else student, ext.pairs)
    base = student.get_base_model() if wrapped else student
    adapter = Adapter(ext.pairs, name_of(base), spec.head if spec.tied else None)
    config = adapter.config(dropout=dropout, multiple=2 if mode == "paired" else 1, alpha=alpha, rslora=rslora)
    if wrapped:
        _check_beside(student, config)
    model = _add_adapter(student, config, adapter_name) if wrapped else wrap(student, config, adapter_name)
    initialize_lora_weights(model, ext, mode=mode, adapter_name=adapter_name)
    return model


def checked_dropout(pairs: Mapping[str, Pair], dropout: float | None) -> float:
    """The dropout asked for, or else the paper's where PEFT has one. Raises `PktError` for one on experts."""
    experts = [m for m, p in pairs.items() if p.experts]
    if dropout and experts:
        raise PktError(
            f"dropout={dropout}: PEFT has no dropout for the parameters of experts ({_few(experts)}); use dropout=0, or leave "
            "them out of the extraction (modules='attention,embedding')"
        )
    return (0.0 if experts else DROPOUT) if dropout is None else dropout


def _check_beside(model: Any, config: Mapping[str, Any]) -> None:
    """Refuse what PEFT cannot put beside the model's adapters: it nests one wrapper for each parameter of experts."""
    wanted = set(config.get("target_parameters") or ())
    for name, other in model.peft_config.items():
        found = set(other.target_parameters or ())
        if wanted and found and wanted != found:
            raise PktError(
                f"the adapter {name!r} of this model adapts other parameters of experts than this extraction "
                f"({_few(sorted(wanted ^ found))}), and PEFT wants the same of all; load the student again for this one"
            )


def check_settings(mode: str, dropout: float | None, alpha: float | None = None) -> None:
    """Refuse an injection no adapter can have, before anything is loaded."""
    if mode not in MODES:
        raise PktError(f"mode={mode!r} is unknown; choose one of {', '.join(MODES)}")
    if dropout is not None and not 0 <= dropout < 1:
        raise PktError(f"dropout={dropout} must be in [0, 1)")
    if alpha is not None and not 0 < alpha < math.inf:
        raise PktError(f"alpha={alpha} must be positive and finite; leave it out for a scale of 1")


def _is_peft_model(model: nn.Module) -> bool:
    """Whether this is a PeftModel; a plain model with adapters inside is refused, since its PeftModel is needed."""
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return True
    if any(hasattr(module, "lora_A") for module in model.modules()):
        raise PktError(
            "this model has been wrapped already: PEFT put LoRA layers into it in place; pass the PeftModel that pkt.inject "
            "or get_peft_model returned, or load the student again"
        )
    return False


def _check_weights(student: nn.Module, pairs: Mapping[str, Pair]) -> None:
    """Refuse a student without values."""
    weights = {m: parameter_of(student, parameter_name(m, p)) for m, p in pairs.items()}
    empty = [m for m, weight in weights.items() if weight is not None and weight.is_meta]
    if empty:
        raise PktError(f"the student's weights are on the meta device, without values ({_few(empty)}); load them first")


def initialize_lora_weights(
    peft_model: Any, extraction: Extraction | str | Path, *, mode: Mode = "paired", adapter_name: str = ADAPTER
) -> None:
    """Start an adapter of your own LoraConfig with the extraction's factors, in place.

    `paired` needs r = twice the extraction's rank for each module, the other modes r = its rank; lora_alpha, rslora, patterns
    and dropout are yours (the scale is divided out of B). Modules the extraction does not have keep PEFT's start, and a
    `PktWarning` names what of the extraction is not used. Raises `PktError` listing every module whose rank does not fit.
    """
    if mode not in MODES:
        raise PktError(f"mode={mode!r} is unknown; choose one of {', '.join(MODES)}")
    ext = extraction if isinstance(extraction, Extraction) else Extraction.load(extraction)
    config = _config(peft_model, adapter_name)
    spec = spec_of_base(peft_model)
    check_fit(ext.pairs, spec, "the extraction")
    _check_unshifted(peft_model)
    _check_weights(peft_model.get_base_model(), ext.pairs)
    _tie(peft_model)
    pairs = {m: p for m, p in ext.pairs.items() if _lora_parameters(peft_model, m, p, adapter_name) is not None}
    unused = [m for m in ext.pairs if m not in pairs]
    if not pairs:
        raise PktError(
            f"the adapter {adapter_name!r} targets none of the extraction's modules; they are like {unused[0]}"
        )
    if unused:
        warnings.warn(f"not used, because the adapter does not target them: {_few(unused)}", PktWarning, stacklevel=2)
    multiple = 2 if mode == "paired" else 1
    faults = []
    for module, pair in pairs.items():
        rank = _layer(peft_model, module, pair).r[adapter_name]
        if rank != pair.rank * multiple:
            faults.append(f"{module}: r={rank}, needed {pair.rank * multiple}")
        if pair.kind == "embedding" and spec.tied and not _is_tied(peft_model, adapter_name):
            faults.append(f"{module}: tied to {spec.head}; target both, with ensure_weight_tying=True")
    if faults:
        raise PktError(
            f"mode={mode!r} cannot fill the adapter {adapter_name!r}; set r and rank_pattern:\n  " + "\n  ".join(faults)
        )
    adapter = Adapter(pairs, name_of(peft_model.get_base_model()), spec.head if spec.tied else None)
    # auto_mapping is saved as it is, but only for adapters with a task type; without one PEFT writes its own.
    config.task_type = config.task_type or "CAUSAL_LM"
    _start_adapter(peft_model, adapter, mode, adapter_name)


def initialize_pissa_weights(peft_model: Any, *, adapter_name: str = ADAPTER, seed: int = 0) -> None:
    """PEFT's `init_lora_weights="pissa"` (Meng et al., 2024, arXiv 2404.02948) without its full SVDs.

    peft_model: as `get_peft_model` makes it with PEFT's default start, changed in place. Each linear layer W [out, in] of the
    adapter, Conv1D too, gets A = √(Σ/s) Vᵀ [r, in] and B = U √(Σ/s) [out, r] from its r leading singular triplets
    (`pkt::rsvd`), s being the adapter's scale; W − s·BA, computed in fp32 and rounded once to W's dtype, stays in the base.
    Embeddings keep PEFT's start, as with PEFT. The configuration then says "pissa", for PEFT's own conversion to a plain LoRA;
    `pkt.finalize(peft_model, OUT)` makes one too. The same seed gives the same bytes.

    Raises `PktError` before anything is changed: listing every layer without a plain weight of its own in fp32, fp16 or bf16
    (quantized, tied to another module, merged), for other adapters on the base, and for weights that are not finite.
    """
    config = _config(peft_model, adapter_name)
    _check_unshifted(peft_model)
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise PktError(
            f"the adapter {adapter_name!r} was made with init_lora_weights={config.init_lora_weights!r}; leave it at its default"
        )
    others = [name for name in peft_model.peft_config if name != adapter_name]
    if others:
        raise PktError(f"PiSSA would shift the base under the other adapters of this model ({', '.join(others)})")
    base = peft_model.get_base_model()
    layers = {name: layer for name, layer in base.named_modules() if adapter_name in getattr(layer, "lora_A", ())}
    owners = collections.Counter(id(p) for module in base.modules() for p in module.parameters(recurse=False))
    faults = [f"{name}: {fault}" for name, layer in layers.items() if (fault := _pissa_fault(layer, owners))]
    if faults or not layers:
        raise PktError(
            "PiSSA subtracts the factors from the base's weights, so each layer needs a plain matrix of its own in float32, "
            "float16 or bfloat16; initialize before quantizing, or take these out of target_modules:\n  "
            + "\n  ".join(faults or [f"no linear layer has the adapter {adapter_name!r}"])
        )
    by_rank: dict[int, list[str]] = {}
    for name, layer in layers.items():
        by_rank.setdefault(layer.r[adapter_name], []).append(name)
    pairs = {}
    for rank, names in by_rank.items():
        options = Factorization(rank, split="sqrt", seed=seed)
        for some in (names[i : i + BATCH] for i in range(0, len(names), BATCH)):
            weights = [layers[n].get_base_layer().weight.detach() for n in some]
            matrices = [w.t() if layers[n].fan_in_fan_out else w for n, w in zip(some, weights, strict=True)]
            for name, found in zip(some, factorize_all(matrices, some, options), strict=True):
                kind: Kind = "conv1d" if layers[name].fan_in_fan_out else "linear"
                root = layers[name].scaling[adapter_name] ** 0.5
                pairs[name] = Pair((found.A / root).cpu(), (found.B * root).cpu(), kind)
    _start_adapter(peft_model, Adapter(pairs, name_of(base)), "residual", adapter_name)
    config.init_lora_weights = "pissa"


def _pissa_fault(layer: Any, owners: Mapping[int, int]) -> str | None:
    """Why this LoRA layer cannot be started by PiSSA, or None."""
    weight = getattr(layer.get_base_layer(), "weight", None)
    if not isinstance(weight, Tensor):
        return "no weight"
    if type(weight) not in (Tensor, nn.Parameter) or weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{type(weight).__name__} of {str(weight.dtype).removeprefix('torch.')}"
    if weight.is_meta or weight.ndim != 2:
        return f"{list(weight.shape)} on {weight.device}"
    if owners[id(weight)] > 1:
        return "tied to another module"
    return "merged" if layer.merged else None


def _start_adapter(peft_model: Any, adapter: Adapter, mode: Mode, name: str) -> None:
    """Fill an adapter with its initial factors, shift the base in `residual`, and record both."""
    base, config = peft_model.get_base_model(), peft_model.peft_config[name]
    record = make_record(base, adapter, mode)
    config.auto_mapping = {**(config.auto_mapping or {}), RECORD: record}
    if mode == "residual":
        _shift(peft_model, adapter.pairs, record)
    _fill(peft_model, adapter.pairs, name, paired=mode == "paired")
    injected = getattr(peft_model, "pkt_injection", {})
    peft_model.pkt_injection = {**injected, name: {"mode": mode, "initial": adapter.pairs}}


def wrap(student: nn.Module, config: dict[str, Any], adapter_name: str = ADAPTER) -> Any:
    """get_peft_model with the adapter of a tied head made one with the embedding's."""
    from peft import get_peft_model

    # PEFT's class for causal models wants what only a model that generates has.
    generates = hasattr(student, "prepare_inputs_for_generation")
    with quiet(), _expected_warnings():
        lora = _lora_config(config if generates else {**config, "task_type": None})
        model = get_peft_model(student, lora, adapter_name=adapter_name)
    _tie(model)
    return model


def _add_adapter(model: Any, config: dict[str, Any], adapter_name: str) -> Any:
    lora = _lora_config(config)
    with quiet(), _expected_warnings():
        model.add_adapter(adapter_name, lora)
        base = model.get_base_model()
        embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
        if config["ensure_weight_tying"] and adapter_name not in getattr(head, "lora_A", {adapter_name: None}):
            # PEFT no longer finds a tied head once another adapter wraps it.
            rank, alpha = embedding.r[adapter_name], embedding.lora_alpha[adapter_name]
            head.update_layer(adapter_name, rank, lora_alpha=alpha, config=lora)
        _tie(model)
        model.set_adapter(adapter_name)
    return model


def _lora_config(config: dict[str, Any]) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{k: v for k, v in {**config, "inference_mode": False}.items() if k != "peft_type"})


@contextlib.contextmanager
def _expected_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        # fan_in_fan_out is one flag for the whole model; PEFT corrects it per module and says so.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        # PEFT looks for the ranks of parameters among the modules, after it has used them.
        warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match")
        warnings.filterwarnings("ignore", message="The following alpha_pattern keys did not match")
        yield


def record_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """pkt's record in an adapter's configuration, or None."""
    record = (config.get("auto_mapping") or {}).get(RECORD)
    return record if isinstance(record, dict) and record.get("mode") in MODES else None


def make_record(base: nn.Module, adapter: Adapter, mode: Mode) -> dict[str, Any]:
    """What must be known to finalize an adapter: how it was injected, into which weights, from which factors."""
    return {"mode": mode, "student": adapter.base, "initial": adapter.fingerprint(), "sketch": sketch(base, adapter)}


def sketch(student: Any, adapter: Adapter) -> dict[str, list[float]]:
    """Eight weights of a few modules: enough to tell the original student from a shifted one, or another.

    student: a model (its layers may be wrapped by PEFT) or a `Model`. The tables are always among the modules, since PEFT saves
    and loads their base weights with an adapter. Quantized matrices are left out.
    """
    inside = sorted(m for m in adapter.pairs if any(part.isdigit() for part in m.split(".")))
    outside = sorted(m for m in adapter.pairs if m not in inside)
    chosen = {*outside[:3], *inside[:1], *inside[len(inside) // 2 :][:1], *inside[-1:]}
    found = {m: _weight(student, m, adapter.pairs[m]) for m in sorted(chosen)}
    values = {m: w.flatten()[_places(w)] for m, w in found.items() if w is not None}
    return {m: v.float().tolist() for m, v in values.items()}


def compare_sketch(
    recorded: Mapping[str, list[float]], student: Any, pairs: Mapping[str, Pair], *, initial: bool = False
) -> dict[str, str]:
    """Per module of the sketch that can be compared: "same", "other", or, where the pairs are the initial ones, "shifted" by −B₀A₀.

    Weights are the same up to rounding to bf16.
    """
    found = {}
    for module, values in recorded.items():
        pair = pairs.get(module)
        weight = _weight(student, module, pair)
        if weight is None:
            continue
        then, now = torch.tensor(values), weight.flatten()[_places(weight)].float().cpu()
        found[module] = "same" if _like(then, now) else "other"
        if found[module] == "other" and initial and pair is not None:
            *expert, rows, cols = torch.unravel_index(_places(weight).cpu(), weight.shape)
            rows, cols = (rows, cols) if pair.kind == "linear" else (cols, rows)
            shift = (pair.B.cpu().float()[(*expert, rows)] * pair.A.cpu().float().mT[(*expert, cols)]).sum(1)
            found[module] = "shifted" if _like(then - shift, now, then) else "other"
    return found


def _like(then: Tensor, now: Tensor, size: Tensor | None = None) -> bool:
    size = (then if size is None else size).abs()
    bound = 2.0**-8 * torch.maximum(size, then.abs()) + 1e-6 * size.max()
    return not bool(((then - now).abs() > bound).any())


def _places(weight: Tensor) -> Tensor:
    return torch.linspace(0, weight.numel() - 1, 8, dtype=torch.float64).long().to(weight.device)


def _weight(student: Any, module: str, pair: Pair | None) -> Tensor | None:
    """What a pair changes, or None where its values are not there, or packed."""
    name = parameter_name(module, pair)
    weight = student.tensor(name) if isinstance(student, Model) else parameter_of(student, name)
    whole = 3 if pair is not None and pair.experts else 2
    if weight is None or not weight.is_floating_point() or weight.ndim != whole or weight.is_meta:
        return None
    return weight.detach()


def parameter_of(model: nn.Module, name: str) -> Tensor | None:
    """A parameter of the student's own, PEFT's wrappers around its module or not; None where another form of it is kept."""
    owner, _, key = name.rpartition(".")
    layer: Any = model.get_submodule(owner)
    while hasattr(layer, "base_layer"):
        layer = layer.base_layer
    found: Tensor | None = layer._parameters.get(key)
    return found


def spec_of_base(model: Any) -> ModelSpec:
    """The spec of the plain student inside a PeftModel: wrapped layers are read as the layers they wrap."""
    spec = spec_of_model(getattr(model, "_orig_mod", model).get_base_model())
    targets = []
    for target in spec.targets:
        module = target.module.replace(".base_layer", "")
        if ".lora_" not in module and not (spec.tied and module == spec.head):
            targets.append(dataclasses.replace(target, module=module))
    return dataclasses.replace(spec, targets=tuple(targets))


def name_of(base: nn.Module) -> str:
    """Where a model in memory was loaded from; empty when it does not say."""
    return str(getattr(getattr(base, "config", None), "name_or_path", "") or "")


def _check_unshifted(student: Any) -> None:
    shifted = getattr(getattr(student, "config", None), SHIFTED, None)
    if shifted:
        raise PktError(
            "this base was already shifted by mode='residual' (its weights are W − B₀A₀); "
            f"inject into the original student, {shifted.get('student') or 'from which it was made'}"
        )


def _arm_again(model: Any, ext: Extraction, mode: Mode, name: str) -> Any:
    """Masks on a reloaded `paired` adapter, the shifted base under a reloaded `residual` one."""
    record = record_of(_config(model, name).to_dict())
    if record is None:
        raise PktError(
            f"the adapter {name!r} of this model was not made by pkt; inject under another adapter_name, or start your own "
            "adapter with pkt.initialize_lora_weights"
        )
    if record["mode"] != mode:
        raise PktError(f"the adapter {name!r} was injected with mode={record['mode']!r}, not {mode!r}; pass that mode")
    pairs = {m: p for m, p in ext.pairs.items() if _lora_parameters(model, m, p, name) is not None}
    if record["initial"] != Adapter(pairs, "").fingerprint():
        raise PktError(f"the adapter {name!r} was started from another extraction; pass the one it was made from")
    _tie(model)
    model.set_adapter(name)
    model.peft_config[name].inference_mode = False
    if mode == "residual" and not getattr(getattr(model.get_base_model(), "config", None), SHIFTED, None):
        state = compare_sketch(record["sketch"], model.get_base_model(), pairs, initial=True)
        if "other" in state.values():
            raise PktError(
                f"this base is neither the student the adapter {name!r} was injected into nor its shifted base; "
                f"load {record['student'] or 'that student'}"
            )
        # PEFT has loaded the tables' shifted weights already where a trainer saved them with the adapter.
        _shift(model, {m: p for m, p in pairs.items() if state.get(m) != "shifted"}, record)
    if mode == "paired":
        moved = max(_arm_pair(model, m, p, name) for m, p in pairs.items())
        if moved > MOVED:
            warnings.warn(
                f"the second half of the adapter {name!r} has moved by up to {100 * moved:.1f}% (weight decay, or training "
                "without pkt); harmless: it still is a LoRA of the original student",
                PktWarning,
                stacklevel=3,
            )
    injected = getattr(model, "pkt_injection", {})
    model.pkt_injection = {**injected, name: {"mode": mode, "initial": pairs}}
    return model


def _config(model: Any, name: str) -> Any:
    if not _is_peft_model(model) or name not in model.peft_config:
        raise PktError(f"this model has no adapter {name!r}; make it with peft.get_peft_model or pkt.inject")
    return model.peft_config[name]


class _Transposed(nn.Module):
    """A LoRA factor of a tied head: the embedding's factor, transposed, not a second parameter beside it.

    PEFT makes two parameters over one memory: two optimizer states would move it, and `.to(device)` would part them.
    """

    def __init__(self, owner: Any, name: str, adapter: str) -> None:
        super().__init__()
        # Not registered: the parameter belongs to the embedding alone.
        object.__setattr__(self, "_source", (owner, name, adapter))

    @property
    def weight(self) -> Tensor:
        owner, name, adapter = self._source  # type: ignore[misc]
        factor: Tensor = getattr(owner, name)[adapter]
        return factor.t()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach().contiguous()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """The embedding loads the same numbers."""


def _tie(model: Any) -> None:
    """Make each adapter of a tied head one with the embedding's, in training and in merging."""
    base = model.get_base_model()
    if not hasattr(base, "get_output_embeddings"):
        return
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if not hasattr(head, "lora_A") or not hasattr(embedding, "lora_embedding_A"):
        return
    if head.weight is not embedding.weight:
        return
    for name in list(head.lora_A):
        if name in embedding.lora_embedding_A and model.peft_config[name].ensure_weight_tying:
            head.lora_A[name] = _Transposed(embedding, "lora_embedding_B", name)
            head.lora_B[name] = _Transposed(embedding, "lora_embedding_A", name)
    head.merge = types.MethodType(_merge_tied, head)
    head.unmerge = types.MethodType(_unmerge_tied, head)


def _is_tied(model: Any, name: str) -> bool:
    head = model.get_base_model().get_output_embeddings()
    return name in getattr(head, "lora_A", {}) and isinstance(head.lora_A[name], _Transposed)


def _merge_tied(head: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """Merge what the embedding does not merge into the weight they share: adding a tied change here would add it twice."""
    wanted = head.active_adapters if adapter_names is None else adapter_names
    tied = [n for n in wanted if n in head.lora_A and isinstance(head.lora_A[n], _Transposed)]
    type(head).merge(head, safe_merge=safe_merge, adapter_names=[n for n in wanted if n not in tied])
    head.merged_adapters.extend(n for n in tied if n not in head.merged_adapters)


def _unmerge_tied(head: Any) -> None:
    head.merged_adapters = [n for n in head.merged_adapters if not isinstance(head.lora_A[n], _Transposed)]
    if head.merged_adapters:
        type(head).unmerge(head)


def _layer(model: Any, module: str, pair: Pair) -> Any:
    """The module that PEFT has put around a matrix; around a parameter of experts, one of its nested wrappers."""
    if not pair.experts:
        return model.get_base_model().get_submodule(module)
    owner, _, name = module.rpartition(".")
    layer = model.get_base_model().get_submodule(owner)
    while hasattr(layer, "base_layer") and getattr(layer, "parameter_name", None) != name:
        layer = layer.base_layer
    return layer


def _lora_parameters(model: Any, module: str, pair: Pair, name: str) -> tuple[Tensor, Tensor] | None:
    """The factors of an adapter as PEFT has them."""
    layer = _layer(model, module, pair)
    if pair.kind == "embedding" and name in getattr(layer, "lora_embedding_A", {}):
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    if name in getattr(layer, "lora_A", {}):
        return layer.lora_A[name].weight, layer.lora_B[name].weight
    return None


def _start(model: Any, module: str, pair: Pair, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The adapter's factors of a module, views of its parameters; the extraction's in their dtype, the scale divided out of B."""
    found = _lora_parameters(model, module, pair, name)
    assert found is not None
    a, b = from_peft(*found, pair.experts)
    return a, b, pair.A.to(a), (pair.B / _layer(model, module, pair).scaling[name]).to(b)


@torch.no_grad()
def _fill(model: Any, pairs: Mapping[str, Pair], name: str, *, paired: bool) -> None:
    for module, pair in pairs.items():
        a, b, first_a, first_b = _start(model, module, pair, name)
        a.copy_(torch.cat([first_a, first_a], -2) if paired else first_a)
        b.copy_(torch.cat([first_b, -first_b], -1) if paired else first_b)
        if paired:
            _mask(model, module, pair, name)


@torch.no_grad()
def _arm_pair(model: Any, module: str, pair: Pair, name: str) -> float:
    """Mask a module's second half; returns how far it is from [A₀], [−B₀], relative to them."""
    a, b, first_a, first_b = _start(model, module, pair, name)
    if a.shape[-2] != 2 * pair.rank:
        raise PktError(
            f"{module} has rank {a.shape[-2]} in the adapter {name!r}, not twice the extraction's {pair.rank}"
        )
    _mask(model, module, pair, name)
    gap_a = (a[..., pair.rank :, :] - first_a).norm() / first_a.norm().clamp_min(1e-30)
    gap_b = (b[..., pair.rank :] + first_b).norm() / first_b.norm().clamp_min(1e-30)
    return float(max(gap_a, gap_b))


def _mask(model: Any, module: str, pair: Pair, name: str) -> None:
    found = _lora_parameters(model, module, pair, name)
    assert found is not None
    a, b = found
    # PEFT lays the experts of A one after another, and those of B side by side in every column of a rank.
    a.register_hook(_keep_first_half(0, max(1, pair.experts)))
    b.register_hook(_keep_first_half(1, 1))


def _keep_first_half(dim: int, times: int) -> Callable[[Tensor], Tensor]:
    """times: how often the halves follow each other along the dimension."""

    def mask(grad: Tensor) -> Tensor:
        masked = grad.clone()
        halves = masked.unflatten(dim, (times, 2, -1))
        halves.select(dim + 1, 1).zero_()
        return masked

    return mask


def _shift(model: Any, pairs: Mapping[str, Pair], record: dict[str, Any]) -> None:
    base = model.get_base_model()
    subtract(base, pairs)
    if hasattr(base, "config"):
        setattr(base.config, SHIFTED, {k: record[k] for k in ("student", "initial")})


@torch.no_grad()
def subtract(student: Any, pairs: Mapping[str, Pair]) -> None:
    """W − B₀A₀ in fp32, rounded once, in place. Raises `PktError`, before anything is changed, for a quantized matrix."""
    quantized = [m for m, p in pairs.items() if _weight(student, m, p) is None]
    if quantized:
        raise PktError(
            f"mode='residual' changes the weights, which are quantized here ({_few(quantized)}); use mode='paired'"
        )
    for module, pair in pairs.items():
        weight = _weight(student, module, pair)
        assert weight is not None
        delta = Pair(pair.A.to(weight.device), pair.B.to(weight.device), pair.kind).delta()
        weight.copy_((weight.to(delta.dtype) - delta).to(weight.dtype))


def _few(names: list[str]) -> str:
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + rest


def load_with_adapter(
    student: str | Path, adapter: str | Path | None, *, device: Any = "cpu", dtype: Any = None
) -> Any:
    """The student with a LoRA folder on it by plain PEFT, in eval mode."""
    model = load_model(student, device=device, dtype=dtype)
    return model if adapter is None else put_adapter(model, adapter)


def put_adapter(model: Any, adapter: str | Path) -> Any:
    """A LoRA folder on a plain model in memory, by plain PEFT, in eval mode; checked to fit first."""
    from peft import PeftModel

    pairs, _ = read_adapter(adapter)
    spec = spec_of_model(model)
    check_fit(split_tied(pairs, spec.head if spec.tied else None).pairs, spec, str(adapter))
    with quiet(), _expected_warnings():
        return PeftModel.from_pretrained(model, str(adapter)).eval()
