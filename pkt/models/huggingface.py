"""Configurations, tokenizers and models as transformers reads them, with its errors and notices in pkt's words."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pkt.errors import PktError
from pkt.files import read_json
from pkt.models.checkpoint import check_checkpoint, first_line, gguf_file, local_folder
from pkt.models.tables import DEQUANTIZED, TESTED


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


def skeleton(config: Any) -> nn.Module:
    """The model of a configuration on the meta device: every module and shape, no weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), quiet():
        try:
            model: nn.Module = AutoModelForCausalLM.from_config(config)
        except (ValueError, KeyError) as error:
            kind = getattr(config, "model_type", type(config).__name__)
            where = getattr(config, "name_or_path", "") or "the configuration"
            raise PktError(
                f"{where}: transformers has no causal language model for {kind!r}; pkt reads decoders (AutoModelForCausalLM)"
            ) from error
        except Exception as error:  # whatever a modeling file does with numbers that make no sense
            raise PktError(
                f"{getattr(config, 'name_or_path', '') or 'the configuration'}: no model can be built from this "
                f"config.json ({type(error).__name__}: {first_line(error)}); copy it again"
            ) from error
    tie: Any = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()
    return model


def _kept_in_fp32(model: Any, dtype: torch.dtype | None) -> Callable[[str], bool]:
    """Whether transformers loads a tensor in fp32 all the same: the strict ones for both half types, the others for fp16."""
    half = list(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        half += list(getattr(model, "_keep_in_fp32_modules", None) or ())
    if dtype not in (torch.float16, torch.bfloat16) or not half:
        return lambda name: False
    found = re.compile("|".join(pattern.replace("*", ".*") for pattern in half))
    return lambda name: found.search(name) is not None


def hollow_model(config: Any, dtype: torch.dtype | None, device: torch.device) -> nn.Module:
    """The model of a configuration with its parameters on meta, in the types they are loaded in, and its computed buffers on
    `device`.

    Buffers that no checkpoint holds (rotary frequencies) are made as transformers makes them after loading.
    """
    model: Any = skeleton(config)
    for module in model.modules():
        missing = [k for k, b in module._buffers.items() if b is not None and k in module._non_persistent_buffers_set]
        for key in missing:
            module._buffers[key] = torch.empty_like(module._buffers[key], device="cpu")
        if missing:
            with torch.no_grad():
                model._init_weights(module)
        for key in missing:
            module._buffers[key] = module._buffers[key].to(device)
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


def load_config(path: str | Path) -> Any:
    """The configuration of a checkpoint directory or of a model on the Hub."""
    from transformers import AutoConfig

    local = local_folder(path)
    if local is not None:
        if (local / "adapter_config.json").is_file() and not (local / "config.json").is_file():
            raise PktError(f"{path} is an adapter folder; a model directory with a config.json is needed here")
        if gguf_file(path) is None:
            read_json(local / "config.json")
    try:
        with quiet():
            config = AutoConfig.from_pretrained(str(path), **_gguf_option(path))
            if gguf_file(path) is not None and hasattr(config, "quantization_config"):
                # Its weights are whole again once loaded.
                del config.quantization_config
            return config
    except Exception as error:  # a configuration class raises what it likes for values that make no sense
        raise PktError(f"{path}: {_unreadable(local, error)}") from error


def _unreadable(local: Path | None, error: Exception) -> str:
    if local is None and isinstance(error, OSError):
        return f"there is no such folder here, and the Hub does not give it either: {first_line(error)}"
    return f"not a model transformers can read: {first_line(error)}"


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a checkpoint directory or of a model on the Hub."""
    from transformers import AutoTokenizer

    local_folder(path)
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(str(path), **_gguf_option(path))
    except Exception as error:  # tokenizers raises bare Exception for a broken file
        raise PktError(f"{path}: no usable tokenizer there ({first_line(error)}); save one beside the model") from error


def save_model(model: Any, folder: Path, source: str | Path) -> None:
    """A model as a checkpoint folder, with the tokenizer of the checkpoint that it was made from, where there is one."""
    with quiet():
        model.save_pretrained(str(folder))
        if (Path(source) / "tokenizer_config.json").is_file():
            load_tokenizer(source).save_pretrained(str(folder))


def _gguf_option(path: str | Path) -> dict[str, Any]:
    file = gguf_file(path)
    if file is None:
        return {}
    if importlib.util.find_spec("gguf") is None:
        raise PktError(f"{file} needs the package gguf to be read: pip install gguf")
    return {"gguf_file": file.name}


def check_quantization(path: str | Path) -> None:
    """Refuse a teacher whose quantized weights cannot be made whole here, from its configuration alone."""
    method = _quantization(load_config(path))
    if method is None:
        return
    if method not in DEQUANTIZED:
        raise PktError(
            f"{path} is quantized with {method}, which pkt cannot undo; convert it to bf16 or fp16 safetensors, or to GGUF"
        )
    missing = [name for name in DEQUANTIZED[method] if importlib.util.find_spec(name) is None]
    if missing:
        raise PktError(
            f"{path} is quantized with {method}; install {', '.join(missing)}, or convert it to bf16 or fp16 safetensors"
        )


def _quantization(config: Any) -> str | None:
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method", "an unnamed method") if isinstance(found, dict) else found.quant_method
    return str(getattr(method, "value", method))


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    dequantize: bool = False,
) -> Any:
    """A causal language model from a checkpoint directory or the Hub, in eval mode, in its own dtype unless one is given.

    A GGUF file is read at its dequantized weights, fp32 unless a dtype is given. dequantize: give back whole weights for a
    checkpoint of bitsandbytes too. Raises `PktError` for a damaged checkpoint, for one that leaves parameters of the model
    unset, and, with `dequantize`, for a quantization that cannot be undone.
    """
    from transformers import AutoModelForCausalLM

    device = checked_device(device)
    check_checkpoint(path)
    quantized = _quantization(load_config(path)) is not None
    if dequantize:
        check_quantization(path)
    option = _gguf_option(path)
    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                str(path), dtype=dtype or (torch.float32 if option else "auto"), output_loading_info=True, **option
            )
            if quantized and dequantize:
                model = model.dequantize()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise PktError(f"{path}: cannot be loaded: {first_line(error)}") from error
    missing = sorted(info.get("missing_keys", ())) + sorted(str(k) for k in info.get("mismatched_keys", ()))
    if missing:
        raise PktError(
            f"{path}: the checkpoint does not fill {', '.join(missing[:5])}; it is incomplete or another model's"
        )
    return model.eval().to(device)


def supported() -> list[tuple[str, bool, str]]:
    """(what, whether it works here, why) for checkpoint formats and architectures."""
    rows = [
        ("safetensors", True, "read one decoder layer at a time"),
        ("pickle (*.bin)", True, "loaded whole, where that is safe; convert to safetensors to stream it"),
    ]
    for name, packages in (("GGUF", ("gguf",)), *DEQUANTIZED.items()):
        missing = [p for p in packages if importlib.util.find_spec(p) is None]
        why = "loaded whole, scored at its dequantized weights"
        rows.append((name, not missing, f"pip install {' '.join(missing)}" if missing else why))
    rows.append(("other quantizations", False, "convert to bf16 or fp16 safetensors, or to GGUF"))
    from transformers import CONFIG_MAPPING

    for name in TESTED:
        here = name in CONFIG_MAPPING
        rows.append((name, here, "tested end to end" if here else "this version of transformers does not have it"))
    rows.append(("other causal language models", True, "by discovery; `pkt models DIR` shows what is found"))
    return rows
