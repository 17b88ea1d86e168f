"""The one error that pkt raises for anything a user can mend, and the one warning."""

from __future__ import annotations


class PktError(Exception):
    """Something the caller can mend. The message says what was wrong, where, and what to do about it."""


class PktWarning(UserWarning):
    """Something the caller should know, though the result stands."""
