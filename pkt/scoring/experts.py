"""Fused experts (transformers 5): one 3-D parameter holds a matrix of every expert, and tokens are routed to a few of them.

The module is computed here, with its own gate or activation, so that each expert's rows lie sample by sample: tokens are
sorted by expert, which leaves those of a sample together, and S of an expert follows from its rows as a linear layer's does.
That this is what the module computes is not assumed: its own forward is run beside it, on a few tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pkt import ops
from pkt.models import EXPERT_PARAMETERS
from pkt.scoring.batches import Rows
from pkt.scoring.findings import LearntError
from pkt.scoring.taps import Forward, Operand, Site, rows_of, scored, tap
from pkt.scoring.uses import ExpertsUse, LinearUse, VectorUse, accumulated_in

_GATE_UP, _UP, _DOWN = EXPERT_PARAMETERS
TRIED_TOKENS = 32


class _Sorted(torch.autograd.Function):
    """Rows of x, each `copies` times, in `order`; backward needs no scatter, whose sums have no order on a GPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, place: Tensor, copies: int) -> Tensor:
        ctx.copies = copies
        ctx.save_for_backward(place)
        return x.index_select(0, order // copies)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (place,) = ctx.saved_tensors
        back = grads[0].index_select(0, place)
        return back.view(-1, ctx.copies, back.shape[1]).sum(1) if ctx.copies > 1 else back, None, None, None


# autograd.Function.apply has no types.
_sorted: Callable[..., Tensor] = _Sorted.apply


class _Routing:
    """Where the tokens of a batch go: (token, choice) pairs sorted by expert, within an expert as they were.

    index [tokens, choices]: experts; order [pairs]: the pair at each sorted place; place: the inverse; counts: pairs of each.
    """

    def __init__(self, index: Tensor, experts: int) -> None:
        self.index, self.experts = index.reshape(-1), experts
        self.choices = index.shape[1]
        self.order = self.index.argsort(stable=True)
        self.place = torch.empty_like(self.order)
        self.place[self.order] = torch.arange(len(self.order), device=index.device)
        self.counts: list[int] = torch.bincount(self.index, minlength=experts).tolist()

    def split_among(self, samples: Rows) -> None:
        """Tokens are the samples' one after another; those past a sample's length are its padding."""
        size, device = len(samples.samples), self.index.device
        self.samples = samples.samples
        pairs = torch.arange(len(self.index), device=device)
        each = len(self.index) // size
        self.sample = pairs // each
        real = (pairs - self.sample * each) // self.choices < samples.lens[self.sample]
        bins = self.index * size + self.sample
        lens, all_lens = torch.zeros(2, self.experts * size, dtype=torch.int64, device=device)
        ops.add_rows_(lens, bins, real.long())
        ops.add_rows_(all_lens, bins, torch.ones_like(bins))
        # A sample's padding comes last in its tokens, and so among an expert's rows of it.
        starts = all_lens.cumsum(0) - all_lens
        shape = self.experts, size
        self.parts = [
            (e, Rows(*rows))
            for e, rows in enumerate(zip(starts.view(shape), lens.view(shape), strict=True))
            if self.counts[e]
        ]

    def peaks(self, dy: Tensor) -> Tensor:
        """The largest |dy| of each sample [B, 1]: as finite, and as much zero, as all of them."""
        return dy.abs().amax(1)[self.place].view(len(self.samples), -1).amax(1, keepdim=True)

    def sums(self, dy: Tensor) -> Tensor:
        """dy [pairs, out] summed over each sample's rows of each expert: [B, experts, out]."""
        found = dy.new_zeros(len(self.samples) * self.experts, dy.shape[1], dtype=accumulated_in(dy.dtype))
        ops.add_rows_(found, (self.sample * self.experts + self.index)[self.order], dy.to(found.dtype))
        return found.view(len(self.samples), self.experts, -1)


def _product(site: Site, routing: _Routing, x: Tensor, weight: Operand, bias: Operand | None) -> Tensor:
    """x [pairs, in] in sorted order, weight [experts, out, in], bias [experts, out] -> [pairs, out]."""
    biases = [None] * routing.experts if bias is None else bias.value
    y = torch.cat([F.linear(*one) for one in zip(x.split(routing.counts), weight.value, biases, strict=True)])
    if not scored(weight, bias):
        return y

    def record(saved: Tensor, dy: Tensor) -> None:
        peaks = routing.peaks(dy)
        if bias is not None and bias.name is not None:
            site.use(bias.name, peaks, VectorUse(routing.sums(dy)))
        if weight.name is not None:
            x, d = (dy, saved.to(dy.dtype)) if weight.transposed else (saved.to(dy.dtype), dy)
            site.use(weight.name, peaks, ExpertsUse([(e, LinearUse(x, d, rows)) for e, rows in routing.parts]))

    return tap(site.anchor, y, x.detach().to(y.dtype), record)


def _output(module: Any, site: Site, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """hidden [tokens, d]; index, weights [tokens, choices] -> [tokens, d]."""
    routing = _Routing(index, module.num_experts)
    if torch.is_grad_enabled():
        routing.split_among(rows_of(site, hidden))

    def product(x: Tensor, name: str) -> Tensor:
        weight = Operand.of(site, module._parameters[name])
        bias = Operand.of(site, module._parameters[f"{name}_bias"]) if module.has_bias else None
        return _product(site, routing, x, weight.turned if module.is_transposed else weight, bias)

    x = product(_sorted(hidden, routing.order, routing.place, routing.choices), _names(module)[0])
    x = product(module._apply_gate(x) if module.has_gate else module.act_fn(x), _DOWN)
    x = _sorted(x * weights.reshape(-1)[routing.order, None], routing.place, routing.order, 1)
    return x.view(len(hidden), routing.choices, -1).sum(1).to(hidden.dtype)


def _names(module: Any) -> tuple[str, str]:
    return (_GATE_UP if module.has_gate else _UP), _DOWN


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module says of itself what transformers' interface for experts asks, and has the parameters it then has."""
    if not all(hasattr(module, flag) for flag in ("has_gate", "has_bias", "is_transposed", "num_experts")):
        return False
    if getattr(module, "has_post_expert_norm", False) or getattr(module, "_is_expert_parallel", False):
        return False
    names = _names(module)
    biases = {f"{name}_bias" for name in names} if module.has_bias else set()
    return {key for key, p in module._parameters.items() if p is not None} == {*names, *biases}


def experts(module: Any, site: Site) -> Forward:
    plain: Forward = module.forward
    tried = False

    def try_out(hidden: Tensor, index: Tensor, weights: Tensor) -> None:
        """Whether both forwards agree on the first tokens; autograd sees the module's parameters where they do not."""
        known = hidden.ndim == 2 and index.shape == weights.shape and index.ndim == 2
        if known and int(index.max()) < module.num_experts:
            few = tuple(t[:TRIED_TOKENS] for t in (hidden, index, weights))
            with torch.no_grad():
                own, found = plain(*few), _output(module, site, *few)
            if float((own - found).double().norm()) <= torch.finfo(own.dtype).eps ** 0.5 * float(own.double().norm()):
                return
        findings = site.findings
        for name in filter(None, map(site.tapped, module._parameters.values())):
            findings = findings.untapping(name)
        raise LearntError(findings)

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal tried
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        hidden, index, weights = (*args, *kwargs.values())
        if not tried:
            try_out(hidden, index, weights)
            tried = True
        return _output(module, site, hidden, index, weights)

    return forward
