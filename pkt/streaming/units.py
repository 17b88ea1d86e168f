"""Sizes as they are written and read."""

from __future__ import annotations

import re

from pkt.errors import PktError


def spoken_size(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit in ("B", "kB") else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def parse_size(text: str | int | None) -> int | None:
    """Bytes from "400MB", "1.5GB", "16GiB" or a number."""
    if text is None or isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*([0-9.]+)\s*([kKMGT]?)(i?)[bB]?\s*", text)
    try:
        assert match is not None
        number = float(match[1])
    except (AssertionError, ValueError):
        raise PktError(f"{text!r} is not a size; write 400MB, 1.5GB or 16GiB") from None
    return int(number * (1024 if match[3] else 1000) ** " kMGT".index(match[2].replace("K", "k") or " "))
