"""The scores of a model as a value and as a file."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pkt import ops
from pkt.errors import PktError
from pkt.files import atomic_file, safetensors_header, write_tensors
from pkt.models import layer_of
from pkt.tables import Tabular, by_last_name

FORMAT = "pkt-sensitivity-1"
KEPT = "scores.safetensors"  # beside an extraction


class Sensitivity(Tabular, Mapping[str, Tensor]):
    """Parameter name -> S, fp32, in the parameter's shape (or its tile sums).

    shapes: the parameters' own shapes; tile: side of the summed tiles, or None; layers: name of the decoder layers' list;
    losses [samples]: the mean loss of each seed, in the loader's order; measure: what was summed (`pkt.sensitivity`).
    """

    def __init__(
        self,
        scores: dict[str, Tensor],
        shapes: dict[str, tuple[int, ...]],
        *,
        tile: int | None = None,
        layers: str | None = None,
        losses: list[float] | None = None,
        provenance: dict[str, Any] | None = None,
        measure: str = "theta_grad",
    ) -> None:
        self.scores, self.shapes, self.tile, self.layers = scores, shapes, tile, layers
        self.losses, self.provenance, self.measure = losses or [], provenance or {}, measure

    def __getitem__(self, name: str) -> Tensor:
        return self.scores[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        what = f"{self.tile}x{self.tile} tile sums" if self.tile else "elements"
        return f"Sensitivity({len(self)} parameters, {what}, {len(self.losses)} samples)"

    def totals(self) -> dict[str, float]:
        """Σ of S over each parameter."""
        return {name: ops.double_sum(score).item() for name, score in self.scores.items()}

    def table(self) -> list[tuple[str, ...]]:
        kinds, totals = by_last_name(self), self.totals()
        sums = {kind: sum(totals[name] for name in names) for kind, names in kinds.items()}
        total = sum(sums.values()) or 1.0
        rows = [(kind, str(len(kinds[kind])), f"{100 * value / total:.1f}%") for kind, value in sums.items()]
        return [("parameters", "how many", "share of S"), *rows]

    def summary(self) -> list[str]:
        mean = f", mean loss {sum(self.losses) / len(self.losses):.4f}" if self.losses else ""
        return [f"{len(self)} parameters, {len(self.losses)} samples{mean}"]

    def layer_scores(self) -> Tensor:
        """Σ of S over all parameters of each decoder layer, fp64 [L] (docs/method.md §2)."""
        found: dict[int, float] = defaultdict(float)
        for name, score in self.scores.items():
            layer = layer_of(name, self.layers)
            if layer is not None:
                found[layer] += ops.double_sum(score).item()
        if not found:
            raise PktError("these scores have no decoder layers; choose layers by an explicit list or a layer_map")
        return torch.tensor([found[i] for i in range(max(found) + 1)], dtype=torch.float64)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically."""
        meta = {
            "format": FORMAT,
            "tile": self.tile,
            "layers": self.layers,
            "losses": self.losses,
            "shapes": self.shapes,
            "provenance": self.provenance,
            # Absent, as in files of before there were others, it is the method's own.
            **({} if self.measure == "theta_grad" else {"measure": self.measure}),
        }
        with atomic_file(path) as scratch:
            write_tensors(scratch, self.scores, ("pkt", json.dumps(meta)))

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Read what `save` wrote. Raises `PktError` for a file that is missing, truncated or something else."""
        from safetensors.torch import load_file

        path = Path(path)
        if path.is_dir():
            # What `pkt transfer --keep-scores` leaves in its folders.
            if not (path / KEPT).is_file():
                raise PktError(
                    f"{path} is a folder without {KEPT}; name a file of `pkt sensitivity`, or a folder that was made with "
                    "--keep-scores"
                )
            path = path / KEPT
        header = safetensors_header(path)
        try:
            meta = json.loads(header.metadata["pkt"])
            if meta["format"] != FORMAT:
                raise KeyError
            shapes = {name: tuple(shape) for name, shape in meta["shapes"].items()}
            rest = {key: meta[key] for key in ("tile", "layers", "losses", "provenance")}
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise PktError(f"{path} is not a file of sensitivities; make one with `pkt sensitivity`") from error
        scores = load_file(str(path))
        for name, score in scores.items():
            if not bool(((score >= 0) & score.isfinite()).all()):
                raise PktError(f"{path}: the scores of {name} are not all finite and positive; make the file again")
        return cls(scores, shapes, **rest, measure=meta.get("measure", "theta_grad"))
