"""A student inside PEFT's wrapper: made, recognised, and loaded from a folder."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from pkt.adapters import check_fit, read_adapter, split_tied
from pkt.errors import PktError
from pkt.lora.tying import tie
from pkt.models import ModelSpec, load_model, quiet, spec_of_model

ADAPTER = "default"


def wrap(student: nn.Module, config: dict[str, Any], adapter_name: str = ADAPTER) -> Any:
    """get_peft_model with the adapter of a tied head made one with the embedding's."""
    from peft import get_peft_model

    # PEFT's class for causal models wants what only a model that generates has.
    generates = hasattr(student, "prepare_inputs_for_generation")
    with quiet(), expected_warnings():
        lora = lora_config(config if generates else {**config, "task_type": None})
        model = get_peft_model(student, lora, adapter_name=adapter_name)
    tie(model)
    return model


def add_adapter(model: Any, config: dict[str, Any], adapter_name: str) -> Any:
    lora = lora_config(config)
    with quiet(), expected_warnings():
        model.add_adapter(adapter_name, lora)
        base = model.get_base_model()
        embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
        if config["ensure_weight_tying"] and adapter_name not in getattr(head, "lora_A", {adapter_name: None}):
            # PEFT no longer finds a tied head once another adapter wraps it.
            rank, alpha = embedding.r[adapter_name], embedding.lora_alpha[adapter_name]
            head.update_layer(adapter_name, rank, lora_alpha=alpha, config=lora)
        tie(model)
        model.set_adapter(adapter_name)
    return model


def lora_config(config: dict[str, Any]) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{k: v for k, v in {**config, "inference_mode": False}.items() if k != "peft_type"})


@contextlib.contextmanager
def expected_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        # fan_in_fan_out is one flag for the whole model; PEFT corrects it per module and says so.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        # PEFT looks for the ranks of parameters among the modules, after it has used them.
        warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match")
        warnings.filterwarnings("ignore", message="The following alpha_pattern keys did not match")
        yield


def is_peft_model(model: nn.Module) -> bool:
    """Whether this is a PeftModel; a plain model with adapters inside is refused, since its PeftModel is needed."""
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return True
    if any(hasattr(module, "lora_A") for module in model.modules()):
        raise PktError(
            "this model has been wrapped already: PEFT put LoRA layers into it in place; pass the PeftModel that pkt.inject "
            "or get_peft_model returned, or load the student again"
        )
    return False


def unwrapped(model: Any) -> Any:
    """The PeftModel inside a compiled or data-parallel wrapper."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    return getattr(model, "_orig_mod", model)


def config_of(model: Any, name: str) -> Any:
    if not is_peft_model(model) or name not in model.peft_config:
        raise PktError(f"this model has no adapter {name!r}; make it with peft.get_peft_model or pkt.inject")
    return model.peft_config[name]


def spec_of_base(model: Any) -> ModelSpec:
    """The spec of the plain student inside a PeftModel: wrapped layers are read as the layers they wrap."""
    spec = spec_of_model(getattr(model, "_orig_mod", model).get_base_model())
    targets = []
    for target in spec.targets:
        module = target.module.replace(".base_layer", "")
        if ".lora_" not in module and not (spec.tied and module == spec.head):
            targets.append(dataclasses.replace(target, module=module))
    return dataclasses.replace(spec, targets=tuple(targets))


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
    with quiet(), expected_warnings():
        return PeftModel.from_pretrained(model, str(adapter)).eval()
