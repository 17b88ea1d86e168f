"""Rules: what a module of each kind runs instead of its forward, so that the backward pass shows every use of its parameters.

A rule makes the forward of one module out of `taps`. A new kind of module is a rule and a row of RULES.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pkt.models import kind_of
from pkt.scoring.experts import experts, is_fused_experts
from pkt.scoring.findings import LearntError
from pkt.scoring.handles import handled
from pkt.scoring.taps import Forward, Operand, Site, embedding, linear, per_sample_copy, scored, tap, vector_use


def _operand(site: Site, parameter: Tensor | None) -> Operand | None:
    return None if parameter is None else Operand.of(site, parameter)


def _linear(module: Any, site: Site) -> Forward:
    def forward(x: Tensor) -> Tensor:
        return linear(site, x, Operand.of(site, module.weight), _operand(site, module.bias))

    return forward


def _conv1d(module: Any, site: Site) -> Forward:
    def forward(x: Tensor) -> Tensor:
        return linear(site, x, Operand.of(site, module.weight).turned, _operand(site, module.bias))

    return forward


def _embedding(module: Any, site: Site) -> Forward:
    def forward(ids: Tensor) -> Tensor:
        return embedding(site, ids, Operand.of(site, module.weight), module.padding_idx)

    return forward


def _layer_norm(module: Any, site: Site) -> Forward:
    shape, eps = tuple(module.normalized_shape), module.eps

    def forward(x: Tensor) -> Tensor:
        weight, bias = _operand(site, module.weight), _operand(site, module.bias)
        y = F.layer_norm(x, shape, None if weight is None else weight.value, None if bias is None else bias.value, eps)
        if not scored(weight, bias):
            return y

        def record(saved: Tensor, dy: Tensor) -> None:
            if bias is not None and bias.name is not None:
                vector_use(site, bias.name, dy, shape)
            if weight is not None and weight.name is not None:
                work = saved if saved.dtype == torch.float64 else saved.float()
                vector_use(site, weight.name, dy * F.layer_norm(work, shape, eps=eps), shape)

        return tap(site.anchor, y, x.detach(), record)

    return forward


def _vectors(module: Any, site: Site) -> Forward:
    """RMSNorm and its like: the module's own forward on a copy of each vector per sample."""
    plain: Forward = module.forward
    own = {key: p for key, p in module._parameters.items() if p is not None}

    def forward(*args: Any, **kwargs: Any) -> Any:
        x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        names = {key: name for key, p in own.items() if (name := site.tapped(p)) is not None}
        if site.findings.one_by_one or x is None or x.ndim < 2 or not names or not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        size = site.layout.size
        if x.shape[0] != size:
            if size == 1:
                return plain(*args, **kwargs)
            raise LearntError(site.findings.alone())
        copies = {
            key: per_sample_copy(
                site.anchor,
                own[key].detach(),
                (size, *[1] * (x.ndim - 2), own[key].shape[0]),
                lambda grad, name=name, of=own[key]: vector_use(site, name, grad, tuple(of.shape)),
            )
            for key, name in names.items()
        }
        try:
            y = _with_copies(module, plain, copies, args, kwargs)
        finally:
            for key in names:
                module.__dict__.pop(key, None)
        if site.probing:
            with torch.no_grad():
                same = plain(*args, **kwargs)
            if not (isinstance(y, Tensor) and y.shape == same.shape and torch.allclose(y, same, rtol=1e-3)):
                raise LearntError(site.findings.alone())
        return y

    return forward


def _with_copies(
    module: Any, plain: Forward, copies: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The module's output with each sample's copy of its vectors; sample by sample where torch takes no batch of them."""
    # An instance attribute is found before the registered parameter, which stays where it is.
    module.__dict__.update(copies)
    try:
        return plain(*args, **kwargs)
    except RuntimeError as error:
        # F.layer_norm and F.rms_norm insist on one vector.
        if len(args) != 1 or kwargs or "normalized_shape" not in str(error):
            raise
    rows = []
    for index, row in enumerate(args[0].split(1)):
        module.__dict__.update({key: copy[index].flatten() for key, copy in copies.items()})
        rows.append(plain(row))
    return torch.cat(rows)


def _is_embedding(module: nn.Module) -> bool:
    if not isinstance(module, nn.Embedding) or type(module).forward is not nn.Embedding.forward:
        return False
    return module.max_norm is None and not module.scale_grad_by_freq


def _has_only_vectors(module: nn.Module) -> bool:
    vectors = all(p.ndim == 1 for p in module._parameters.values() if p is not None)
    return vectors and not list(module.children())


# What a module must be, and the rule for it; the first that fits is taken.
RULES: tuple[tuple[Callable[[nn.Module], bool], Callable[[Any, Site], Forward]], ...] = (
    (lambda m: isinstance(m, nn.Linear) and type(m).forward is nn.Linear.forward, _linear),
    (lambda m: kind_of(m) == "conv1d", _conv1d),
    (_is_embedding, _embedding),
    (lambda m: type(m) is nn.LayerNorm, _layer_norm),
    (_has_only_vectors, _vectors),
    (is_fused_experts, experts),
    (lambda m: True, handled),
)


def tapped_forward(module: nn.Module, site: Site) -> Forward | None:
    """What the module runs while it is scored, or None when none of its own parameters is scored by taps."""
    own = [p for p in module._parameters.values() if p is not None]
    if "forward" in module.__dict__ or not any(site.tapped(p) is not None for p in own):
        return None
    return next(rule(module, site) for fits, rule in RULES if fits(module))
