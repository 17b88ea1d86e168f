"""A teacher's experts in a student's: which of them, their regions, and the circle of injecting, training and finalizing."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import lifecycle
import pytest
import torch
import zoo
from conftest import ASSETS, save
from lifecycle import logits, steps
from test_families import BATCHES, places, seeds
from torch import Tensor, nn

import pkt
from pkt import ops, training
from pkt.adapters import CONFIG, WEIGHTS, read_adapter
from pkt.extraction import assemble
from pkt.files import MANIFEST, read_json
from pkt.lora import load_with_adapter
from pkt.lora.recognition import looks_paired
from pkt.lora.record import subtract
from pkt.models import load_model, spec_of
from pkt.planning import by_expert
from pkt.seeds import load_seeds

EXPERTS = "model.layers.{}.mlp.experts.{}"
BOTH = [EXPERTS.format(layer, name) for layer in (0, 1) for name in ("gate_up_proj", "down_proj")]
MODES = ("paired", "residual", "add")
FAMILIES = ("Mixtral", "GPT-OSS")  # [experts, out, in] with gate before up; [experts, in, out] with the two alternating


@functools.cache
def scored(family: str, experts: int = 8) -> tuple[Any, Any]:
    teacher = zoo.model(family, num_local_experts=experts)
    return teacher, pkt.sensitivity(teacher, BATCHES, progress=False)


def student(family: str = "Mixtral", **change: Any) -> Any:
    return zoo.model(family, "student", **change)


@functools.cache
def extraction(family: str = "Mixtral", modules: str = "all", **options: Any) -> Any:
    teacher, sens = scored(family)
    plan = pkt.plan(sens, teacher, student(family), modules=modules)
    return pkt.extract(teacher, plan, progress=False, **(options or {"rank": 4}))


def fed(teacher: nn.Module, plan: pkt.TransferPlan, target: str, slot: int) -> Tensor:
    """What a plan takes for an expert of a student's parameter, [out, in]."""
    sources = spec_of(teacher).by_module()
    entries = by_expert(plan.by_target()[target])[slot]
    return assemble(entries, lambda e: sources[e.source].oriented(teacher.get_parameter(e.source).detach(), e.expert))


def roles(gate_up: Tensor, family: str) -> tuple[Tensor, Tensor]:
    """Gate and up of one expert's fused parameter, [out, in] each."""
    half = len(gate_up) // 2
    return (gate_up.t()[::2], gate_up.t()[1::2]) if family == "GPT-OSS" else (gate_up[:half], gate_up[half:])


def matrices(gate_up: Tensor, down: Tensor, family: str) -> list[Tensor]:
    """Gate, up and down of one expert in plain torch, [out, in] each."""
    return [*roles(gate_up, family), down.t() if family == "GPT-OSS" else down]


class TestPlan:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_most_sensitive_experts_feed_in_their_order(self, family: str) -> None:
        teacher, sens = scored(family)
        plan = pkt.plan(sens, teacher, student(family))
        chosen = []
        for layer, source in enumerate(plan.layer_map):
            names = [EXPERTS.format(source, name) for name in ("gate_up_proj", "down_proj")]
            sums = torch.stack([sens[name].double().flatten(1).sum(1) for name in names]).sum(0)
            chosen.append(sorted(sums.topk(4).indices.tolist()))
            mine = [EXPERTS.format(layer, name) for name in ("gate_up_proj", "down_proj")]
            for slot, expert in enumerate(chosen[-1]):
                entries = [e for name in mine for e in by_expert(plan.by_target()[name])[slot]]
                assert {(e.expert, e.target_expert) for e in entries} == {(expert, (slot, 4))}
                given = [fed(teacher, plan, name, slot) for name in mine]
                given = [g.t() for g in given] if family == "GPT-OSS" else given
                scores = matrices(*(sens[name][expert] for name in names), family)
                weights = matrices(*(teacher.get_parameter(name)[expert].detach() for name in names), family)
                for entry, found, score, weight in zip(entries, matrices(*given, family), scores, weights, strict=True):
                    (row, col), (rows, cols) = (
                        ops.best_window(score.contiguous(), *found.shape)[0].tolist(),
                        found.shape,
                    )
                    assert torch.equal(found, weight[row : row + rows, col : col + cols])
                    whole = sens[entry.source][expert].sum()
                    inside = score[row : row + rows, col : col + cols].sum()
                    assert entry.share == pytest.approx(float(inside / whole))
        assert any(kept != list(range(4)) for kept in chosen)
        assert "the most sensitive experts feed the student's, in their order" in plan.notes[-1]
        again = pkt.TransferPlan.from_json(plan.to_json())
        assert again.entries == plan.entries

    @pytest.mark.parametrize("source", ["Mixtral", "GPT-OSS"])
    @pytest.mark.parametrize("target", ["Mixtral", "GPT-OSS", "Qwen3-MoE"])
    def test_of_equal_sizes_every_expert_comes_over_whole(self, source: str, target: str) -> None:
        teacher, sens = scored(source, 4)
        size = {"moe_intermediate_size": 48} if target == "Qwen3-MoE" else {}
        plan = pkt.plan(sens, teacher, zoo.model(target, **size), modules="ffn")
        assert plan.notes == ["every expert of the teacher feeds the student's of the same number"]
        ext = pkt.extract(teacher, plan, rank=32, progress=False)
        name = EXPERTS.format(2, "gate_up_proj")
        made, wanted = ext.pairs[name].delta(), teacher.get_parameter(name).detach()
        assert made.shape == (4, 32, 96) if target == "GPT-OSS" else (4, 96, 32)
        for slot in range(4):
            for mine, given in zip(roles(made[slot], target), roles(wanted[slot], source), strict=True):
                # 32 is the whole rank, so the factors are the matrix.
                assert torch.allclose(mine, given, atol=1e-5)
        down, given = (
            ext.pairs[EXPERTS.format(2, "down_proj")].delta(),
            teacher.get_parameter(EXPERTS.format(2, "down_proj")),
        )
        assert torch.allclose(
            down, given if source == target or "GPT-OSS" not in (source, target) else given.mT, atol=1e-5
        )

    def test_a_teacher_with_fewer_experts(self, tmp_path: Path) -> None:
        teacher, sens = scored("Mixtral", 4)
        larger = student(num_local_experts=6)
        with pytest.raises(pkt.PktError, match=r"gate_up_proj \[6, 64, 16\]: .* fewer experts \(4 < 6\)") as caught:
            pkt.plan(sens, teacher, larger)
        assert "(4 of 14 matrices)" in str(caught.value)
        assert "--partial" in str(caught.value)
        plan = pkt.plan(sens, teacher, larger, partial=True)
        ext = pkt.transfer(teacher, larger, seeds(), partial=True, rank=4, progress=False)
        assert places(ext.plan) == places(plan)
        assert ext.plan.notes == plan.notes
        whole = sum(p.numel() for n, p in larger.named_parameters() if p.ndim > 1 and not n.endswith("gate.weight"))
        unfed = sum(larger.get_parameter(n)[4:].numel() for n in BOTH)
        assert f"partial: {100 * (1 - unfed / whole):.0f}% of the student's" in plan.notes[-1]
        for name in BOTH:
            delta = ext.pairs[name].delta()
            assert delta[:4].flatten(1).any(1).all()
            assert not delta[4:].any()
        larger.save_pretrained(tmp_path / "student")
        start = logits(larger)
        model = pkt.inject(larger, ext)
        assert float((logits(model) - start).abs().max()) <= 1e-5
        steps(model, 3)
        assert looks_paired(read_adapter(saved(model, tmp_path / "trained"))[0])
        pkt.finalize(model, tmp_path / "adapter", student=tmp_path / "student")
        changed = read_adapter(tmp_path / "adapter")[0].pairs[BOTH[0]].delta()
        assert changed[:4].flatten(1).any(1).all()
        assert not changed[4:].any()

    def test_what_is_left_out_is_said(self) -> None:
        dense, moe = zoo.model("Llama"), student()
        plan = pkt.plan(pkt.sensitivity(dense, BATCHES[:1], progress=False), dense, moe)
        assert plan.notes == ["the student's experts are left out: the teacher has none"]
        assert not any("experts" in e.target for e in plan.entries)
        teacher, sens = scored("Mixtral")
        beside = zoo.model("DeepSeek-V3", "student")
        plan = pkt.plan(sens, teacher, beside, modules="ffn", layers=[1, 2])
        assert "FFNs beside its experts are left out (mlp.gate_proj, ...)" in plan.notes[0]
        assert {e.target.split(".")[-2] for e in plan.entries} == {"experts"}
        first_dense = zoo.model("DeepSeek-V3", num_hidden_layers=4)
        sens = pkt.sensitivity(first_dense, BATCHES[:1], progress=False)
        with pytest.raises(
            pkt.PktError, match=r"layers\.0\.mlp.* teacher layer 0 has no experts; name .*--layers 1,2,3"
        ):
            pkt.plan(sens, first_dense, moe, modules="ffn", layers=[0, 3])
        ranked = pkt.plan(sens, first_dense, moe, modules="ffn")
        assert 0 not in ranked.layer_map
        assert len(ranked.by_target()) == 4
        pairs = {"model.layers.*.mlp.down_proj": "model.layers.*.mlp.experts.down_proj"}
        with pytest.raises(pkt.PktError, match="leaves nothing to transfer: the student's experts are left out"):
            pkt.plan(pkt.sensitivity(dense, BATCHES[:1], progress=False), dense, moe, module_map=pairs)

    @pytest.mark.parametrize(
        ("config", "router", "change"),
        [
            ("PhimoeConfig", "mlp.router", {"num_local_experts": 4}),
            ("Qwen2MoeConfig", "mlp.shared_expert_gate", {"num_experts": 4, "shared_expert_intermediate_size": 16}),
        ],
    )
    def test_routers_that_are_matrices_are_fed_by_a_map_alone(self, config: str, router: str, change: Any) -> None:
        import transformers

        def model(size: str) -> Any:
            fields = {**zoo.base(size, num_experts_per_tok=2), **change}
            fields.pop("head_dim")
            torch.manual_seed(0)
            made = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**fields)).eval()
            made.set_experts_implementation("eager")
            return made

        teacher, small = model("teacher"), model("student")
        sens = pkt.sensitivity(teacher, BATCHES[:1], progress=False)
        for modules in ("all", "layers"):
            fed = pkt.plan(sens, teacher, small, modules=modules).by_target()
            assert {name.split(".")[-1] for name in fed if ".mlp." in name} == {"gate_up_proj", "down_proj"}
        pattern = f"model.layers.*.{router}"
        mapped = pkt.plan(sens, teacher, small, module_map={pattern: pattern})
        assert set(mapped.by_target()) == {f"model.layers.{i}.{router}" for i in (0, 1)}

    def test_modules_and_maps_choose_among_experts(self) -> None:
        teacher, sens = scored("Mixtral")

        def targets(**options: Any) -> set[str]:
            return {e.target for e in pkt.plan(sens, teacher, student(), **options).entries}

        assert targets(modules="ffn") == set(BOTH)
        assert targets(modules="down") == targets(modules=r"experts\.down") == set(BOTH[1::2])
        assert not targets(modules="attention") & set(BOTH)
        pattern = "model.layers.*.mlp.experts.down_proj"
        mapped = pkt.plan(sens, teacher, student(), module_map={pattern: pattern})
        assert places(mapped) == places(pkt.plan(sens, teacher, student(), modules="down"))
        gate = pkt.plan(sens, teacher, student(), modules="gate")
        matrix = fed(teacher, gate, BOTH[0], 3)
        assert matrix[:32].any()
        assert not matrix[32:].any()
        drawn = pkt.plan(sens, teacher, student(), modules="down", select="random")
        assert len({e.region for e in drawn.by_target()[BOTH[1]]}) > 1
        streamed = pkt.transfer(teacher, student(), seeds(), modules="down", select="random", rank=4, progress=False)
        assert places(streamed.plan) == places(drawn)

    def test_a_printed_plan_has_a_line_for_all_experts_of_a_parameter(self) -> None:
        teacher, sens = scored("Mixtral")
        plan = pkt.plan(sens, teacher, student(), modules="ffn")
        assert len(plan.entries) == 2 * 4 * 3
        lines = str(plan).splitlines()
        assert sum("[4 of 4 experts]" in line for line in lines) == 2 * 3
        down = next(line for line in lines if BOTH[1] + "[4 of 4 experts]" in line)
        mean = sum(e.share for e in plan.by_target()[BOTH[1]]) / 4
        assert down.endswith(f"4 regions of 16 x 32  {100 * mean:.1f}%")
        many = [
            dataclasses.replace(e, expert=2 * i, target_expert=(i, 64))
            for e in plan.by_target()[BOTH[1]][:1]
            for i in range(64)
        ]
        shown = str(dataclasses.replace(plan, entries=many)).splitlines()[1]
        assert "down_proj[0, 2, 4, 6, 8, 10, ...]" in shown
        assert "[64 of 64 experts]" in shown


def saved(model: Any, folder: Path) -> Path:
    lifecycle.save_quietly(model, folder)
    return folder


def test_a_transfer_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    scored("Mixtral")[0].save_pretrained(tmp_path / "teacher")
    student().save_pretrained(tmp_path / "student")

    def run(out: str, stop: int = 99) -> Any:
        def tick(now: Any) -> None:
            if now.phase == "backward" and now.layer == stop:
                raise KeyboardInterrupt

        return pkt.transfer(
            tmp_path / "teacher",
            tmp_path / "student",
            seeds(),
            out=tmp_path / out,
            rank=4,
            progress=False,
            on_tick=tick,
        )

    run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("parts", stop=1)
    assert (tmp_path / ".parts.run" / "step-0001.safetensors").is_file()
    run("parts")
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    loaded = pkt.Extraction.load(tmp_path / "parts")
    plan = pkt.plan(scored("Mixtral")[1], tmp_path / "teacher", tmp_path / "student")
    assert places(loaded.plan) == places(plan)
    resident = pkt.extract(tmp_path / "teacher", plan, rank=4, progress=False)
    for name in BOTH:
        pair, same = loaded.pairs[name], resident.pairs[name]
        assert torch.allclose(pair.delta(), same.delta(), atol=1e-5)
        assert pair.kind == same.kind
    assert loaded.energies == pytest.approx(resident.energies, rel=1e-4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("students")
    for family in FAMILIES:
        student(family).save_pretrained(root / family)
    return root


class TestCircle:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_mode(self, family: str, mode: str, folders: Path, tmp_path: Path) -> None:
        # Ranks that differ between experts and between modules.
        ext = extraction(family, energy=0.45, max_rank=6)
        assert len({p.rank for m, p in ext.pairs.items() if m in BOTH}) > 1
        ext.save(tmp_path / "extraction")
        plain = load_model(folders / family)
        start, weights = logits(plain), {n: plain.get_parameter(n).detach().clone() for n in BOTH}
        with lifecycle.no_warnings():
            model = pkt.inject(plain, tmp_path / "extraction", mode=mode)
        if mode == "add":
            delta = {n: weights[n] + ext.pairs[n].delta() for n in BOTH}
            assert all(torch.allclose(effective(model, n), delta[n], atol=1e-5) for n in BOTH)
        else:
            assert float((logits(model) - start).abs().max()) <= 1e-5
        base = {n: owner(model, n).get_parameter(n.split(".")[-1]) for n in BOTH}
        for name in BOTH:
            shift = ext.pairs[name].delta() if mode == "residual" else 0
            assert torch.allclose(base[name], weights[name] - shift, atol=1e-6)
        losses = steps(model, 5)
        assert losses[-1] < losses[0]
        trained = logits(model)
        saved(model, tmp_path / "trained")
        options = {"extraction": tmp_path / "extraction"} if mode == "residual" else {}

        done = pkt.finalize(tmp_path / "trained", tmp_path / "adapter", merge=tmp_path / "merged", **options)
        assert done.mode == mode
        assert {p.rank for p in done.pairs.values()} == {max(p.rank for p in done.pairs.values())}
        config = read_json(tmp_path / "adapter" / CONFIG)
        assert config["target_parameters"] == sorted(BOTH)
        assert not config["rank_pattern"]
        tolerance = 1e-4 * float(trained.abs().max())
        with lifecycle.no_warnings():
            final = load_with_adapter(folders / family, tmp_path / "adapter")
        assert float((logits(final) - trained).abs().max()) <= tolerance
        assert float((logits(load_model(tmp_path / "merged")) - trained).abs().max()) <= tolerance

        small = pkt.finalize(model, tmp_path / "small", student=folders / family, rank=2)
        for name in BOTH:
            change = done.pairs[name].delta().double()
            values = torch.linalg.svdvals(change)
            least = values[:, 2:].norm() / values.norm()
            assert float((small.pairs[name].delta() - change).norm() / change.norm()) == pytest.approx(
                float(least), rel=1e-3
            )
            assert small.lost[name] == pytest.approx(float(least), rel=1e-3)
        assert read_adapter(tmp_path / "small")[0].pairs[BOTH[0]].rank == 2

    @pytest.mark.parametrize("family", FAMILIES)
    def test_training_leaves_the_second_half_of_every_expert(self, family: str) -> None:
        ext = extraction(family)
        model = pkt.inject(student(family), ext)
        before = {n: halves(model, n) for n in BOTH}
        steps(model, 3)
        for name in BOTH:
            first, second = halves(model, name)
            then_first, then_second = before[name]
            for factor in (0, 1):
                assert torch.equal(second[factor], then_second[factor])
                assert (first[factor] != then_first[factor]).flatten(1).any(1).all()
            # B is [B0, -B0], A is [A0; A0], for each expert.
            assert torch.equal(then_second[0], then_first[0])
            assert torch.equal(then_second[1], -then_first[1])
            assert torch.allclose(then_first[1] @ then_first[0], ext.pairs[name].B @ ext.pairs[name].A, atol=1e-6)

    @pytest.mark.parametrize("mode", MODES)
    def test_a_reloaded_checkpoint_is_armed_again(self, mode: str, folders: Path, tmp_path: Path) -> None:
        from peft import PeftModel

        ext = extraction()
        model = pkt.inject(folders / "Mixtral", ext, mode=mode)
        steps(model, 2)
        trained = logits(model)
        saved(model, tmp_path / "checkpoint")
        plain = load_model(folders / "Mixtral")
        again = PeftModel.from_pretrained(plain, str(tmp_path / "checkpoint"), is_trainable=True)
        again = pkt.inject(again, ext, mode=mode)
        assert float((logits(again) - trained).abs().max()) <= 1e-5
        before = halves(again, BOTH[0])
        steps(again, 2)
        assert torch.equal(halves(again, BOTH[0])[1][1], before[1][1]) == (mode == "paired")
        assert not torch.equal(halves(again, BOTH[0])[0][1], before[0][1])
        with pytest.raises(pkt.PktError, match="started from another extraction"):
            pkt.inject(again, extraction(rank=3), mode=mode)
        if mode == "residual":
            other = student()
            other.get_parameter(BOTH[1]).data.add_(1)
            other = PeftModel.from_pretrained(other, str(tmp_path / "checkpoint"), is_trainable=True)
            with pytest.raises(pkt.PktError, match="neither the student"):
                pkt.inject(other, ext, mode=mode)

    def test_the_student_is_recognised_by_its_experts_alone(self, folders: Path, tmp_path: Path) -> None:
        ext = extraction(modules="down")
        model = pkt.inject(folders / "Mixtral", ext, mode="residual")
        assert set(model.peft_config["default"].auto_mapping["pkt"]["sketch"]) == set(BOTH[1::2])
        steps(model, 2)
        saved(model, tmp_path / "trained")
        keys = set(torch_keys(tmp_path / "trained" / WEIGHTS))
        # One parameter of a module alone is not nested.
        assert keys == {
            f"base_model.model.model.layers.{i}.mlp.experts.lora_{f}.weight" for i in (0, 1) for f in ("A", "B")
        }
        ext.save(tmp_path / "extraction")
        options = {"extraction": tmp_path / "extraction"}
        done = pkt.finalize(tmp_path / "trained", tmp_path / "adapter", **options)
        assert done.check is not None
        final = load_with_adapter(folders / "Mixtral", tmp_path / "adapter")
        assert float((logits(final) - logits(model)).abs().max()) <= 1e-4
        shifted = load_model(folders / "Mixtral")
        shifted.get_parameter(BOTH[1]).data.mul_(1.5)
        shifted.save_pretrained(tmp_path / "shifted")
        with pytest.raises(pkt.PktError, match="are not those the adapter was injected into"):
            pkt.finalize(tmp_path / "trained", tmp_path / "no", student=tmp_path / "shifted", **options)

    def test_a_configuration_of_ones_own(self, folders: Path, tmp_path: Path) -> None:
        from peft import LoraConfig, get_peft_model

        ext = extraction()
        plain = load_model(folders / "Mixtral")
        start = logits(plain)
        own = {"lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
        model = get_peft_model(plain, LoraConfig(r=8, target_parameters=["experts.gate_up_proj"], **own))
        with pytest.warns(pkt.PktWarning, match="does not target them"):
            pkt.initialize_lora_weights(model, ext)
        assert float((logits(model) - start).abs().max()) <= 1e-5
        steps(model, 3)
        pkt.finalize(saved(model, tmp_path / "trained"), tmp_path / "adapter", student=folders / "Mixtral")
        final = load_with_adapter(folders / "Mixtral", tmp_path / "adapter")
        assert float((logits(final) - logits(model)).abs().max()) <= 1e-4
        narrow = get_peft_model(student(), LoraConfig(r=4, target_parameters=["experts.gate_up_proj"], **own))
        with (
            pytest.raises(pkt.PktError, match=r"experts\.gate_up_proj: r=4, needed 8"),
            pytest.warns(pkt.PktWarning),
        ):
            pkt.initialize_lora_weights(narrow, ext)
        with pytest.raises(pkt.PktError, match="experts: no weight"):
            pkt.initialize_pissa_weights(narrow)

    def test_more_adapters(self, folders: Path) -> None:
        model = pkt.inject(folders / "Mixtral", extraction())
        trained = steps(model, 2) and logits(model)
        model = pkt.inject(model, extraction(rank=3), adapter_name="second")
        assert float((logits(model) - logits(load_model(folders / "Mixtral"))).abs().max()) <= 1e-5
        steps(model, 2)
        model.set_adapter("default")
        assert torch.equal(logits(model), trained)
        with pytest.raises(pkt.PktError, match="adapts other parameters of experts than this extraction"):
            pkt.inject(model, extraction(modules="down"), adapter_name="third")
        pkt.inject(model, extraction(modules="attention"), adapter_name="third")


def owner(model: Any, name: str) -> Any:
    """The module that holds experts' parameters, below PEFT's wrappers."""
    layer = model.get_base_model().get_submodule(name.rpartition(".")[0])
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def wrapper(model: Any, name: str) -> Any:
    layer = model.get_base_model().get_submodule(name.rpartition(".")[0])
    return layer if layer.parameter_name == name.split(".")[-1] else layer.base_layer


def effective(model: Any, name: str) -> Tensor:
    """A parameter with what PEFT adds to it."""
    layer = wrapper(model, name)
    whole: Tensor = layer.get_param().detach() + layer.get_delta_weight("default").detach()
    return whole


def halves(model: Any, name: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(A, B) of the first half of every expert's ranks and of the second, in PEFT's own reading of its parameters."""
    layer = wrapper(model, name)
    transposed = getattr(layer.get_base_layer(), "is_transposed", False)
    left, right, scale = layer.get_delta_factors("default")
    a, b = (left.mT, right.mT) if transposed else (right, left)
    a, b, half = a.detach().clone(), scale * b.detach(), a.shape[1] // 2
    return (a[:, :half], b[..., :half]), (a[:, half:], b[..., half:])


def torch_keys(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


class TestRefusals:
    def test_dropout(self, folders: Path, tmp_path: Path) -> None:
        plain = student()
        names = [n for n, _ in plain.named_modules()]
        with pytest.raises(pkt.PktError, match=r"dropout=0\.1: PEFT has no dropout for the parameters of experts"):
            pkt.inject(plain, extraction(), dropout=0.1)
        assert [n for n, _ in plain.named_modules()] == names
        extraction().save(tmp_path / "extraction")
        for call in (
            lambda: training.train("nowhere/at/all", tmp_path / "extraction", "none", tmp_path / "run", dropout=0.05),
            lambda: training.write_injected("no/such/one", tmp_path / "extraction", tmp_path / "run", dropout=0.05),
        ):
            with pytest.raises(pkt.PktError, match="PEFT has no dropout"):
                call()
        assert not (tmp_path / "run").exists()

    def test_weights_without_values_or_in_another_form(self) -> None:
        hollow = student()
        experts = hollow.get_submodule("model.layers.0.mlp.experts")
        experts.down_proj = nn.Parameter(experts.down_proj.to("meta"))
        with pytest.raises(pkt.PktError, match=r"meta device.*layers\.0\.mlp\.experts\.down_proj"):
            pkt.inject(hollow, extraction())
        packed = student()
        experts = packed.get_submodule("model.layers.1.mlp.experts")
        before = packed.get_parameter(BOTH[0]).detach().clone()
        nn.utils.parametrize.register_parametrization(experts, "down_proj", nn.Identity())
        with pytest.raises(pkt.PktError, match=r"quantized here \(model\.layers\.1\.mlp\.experts\.down_proj\)"):
            subtract(packed, extraction().pairs)
        assert torch.equal(packed.get_parameter(BOTH[0]), before)

    def test_a_student_with_other_experts(self) -> None:
        with pytest.raises(pkt.PktError, match=r"the factors are for \[4, 64, 16\], the student has \[6, 64, 16\]"):
            pkt.inject(student(num_local_experts=6), extraction())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"target_parameters": ["router.weight"]}, r"uses target_parameters \(router\.weight\)"),
            ({"target_parameters": ["down_proj"]}, r"uses target_parameters \(down_proj\)"),
            ({"target_parameters": ["experts.down_proj"]}, "name different experts"),
            ({"target_parameters": ["experts.up_proj", *BOTH]}, "name different experts"),
            ({"r": 3}, "no whole number of experts of rank 3"),
        ],
    )
    def test_folders_whose_parameters_pkt_cannot_tell(self, change: Any, message: str, tmp_path: Path) -> None:
        extraction().adapter().write(tmp_path)
        config = json.loads((tmp_path / CONFIG).read_text())
        (tmp_path / CONFIG).write_text(json.dumps({**config, **change}))
        with pytest.raises(pkt.PktError, match=message):
            read_adapter(tmp_path)

    def test_names_that_end_like_experts_are_enough(self, tmp_path: Path) -> None:
        adapter = extraction().adapter()
        adapter.write(tmp_path)
        config = json.loads((tmp_path / CONFIG).read_text())
        short = {"target_parameters": ["experts.down_proj", "mlp.experts.gate_up_proj"]}
        (tmp_path / CONFIG).write_text(json.dumps({**config, **short}))
        assert read_adapter(tmp_path)[0].fingerprint() == adapter.fingerprint()


def test_the_commands(tokenizer: Any, tmp_path: Path, capsys: Any) -> None:
    from typer.testing import CliRunner

    from pkt.cli import app

    teacher = zoo.model("Mixtral", num_local_experts=6, vocab_size=len(tokenizer), max_position_embeddings=512)
    small = student(vocab_size=len(tokenizer), max_position_embeddings=512)
    folders = save(teacher, tmp_path / "teacher", tokenizer), save(small, tmp_path / "student", tokenizer)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join((ASSETS / "data" / "seeds.jsonl").read_text().splitlines(True)[:4]))

    def run(*words: Any) -> str:
        done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    run("transfer", *folders, rows, "--out", tmp_path / "extraction", "--rank", 4)
    assert "each of its experts" in " ".join(run("models", folders[1]).split())  # a narrow terminal breaks it
    assert "yes: every module" in run("inspect", tmp_path / "extraction", "--student", folders[1])
    run("report", tmp_path / "extraction")
    assert "[4 of 4 experts]" in (tmp_path / "extraction" / "report.html").read_text()
    run("inject", folders[1], tmp_path / "extraction", "--out", tmp_path / "start")
    assert read_json(tmp_path / "start" / CONFIG)["lora_dropout"] == 0
    words = ("train", folders[1], tmp_path / "extraction", rows, "--out", tmp_path / "run", "--max-steps", 2)
    run(*words, "--batch-size", 2, "--lr", 1e-3, "--mode", "residual")
    assert read_json(tmp_path / "run" / MANIFEST)["settings"]["dropout"] == 0
    run("finalize", tmp_path / "run", "--out", tmp_path / "adapter", "--samples", rows, "--merge", tmp_path / "merged")
    found = json.loads(run("inspect", tmp_path / "adapter", "--student", folders[1], "--json"))
    assert found["fits"].startswith("yes")
    assert found["next"] == "load it with PeftModel.from_pretrained"
    adapted = json.loads(run("evaluate", folders[1], rows, "--adapter", tmp_path / "adapter", "--json"))
    merged = json.loads(run("evaluate", tmp_path / "merged", rows, "--json"))
    plain = json.loads(run("evaluate", folders[1], rows, "--json"))
    assert adapted["nll"] == pytest.approx(merged["nll"], rel=1e-5)
    assert adapted["nll"] < plain["nll"]


def test_a_training_goes_on_from_its_checkpoint(tokenizer: Any, tmp_path: Path) -> None:
    teacher = zoo.model("Mixtral", vocab_size=len(tokenizer), max_position_embeddings=512)
    folder = save(student(vocab_size=len(tokenizer), max_position_embeddings=512), tmp_path / "student", tokenizer)
    data = load_seeds(ASSETS / "data" / "train.jsonl", tokenizer, limit=6)
    plan = pkt.plan(
        pkt.sensitivity(teacher, data.batches(2), progress=False), teacher, student(vocab_size=len(tokenizer))
    )
    pkt.extract(teacher, plan, rank=4, progress=False).save(tmp_path / "extraction")

    def run(out: Path, **options: Any) -> Tensor:
        settings: Any = {"max_steps": 4, "batch_size": 2, "save_steps": 2, "lr": 1e-3, **options}
        model = training.train(folder, tmp_path / "extraction", data, out, quietly=True, **settings)
        return logits(model)

    whole = run(tmp_path / "whole")
    # What a run that was stopped after its second step leaves.
    parts = shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(parts / "checkpoint-4")
    (parts / WEIGHTS).unlink()
    manifest = read_json(parts / MANIFEST)
    assert manifest["settings"]["dropout"] == 0
    (parts / MANIFEST).write_text(json.dumps({**manifest, "finished": False}))
    # The default, recorded as a number, and the number itself are the same run.
    assert torch.equal(run(parts, dropout=0.0), whole)
