"""Sensitivity against plain autograd in fp64, whatever the batch; and the model left as it was found."""

from __future__ import annotations

import copy
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn

import pkt
from pkt import ops
from pkt.errors import SampleError
from pkt.ops import tile_sums
from pkt.scoring import Findings
from pkt.scoring import head as head_loss
from pkt.scoring.losses import per_sample_loss

SAMPLES = oracle.token_samples(32)
MODELS = {
    "llama": lambda: zoo.llama(),
    "llama-tied": lambda: zoo.llama(True),
    "gpt2": lambda: zoo.gpt2(),
}


@pytest.fixture(scope="module", params=list(MODELS))
def scored(request: pytest.FixtureRequest) -> tuple[nn.Module, dict[str, Tensor]]:
    model = MODELS[request.param]()
    return model, oracle.sensitivity(model, oracle.batched(SAMPLES, 1))


def trainers_loss(outputs: Any, labels: Any, num_items_in_batch: int | None = None) -> Tensor:
    """As transformers' Trainer calls its own."""
    return F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "weights": {n: p.detach().clone() for n, p in model.named_parameters()},
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "requires": {n: p.requires_grad for n, p in model.named_parameters()},
        "modes": [m.training for m in model.modules()],
        "forwards": ["forward" in m.__dict__ for m in model.modules()],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
        "order": [list(m._parameters) for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()],
        "parameter_hooks": [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()],
    }


def assert_unchanged(before: dict[str, Any], model: nn.Module) -> None:
    after = snapshot(model)
    for key in ("requires", "modes", "forwards", "attributes", "order", "hooks", "parameter_hooks"):
        assert before[key] == after[key], key
    for name, weight in before["weights"].items():
        assert torch.equal(weight, after["weights"][name])
        grad, now = before["grads"][name], after["grads"][name]
        assert (grad is None) == (now is None)
        assert grad is None or torch.equal(grad, now)


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_agrees_with_autograd_in_fp64_at_any_batch_size(scored: Any, batch: int) -> None:
    model, truth = scored
    order = torch.randperm(len(SAMPLES), generator=torch.Generator().manual_seed(batch)).tolist()
    before = snapshot(model)
    sens = pkt.sensitivity(model, oracle.batched([SAMPLES[i] for i in order], batch), progress=False)
    assert set(sens) == set(truth)
    for name in truth:
        assert sens[name].dtype == torch.float32
        assert sens[name].shape == truth[name].shape
        assert oracle.relative_error(sens[name], truth[name]) < 1e-5, name
    assert_unchanged(before, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_keep_fp32_scores(scored: Any, dtype: torch.dtype) -> None:
    model, truth = scored
    half = copy.deepcopy(model).to(dtype)
    sens = pkt.sensitivity(half, oracle.batched(SAMPLES, 8), progress=False)
    rounded = oracle.sensitivity(half, oracle.batched(SAMPLES, 1))
    for name in truth:
        assert sens[name].dtype == torch.float32
        assert oracle.relative_error(sens[name], rounded[name]) < oracle.FLOOR[dtype], name


def test_fp16_gradients_that_would_underflow_are_kept() -> None:
    model = zoo.llama().half()
    with torch.no_grad():
        model.lm_head.weight *= 2.0**-9  # gradients below fp16's smallest number without scaling
    truth = oracle.sensitivity(model, oracle.batched(SAMPLES[:6], 1))
    sens = pkt.sensitivity(model, oracle.batched(SAMPLES[:6], 3), progress=False)
    for name in truth:
        assert oracle.relative_error(sens[name], truth[name]) < 2 * oracle.FLOOR[torch.float16], name


@pytest.mark.parametrize("tile", [1, 7, 16])
def test_tile_sums_are_the_sums_of_the_elements(scored: Any, tile: int) -> None:
    model, truth = scored
    sens = pkt.sensitivity(model, oracle.batched(SAMPLES[:8], 4), tile=tile, progress=False)
    elements = pkt.sensitivity(model, oracle.batched(SAMPLES[:8], 4), progress=False)
    assert sens.tile == tile
    for name in truth:
        assert oracle.relative_error(sens[name], tile_sums(elements[name], tile)) < 1e-6, name
    torch.testing.assert_close(sens.layer_scores(), elements.layer_scores(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("measure", ["grad", "fisher", "theta_grad_squared"])
@pytest.mark.parametrize("batch", [1, 3, 32])
def test_other_measures_agree_with_autograd_in_fp64(scored: Any, measure: str, batch: int) -> None:
    model, _ = scored
    truth = oracle.sensitivity(model, oracle.batched(SAMPLES, 1), measure=measure)
    sens = pkt.sensitivity(model, oracle.batched(SAMPLES, batch), measure=measure, progress=False)
    for name in truth:
        assert oracle.relative_error(sens[name], truth[name]) < 1e-5, name
    if batch == 3:
        tiles = pkt.sensitivity(model, oracle.batched(SAMPLES, batch), measure=measure, tile=7, progress=False)
        for name in truth:
            assert oracle.relative_error(tiles[name], tile_sums(truth[name], 7)) < 1e-5, name


@pytest.mark.parametrize("measure", ["grad", "fisher", "theta_grad_squared"])
def test_other_measures_of_an_mlp_and_of_what_needs_one_sample_at_a_time(measure: str) -> None:
    generator = torch.Generator().manual_seed(0)
    batch = {"x": torch.randn(9, 10, generator=generator), "labels": torch.randint(0, 5, (9,), generator=generator)}

    def loss_fn(m: nn.Module, b: Any) -> Tensor:
        return F.cross_entropy(m(b["x"]), b["labels"], reduction="none")

    mlp = zoo.MLP()
    truth = oracle.sensitivity(mlp, [batch], loss_fn, measure)
    sens = pkt.sensitivity(mlp, [batch], loss_fn=loss_fn, measure=measure, progress=False)
    for name in truth:
        assert oracle.relative_error(sens[name], truth[name]) < 1e-5, name
    torch.manual_seed(1)
    odd = Odd()
    truth = oracle.sensitivity(odd, oracle.batched(SAMPLES[:8], 1), plain_loss, measure)
    sens = pkt.sensitivity(odd, oracle.batched(SAMPLES[:8], 4), measure=measure, progress=False)
    for name in truth:
        assert oracle.relative_error(sens[name], truth[name]) < 1e-5, name


def test_a_measure_is_kept_in_the_file_and_refused_by_a_plan(tmp_path: Any) -> None:
    model = zoo.llama()
    sens = pkt.sensitivity(model, oracle.batched(SAMPLES[:4], 2), measure="fisher", progress=False)
    sens.save(tmp_path / "fisher.safetensors")
    again = pkt.Sensitivity.load(tmp_path / "fisher.safetensors")
    assert again.measure == "fisher"
    with pytest.raises(pkt.PktError, match='measure="fisher"'):
        pkt.plan(again, model, model)
    with pytest.raises(pkt.PktError, match="measure='sum' is unknown"):
        pkt.sensitivity(model, oracle.batched(SAMPLES[:4], 2), measure="sum", progress=False)


def test_a_plain_mlp_with_and_without_a_loss_function() -> None:
    model = zoo.MLP()
    generator = torch.Generator().manual_seed(0)
    batch = {"x": torch.randn(9, 10, generator=generator), "labels": torch.randint(0, 5, (9,), generator=generator)}

    def loss_fn(m: nn.Module, b: Any) -> Tensor:
        return F.cross_entropy(m(b["x"]), b["labels"], reduction="none")

    truth = oracle.sensitivity(model, [batch], loss_fn)
    before = snapshot(model)
    for given in (None, loss_fn):
        sens = pkt.sensitivity(model, [batch], loss_fn=given, progress=False)
        for name in truth:
            assert oracle.relative_error(sens[name], truth[name]) < 1e-5, name
    assert_unchanged(before, model)
    with pytest.raises(pkt.PktError, match="no decoder layers"):
        sens.layer_scores()


class TimeFirst(nn.Module):
    """Activations are [T, B, d]: nothing about a batch's rows can be taken for granted."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(67, 16)
        self.inner = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 67, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.table(input_ids).transpose(0, 1)
        x = self.norm(x + torch.tanh(self.inner(x)))
        logits: Tensor = self.head(x).transpose(0, 1)
        return logits


class Odd(nn.Module):
    """A module called twice, a weight used past its module, a matrix nobody taps, a parameter nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(67, 16, padding_idx=3)
        self.twice = nn.Linear(16, 16)
        self.bypassed = nn.Linear(16, 16, bias=False)
        self.experts = nn.Parameter(torch.randn(2, 16, 16) / 4)
        self.scale = nn.Parameter(torch.ones(16))
        self.unused = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(16, 67)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.table(input_ids)
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        x = x + F.linear(self.bypassed(x), self.bypassed.weight)
        x = x + torch.tanh(x @ self.experts[0]) @ self.experts[1]
        logits: Tensor = self.head(x * self.scale)
        return logits


def reading_its_head(tied: bool) -> Any:
    """A Llama whose last hidden states go through the head's weight once more before the head."""
    from transformers import LlamaModel

    class Reading(LlamaModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            weight = self.reads[0].weight  # type: ignore[index,union-attr]
            hidden = out.last_hidden_state
            out.last_hidden_state = hidden + torch.tanh(hidden @ weight.t()) @ weight
            return out

    model = zoo.llama(tied)
    model.model.__class__ = Reading
    model.model.reads = (model.lm_head,)
    return model


def plain_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["input_ids"])[0, :-1], batch["labels"][0, 1:])[None]


@pytest.mark.parametrize("make", [TimeFirst, Odd])
@pytest.mark.parametrize("batch", [1, 4])
def test_what_cannot_be_batched_is_found_out_and_still_exact(make: Any, batch: int) -> None:
    torch.manual_seed(1)
    model = make()
    samples = SAMPLES[:8]
    truth = oracle.sensitivity(model, oracle.batched(samples, 1), plain_loss)
    before = snapshot(model)
    sens = pkt.sensitivity(model, oracle.batched(samples, batch), progress=False)
    for name in truth:
        assert oracle.relative_error(sens[name], truth[name]) < 1e-5, name
    assert_unchanged(before, model)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_is_read_elsewhere_too_is_not_scored_apart_from_it(tied: bool) -> None:
    model = reading_its_head(tied)
    truth = oracle.sensitivity(model, oracle.batched(SAMPLES[:5], 1))
    sens = pkt.sensitivity(model, oracle.batched(SAMPLES[:5], 5), progress=False)
    for name in truth:
        assert oracle.relative_error(sens[name], truth[name]) < 1e-5, name


def test_findings_are_agreed_on_and_hold_in_every_layer() -> None:
    mine = Findings(frozenset({"a"}), fused="head").untapping("layers.0.b")
    both = mine.joined(Findings(fused="head").sharing("c"))
    assert both == Findings(frozenset({"a", "c"}), frozenset({"layers.0.b"}), fused="head")
    assert mine.joined(Findings().alone()) == Findings(mine.shared, mine.untapped, one_by_one=True)
    assert mine.sharing("head").fused is None
    assert mine.alike(["layers.3.b", "layers.3.c"]).untapped == {"layers.3.b"}


def test_mixture_of_experts_is_exact() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=67,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = MixtralForCausalLM(config).eval()
    model.set_experts_implementation("eager")
    truth = oracle.sensitivity(model, oracle.batched(SAMPLES[:5], 1))
    sens = pkt.sensitivity(model, oracle.batched(SAMPLES[:5], 5), progress=False)
    for name in truth:
        assert oracle.relative_error(sens[name], truth[name]) < 1e-5, name


class OnlyLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = zoo.llama()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss
        return loss


def test_a_model_that_only_gives_a_scalar_loss_is_run_one_sample_at_a_time() -> None:
    model = OnlyLoss()
    truth = oracle.sensitivity(model.inner, oracle.batched(SAMPLES[:5], 1))
    sens = pkt.sensitivity(model, oracle.batched(SAMPLES[:5], 5), progress=False)
    for name in truth:
        assert oracle.relative_error(sens[f"inner.{name}"], truth[name]) < 1e-5, name
    assert len(sens.losses) == 5


def test_params_chooses_by_expression_and_by_list() -> None:
    model = zoo.llama()
    batches = oracle.batched(SAMPLES[:4], 4)
    whole = pkt.sensitivity(model, batches, progress=False)
    some = pkt.sensitivity(model, batches, params=r"layers\.1\..*_proj", progress=False)
    assert len(some) == 7
    for name in some:
        assert oracle.relative_error(some[name], whole[name]) < 1e-6
    one = pkt.sensitivity(model, batches, params=["model.norm.weight"], progress=False)
    assert list(one) == ["model.norm.weight"]
    assert oracle.relative_error(one["model.norm.weight"], whole["model.norm.weight"]) < 1e-6


def test_the_model_is_restored_after_an_interrupt_and_keeps_its_gradients() -> None:
    model = zoo.llama()
    model.train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    before = snapshot(model)

    def interrupted(m: nn.Module, batch: Any) -> Tensor:
        m(input_ids=batch["input_ids"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pkt.sensitivity(model, oracle.batched(SAMPLES[:4], 1), loss_fn=interrupted, progress=False)
    assert_unchanged(before, model)
    pkt.sensitivity(model, oracle.batched(SAMPLES[:4], 2), progress=False)
    assert_unchanged(before, model)


def test_scores_survive_a_round_trip(tmp_path: Any) -> None:
    sens = pkt.sensitivity(zoo.llama(), oracle.batched(SAMPLES[:4], 2), progress=False)
    sens.save(tmp_path / "scores.safetensors")
    again = pkt.Sensitivity.load(tmp_path / "scores.safetensors")
    assert again.shapes == sens.shapes
    assert again.losses == sens.losses
    assert all(torch.equal(again[n], sens[n]) for n in sens)
    assert torch.equal(again.layer_scores(), sens.layer_scores())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tile", [None, 16])
def test_the_head_in_blocks_of_vocabulary(monkeypatch: pytest.MonkeyPatch, tied: bool, tile: int | None) -> None:
    model = zoo.llama(tied)
    truth = oracle.sensitivity(model, oracle.batched(SAMPLES[:6], 1))
    monkeypatch.setattr(head_loss, "BLOCK", {"cpu": 200})
    sens = pkt.sensitivity(model, oracle.batched(SAMPLES[:6], 3), tile=tile, progress=False)
    for name in truth:
        expected = truth[name] if tile is None else tile_sums(truth[name], tile)
        assert oracle.relative_error(sens[name], expected) < 1e-5, name


def test_a_head_with_capped_logits_is_scored_through_them() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=67,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=2.0,
        sliding_window=8,
    )
    model = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight *= 20
    truth = oracle.sensitivity(model, oracle.batched(SAMPLES[:5], 1))
    sens = pkt.sensitivity(model, oracle.batched(SAMPLES[:5], 5), progress=False)
    for name in truth:
        assert oracle.relative_error(sens[name], truth[name]) < 1e-5, name


@pytest.mark.parametrize("tile", [None, 64])
def test_no_gradient_and_no_logits_are_ever_stored(monkeypatch: pytest.MonkeyPatch, tile: int | None) -> None:
    """Besides S itself nothing as large as the gradient of an FFN matrix (4 MiB) or as the logits (2.2 MiB) is allocated."""
    from torch.profiler import ProfilerActivity, profile

    model = zoo.llama(hidden=512, layers=2, heads=8, kv=8, ffn=2048, vocab=6000)
    batches = [oracle.padded([(ids[:12], 2) for ids, _ in oracle.token_samples(8, vocab=6000, longest=12)])]
    monkeypatch.setattr(head_loss, "BLOCK", {"cpu": 1 << 18})
    monkeypatch.setattr(ops.reference, "GRADIENT_ELEMENTS", 1 << 18)
    threshold = 2 << 20
    assert batches[0]["input_ids"].numel() * 6000 * 4 > threshold - (1 << 19)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        sens = pkt.sensitivity(model, batches, tile=tile, progress=False)
    sizes = [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert len(sizes) > 100
    scores = [s.numel() * 4 for s in sens.values()]
    assert sorted(n for n in sizes if n > threshold) == sorted(n for n in scores if n > threshold)


def test_under_activation_checkpointing_and_autocast() -> None:
    model = zoo.llama()
    truth = oracle.sensitivity(model, oracle.batched(SAMPLES[:6], 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sens = pkt.sensitivity(model, oracle.batched(SAMPLES[:6], 3), progress=False)
    for name in truth:
        assert oracle.relative_error(sens[name], truth[name]) < 2 * oracle.FLOOR[torch.bfloat16], name

    sens = pkt.sensitivity(model, oracle.batched(SAMPLES[:6], 3), loss_fn=oracle.checkpointed, progress=False)
    for name in truth:
        assert oracle.relative_error(sens[name], truth[name]) < 1e-5, name


class TestBadInput:
    def test_a_sample_without_target_tokens_is_named(self) -> None:
        batch = oracle.padded(SAMPLES[:4])
        batch["labels"][2] = -100
        with pytest.raises(pkt.PktError, match="sample 5 has no target token"):
            pkt.sensitivity(zoo.llama(), [oracle.padded(SAMPLES[4:7]), batch], progress=False)

    def test_a_loss_that_is_not_finite_names_the_sample(self) -> None:
        model = zoo.llama()
        with torch.no_grad():
            model.model.embed_tokens.weight[SAMPLES[2][0][0]] = float("nan")
        bad = [i for i in range(4) if SAMPLES[2][0][0] in SAMPLES[i][0]]
        with pytest.raises(pkt.PktError, match=f"loss of sample {bad[0]} is nan"):
            pkt.sensitivity(model, oracle.batched(SAMPLES[:4], 4), progress=False)

    @pytest.mark.parametrize("batch", [1, 4])
    def test_a_gradient_that_is_not_finite_names_sample_and_parameter(self, batch: int) -> None:
        model = zoo.llama()
        handles = []

        def spoil(module: nn.Module, args: Any, out: Tensor) -> None:
            def poison(grad: Tensor) -> Tensor:
                grad = grad.clone()
                grad[2 if batch == 4 else 0] = float("inf")
                return grad

            if (batch == 4 and len(out) == 4) or (batch == 1 and torch.equal(args[0], probe[: args[0].shape[1]][None])):
                out.register_hook(poison)

        probe = torch.tensor(SAMPLES[2][0])
        target = model.model.embed_tokens if batch == 1 else model.model.layers[1].mlp.gate_proj
        if batch == 1:
            handles.append(target.register_forward_hook(spoil))
            name = "model.embed_tokens.weight"
        else:
            handles.append(target.register_forward_hook(lambda m, a, out: spoil(m, a, out)))
            name = "model.layers.1.mlp.gate_proj.weight"
        with pytest.raises(pkt.PktError, match=rf"gradient of {name} is not finite for sample 2"):
            pkt.sensitivity(model, oracle.batched(SAMPLES[:4], batch), progress=False)

    def test_a_fault_of_a_sample_carries_its_number_and_is_said_by_place(self) -> None:
        batch = oracle.padded(SAMPLES[:4])
        batch["labels"][2] = -100
        with pytest.raises(SampleError) as caught:
            pkt.sensitivity(zoo.llama(), [oracle.padded(SAMPLES[4:7]), batch], progress=False)
        assert caught.value.samples == (5,)
        assert str(caught.value.placed("seeds.jsonl:{}".format)).startswith("seeds.jsonl:5 has no target token")
        several = SampleError("{samples}: {not a field}", range(2)).shifted(3)
        assert str(several) == "one of sample 3, sample 4: {not a field}"
        assert str(several.placed(lambda i: f"line {i + 1}")) == "one of line 4, line 5: {not a field}"

    def test_an_empty_loader(self) -> None:
        with pytest.raises(pkt.PktError, match="no batches"):
            pkt.sensitivity(zoo.llama(), [], progress=False)

    def test_what_is_no_model_and_no_batch(self) -> None:
        model, batch = zoo.llama(), oracle.padded(SAMPLES[:2])
        for bad_model, loader, message in (
            ("teacher", [batch], "takes a model in memory, not 'teacher'"),
            (model, "seeds.jsonl", "read it with pkt.load_seeds"),
            (model, [{k: v for k, v in batch.items() if k != "labels"}], "mappings with 'labels'"),
            (model, [{**batch, "input_ids": batch["input_ids"] + 1000}], "are not all in the model's"),
            (zoo.llama().to("meta"), [batch], "on the meta device"),
        ):
            with pytest.raises(pkt.PktError, match=message):
                pkt.sensitivity(bad_model, loader, progress=False)  # type: ignore[arg-type]
        with torch.inference_mode(), pytest.raises(pkt.PktError, match="inference_mode"):
            pkt.sensitivity(model, [batch], progress=False)
        for tile in (0, 1 << 20):
            with pytest.raises(pkt.PktError, match="no larger than the largest matrix"):
                pkt.sensitivity(model, [batch], tile=tile, progress=False)

    def test_unknown_parameters(self) -> None:
        with pytest.raises(pkt.PktError, match="no parameter nothing"):
            pkt.sensitivity(zoo.llama(), oracle.batched(SAMPLES[:1], 1), params=["nothing"], progress=False)
        with pytest.raises(pkt.PktError, match="no parameter to score"):
            pkt.sensitivity(zoo.llama(), oracle.batched(SAMPLES[:1], 1), params="nothing", progress=False)

    @pytest.mark.parametrize(
        ("loss", "came"),
        [
            ("cross-entropy", "str cannot be called so"),
            (lambda batch: batch, "<lambda> cannot be called so (too many positional arguments)"),
            (lambda m, b, scale: m, "<lambda> cannot be called so (missing a required argument: 'scale')"),
            (
                trainers_loss,
                "trainers_loss stopped with AttributeError: 'LlamaForCausalLM' object has no attribute 'logits'",
            ),
            (lambda m, b: m(**b["inputs"]).loss, "<lambda> stopped with KeyError: 'inputs'"),
            (lambda m, b: m(**b), "<lambda> returned a CausalLMOutputWithPast"),
            (lambda m, b: None, "<lambda> returned a NoneType"),
            (lambda m, b: m(**b).loss.item(), "<lambda> returned a float"),
            (lambda m, b: m(**b).logits.logsumexp(-1), "<lambda> returned a tensor [2, "),
        ],
    )
    def test_a_loss_of_another_form_is_told_what_is_expected(self, loss: Any, came: str) -> None:
        expected = "sensitivity calls loss_fn(model, batch) and expects one loss per sample, a tensor [B]; "
        with pytest.raises(pkt.PktError) as refused:
            pkt.sensitivity(zoo.llama(), oracle.batched(SAMPLES[:2], 2), loss_fn=loss, progress=False)
        assert str(refused.value).startswith(expected + came)
        assert "\n" not in str(refused.value)

    def test_a_loss_of_the_right_form_may_have_more_to_it(self) -> None:
        """A callable object, defaults beside the two arguments, a column in place of a vector: all one loss per sample."""

        class PerSample:
            def __call__(self, model: nn.Module, batch: Any, scale: float = 1.0) -> Tensor:
                labels = batch.pop("labels")  # the batch is this call's own
                return scale * per_sample_loss(model(**batch).logits, labels)[:, None]

        model, batches = zoo.llama(), oracle.batched(SAMPLES[:3], 3)
        found = pkt.sensitivity(model, batches, loss_fn=PerSample(), progress=False)
        for name, score in pkt.sensitivity(model, batches, progress=False).items():
            torch.testing.assert_close(found[name], score)

    def test_a_loss_that_ignores_the_parameters(self) -> None:
        with pytest.raises(pkt.PktError, match="does not depend on the parameters"):
            pkt.sensitivity(
                zoo.llama(),
                oracle.batched(SAMPLES[:1], 1),
                loss_fn=lambda m, b: torch.zeros(1),
                progress=False,
            )
