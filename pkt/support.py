"""What pkt reads and was tried on. Nothing here imports torch, so that `pkt models` answers at once."""

from __future__ import annotations

import importlib.util
from collections.abc import Container

# Quantizations that transformers undoes, and the packages that it takes (GGUF files: gguf).
DEQUANTIZED: dict[str, tuple[str, ...]] = {"bitsandbytes": ("bitsandbytes", "accelerate")}

# Architectures (model_type) that tests/test_families.py runs end to end. Others work by discovery, or say what is missing.
TESTED = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt2",
    "gpt_neox",
    "opt",
    "falcon",
    "olmo2",
    "smollm3",
    "granite",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v3",
)


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
    known = _known_to_transformers()
    for name in TESTED:
        here = name in known
        rows.append((name, here, "tested end to end" if here else "this version of transformers does not have it"))
    rows.append(("other causal language models", True, "by discovery; `pkt models DIR` shows what is found"))
    return rows


def _known_to_transformers() -> Container[str]:
    try:
        from transformers.models.auto import auto_mappings
    except ImportError:  # an older transformers keeps them where torch is imported
        import transformers

        older: Container[str] = transformers.CONFIG_MAPPING
        return older
    known: Container[str] = auto_mappings.CONFIG_MAPPING_NAMES
    return known
