"""Logits become what is kept of a distribution: the counts of N draws, or the K likeliest tokens and the mass of all others.

Draws are stratified: draw k of a token takes the id at which its cumulated probabilities pass (k + u_k) / N, u_k uniform in
[0, 1). Each id's count has the expectation N · p exactly, as independent draws have, and no larger variance. Top-K alone would be
biased: it is kept with the mass it leaves out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pkt.streaming import draw_rows
from pkt.targets import packed, word_bytes

GROUP = 32  # ids whose masses are summed before a draw's place is looked for


def uniforms(seed: int, digest: bytes, occurrence: int, tokens: int, draws: int) -> Tensor:
    """[tokens, draws] in fp64 for one row: they depend on the seed, the row and how many like it came before, and nothing else."""
    text = b"%d:%d:" % (seed, occurrence) + digest
    number = int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1
    generator = torch.Generator().manual_seed(number)
    return torch.rand(tokens, draws, generator=generator, dtype=torch.float64)


def drawn(probabilities: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """probabilities [C, V], u [C, N] -> how many ids differ for each token [C], those ids and their counts, token after token.

    Within a token, ids ascend. The place of a draw is found among sums of `GROUP` ids first, then within one of them, in fp64.
    """
    n = u.shape[1]
    short = -probabilities.shape[1] % GROUP
    groups = (nn.functional.pad(probabilities, (0, short)) if short else probabilities).unflatten(1, (-1, GROUP))
    sums = groups.sum(2).double()
    ends = sums.cumsum(1)
    at = (torch.arange(n, device=u.device) + u) / n * ends[:, -1:]
    group = torch.searchsorted(ends, at, right=True).clamp_(max=ends.shape[1] - 1)
    # How far into its group's mass each draw is, in [0, 1).
    into = ((at - ends.gather(1, group)) / sums.gather(1, group) + 1).clamp_(0, 1 - 2.0**-53)
    within = groups.gather(1, group[:, :, None].expand(-1, -1, GROUP)).cumsum(2, dtype=torch.float64)
    place = torch.searchsorted(within, (into * within[:, :, -1])[:, :, None], right=True)[:, :, 0]
    ids = group * GROUP + place.clamp_(max=GROUP - 1)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = first.view(-1).nonzero()[:, 0]
    counts = torch.diff(starts, append=starts.new_tensor([ids.numel()]))
    return first.sum(1), ids[first], counts


class Keeper:
    """What is kept of the logits of rows' answer tokens, a block at a time. form, size: as in `pkt.targets.Targets`."""

    def __init__(self, form: str, size: int, vocabulary: int) -> None:
        self.form, self.size, self.vocabulary = form, size, vocabulary
        self.width = word_bytes(vocabulary, size)
        # As many as `size` ids can differ.
        self.count = torch.uint8 if size < 256 else torch.int16

    def keep(
        self, hidden: Tensor, head: Callable[[Tensor], Tensor], block: int, targets: Tensor, u: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """hidden [A, d] of answer tokens, whose next tokens are `targets` [A] -> the tensors to keep, on the CPU, and −log p of
        the targets [A]. head: logits of some of them, called for `block` at a time; u [A, N]: of draws."""
        found: list[dict[str, Tensor]] = []
        losses = []
        step = min(block, draw_rows(self.vocabulary, hidden.device))
        for first in range(0, len(hidden), block):
            logits = head(hidden[first : first + block])
            for at in range(0, len(logits), step):
                part = slice(first + at, min(first + at + step, first + len(logits)))
                p = torch.softmax(logits[at : at + step].float(), 1)
                losses.append(-p.gather(1, targets[part, None])[:, 0].log())
                found.append(self._kept(p, None if u is None else u[part].to(p.device)))
        joined = {name: torch.cat([each[name] for each in found]) for name in found[0]}
        return joined, torch.cat(losses)

    def _kept(self, p: Tensor, u: Tensor | None) -> dict[str, Tensor]:
        if u is None:
            values, ids = p.topk(self.size)
            rest = (1 - values.double().sum(1)).clamp_(min=0)
            return {"ids": ids.int().cpu(), "probabilities": values.cpu(), "rest": rest.float().cpu()}
        distinct, ids, counts = drawn(p, u)
        words = packed(ids.cpu(), counts.cpu(), self.size, self.width)
        return {"distinct": distinct.to(self.count).cpu(), "words": words}
