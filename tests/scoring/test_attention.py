"""Attention's backward pass in one order: asked for around the fused pass and nothing else, and put back whatever happens."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
import zoo
from torch.utils._python_dispatch import TorchDispatchMode

import pkt
from pkt.scoring.attention import OneOrder, one_order

# The CPU's fused backward pass stands in for CUDA's.
CPU = ("ScaledDotProductFlashAttentionForCpuBackward0",)


class Seen(TorchDispatchMode):
    """Each operation, and whether torch's deterministic algorithms were asked for while it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, set[bool]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.setdefault(func.overloadpacket.__name__, set()).add(torch.are_deterministic_algorithms_enabled())
        return func(*args, **(kwargs or {}))


def attended(width: int = 8) -> torch.Tensor:
    query, weight = (torch.randn(*shape, requires_grad=True) for shape in ((2, 2, 5, width), (width, width)))
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(query @ weight, query, query, is_causal=True) @ weight


def test_only_the_fused_backward_pass_is_asked_for() -> None:
    with OneOrder(CPU):
        out = attended()
        with Seen() as seen:
            out.sum().backward()
    assert seen.calls["_scaled_dot_product_flash_attention_for_cpu_backward"] == {True}
    # A product would be refused where CUBLAS_WORKSPACE_CONFIG is not set.
    assert seen.calls["mm"] == {False}
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    # What was called outside is left alone.
    with Seen() as seen:
        attended().sum().backward()
    assert seen.calls["_scaled_dot_product_flash_attention_for_cpu_backward"] == {False}


def test_settings_are_put_back_after_a_pass_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ == "_scaled_dot_product_flash_attention_for_cpu_backward":
                raise torch.OutOfMemoryError("out of memory")
            return func(*args, **(kwargs or {}))

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with OneOrder(CPU):
            total = attended().sum()
            with pytest.raises(torch.OutOfMemoryError), Full():
                total.backward()
            # As the failed pass left it.
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_cudnn_is_not_chosen_while_scoring_on_a_gpu() -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with one_order(torch.device("cuda:0")):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_every_layer_of_a_model_that_is_scored_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = zoo.llama(layers=3), oracle.batched(oracle.token_samples(2), 2)
    plain = pkt.sensitivity(model, batches, progress=False)
    begun: list[Any] = []
    monkeypatch.setattr(OneOrder, "_begin", lambda self, *gradients: begun.append(self))
    with OneOrder(CPU):
        scores = pkt.sensitivity(model, batches, progress=False)
    # Once for the probe of the layout and once for the batch.
    assert len(begun) == 2 * 3
    assert all(torch.equal(plain[name], scores[name]) for name in plain)
