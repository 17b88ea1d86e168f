"""A model out of a larger one's units: the same shape is the same model, what is left out is as if it were zero, and whose
units they are is known, from the record and from the weights alone."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from commands import empty_beside, fails, run
from conftest import ASSETS, save, write_rows

import pkt
from pkt.matching import Lineage, Matrices, Shape, UnitScores, lineage, shape_of, shrink_to, shrunk_model
from pkt.models import load_model
from pkt.pruning.activations import activation_scores
from pkt.seeds import load_seeds

KINDS = ["llama", "qwen3", "gemma2", "phi3", "gpt2", "mixtral"]
IDS = torch.arange(3, 23).view(2, 10)


def made(kind: str, **more: Any) -> Any:
    return zoo.trained_like(kind, **more)


def by_size(model: Any) -> UnitScores:
    units = UnitScores(Matrices(model))
    units.add({name: p.detach().abs() for name, p in model.named_parameters()})
    return units


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*KINDS, "llama tied"])
def test_the_same_shape_is_the_same_model(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    teacher = made(kind.split()[0], tied="tied" in kind).to(dtype)
    teacher.save_pretrained(tmp_path / "teacher")
    for given in (teacher, tmp_path / "teacher"):
        units = by_size(teacher)
        small = shrink_to(given, units.choose(shape_of(units.old)))
        small.save_pretrained(tmp_path / "small")
        for name in ("model.safetensors",):
            assert (tmp_path / "small" / name).read_bytes() == (tmp_path / "teacher" / name).read_bytes()
        then, now = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("teacher", "small"))
        assert {k: v for k, v in now.items() if then.get(k, v) != v} == {}


@pytest.mark.parametrize("kind", KINDS)
def test_neurons_and_groups_and_layers_left_out_are_as_if_zero(kind: str) -> None:
    teacher = made(kind)
    units = by_size(teacher)
    whole = shape_of(units.old)
    # GPT-2's heads make up its hidden units, so all of them stay.
    found = units.choose(
        Shape(whole.hidden, 40, whole.groups - 2 * (kind != "gpt2"), 4, 1 if whole.queries == 2 else None)
    )
    small = shrink_to(teacher, found)
    masked = copy.deepcopy(teacher)
    old = Matrices(masked)
    with torch.no_grad():
        for layer, neurons, queries in zip(found.layers, found.neurons, found.queries, strict=True):
            for role, kept, size in (("down", neurons, 1), ("o", queries, old.spec.head_dim)):
                target = old.index[role, layer][0]
                each = len(kept) // max(1, target.experts)
                for expert in range(target.experts) if target.experts else (None,):
                    mine = kept[(expert or 0) * each :][:each]
                    columns = torch.zeros(target.shape[1])
                    columns[torch.tensor([i * size + j for i in mine for j in range(size)])] = 1
                    target.oriented(masked.get_parameter(target.parameter), expert).mul_(columns)
        for layer in set(range(6)) - set(found.layers):
            for role in ("o", "down"):
                target = old.index[role, layer][0]
                masked.get_parameter(target.parameter).zero_()
                if target.module + ".bias" in old.shapes:
                    masked.get_parameter(target.module + ".bias").zero_()
    assert (logits(small) - logits(masked)).abs().max() <= 1e-5 * logits(masked).abs().max()
    assert (logits(small) - logits(teacher)).abs().max() > 0.01


@pytest.mark.parametrize(("kind", "tied"), [("llama", False), ("llama", True), ("qwen3", False), ("phi3", False)])
def test_hidden_units_left_out_are_as_if_zero(kind: str, tied: bool) -> None:
    """RMSNorm divides by the mean square of fewer units; the gains make up for that."""
    teacher = made(kind, tied=tied)
    units = by_size(teacher)
    whole = shape_of(units.old)
    found = units.choose(Shape(40, whole.neurons, whole.groups, whole.layers))
    small, masked = shrink_to(teacher, found).double(), copy.deepcopy(teacher).double()
    keep = torch.zeros(64)
    keep[torch.tensor(found.hidden)] = 1
    old = Matrices(masked)
    with torch.no_grad():
        for (role, _), (target, _) in old.index.items():
            weight = target.oriented(masked.get_parameter(target.parameter))
            weight.mul_(keep[:, None] if role in ("o", "down") else keep)
    for module in (*small.modules(), *masked.modules()):
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.0
    assert (logits(small) - logits(masked)).abs().max() <= 1e-5 * logits(masked).abs().max()


def test_gemmas_embedding_keeps_its_size_and_its_head_too() -> None:
    teacher = made("gemma2", tied=True)
    units = by_size(teacher)
    found = units.choose(Shape(40, 96, 4, 6))
    small = shrink_to(teacher, found, rescale=False)
    seen: dict[str, torch.Tensor] = {}
    for name, model in (("small", small), ("teacher", teacher)):
        model.model.layers[0].register_forward_pre_hook(
            lambda module, args, kwargs, name=name: seen.update({name: (args or tuple(kwargs.values()))[0]}),
            with_kwargs=True,
        )
        logits(model)
    assert torch.allclose(seen["small"], seen["teacher"][..., found.hidden], rtol=1e-5)
    normed = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    gains = [(1 + m.model.norm.weight.detach()) for m in (small, teacher)]
    ours = (normed * gains[0]) @ small.lm_head.weight.detach().t()
    theirs = (normed * gains[1][found.hidden]) @ teacher.lm_head.weight.detach()[:, found.hidden].t()
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_lineage_is_found_again_from_the_weights_alone(kind: str) -> None:
    teacher = made(kind)
    units = by_size(teacher)
    shape = Shape(40, 48, 5, 4) if kind == "gpt2" else Shape(40, 48, 2, 4, 1 if kind == "llama" else None)
    shape = replace(shape, experts=3 if kind == "mixtral" else None)
    true = units.choose(shape)
    found = lineage(teacher, shrink_to(teacher, true), progress=False)
    assert (found.verdict, found.layers, found.hidden) == ("descends", true.layers, true.hidden)
    assert (found.neurons, found.queries, found.groups) == (true.neurons, true.queries, true.groups)
    assert not any(true.experts) or found.experts == true.experts


def test_experts_and_their_routers_rows_go_together(tmp_path: Path) -> None:
    teacher = made("mixtral")
    found = pkt.shrink(teacher, like=config(tmp_path, teacher, num_local_experts=1), score="magnitude", progress=False)
    assert (found.model.config.num_local_experts, found.model.config.num_experts_per_tok) == (1, 1)
    layer, (kept,) = found.lineage.layers[2], found.lineage.experts[2]
    ours, theirs = found.model.model.layers[2].mlp, teacher.model.layers[layer].mlp
    assert torch.equal(ours.gate.weight[0], theirs.gate.weight[kept])
    assert torch.equal(ours.experts.down_proj[0], theirs.experts.down_proj[kept])
    with pytest.raises(pkt.PktError, match="whose inputs are not measured"):
        pkt.shrink(teacher, "none.jsonl", like=teacher, score="activation", progress=False)
    with pytest.raises(pkt.PktError, match="has 4 experts a layer, and 5 are asked for"):
        pkt.shrink(teacher, like=config(tmp_path, teacher, num_local_experts=5), score="magnitude", progress=False)


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def general(tmp_path_factory: Any) -> Path:
    rows = (ASSETS / "data" / "general.jsonl").read_text().splitlines()[:8]
    return write_rows(tmp_path_factory.mktemp("rows") / "general.jsonl", *rows)


@pytest.fixture(scope="module")
def shrunk(general: Path, tmp_path_factory: Any) -> Path:
    """The demo's base in its descendant's shape, by the command."""
    out = tmp_path_factory.mktemp("made") / "small"
    shown = run("shrink", ASSETS / "base", general, "--like", ASSETS / "descendant", "--out", out)
    assert "490,140 parameters: 5 layers of 84 hidden units, 192 neurons, 2 groups of 2 heads" in " ".join(
        shown.split()
    )
    assert "next: pkt train " in shown
    return out


def test_a_layer_at_a_time_is_the_whole_at_once(shrunk: Path, general: Path, tokenizer: Any) -> None:
    base = load_model(ASSETS / "base", dtype=torch.float32)
    seeds = load_seeds(general, tokenizer)
    units = UnitScores(Matrices(base))
    units.add(pkt.sensitivity(base, seeds.batches(4), progress=False))
    shape = Shape(84, 192, 2, 5)
    inside = pkt.shrink(base, seeds, like=ASSETS / "descendant", progress=False)
    assert inside.lineage.hidden == units.choose(shape).hidden
    # On disk the weights are bf16, and so is the arithmetic where this machine has it.
    streamed = pkt.shrink(ASSETS / "base", seeds, like=ASSETS / "descendant", dtype=torch.float32, progress=False)
    assert (streamed.lineage.hidden, streamed.lineage.neurons) == (inside.lineage.hidden, inside.lineage.neurons)
    assert streamed.lineage.queries == inside.lineage.queries


def test_the_folder_is_a_model_with_its_lineage(shrunk: Path, tmp_path: Path) -> None:
    teacher = ASSETS / "base"
    for name in ("tokenizer.json", "generation_config.json"):
        assert json.loads((shrunk / name).read_text()).keys() == json.loads((teacher / name).read_text()).keys()
    known = lineage(teacher, shrunk, progress=False)
    assert known == Lineage.load(shrunk / "lineage.json")
    assert str(known).startswith("student layers are the teacher's")
    assert "descends: `pkt shrink` recorded it" in run("lineage", teacher, shrunk)
    assert "to be healed" in run("inspect", shrunk)
    # Without the record it is searched, and all of it is found again.
    bare = shutil.copytree(shrunk, tmp_path / "bare", ignore=shutil.ignore_patterns("lineage.json"))
    found = lineage(teacher, bare, progress=False)
    assert found.evidence
    assert (found.hidden, found.layers, found.neurons) == (known.hidden, known.layers, known.neurons)
    assert (found.queries, found.groups) == (known.queries, known.groups)
    # Nor is it believed of other weights, of the student or of the teacher.
    healed = shutil.copytree(shrunk, tmp_path / "healed")
    load_model(ASSETS / "descendant").save_pretrained(healed)
    assert lineage(teacher, healed, progress=False).evidence
    assert lineage(ASSETS / "teacher", shrunk, progress=False).evidence


@pytest.mark.parametrize("score", ["activation", "magnitude", "random"])
def test_other_scores(score: Any, general: Path, tmp_path: Path) -> None:
    seeds = [general] if score == "activation" else []
    run("shrink", ASSETS / "base", *seeds, "--params", "400K", "--score", score, "--out", tmp_path / "o", "--json")
    manifest = json.loads((tmp_path / "o" / "pkt.json").read_text())
    assert manifest["options"]["score"] == score
    assert abs(manifest["parameters"] / 400_000 - 1) < 0.15
    once = Lineage.load(tmp_path / "o" / "lineage.json")
    again = pkt.shrink(ASSETS / "base", *seeds, params=400_000, score=score, progress=False)
    assert (again.lineage.hidden, again.lineage.layers) == (once.hidden, once.layers)


def test_activations_are_the_inputs_sizes(general: Path, tokenizer: Any) -> None:
    base = load_model(ASSETS / "base", dtype=torch.float32)
    seeds = load_seeds(general, tokenizer)
    found = activation_scores(base, Matrices(base).spec, seeds, batch_size=3, progress=False)
    inputs, ids = [], []
    up = base.model.layers[2].mlp.up_proj
    hook = up.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0]))
    for i in range(len(seeds)):
        row = torch.tensor([seeds[i].input_ids])
        ids.append(row[0])
        with torch.no_grad():
            base(row)
    hook.remove()
    sizes = torch.cat(inputs).square().mean(0).sqrt()
    assert torch.allclose(
        found["model.layers.2.mlp.up_proj.weight"], up.weight.detach().abs() * sizes, rtol=1e-3, atol=1e-6
    )
    every = torch.cat(ids)
    share = torch.bincount(every, minlength=512) / len(every)
    assert torch.allclose(
        found["model.embed_tokens.weight"], base.model.embed_tokens.weight.abs() * share.sqrt()[:, None]
    )


def test_a_number_of_parameters_where_heads_make_up_the_hidden_units(tokenizer: Any, tmp_path: Path) -> None:
    teacher = save(made("gpt2"), tmp_path / "gpt2", tokenizer)
    found = pkt.shrink(teacher, params=80_000, score="magnitude", progress=False)
    assert found.shape.hidden == 8 * found.shape.groups
    assert abs(found.parameters / 80_000 - 1) < 0.25
    assert found.model.config.n_embd == found.shape.hidden
    assert logits(found.model).shape == (2, 10, 400)


def config(tmp_path: Path, base: Any, **change: Any) -> Path:
    made_ = copy.deepcopy(base.config)
    made_.update(change)
    made_.save_pretrained(tmp_path / "like")
    return tmp_path / "like" / "config.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 7}, "has 6 layers, and 7 are asked for"),
        ({"hidden_size": 72}, "has 64 hidden units, and 72 are asked for"),
        ({"num_attention_heads": 16, "num_key_value_heads": 4}, "has 2 heads a group, and 4 are asked for"),
        ({"num_key_value_heads": 8}, "has 4 key/value groups a layer, and 8 are asked for"),
        ({"head_dim": 4}, r"has heads of 4 and .* of 8; heads are kept whole"),
    ],
)
def test_shapes_that_are_no_part_of_the_teachers(change: Any, message: str, tmp_path: Path) -> None:
    teacher = made("llama")
    with pytest.raises(pkt.PktError, match=message):
        pkt.shrink(teacher, like=config(tmp_path, teacher, **change), score="magnitude", progress=False)


def test_what_is_refused(tmp_path: Path, general: Path, tokenizer: Any) -> None:
    llama, gpt2 = made("llama"), made("gpt2")
    quick = {"score": "magnitude", "progress": False}
    with pytest.raises(pkt.PktError, match=r"no gpt2 has 6 layers of 40 hidden units, .*the heads' sizes add up"):
        shrunk_model(Matrices(gpt2), Shape(40, 96, 8, 6))
    with pytest.raises(
        pkt.PktError, match=r"no llama has .* 39 hidden units.*not a multiple of the number of attention heads"
    ):
        shrunk_model(Matrices(llama), Shape(39, 48, 2, 4))
    with pytest.raises(pkt.PktError, match=r"is a gpt2 and .* a llama; --like takes a shape of the same family"):
        pkt.shrink(llama, like=gpt2, **quick)
    with pytest.raises(pkt.PktError, match=r"some of its layers have experts|what the units of .* are is not known"):
        pkt.shrink(zoo.model("DeepSeek-V3"), params="10K", **quick)
    for wrong, message in (("0", "no number"), ("many", "no number"), ("9B", "are asked for; ask for fewer")):
        with pytest.raises(pkt.PktError, match=message):
            pkt.shrink(llama, params=wrong, **quick)
    with pytest.raises(pkt.PktError, match=r"the nearest to 5 parameters .* is "):
        pkt.shrink(llama, params=5, **quick)
    with pytest.raises(pkt.PktError, match="give the shape once"):
        pkt.shrink(llama, score="magnitude")
    with pytest.raises(pkt.PktError, match="give the seeds"):
        pkt.shrink(llama, params="10K")
    with pytest.raises(pkt.PktError, match="score='best' is unknown"):
        pkt.shrink(llama, params="10K", score="best")  # type: ignore[arg-type]
    llama.model.layers[3].mlp.up_proj.weight.data[5] = torch.nan
    with pytest.raises(pkt.PktError, match="holds NaN or Inf"):
        pkt.shrink(llama, params=shape_count(llama), **quick)
    base = load_model(ASSETS / "base")
    base.model.layers[3].mlp.up_proj.weight.data[5] = torch.nan
    folder = save(base, tmp_path / "damaged", tokenizer)
    assert "NaN" in fails("shrink", folder, general, "--like", folder, "--out", tmp_path / "out")
    assert empty_beside(tmp_path / "out")


def shape_count(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def test_nothing_is_written_over(tmp_path: Path, general: Path) -> None:
    base = shutil.copytree(ASSETS / "base", tmp_path / "base")
    like = ("--like", ASSETS / "descendant", "--score", "magnitude")
    assert "holds something that pkt did not write" in fails("shrink", base, *like, "--out", base, "--force")
    assert "lie one in the other" in fails("shrink", base, *like, "--out", base / "small")
    assert "is a llama" not in run("shrink", base, *like, "--out", tmp_path / "out")
    assert "already holds a result" in fails("shrink", base, *like, "--out", tmp_path / "out")
    run("shrink", base, *like, "--out", tmp_path / "out", "--force")
