"""The one error that pkt raises for anything a user can mend, and the one warning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence


class PktError(Exception):
    """Something the caller can mend. The message says what was wrong, where, and what to do about it."""


class DivergedError(PktError):
    """Training left the numbers: a result of its learning rate rather than a fault."""


class SampleError(PktError):
    """A fault of one sample, or of one among several that cannot be told apart.

    text: the message, with `{samples}` where it names them; samples: their numbers in the order in which they were given.
    Whoever knows where the samples come from says the same with their places: `raise error.placed(where) from error`.
    """

    def __init__(self, text: str, samples: Iterable[int]) -> None:
        self.text, self.samples = text, tuple(samples)
        super().__init__(self._naming("sample {}".format))

    def shifted(self, first: int) -> SampleError:
        """Of samples numbered from `first` on."""
        return SampleError(self.text, [first + sample for sample in self.samples])

    def placed(self, where: Callable[[int], str]) -> PktError:
        """With where(sample), a file and line say, in place of each number."""
        return PktError(self._naming(where))

    def _naming(self, where: Callable[[int], str]) -> str:
        named = ", ".join(map(where, self.samples))
        return self.text.replace("{samples}", named if len(self.samples) == 1 else f"one of {named}")


class PktWarning(UserWarning):
    """Something the caller should know, though the result stands."""


def short_list(faults: Sequence[str], most: int = 3) -> str:
    """The first faults in one line, and how many more there are: what is wrong a hundred times is seen in a few."""
    rest = [f"and {len(faults) - most} more"] if len(faults) > most else []
    return "; ".join([*faults[:most], *rest])
