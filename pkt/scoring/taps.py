"""Taps: what a module of each kind runs instead of its forward, so that the backward pass shows every use of its parameters.

A rule makes the forward of one module: it computes with detached weights and passes the output through an identity whose
backward sees dY, or runs the module with one copy of a vector per sample. A new kind of module is a rule and a row of RULES.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pkt.models import kind_of
from pkt.scoring.batches import Layout, Rows
from pkt.scoring.findings import Findings, LearntError
from pkt.scoring.uses import EmbeddingUse, LinearUse, Use, VectorUse, accumulated_in

Forward: TypeAlias = Callable[..., Any]


class Site(Protocol):
    """What a rule knows of the scoring it serves. Names are those of parameters that taps score."""

    findings: Findings
    layout: Layout
    anchor: Tensor  # a leaf that requires a gradient, so that the outputs of taps do

    @property
    def probing(self) -> bool: ...

    def tapped(self, parameter: Tensor | None) -> str | None: ...

    def use(self, name: str, dy: Tensor, use: Use) -> None: ...


class _Tap(torch.autograd.Function):
    """The identity on y, whose backward hands (what was saved for it, dY) to `record`."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, y: Tensor, saved: Tensor, record: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.record = record
        ctx.save_for_backward(saved)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (dy,) = grads
        ctx.record(ctx.saved_tensors[0], dy)
        return None, dy, None, None


class _PerSampleCopy(torch.autograd.Function):
    """A vector as one copy per sample, [B, 1, ..., d]; backward hands their gradients to `record`."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, vector: Tensor, shape: tuple[int, ...], record: Callable[[Tensor], None]
    ) -> Tensor:
        ctx.record = record
        return vector.expand(shape).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.record(grads[0])
        return None, None, None, None


# autograd.Function.apply has no types.
_tap: Callable[..., Tensor] = _Tap.apply
_per_sample_copy: Callable[..., Tensor] = _PerSampleCopy.apply


def _rows(site: Site, dy: Tensor) -> Rows:
    rows = site.layout.rows(dy)
    if rows is None:
        raise LearntError(site.findings.alone())
    return rows


def _flat(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])


def _operand(site: Site, parameter: Tensor | None) -> Tensor | None:
    return parameter if parameter is None or site.tapped(parameter) is None else parameter.detach()


def _vector_use(site: Site, name: str, dy: Tensor, shape: tuple[int, ...]) -> None:
    """dy [B, ..., *shape]: a vector's gradient before the sum over a sample's positions."""
    rows = site.layout.rows(dy)
    # Of a norm over several dimensions the last one's rows say nothing; the samples must come first.
    if rows is None or (len(shape) > 1 and site.layout.size > 1 and dy.shape[0] != site.layout.size):
        raise LearntError(site.findings.alone())
    by_sample = dy.reshape(site.layout.size, -1, *shape).sum(1, dtype=accumulated_in(dy.dtype))
    site.use(name, dy, VectorUse(by_sample))


# --- rules ----------------------------------------------------------------------------------------------------------


def _linear(module: Any, site: Site, *, transposed: bool = False) -> Forward:
    def forward(x: Tensor) -> Tensor:
        weight, bias = module.weight, module.bias
        w = _operand(site, weight)
        assert w is not None
        y = F.linear(x, w.t() if transposed else w, _operand(site, bias))
        name, bias_name = site.tapped(weight), site.tapped(bias)
        if (name is None and bias_name is None) or not torch.is_grad_enabled():
            return y

        def record(saved: Tensor, dy: Tensor) -> None:
            if bias_name is not None:
                _vector_use(site, bias_name, dy, tuple(bias.shape))
            if name is None:
                return
            if dy.dtype == torch.float16:
                saved = saved.to(dy.dtype)
            rows, x, d = _rows(site, dy), _flat(saved), _flat(dy)
            site.use(name, dy, LinearUse(d, x, rows) if transposed else LinearUse(x, d, rows))

        return _tap(site.anchor, y, x.detach().to(y.dtype), record)

    return forward


def _conv1d(module: Any, site: Site) -> Forward:
    return _linear(module, site, transposed=True)


def _embedding(module: Any, site: Site) -> Forward:
    def forward(ids: Tensor) -> Tensor:
        name = site.tapped(module.weight)
        if name is None or not torch.is_grad_enabled():
            return F.embedding(ids, module.weight, module.padding_idx)
        if site.layout.size > 1 and ids.shape[0] == 1:
            # Positions looked up once for all samples: one row of them each, so that gradients stay apart.
            ids = ids.expand(site.layout.size, *ids.shape[1:])
        y = F.embedding(ids, module.weight.detach())

        def record(saved: Tensor, dy: Tensor) -> None:
            if module.padding_idx is not None:
                dy = dy.masked_fill((saved == module.padding_idx).unsqueeze(-1), 0.0)
            site.use(name, dy, EmbeddingUse(saved.reshape(-1), _flat(dy), _rows(site, dy)))

        return _tap(site.anchor, y, ids, record)

    return forward


def _layer_norm(module: Any, site: Site) -> Forward:
    shape, eps = tuple(module.normalized_shape), module.eps

    def forward(x: Tensor) -> Tensor:
        weight, bias = module.weight, module.bias
        y = F.layer_norm(x, shape, _operand(site, weight), _operand(site, bias), eps)
        name, bias_name = site.tapped(weight), site.tapped(bias)
        if (name is None and bias_name is None) or not torch.is_grad_enabled():
            return y

        def record(saved: Tensor, dy: Tensor) -> None:
            if bias_name is not None:
                _vector_use(site, bias_name, dy, shape)
            if name is not None:
                work = saved if saved.dtype == torch.float64 else saved.float()
                _vector_use(site, name, dy * F.layer_norm(work, shape, eps=eps), shape)

        return _tap(site.anchor, y, x.detach(), record)

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
            key: _per_sample_copy(
                site.anchor,
                own[key].detach(),
                (size, *[1] * (x.ndim - 2), own[key].shape[0]),
                lambda grad, name=name, of=own[key]: _vector_use(site, name, grad, tuple(of.shape)),
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
)


def tapped_forward(module: nn.Module, site: Site) -> Forward | None:
    """What the module runs while it is scored, or None when it runs as it is and autograd sees its parameters."""
    own = [p for p in module._parameters.values() if p is not None]
    if "forward" in module.__dict__ or not any(site.tapped(p) is not None for p in own):
        return None
    return next((rule(module, site) for fits, rule in RULES if fits(module)), None)
