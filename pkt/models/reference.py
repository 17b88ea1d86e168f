"""A teacher or student however it was named: its spec, its fingerprint, its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pkt.errors import PktError
from pkt.files import safetensors_header, sha256
from pkt.models.checkpoint import check_checkpoint, local_folder
from pkt.models.huggingface import load_config, load_model, skeleton, unwrap
from pkt.models.spec import ModelSpec, spec_of_model


def spec_of(model: Any) -> ModelSpec:
    """The spec of a model, a configuration or a checkpoint directory; reads no weights.

    Raises `PktError` for a directory that is not a checkpoint.
    """
    if isinstance(model, ModelSpec):
        return model
    if isinstance(model, nn.Module):
        return spec_of_model(unwrap(model))
    name = str(model) if isinstance(model, (str, Path)) else str(getattr(model, "name_or_path", "") or "config")
    config = load_config(model) if isinstance(model, (str, Path)) else model
    return spec_of_model(skeleton(config), name)


def fingerprint(model: Any) -> str:
    """A hash that changes when a checkpoint does: names, shapes and file ends, not every byte of a large model."""
    if isinstance(model, (str, Path)) and Path(model).is_dir():
        parts: list[bytes | str] = []
        for file in sorted([*Path(model).glob("*.safetensors"), *Path(model).glob("*.gguf")]):
            with open(file, "rb") as handle:
                parts += [file.name, str(file.stat().st_size), handle.read(1 << 16)]
                handle.seek(max(0, file.stat().st_size - (1 << 16)))
                parts.append(handle.read())
        return sha256(*parts)
    if isinstance(model, nn.Module):
        parts = []
        for name, parameter in unwrap(model).named_parameters():
            flat = parameter.detach().flatten()
            ends = torch.cat([flat[:64], flat[-64:]]).float().cpu()
            parts += [name, str(tuple(parameter.shape)), ends.numpy().tobytes()]
        return sha256(*parts)
    return sha256(json.dumps(spec_of(model).identity(), sort_keys=True))


class Weights:
    """Parameters by name, one at a time: of a model in memory, or straight out of a safetensors checkpoint."""

    def __init__(self, model: Any) -> None:
        self.model: nn.Module | None = unwrap(model) if isinstance(model, nn.Module) else None
        self.path = model
        self.files: dict[str, Path] = {}
        if self.model is None:
            check_checkpoint(model)
            local = local_folder(model)
            for file in sorted(local.glob("*.safetensors")) if local else ():
                self.files.update({key: file for key in safetensors_header(file) if key != "__metadata__"})

    def __getitem__(self, name: str) -> Tensor:
        if self.model is None and name not in self.files:
            # Saved under other names (an old layout, a pickle, the Hub): let transformers map them.
            self.model = load_model(self.path, dequantize=True)
        if self.model is not None:
            try:
                return self.model.get_parameter(name).detach()
            except AttributeError as error:
                raise PktError(f"the model has no parameter {name}; the plan was made for another model") from error
        from safetensors import safe_open

        with safe_open(self.files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor
