"""Commands that tests start: each ends in order and in time, and so does all that it started itself."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def run(command: Sequence[str | Path], *, seconds: float = 900, **options: Any) -> subprocess.CompletedProcess[str]:
    """The outcome of a command with its output as text. Options: of `subprocess.Popen`.

    A process that the command leaves behind holds the pipes open, so it too must be gone within `seconds`; otherwise all are
    killed and `subprocess.TimeoutExpired` is raised with what they said.
    """
    # A session of its own: the group can be killed whole, where killing the command alone would orphan its workers.
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen([str(word) for word in command], **pipes, **options) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
