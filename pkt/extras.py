"""Packages that only some of pkt needs: one clear error where they are missing."""

from __future__ import annotations

import importlib
import importlib.util

from pkt.errors import PktError


def is_there(*packages: str) -> bool:
    """Whether all of these are installed; none is imported."""
    return all(importlib.util.find_spec(package) is not None for package in packages)


def needs(package: str, extra: str, purpose: str) -> None:
    """Raises `PktError` unless a package of one of pkt's extras can be imported."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise PktError(
            f"{package} is needed to {purpose}, and cannot be imported ({error}); pip install 'pkt-transfer[{extra}]'"
        ) from error
