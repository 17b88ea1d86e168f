"""`Model`: a teacher or student however it was named, resolved once; its content is what it is known by."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file

import pkt
from pkt.models import Model, load_model, spec_of
from pkt.models import content as content_module
from pkt.models.content import files_digest, tensors_digest
from pkt.streaming import open_teacher

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pkt" / "hashes.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    zoo.llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def hub(teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the Hub that holds the teacher as owner/teacher, its files links to blobs."""
    home = tmp_path / "hub" / "models--owner--teacher"
    snapshot = home / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("a" * 40)
    for number, file in enumerate(sorted(teacher_dir.iterdir())):
        shutil.copy(file, home / "blobs" / f"{number:064x}")
        os.symlink(f"../../blobs/{number:064x}", snapshot / file.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


def test_every_way_of_naming_gives_one_spec(folder: Path) -> None:
    model = load_model(folder)
    specs = [Model.of(given).spec for given in (folder, str(folder), model, model.config, Model.of(folder))]
    assert all(spec.targets == specs[0].targets and spec.tied == specs[0].tied for spec in specs)
    assert Model.of(spec_of(folder)).spec is not None


@pytest.mark.parametrize("given", [7, None, ["a"], {"a": 1}, torch.zeros(1)])
def test_what_names_no_model_is_refused(given: Any) -> None:
    with pytest.raises(pkt.PktError, match=r"a teacher \(.*\) is needed, not"):
        pkt.transfer(given, given, "seeds.jsonl")


# -- names on the Hub


def test_a_name_on_the_hub_is_streamed_from_its_snapshot(
    hub: Path, teacher_dir: Path, student_dir: Path, seed_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model.of("owner/teacher")
    assert model.on_hub
    assert model.spec.name == "owner/teacher"
    monkeypatch.setattr(Model, "load", lambda *args, **options: pytest.fail("loaded whole"))
    teacher = open_teacher("owner/teacher", CPU)
    assert teacher.source is not None
    ext = pkt.transfer("owner/teacher", student_dir, seed_file, rank=4, out=tmp_path / "out", progress=False)
    local = pkt.transfer(teacher_dir, student_dir, seed_file, rank=4, progress=False)
    assert all(torch.equal(ext.pairs[m].B, p.B) for m, p in local.pairs.items())
    recorded, other = ext.provenance["teacher"], local.provenance["teacher"]
    assert (recorded["fingerprint"], recorded["configuration"]) == (other["fingerprint"], other["configuration"])
    assert recorded["revision"] == "a" * 40


def test_a_loaded_model_of_the_hub_keeps_its_name(hub: Path) -> None:
    model = load_model("owner/teacher")
    assert model.config.name_or_path == model.name_or_path == "owner/teacher"


def test_two_revisions_do_not_continue_each_other(
    hub: Path, student_dir: Path, seed_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    pkt.transfer("owner/teacher", student_dir, seed_file, rank=4, out=out, progress=False)
    newer = hub.with_name("b" * 40)
    shutil.copytree(hub, newer, symlinks=True)
    weights = {k: 3 * v for k, v in load_file(hub / "model.safetensors").items()}
    (newer / "model.safetensors").unlink()
    save_file(weights, hub.parents[1] / "blobs" / ("f" * 64), {"format": "pt"})
    os.symlink("../../blobs/" + "f" * 64, newer / "model.safetensors")
    (hub.parents[1] / "refs" / "main").write_text("b" * 40)
    with pytest.raises(pkt.PktError, match=r"another transfer \(teacher's weights changed\)"):
        pkt.transfer("owner/teacher", student_dir, seed_file, rank=4, out=out, progress=False)


def test_a_model_that_the_hub_does_not_give_is_one_line() -> None:
    with pytest.raises(pkt.PktError, match="the Hub does not give it either"):
        Model.of("owner/nothing").spec  # noqa: B018


def test_a_snapshot_without_weights_says_so(hub: Path) -> None:
    (hub / "model.safetensors").unlink()
    assert Model.of("owner/teacher").spec.num_layers == 4
    with pytest.raises(pkt.PktError, match=r"has no model\.safetensors"):
        Model.of("owner/teacher").check()


# -- what can only be loaded whole says so


def test_a_pickle_is_loaded_whole_and_says_so(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    torch.save({"not": "weights"}, folder / "training_args.bin")
    with pytest.warns(pkt.PktWarning, match="is loaded whole, not layer by layer: its weights are a pickle"):
        assert open_teacher(folder, CPU).source is None
    with pytest.warns(pkt.PktWarning, match="is loaded whole, not a layer at a time"):
        Model.of(folder).tensor("model.norm.weight")


def test_names_that_only_transformers_maps_are_loaded_whole_and_say_so(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({f"other.{k}": v for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    with (
        pytest.warns(pkt.PktWarning, match="its files do not name"),
        pytest.raises(pkt.PktError, match="does not fill"),
    ):
        open_teacher(folder, CPU)


def test_tensors_that_do_not_fit_are_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"][:, :-8].contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        pkt.PktError, match=r"does not fill lm_head\.weight \(\[67, 40\] in the files, \[67, 48\] in the model"
    ):
        load_model(folder)


# -- tied, or not


def tied(folder: Path, head: torch.Tensor | None) -> Path:
    zoo.llama(True).save_pretrained(folder)
    if head is not None:
        weights = load_file(folder / "model.safetensors")
        save_file({**weights, "lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_tied_is_what_the_loaded_model_is(tmp_path: Path) -> None:
    """The file may hold another head than the embedding, the same one, or none; transformers ties the last two."""
    embedding = zoo.llama(True).get_input_embeddings().weight.detach()
    other = embedding.clone()
    other[-1, -1] += 1
    for name, head in {"none": None, "same": embedding.clone(), "other": other}.items():
        folder = tied(tmp_path / name, head)
        loaded = load_model(folder)
        is_tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert is_tied == (name != "other")
        for spec in (Model.of(folder).spec, Model.of(loaded).spec):
            assert (spec.tied, "lm_head" in spec.by_module()) == (is_tied, not is_tied), name
        hollow = open_teacher(folder, CPU)
        assert (hollow.model.lm_head.weight is hollow.model.model.embed_tokens.weight) == is_tied
        for key, parameter in loaded.named_parameters(remove_duplicate=False):
            assert torch.equal(Model.of(folder).tensor(key), parameter)


def test_scores_of_an_untied_head_under_a_tied_configuration(
    tokenizer: Any, student_dir: Path, seed_file: Path, tmp_path: Path
) -> None:
    model = zoo.llama(True, hidden=48, layers=3, heads=6, kv=3, ffn=96, vocab=len(tokenizer))
    model.save_pretrained(tmp_path / "t")
    tokenizer.save_pretrained(tmp_path / "t")
    weights = load_file(tmp_path / "t" / "model.safetensors")
    weights["lm_head.weight"] = 0.3 * torch.randn(len(tokenizer), 48, generator=torch.Generator().manual_seed(9))
    save_file(weights, tmp_path / "t" / "model.safetensors", {"format": "pt"})
    pkt.transfer(tmp_path / "t", student_dir, seed_file, rank=4, out=tmp_path / "e", keep_scores="full", progress=False)
    kept = pkt.Sensitivity.load(tmp_path / "e" / "scores.safetensors")
    truth = oracle.sensitivity(load_model(tmp_path / "t"), list(pkt.load_seeds(seed_file, tokenizer).batches(1)))
    assert set(kept) == set(truth)
    assert max(oracle.relative_error(kept[n], s) for n, s in truth.items()) < 1e-5


# -- content


def touch_back(path: Path, change: Any) -> None:
    """Change a file and put its times back."""
    before = path.stat()
    change(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def one_weight_more(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def test_a_byte_of_the_weights_changes_the_content_whatever_its_times(folder: Path) -> None:
    before = Model.of(folder).content()
    assert Model.of(folder).content() == before
    touch_back(folder / "model.safetensors", one_weight_more)
    after = Model.of(folder).content()
    assert after["fingerprint"] != before["fingerprint"]
    assert after["configuration"] == before["configuration"]


def test_what_lies_beside_the_checkpoint_is_no_content(folder: Path) -> None:
    before = Model.of(folder).content()
    shutil.copy(folder / "model.safetensors", folder / "old.safetensors")
    (folder / "README.md").write_text("changed")
    assert Model.of(folder).content() == before


def test_hashes_are_remembered_once_a_file_has_settled(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / "model.safetensors"
    first = files_digest([file])
    assert not cache.is_file()  # it was written a moment ago, and could be written again within the clock's resolution
    monkeypatch.setattr(content_module, "_SETTLED_NS", -1)
    assert files_digest([file]) == first
    assert cache.is_file()
    monkeypatch.setattr(content_module, "_hash_piece", lambda piece: pytest.fail("hashed again"))
    assert files_digest([file]) == first
    touch_back(file, one_weight_more)
    with pytest.raises(pytest.fail.Exception, match="hashed again"):
        files_digest([file])


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '{"x": 1}', "\xff"])
def test_a_broken_memory_of_hashes_is_no_error(text: str, folder: Path, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(text, encoding="latin-1")
    assert files_digest([folder / "model.safetensors"])


def test_a_home_that_cannot_be_written_is_no_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(content_module, "_SETTLED_NS", -1)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert files_digest([folder / "model.safetensors"])


def test_pieces_of_a_large_file_are_hashed_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content_module, "_PIECE", 1000)
    monkeypatch.setattr(content_module, "_BLOCK", 300)
    parts = [bytes([i]) * 1000 for i in range(5)]
    found = set()
    for order in ([0, 1, 2, 3, 4], [1, 0, 2, 3, 4], [0, 1, 2, 3]):
        (tmp_path / "f").write_bytes(b"".join(parts[i] for i in order))
        found.add(files_digest([tmp_path / "f"]))
    (tmp_path / "f").write_bytes(b"")
    assert len(found | {files_digest([tmp_path / "f"])}) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.int8])
def test_every_element_counts_in_a_tensors_hash(dtype: torch.dtype) -> None:
    tensor = torch.ones(3, 7).to(dtype)
    found = {tensors_digest([("w", tensor)])}
    for place in range(tensor.numel()):
        changed = tensor.clone()
        changed.view(-1)[place] = 0
        found.add(tensors_digest([("w", changed)]))
    found |= {tensors_digest([("v", tensor)]), tensors_digest([("w", tensor.view(7, 3))]), tensors_digest([])}
    assert len(found) == 1 + tensor.numel() + 3
    apart = torch.ones(7, 3).to(dtype).t()
    assert tensors_digest([("w", apart)]) == tensors_digest([("w", tensor)])
    shifted = torch.ones(22).to(dtype)[1:].view(3, 7)
    assert tensors_digest([("w", shifted)]) == tensors_digest([("w", tensor)])


def test_blocks_of_a_large_tensor_count_to_its_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content_module, "_BLOCKS", 4)
    monkeypatch.setattr(content_module, "_IN_BLOCK", 8)
    tensor = torch.zeros(103, dtype=torch.bfloat16)
    found = {tensors_digest([("w", tensor)])}
    for place in (0, 3, 102, 99):
        changed = tensor.clone()
        changed[place] = 1
        found.add(tensors_digest([("w", changed)]))
    assert len(found) == 5
    changed = tensor.clone()
    changed[10] = 1
    assert tensors_digest([("w", changed)]) in found


def test_a_sign_counts_in_a_tensors_hash() -> None:
    tensor = torch.randn(64, 64)
    flipped = tensor.clone()
    flipped[5, 6] *= -1
    assert tensors_digest([("w", tensor)]) != tensors_digest([("w", flipped)])
    assert tensors_digest([]) != tensors_digest([("w", torch.zeros(0))])


def test_a_model_in_memory_is_known_by_its_weights() -> None:
    model = zoo.llama()
    before = Model.of(model).content()
    assert before["fingerprint"].startswith("memory:")
    assert Model.of(model).content() == before
    model.lm_head.weight.data[3, 4] += 1e-3
    assert Model.of(model).content()["fingerprint"] != before["fingerprint"]


# -- results are of their inputs


def change(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


CHANGES: dict[str, tuple[Any, str]] = {
    "weights": (lambda t: touch_back(t / "model.safetensors", one_weight_more), "teacher's weights changed"),
    "rms_norm_eps": (lambda t: change(t / "config.json", rms_norm_eps=0.01), r"teacher's config\.json changed"),
    "rope": (
        lambda t: change(t / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 9.0}),
        "config",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_finished_result_is_not_returned_for_a_changed_teacher(
    what: str, teacher_dir: Path, student_dir: Path, seed_file: Path, tmp_path: Path
) -> None:
    teacher = Path(shutil.copytree(teacher_dir, tmp_path / "teacher"))
    made = pkt.transfer(teacher, student_dir, seed_file, rank=4, out=tmp_path / "out", progress=False)
    again = pkt.transfer(teacher, student_dir, seed_file, rank=4, out=tmp_path / "out", progress=False)
    assert again.provenance["teacher"] == made.provenance["teacher"]
    changed, message = CHANGES[what]
    changed(teacher)
    with pytest.raises(pkt.PktError, match=f"another transfer.*{message}"):
        pkt.transfer(teacher, student_dir, seed_file, rank=4, out=tmp_path / "out", progress=False)


def test_a_finished_result_is_not_returned_for_another_dtype(
    teacher_dir: Path, student_dir: Path, seed_file: Path, tmp_path: Path
) -> None:
    pkt.transfer(teacher_dir, student_dir, seed_file, rank=4, out=tmp_path / "out", progress=False)
    with pytest.raises(pkt.PktError, match=r"another transfer.*dtype: None there, torch\.float16 here"):
        pkt.transfer(
            teacher_dir, student_dir, seed_file, rank=4, out=tmp_path / "out", progress=False, dtype=torch.float16
        )


def test_a_finished_result_of_an_older_pkt_is_returned(
    teacher_dir: Path, student_dir: Path, seed_file: Path, tmp_path: Path
) -> None:
    """Its manifest has a hash of another kind, and no dtype."""
    pkt.transfer(teacher_dir, student_dir, seed_file, rank=4, out=tmp_path / "out", progress=False)
    file = tmp_path / "out" / "pkt.json"
    value = json.loads(file.read_text())
    for key in ("fingerprint", "configuration"):
        del value["plan"]["teacher"][key]
    value["teacher"] = {**value["plan"]["teacher"], "fingerprint": "0" * 64}
    del value["dtype"]
    file.write_text(json.dumps(value))
    pkt.transfer(teacher_dir, student_dir, seed_file, rank=4, out=tmp_path / "out", progress=False)
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("\n".join(seed_file.read_text().split("\n")[:3]) + "\n")
    with pytest.raises(pkt.PktError, match=r"another transfer.*seeds changed"):
        pkt.transfer(teacher_dir, student_dir, fewer, rank=4, out=tmp_path / "out", progress=False)


@pytest.mark.parametrize("what", CHANGES)
def test_an_unfinished_run_is_not_continued_with_a_changed_teacher(
    what: str, teacher_dir: Path, student_dir: Path, seed_file: Path, tmp_path: Path
) -> None:
    teacher = Path(shutil.copytree(teacher_dir, tmp_path / "teacher"))

    class StopError(Exception):
        pass

    def stop(tick: Any) -> None:
        if (tmp_path / ".out.run" / "step-0001.safetensors").is_file():
            raise StopError

    with pytest.raises(StopError):
        pkt.transfer(teacher, student_dir, seed_file, rank=4, out=tmp_path / "out", progress=False, on_tick=stop)
    changed, message = CHANGES[what]
    changed(teacher)
    with pytest.raises(pkt.PktError, match=f"unfinished run of other inputs.*{message}"):
        pkt.transfer(teacher, student_dir, seed_file, rank=4, out=tmp_path / "out", progress=False)


@pytest.mark.parametrize("what", CHANGES)
def test_scores_and_plans_are_of_the_weights_they_were_made_from(
    what: str, teacher_dir: Path, student_dir: Path, seed_file: Path, tmp_path: Path
) -> None:
    teacher = Path(shutil.copytree(teacher_dir, tmp_path / "teacher"))
    pkt.transfer(teacher, student_dir, seed_file, rank=4, out=tmp_path / "e", keep_scores="full", progress=False)
    scores = pkt.Sensitivity.load(tmp_path / "e" / "scores.safetensors")
    plan = pkt.plan(scores, teacher, student_dir)
    saved = pkt.TransferPlan.from_json(json.loads(plan.to_json()))
    pkt.extract(teacher, saved, rank=4, progress=False)
    CHANGES[what][0](teacher)
    word = "weights" if what == "weights" else "configuration"
    with pytest.raises(pkt.PktError, match=f"the scores was made from another model .*{word} changed"):
        pkt.plan(scores, teacher, student_dir)
    with pytest.raises(pkt.PktError, match=f"the plan was made from another model .*{word} changed"):
        pkt.extract(teacher, saved, rank=4, progress=False)
    # What an older pkt wrote does not say which weights.
    old = {k: v for k, v in plan.teacher.items() if k not in ("fingerprint", "configuration")}
    scores.provenance["teacher"] = {**old, "fingerprint": "0" * 64}
    again = pkt.plan(scores, teacher, student_dir)
    assert "fingerprint" not in again.teacher
    pkt.extract(teacher, again, rank=4, progress=False)


# -- code of others


def test_code_of_a_checkpoint_is_neither_asked_about_nor_run(folder: Path, tmp_path: Path) -> None:
    change(
        folder / "config.json",
        model_type="mine",
        auto_map={"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"},
    )
    for file in ("configuration_x.py", "modeling_x.py"):
        (folder / file).write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    code = "import sys, pkt.models as m\ntry: m.load_model(sys.argv[1])\nexcept m.reference.PktError as e: print('REFUSED', e)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], input="y\n" * 5, capture_output=True, text=True, timeout=120
    )
    assert "REFUSED" in done.stdout, done.stderr
    assert "code of its own (auto_map" in done.stdout
    assert "[y/N]" not in done.stdout + done.stderr
    assert not (tmp_path / "ran").exists()
