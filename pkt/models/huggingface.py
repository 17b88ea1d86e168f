"""Configurations, tokenizers and models as transformers reads them, with its errors and notices in pkt's words."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pkt.errors import PktError
from pkt.files import read_json
from pkt.models.checkpoint import CONFIG, first_line, gguf_file, inside
from pkt.models.tables import LARGEST
from pkt.progress import bar
from pkt.support import DEQUANTIZED


def checked_device(device: str | torch.device) -> torch.device:
    """The device a name means, as the tensors on it say it: "cuda" is the current one, and a CPU has no number.

    torch.device("cuda") != torch.device("cuda:0"), so weights already there would be taken for weights elsewhere. Raises `PktError`
    for a device that pkt does not run on, or that is not here.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise PktError(f"{device!r} is not a device; use cpu, cuda or cuda:0") from error
    if found.type not in ("cpu", "cuda"):
        raise PktError(f"device {str(found)!r}: pkt runs on cpu and cuda")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise PktError(f"device {str(found)!r}: torch sees {torch.cuda.device_count()} CUDA devices here; use cpu")
    if found.type == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)


def auto_class(config: Any) -> Any:
    """The auto class that makes what a checkpoint was published as: a multimodal model with its towers, or a causal one.

    What `architectures` names counts, so that an adapter's names and a merged model's tensors are those of the published class.
    """
    import transformers
    from transformers.models.auto import modeling_auto as auto

    kind, said = str(getattr(config, "model_type", "")), getattr(config, "architectures", None)
    named = said[0] if isinstance(said, list) and said else ""
    classes = {
        "AutoModelForCausalLM": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind),
        "AutoModelForImageTextToText": auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind),
        "AutoModelForMultimodalLM": auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(kind),
    }
    known = {name: (found,) if isinstance(found, str) else tuple(found) for name, found in classes.items() if found}
    decoders = [n for n in known if n == "AutoModelForCausalLM" or not getattr(config, "is_encoder_decoder", False)]
    chosen = next((name for name in decoders if named in known[name]), next(iter(decoders), "AutoModelForCausalLM"))
    return getattr(transformers, chosen)


def skeleton(config: Any, where: str) -> nn.Module:
    """The model of a configuration on the meta device: every module and shape, no weights; `where` is for errors."""
    with torch.device("meta"), quiet():
        try:
            model: nn.Module = auto_class(config).from_config(config, trust_remote_code=False)
        except Exception as error:  # whatever a modeling file does with settings that make no sense
            if type(config) not in auto_class(config)._model_mapping:
                kind = getattr(config, "model_type", type(config).__name__)
                raise PktError(
                    f"{where}: transformers has no causal language model for {kind!r}; pkt reads decoders (AutoModelForCausalLM)"
                ) from error
            raise PktError(
                f"{where}: no model can be built from this config.json ({type(error).__name__}: {first_line(error)[:200]}); "
                "copy it again"
            ) from error
    tie: Any = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()
    return model


def tied_names(model: nn.Module) -> dict[str, str]:
    """Tensor -> the one it is tied to, by the model's class and configuration."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def untie(model: nn.Module, name: str) -> None:
    """Give a tied tensor of a model on the meta device a parameter of its own."""
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    setattr(module, key, nn.Parameter(torch.empty_like(getattr(module, key), device="meta")))
    tied: Any = model.all_tied_weights_keys
    tied.pop(name)


def _kept_in_fp32(model: Any, dtype: torch.dtype | None) -> Callable[[str], bool]:
    """Whether transformers loads a tensor in fp32 all the same: the strict ones for both half types, the others for fp16."""
    half = list(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        half += list(getattr(model, "_keep_in_fp32_modules", None) or ())
    if dtype not in (torch.float16, torch.bfloat16) or not half:
        return lambda name: False
    found = re.compile("|".join(pattern.replace("*", ".*") for pattern in half))
    return lambda name: found.search(name) is not None


def hollow(model: Any, dtype: torch.dtype | None, device: torch.device) -> nn.Module:
    """A model on the meta device with its parameters in the types they are loaded in, and its computed buffers on `device`.

    Buffers that no checkpoint holds (rotary frequencies) are made as transformers makes them after loading: by the
    initialisation of whatever module fills them.
    """
    computed = []
    for name, module in model.named_modules():
        module._is_hf_initialized = False
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            if key in module._non_persistent_buffers_set:
                computed.append((f"{name}.{key}".lstrip("."), module, key))
                module._buffers[key] = _unfilled(tensor)
            else:
                tensor._is_hf_initialized = True
    if computed:
        model.initialize_weights()
    for name, module, key in computed:
        buffer = module._buffers[key]
        if buffer.is_floating_point() and buffer.isnan().any():
            raise PktError(f"transformers fills nothing into the buffer {name} of {type(model).__name__}")
        module._buffers[key] = buffer.to(device)
    kept = _kept_in_fp32(model, dtype)
    for prefix, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or dtype is None or not tensor.is_floating_point():
                continue
            if key not in module._non_persistent_buffers_set:
                tensor.data = tensor.data.to(torch.float32 if kept(f"{prefix}.{key}") else dtype)
    model.eval()
    assert isinstance(model, nn.Module)
    return model


def _unfilled(buffer: torch.Tensor) -> torch.Tensor:
    """Memory that shows where nothing was written: what no module fills would differ from run to run."""
    value = torch.nan if buffer.is_floating_point() else 0
    return torch.full_like(buffer, value, device="cpu")


def unwrap(model: nn.Module) -> nn.Module:
    """The plain model inside a PeftModel or a compiled or data-parallel wrapper."""
    inner: Any = getattr(model, "_orig_mod", model)
    if hasattr(inner, "get_base_model") and hasattr(inner, "peft_config"):
        inner = inner.get_base_model()
    assert isinstance(inner, nn.Module)
    return inner


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' loading bars and notices off the terminal: pkt says what matters itself."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


@contextlib.contextmanager
def counted(what: str) -> Iterator[None]:
    """Show what transformers counts inside, loading or writing tensors or shards, as pkt's own bar."""
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging as hf_logging

    with contextlib.ExitStack() as stack:

        def each(things: Any, *_: Any, **__: Any) -> Iterator[Any]:
            stack.close()  # what was counted before: a GGUF file is dequantized first, then loaded
            advance = stack.enter_context(bar(what, len(things), unit="tensors"))
            for done, thing in enumerate(things, 1):
                yield thing
                advance(done)

        def hook(factory: Callable[..., Any], given: tuple[Any, ...], options: dict[str, Any]) -> Any:
            return each(*given) if given else factory(**options)

        before, own = hf_logging.set_tqdm_hook(hook), gguf.tqdm
        gguf.tqdm = each  # no notice of transformers' reaches this one
        try:
            yield
        finally:
            gguf.tqdm = own
            hf_logging.set_tqdm_hook(before)


def read_config(folder: Path, name: str) -> Any:
    """The configuration in a folder; `name` is what the folder was named by."""
    from transformers import AutoConfig

    adapter = (folder / "adapter_config.json").is_file()
    if adapter and not (folder / CONFIG).is_file():
        raise PktError(f"{name} is an adapter folder; a model directory with a {CONFIG} is needed here")
    if adapter:
        raise PktError(
            f"{name} holds a model and an adapter (adapter_config.json), which transformers would load as one; move the adapter "
            "into a folder of its own, or merge it"
        )
    gguf = gguf_file(folder)
    if gguf is None:
        _check_sizes(folder)
    option = _gguf_option(gguf)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, **option)
    except Exception as error:  # a configuration class raises what it likes for values that make no sense
        raise PktError(f"{name}: {_unreadable(error)}") from error
    config.name_or_path = name
    if gguf is not None and hasattr(config, "quantization_config"):
        # Its weights are whole again once loaded.
        del config.quantization_config
    return config


def _check_sizes(folder: Path) -> None:
    """Refuse a configuration that is none, or of sizes that no model has: building one would take hours and all memory."""
    found = read_json(inside(folder, CONFIG, folder))
    if not isinstance(found, dict):
        raise PktError(f"{folder / CONFIG} is not a model's configuration; copy it again")
    for name, value in _numbers_in(found):
        most = next((most for pattern, most in LARGEST if re.search(pattern, name)), None)
        if most is not None and value > most:
            raise PktError(
                f"{folder / CONFIG}: {name} is {value:g}, and no model has more than {most:g}; copy the file again"
            )


def _numbers_in(settings: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _numbers_in(value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, value


def _unreadable(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return f"it needs code of its own (auto_map in its {CONFIG}), which pkt never runs; use a model that transformers knows"
    return f"not a model transformers can read: {first_line(error)}"


def read_tokenizer(folder: Path, name: str) -> Any:
    """The tokenizer in a folder; `name` is what the folder was named by."""
    from transformers import AutoTokenizer

    if (folder / CONFIG).is_file():
        # AutoTokenizer reads it too.
        _check_sizes(folder)
    option = _gguf_option(gguf_file(folder))
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, **option)
    except Exception as error:  # tokenizers raises bare Exception for a broken file
        raise PktError(f"{name}: no usable tokenizer there ({first_line(error)}); save one beside the model") from error


def _gguf_option(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    if importlib.util.find_spec("gguf") is None:
        raise PktError(f"{file} needs the package gguf to be read: pip install gguf")
    return {"gguf_file": file.name}


def check_dequantized(config: Any, name: str) -> None:
    """Refuse quantized weights that cannot be made whole here, from the configuration alone."""
    method = quantization(config)
    if method is None:
        return
    if method not in DEQUANTIZED:
        raise PktError(
            f"{name} is quantized with {method}, which pkt cannot undo; convert it to bf16 or fp16 safetensors, or to GGUF"
        )
    missing = [package for package in DEQUANTIZED[method] if importlib.util.find_spec(package) is None]
    if missing:
        raise PktError(
            f"{name} is quantized with {method}; install {', '.join(missing)}, or convert it to bf16 or fp16 safetensors"
        )


def quantization(config: Any) -> str | None:
    """The name of the method that a configuration says the weights are quantized with."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method", "an unnamed method") if isinstance(found, dict) else found.quant_method
    return str(getattr(method, "value", method))


def read_model(folder: Path, name: str, config: Any, dtype: torch.dtype | None, *, dequantize: bool) -> Any:
    """The whole model in a folder with this configuration, in eval mode; `name` is what the folder was named by.

    A GGUF file is read at its dequantized weights, fp32 unless a dtype is given. dequantize: give back whole weights for a
    checkpoint of bitsandbytes too. Raises `PktError` for one that leaves parameters of the model unset or does not fit it.
    """
    option = _gguf_option(gguf_file(folder))
    if option:
        from transformers import GgufConfig

        # Otherwise the model keeps its blocks where it can, and counts as quantized: it could not be trained.
        option["quantization_config"] = GgufConfig(dequantize=True)
    try:
        with quiet(), counted(f"loading {Path(name).name}"):
            model, info = auto_class(config).from_pretrained(
                str(folder),
                dtype=dtype or (torch.float32 if option else "auto"),
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **option,
            )
            if dequantize:
                model = model.dequantize()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise PktError(f"{name}: cannot be loaded: {first_line(error)}") from error
    missing = sorted(info.get("missing_keys", ()))
    misfits = sorted(f"{key} ({_sizes(found)})" for key, *found in info.get("mismatched_keys", ()))
    if missing or misfits:
        raise PktError(
            f"{name}: the checkpoint does not fill {', '.join((missing + misfits)[:5])}; it is incomplete or another model's"
        )
    # What an adapter made for it names as its base.
    model.name_or_path = model.config.name_or_path = name
    return model.eval()


def _sizes(found: Sequence[Any]) -> str:
    return ", ".join(
        f"{list(shape)} in {where}" for shape, where in zip(found, ("the files", "the model"), strict=False)
    )
