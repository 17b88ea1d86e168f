"""Which files are a checkpoint's, and that they are read as safetensors itself reads them."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import pkt
from pkt.files import read_json, safetensors_header
from pkt.models import Model, load_model

F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def write(path: Path, header: Any, data: bytes = b"\0" * 4) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


UNSOUND = {
    "overlapping": ({"a": F32, "b": F32}, b"\0" * 4),
    "a gap": ({"a": {**F32, "data_offsets": [4, 8]}}, b"\0" * 8),
    "a name twice": (b'{"a":%s,"a":%s}' % ((json.dumps(F32).encode(),) * 2), b"\0" * 4),
    "negative offsets": ({"a": {**F32, "data_offsets": [-4, 0]}}, b"\0" * 4),
    "backward offsets": ({"a": {**F32, "data_offsets": [4, 0]}}, b"\0" * 4),
    "F32 over BF16 bytes": ({"a": {**F32, "shape": [2], "data_offsets": [0, 4]}}, b"\0" * 4),
    "an unknown type": ({"a": {**F32, "dtype": "F31"}}, b"\0" * 4),
    "a number for a type": ({"a": {**F32, "dtype": 32}}, b"\0" * 4),
    "no type": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
    "a negative side": ({"a": {**F32, "shape": [-1]}}, b"\0" * 4),
    "a side of 2^63": ({"a": {**F32, "shape": [2**63, 2]}}, b"\0" * 4),
    "a broken side": ({"a": {**F32, "shape": [1.0]}}, b"\0" * 4),
    "a true side": ({"a": {**F32, "shape": [True]}}, b"\0" * 4),
    "a side that is no number": ({"a": {**F32, "shape": ["1"]}}, b"\0" * 4),
    "a word for an entry": ({"a": "F32"}, b""),
    "a list": ([F32], b""),
    "deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""),
    "deep metadata": (b'{"__metadata__":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b""),
    "no JSON": (b"{", b""),
    "no UTF-8": (b'{"\xff": 1}', b""),
    "too much data": ({"a": F32}, b"\0" * 8),
    "too little data": ({"a": F32}, b"\0" * 2),
    "a number of 5000 digits": (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":%s}}' % (b"1" * 5000), b"\0" * 4),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSOUND)
def test_an_unsound_file_is_one_line_that_names_it(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", *UNSOUND[name])
    with pytest.raises(pkt.PktError, match=r"model\.safetensors") as caught:
        safetensors_header(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(set(UNSOUND) - {"a name twice", "a number of 5000 digits"}))
def test_those_are_files_that_safetensors_refuses(name: str, tmp_path: Path) -> None:
    """All but two, which it reads by leaving something out."""
    with pytest.raises(SafetensorError), safe_open(write(tmp_path / "x.safetensors", *UNSOUND[name]), "pt"):
        pass


def test_a_header_says_what_the_file_holds(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor([1, 2]), "none": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "x.safetensors", {"pkt": "yes"})
    header = safetensors_header(tmp_path / "x.safetensors")
    assert header.metadata == {"pkt": "yes"}
    assert {n: t.shape for n, t in header.tensors.items()} == {"b": (2, 3), "a": (2,), "none": (0, 4)}
    place = header.tensors["b"]
    found = (tmp_path / "x.safetensors").read_bytes()[place.begin : place.end]
    assert torch.frombuffer(bytearray(found), dtype=torch.float32).tolist() == list(range(6))


def test_messages_name_the_cause_of_a_wrong_length(tmp_path: Path) -> None:
    with pytest.raises(pkt.PktError, match="goes on for 4 bytes after its last tensor"):
        safetensors_header(write(tmp_path / "x.safetensors", {"a": F32}, b"\0" * 8))
    with pytest.raises(pkt.PktError, match=r"is truncated: \d+ bytes of \d+"):
        safetensors_header(write(tmp_path / "x.safetensors", {"a": F32}, b"\0" * 2))


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000])
def test_json_that_python_cannot_hold_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(pkt.PktError, match=r"x\.json.*not JSON that can be read"):
        read_json(tmp_path / "x.json")


# -- which files


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    zoo.llama().save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    zoo.llama().save_pretrained(tmp_path / "single")
    return tmp_path / "single"


def same_as_loaded(folder: Path) -> None:
    """What is read one tensor at a time is what transformers loads."""
    loaded, read = load_model(folder), Model.of(folder)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(read.tensor(name), parameter), name


def test_a_stray_copy_is_not_the_checkpoint(single: Path, sharded: Path) -> None:
    for folder in (single, sharded):
        for file in sorted(folder.glob("*.safetensors")):
            save_file({k: 3 * v for k, v in load_file(file).items()}, folder / f"z_old_{file.name}", {"format": "pt"})
        same_as_loaded(folder)


def test_shards_that_the_index_does_not_list_are_not_the_checkpoint(sharded: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = zoo.llama()
    for parameter in other.parameters():
        parameter.data.normal_()
    other.save_pretrained(tmp_path / "earlier", max_shard_size="30KB")
    for file in (tmp_path / "earlier").glob("*.safetensors"):
        shutil.copy(file, sharded)
    same_as_loaded(sharded)


def test_one_file_goes_before_an_index(single: Path, sharded: Path) -> None:
    """As in transformers: the index of an earlier upload is not looked at."""
    for file in sharded.glob("model*"):
        if file.name != "model.safetensors":
            shutil.copy(file, single)
    (single / "model.safetensors.index.json").write_text("not even JSON")
    same_as_loaded(single)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second, {"format": "pt"})
    with pytest.raises(pkt.PktError, match="both hold"):
        Model.of(sharded).check()


def test_a_tensor_that_is_not_where_the_index_says_is_refused(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    value = read_json(index)
    name, shard = next(iter(value["weight_map"].items()))
    other = next(s for s in value["weight_map"].values() if s != shard)
    value["weight_map"][name] = other
    index.write_text(json.dumps(value))
    with pytest.raises(pkt.PktError, match=f"{other} lacks {name}"):
        Model.of(sharded).check()


@pytest.mark.parametrize(
    "shard", ["../secret/x.safetensors", "/etc/passwd", "a/../../x.safetensors", 7, None, ["x"], "", "a\0b"]
)
def test_an_index_leads_nowhere_else(shard: Any, sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    save_file({"lm_head.weight": torch.ones(2)}, tmp_path / "secret" / "x.safetensors")
    index = sharded / "model.safetensors.index.json"
    value = read_json(index)
    value["weight_map"]["lm_head.weight"] = shard
    index.write_text(json.dumps(value))
    with pytest.raises(
        pkt.PktError, match=r"index\.json names .*(not in its folder|where a file's name belongs)"
    ) as caught:
        Model.of(sharded).check()
    assert "bytes" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_link_out_of_the_folder_is_not_followed(name: str, single: Path, tmp_path: Path) -> None:
    shutil.move(single / name, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", single / name)
    with pytest.raises(pkt.PktError, match="is a link out of its folder"):
        Model.of(single).check()


def test_links_within_the_folder_and_to_it_are_followed(single: Path, tmp_path: Path) -> None:
    (single / "blob").mkdir()
    shutil.move(single / "model.safetensors", single / "blob" / "w")
    os.symlink("blob/w", single / "model.safetensors")
    os.symlink(single, tmp_path / "named")
    Model.of(tmp_path / "named").check()


@pytest.mark.parametrize("named", ["../x.safetensors", "/etc/passwd", 3])
def test_a_configuration_leads_nowhere_else(named: Any, single: Path) -> None:
    """transformers reads the weights from the file that `transformers_weights` names."""
    file = single / "config.json"
    file.write_text(json.dumps(read_json(file) | {"transformers_weights": named}))
    with pytest.raises(pkt.PktError, match=r"config\.json names"):
        Model.of(single).check()


def test_the_file_that_a_configuration_names_is_the_checkpoint(single: Path) -> None:
    save_file(
        {k: 3 * v for k, v in load_file(single / "model.safetensors").items()},
        single / "ema.safetensors",
        {"format": "pt"},
    )
    file = single / "config.json"
    file.write_text(json.dumps(read_json(file) | {"transformers_weights": "ema.safetensors"}))
    same_as_loaded(single)


# -- what transformers would load raw


@pytest.mark.parametrize("scale", [True, False])
def test_eight_bit_weights_without_their_quantization_are_refused(scale: bool, single: Path) -> None:
    weights = load_file(single / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    if scale:
        weights[f"{name}_scale_inv"] = torch.ones(1, 1)
    else:
        weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, single / "model.safetensors", {"format": "pt"})
    for use in (Model.check, Model.load):
        with pytest.raises(pkt.PktError, match=r"of a quantized model, but config\.json has no quantization_config"):
            use(Model.of(single))


def test_integers_where_the_model_has_numbers_are_refused(single: Path) -> None:
    weights = load_file(single / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].long()
    save_file(weights, single / "model.safetensors", {"format": "pt"})
    with pytest.raises(pkt.PktError, match=r"holds model\.norm\.weight as torch\.int64"):
        Model.of(single).tensor("model.norm.weight")


def test_an_adapter_beside_a_model_means_one_thing(
    teacher_dir: Path, student_dir: Path, seed_file: Path, extraction_dir: Path, tmp_path: Path
) -> None:
    both = Path(shutil.copytree(student_dir, tmp_path / "both"))
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(extraction_dir / file, both)
    attempts: list[Any] = [
        lambda: pkt.transfer(teacher_dir, both, seed_file, progress=False),
        lambda: pkt.transfer(both, student_dir, seed_file, progress=False),
        lambda: pkt.inject(both, extraction_dir),
        lambda: load_model(both),
        lambda: Model.of(both).spec,
        lambda: Model.of(both).tensor("lm_head.weight"),
    ]
    for attempt in attempts:
        with pytest.raises(pkt.PktError, match="holds a model and an adapter"):
            attempt()
