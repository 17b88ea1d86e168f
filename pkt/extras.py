"""Packages that only some of pkt needs: one clear error where they are missing."""

from __future__ import annotations

import importlib

from pkt.errors import PktError


def needs(package: str, extra: str, purpose: str) -> None:
    """Raises `PktError` unless a package of one of pkt's extras can be imported."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise PktError(
            f"{package} is needed to {purpose}, and cannot be imported ({error}); pip install 'pkt-transfer[{extra}]'"
        ) from error
