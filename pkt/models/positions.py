"""How long a row a model reads: to the end of its table of positions, where it has one. Rotary and linear ones have no end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from pkt.models.tables import POSITION_TABLES


def position_limit(model: nn.Module, layers: str | None) -> int | None:
    """The longest row in tokens, or None where nothing ends there; layers: the name of the list of decoder layers.

    Tables of towers (pictures, sound) bound no text: counted is what lies beside the token table, above the layers or in them.
    """
    limits = list(_limits(model, layers or "", _home_of_tokens(model)))
    # MPT makes its linear biases up to a length of its own.
    mpt: list[Any] = [m for m in model.modules() if hasattr(m, "build_mpt_alibi_tensor")]
    limits += [int(m.config.max_seq_len) for m in mpt]
    return min(limits, default=None)


def _limits(model: nn.Module, layers: str, home: str | None) -> Iterator[int]:
    for name, module in model.named_modules():
        owner, _, last = name.rpartition(".")
        if last in POSITION_TABLES and isinstance(module, nn.Embedding) and _reads_text(owner, layers, home):
            yield module.num_embeddings - _first(module)
        for key, buffer in module._buffers.items():
            if key in POSITION_TABLES and buffer is not None and _reads_text(name, layers, home):
                yield int(buffer.shape[0])


def _reads_text(owner: str, layers: str, home: str | None) -> bool:
    return owner == home or f"{layers}.".startswith(f"{owner}.") or f"{owner}.".startswith(f"{layers}.") or not owner


def _first(table: Any) -> int:
    """The row of the first position: OPT leaves out two, RoBERTa those up to the padding's."""
    if hasattr(table, "offset"):
        return int(table.offset)
    return 0 if table.padding_idx is None else int(table.padding_idx) + 1


def _home_of_tokens(model: Any) -> str | None:
    """The name of the module that holds the token table."""
    try:
        table = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return next((name.rpartition(".")[0] for name, module in model.named_modules() if module is table), None)
