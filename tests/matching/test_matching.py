"""Lineage by weights alone, and what is cut under it: units found again, strangers told, changes that arrive."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from conftest import ASSETS, write_rows
from descent import noisy
from transformers import AutoModelForCausalLM

import pkt
from pkt.matching import Cutter, Lineage, Matrices, lineage
from pkt.matching.shrinking import Shape, choose_units, shrink_to
from pkt.models import load_model
from pkt.transplanting.content import Delta

SMALL = Shape(hidden=40, neurons=48, groups=2, layers=3)


def magnitudes(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().abs() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("kind", "tied"), [("llama", False), ("llama", True), ("qwen3", False), ("gemma2", True), ("phi3", False)]
)
def test_units_of_a_descendant_are_found_again(kind: str, tied: bool) -> None:
    teacher = zoo.trained_like(kind, tied=tied)
    true = choose_units(Matrices(teacher), magnitudes(teacher), SMALL)
    found = lineage(teacher, noisy(shrink_to(teacher, true), 0.5), progress=False)
    assert (found.verdict, found.layers) == ("descends", true.layers)
    assert found.hidden == true.hidden
    assert found.neurons == true.neurons
    assert found.queries == true.queries
    assert found.groups == true.groups


def shuffled(model: Any, true: Lineage, seed: int) -> tuple[Any, Lineage]:
    """A student whose hidden units, neurons and heads stand in another order, and where they are then."""
    generator = torch.Generator().manual_seed(seed)
    order = copy.deepcopy(true)
    mix = lambda items: [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]  # noqa: E731
    order.hidden = mix(order.hidden)
    order.neurons = [mix(layer) for layer in order.neurons]
    order.groups = [mix(layer) for layer in order.groups]
    share = len(true.queries[0]) // len(true.groups[0])
    order.queries = [
        [q for (g,) in layer for q in mix([g * share + i for i in range(share)])] for layer in order.groups
    ]
    return shrink_to(model, order), order


def test_shuffled_units_are_found_again() -> None:
    teacher = zoo.trained_like("llama")
    student, order = shuffled(teacher, choose_units(Matrices(teacher), magnitudes(teacher), SMALL), 3)
    found = lineage(teacher, noisy(student, 0.5), progress=False)
    assert (found.hidden, found.neurons, found.groups, found.queries) == (
        order.hidden,
        order.neurons,
        order.groups,
        order.queries,
    )


def test_equal_widths_and_drift() -> None:
    teacher = zoo.trained_like("llama")
    whole = Shape(hidden=64, neurons=96, groups=4, layers=4)
    true = choose_units(Matrices(teacher), magnitudes(teacher), whole)
    student = shrink_to(teacher, true)
    assert lineage(teacher, student, progress=False).layers == true.layers
    drifted = lineage(teacher, noisy(student, 2.5), progress=False)
    assert (drifted.verdict, drifted.layers) == ("descends but has drifted", true.layers)


def test_groups_that_are_means_of_several_are_recognised() -> None:
    teacher = zoo.trained_like("llama")
    config = copy.deepcopy(teacher.config)
    config.num_key_value_heads = 2
    student = AutoModelForCausalLM.from_config(config).float()
    state = teacher.state_dict()
    for name in list(state):
        if "k_proj" in name or "v_proj" in name:
            state[name] = state[name].view(2, 2, 8, 64).mean(1).reshape(16, 64)
    student.load_state_dict(state)
    found = lineage(teacher, student, progress=False)
    assert found.groups == [[[0, 1], [2, 3]]] * 6
    assert found.queries == [list(range(8))] * 6
    cut = Cutter(found, Matrices(teacher), Matrices(student))
    target = cut.new.index["k", 2][0]
    assert torch.allclose(cut.matrix(target, cut.old.raw), student.get_parameter(target.parameter), atol=1e-6)


def stranger(seed: int) -> Any:
    """A small model of its own: random, or with only the teacher's table, or begun from the teacher's seed."""
    config = transformers.LlamaConfig(
        vocab_size=400, hidden_size=40, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(seed // 3 if seed % 3 == 2 else 1000 + seed)
    model = AutoModelForCausalLM.from_config(config).float()
    if seed % 3 == 1:
        model.model.embed_tokens.weight.data = zoo.trained_like("llama").model.embed_tokens.weight.data[:, 8:48].clone()
    return model


@pytest.mark.parametrize("seed", range(50))
def test_strangers_are_told(seed: int) -> None:
    teacher = zoo.trained_like("llama", seed=seed // 3 if seed % 3 == 2 else 0)
    found = lineage(teacher, stranger(seed), progress=False)
    assert found.verdict == "no lineage", str(found)


def test_the_demos_models_are_strangers_and_the_file_holds_all(tmp_path: Path) -> None:
    found = lineage(ASSETS / "teacher", ASSETS / "student", progress=False)
    assert found.verdict == "no lineage"
    assert "match no better" in found.reason
    found.save(tmp_path / "l.json")
    assert Lineage.load(tmp_path / "l.json") == found
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(pkt.PktError, match="is not a lineage"):
        Lineage.load(tmp_path / "other.json")


# --- transplant -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def family(tmp_path_factory: Any) -> dict[str, Any]:
    """A base of random weights, a teacher tuned from it by a LoRA, and a student cut from the base, all on disk."""
    from peft import LoraConfig, get_peft_model

    from pkt.models import load_tokenizer

    root = tmp_path_factory.mktemp("family")
    tokenizer = load_tokenizer(ASSETS / "teacher")
    base = load_model(ASSETS / "teacher", dtype=torch.float32)
    true = choose_units(Matrices(base), magnitudes(base), Shape(hidden=138, neurons=300, groups=3, layers=4))
    student = shrink_to(base, true)
    torch.manual_seed(5)
    wrapped = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.02)
    wrapped.save_pretrained(root / "lora")
    teacher = wrapped.merge_and_unload()
    for name, model in (("base", base), ("teacher", teacher), ("student", student)):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    rows = (ASSETS / "data" / "seeds.jsonl").read_text().splitlines()[:6]
    (root / "seeds.jsonl").write_text("\n".join(rows) + "\n")
    return {"root": root, "true": true, "base": base, "teacher": teacher, "student": student}


def test_a_teachers_own_lora_is_its_delta(family: dict[str, Any]) -> None:
    root = family["root"]
    options = {"rank": 8, "progress": False, "anyway": True}
    by_base = pkt.transplant(root / "teacher", root / "student", root / "seeds.jsonl", base=root / "base", **options)
    by_lora = pkt.transplant(root / "base", root / "student", root / "seeds.jsonl", adapter=root / "lora", **options)
    assert set(by_base.pairs) == set(by_lora.pairs)
    for name, pair in by_base.pairs.items():
        scale = by_lora.provenance["alpha"] / by_base.provenance["alpha"]
        gap = (by_lora.pairs[name].delta() - scale * pair.delta()).norm() / pair.delta().norm()
        assert gap <= 1e-5, name
        assert by_lora.pairs[name].rank == 4


def test_the_whole_delta_is_the_teachers_change_on_the_students_units(family: dict[str, Any]) -> None:
    old, new = Matrices(family["teacher"]), Matrices(family["student"])
    found = family["true"]
    content = Delta(Cutter(found, old, new), Matrices(family["base"]))
    name = "model.layers.2.mlp.up_proj"
    target = new.spec.by_module()[name]
    source = f"model.layers.{found.layers[2]}.mlp.up_proj.weight"
    change = family["teacher"].get_parameter(source) - family["base"].get_parameter(source)
    expected = change[found.neurons[2]][:, found.hidden]
    assert torch.equal(content.whole(target), expected)


def test_memory_and_disk_resume_and_the_folder(family: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    from pkt.transplanting import run

    root = family["root"]
    options = {"base": root / "base", "rank": 8, "progress": False, "anyway": True}
    given = (root / "teacher", root / "student", root / "seeds.jsonl")
    once = pkt.transplant(*given, **options)
    made = run.pairs_of
    calls = []

    def stops(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return made(*args)

    monkeypatch.setattr(run, "pairs_of", stops)
    with pytest.raises(KeyboardInterrupt):
        pkt.transplant(*given, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(run, "pairs_of", made)
    with pytest.raises(pkt.PktError, match="rank: 8 there, 4 here"):
        pkt.transplant(*given, out=tmp_path / "out", **{**options, "rank": 4})
    monkeypatch.setattr(run, "pairs_of", lambda *args: calls.append(args) or made(*args))
    again = pkt.transplant(*given, out=tmp_path / "out", **options)
    assert len(calls) == 3 + 3  # the two parts that were there were not made again
    loaded = pkt.Start.load(tmp_path / "out")
    for name, pair in once.pairs.items():
        for found in (again.pairs[name], loaded.pairs[name]):
            assert torch.equal(found.A, pair.A)
            assert torch.equal(found.B, pair.B)
    assert Lineage.load(tmp_path / "out" / "lineage.json").kin
    assert not list(tmp_path.glob(".out*"))


def test_a_transplant_is_an_ordinary_lora(family: dict[str, Any], tmp_path: Path) -> None:
    from peft import PeftModel

    root = family["root"]
    start = pkt.transplant(
        root / "teacher", root / "student", root / "seeds.jsonl", base=root / "base", rank=8, out=tmp_path / "out",
        progress=False, anyway=True,
    )  # fmt: skip
    model = PeftModel.from_pretrained(load_model(root / "student", dtype=torch.float32), str(tmp_path / "out")).eval()
    plain = load_model(root / "student", dtype=torch.float32)
    with torch.no_grad():
        for name, pair in start.pairs.items():
            plain.get_submodule(name).weight.add_(pair.delta())
    ids = torch.arange(5, 45)[None]
    assert (model(ids).logits - plain(ids).logits).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "student"}, "name the model that the teacher was tuned from"),
        ({"base": "teacher"}, "the teacher and its base have the same weights"),
        ({"base": "base", "adapter": "lora"}, "either the base or the teacher's adapter"),
        ({"base": "base", "rank": 0}, "rank=0 must be a whole number"),
    ],
)
def test_what_a_transplant_refuses(family: dict[str, Any], change: dict[str, Any], message: str) -> None:
    root = family["root"]
    paths = {k: root / v if isinstance(v, str) else v for k, v in change.items()}
    with pytest.raises(pkt.PktError, match=message):
        pkt.transplant(
            root / "teacher", root / "student", root / "seeds.jsonl", lineage=family["true"], progress=False, **paths
        )


def test_strangers_and_other_peoples_lineages_are_refused(family: dict[str, Any], tmp_path: Path) -> None:
    root = family["root"]
    seeds = root / "seeds.jsonl"
    with pytest.raises(pkt.PktError, match=r"(?s)no lineage: .*nothing to transplant"):
        pkt.transplant(ASSETS / "teacher", ASSETS / "student", seeds, base=root / "base", progress=False)
    with pytest.raises(pkt.PktError, match="the lineage's student side was made from another model"):
        pkt.transplant(root / "teacher", ASSETS / "student", seeds, lineage=family["true"], progress=False)
    forced = pkt.transplant(
        ASSETS / "teacher", ASSETS / "student", seeds, base=root / "teacher", alpha=0.5, anyway=True, progress=False
    )
    assert {"self_attn", "mlp"} <= {name.split(".")[-2] for name in forced.pairs}


def test_a_change_that_only_harms_is_not_kept(family: dict[str, Any], tmp_path: Path) -> None:
    worse = copy.deepcopy(family["teacher"])
    with torch.no_grad():
        worse.lm_head.weight.add_(torch.randn(worse.lm_head.weight.shape, generator=torch.Generator().manual_seed(9)))
    rows = write_rows(tmp_path / "s.jsonl", *((ASSETS / "data" / "seeds.jsonl").read_text().splitlines()[:4]))
    from pkt.models import load_tokenizer

    with pytest.raises(pkt.PktError, match=r"every scale of the change makes the student worse .*α = 0: "):
        pkt.transplant(
            worse, family["student"], rows, base=family["base"], tokenizer=load_tokenizer(ASSETS / "teacher"),
            lineage=family["true"], progress=False,
        )  # fmt: skip


def test_a_transplant_goes_on_as_any_lora(family: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    """From the command line: transplanted, inspected, trained from where it is, finalized as the sum."""
    from commands import run

    from pkt.lora import load_with_adapter
    from pkt.manifest import read_manifest
    from pkt.training import train

    root, out = family["root"], tmp_path / "moved"
    given = (root / "teacher", root / "student", root / "seeds.jsonl", "--base", root / "base", "--out", out)
    shown = run("transplant", *given, "--rank", 8, "--anyway")
    assert "kept at: α = " in shown
    assert "next: pkt train " in shown
    assert "a transplant: what a teacher learnt" in run("inspect", out)
    model = pkt.inject(root / "student", out)
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        moved = load_with_adapter(root / "student", out)(ids).logits
        assert (model.eval()(ids).logits - moved).abs().max() <= 1e-4
    tuned = train(
        root / "student", out, root / "seeds.jsonl", tmp_path / "run", max_steps=2, batch_size=3, quietly=True
    )
    assert read_manifest(tmp_path / "run")["settings"]["lr"] == 1.5e-4
    pkt.finalize(tmp_path / "run", tmp_path / "final")
    with torch.no_grad():
        found = load_with_adapter(root / "student", tmp_path / "final")(ids).logits
        assert (found - tuned.eval()(ids).logits).abs().max() <= 1e-3
