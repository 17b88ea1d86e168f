"""Two tokenizers compared."""

from __future__ import annotations

import json
from typing import Any

from pkt.files import sha256


def shared_vocabulary(teacher: Any, student: Any) -> list[tuple[int, int]]:
    """(teacher's id, student's id) of every token both tokenizers have, by the student's id.

    Tokens are compared as strings; the marks "▁" and "Ġ" both mean a space.
    """
    spelled = {token.replace("▁", "Ġ"): index for token, index in teacher.get_vocab().items()}
    pairs = [(spelled.get(token.replace("▁", "Ġ"), -1), index) for token, index in student.get_vocab().items()]
    return sorted(((t, s) for t, s in pairs if t >= 0), key=lambda pair: pair[1])


def other_ids(teacher: Any, student: Any) -> int:
    """How many of the student tokenizer's tokens the teacher's gives another id, or does not have."""
    known = teacher.get_vocab()
    return sum(known.get(token) != index for token, index in student.get_vocab().items())


def vocabulary_digest(tokenizer: Any) -> str:
    """What tells a tokenizer's ids from another's: a hash of every token with its id."""
    return sha256(json.dumps(sorted(tokenizer.get_vocab().items())))
