"""Commands as tests give them, in this process, and what is left of one that fails."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pkt

PKT = [sys.executable, "-m", "pkt"]


def run(*args: Any, code: int = 0, **options: Any) -> str:
    """Run pkt in this process and return what it prints; checks the exit code."""
    from typer.testing import CliRunner

    from pkt import cli

    result = CliRunner().invoke(cli.app, [str(a) for a in args], **options)
    if isinstance(result.exception, pkt.PktError):
        assert code == 1, result.exception
        return str(result.exception)
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def fails(*args: Any) -> str:
    """The one error of a command that must fail."""
    return run(*args, code=1)


def empty_beside(path: Path) -> bool:
    """Nothing half-written is left where `path` would have been."""
    return not path.exists() and not any(p.name.startswith((f".{path.name}", ".pkt-")) for p in path.parent.iterdir())
