"""The layer-major engine against the in-memory path and plain autograd in fp64; placement, memory, and a changing disk."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import oracle
import processes
import pytest
import torch
import zoo
from oracle import seeds
from torch import Tensor, nn

import pkt
from pkt import ops
from pkt.models import decoder_layers, load_model, spec_of
from pkt.ops import dispatch
from pkt.scoring import score_seeds, scorer
from pkt.scoring.passes import check_finite
from pkt.scoring.rules import tapped_forward
from pkt.streaming import (
    Boundaries,
    Engine,
    NotLayeredError,
    Teacher,
    open_teacher,
    parse_size,
    plan_memory,
    samples_of,
    sizes_of,
)
from pkt.streaming.memory import Place
from pkt.streaming.microbatches import halved
from pkt.streaming.parts import LayeredModel

CPU = torch.device("cpu")


def streamed(
    teacher: Any,
    batches: list[dict[str, Tensor]],
    folder: Path,
    *,
    micro: int = 3,
    place: Place = "host",
    device: torch.device = CPU,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """S of every parameter by the engine."""
    spec, found = spec_of(teacher), {}
    assert spec.layers is not None

    def part(task: int, key: Any, scores: dict[str, Tensor], weight: Any) -> None:
        found.update({name: score.cpu().clone() for name, score in scores.items()})

    samples = samples_of(batches)
    sizes = [[min(micro, len(samples) - i) for i in range(0, len(samples), micro)]]
    engine = Engine(
        open_teacher(teacher, device, dtype),
        device=device,
        num_layers=spec.num_layers,
        layers=spec.layers,
        on_part=part,
        **options,
    )
    prefetch = options.get("prefetch", True)
    places: list[Place] = [place] * (spec.num_layers + 1)
    try:
        engine.run([samples], sizes, lambda: Boundaries(device, places, folder, behind=prefetch))
    finally:
        engine.close()
    return found


MODELS = {
    "llama": zoo.llama,
    "tied": lambda: zoo.llama(True),
    "gpt2": zoo.gpt2,
    "sliding window": zoo.mistral,
    "gemma": zoo.gemma,
}


class TestScores:
    @pytest.mark.parametrize("name", MODELS)
    def test_every_parameter_agrees_with_autograd_in_fp64_and_with_the_in_memory_path(
        self, name: str, tmp_path: Path
    ) -> None:
        model = MODELS[name]()
        batches = oracle.batched(oracle.token_samples(7), 3)
        truth, whole = oracle.sensitivity(model, batches), pkt.sensitivity(model, batches, progress=False)
        model.save_pretrained(tmp_path / "teacher")
        before = {n: p.clone() for n, p in model.state_dict().items()}
        for teacher in (model, tmp_path / "teacher"):
            found = streamed(teacher, batches, tmp_path)
            assert set(found) == set(whole)
            for parameter in truth:
                assert oracle.relative_error(found[parameter], truth[parameter]) < 1e-5, parameter
                assert oracle.relative_error(found[parameter], whole[parameter]) < 1e-5, parameter
        assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
        assert not any("forward" in m.__dict__ or m._forward_pre_hooks for m in model.modules())
        assert all(p.requires_grad and p.grad is None for p in model.parameters())

    def test_experts_are_exact(self, tmp_path: Path) -> None:
        model = zoo.mixture()
        batches = oracle.batched(oracle.token_samples(4), 2)
        truth = oracle.sensitivity(model, batches)
        found = streamed(model, batches, tmp_path, micro=2)
        for parameter in truth:
            assert oracle.relative_error(found[parameter], truth[parameter]) < 1e-5, parameter

    @pytest.mark.parametrize("measure", ["grad", "fisher", "theta_grad_squared"])
    @pytest.mark.parametrize("tied", [False, True])
    def test_other_measures_agree_with_autograd_in_fp64(self, measure: str, tied: bool, tmp_path: Path) -> None:
        model, batches = zoo.llama(tied), oracle.batched(oracle.token_samples(7), 3)
        truth, found = (
            oracle.sensitivity(model, batches, measure=measure),
            streamed(model, batches, tmp_path, measure=measure),
        )
        for parameter in truth:
            assert oracle.relative_error(found[parameter], truth[parameter]) < 1e-5, parameter

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dispatch, "native_halves", lambda: {torch.bfloat16, torch.float16})
        model = zoo.llama().to(dtype)
        batches = oracle.batched(oracle.token_samples(5), 5)
        whole = pkt.sensitivity(model, batches, progress=False)
        model.save_pretrained(tmp_path / "teacher")
        found = streamed(tmp_path / "teacher", batches, tmp_path)
        for parameter in whole:
            assert found[parameter].dtype == torch.float32
            assert oracle.relative_error(found[parameter], whole[parameter]) < oracle.FLOOR[dtype], parameter

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_types_that_a_cpu_cannot_multiply_are_widened(
        self, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(dispatch, "native_halves", frozenset)
        zoo.llama().to(dtype).save_pretrained(tmp_path / "teacher")
        model = load_model(tmp_path / "teacher")
        batches = oracle.batched(oracle.token_samples(5), 5)
        truth = oracle.sensitivity(model, batches)
        first = streamed(tmp_path / "teacher", batches, tmp_path)
        for parameter in truth:
            assert oracle.relative_error(first[parameter], truth[parameter]) < 1e-5, parameter
        for teacher, options in ((model, {}), (tmp_path / "teacher", {"resident": True, "prefetch": False})):
            again = streamed(teacher, batches, tmp_path, **options)
            assert all(torch.equal(first[n], again[n]) for n in first)
        assert {p.dtype for p in model.parameters()} == {dtype}
        sizes = sizes_of(open_teacher(tmp_path / "teacher", CPU), "model.layers", 3)
        assert (sizes.itemsize, sizes.stored) == (4, 2)
        # What somebody asks for is what they get.
        assert open_teacher(tmp_path / "teacher", CPU, dtype).dtype == dtype

    @pytest.mark.parametrize("family", ["DeepSeek-V3", "GPT-OSS"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_what_transformers_keeps_in_fp32_stays_there(
        self, family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(dispatch, "native_halves", lambda: {torch.bfloat16, torch.float16})
        zoo.model(family).to(dtype).save_pretrained(tmp_path / "teacher")
        loaded, teacher = load_model(tmp_path / "teacher"), open_teacher(tmp_path / "teacher", CPU)
        wanted = {name: tensor.dtype for name, tensor in loaded.state_dict().items()}
        assert torch.float32 in wanted.values() or (family == "GPT-OSS" and dtype == torch.bfloat16)
        assert {name: tensor.dtype for name, tensor in teacher.model.state_dict().items()} == wanted
        engine = Engine(teacher, device=CPU, num_layers=3, layers="model.layers", on_part=lambda *part: None)
        parts = engine.parts
        with parts.loaded(parts.layer_names[1]):
            for name in parts.layer_names[1]:
                module, key, _ = parts.places[name][0]
                assert torch.equal(getattr(module, key), loaded.state_dict()[name])
                assert getattr(module, key).dtype == wanted[name]
        engine.close()

    def test_placement_and_prefetch_never_change_a_byte_and_micro_batches_little(self, tmp_path: Path) -> None:
        zoo.llama(True).save_pretrained(tmp_path / "teacher")
        batches = oracle.batched(oracle.token_samples(7), 7)
        first = streamed(tmp_path / "teacher", batches, tmp_path)
        for options in (
            {"place": "disk"},
            {"place": "device"},
            {"prefetch": False, "place": "disk"},
            {"resident": True},
        ):
            again = streamed(tmp_path / "teacher", batches, tmp_path, **options)
            assert all(torch.equal(first[n], again[n]) for n in first), options
        assert not list(tmp_path.glob("boundary-*"))
        for micro in (1, 7):
            other = streamed(tmp_path / "teacher", batches, tmp_path, micro=micro)
            assert max(oracle.relative_error(other[n], first[n]) for n in first) < 1e-5

    def test_a_checkpoint_in_shards_and_one_without_its_prefix(self, tmp_path: Path) -> None:
        batches = oracle.batched(oracle.token_samples(3), 3)
        model = zoo.llama()
        model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
        assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
        first = streamed(model, batches, tmp_path)
        found = streamed(tmp_path / "sharded", batches, tmp_path)
        assert all(torch.equal(first[n], found[n]) for n in first)
        small = zoo.gpt2()
        small.transformer.save_pretrained(tmp_path / "headless")
        teacher = open_teacher(tmp_path / "headless", CPU)
        assert teacher.source is not None
        assert teacher.stored_as["transformer.h.0.ln_1.weight"] == "h.0.ln_1.weight"
        # The head is tied to the table, so the base model's files are the whole model.
        first, found = (streamed(t, batches, tmp_path) for t in (small, tmp_path / "headless"))
        assert all(torch.equal(first[n], found[n]) for n in first)

    def test_buffers_that_no_checkpoint_holds_are_those_of_a_loaded_model(self, tmp_path: Path) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        config = LlamaConfig(
            vocab_size=67,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            rope_scaling={**rope, "original_max_position_embeddings": 64},
            max_position_embeddings=512,
        )
        for model in (LlamaForCausalLM(config), zoo.gemma()):
            model.to(torch.bfloat16).save_pretrained(tmp_path / "m")
            hollow, loaded = open_teacher(tmp_path / "m", CPU).model, load_model(tmp_path / "m")
            buffers = dict(hollow.named_buffers())
            assert buffers
            for name, buffer in loaded.named_buffers():
                assert buffers[name].dtype == buffer.dtype
                assert torch.equal(buffers[name], buffer)

    def test_a_model_that_is_no_chain_of_layers_is_refused_by_the_engine(self, tmp_path: Path) -> None:
        model = zoo.llama()
        plain = model.model.forward
        batches = oracle.batched(oracle.token_samples(2), 2)

        def forward(*args: Any, **kwargs: Any) -> Any:
            model.model.layers[1], model.model.layers[2] = model.model.layers[2], model.model.layers[1]
            return plain(*args, **kwargs)

        model.model.forward = forward
        with pytest.raises(NotLayeredError, match="in order"):
            streamed(model, batches, tmp_path)
        del model.model.forward
        model.model.layers[2].mlp = model.model.layers[0].mlp
        with pytest.raises(NotLayeredError, match="shared between decoder layers"):
            streamed(model, batches, tmp_path)
        assert decoder_layers(model) == "model.layers"


def plans_equal(left: pkt.TransferPlan, right: pkt.TransferPlan) -> None:
    assert left.layer_map == right.layer_map
    assert [(e.source, e.target, e.region) for e in left.entries] == [
        (e.source, e.target, e.region) for e in right.entries
    ]
    for a, b in zip(left.entries, right.entries, strict=True):
        assert a.score == pytest.approx(b.score, rel=1e-5)
        assert a.share == pytest.approx(b.share, rel=1e-5)
    assert left.layer_scores == pytest.approx(right.layer_scores, rel=1e-5)
    assert left.layer_shares == pytest.approx(right.layer_shares, rel=1e-5)
    # Hashes of the weights stand in a plan that was made where they were read.
    here, there = (
        {k: v for k, v in p.teacher.items() if k not in ("fingerprint", "configuration")} for p in (left, right)
    )
    assert (here, left.student, left.options, left.notes) == (
        there,
        right.student,
        right.options,
        right.notes,
    )


class TestTransfer:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"select": "random"},
            {"select": "rows_cols"},
            {"select": "weights"},
            {"select": "blocks", "modules": "ffn"},
            {"layers": "first", "select": "random"},
            {"layers": "random"},
            {"layers": [0, 0]},
            {"layers": [3, 1], "modules": "attention", "align_heads": True},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("tied", [False, True])
    def test_the_extraction_is_that_of_the_three_steps(self, options: Any, tied: bool, tmp_path: Path) -> None:
        model = zoo.llama(tied, layers=4)
        student = zoo.llama(tied, hidden=36, layers=2, heads=3, kv=1, ffn=48)
        rows = seeds()
        model.save_pretrained(tmp_path / "teacher")
        sens = score_seeds(model, rows, batch_size=3, progress=False)
        plan = pkt.plan(sens, tmp_path / "teacher", student, **options)
        whole = pkt.extract(tmp_path / "teacher", plan, rank=4, progress=False)
        ext = pkt.transfer(
            tmp_path / "teacher", student, rows, rank=4, batch_size=3, progress=False, host_memory="2MB", **options
        )
        plans_equal(ext.plan, plan)
        assert list(ext.pairs) == list(whole.pairs)
        for name, pair in whole.pairs.items():
            assert torch.allclose(ext.pairs[name].delta(), pair.delta(), atol=1e-5)
        assert ext.energies == pytest.approx(whole.energies)
        assert ext.provenance["losses"] == pytest.approx(sens.losses)
        assert {k: ext.provenance[k] for k in whole.provenance} == whole.provenance

    def test_a_student_whose_layers_differ_in_shape(self, tmp_path: Path) -> None:
        model, student = zoo.llama(layers=4), zoo.llama(hidden=24, layers=2, heads=2, kv=1, ffn=40)
        small = nn.Linear(24, 32, bias=False)
        student.model.layers[1].mlp.up_proj = small
        rows = seeds()
        sens = score_seeds(model, rows, batch_size=8, progress=False)
        plan = pkt.plan(sens, model, student)
        ext = pkt.transfer(model, student, rows, rank=4, progress=False, out=tmp_path / "out")
        plans_equal(ext.plan, plan)
        whole = pkt.extract(model, plan, rank=4, progress=False)
        assert all(torch.allclose(ext.pairs[n].delta(), whole.pairs[n].delta(), atol=1e-5) for n in whole.pairs)

    def test_several_tasks_from_one_reading(self, tmp_path: Path) -> None:
        zoo.llama(True, layers=3).save_pretrained(tmp_path / "teacher")
        student = zoo.llama(True, hidden=36, layers=2, heads=3, kv=1, ffn=48)
        tasks = {"math": seeds(5), "code": seeds(4, seed=1)}
        options: Any = {"rank": 4, "batch_size": 3, "progress": False}
        both = pkt.transfer(tmp_path / "teacher", student, tasks, out=tmp_path / "out", **options)
        for name, rows in tasks.items():
            alone = pkt.transfer(tmp_path / "teacher", student, rows, out=tmp_path / name, **options)
            plans_equal(both[name].plan, alone.plan)
            files = sorted(p.name for p in (tmp_path / name).iterdir())
            assert files == sorted(p.name for p in (tmp_path / "out" / name).iterdir())
            assert all((tmp_path / name / f).read_bytes() == (tmp_path / "out" / name / f).read_bytes() for f in files)
        again = pkt.transfer(tmp_path / "teacher", student, tasks, out=tmp_path / "out", **options)
        assert set(again) == set(tasks)

    @pytest.mark.parametrize("keep", ["full", "tiles"])
    def test_kept_scores_make_the_same_plan_without_the_teacher(self, keep: Any, tmp_path: Path) -> None:
        model = zoo.llama(hidden=64, ffn=128, layers=3)
        student = zoo.llama(hidden=32, layers=2, heads=2, kv=1, ffn=64)
        rows = seeds()
        ext = pkt.transfer(
            model, student, rows, out=tmp_path / "out", rank=4, batch_size=3, progress=False, keep_scores=keep
        )
        sens = pkt.Sensitivity.load(tmp_path / "out" / "scores.safetensors")
        whole = score_seeds(model, rows, batch_size=3, progress=False, tile=sens.tile)
        assert set(sens) == set(whole)
        assert all(oracle.relative_error(sens[n], whole[n]) < 1e-5 for n in whole)
        assert sens.losses == pytest.approx(whole.losses)
        if keep == "full":
            plans_equal(pkt.plan(sens, model, student), ext.plan)
        else:
            assert sens.tile is not None
            assert pkt.plan(sens, model, student, select="blocks").layer_map == ext.plan.layer_map
        assert pkt.Extraction.load(tmp_path / "out").plan.layer_map == ext.plan.layer_map

    def test_out_of_memory_halves_the_micro_batch_and_goes_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        zoo.llama(layers=3).save_pretrained(tmp_path / "teacher")
        student = zoo.llama(hidden=36, layers=2, heads=3, kv=1, ffn=48)
        plain = LayeredModel.call
        runs: list[Any] = []

        def call(self: LayeredModel, index: int, hidden: Tensor, recorded: Any) -> Tensor:
            if hidden.requires_grad and index == 1 and hidden.shape[0] > 2:
                runs.append(hidden.shape)
                raise torch.OutOfMemoryError("CUDA out of memory")
            return plain(self, index, hidden, recorded)

        rows = seeds()
        calm = pkt.transfer(tmp_path / "teacher", student, rows, rank=4, batch_size=7, progress=False)
        monkeypatch.setattr(LayeredModel, "call", call)
        ext = pkt.transfer(
            tmp_path / "teacher", student, rows, rank=4, batch_size=7, progress=False, out=tmp_path / "out"
        )
        plans_equal(ext.plan, calm.plan)
        assert [shape[0] for shape in runs] == [7, 4]
        assert not (tmp_path / ".out.run").exists()

        def never(self: LayeredModel, index: int, hidden: Tensor, recorded: Any) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(LayeredModel, "call", never)
        with pytest.raises(pkt.PktError, match="one sample at a time"):
            pkt.transfer(tmp_path / "teacher", student, rows, rank=4, progress=False)

    def test_memory_that_runs_out_in_the_extension_halves_too(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        zoo.llama(layers=3).save_pretrained(tmp_path / "teacher")
        student = zoo.llama(hidden=36, layers=2, heads=3, kv=1, ffn=48)
        calm = pkt.transfer(tmp_path / "teacher", student, seeds(), rank=4, batch_size=7, progress=False)
        plain, calls = ops.rsvd_batch, []

        def once(*args: Any, **options: Any) -> Any:
            calls.append(args)
            if len(calls) == 2:
                raise RuntimeError("pkt: out of memory: no tensor of 4096 entries")
            return plain(*args, **options)

        monkeypatch.setattr(ops, "rsvd_batch", once)
        ext = pkt.transfer(tmp_path / "teacher", student, seeds(), rank=4, batch_size=7, progress=False)
        plans_equal(ext.plan, calm.plan)
        assert len(calls) > 2

    def test_a_scratch_folder_is_made_where_there_is_none(self, tmp_path: Path) -> None:
        zoo.llama(layers=3).save_pretrained(tmp_path / "teacher")
        student = zoo.llama(hidden=36, layers=2, heads=3, kv=1, ffn=48)
        options: Any = {"rank": 4, "progress": False, "host_memory": "2MB"}
        pkt.transfer(tmp_path / "teacher", student, seeds(), scratch=tmp_path / "new" / "folder", **options)
        assert list((tmp_path / "new" / "folder").iterdir()) == []
        (tmp_path / "file").touch()
        with pytest.raises(pkt.PktError, match="making the folder"):
            pkt.transfer(tmp_path / "teacher", student, seeds(), scratch=tmp_path / "file", **options)

    def test_a_model_scored_whole_says_so(self) -> None:
        model = zoo.llama()
        model.model.layers[2].mlp = model.model.layers[0].mlp
        student = zoo.llama(hidden=36, layers=2, heads=3, kv=1, ffn=48)
        with pytest.warns(pkt.PktWarning, match="scored whole"):
            ext = pkt.transfer(model, student, seeds(), rank=4, progress=False, modules="attention")
        assert len(ext.pairs) == 8


class TestMemoryPlan:
    def plan(self, model: Any, **limits: Any) -> Any:
        spec = spec_of(model)
        assert spec.layers is not None
        sizes = sizes_of(open_teacher(model, CPU), spec.layers, spec.num_layers)
        return plan_memory(sizes, [[128] * 8], device=CPU, batch_size=8, in_memory=False, **limits)

    def test_less_memory_means_streaming_then_smaller_batches_then_disk(self) -> None:
        model = zoo.llama(hidden=128, ffn=256, layers=12)
        plenty = self.plan(model)
        assert plenty.resident
        assert set(plenty.places) == {"device"}
        totals = []
        for limit in range(plenty.device_total, 0, -plenty.device_total // 30):
            try:
                tight = self.plan(model, device_memory=limit)
            except pkt.PktError:
                break
            assert tight.device_total <= limit
            totals.append((tight.micro_batch, tight.resident, tight.places.count("disk")))
        else:
            pytest.fail("nothing fits in nothing")
        assert any(not resident for _, resident, _ in totals)
        assert totals[-1][0] < 8
        assert totals[-1][2] > 0
        with pytest.raises(pkt.PktError, match="--device-memory"):
            self.plan(model, device_memory=1000)
        with pytest.raises(pkt.PktError, match="--scratch"):
            self.plan(model, device_memory=limit + plenty.device_total // 30, scratch_free=10)

    def test_a_gpu_plan_names_what_its_libraries_and_allocator_take(self) -> None:
        """A teacher of 13B in bf16 within 10 GB: what tensors take leaves 8% of the limit, the rest is named."""
        from transformers import LlamaConfig, LlamaForCausalLM

        shape: Any = {"vocab_size": 32000, "hidden_size": 5120, "intermediate_size": 13824}
        config = LlamaConfig(**shape, num_hidden_layers=40, num_attention_heads=40)
        with torch.device("meta"):
            teacher = Teacher(LlamaForCausalLM(config).to(torch.bfloat16), None, torch.bfloat16)
        options: Any = {"device": torch.device("cuda"), "batch_size": 8, "in_memory": False}
        plan = plan_memory(
            sizes_of(teacher, "model.layers", 40),
            [[512] * 32],
            device_memory=10 * 10**9,
            host_memory=64 * 10**9,
            **options,
        )
        assert plan.device_total <= 10 * 10**9
        assert plan.places.count("device") > 0
        assert plan.places.count("host") > 0
        named = plan.device["libraries"] + plan.device["allocator's rounding"]
        assert plan.device_total - named <= 0.92 * 10 * 10**9
        # Two buffers, as the loader has: a third would be a third of this again.
        assert plan.device["weights"] == 2 * 2 * sum(p.numel() for p in teacher.model.model.layers[0].parameters())
        # A pinned buffer takes the next power of two: 64 MiB for a micro-batch of 40 MB.
        each = 4 * (1 << 26)
        assert plan.host >= plan.places.count("host") * each

    def test_the_plan_in_words(self) -> None:
        lines = self.plan(zoo.llama()).lines()
        assert "on the device" in lines[0]
        assert "layer boundaries" in lines[1]
        assert "flops" in lines[2]

    @pytest.mark.parametrize(
        ("text", "size"), [("400MB", 400_000_000), ("1.5GB", 1_500_000_000), ("16GiB", 16 << 30), ("7", 7), (5, 5)]
    )
    def test_sizes(self, text: Any, size: int) -> None:
        assert parse_size(text) == size

    @pytest.mark.parametrize("text", ["", "GB", "12 apples", "1.2.3GB"])
    def test_what_is_no_size(self, text: str) -> None:
        with pytest.raises(pkt.PktError, match="is not a size"):
            parse_size(text)

    def test_halving(self) -> None:
        assert halved([8, 3, 1]) == [4, 4, 2, 1, 1]


CHILD = """
import sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
import transformers.models.llama.modeling_llama
import oracle, pkt, pkt.streaming.allocator, pkt.transferring.run
from measuring import Peak
from pkt.models import load_model
from pkt.scoring import score_seeds, scorer
from pkt.scoring.passes import check_finite
from pkt.scoring.rules import tapped_forward

rows = oracle.seeds({count}, {longest})
# Once on something tiny, so that what torch sets up on first use is not counted.
with pkt.streaming.allocator.exact_memory():
    pkt.transfer({tiny!r}, {student!r}, rows, rank=4, progress=False)
planned = []
with Peak() as peak:
    if {streamed!r}:
        pkt.transfer({teacher!r}, {student!r}, rows, rank=4, progress=False, device_memory={limit!r}, dtype={dtype!r},
                     on_memory=lambda plan: planned.append(plan.device_total))
    else:
        score_seeds(load_model({teacher!r}), rows, progress=False)
print(peak.bytes, *map(round, planned))
"""


def peak_of(
    teacher: Path,
    student: Path,
    tiny: Path,
    limit: int,
    *,
    streamed: bool = True,
    dtype: torch.dtype = torch.float32,
    **rows: int,
) -> list[int]:
    """Bytes of anonymous memory a run took at its peak, and what was planned."""
    code = CHILD.format(
        paths=[
            str(Path(__file__).parent),
            str(Path(__file__).parents[1]),
            str(Path(__file__).parents[2] / "bench"),
            str(Path(__file__).parents[2]),
        ],
        tiny=str(tiny),
        student=str(student),
        teacher=str(teacher),
        streamed=streamed,
        limit=limit,
        dtype=dtype,
        **{"count": 4, "longest": 20, **rows},
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = processes.run([sys.executable, "-c", code], env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return [int(word) for word in done.stdout.splitlines()[-1].split()]


def test_memory_stays_within_the_budget_and_does_not_without_streaming(tmp_path: Path) -> None:
    layers, limit = 24, 40_000_000
    shape: Any = {"hidden": 256, "ffn": 704}
    teacher = zoo.llama(layers=layers, **shape)
    weights = sum(p.numel() * 4 for p in teacher.parameters())
    largest = sum(p.numel() * 4 for p in teacher.model.layers[0].parameters())
    assert weights >= 8 * largest
    names = [tmp_path / name for name in ("teacher", "student", "tiny")]
    teacher.save_pretrained(names[0])
    zoo.llama(hidden=128, ffn=352, layers=2).save_pretrained(names[1])
    zoo.llama(layers=2, **shape).save_pretrained(names[2])
    found = [peak_of(*names, limit, streamed=way)[0] for way in (True, False)]
    assert found[0] <= limit < found[1], found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_a_large_tied_vocabulary_stays_within_the_budget(dtype: torch.dtype, tmp_path: Path) -> None:
    """The head's logits, prefix sums of the table's scores, or a second copy of them would each pass the limit."""
    if ops.working_dtype(dtype, CPU) != dtype:
        pytest.skip(f"this CPU has no products in {dtype}")
    limit, vocab = 190_000_000, 32768
    names = [tmp_path / name for name in ("teacher", "student", "tiny")]
    teacher = zoo.llama(True, hidden=384, ffn=512, layers=6, vocab=vocab).to(torch.bfloat16)
    teacher.save_pretrained(names[0])
    zoo.llama(True, hidden=256, ffn=352, layers=2, vocab=vocab).save_pretrained(names[1])
    tiny: Any = zoo.llama(True, hidden=256, ffn=352, layers=2, vocab=vocab)
    tiny.save_pretrained(names[2])
    peak, planned = peak_of(*names, limit, dtype=dtype, count=16, longest=160)

    assert peak <= planned <= limit, (peak, planned)
    # And no more is asked for than is used, by much.
    assert planned <= 1.6 * peak, (peak, planned)


def test_scoring_a_layer_walks_through_that_layer_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[nn.Module] = []

    def counting(module: nn.Module, site: Any) -> Any:
        asked.append(module)
        return tapped_forward(module, site)

    monkeypatch.setattr(scorer, "tapped_forward", counting)
    counts = []
    for layers in (2, 3, 4):
        asked.clear()
        streamed(zoo.trained_like("llama", num_hidden_layers=layers), seeds(2).batches(2), tmp_path)
        counts.append(len(asked))
    # A layer more is one walk through it, and the head's and the front's through all: not one more from every other layer.
    assert counts[2] - counts[1] == counts[1] - counts[0] > 0


def test_a_layer_waits_for_the_device_once_for_all_its_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[int] = []

    def counting(batches: Any, *rest: Any) -> None:
        checks.append(len(batches))
        check_finite(batches, *rest)

    monkeypatch.setattr(scorer, "check_finite", counting)
    model = zoo.llama()
    streamed(model, seeds(6).batches(6), tmp_path, micro=2)
    # The head, the layers, and what precedes them.
    assert checks == [3] * (model.config.num_hidden_layers + 2)
