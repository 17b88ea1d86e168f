"""Modules that pkt has no class of: routers, fused experts, linear and embedding subclasses share a batch, and S is exact."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn

import pkt
from pkt.ops import tile_sums
from pkt.scoring import Findings, Scorer
from pkt.seeds import Example, Seeds

SAMPLES = oracle.token_samples(8, longest=14)
ALONE = oracle.batched(SAMPLES, 1)


def config(name: str, **more: Any) -> Any:
    import transformers

    fields = {
        "vocab_size": 67,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "num_experts_per_tok": 2,
    }
    return getattr(transformers, name)(**{**fields, **more})


# Modules that the zoo's families do not have: a product over all experts, no gate, routers that are linear layers.
OTHERS: dict[str, Any] = {
    "Llama 4": lambda: config(
        "Llama4TextConfig", intermediate_size_mlp=40, num_local_experts=4, num_experts_per_tok=1, head_dim=8
    ),
    "Phi-MoE": lambda: config("PhimoeConfig", num_local_experts=4),
    "Qwen2-MoE": lambda: config(
        "Qwen2MoeConfig", num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=16
    ),
    "OLMoE": lambda: config("OlmoeConfig", num_experts=4),
    "Nemotron-H": lambda: config(
        "NemotronHConfig",
        layers_block_type=["attention", "moe"],
        head_dim=8,
        n_routed_experts=4,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=16,
        n_group=1,
        topk_group=1,
    ),
    "BioGPT": lambda: config("BioGptConfig", scale_embedding=True),
}
FAMILIES = (
    "Falcon",
    "Falcon (new decoder)",
    "Gemma3 (text)",
    "OPT",
    "Mixtral",
    "Qwen3-MoE",
    "GPT-OSS",
    "DeepSeek-V3",
    *OTHERS,
)
EXPERTS = ("Mixtral", "GPT-OSS", "DeepSeek-V3", "Llama 4")


@functools.cache
def model(family: str) -> Any:
    if family in zoo.FAMILIES:
        return zoo.model(family)
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(OTHERS[family]()).eval()
    if hasattr(made, "set_experts_implementation"):
        made.set_experts_implementation("eager")
    for parameter in made.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return made


@functools.cache
def truth(family: str, measure: str = "theta_grad") -> dict[str, Tensor]:
    return oracle.sensitivity(model(family), ALONE, measure=measure)


def assert_exact(found: Any, expected: dict[str, Tensor]) -> None:
    floor = 1e-9 * sum(float(t.norm()) for t in expected.values())
    assert set(found) == set(expected)
    for name, one in expected.items():
        assert float((found[name].double() - one).norm()) <= 1e-5 * float(one.norm()) + floor, name


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Fails where samples turn out not to share a batch; how the small passes that try it ended."""
    tried: list[bool] = []
    plain = Scorer.shares_a_batch

    def shares_a_batch(self: Scorer, small: Any, loss_fn: Any) -> bool:
        tried.append(plain(self, small, loss_fn))
        return tried[-1]

    monkeypatch.setattr(Scorer, "shares_a_batch", shares_a_batch)
    monkeypatch.setattr(Findings, "alone", lambda self: pytest.fail("samples do not share a batch"))
    yield tried
    assert tried
    assert all(tried)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_of_eight_is_exact(family: str, together: Any) -> None:
    sens = pkt.sensitivity(model(family), oracle.batched(SAMPLES, 8), progress=False)
    assert_exact(sens, truth(family))


@pytest.mark.parametrize("measure", ["grad", "fisher", "theta_grad_squared"])
@pytest.mark.parametrize("family", [*EXPERTS, "Gemma3 (text)"])
def test_other_measures(family: str, measure: str, together: Any) -> None:
    sens = pkt.sensitivity(model(family), oracle.batched(SAMPLES, 5), measure=measure, progress=False)
    assert_exact(sens, truth(family, measure))


@pytest.mark.parametrize("family", [*EXPERTS, "Gemma3 (text)"])
def test_tile_sums(family: str, together: Any) -> None:
    sens = pkt.sensitivity(model(family), oracle.batched(SAMPLES, 4), tile=5, progress=False)
    assert_exact(sens, {name: tile_sums(one, 5) for name, one in truth(family).items()})


@pytest.mark.parametrize("family", ["Falcon", "Gemma3 (text)", *EXPERTS])
def test_streamed_as_in_memory(family: str, together: Any, tmp_path: Any) -> None:
    teacher = model(family)
    teacher.save_pretrained(tmp_path / "teacher")
    student = model(family) if family == "Llama 4" else zoo.model(family, "student")
    seeds = Seeds(
        [Example(ids, [-100] * n + ids[n:], ids[:n], "", i) for i, (ids, n) in enumerate(SAMPLES, 1)], "seeds", 3
    )
    pkt.transfer(
        tmp_path / "teacher",
        student,
        seeds,
        out=tmp_path / "out",
        rank=2,
        keep_scores="full",
        modules="attention",
        progress=False,
    )
    kept = pkt.Sensitivity.load(tmp_path / "out" / "scores.safetensors")
    assert_exact(kept, truth(family))


@pytest.mark.parametrize("family", EXPERTS)
def test_under_activation_checkpointing(family: str, together: Any) -> None:
    sens = pkt.sensitivity(model(family), oracle.batched(SAMPLES, 8), loss_fn=oracle.checkpointed, progress=False)
    assert_exact(sens, truth(family))


@pytest.mark.parametrize("family", ["Mixtral", "GPT-OSS"])
def test_experts_that_a_sample_or_nobody_is_sent_to(family: str, together: Any) -> None:
    crowded = zoo.model(family, num_local_experts=24)
    expected = oracle.sensitivity(crowded, ALONE)
    name = "model.layers.0.mlp.experts.down_proj"
    one = oracle.sensitivity(crowded, ALONE[:1])[name]
    assert not expected[name].flatten(1).any(1).all()
    assert (expected[name].flatten(1).any(1) & ~one.flatten(1).any(1)).any()
    assert_exact(pkt.sensitivity(crowded, oracle.batched(SAMPLES, 8), progress=False), expected)


@pytest.mark.parametrize("params", [r"experts\.down_proj$", r"experts\.gate_up_proj_bias", r"router\.weight", "sinks"])
def test_some_parameters_alone(params: str, together: Any) -> None:
    sens = pkt.sensitivity(model("GPT-OSS"), oracle.batched(SAMPLES, 8), params=params, progress=False)
    assert sens
    assert_exact(sens, {name: truth("GPT-OSS")[name] for name in sens})


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_whatever_implementation_the_model_uses(implementation: str, together: Any) -> None:
    mixtral = zoo.model("Mixtral")
    mixtral.set_experts_implementation(implementation)
    assert_exact(pkt.sensitivity(mixtral, oracle.batched(SAMPLES, 8), progress=False), truth("Mixtral"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["Mixtral", "GPT-OSS"])
def test_half_types_lose_no_more_than_the_module_itself(family: str, dtype: torch.dtype) -> None:
    half = zoo.model(family).to(dtype)
    with torch.no_grad():
        for name, parameter in half.named_parameters():
            if "gate.weight" in name or "router.weight" in name:
                parameter *= 30  # so that rounding does not send a token elsewhere
    expected = oracle.sensitivity(half, ALONE)
    sens = pkt.sensitivity(half, oracle.batched(SAMPLES, 8), progress=False)
    for layer in half.model.layers:
        layer.mlp.experts.forward = layer.mlp.experts.forward  # its own, which autograd sees
    plain = pkt.sensitivity(half, ALONE, progress=False)
    for name in (n for n in expected if ".experts." in n):
        allowed = 2 * oracle.relative_error(plain[name], expected[name]) + oracle.FLOOR[dtype]
        assert oracle.relative_error(sens[name], expected[name]) < allowed, name


def test_layers_that_share_their_experts(together: Any) -> None:
    mixtral = zoo.model("Mixtral")
    mixtral.model.layers[1].mlp = mixtral.model.layers[0].mlp
    expected = oracle.sensitivity(mixtral, ALONE)
    assert_exact(pkt.sensitivity(mixtral, oracle.batched(SAMPLES, 8), progress=False), expected)


def test_experts_that_are_not_what_they_say_are_found_out() -> None:
    class Louder(type(model("Mixtral").model.layers[0].mlp.experts)):  # type: ignore[misc]
        def forward(self, *args: Any) -> Tensor:
            out: Tensor = super().forward(*args)
            return 2 * out

    mixtral = zoo.model("Mixtral")
    mixtral.model.layers[1].mlp.experts.__class__ = Louder
    expected = oracle.sensitivity(mixtral, ALONE)
    for size in (1, 8):
        assert_exact(pkt.sensitivity(mixtral, oracle.batched(SAMPLES, size), progress=False), expected)


# --- any module -------------------------------------------------------------------------------------------------------


class Own(nn.Linear):
    """A linear layer whose forward is the function given."""

    def __init__(self, use: Any, bias: bool = True) -> None:
        super().__init__(16, 16, bias=bias)
        self.use = use

    def forward(self, x: Tensor) -> Any:
        return self.use(self, x)


class Table(nn.Embedding):
    def __init__(self, use: Any) -> None:
        super().__init__(67, 16, padding_idx=5)
        self.use = use

    def forward(self, ids: Tensor) -> Any:
        return self.use(self, ids)


class Tiny(nn.Module):
    def __init__(self, table: nn.Module, inner: nn.Module) -> None:
        super().__init__()
        self.table, self.inner = table, inner
        self.head = nn.Linear(16, 67)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        x = self.table(input_ids)
        logits: Tensor = self.head(x + torch.tanh(self.inner(x)))
        return logits


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        return grads[0] @ weight, grads[0].flatten(0, 1).t() @ x.flatten(0, 1)


FOLLOWED = {
    "scaled": lambda m, x: 3 * F.linear(x, m.weight, m.bias),
    "cast": lambda m, x: F.linear(x.double(), m.weight.double()).to(x.dtype) + m.bias,
    "matmul": lambda m, x: torch.matmul(x, m.weight.T) + m.bias,
    "mm of rows": lambda m, x: (x.reshape(-1, 16).mm(m.weight.t()) + m.bias).view_as(x),
    "the other way round": lambda m, x: m.bias + x @ m.weight,
    "transposed in linear": lambda m, x: F.linear(x, m.weight.transpose(0, 1), m.bias),
    "twice": lambda m, x: F.linear(torch.tanh(F.linear(x, m.weight, m.bias)), m.weight, m.bias),
    "a bias expanded": lambda m, x: F.linear(x, m.weight) + m.bias.reshape(1, 1, -1).expand(len(x), 1, 16),
    "looked at": lambda m, x: F.linear(x.to(m.weight.dtype), m.weight, m.bias) * m.weight.shape[0],
}
NOT_FOLLOWED = {
    "normalized": lambda m, x: F.linear(x, F.normalize(m.weight), m.bias),
    "and used past it": lambda m, x: F.linear(x, m.weight, m.bias) + m.weight.sum(),
    "multiplied": lambda m, x: F.linear(x, m.weight) * m.bias,
    "in a function of its own": lambda m, x: Product.apply(x, m.weight) + m.bias,
    "product of parameters": lambda m, x: x @ (m.weight @ m.weight) + m.bias,
    "sliced": lambda m, x: torch.cat([F.linear(x, m.weight[:8]), F.linear(x, m.weight[8:])], -1) + m.bias,
}
TABLES = {
    "scaled": lambda m, ids: nn.Embedding.forward(m, ids) * 5.0,
    "indexed": lambda m, ids: m.weight[ids],
    "normed": lambda m, ids: F.rms_norm(F.embedding(ids, m.weight, 5), m.weight.shape[1:], eps=1e-6),
    "one-hot": lambda m, ids: F.one_hot(ids, 67).to(m.weight.dtype) @ m.weight,
}


def assert_tiny(tiny: Tiny) -> None:
    for parameter in tiny.parameters():
        parameter.data = 0.5 * torch.randn_like(parameter)

    def loss(m: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(m(batch["input_ids"])[0, :-1], batch["labels"][0, 1:])[None]

    expected = oracle.sensitivity(tiny, ALONE, loss)
    assert_exact(pkt.sensitivity(tiny, oracle.batched(SAMPLES, 8), progress=False), expected)


@pytest.mark.parametrize("use", FOLLOWED)
def test_a_module_that_multiplies_by_its_weight_shares_a_batch(use: str, together: Any) -> None:
    torch.manual_seed(3)
    assert_tiny(Tiny(nn.Embedding(67, 16), Own(FOLLOWED[use])))


@pytest.mark.parametrize("use", TABLES)
def test_a_table_that_is_looked_up_shares_a_batch(use: str, together: Any) -> None:
    torch.manual_seed(3)
    assert_tiny(Tiny(Table(TABLES[use]), nn.Linear(16, 16)))


@pytest.mark.parametrize("use", NOT_FOLLOWED)
def test_a_use_that_nothing_follows_is_found_out(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, plain = [], Findings.alone
    monkeypatch.setattr(Findings, "alone", lambda self: found.append(self) or plain(self))
    torch.manual_seed(3)
    assert_tiny(Tiny(nn.Embedding(67, 16), Own(NOT_FOLLOWED[use])))
    assert found


def test_a_tied_table_that_is_no_lookup_is_scored_through_logits() -> None:
    tied = zoo.gemma()
    for use in TABLES:
        tied.model.embed_tokens.__class__ = type("Odd", (nn.Embedding,), {"forward": TABLES[use]})
        expected = oracle.sensitivity(tied, ALONE)
        for size in (1, 8):
            assert_exact(pkt.sensitivity(tied, oracle.batched(SAMPLES, size), progress=False), expected)
