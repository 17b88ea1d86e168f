"""No false alarms in any family: students that share all but their weights with a teacher."""

from __future__ import annotations

from typing import Any

import pytest
import zoo
from descent import trained

from pkt.matching import lineage

FAMILIES = ("qwen3", "gemma2", "gemma3", "phi3", "gpt2", "mixtral")
SMALL = {"hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def small(kind: str, seed: int) -> Any:
    return zoo.trained_like(kind, seed=seed, **(SMALL if kind != "gpt2" else SMALL | {"num_attention_heads": 5}))


@pytest.mark.parametrize("shared", ["tokenizer", "embedding", "seed", "rows"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_strangers_of_every_family_are_told(kind: str, shared: str) -> None:
    teacher, student = zoo.trained_like(kind), small(kind, 0 if shared == "seed" else 11)
    if shared == "embedding":
        student.get_input_embeddings().weight.data = teacher.get_input_embeddings().weight.data[:, 8:48].clone()
    if shared == "rows":
        teacher, student = trained(teacher, steps=30), trained(student, steps=30)
    found = lineage(teacher, student, progress=False)
    assert (found.verdict, found.rotated) == ("no lineage", False), str(found)
