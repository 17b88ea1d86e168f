"""Put an extraction into a student as a PEFT LoRA, so that step 0 is still the student (METHOD, section 5).

paired    one adapter of twice the rank, A = [A₀; A₀], B = [B₀, −B₀]: the halves cancel exactly. Only the first half gets a
          gradient, so a trainer moves BA away from B₀A₀ while −B₀A₀ stays. The student's weights are not touched, and every
          checkpoint is a LoRA of the original student.
residual  the paper's and PiSSA's way: W − B₀A₀ in the base, computed in fp32 and rounded once.
add       no counterweight: the student is changed at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from pkt.adapters import Pair, check_fit, read_adapter, split_tied
from pkt.errors import PktError
from pkt.extraction import Extraction
from pkt.models import load_model, quiet, spec_of_model

Mode: TypeAlias = Literal["paired", "residual", "add"]
MODES: tuple[Mode, ...] = ("paired", "residual", "add")
ADAPTER = "default"


def inject(student: Any, ext: Extraction | str | Path, *, mode: Mode = "paired", dropout: float = 0.0) -> Any:
    """Wrap `student` (a model or a checkpoint directory) with the extraction's LoRA. Returns a PeftModel to train.

    In `paired` and `residual` the model's function is the student's at step 0 (paired: to 1e-5 in fp32, dropout included).
    A model given in memory is wrapped in place, as PEFT does; only `residual` changes its weights. The second half of
    `paired` gets no gradient; weight decay, or training without pkt, moves it, which is harmless.

    Raises `PktError` listing every module of the extraction that the student does not have in that shape.
    """
    if mode not in MODES:
        raise PktError(f"mode={mode!r} is unknown; choose one of {', '.join(MODES)}")
    if not 0 <= dropout < 1:
        raise PktError(f"dropout={dropout} must be in [0, 1)")
    if not isinstance(ext, Extraction):
        ext = Extraction.load(ext)
    if not isinstance(student, nn.Module):
        student = load_model(student)
    if hasattr(student, "peft_config"):
        raise PktError("the student already carries a PEFT adapter; inject into the plain model (get_base_model())")
    spec = spec_of_model(student)
    check_fit(ext.pairs, spec, "the extraction")
    adapter = ext.adapter()
    adapter.base, adapter.tied_head = spec.name, spec.head if spec.tied else None
    if mode == "residual":
        _subtract(student, ext.pairs)
    model = wrap(student, adapter.config(dropout=dropout, multiple=2 if mode == "paired" else 1))
    _fill(model, ext.pairs, paired=mode == "paired")
    model.pkt_injection = {"mode": mode, "initial": dict(ext.pairs)}
    return model


def wrap(student: nn.Module, config: dict[str, Any]) -> Any:
    """get_peft_model with the adapter of a tied head made one with the embedding's."""
    from peft import LoraConfig, get_peft_model

    known = {k: v for k, v in config.items() if k != "peft_type"}
    with quiet(), warnings.catch_warnings():
        # fan_in_fan_out is one flag for the whole model; PEFT corrects it per module and says so.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", message="You have requested `ensure_weight_tying`")
        model = get_peft_model(student, LoraConfig(**{**known, "inference_mode": False}))
    if config["ensure_weight_tying"]:
        _tie(model)
    return model


class _Transposed(nn.Module):
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


def _tie(model: Any) -> None:
    base = model.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if not hasattr(head, "lora_A") or not hasattr(embedding, "lora_embedding_A"):
        return
    for adapter in list(head.lora_A):
        head.lora_A[adapter] = _Transposed(embedding, "lora_embedding_B", adapter)
        head.lora_B[adapter] = _Transposed(embedding, "lora_embedding_A", adapter)


def _lora_parameters(model: Any, module: str, kind: str) -> tuple[Tensor, Tensor]:
    layer = model.get_base_model().get_submodule(module)
    if kind == "embedding":
        return layer.lora_embedding_A[ADAPTER], layer.lora_embedding_B[ADAPTER]
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


@torch.no_grad()
def _fill(model: Any, pairs: dict[str, Pair], *, paired: bool) -> None:
    for module, pair in pairs.items():
        a, b = _lora_parameters(model, module, pair.kind)
        first_a, first_b = pair.A.to(a), pair.B.to(b)
        a.copy_(torch.cat([first_a, first_a]) if paired else first_a)
        b.copy_(torch.cat([first_b, -first_b], 1) if paired else first_b)
        if paired:
            a.register_hook(_keep_first_half(0))
            b.register_hook(_keep_first_half(1))


def _keep_first_half(dim: int) -> Callable[[Tensor], Tensor]:
    def mask(grad: Tensor) -> Tensor:
        masked = grad.clone()
        masked.narrow(dim, grad.shape[dim] // 2, grad.shape[dim] - grad.shape[dim] // 2).zero_()
        return masked

    return mask


@torch.no_grad()
def _subtract(student: nn.Module, pairs: dict[str, Pair]) -> None:
    """W − B₀A₀ in fp32, rounded once."""
    for module, pair in pairs.items():
        weight = student.get_submodule(module).weight
        assert isinstance(weight, Tensor)
        delta = Pair(pair.A.to(weight.device), pair.B.to(weight.device), pair.kind).delta()
        weight.copy_((weight.to(delta.dtype) - delta).to(weight.dtype))


def load_with_adapter(
    student: str | Path, adapter: str | Path | None, *, device: Any = "cpu", dtype: Any = None
) -> Any:
    """The student with a LoRA folder on it by plain PEFT, in eval mode."""
    from peft import PeftModel

    model = load_model(student, device=device, dtype=dtype)
    if adapter is None:
        return model
    pairs, _ = read_adapter(adapter)
    spec = spec_of_model(model)
    check_fit(split_tied(pairs, spec.head if spec.tied else None).pairs, spec, str(adapter))
    with quiet():
        return PeftModel.from_pretrained(model, str(adapter)).eval()
