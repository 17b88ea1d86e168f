"""Every family end to end on tiny random models of its own class; families feeding each other; and what nobody listed."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import lifecycle
import oracle
import pytest
import torch
import zoo
from torch import Tensor, nn

import pkt
from pkt.extraction import assemble
from pkt.lora import load_with_adapter
from pkt.models import load_model, load_tokenizer, shared_vocabulary, spec_of
from pkt.planning.regions import Region
from pkt.seeds import Example, Seeds
from pkt.support import TESTED, supported

SAMPLES = oracle.token_samples(3, longest=12)
BATCHES = oracle.batched(SAMPLES, 2)


def seeds() -> Seeds:
    examples = [Example(ids, [-100] * n + ids[n:], ids[:n], "", i) for i, (ids, n) in enumerate(SAMPLES, 1)]
    return Seeds(examples, "seeds.jsonl", 3)


def worst_error(found: Any, truth: dict[str, Tensor]) -> float:
    """The largest relative error of a parameter; below 1e-9 of the whole S is rounding (OPT's k biases get no gradient)."""
    floor = 1e-9 * sum(float(t.double().norm()) for t in truth.values())
    assert set(found) == set(truth)
    return max(
        float((found[n].double() - t.double()).norm()) / max(float(t.double().norm()), floor * 1e5)
        for n, t in truth.items()
    )


def places(plan: pkt.TransferPlan) -> list[Any]:
    return [(e.source, e.expert, e.target, e.target_expert, e.region, e.place) for e in plan.entries]


def full_circle(student_dir: Path, ext: pkt.Extraction, out: Path) -> None:
    """Inject (step 0 is the student), three steps of training, finalize, and the adapter on the student on disk."""
    plain = load_model(student_dir)
    start = lifecycle.logits(plain)
    model = pkt.inject(plain, ext)
    assert float((lifecycle.logits(model) - start).abs().max()) <= 1e-5
    losses = lifecycle.steps(model, 3)
    assert losses[-1] < losses[0]
    trained = lifecycle.logits(model)
    pkt.finalize(model, out, student=student_dir)
    final = lifecycle.logits(load_with_adapter(student_dir, out))
    assert float((final - trained).abs().max()) <= 1e-4 * float(trained.abs().max())


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_a_family(family: str, tmp_path: Path, families_table: dict[str, Any]) -> None:
    teacher, student = zoo.model(family), zoo.model(family, "student")
    families_table[family] = row = {"class": type(teacher).__name__, "error": None, "passed": False}
    sens = pkt.sensitivity(teacher, BATCHES, progress=False)
    row["error"] = error = worst_error(sens, oracle.sensitivity(teacher, oracle.batched(SAMPLES, 1)))
    assert error <= 1e-5

    for model, size in ((teacher, "teacher"), (student, "student")):
        model.save_pretrained(tmp_path / size)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ext = pkt.transfer(
            tmp_path / "teacher",
            tmp_path / "student",
            seeds(),
            out=tmp_path / "extraction",
            rank=4,
            keep_scores="full",
            progress=False,
        )
    whole = [str(w.message) for w in caught if "is loaded whole" in str(w.message)]
    row["read"] = whole[0].removeprefix(f"{tmp_path / 'teacher'} is ") if whole else "a layer at a time"
    kept = pkt.Sensitivity.load(tmp_path / "extraction" / "scores.safetensors")
    assert worst_error(kept, dict(sens)) <= 1e-5
    resident = pkt.plan(sens, teacher, student)
    assert places(ext.plan) == places(resident)
    assert ext.plan.notes == resident.notes
    whole = pkt.extract(teacher, resident, rank=4, progress=False)
    assert ext.energies == pytest.approx(whole.energies, rel=1e-4)
    assert {t.module for t in spec_of(student).targets if t.experts} <= set(ext.pairs)

    full_circle(tmp_path / "student", ext, tmp_path / "adapter")
    row["notes"] = ext.plan.notes
    row["fed"] = sorted(
        {role for t in spec_of(student).targets if t.module in ext.pairs for role, _ in t.roles() if role}
    )
    row["passed"] = True


# --- families feeding each other ------------------------------------------------------------------------------------

# Teacher's family, student's, what to leave out: what the teacher has no matrix for.
PAIRS = [
    ("Phi-3", "Llama", "all"),
    ("Llama", "Phi-3", "all"),
    ("GPT-NeoX (Pythia)", "Llama", "all,-gate"),
    ("Llama", "GPT-NeoX (Pythia)", "all,-k,-v"),
    ("Falcon (new decoder)", "Qwen2", "all,-gate"),
    ("Gemma2", "Falcon (new decoder)", "all"),
    ("GPT-2", "OPT", "all"),
    ("Qwen3", "Gemma3 (text)", "all"),
    ("Mixtral", "Mistral", "all"),
    ("GPT-OSS", "Phi-3", "all"),
    ("Qwen3-MoE", "Qwen3", "all"),
    ("DeepSeek-V3", "OLMo2", "ffn,embedding"),
    ("Mixtral", "Qwen3-MoE", "all"),
    ("GPT-OSS", "Mixtral", "all"),
    ("Qwen3-MoE", "GPT-OSS", "all"),
]


@pytest.mark.parametrize(("source", "target", "modules"), PAIRS)
def test_one_family_feeds_another(source: str, target: str, modules: str, tmp_path: Path) -> None:
    teacher, student = zoo.model(source), zoo.model(target, "student")
    student.save_pretrained(tmp_path / "student")
    sens = pkt.sensitivity(teacher, BATCHES, progress=False)
    plan = pkt.plan(sens, teacher, student, modules=modules)
    streamed = pkt.transfer(teacher, tmp_path / "student", seeds(), modules=modules, rank=4, progress=False)
    assert places(streamed.plan) == places(plan)
    shapes = {t.module: t.shape for t in spec_of(student).targets}
    assert {e.target: e.target_shape for e in plan.entries} == {m: shapes[m] for m in plan.by_target()}
    again = pkt.TransferPlan.from_json(plan.to_json())
    assert again.as_dict() == plan.as_dict()
    assert places(again) == places(plan)
    full_circle(tmp_path / "student", streamed, tmp_path / "adapter")


def fed(teacher: nn.Module, plan: pkt.TransferPlan, target: str) -> Tensor:
    """What a plan takes for a student's matrix."""
    sources = spec_of(teacher).by_module()
    entries = plan.by_target()[target]
    weights = {n: p.detach() for n, p in teacher.named_parameters()}
    return assemble(entries, lambda e: sources[e.source].oriented(weights[sources[e.source].parameter], e.expert))


# A teacher's fused matrix -> its roles in plain torch, for 4 heads of 8 and 2 k/v heads where the family has such.
BY_HAND: dict[str, dict[str, Any]] = {
    "Phi-3": {
        "q": ("self_attn.qkv_proj", lambda w: w[:32]),
        "k": ("self_attn.qkv_proj", lambda w: w[32:48]),
        "v": ("self_attn.qkv_proj", lambda w: w[48:]),
        "gate": ("mlp.gate_up_proj", lambda w: w[:48]),
        "up": ("mlp.gate_up_proj", lambda w: w[48:]),
    },
    "GPT-2": {
        "q": ("attn.c_attn", lambda w: w.t()[:32]),
        "k": ("attn.c_attn", lambda w: w.t()[32:64]),
        "v": ("attn.c_attn", lambda w: w.t()[64:]),
        "o": ("attn.c_proj", lambda w: w.t()),
    },
    "GPT-NeoX (Pythia)": {
        "q": ("attention.query_key_value", lambda w: w.view(4, 3, 8, 32)[:, 0].reshape(32, 32)),
        "k": ("attention.query_key_value", lambda w: w.view(4, 3, 8, 32)[:, 1].reshape(32, 32)),
        "v": ("attention.query_key_value", lambda w: w.view(4, 3, 8, 32)[:, 2].reshape(32, 32)),
    },
    "Falcon": {
        "q": ("self_attention.query_key_value", lambda w: w.view(4, 3, 8, 32)[:, 0].reshape(32, 32)),
        "v": ("self_attention.query_key_value", lambda w: w.view(4, 3, 8, 32)[:, 2].reshape(32, 32)),
    },
    "Falcon (new decoder)": {
        "q": ("self_attention.query_key_value", lambda w: w.view(2, 4, 8, 32)[:, :2].reshape(32, 32)),
        "k": ("self_attention.query_key_value", lambda w: w.view(2, 4, 8, 32)[:, 2].reshape(16, 32)),
        "v": ("self_attention.query_key_value", lambda w: w.view(2, 4, 8, 32)[:, 3].reshape(16, 32)),
    },
}
ROLE_NAMES = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
ROLE_NAMES |= {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}


@pytest.mark.parametrize("family", BY_HAND)
def test_fused_projections_are_cut_into_their_roles(family: str) -> None:
    """With a student of the teacher's own sizes every role comes over whole, and goes back to the same fused matrix."""
    teacher = zoo.model(family)
    many = family in ("GPT-2", "GPT-NeoX (Pythia)", "Falcon")
    student = zoo.model("Llama", num_key_value_heads=4 if many else 2)
    roles = list(BY_HAND[family])
    sens = pkt.sensitivity(teacher, BATCHES[:1], progress=False)
    plan = pkt.plan(sens, teacher, student, modules=",".join(roles))
    layers = spec_of(teacher).layers
    for role, (name, cut) in BY_HAND[family].items():
        weight = teacher.get_parameter(f"{layers}.1.{name}.weight").detach()
        assert torch.equal(fed(teacher, plan, f"model.layers.1.{ROLE_NAMES[role]}"), cut(weight)), role
    # And back: the student's separate matrices fill the fused one's places.
    back = pkt.plan(pkt.sensitivity(student, BATCHES[:1], progress=False), student, teacher, modules="q,k,v")
    fused_name = BY_HAND[family]["q"][0]
    whole = fed(student, back, f"{layers}.1.{fused_name}")
    whole = whole.t() if family == "GPT-2" else whole
    for role in set(roles) & {"q", "k", "v"}:
        expected = student.get_parameter(f"model.layers.1.{ROLE_NAMES[role]}.weight")
        assert torch.equal(BY_HAND[family][role][1](whole), expected), role


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3-MoE", "GPT-OSS"])
def test_the_most_sensitive_expert_feeds_a_dense_ffn(family: str) -> None:
    teacher = zoo.model(family)
    sens = pkt.sensitivity(teacher, BATCHES, progress=False)
    experts = "model.layers.1.mlp.experts"
    gate_up, down = (sens[f"{experts}.{n}"].double().flatten(1).sum(1) for n in ("gate_up_proj", "down_proj"))
    best = int((gate_up + down).argmax())
    weight = teacher.get_parameter(f"{experts}.gate_up_proj")[best].detach()
    gate, up = (weight.t()[::2], weight.t()[1::2]) if family == "GPT-OSS" else weight.chunk(2)
    student = zoo.model("Llama", intermediate_size=len(gate))
    plan = pkt.plan(sens, teacher, student)
    assert {e.expert for e in plan.entries if e.target.startswith("model.layers.1.mlp")} == {best}
    assert torch.equal(fed(teacher, plan, "model.layers.1.mlp.gate_proj"), gate)
    assert torch.equal(fed(teacher, plan, "model.layers.1.mlp.up_proj"), up)
    assert f"1: {best}" in plan.notes[0]
    assert "most sensitive expert" in str(plan)


def test_windows_of_fused_heads_never_cut_one() -> None:
    teacher, student = zoo.model("GPT-NeoX (Pythia)"), zoo.model("Llama", "student")
    sens = pkt.sensitivity(teacher, BATCHES, progress=False)
    plan = pkt.plan(sens, teacher, student, modules="q,k,v,o", align_heads=True)
    for entry in plan.entries:
        runs = entry.region.cols if entry.target.endswith("o_proj") else entry.region.rows
        assert all(a % 8 == 0 and (b - a) % 8 == 0 for a, b in runs), entry


def test_roles_and_groups_can_be_left_out() -> None:
    teacher, student = zoo.model("Llama"), zoo.model("Phi-3", "student")
    sens = pkt.sensitivity(teacher, BATCHES[:1], progress=False)

    def chosen(modules: str) -> set[str]:
        return {e.source.split(".")[-1] for e in pkt.plan(sens, teacher, student, modules=modules).entries}

    assert chosen("-k,-v,-embedding") == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert chosen("attention,up") == {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj"}
    assert chosen("gate_up") == {"gate_proj", "up_proj"}
    with pytest.raises(pkt.PktError, match=r"no matrix in that place .*--map"):
        pkt.plan(sens, zoo.model("OPT"), zoo.model("Llama", "student"))


class TestPartial:
    def test_what_fits_is_fed_and_the_rest_stays_zero(self, tmp_path: Path) -> None:
        teacher, student = zoo.model("Phi-3", "student"), zoo.model("Llama")
        student.save_pretrained(tmp_path / "student")
        sens = pkt.sensitivity(teacher, BATCHES, progress=False)
        with pytest.raises(pkt.PktError, match=r"2 layers, fewer than the student's 3.*--partial"):
            pkt.plan(sens, teacher, student)
        plan = pkt.plan(sens, teacher, student, partial=True)
        assert plan.layer_map == [0, 1]
        k = fed(teacher, plan, "model.layers.1.self_attn.k_proj")
        assert k.shape == (16, 32)
        assert torch.equal(
            k[:8, :16], teacher.get_parameter("model.layers.1.self_attn.qkv_proj.weight")[16:24].detach()
        )
        assert not k[8:].any()
        assert not k[:, 16:].any()
        given = sum(e.region.shape[0] * e.region.shape[1] for e in plan.entries)
        whole = sum(t.shape[0] * t.shape[1] for t in spec_of(student).targets)
        assert f"{100 * given / whole:.0f}% of the student's chosen weights are fed" in plan.notes[0]
        assert "nothing feeds 7 of its 23 matrices (model.layers.2" in plan.notes[0]
        assert "first 2 of 3 layers" in str(plan)
        ext = pkt.transfer(teacher, tmp_path / "student", seeds(), partial=True, rank=4, progress=False)
        assert places(ext.plan) == places(plan)
        assert ext.plan.notes == plan.notes
        full_circle(tmp_path / "student", ext, tmp_path / "adapter")

    def test_a_role_the_teacher_lacks_is_left_at_zero(self) -> None:
        teacher, student = zoo.model("GPT-2"), zoo.model("Llama", "student")
        sens = pkt.sensitivity(teacher, BATCHES[:1], progress=False)
        plan = pkt.plan(sens, teacher, student, partial=True)
        assert not any(e.target.endswith("gate_proj") for e in plan.entries)
        assert "nothing feeds 2 of its" in plan.notes[0]


class TestVocabularies:
    @pytest.fixture
    def tokenizers(self) -> tuple[Any, Any]:
        return words([f"w{i}" for i in range(60)]), words([f"▁w{i}" for i in (59, 3, 4, 5, 21)] + ["new", "w10"])

    def test_tables_are_mapped_by_shared_strings(self, tokenizers: Any, tmp_path: Path) -> None:
        teacher = zoo.model("Llama", tie_word_embeddings=False)
        student = zoo.model("Qwen3", "student", vocab_size=7)
        sens = pkt.sensitivity(teacher, BATCHES, progress=False)
        mine = words([f"w{i}" for i in (59, 3, 4, 5, 21)] + ["new", "w10"])
        plan = pkt.plan(sens, teacher, student, map_vocabulary=(tokenizers[0], mine))
        assert plan.notes == ["embeddings and head are mapped by 6 shared tokens (67 and 7 tokens)"]
        for name in ("model.embed_tokens", "lm_head"):
            table, entry = fed(teacher, plan, name), plan.by_target()[name][0]
            ((a, b),) = entry.region.cols
            weight = teacher.get_parameter(f"{name}.weight").detach()
            assert torch.equal(table[[0, 1, 2, 3, 4, 6]], weight[[59, 3, 4, 5, 21, 10], a:b])
            assert not table[5].any()
        ext = pkt.transfer(
            teacher,
            student,
            seeds(),
            map_vocabulary=(tokenizers[0], mine),
            rank=4,
            tokenizer=tokenizers[0],
            progress=False,
        )
        assert places(ext.plan) == places(plan)

    def test_both_marks_mean_a_space(self) -> None:
        found = shared_vocabulary(words(["Ġthe", "cat", "Ġ"]), words(["cat", "▁the", "the"]))
        assert found == [(1, 0), (0, 1)]

    def test_what_cannot_be_mapped(self, tokenizers: Any) -> None:
        teacher, student = zoo.model("Llama"), zoo.model("Llama", "student", vocab_size=5)
        sens = pkt.sensitivity(teacher, BATCHES[:1], progress=False)
        with pytest.raises(pkt.PktError, match="share no token"):
            pkt.plan(sens, teacher, student, map_vocabulary=(words(["a"]), words(["b"])))
        with pytest.raises(pkt.PktError, match="select='weights'"):
            pkt.plan(sens, teacher, student, select="weights", map_vocabulary=(tokenizers[0], tokenizers[0]))
        with pytest.raises(pkt.PktError, match="two directories"):
            pkt.plan(sens, teacher, student, map_vocabulary=True)


def bitsandbytes_runs() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def words(tokens: list[str]) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(tokens)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token=tokens[0])))


# --- what nobody listed ---------------------------------------------------------------------------------------------


class Mixer(nn.Module):
    """A block of an architecture that no table knows: a gated running mean in place of attention."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(width)
        self.read = nn.Linear(width, inner, bias=False)
        self.lock = nn.Linear(width, inner)
        self.write = nn.Linear(inner, width, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = self.ln(hidden_states)
        count = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)[:, None]
        mixed = self.read(x).cumsum(1) / count * self.lock(x).sigmoid()
        out: Tensor = hidden_states + self.write(mixed)
        return out


def invented(width: int, inner: int, depth: int) -> Any:
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput

    class MixerConfig(PretrainedConfig):
        model_type = "invented_mixer"

    class MixerLM(PreTrainedModel):
        config_class = MixerConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.tokens = nn.Embedding(zoo.VOCAB, width)
            self.stack = nn.ModuleList(Mixer(width, inner) for _ in range(depth))
            self.out = nn.Linear(width, zoo.VOCAB, bias=False)
            self.post_init()

        def get_input_embeddings(self) -> Any:
            return self.tokens

        def get_output_embeddings(self) -> Any:
            return self.out

        def forward(
            self, input_ids: Any = None, inputs_embeds: Any = None, attention_mask: Any = None, **rest: Any
        ) -> Any:
            hidden = self.tokens(input_ids) if inputs_embeds is None else inputs_embeds
            for block in self.stack:
                hidden = block(hidden)
            return CausalLMOutput(logits=self.out(hidden))

    torch.manual_seed(0)
    model = MixerLM(MixerConfig(vocab_size=zoo.VOCAB, hidden_size=width)).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    return model


class TestUnlisted:
    def test_its_own_kind_by_discovery(self) -> None:
        teacher, student = invented(32, 48, 3), invented(16, 32, 2)
        sens = pkt.sensitivity(teacher, BATCHES, progress=False)
        assert worst_error(sens, oracle.sensitivity(teacher, oracle.batched(SAMPLES, 1))) <= 1e-5
        ext = pkt.transfer(teacher, student, seeds(), rank=4, progress=False)
        plan = pkt.plan(sens, teacher, student)
        assert places(ext.plan) == places(plan)
        assert len(ext.pairs) == 2 * 3 + 2

    def test_another_kind_by_a_map_or_by_roles(self) -> None:
        teacher, student = invented(32, 48, 3), zoo.model("Llama", "student")
        sens = pkt.sensitivity(teacher, BATCHES, progress=False)
        with pytest.raises(
            pkt.PktError, match=r"up_proj .*the role 'up'.*--map 'teacher.\*.x=student.\*.y'.*--roles"
        ) as caught:
            pkt.plan(sens, teacher, student, modules="ffn")
        assert "--modules all,-k,-v" in str(caught.value)
        pairs = {"stack.*.read": "model.layers.*.mlp.up_proj", "stack.*.write": "model.layers.*.mlp.down_proj"}
        mapped = pkt.plan(sens, teacher, student, module_map=pairs)
        listed = pkt.plan(sens, teacher, student, module_map=[f"{a}={b}" for a, b in pairs.items()])
        assert places(mapped) == places(listed)
        assert {(e.source, e.target) for e in mapped.entries} == {
            (f"stack.{t}.{a}", f"model.layers.{s}.mlp.{b}")
            for s, t in enumerate(mapped.layer_map)
            for a, b in (("read", "up_proj"), ("write", "down_proj"))
        }
        lines = {"read": ["up", "ffn"], "write": ["down", "ffn"]}
        roles = pkt.plan(sens, teacher, student, modules="up,down", roles=lines)
        assert {(e.source, e.target, e.region) for e in roles.entries} == {
            (e.source, e.target, e.region) for e in mapped.entries
        }
        streamed = pkt.transfer(teacher, student, seeds(), module_map=pairs, rank=4, progress=False)
        assert places(streamed.plan) == places(mapped)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"module_map": {"stack.*.red": "model.layers.*.mlp.up_proj"}}, r"stack\.\d\.red, which is no matrix"),
            ({"module_map": {"stack.1.read": "model.layers.0.mlp.up_proj"}}, r"write the map as stack\.\*"),
            ({"module_map": ["stack.*.read"]}, "write TEACHER=STUDENT"),
            ({"module_map": {"stack.*.read": "model.*.*.mlp.up"}}, r"as many \* on each side"),
            (
                {"module_map": {"stack.*.read": "nothing.*.here"}},
                r"names nothing\.\*\.here, no matrix of the student's",
            ),
            ({"roles": {"read": ["reader", "ffn"]}}, r"give \[role, group\]"),
            ({"roles": {"read": ["up", "middle"]}}, "choose attention or ffn"),
        ],
    )
    def test_bad_overrides(self, options: Any, message: str) -> None:
        teacher, student = invented(32, 48, 3), zoo.model("Llama", "student")
        sens = pkt.sensitivity(teacher, BATCHES[:1], progress=False)
        with pytest.raises(pkt.PktError, match=message):
            pkt.plan(sens, teacher, student, **options)


class Stack(nn.Module):
    """Not a language model, and nothing of transformers'."""

    def __init__(self, width: int, inner: int, depth: int, names: tuple[str, str, str]) -> None:
        super().__init__()
        self.names = names
        blocks = [
            nn.ModuleDict({names[1]: nn.Linear(width, inner), names[2]: nn.Linear(inner, width)}) for _ in range(depth)
        ]
        self.add_module(names[0], nn.ModuleList(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.get_submodule(self.names[0]):
            x = x + block[self.names[2]](block[self.names[1]](x).relu())
        return x


def test_a_custom_module_is_planned_and_extracted_by_explicit_pairs() -> None:
    torch.manual_seed(0)
    teacher, student = Stack(24, 40, 3, ("encoder", "fc_a", "fc_b")), Stack(12, 20, 2, ("blocks", "inp", "outp"))
    batches = [{"x": torch.randn(4, 24), "labels": torch.randint(0, 24, (4,))}]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")

    sens = pkt.sensitivity(teacher, batches, loss_fn=loss, progress=False)
    pairs = {"encoder.*.fc_a": "blocks.*.inp", "encoder.*.fc_b": "blocks.*.outp"}
    ext = pkt.extract(teacher, pkt.plan(sens, teacher, student, module_map=pairs), rank=12, progress=False)
    assert set(ext.pairs) == {f"blocks.{i}.{n}" for i in (0, 1) for n in ("inp", "outp")}
    for module, pair in ext.pairs.items():
        region = fed(teacher, ext.plan, module)
        assert torch.allclose(pair.delta(), region, atol=1e-5)
    model = pkt.inject(student, ext)
    x = torch.randn(5, 12)
    plain = Stack(12, 20, 2, ("blocks", "inp", "outp"))
    plain.load_state_dict(
        {n.replace(".base_layer", ""): p for n, p in model.get_base_model().state_dict().items() if "lora" not in n}
    )
    assert torch.allclose(model(x), plain(x), atol=1e-5)


def test_plans_of_the_first_format_still_load() -> None:
    teacher, student = zoo.model("Llama"), zoo.model("Llama", "student")
    plan = pkt.plan(pkt.sensitivity(teacher, BATCHES[:1], progress=False), teacher, student)
    old = plan.as_dict() | {"format": "pkt-plan-1"}
    assert all(set(e) == {"source", "target", "kind", "score", "share", "region"} for e in old["entries"])
    assert pkt.TransferPlan.from_json(old).entries == plan.entries


def test_long_lists_of_rows_are_packed() -> None:
    region = Region((200, 3), tuple((3 * i, 3 * i + 1) for i in reversed(range(200))), ((0, 3),))
    matrix = torch.arange(1800.0).view(600, 3)
    assert torch.equal(region.cut(matrix), matrix[::3].flip(0))
    assert isinstance(region.to_json()["rows"], str)
    assert Region.from_json(region.to_json()) == region
    back = torch.zeros(600, 3)
    region.put(back, region.cut(matrix))
    assert torch.equal(back[::3], matrix[::3])
    assert not back[1::3].any()


# --- quantized teachers ---------------------------------------------------------------------------------------------


def write_gguf(model: Any, file: Path, tokens: int, tokenizer: Any = None) -> None:
    """A Llama model as llama.cpp stores it: matrices in 8 bits (Q8_0), rows of q and k in its order of rotary pairs."""
    import gguf
    from gguf.constants import GGMLQuantizationType

    config = model.config
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(tokens)
    if tokenizer is not None:
        found = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(sorted(found["vocab"], key=found["vocab"].get))
        writer.add_token_merges([" ".join(pair) for pair in found["merges"]])
        writer.add_eos_token_id(tokenizer.eos_token_id)
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight")
        place = outside.get(module)
        if place is None:
            _, _, layer, rest = module.split(".", 3)
            place = f"blk.{layer}.{names[rest]}"
        value = parameter.detach()
        if module.endswith(("q_proj", "k_proj")):
            count = heads if module.endswith("q_proj") else kv
            value = value.view(count, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape)
        array = value.numpy()
        if value.ndim == 2:
            packed = gguf.quants.quantize(array, GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{place}.weight", packed, raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{place}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class TestQuantized:
    def test_a_gguf_teacher_is_scored_at_its_dequantized_weights(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        pytest.importorskip("gguf", reason="the package gguf is not installed")
        sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
        model, student = zoo.model("Llama", **sizes), zoo.model("Llama", "student")
        (tmp_path / "teacher").mkdir()
        write_gguf(model, tmp_path / "teacher" / "model.gguf", zoo.VOCAB)
        loaded = load_model(tmp_path / "teacher")
        assert capfd.readouterr().err == ""  # no bar of transformers' beside pkt's
        for name, parameter in model.named_parameters():
            # Q8_0: half a step of 1/127 of the largest of 32 weights, and a scale kept in fp16.
            gap = float((loaded.get_parameter(name) - parameter).detach().abs().max())
            assert gap <= float(parameter.detach().abs().max()) * (1 / 254 + 2.0**-11), name
        with pytest.warns(pkt.PktWarning, match="is loaded whole, not layer by layer: it is a GGUF file"):
            ext = pkt.transfer(tmp_path / "teacher", student, seeds(), rank=4, progress=False)
        sens = pkt.sensitivity(loaded, BATCHES, progress=False)
        assert worst_error(sens, oracle.sensitivity(loaded, oracle.batched(SAMPLES, 1))) <= 1e-5
        assert places(ext.plan) == places(pkt.plan(sens, tmp_path / "teacher", student))
        (tmp_path / "teacher" / "second.gguf").write_bytes(b"GGUF")
        with pytest.raises(pkt.PktError, match="holds 2 GGUF files"):
            load_model(tmp_path / "teacher")

    def test_a_gguf_student_is_trained_whole_and_keeps_its_tokenizer(
        self, tmp_path: Path, tokenizer: Any, seed_file: Path
    ) -> None:
        pytest.importorskip("gguf", reason="the package gguf is not installed")
        (tmp_path / "student").mkdir()
        model = zoo.llama(hidden=64, layers=1, heads=4, kv=2, ffn=96, vocab=len(tokenizer))
        write_gguf(model, tmp_path / "student" / "model.gguf", len(tokenizer), tokenizer)
        trained = pkt.train(
            tmp_path / "student", None, seed_file, tmp_path / "out", full=True, max_steps=1, report_to="none"
        )
        assert not trained.is_quantized
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert "quantization_config" not in config
        text = "Ann has 3 apples."
        assert load_tokenizer(tmp_path / "out")(text).input_ids == load_tokenizer(tmp_path / "student")(text).input_ids

    def test_a_missing_reader_and_other_quantizations_say_what_to_do(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import pkt.models

        found = importlib.util.find_spec
        gone = ("gguf", "bitsandbytes")
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: None if name in gone else found(name, *rest)
        )
        student = zoo.model("Llama", "student")
        (tmp_path / "gguf").mkdir()
        (tmp_path / "gguf" / "model.gguf").write_bytes(b"GGUF")
        with pytest.raises(pkt.PktError, match="pip install gguf"):
            pkt.transfer(tmp_path / "gguf", student, seeds())
        for method, message in (
            ("gptq", "quantized with gptq, which pkt cannot undo; convert it to bf16 or fp16 safetensors, or to GGUF"),
            ("bitsandbytes", "install bitsandbytes, or convert it"),
        ):
            folder = tmp_path / method
            zoo.model("Llama").save_pretrained(folder)
            config = json.loads((folder / "config.json").read_text())
            quantization = {"quant_method": method, "bits": 4, "load_in_4bit": True}
            (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
            with pytest.raises(pkt.PktError, match=message):
                pkt.transfer(folder, student, seeds())
        rows = {name: (here, why) for name, here, why in supported()}
        assert rows["GGUF"] == (False, "pip install gguf")
        assert rows["safetensors"][0]

    @pytest.mark.skipif(not bitsandbytes_runs(), reason="bitsandbytes is not installed")
    def test_a_bitsandbytes_teacher_is_scored_at_its_dequantized_weights(self, tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        zoo.model("Llama", hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path / "whole")
        packed = AutoModelForCausalLM.from_pretrained(
            tmp_path / "whole", quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu"
        )
        packed.save_pretrained(tmp_path / "teacher")
        student = zoo.model("Llama", "student")
        with pytest.raises(pkt.PktError, match=r"quantized weight; .*dequantize\(\) first"):
            pkt.sensitivity(packed, BATCHES, progress=False)
        with pytest.warns(pkt.PktWarning, match="is loaded whole, not layer by layer: its weights are quantized"):
            ext = pkt.transfer(tmp_path / "teacher", student, seeds(), rank=4, progress=False)
        whole = load_model(tmp_path / "teacher", dequantize=True)
        sens = pkt.sensitivity(whole, BATCHES, progress=False)
        assert places(ext.plan) == places(pkt.plan(sens, whole, student))


def test_the_table_of_architectures_names_what_is_tested() -> None:
    assert set(TESTED) == {zoo.FAMILIES[f]("teacher").model_type for f in zoo.FAMILIES}
