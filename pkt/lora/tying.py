"""The adapter of a tied head made one with the embedding's: PEFT keeps two over one memory, and merges both."""

from __future__ import annotations

import types
from typing import Any

from torch import Tensor, nn


class Transposed(nn.Module):
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


def tie(model: Any) -> None:
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
            head.lora_A[name] = Transposed(embedding, "lora_embedding_B", name)
            head.lora_B[name] = Transposed(embedding, "lora_embedding_A", name)
    head.merge = types.MethodType(_merge_tied, head)
    head.unmerge = types.MethodType(_unmerge_tied, head)


def is_tied(model: Any, name: str) -> bool:
    head = model.get_base_model().get_output_embeddings()
    return name in getattr(head, "lora_A", {}) and isinstance(head.lora_A[name], Transposed)


def _merge_tied(head: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """Merge what the embedding does not merge into the weight they share: adding a tied change here would add it twice."""
    wanted = head.active_adapters if adapter_names is None else adapter_names
    tied = [n for n in wanted if n in head.lora_A and isinstance(head.lora_A[n], Transposed)]
    type(head).merge(head, safe_merge=safe_merge, adapter_names=[n for n in wanted if n not in tied])
    head.merged_adapters.extend(n for n in tied if n not in head.merged_adapters)


def _unmerge_tied(head: Any) -> None:
    head.merged_adapters = [n for n in head.merged_adapters if not isinstance(head.lora_A[n], Transposed)]
    if head.merged_adapters:
        type(head).unmerge(head)
