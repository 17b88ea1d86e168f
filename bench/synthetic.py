"""Random models and seeds for the benches: a checkpoint on disk, large shapes in memory, the same in every run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 16384  # of a checkpoint on disk
# Feed-forward width, hidden width, layers, heads, key/value heads, vocabulary.
Shape = tuple[int, int, int, int, int, int]
LARGE: dict[str, Shape] = {
    "13B": (13824, 5120, 40, 40, 40, 32000),
    "34B": (22016, 8192, 48, 64, 8, 32000),
    "70B": (28672, 8192, 80, 64, 8, 128256),
    "405B": (53248, 16384, 126, 128, 8, 128256),
}
SMALLER: dict[str, Shape] = {"7B": (11008, 4096, 32, 32, 32, 32000), "8B": (14336, 4096, 32, 32, 8, 32000)}


def llama(shape: Shape, tiny: bool = False) -> Any:
    from transformers import LlamaConfig

    ffn, hidden, layers, heads, kv, vocab = shape
    by = 64 if tiny else 1
    return LlamaConfig(
        vocab_size=vocab // by,
        hidden_size=hidden // by,
        intermediate_size=ffn // by,
        num_hidden_layers=max(2, layers // by) if tiny else layers,
        num_attention_heads=heads // 8 if tiny else heads,
        num_key_value_heads=max(1, kv // 8) if tiny else kv,
    )


def config(shape: dict[str, int], vocab: int = VOCABULARY) -> Any:
    from transformers import LlamaConfig

    heads = shape["num_attention_heads"]
    return LlamaConfig(
        **shape, vocab_size=vocab, num_key_value_heads=heads, max_position_embeddings=2048, dtype="bfloat16"
    )


def write_checkpoint(folder: Path, config: Any, make: Callable[[str, tuple[int, ...]], torch.Tensor]) -> int:
    """A bf16 checkpoint of what `make` gives by name and shape, one shard a layer; never whole in memory. Its bytes."""
    from safetensors.torch import save_file

    from pkt.models import Model

    config.save_pretrained(folder)
    groups: dict[str, list[str]] = {}
    shapes = {name: tuple(p.shape) for name, p in Model.of(config).skeleton().named_parameters()}
    for name in shapes:
        parts = name.split(".")
        groups.setdefault(parts[2] if "layers" in parts else "outside", []).append(name)
    weight_map, size = {}, 0
    for number, (_, names) in enumerate(groups.items()):
        tensors = {name: make(name, shapes[name]).to(torch.bfloat16) for name in names}
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
        size += sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def write_teacher(folder: Path, shape: dict[str, int]) -> int:
    """A checkpoint of random weights. Its bytes."""
    generator = torch.Generator().manual_seed(0)

    def make(name: str, size: tuple[int, ...]) -> torch.Tensor:
        noise = torch.randn(size, generator=generator)
        return 1 + 0.1 * noise if noise.ndim == 1 else noise.mul_(0.02)

    return write_checkpoint(folder, config(shape), make)


def seeds(count: int, length: int, vocab: int = VOCABULARY) -> Any:
    from pkt.seeds import Example, Seeds

    rows = torch.randint(0, vocab, (count, length), generator=torch.Generator().manual_seed(1)).tolist()
    return Seeds([Example(ids, list(ids), [], "", line) for line, ids in enumerate(rows, 1)], "bench", 0)


def random_model(shape: Any, device: torch.device, *, layers_share: bool) -> Any:
    """bf16 weights from one random block: a large model's own random numbers would take longer than the transfer.

    layers_share: every decoder layer's tensors are views of the first one's values, so that a teacher in host memory takes one
    layer of it. A layer is larger than any cache, so reading it again is reading memory all the same.
    """
    from pkt.models import hollow_model

    model = hollow_model(shape, torch.bfloat16, device)
    block = (torch.randn(1 << 24) * 0.02).to(torch.bfloat16).to(device)
    first: dict[str, torch.Tensor] = {}
    for index, (name, parameter) in enumerate(list(model.named_parameters())):
        owner, _, key = name.rpartition(".")
        like = re.sub(r"\.layers\.\d+\.", ".layers.*.", name) if layers_share else name
        if like not in first:
            first[like] = values = torch.empty_like(parameter, device=device)
            flat = values.view(-1)
            for start in range(0, flat.numel(), block.numel()):
                part = flat[start : start + block.numel()]
                part.copy_(block.roll(7919 * (index + 1) + start // block.numel())[: part.numel()])
            if values.ndim == 1:
                values += 1
        model.get_submodule(owner)._parameters[key] = torch.nn.Parameter(first[like])
    return model
