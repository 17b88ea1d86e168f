"""What is summed over the samples: S of the paper, and what neighbouring methods take in its place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """Σ_j |θ · g_j|^power of each parameter, or Σ_j |g_j|^power where it is not `weighted` by θ."""

    name: str
    power: int
    weighted: bool


THETA_GRAD = Measure("theta_grad", 1, True)
