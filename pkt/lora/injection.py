"""Put an extraction into a student as a PEFT LoRA, so that step 0 is still the student (docs/method.md §5).

paired    one adapter of twice the rank, A = [A₀; A₀], B = [B₀, −B₀]: the halves cancel exactly. Only the first half gets a
          gradient, so a trainer moves BA away from B₀A₀ while −B₀A₀ stays. The student's weights are not touched, and every
          checkpoint is a LoRA of the original student.
residual  the paper's and PiSSA's way: W − B₀A₀ in the base, computed in fp32 and rounded once.
add       no counterweight: the student is changed at once.

What was done is recorded twice: in the adapter's own configuration (PEFT saves it, so any trainer's checkpoint says how to
read it), and, for `residual`, in the configuration of the base whose weights were shifted.

PiSSA is `residual` with the model's own factors (`pkt.lora.pissa`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from pkt.adapters import Adapter, Pair, check_fit, parameter_name
from pkt.errors import PktError, PktWarning, short_list
from pkt.extraction import Extraction, Start, open_start
from pkt.files import as_path
from pkt.lora.factors import arm_pair, layer_of, lora_parameters, shift, start_adapter
from pkt.lora.record import Mode, check_unshifted, compare_sketch, few, name_of, parameter_of
from pkt.lora.tying import is_tied, tie
from pkt.lora.wrapping import ADAPTER, add_adapter, config_of, is_peft_model, spec_of_base, wrap
from pkt.models import ModelSpec, Target, load_model, spec_of_model
from pkt.models.adapter_files import MODES, SHIFTED, record_of

DROPOUT = 0.05  # the paper's
# Relative movement of the second half that rounding to bf16 cannot explain.
MOVED = 2.0**-7


def inject(
    student: Any,
    ext: Extraction | Start | str | Path,
    *,
    mode: Mode | None = None,
    adapter_name: str = ADAPTER,
    dropout: float = 0.0,
    alpha: float | None = None,
    rslora: bool = False,
) -> Any:
    """Wrap `student` (a model, a checkpoint directory or a PeftModel) with the extraction's LoRA. Returns a PeftModel to train.

    ext: an extraction, transplant or start, or its folder. mode: what it records unless given: `paired` for an extraction, `add`
    for what is kept, a transplant.
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
    ext = open_start(ext)
    mode = mode or ext.mode
    check_settings(mode, dropout, alpha)
    checked_dropout(ext.pairs, dropout)
    if not isinstance(student, nn.Module):
        student = load_model(as_path(student, "a student (a model, or the path of its checkpoint)"))
    wrapped = is_peft_model(student)
    if wrapped and adapter_name in student.peft_config:
        return _arm_again(student, ext, mode, adapter_name)
    if wrapped and mode == "residual":
        others = ", ".join(student.peft_config)
        raise PktError(
            f"mode='residual' would shift the base under the other adapters of this model ({others}); use mode='paired'"
        )
    spec = spec_of_base(student) if wrapped else spec_of_model(student)
    check_fit(ext.pairs, spec, "the extraction")
    _check_adaptable(ext.pairs, spec)
    check_unshifted(student)
    _check_weights(student.get_base_model() if wrapped else student, ext.pairs)
    base = student.get_base_model() if wrapped else student
    adapter = Adapter(ext.pairs, name_of(base), spec.head if spec.tied else None)
    config = adapter.config(dropout=dropout, multiple=2 if mode == "paired" else 1, alpha=alpha, rslora=rslora)
    if wrapped:
        _check_beside(student, config)
    model = add_adapter(student, config, adapter_name) if wrapped else wrap(student, config, adapter_name)
    initialize_lora_weights(model, ext, mode=mode, adapter_name=adapter_name)
    return model


def _check_adaptable(pairs: Mapping[str, Pair], spec: ModelSpec) -> None:
    places = spec.by_module()
    other = [m for m, pair in pairs.items() if m in places and places[m].kind != pair.kind]
    if other:
        raise PktError(f"the extraction has {few(other)} as matrices of another kind than {spec.name}; make it again")
    past = {places[m].unadaptable: m for m in pairs if m in places and places[m].unadaptable}
    for reason, module in past.items():
        raise PktError(f"{module} of {spec.name} cannot be adapted ({reason}); make the extraction again without it")


def checked_dropout(pairs: Mapping[str, Pair | Target], dropout: float | None) -> float:
    """The dropout asked for, or else the paper's where PEFT has one. Raises `PktError` for one on experts."""
    experts = [m for m, p in pairs.items() if p.experts]
    if dropout and experts:
        raise PktError(
            f"dropout={dropout}: PEFT has no dropout for the parameters of experts ({few(experts)}); use dropout=0, or leave "
            "them out (modules='attention,embedding')"
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
                f"({few(sorted(wanted ^ found))}), and PEFT wants the same of all; load the student again for this one"
            )


def check_settings(mode: str, dropout: float | None, alpha: float | None = None) -> None:
    """Refuse an injection no adapter can have, before anything is loaded."""
    if mode not in MODES:
        raise PktError(f"mode={mode!r} is unknown; choose one of {', '.join(MODES)}")
    if dropout is not None and not 0 <= dropout < 1:
        raise PktError(f"dropout={dropout} must be in [0, 1)")
    if alpha is not None and not 0 < alpha < math.inf:
        raise PktError(f"alpha={alpha} must be positive and finite; leave it out for a scale of 1")


def _check_weights(student: nn.Module, pairs: Mapping[str, Pair]) -> None:
    """Refuse a student without values."""
    weights = {m: parameter_of(student, parameter_name(m, p)) for m, p in pairs.items()}
    empty = [m for m, weight in weights.items() if weight is not None and weight.is_meta]
    if empty:
        raise PktError(f"the student's weights are on the meta device, without values ({few(empty)}); load them first")


def initialize_lora_weights(
    peft_model: Any,
    extraction: Extraction | Start | str | Path,
    *,
    mode: Mode | None = None,
    adapter_name: str = ADAPTER,
) -> None:
    """Start an adapter of your own LoraConfig with the extraction's factors, in place.

    `paired` needs r = twice the extraction's rank for each module, the other modes r = its rank; lora_alpha, rslora, patterns
    and dropout are yours (the scale is divided out of B). Modules the extraction does not have keep PEFT's start, and a
    `PktWarning` names what of the extraction is not used. Raises `PktError` listing every module whose rank does not fit.
    """
    ext = open_start(extraction)
    mode = mode or ext.mode
    if mode not in MODES:
        raise PktError(f"mode={mode!r} is unknown; choose one of {', '.join(MODES)}")
    config = config_of(peft_model, adapter_name)
    spec = spec_of_base(peft_model)
    check_fit(ext.pairs, spec, "the extraction")
    check_unshifted(peft_model)
    _check_weights(peft_model.get_base_model(), ext.pairs)
    tie(peft_model)
    pairs = {m: p for m, p in ext.pairs.items() if lora_parameters(peft_model, m, p, adapter_name) is not None}
    unused = [m for m in ext.pairs if m not in pairs]
    if not pairs:
        raise PktError(
            f"the adapter {adapter_name!r} targets none of the extraction's modules; they are like {unused[0]}"
        )
    if unused:
        warnings.warn(f"not used, because the adapter does not target them: {few(unused)}", PktWarning, stacklevel=2)
    multiple = 2 if mode == "paired" else 1
    faults = []
    for module, pair in pairs.items():
        rank = layer_of(peft_model, module, pair).r[adapter_name]
        if rank != pair.rank * multiple:
            faults.append(f"{module}: r={rank}, needed {pair.rank * multiple}")
        if pair.kind == "embedding" and spec.tied and not is_tied(peft_model, adapter_name):
            faults.append(f"{module}: tied to {spec.head}; target both, with ensure_weight_tying=True")
    if faults:
        raise PktError(
            f"mode={mode!r} cannot fill the adapter {adapter_name!r}; set r and rank_pattern: {short_list(faults)}"
        )
    adapter = Adapter(pairs, name_of(peft_model.get_base_model()), spec.head if spec.tied else None)
    # auto_mapping is saved as it is, but only for adapters with a task type; without one PEFT writes its own.
    config.task_type = config.task_type or "CAUSAL_LM"
    start_adapter(peft_model, adapter, mode, adapter_name)


def _arm_again(model: Any, ext: Extraction | Start, mode: Mode, name: str) -> Any:
    """Masks on a reloaded `paired` adapter, the shifted base under a reloaded `residual` one."""
    record = record_of(config_of(model, name).to_dict())
    if record is None:
        raise PktError(
            f"the adapter {name!r} of this model was not made by pkt; inject under another adapter_name, or start your own "
            "adapter with pkt.initialize_lora_weights"
        )
    if record["mode"] != mode:
        raise PktError(f"the adapter {name!r} was injected with mode={record['mode']!r}, not {mode!r}; pass that mode")
    pairs = {m: p for m, p in ext.pairs.items() if lora_parameters(model, m, p, name) is not None}
    if record["initial"] != Adapter(pairs, "").fingerprint():
        raise PktError(f"the adapter {name!r} was started from another extraction; pass the one it was made from")
    tie(model)
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
        shift(model, {m: p for m, p in pairs.items() if state.get(m) != "shifted"}, record)
    if mode == "paired":
        moved = max(arm_pair(model, m, p, name) for m, p in pairs.items())
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
