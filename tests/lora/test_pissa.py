"""`pkt.initialize_pissa_weights` against PEFT's own `init_lora_weights="pissa"`, which takes a full SVD of each layer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lifecycle import MIXED_LAYOUT, logits, save_quietly, steps, student
from torch import Tensor, nn

import pkt
from pkt.models import load_model

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj", "lm_head"], "gpt2": ["c_attn", "c_fc", "lm_head"]}


class Wide(nn.Module):
    """Layers too wide for an exact SVD within the sketch: one with a gap behind every singular value, one without."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(3)
        self.steep, self.flat = nn.Linear(260, 310, bias=False), nn.Linear(310, 240, bias=False)
        left, right = (torch.linalg.qr(torch.randn(n, 200, generator=g))[0] for n in (310, 260))
        with torch.no_grad():
            self.steep.weight.copy_(left * 0.6 ** torch.arange(200) @ right.T)
            self.flat.weight.copy_(torch.randn(240, 310, generator=g))

    def forward(self, x: Tensor) -> Tensor:
        return self.flat(torch.relu(self.steep(x)))


def wrapped(model: nn.Module, init: Any = True, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=MIXED_LAYOUT)
        return get_peft_model(model, LoraConfig(init_lora_weights=init, **options)).eval()


def both(make: Any, **options: Any) -> tuple[Any, Any]:
    """Ours and PEFT's of the same model."""
    ours = wrapped(make(), **options)
    pkt.initialize_pissa_weights(ours)
    return ours, wrapped(make(), "pissa", **options)


def layers(model: Any) -> dict[str, Any]:
    return {n: m for n, m in model.get_base_model().named_modules() if "default" in getattr(m, "lora_A", ())}


def product(layer: Any) -> Tensor:
    change: Tensor = layer.get_delta_weight("default").detach().double()
    return change


@pytest.mark.parametrize(
    "options", [{"r": 4}, {"r": 6, "lora_alpha": 5, "use_rslora": True, "rank_pattern": {"layers.1": 3, "h.1": 3}}]
)
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_the_same_as_peft(arch: str, options: dict[str, Any]) -> None:
    ours, theirs = both(lambda: student(arch), target_modules=TARGETS[arch], **options)
    assert layers(ours).keys() == layers(theirs).keys()
    for name, layer in layers(theirs).items():
        mine = layers(ours)[name]
        torch.testing.assert_close(product(mine), product(layer), rtol=0, atol=2e-5, msg=name)
        torch.testing.assert_close(mine.base_layer.weight, layer.base_layer.weight, rtol=0, atol=2e-5, msg=name)
        for factor in ("lora_A", "lora_B"):
            got, expected = (getattr(x, factor)["default"].weight for x in (mine, layer))
            by_rank = "ri,si->rs" if factor == "lora_A" else "ir,is->rs"
            gram, wanted = (torch.einsum(by_rank, x, x) for x in (got, expected))
            torch.testing.assert_close(gram, wanted, rtol=1e-4, atol=1e-4)
            assert got.dtype == expected.dtype
            assert got.requires_grad
    assert ours.peft_config["default"].init_lora_weights == "pissa"
    assert (logits(ours) - logits(student(arch))).abs().max() <= 1e-5


def test_wide_layers() -> None:
    ours, theirs = both(Wide, r=8, target_modules=["steep", "flat"])
    mine, expected = layers(ours), layers(theirs)
    gap = product(mine["steep"]) - product(expected["steep"])
    assert gap.norm() <= 1e-4 * product(expected["steep"]).norm()
    # Without gaps the directions are not determined, but what they leave is.
    left, least = (x["flat"].base_layer.weight.double().square().sum() for x in (mine, expected))
    assert least * (1 - 1e-6) <= left <= 1.01 * least


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(dtype: torch.dtype, autocast: bool) -> None:
    from peft import LoraConfig, get_peft_model

    def make(init: Any) -> Any:
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=init)
        return get_peft_model(student().to(dtype), config, autocast_adapter_dtype=autocast)

    ours, theirs = make(True), make("pissa")
    pkt.initialize_pissa_weights(ours)
    for (name, got), (same, expected) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert (name, got.dtype) == (same, expected.dtype)
    eps = torch.finfo(dtype).eps
    for name, layer in layers(theirs).items():
        mine = layers(ours)[name]
        size = product(layer).norm()
        assert (product(mine) - product(layer)).norm() <= 2 * eps * size
        gap = (mine.base_layer.weight - layer.base_layer.weight).double()
        assert gap.norm() <= eps * size
        whole = student().to(dtype).get_submodule(name).weight.double()
        assert (mine.base_layer.weight.double() + product(mine) - whole).norm() <= eps * whole.norm()


def test_embeddings_keep_pefts_start() -> None:
    torch.manual_seed(0)
    model = wrapped(student(), r=4, target_modules=["embed_tokens", "q_proj"])
    embedding = model.get_base_model().get_input_embeddings()
    before = [x.clone() for x in embedding.parameters()]
    pkt.initialize_pissa_weights(model)
    assert all(torch.equal(x, y) for x, y in zip(before, embedding.parameters(), strict=True))
    assert (logits(model) - logits(student())).abs().max() <= 1e-5


def test_the_same_seed_gives_the_same_bytes() -> None:
    states = []
    for seed in (1, 1, 2):
        model = wrapped(Wide(), r=8, target_modules=["flat"])
        pkt.initialize_pissa_weights(model, seed=seed)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not all(torch.equal(states[0][k], states[2][k]) for k in states[0])


def test_a_trained_one_becomes_a_plain_lora_by_pkt_and_by_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    student().save_pretrained(tmp_path / "student")
    model = wrapped(
        load_model(tmp_path / "student"), r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    pkt.initialize_pissa_weights(model)
    save_quietly(model, tmp_path / "initial")
    steps(model, 5, lr=1e-2)
    expected = logits(model)
    assert (expected - logits(student())).abs().max() > 1e-2
    done = pkt.finalize(model, tmp_path / "ours", student=tmp_path / "student")
    assert (done.mode, done.check is not None and done.check.gap <= 1e-4) == ("residual", True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(
            str(tmp_path / "theirs"), path_initial_model_for_weight_conversion=str(tmp_path / "initial")
        )
    for folder in ("ours", "theirs"):
        again = PeftModel.from_pretrained(load_model(tmp_path / "student"), str(tmp_path / folder)).eval()
        assert (logits(again) - expected).abs().max() <= 1e-4


class Quantized(Tensor):
    """What torchao's weights look like: a subclass that calls itself fp32."""


def spoil(layer: nn.Linear, weight: Tensor) -> None:
    layer.weight = nn.Parameter(weight, requires_grad=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q: spoil(q, torch.zeros(q.weight.shape, dtype=torch.uint8)), "Parameter of uint8"),
        (lambda q: spoil(q, q.weight.detach().double()), "Parameter of float64"),
        (lambda q: spoil(q, q.weight.detach().as_subclass(Quantized)), "Quantized of float32"),
        (lambda q: spoil(q, q.weight.detach().to("meta")), r"\[32, 32\] on meta"),
        (lambda q: delattr(q, "weight"), "no weight"),
    ],
)
def test_a_base_without_plain_weights_is_refused(change: Any, words: str) -> None:
    model = wrapped(student(), r=4, target_modules=["q_proj"])
    change(layers(model)["model.layers.1.self_attn.q_proj"].base_layer)
    refused(model, f"float16 or bfloat16; .*: model.layers.1.self_attn.q_proj: {words}$")


def refused(model: Any, words: str) -> None:
    """A `PktError`, and nothing changed."""
    before = {k: v.clone() for k, v in model.state_dict().items() if not v.is_meta}
    with pytest.raises(pkt.PktError, match=words):
        pkt.initialize_pissa_weights(model)
    after = model.state_dict()
    assert all(torch.equal(v, after[k]) or not v.isfinite().all() for k, v in before.items())


def test_what_cannot_be_started_is_refused() -> None:
    refused(wrapped(student(tied=True), r=4, target_modules=["lm_head"]), "lm_head: tied to another module")
    convolution = wrapped(nn.Sequential(nn.Conv2d(3, 8, 3)), r=2, target_modules=["0"])
    refused(convolution, r"0: \[8, 3, 3, 3\] on cpu")
    refused(wrapped(student(), r=4, target_modules=["embed_tokens"]), "no linear layer has the adapter 'default'")
    refused(wrapped(student(), r=40, target_modules=["q_proj"]), r"q_proj is \[32, 32\]: rank 40 is above its 32")

    model = wrapped(student(), r=4, target_modules=["q_proj"])
    model.merge_adapter()
    refused(model, "q_proj: merged")
    model.unmerge_adapter()
    with torch.no_grad():
        layers(model)["model.layers.1.self_attn.q_proj"].base_layer.weight[3, 4] = float("nan")
    refused(model, r"model\.layers\.1\.self_attn\.q_proj contains NaN or Inf")
    model.add_adapter("other", model.peft_config["default"])
    refused(model, r"the other adapters of this model \(other\)")


def test_a_base_is_shifted_once() -> None:
    model = wrapped(student(), r=4, target_modules=["q_proj"])
    pkt.initialize_pissa_weights(model)
    refused(model, "already shifted")
    refused(wrapped(student(), "pissa", r=4, target_modules=["q_proj"]), "init_lora_weights='pissa'; leave it")
    with pytest.raises(pkt.PktError, match="has no adapter 'mine'"):
        pkt.initialize_pissa_weights(wrapped(student(), r=4, target_modules=["q_proj"]), adapter_name="mine")
