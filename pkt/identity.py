"""What two results differ in.

An identity is a mapping of plain values: all that a result depends on, by the names that a refusal uses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between a recorded identity and the one at hand, by name, with both values where they say something."""
    then, now = json.loads(json.dumps([then, now]))
    return [
        _told(name, then.get(name), now.get(name)) for name in sorted({*then, *now}) if then.get(name) != now.get(name)
    ]


def spoken_name(name: str) -> str:
    """The name of an entry of an identity, as a user gave it."""
    return name.removeprefix("option ").removeprefix("factorization ")


def _told(name: str, then: Any, now: Any) -> str:
    plain = (bool, int, float, str, type(None))
    # Hashes and what is made of several things say nothing.
    if all(isinstance(value, plain) and len(str(value)) < 40 for value in (then, now)):
        return f"{spoken_name(name)}: {then} there, {now} here"
    return f"{spoken_name(name)} changed"
