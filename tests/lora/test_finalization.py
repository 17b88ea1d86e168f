"""From every kind of injection to one plain LoRA on the original student, in a fresh process; and what finalize refuses."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import lifecycle
import processes
import pytest
import torch
from lifecycle import IDS, contents, extraction, logits, save_quietly, steps, student
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import pkt
from pkt.adapters import CONFIG, WEIGHTS, Adapter, Pair, read_adapter
from pkt.files import MANIFEST
from pkt.lora import load_with_adapter
from pkt.lora.finalization import refactor
from pkt.models import load_model
from pkt.models.adapter_files import INITIAL
from pkt.reporting import inspect_folder

MODES = ("paired", "residual", "add")
KINDS = [(arch, tied) for arch in ("llama", "gpt2") for tied in (False, True)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = [(m, d, arch, tied) for m in MODES for d in DTYPES for arch, tied in KINDS]

# Run in a fresh process: finalize each trained folder, load it by plain PEFT, and once more after PEFT's own save.
FRESH = """
import json, sys, warnings
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
import lifecycle, pkt
from peft import PeftModel
from pkt.models import load_model
from pkt.reporting import inspect_folder
root = Path(sys.argv[1])
for case in sorted((root / "runs").iterdir()):
    about = json.loads((case / "about.json").read_text())
    out = root / "final" / case.name
    done = pkt.finalize(case / "trained", out, extraction=about["extraction"] if about["mode"] == "residual" else None)
    found = {"gap": done.check.gap, "mode": done.mode, "rank": done.pairs[min(done.pairs)].rank}
    warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
    with lifecycle.no_warnings(mixed_layout=about["arch"] == "gpt2"):
        model = PeftModel.from_pretrained(load_model(about["student"]), str(out)).eval()
    found["logits"] = lifecycle.logits(model)
    lifecycle.save_quietly(model, root / "again" / case.name)
    again = PeftModel.from_pretrained(load_model(about["student"]), str(root / "again" / case.name)).eval()
    found["again"] = lifecycle.logits(again)
    torch.save(found, root / "final" / (case.name + ".pt"))
"""


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every case injected and trained here, finalized and reloaded in one fresh process."""
    root = tmp_path_factory.mktemp("matrix")
    cases: dict[str, Any] = {}
    for arch, tied in KINDS:
        ext = extraction(arch, tied)
        ext.save(root / "extractions" / f"{arch}-{tied}")
        for dtype in DTYPES:
            folder = root / "students" / f"{arch}-{tied}-{dtype}"
            student(arch, tied).to(DTYPES[dtype]).save_pretrained(folder)
            for file in folder.iterdir():
                file.chmod(0o444)
            before = contents(folder)
            for mode in MODES:
                name = f"{mode}-{dtype}-{arch}-{tied}"
                plain = load_model(folder)
                start = logits(plain)
                weights = {n: p.clone() for n, p in plain.named_parameters()}
                model = pkt.inject(plain, ext, mode=mode, dropout=0.0)
                first = logits(model)
                losses = steps(model)
                base = {n.replace(".base_layer", ""): p for n, p in model.get_base_model().named_parameters()}
                moved = [n for n, w in weights.items() if not torch.equal(base[n], w)]
                run = root / "runs" / name
                save_quietly(model, run / "trained")
                about = {"mode": mode, "arch": arch, "student": str(folder)}
                about["extraction"] = str(root / "extractions" / f"{arch}-{tied}")
                (run / "about.json").write_text(json.dumps(about))
                cases[name] = {
                    "start": start,
                    "first": first,
                    "losses": losses,
                    "moved": moved,
                    "trained": logits(model),
                    "student": folder,
                    "final": root / "final" / name,
                    "before": before,
                }
    command = [sys.executable, "-c", FRESH, root, Path(__file__).parents[1]]
    done = processes.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    for name, case in cases.items():
        case["fresh"] = torch.load(root / "final" / f"{name}.pt")
    return cases


def relative(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm())


@pytest.mark.parametrize(("mode", "dtype", "arch", "tied"), CASES)
def test_the_life_of_an_adapter(matrix: dict[str, Any], mode: str, dtype: str, arch: str, tied: bool) -> None:
    case = matrix[f"{mode}-{dtype}-{arch}-{tied}"]
    fresh, final = case["fresh"], case["final"]
    # Step 0 is the student, in `add` it is not; the base moves in `residual` only.
    gap = float((case["first"] - case["start"]).abs().max())
    if mode == "add":
        assert gap > 1e-2
    elif dtype == "fp32":
        assert gap <= 1e-5
    assert bool(case["moved"]) == (mode == "residual")
    assert case["losses"][-1] < case["losses"][0]
    # On the original student, in a fresh process, the plain adapter gives the trained model's logits.
    assert fresh["mode"] == mode
    if dtype == "fp32":
        assert (fresh["logits"] - case["trained"]).abs().max() <= 1e-4
    else:
        assert relative(fresh["logits"], case["trained"]) <= 2 * merge_rounding(case)
    assert torch.equal(fresh["logits"], fresh["again"])
    assert contents(case["student"]) == case["before"]
    check_served(final, fresh["rank"])


def merge_rounding(case: dict[str, Any]) -> float:
    """How far the logits move when the plain adapter is merged into the student's bf16 weights."""
    model = load_model(case["student"])
    for module, pair in read_adapter(case["final"])[0].pairs.items():
        place = model.get_submodule(module)
        if place is model.get_output_embeddings() and model.config.tie_word_embeddings:
            continue
        delta = pair.B @ pair.A if isinstance(place, torch.nn.Linear) else (pair.B @ pair.A).t()
        place.weight.data = (place.weight.float() + delta).to(place.weight.dtype)
    if model.config.tie_word_embeddings:
        model.tie_weights()
    return relative(logits(model), case["fresh"]["logits"])


def check_served(folder: Path, rank: int) -> None:
    """What servers ask of a LoRA folder: one rank and scale, PEFT's names, finite factors, a card with its base."""
    config = json.loads((folder / CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == rank
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert not config["use_rslora"]
    with safe_open(folder / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        for key in file.keys():  # noqa: SIM118
            assert key.startswith("base_model.model.")
            assert "base_layer" not in key
            assert rank in file.get_slice(key).get_shape()
    assert "base_model:" in (folder / "README.md").read_text()


@pytest.mark.parametrize(("arch", "tied"), KINDS)
def test_paired_and_residual_train_alike(matrix: dict[str, Any], arch: str, tied: bool) -> None:
    paired, residual = (matrix[f"{m}-fp32-{arch}-{tied}"]["losses"] for m in ("paired", "residual"))
    assert max(abs(a - b) for a, b in zip(paired, residual, strict=True)) <= 1e-3


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student") / "llama"
    student().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ext() -> Any:
    return extraction()


def trained(student_folder: Path, ext: Any, mode: str = "paired", **options: Any) -> Any:
    model = pkt.inject(student_folder, ext, mode=mode, **options)
    steps(model, 4, lr=1e-2)
    return model


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{"alpha": 12.0}, {"rslora": True}, {"alpha": 3.0, "rslora": True}], ids=str)
def test_scales(student_folder: Path, ext: Any, tmp_path: Path, mode: Any, options: dict[str, Any]) -> None:
    """alpha and rslora change what is written, not the start; finalize folds them into B."""
    model = pkt.inject(student_folder, ext, mode=mode, **options)
    plain = load_model(student_folder)
    if mode != "add":
        assert (logits(model) - logits(plain)).abs().max() <= 1e-5
    for module, pair in ext.pairs.items():
        layer = model.get_base_model().get_submodule(module)
        scale = options.get("alpha", pair.rank**0.5 if options.get("rslora") else pair.rank)
        scale = scale / (pair.rank**0.5 if options.get("rslora") else pair.rank)
        assert layer.scaling["default"] == pytest.approx(scale)
    steps(model, 4, lr=1e-2)
    save_quietly(model, tmp_path / "trained")
    done = pkt.finalize(
        tmp_path / "trained", tmp_path / "out", extraction=None if mode != "residual" else saved(ext, tmp_path)
    )
    assert done.check.gap <= 1e-4
    assert (logits(load_with_adapter(student_folder, tmp_path / "out")) - logits(model)).abs().max() <= 1e-4


def saved(ext: Any, folder: Path) -> Path:
    ext.save(folder / "extraction")
    return folder / "extraction"


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_recompression_is_optimal(kind: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(10, 40, generator=generator), torch.randn(30, 10, generator=generator)
    a[5:], b[:, 5:] = a[:5] + 0.1 * a[5:], -b[:, :5] + 0.1 * b[:, 5:]  # halves that nearly cancel, as paired ones do
    for rank in (1, 4, 9):
        small, lost = refactor(Adapter({"m": Pair(a, b, kind)}, ""), rank)
        u, s, vt = torch.linalg.svd(b.double() @ a.double())
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        found = small.pairs["m"].B.double() @ small.pairs["m"].A.double()
        assert (found - best).norm() <= 1e-5 * best.norm()
        assert lost["m"] == pytest.approx(float(s[rank:].norm() / s.norm()), rel=1e-6)


def test_rank_is_reported_per_layer(student_folder: Path, ext: Any, tmp_path: Path) -> None:
    model = trained(student_folder, ext)
    done = pkt.finalize(model, tmp_path / "out", rank=3)
    assert done.lost.keys() == ext.pairs.keys()
    assert 0 < max(done.lost.values()) < 1
    assert {p.rank for p in done.pairs.values()} == {3}
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["lost"] == done.lost
    assert "recompression loses" in "\n".join(done.report())


def test_rank_outside_of_the_adapter(student_folder: Path, ext: Any, tmp_path: Path) -> None:
    model = trained(student_folder, ext)
    for rank in (0, 2 * ext.rank + 1):
        with pytest.raises(pkt.PktError, match=f"rank={rank} is not between 1 and {2 * ext.rank}"):
            pkt.finalize(model, tmp_path / "out", rank=rank)
    assert not (tmp_path / "out").exists()


def test_half_precision_factors_lose_a_share_of_the_change_only(student_folder: Path, ext: Any, tmp_path: Path) -> None:
    """The halves of `paired` cancel; rounding them as they are would cost far more than rounding ΔW."""
    model = trained(student_folder, ext)
    done = pkt.finalize(model, tmp_path / "out", dtype=torch.bfloat16)
    exact = pkt.finalize(model, tmp_path / "exact")
    assert (
        load_file(tmp_path / "out" / WEIGHTS)[next(iter(load_file(tmp_path / "out" / WEIGHTS)))].dtype == torch.bfloat16
    )
    for module, pair in done.pairs.items():
        delta = exact.pairs[module].delta()
        assert (Pair(pair.A.float(), pair.B.float(), pair.kind).delta() - delta).norm() <= 2**-7 * delta.norm()


def test_no_embeddings(student_folder: Path, ext: Any, tmp_path: Path) -> None:
    model = trained(student_folder, ext)
    done = pkt.finalize(model, tmp_path / "out", embeddings=False, samples=IDS.tolist())
    assert sorted(done.dropped) == ["lm_head", "model.embed_tokens"]
    served = logits(load_with_adapter(student_folder, tmp_path / "out"))
    assert done.check.gap == pytest.approx(float((served - logits(model)).abs().max()), rel=1e-3)
    assert done.check.gap > 1e-2
    # vLLM's own demands: known projections only, one rank, no patterns, nothing but A and B.
    known = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    for key in load_file(tmp_path / "out" / WEIGHTS):
        assert key.split(".")[-3] in known
        assert key.endswith((".lora_A.weight", ".lora_B.weight"))
    assert {m.split(".")[-1] for m in json.loads((tmp_path / "out" / CONFIG).read_text())["target_modules"]} <= known
    pkt.finalize(model, tmp_path / "small", embeddings=False, rank=8)
    assert json.loads((tmp_path / "small" / CONFIG).read_text())["r"] <= 16  # vLLM's max_lora_rank unless raised


@pytest.mark.parametrize("tied", [False, True])
def test_merge(ext: Any, tmp_path: Path, tied: bool) -> None:
    """The whole model, a tied table changed once, and the student's own folder as it was."""
    student("llama", tied).save_pretrained(tmp_path / "student")
    before = contents(tmp_path / "student")
    model = trained(tmp_path / "student", extraction("llama", tied) if tied else ext, "residual")
    pkt.finalize(model, tmp_path / "out", merge=tmp_path / "merged")
    assert (logits(load_model(tmp_path / "merged")) - logits(model)).abs().max() <= 1e-4
    assert contents(tmp_path / "student") == before


def test_the_trained_model_is_recognised(student_folder: Path, ext: Any, tmp_path: Path) -> None:
    """By its record, by the manifest of its run, and a paired one by its factors alone."""
    for mode in MODES:
        model = trained(student_folder, ext, mode)
        save_quietly(model, tmp_path / mode)
        if mode == "residual":
            with pytest.raises(pkt.PktError, match="without its initial factors"):
                pkt.finalize(tmp_path / mode, tmp_path / "out2")
            with pytest.raises(pkt.PktError, match="not those"):
                pkt.finalize(tmp_path / mode, tmp_path / "out2", extraction=extraction(rank=2))
        forget(tmp_path / mode)
        if mode == "paired":
            assert pkt.finalize(tmp_path / mode, tmp_path / "out").check.gap <= 1e-4
            continue
        with pytest.raises(pkt.PktError, match="cannot tell how"):
            pkt.finalize(tmp_path / mode, tmp_path / "out2", student=student_folder)
    assert not (tmp_path / "out2").exists()


def forget(folder: Path) -> None:
    """What a tool that builds its own configuration leaves: no record."""
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "auto_mapping": None}))


def test_a_plain_lora_is_not_taken_for_a_paired_one(student_folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    for init in (True, "pissa", "orthogonal", "olora"):
        model = get_peft_model(
            load_model(student_folder), LoraConfig(r=8, target_modules=["q_proj", "down_proj"], init_lora_weights=init)
        )
        for count in (0, 6):
            steps(model, count)
            save_quietly(model, tmp_path / f"{init}{count}")
            with pytest.raises(pkt.PktError, match=r"cannot tell how|not made by pkt"):
                pkt.finalize(tmp_path / f"{init}{count}", tmp_path / "out")
    with pytest.raises(pkt.PktError, match="not made by pkt"):
        pkt.finalize(model, tmp_path / "out")


def test_a_shifted_base_is_not_the_student(student_folder: Path, ext: Any, tmp_path: Path) -> None:
    saved(ext, tmp_path)
    from pkt.training import write_injected

    write_injected(
        student_folder, tmp_path / "extraction", tmp_path / "start", mode="residual", save_residual=tmp_path / "base"
    )
    # The folder as it is, and a foreign trainer's output that knows only the path of its base.
    for folder in (tmp_path / "start", tmp_path / "foreign"):
        if folder.name == "foreign":
            shutil.copytree(tmp_path / "start", folder, ignore=shutil.ignore_patterns(MANIFEST, INITIAL))
            forget(folder)
        assert pkt.finalize(folder, tmp_path / f"{folder.name}-out").check.gap <= 1e-4
        with pytest.raises(pkt.PktError, match="is the shifted base of a residual injection"):
            pkt.finalize(folder, tmp_path / "out", student=tmp_path / "base")
    with pytest.raises(pkt.PktError, match="already shifted"):
        pkt.inject(tmp_path / "base", ext)
    model = pkt.inject(student_folder, ext, mode="residual")
    with pytest.raises(pkt.PktError, match="already shifted"):
        pkt.inject(model.unload(), ext)


def test_another_student_is_refused(student_folder: Path, ext: Any, tmp_path: Path) -> None:
    model = trained(student_folder, ext)
    other = student()
    other.model.layers[1].mlp.down_proj.weight.data.add_(0.01)
    other.model.embed_tokens.weight.data.add_(0.01)
    other.lm_head.weight.data.add_(0.01)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(pkt.PktError, match="are not those the adapter was injected into"):
        pkt.finalize(model, tmp_path / "out", student=tmp_path / "other")
    student("llama").to(torch.bfloat16).save_pretrained(tmp_path / "rounded")
    pkt.finalize(model, tmp_path / "out", student=tmp_path / "rounded", check=False)


def test_a_base_changed_in_training_is_refused(student_folder: Path, ext: Any, tmp_path: Path) -> None:
    model = trained(student_folder, ext)
    model.get_base_model().model.norm.weight.data.mul_(3.0)
    with pytest.raises(pkt.PktError, match="does not reproduce the trained model"):
        pkt.finalize(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "trained biases"),
        ({"trainable_token_indices": [1]}, "trainable tokens"),
        ({"peft_type": "IA3"}, "IA3"),
    ],
)
def test_other_methods_are_refused_in_words(
    student_folder: Path, ext: Any, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    save_quietly(pkt.inject(student_folder, ext), tmp_path / "trained")
    config = json.loads((tmp_path / "trained" / CONFIG).read_text())
    (tmp_path / "trained" / CONFIG).write_text(json.dumps({**config, **change}))
    with pytest.raises(pkt.PktError, match=words):
        pkt.finalize(tmp_path / "trained", tmp_path / "out")


def test_factors_that_are_not_finite_or_not_whole(student_folder: Path, ext: Any, tmp_path: Path) -> None:
    model = pkt.inject(student_folder, ext)
    save_quietly(model, tmp_path / "trained")
    state = load_file(tmp_path / "trained" / WEIGHTS)
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    save_file({**state, key: state[key] * float("nan")}, tmp_path / "trained" / WEIGHTS)
    with pytest.raises(pkt.PktError, match=r"layers\.0\.mlp\.up_proj contain NaN or Inf"):
        pkt.finalize(tmp_path / "trained", tmp_path / "out")
    save_file({k: v for k, v in state.items() if k != key}, tmp_path / "trained" / WEIGHTS)
    with pytest.raises(pkt.PktError, match=r"layers\.0\.mlp\.up_proj has only one of its two"):
        pkt.finalize(tmp_path / "trained", tmp_path / "out")
    with torch.no_grad():
        model.get_base_model().lm_head.lora_B["default"].weight[0, 0] = float("inf")
    with pytest.raises(pkt.PktError, match="lm_head contain NaN or Inf"):
        pkt.finalize(model, tmp_path / "out")


def test_output_in_use_and_wrong_inputs(student_folder: Path, ext: Any, tmp_path: Path) -> None:
    model = trained(student_folder, ext)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    for options in ({"out": tmp_path / "mine"}, {"out": tmp_path / "out", "merge": tmp_path / "mine"}):
        with pytest.raises(pkt.PktError, match="holds something that pkt did not write"):
            pkt.finalize(model, force=True, **options)
    with pytest.raises(pkt.PktError, match="carries no adapter"):
        pkt.finalize(student(), tmp_path / "out")
    with pytest.raises(pkt.PktError, match="is a model, not an adapter folder"):
        pkt.finalize(student_folder, tmp_path / "out")
    with pytest.raises(pkt.PktError, match="is an extraction, not a trained adapter"):
        pkt.finalize(saved(ext, tmp_path), tmp_path / "out")
    with pytest.raises(pkt.PktError, match=r"does not fit (.|\n)*embed_tokens(.|\n)*layers.0.self_attn.q_proj"):
        pkt.finalize(model, tmp_path / "out", student=lifecycle.teacher())
    with pytest.raises(pkt.PktError, match="not a type for factors"):
        pkt.finalize(model, tmp_path / "out", dtype=torch.int8)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    assert not (tmp_path / "out").exists()


def test_finalized_again(student_folder: Path, ext: Any, tmp_path: Path) -> None:
    """A finalized folder is plain; its rank can be cut once more."""
    pkt.finalize(trained(student_folder, ext), tmp_path / "out")
    done = pkt.finalize(tmp_path / "out", tmp_path / "small", rank=2)
    assert done.mode == "plain"
    assert {p.rank for p in done.pairs.values()} == {2}


def command(*args: Any) -> Any:
    from typer.testing import CliRunner

    from pkt import cli

    done = CliRunner().invoke(cli.app, [str(a) for a in args])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def test_a_pickled_adapter_is_read_only_if_that_is_safe(student_folder: Path, ext: Any, tmp_path: Path) -> None:
    save_quietly(pkt.inject(student_folder, ext), tmp_path / "trained")
    pkt.finalize(tmp_path / "trained", tmp_path / "out")
    state = load_file(tmp_path / "trained" / WEIGHTS)
    (tmp_path / "trained" / WEIGHTS).unlink()
    torch.save(state, tmp_path / "trained" / "adapter_model.bin")
    pkt.finalize(tmp_path / "trained", tmp_path / "same")
    assert (tmp_path / "same" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()
    torch.save({"run me": student_folder}, tmp_path / "trained" / "adapter_model.bin")
    with pytest.raises(pkt.PktError, match=r"adapter_model\.bin is a pickle that cannot be loaded safely"):
        pkt.finalize(tmp_path / "trained", tmp_path / "again")


def test_the_command(student_folder: Path, ext: Any, tmp_path: Path) -> None:
    model = trained(student_folder, ext)
    save_quietly(model, tmp_path / "trained")
    text = command(
        "finalize", tmp_path / "trained", "--out", tmp_path / "out", "--rank", 3, "--merge", tmp_path / "merged"
    )
    assert "rank 3" in text
    assert "recompression loses" in text
    assert "against the trained model on 4 samples (64 tokens): logits differ by at most" in text
    found = json.loads(
        command(
            *("finalize", tmp_path / "trained", "--out", tmp_path / "small", "--no-embeddings", "--dtype", "bfloat16"),
            *("--no-check", "--json"),
        )
    )
    assert found["mode"] == "paired"
    assert found["check"] is None
    assert sorted(found["left_out"]) == ["lm_head", "model.embed_tokens"]
    assert logits(load_model(tmp_path / "merged")).isfinite().all()


def test_inspect_says_what_every_folder_is(student_folder: Path, ext: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    saved(ext, tmp_path)
    command("inject", student_folder, tmp_path / "extraction", "--out", tmp_path / "start", "--mode", "residual")
    save_quietly(trained(student_folder, ext), tmp_path / "trained")
    command("finalize", tmp_path / "trained", "--out", tmp_path / "final", "--merge", tmp_path / "merged")
    save_quietly(get_peft_model(load_model(student_folder), LoraConfig(target_modules=["q_proj"])), tmp_path / "plain")
    for folder, words in {
        "extraction": "is: an extraction",
        "start": "is: an adapter injected by pkt (residual), to be trained by any PEFT trainer",
        "start/base": "is: the shifted base (W − B₀A₀) of a residual injection",
        "trained": "is: a trained adapter, injected by pkt as paired (known from the record in its adapter_config.json)",
        "final": "is: a plain LoRA finalized by pkt (it was injected as paired)",
        "merged": "is: a whole model",
        "plain": "is: a LoRA adapter that pkt did not write",
    }.items():
        text = command("inspect", tmp_path / folder)
        assert words in text, text
        assert f"student: {student_folder}" in text or folder == "extraction"
        assert "next: " in text
    assert "fits: yes" in command("inspect", tmp_path / "final", "--student", student_folder)
    student("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(pkt.PktError, match="does not fit"):
        inspect_folder(tmp_path / "final", str(tmp_path / "gpt2"))


def test_outputs_apart_from_each_other_and_from_what_is_read(student_folder: Path, ext: Any, tmp_path: Path) -> None:
    """Checked before anything is written, and --force is no way around it."""
    save_quietly(trained(student_folder, ext), tmp_path / "run" / "checkpoint")
    (tmp_path / "run" / MANIFEST).write_text("{}")
    before = contents(tmp_path)
    for out, merge in (
        ("x", "x"),
        ("x/sub", "x"),
        ("x", "x/sub"),
        ("run/checkpoint", None),
        ("run", None),
        ("run/checkpoint/final", None),
        ("x", "run"),
        (student_folder, None),
        (student_folder / "final", None),
        ("x", student_folder),
    ):
        for folder in (out, merge):
            if folder is not None and (tmp_path / folder).is_dir():
                (tmp_path / folder / MANIFEST).write_text("{}")
        with pytest.raises(pkt.PktError, match="name an output folder apart from it"):
            pkt.finalize(
                tmp_path / "run" / "checkpoint",
                tmp_path / out,
                merge=None if merge is None else tmp_path / merge,
                force=True,
            )
    for folder in (student_folder, tmp_path / "run" / "checkpoint"):
        (folder / MANIFEST).unlink()
    assert contents(tmp_path) == before


def test_the_adapter_and_the_merged_model_appear_together(
    student_folder: Path, ext: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    from safetensors import SafetensorError

    model = trained(student_folder, ext)
    plain = type(model.get_base_model()).save_pretrained

    def full(*args: Any, **options: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(type(model.get_base_model()), "save_pretrained", full)
    with pytest.raises(pkt.PktError, match="merged: No space left on device; free some space"):
        pkt.finalize(model, tmp_path / "out", merge=tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(type(model.get_base_model()), "save_pretrained", plain)
    pkt.finalize(model, tmp_path / "out", merge=tmp_path / "merged")
    modes = {file.stat().st_mode for folder in ("out", "merged") for file in (tmp_path / folder).iterdir()}
    assert len(modes) == 1


def test_samples_that_no_model_can_read(student_folder: Path, ext: Any, tmp_path: Path) -> None:
    model = trained(student_folder, ext)
    for samples in ([], ["hello"], [[]], [[1.5]], [[-1]], [1, 2], 5):
        with pytest.raises(pkt.PktError, match="samples must be one or more rows of token ids"):
            pkt.finalize(model, tmp_path / "out", samples=samples)
    with pytest.raises(pkt.PktError, match="the token id 5000, but the student embeds only 67"):
        pkt.finalize(model, tmp_path / "out", samples=[[1, 5000]])
    assert list(tmp_path.iterdir()) == []
    assert pkt.finalize(model, tmp_path / "out", samples=IDS).check.samples == len(IDS)


def test_arguments_of_other_types(student_folder: Path, ext: Any, tmp_path: Path) -> None:
    model = trained(student_folder, ext)
    for wrong in (None, 5, ext):
        with pytest.raises(pkt.PktError, match=f"a trained model, .* not {type(wrong).__name__}"):
            pkt.finalize(wrong, tmp_path / "out")
        with pytest.raises(pkt.PktError, match="the path of an output folder is needed"):
            pkt.finalize(model, wrong)
    with pytest.warns(pkt.PktWarning, match="the extraction is not used: this adapter is paired"):
        pkt.finalize(model, tmp_path / "out", extraction=ext)


@pytest.mark.parametrize(("value", "shown"), [(None, "None"), ("x", "x"), ("", "missing")])
def test_a_configuration_without_a_scale(
    student_folder: Path, ext: Any, tmp_path: Path, value: Any, shown: str
) -> None:
    save_quietly(pkt.inject(student_folder, ext), tmp_path / "trained")
    config = json.loads((tmp_path / "trained" / CONFIG).read_text())
    config = {**{k: v for k, v in config.items() if k not in ("lora_alpha", "alpha_pattern")}, "alpha_pattern": {}}
    (tmp_path / "trained" / CONFIG).write_text(json.dumps(config if value == "" else {**config, "lora_alpha": value}))
    with pytest.raises(pkt.PktError, match=rf"no scale \(lora_alpha is {shown}\)"):
        pkt.finalize(tmp_path / "trained", tmp_path / "out")
    (tmp_path / "trained" / CONFIG).write_text(json.dumps({**config, "peft_type": None}))
    with pytest.raises(pkt.PktError, match="has no peft_type in its"):
        pkt.finalize(tmp_path / "trained", tmp_path / "out")
