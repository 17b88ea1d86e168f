"""A teacher or student however it was named, resolved once: its configuration, spec, tokenizer, files, content and weights."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pkt.errors import PktError, PktWarning
from pkt.files import sha256
from pkt.models import hub
from pkt.models.checkpoint import (
    CONFIG,
    CheckpointFiles,
    NotStoredError,
    WeightFiles,
    all_tensors,
    check_weights,
    find_weights,
    gguf_file,
)
from pkt.models.content import files_digest, tensors_digest
from pkt.models.huggingface import (
    check_dequantized,
    checked_device,
    counted,
    hollow,
    quantization,
    quiet,
    read_config,
    read_model,
    read_tokenizer,
    skeleton,
    tied_names,
    untie,
    unwrap,
)
from pkt.models.spec import ModelSpec, content_kind, spec_of_model

TOKENIZERS = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")


class Model:
    """A teacher or student, resolved once from a folder, a name on the Hub, a configuration, or a model in memory.

    Everything is read when it is first asked for, and kept. A name on the Hub means the main branch's newest revision when it
    was first asked for; its weights are downloaded only where they are needed.
    """

    def __init__(
        self,
        name: str,
        *,
        path: Path | None = None,
        module: nn.Module | None = None,
        config: Any = None,
        spec: ModelSpec | None = None,
    ) -> None:
        self.name, self.path, self.module = name, path, module
        self.on_hub = path is None and module is None and config is None and spec is None
        if module is not None or config is not None:
            self.config = getattr(module, "config", config)
        if spec is not None:
            self.spec = spec
        self._loaded: nn.Module | None = module
        self._content: dict[str, str] | None = None

    @classmethod
    def of(cls, given: Any, what: str = "a model (in memory, or the path of its checkpoint)") -> Model:
        """The model that a caller names. Raises `PktError` for anything that names none."""
        if isinstance(given, cls):
            return given
        if isinstance(given, ModelSpec):
            return cls(given.name, spec=given)
        if isinstance(given, nn.Module):
            module = unwrap(given)
            config = getattr(module, "config", None)
            return cls(str(getattr(config, "name_or_path", "") or type(module).__name__), module=module)
        if isinstance(given, (str, os.PathLike)):
            return cls(str(given), path=_local(Path(given)))
        if hasattr(given, "model_type") and hasattr(given, "to_dict"):
            return cls(str(getattr(given, "name_or_path", "") or "config"), config=given)
        raise PktError(f"{what} is needed, not {type(given).__name__}")

    @property
    def is_named(self) -> bool:
        """Whether it is a checkpoint, here or on the Hub, rather than a value in memory."""
        return self.path is not None or self.on_hub

    @cached_property
    def folder(self) -> Path:
        """Where its files lie. Raises `PktError` for what is no checkpoint."""
        if self.path is not None:
            return self.path
        if not self.on_hub:
            raise PktError(f"{self.name} is in memory, and has no files; name the checkpoint directory")
        return hub.snapshot(self.name, hub.SMALL)

    @cached_property
    def config(self) -> Any:
        return read_config(self.folder, self.name)

    @cached_property
    def tokenizer(self) -> Any:
        return read_tokenizer(self.folder, self.name)

    @cached_property
    def spec(self) -> ModelSpec:
        """What a plan needs to know; reads no weights but where a file alone can say whether two of them are tied."""
        if self.module is not None:
            return spec_of_model(self.module)
        return spec_of_model(self.skeleton(), self.name)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every parameter of numbers."""
        model = self.module if self.module is not None else self.skeleton()
        return {name: tuple(p.shape) for name, p in model.named_parameters() if p.is_floating_point()}

    # -- files

    @cached_property
    def weights(self) -> WeightFiles:
        """The files its weights are loaded from, downloaded if need be."""
        if self.on_hub:
            hub.fetch_weights(self.name, self.folder)
        return find_weights(self.folder)

    @property
    def is_here(self) -> bool:
        """Whether its weights can be read without a download."""
        if self.module is not None or "weights" in vars(self):
            return True
        try:
            return self.path is not None and bool(self.weights.paths)
        except PktError:
            return False

    def check(self) -> None:
        """Refuse missing, damaged or unsafe weight files before any of them is loaded. Raises `PktError` naming the file."""
        if self.is_named:
            _ = self._checked

    @cached_property
    def _checked(self) -> CheckpointFiles | None:
        # The configuration first: it tells a folder that is no model at all.
        quantized = quantization(self.config) is not None
        return check_weights(self.weights, quantized=quantized)

    def check_dequantized(self) -> None:
        """Refuse quantized weights that cannot be made whole here, from the configuration alone."""
        if self.is_named:
            check_dequantized(self.config, self.name)

    @property
    def files(self) -> CheckpointFiles:
        """Its tensors, one at a time. Raises `NotStoredError` where only transformers can read them."""
        found = self._checked
        if found is None:
            raise NotStoredError("its weights are a pickle" if self.weights.form == "pickle" else "it is a GGUF file")
        if quantization(self.config) is not None:
            raise NotStoredError("its weights are quantized")
        return found

    @cached_property
    def _untied(self) -> list[str]:
        """Tensors that the configuration ties to others, of which the files hold other values: transformers ties those not."""
        if not self.is_named or not self.is_here:
            return []
        try:
            model = skeleton(self.config, self.name)
            return self.files.untied(model, tied_names(model))
        except NotStoredError:
            return []

    def skeleton(self) -> nn.Module:
        """The model on the meta device: every module and shape, tied as it is once loaded, no weights."""
        model = skeleton(self.config, self.name)
        for name in self._untied if tied_names(model) else ():
            untie(model, name)
        return model

    def hollow(self, dtype: torch.dtype | None, device: torch.device) -> nn.Module:
        """The model with its parameters on meta, in the types they are loaded in, and its computed buffers on `device`."""
        return hollow(self.skeleton(), dtype, device)

    # -- weights

    def load(
        self, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", dequantize: bool = False
    ) -> Any:
        """The whole model in eval mode, in its own dtype unless one is given; a model in memory as it is.

        A GGUF file is read at its dequantized weights, fp32 unless a dtype is given. dequantize: give back whole weights for a
        checkpoint of bitsandbytes too. Raises `PktError` for a damaged checkpoint, for one that leaves parameters of the model
        unset, and, with `dequantize`, for a quantization that cannot be undone.
        """
        if self.module is not None:
            return self.module
        device = checked_device(device)
        self.check()
        if dequantize:
            self.check_dequantized()
        model = read_model(
            self.folder, self.name, self.config, dtype, dequantize=dequantize and quantization(self.config) is not None
        )
        # What only transformers can read may hold another head, which is known too late.
        told = self.weights.form == "safetensors" and quantization(self.config) is None
        if not told and spec_of_model(model).tied != self.spec.tied:
            raise PktError(
                f"{self.name} holds a head that its {CONFIG} ties to the embedding; set tie_word_embeddings to what is meant"
            )
        return model.to(device)

    @cached_property
    def _stored_as(self) -> dict[str, str]:
        return self.files.names_of(self.skeleton())

    def tensor(self, name: str) -> Tensor:
        """One parameter, without loading others where the files can be read one tensor at a time."""
        if self._loaded is None:
            try:
                if name in self._stored_as:
                    return self.files.read(self._stored_as[name])
            except NotStoredError as error:
                warnings.warn(f"{self.name} is loaded whole, not a layer at a time: {error}", PktWarning, stacklevel=2)
                self._loaded = self.load(dequantize=True)
        try:
            if self._loaded is not None:
                return self._loaded.get_parameter(name).detach()
        except AttributeError:
            pass
        raise PktError(f"{self.name} has no parameter {name}; the plan was made for another model")

    def rows(self, name: str, count: int) -> Tensor:
        """The first rows of one parameter, without reading the others where the files allow it."""
        if self._loaded is None and self.is_stored_one_by_one and name in self._stored_as:
            return self.files.read_rows(self._stored_as[name], count)
        return self.tensor(name)[:count]

    @property
    def is_stored_one_by_one(self) -> bool:
        """Whether its tensors can be read one at a time, from files that are here."""
        try:
            return self.is_named and self.is_here and bool(self.files.tensors)
        except NotStoredError:
            return False

    # -- identity

    def content(self, *, progress: bool = False) -> dict[str, str]:
        """Hashes of the weights and of the configuration, which change when a byte of them does.

        Weights in memory and in files give different kinds of hashes.
        """
        if self._content is None:
            if self.module is not None:
                weights = "memory:" + tensors_digest(all_tensors(self.module))
                config = self.config.to_dict() if hasattr(self.config, "to_dict") else {}
                settings = {k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version")}
                configuration = json.dumps(settings, sort_keys=True, default=str).encode()
            else:
                weights = "files:" + files_digest(self.weights.paths, progress=progress)
                file = self.folder / CONFIG
                configuration = file.read_bytes() if file.is_file() else b""
            self._content = {"fingerprint": weights, "configuration": sha256(configuration)}
        return self._content

    def identified(self, *, progress: bool = False) -> ModelSpec:
        """The spec with hashes of its content, as it is recorded beside a result."""
        revision = {"revision": self.folder.name} if self.on_hub else {}
        return dataclasses.replace(self.spec, content={**self.content(progress=progress), **revision})

    def comparable(self, recorded: Any) -> ModelSpec:
        """The spec, with hashes where a recorded identity has some of the same kind, and no download is needed for them."""
        kind = content_kind(recorded) if isinstance(recorded, dict) else ""
        own = "memory" if self.module is not None else "files"
        return self.identified(progress=True) if kind == own and self.is_here else self.spec


def _local(path: Path) -> Path | None:
    """The directory a name means, or None when it must be a name on the Hub."""
    if path.is_dir():
        return path
    if path.is_file():
        raise PktError(f"{path} is a file; name the checkpoint directory that holds it")
    if path.is_absolute() or str(path).startswith((".", "~")) or len(path.parts) != 2:
        raise PktError(f"{path} does not exist; name a checkpoint directory or a model on the Hub (owner/name)")
    return None


def spec_of(model: Any) -> ModelSpec:
    """`Model.spec` of anything that names a model."""
    return Model.of(model).spec


def load_model(
    path: Any, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", dequantize: bool = False
) -> Any:
    """`Model.load` of anything that names a model."""
    return Model.of(path).load(dtype=dtype, device=device, dequantize=dequantize)


def load_tokenizer(path: Any) -> Any:
    """`Model.tokenizer` of anything that names a model."""
    return Model.of(path).tokenizer


def hollow_model(given: Any, dtype: torch.dtype | None, device: torch.device) -> nn.Module:
    """`Model.hollow` of anything that names a model."""
    return Model.of(given).hollow(dtype, device)


def save_model(model: Any, folder: Path, source: Any) -> None:
    """A model as a checkpoint folder, with the tokenizer and the processors of the checkpoint that it was made from."""
    origin = Model.of(source)
    with quiet(), counted("writing the model"):
        model.save_pretrained(str(folder))
        if not origin.is_named:
            return
        if any((origin.folder / name).is_file() for name in TOKENIZERS):
            origin.tokenizer.save_pretrained(str(folder))
        elif gguf_file(origin.folder) is not None:
            with contextlib.suppress(PktError):  # of a file that holds no vocabulary
                origin.tokenizer.save_pretrained(str(folder))
        for file in origin.folder.glob("*processor_config.json"):
            shutil.copyfile(file, folder / file.name)
