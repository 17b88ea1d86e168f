"""Students whose hidden units are rotated, as SliceGPT and QuaRot leave them: told by the tables, and refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from descent import trained
from test_families import seeds

import pkt
from pkt.matching import Lineage, lineage
from pkt.matching.rotated import procrustes
from pkt.matching.units import rotation


def rotated(teacher: Any, width: int, layers: list[int], seed: int = 5) -> Any:
    """The teacher with its gains absorbed, its hidden units turned, and the first of them kept."""
    turn = rotation(64, torch.Generator().manual_seed(seed))[:, :width]
    config = copy.deepcopy(teacher.config)
    config.update({"hidden_size": width, "num_hidden_layers": len(layers)})
    student = type(teacher)(config).float()
    gains = {"q_proj": "input_layernorm", "k_proj": "input_layernorm", "v_proj": "input_layernorm"}
    gains |= {"gate_proj": "post_attention_layernorm", "up_proj": "post_attention_layernorm"}
    with torch.no_grad():
        student.model.embed_tokens.weight.copy_(teacher.model.embed_tokens.weight @ turn)
        student.lm_head.weight.copy_(teacher.lm_head.weight * teacher.model.norm.weight @ turn)
        for j, layer in enumerate(layers):
            theirs, mine = teacher.model.layers[layer], student.model.layers[j]
            for name, p in mine.named_parameters():
                if p.ndim == 2:
                    whole = theirs.get_parameter(name)
                    gain = gains.get(name.split(".")[-2])
                    p.copy_(turn.t() @ whole if gain is None else whole * theirs.get_submodule(gain).weight @ turn)
    return student.eval()


def test_the_students_of_this_test_are_rotations() -> None:
    teacher = zoo.trained_like("llama")
    ids = torch.arange(2, 42)[None]
    with torch.no_grad():
        turned, plain = (m(ids).logits for m in (rotated(teacher, 64, list(range(6))), teacher))
    assert (turned - plain).abs().max() <= 1e-3 * plain.abs().max()


@pytest.mark.parametrize("width", [64, 48])
def test_rotated_students_are_told(width: int, tmp_path: Path) -> None:
    teacher, layers = zoo.trained_like("llama"), [0, 2, 3, 5]
    found = lineage(teacher, trained(rotated(teacher, width, layers)), progress=False)
    assert (found.verdict, found.rotated, found.layers) == ("descends", True, layers)
    assert found.reason.startswith("descends, rotated: its layers are the teacher's")
    assert found.evidence[0].kind == "hidden units, rotated"
    assert found.hidden == [-1] * width
    found.save(tmp_path / "l.json")
    assert Lineage.load(tmp_path / "l.json") == found


def test_a_rotated_student_is_refused_in_one_line() -> None:
    base = zoo.trained_like("llama", vocab_size=67)
    student = rotated(base, 64, [0, 2, 3, 5])
    teacher = copy.deepcopy(base)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(1.01)
    with pytest.raises(pkt.PktError, match="its hidden units are rotated, which pkt cannot cut through") as caught:
        pkt.transplant(teacher, student, seeds(), base=base, progress=False)
    assert "\n" not in str(caught.value)


def test_only_the_tables_are_a_rotation() -> None:
    """An embedding and a head of the teacher's, rotated, above layers of its own: no lineage."""
    teacher = zoo.trained_like("llama")
    student = rotated(zoo.trained_like("llama", seed=7), 48, [0, 2, 3, 5])
    tables = rotated(teacher, 48, [0, 2, 3, 5])
    student.model.embed_tokens, student.lm_head = tables.model.embed_tokens, tables.lm_head
    found = lineage(teacher, student, progress=False)
    assert (found.verdict, found.rotated) == ("no lineage", False)


@pytest.mark.parametrize("width", [20, 12])
def test_the_rotation_itself(width: int) -> None:
    """Exact for a whole rotation, and for the principal directions that slicing keeps."""
    generator = torch.Generator().manual_seed(0)
    t = torch.randn(300, 20, generator=generator) * torch.linspace(1, 3, 20)
    turn = rotation(20, generator) if width == 20 else torch.linalg.eigh(t.t() @ t)[1][:, -width:]
    rows = torch.arange(300)
    found, cosine, chance = procrustes([(t, t @ turn)], [(rows, rows)], generator)
    assert cosine == pytest.approx(1, abs=1e-4)
    assert chance < 0.5
    assert torch.allclose(found, turn, atol=1e-3)
