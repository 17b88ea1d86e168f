r"""Sensitivity: S(θ) = Σ_j |θ · ∂L(x_j)/∂θ|, exact per sample, for a whole batch in one backward pass (docs/method.md §1).

How it works. While scoring, the modules that hold almost all parameters run with detached weights and their outputs pass
through an identity whose backward sees dY (`taps`; which module runs what: `rules`). What a sample gave to a weight follows from
X and dY alone (`uses`): a linear layer hands both to `ops.linear_sensitivity_`, an embedding its ids, LayerNorm and biases sums
over each sample's positions. It accrues in the parameter's sink (`sinks`).
Other modules with vector parameters (RMSNorm and its like) run with one copy of the vector per sample, whose gradient is the
per-sample one; fused experts (`experts`) run with their tokens sorted; a module of any other kind runs its own forward with
`handles` in its parameters' places. No gradient of a matrix is ever stored.

What cannot be done for a batch is found out, not assumed: parameters keep requiring a gradient, so a use that bypasses the
taps makes autograd deliver one; a first small pass checks that sample 0's loss reaches only sample 0's rows. In either case
everything is scored one sample at a time, the untapped parameters by autograd, one gradient alive at a time.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pkt.errors import PktError, SampleError
from pkt.ops import MEASURES, Measure
from pkt.ranks import ALONE, Ranks
from pkt.scoring.batches import Layout, batch_size, on_device, one_sample, probe_of, real_lengths, sliced
from pkt.scoring.findings import Findings, LearntError
from pkt.scoring.head import FusedHead, HeadUse, find_fused_head
from pkt.scoring.losses import LossFn, default_loss
from pkt.scoring.passes import Adding, Measuring, Pass, Probing, check_finite
from pkt.scoring.rules import tapped_forward
from pkt.scoring.sinks import Sink, Sinks
from pkt.scoring.uses import Use

PROBE_TOKENS = 24
THETA_GRAD = MEASURES["theta_grad"]


class Scorer:
    """Accumulates S of chosen parameters of a module while it is run forward and backward.

    Used as a context: the module is changed on entry and restored on exit. Inside, every batch is run within `samples`, and
    `check_finite` asked at last. What turns out to need another way is raised as `LearntError`, with the findings to begin
    again with.

    findings: what is known of the model; sinks: where S of some parameters accrues, if not as elements or tile sums; blame:
    the name of a parameter that is not finite, asked when a loss or a gradient is not (default: looks for one in the model);
    prefix: the module's own name in the model whose parameters' names these are.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Iterable[str],
        findings: Findings,
        *,
        measure: Measure = THETA_GRAD,
        tile: int | None = None,
        sinks: Mapping[str, Sink] | None = None,
        blame: Callable[[], str | None] | None = None,
        prefix: str = "",
    ) -> None:
        wanted = set(names)
        self.model, self.findings, self.tile = model, findings, tile
        self._all = dict(model.named_parameters(prefix))
        self.parameters = {n: p for n, p in self._all.items() if n in wanted}
        self.half = any(p.dtype == torch.float16 for p in self.parameters.values())
        self.anchor = torch.zeros((), device=_device_of(self.parameters), requires_grad=True)
        self.layout = Layout()
        self.fused = None if findings.fused is None else FusedHead(model, findings.fused, self.anchor, tile or 1)
        self._name_of = {id(p): n for n, p in self.parameters.items() if n not in findings.untapped}
        self._sinks = Sinks(self.parameters, findings, measure, tile, sinks or {})
        self._blame = blame or functools.partial(_first_bad_parameter, model)
        self._pass: Pass = Measuring()
        self._unchecked: list[Adding] = []
        self._undo = contextlib.ExitStack()

    # -- entering and leaving

    def __enter__(self) -> Scorer:
        with contextlib.ExitStack() as undo:
            self._change(undo)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._undo.close()

    def _change(self, undo: contextlib.ExitStack) -> None:
        undo.enter_context(evaluating(self.model))
        for name, parameter in self._all.items():
            undo.callback(_restorer(parameter))
            parameter.grad = None
            scored = name in self.parameters
            parameter.requires_grad_(scored and parameter.is_floating_point())
            if scored:
                handle = parameter.register_post_accumulate_grad_hook(functools.partial(self._delivered, name))
                undo.callback(handle.remove)
        for module in self.model.modules():
            forward = tapped_forward(module, self)
            if forward is not None:
                module.forward = forward
                undo.callback(module.__dict__.pop, "forward")

    # -- what the taps ask and deliver

    def tapped(self, parameter: Tensor | None) -> str | None:
        """The name under which a tap scores this parameter, or None when autograd does or nobody."""
        return None if parameter is None else self._name_of.get(id(parameter))

    @property
    def probing(self) -> bool:
        return isinstance(self._pass, Probing)

    def use(self, name: str, dy: Tensor, use: Use) -> None:
        self._pass.use(name, dy, use)

    def _delivered(self, name: str, parameter: Tensor) -> None:
        """Autograd delivered a gradient: some use of the parameter went past the taps."""
        grad, parameter.grad = parameter.grad, None
        assert grad is not None
        self._pass.gradient(name, grad)

    def _head_use(self, use: HeadUse) -> None:
        assert self.fused is not None
        self.use(self.fused.name, use.p, use)

    # -- running batches

    def shares_a_batch(self, small: Any, loss_fn: LossFn) -> bool:
        """Whether two short samples can: the gradients of the first one's loss must stay in its own rows."""
        self.layout = Layout.of(small, self.anchor.device)
        self._pass = Probing(self.findings, self.layout)
        try:
            with torch.enable_grad():
                losses = loss_fn(self.model, small)
                if losses.ndim and losses.requires_grad:
                    losses[0].backward()
            return losses.ndim > 0
        except (LearntError, RuntimeError, SampleError):
            # Not a verdict on the model: scored one sample at a time, a real fault shows itself again.
            return False
        finally:
            for parameter in self.parameters.values():
                parameter.grad = None

    @contextlib.contextmanager
    def samples(self, batch: Any, first: int, layout: Layout | None = None) -> Iterator[None]:
        """What a backward pass inside delivers belongs to the samples of this batch, number `first` onwards.

        layout: the batch's, where it is known: to make it is to wait for the device.
        """
        self.layout = layout or Layout.of(batch, self.anchor.device)
        self._pass = adding = Adding(self.findings, self.layout.size, self._sinks, first)
        with torch.enable_grad():
            yield
        adding.end_batch()
        self._unchecked.append(adding)

    def check_finite(self) -> None:
        """Raise `SampleError` for the first gradient gone wrong since this was last asked, by one read of the device."""
        done, self._unchecked = self._unchecked, []
        check_finite(done, self.anchor.device, self._advice)

    def default_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """`default_loss`, without logits where that can be."""
        return default_loss(model, batch) if self.fused is None else self.fused.losses(batch, self._head_use)

    def losses(self, batch: Any, loss_fn: LossFn, first: int) -> tuple[Tensor, list[float]]:
        """Losses of the batch [B] and their values. Raises `PktError` naming the sample that spoils them."""
        size = self.layout.size
        try:
            losses = loss_fn(self.model, batch)
        except SampleError as error:
            raise error.shifted(first) from None
        if losses.ndim == 0 and size > 1:
            raise LearntError(self.findings.alone())
        losses = losses.reshape(-1)
        if losses.shape[0] != size:
            raise PktError(f"loss_fn returned {losses.shape[0]} losses for a batch of {size} samples")
        values: list[float] = losses.detach().double().cpu().tolist()
        for j, value in enumerate(values):
            if not math.isfinite(value):
                raise SampleError(f"the loss of {{samples}} is {value}; {self._advice()}", [first + j])
        if not losses.requires_grad:
            raise PktError("the loss does not depend on the parameters to be scored (is it computed under no_grad?)")
        return losses, values

    def backward(self, losses: Tensor, leaf: Tensor | None = None) -> Tensor | None:
        """Backward from [B] losses, scaled where fp16 needs it; the gradient of `leaf`, its scale divided out."""
        scale = self._choose_scale(losses) if self.half else 1.0
        self._sinks.rescale(scale)
        if leaf is not None:
            leaf.grad = None
        (losses * scale).sum().backward()
        if leaf is None or leaf.grad is None:
            return None
        return leaf.grad.float() / scale if self.half else leaf.grad

    def backward_from(self, out: Tensor, grad: Tensor, leaf: Tensor | None) -> Tensor | None:
        """Backward from the gradient at the output of a part of a model; the gradient of `leaf`."""
        if self.half:
            return self.backward((out.float() * grad).flatten(1).sum(1), leaf)
        torch.autograd.backward(out, grad.to(out.dtype))
        return None if leaf is None else leaf.grad

    def _choose_scale(self, losses: Tensor) -> float:
        """A power of two that keeps fp16 gradients from underflow and overflow, found by a backward that only looks."""
        scale, adding = 2.0**10, self._pass
        while True:
            self._pass = measuring = Measuring()
            try:
                (losses * scale).sum().backward(retain_graph=True)
            finally:
                self._pass = adding
            if math.isfinite(measuring.peak) or scale < 2.0**-8:
                break
            scale /= 2.0**6
        if 0 < measuring.peak < math.inf:
            scale *= 2.0 ** (12 - math.frexp(measuring.peak)[1])
        return min(scale, 2.0**40)

    def _advice(self) -> str:
        """What to do about a value that is not finite: a damaged parameter explains it, otherwise the sample or the type."""
        name = self._blame()
        if name is not None:
            return f"parameter {name} itself holds NaN or Inf: the checkpoint is damaged, copy it again"
        return "every parameter is finite, so look at that sample, or load the model in fp32 or bf16"

    def finish(self) -> dict[str, Tensor]:
        """The scores by parameter, in the model's order; zero for parameters that no sample reached."""
        return {name: self._sinks[name].result() for name in self.parameters}


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode; afterwards every module in its own again."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _device_of(parameters: Mapping[str, Tensor]) -> torch.device:
    return next(iter(parameters.values())).device


def _first_bad_parameter(model: nn.Module) -> str | None:
    return next((n for n, p in model.named_parameters() if not bool(p.detach().isfinite().all())), None)


def _restorer(parameter: Tensor) -> Callable[[], None]:
    grad, requires_grad = parameter.grad, parameter.requires_grad

    def restore() -> None:
        parameter.grad = None
        parameter.requires_grad_(requires_grad)
        parameter.grad = grad

    return restore


# --- a model in memory ----------------------------------------------------------------------------------------------


def score_batches(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Any],
    loss_fn: LossFn,
    *,
    measure: Measure,
    tile: int | None,
    advance: Callable[[int], None],
    ranks: Ranks = ALONE,
) -> tuple[dict[str, Tensor], list[float]]:
    """S of the named parameters and the samples' losses; begins again, knowing more, when something is learnt.

    ranks: who scores other batches; S is then the sum over all, and the losses are theirs one rank after another.
    """
    own = _first_findings(model, names, batches, loss_fn, tile) if batches else None
    findings = _joined(own, ranks)
    while True:
        learnt: Findings | None = None
        try:
            with Scorer(model, names, findings, measure=measure, tile=tile) as scorer:
                losses = _score_all(scorer, batches, loss_fn, advance)
        except LearntError as error:
            learnt = error.findings
            if learnt == findings:
                raise PktError(
                    "the model's use of its parameters changes between two runs; score it in eval mode"
                ) from None
        if not any(ranks.all_of(learnt is not None)):
            break
        findings = _joined(learnt or findings, ranks)
    scores = scorer.finish()
    ranks.totalled(scores)
    return scores, [loss for each in ranks.all_of(losses) for loss in each]


def _joined(own: Findings | None, ranks: Ranks) -> Findings:
    """What all ranks know together; one without batches knows nothing."""
    return functools.reduce(Findings.joined, [found for found in ranks.all_of(own) if found is not None])


def _first_findings(
    model: nn.Module, names: Sequence[str], batches: Sequence[Any], loss_fn: LossFn, tile: int | None
) -> Findings:
    """What the modules and two small passes tell: whether logits are needed, and whether samples can share a batch."""
    findings = Findings.of(model, names)
    device = _device_of({n: p for n, p in model.named_parameters() if n in set(names)})
    if loss_fn is default_loss and real_lengths(batches[0]) is not None:
        few = on_device(sliced(batches[0], slice(0, 1), PROBE_TOKENS), device)
        with evaluating(model):
            findings = replace(findings, fused=find_fused_head(model, names, few))
    several = next((batch for batch in batches if batch_size(batch) > 1), None)
    if several is None:
        return findings
    tokens = PROBE_TOKENS if loss_fn is default_loss and real_lengths(several) is not None else None
    with Scorer(model, names, findings, tile=tile) as scorer:
        loss = scorer.default_loss if loss_fn is default_loss else loss_fn
        shared = scorer.shares_a_batch(on_device(probe_of(several, tokens=tokens), device), loss)
    return findings if shared else findings.alone()


def _score_all(scorer: Scorer, batches: Sequence[Any], loss_fn: LossFn, advance: Callable[[int], None]) -> list[float]:
    loss = scorer.default_loss if loss_fn is default_loss else loss_fn
    found: list[float] = []
    advance(0)
    for batch in batches:
        size = batch_size(batch)
        alone = scorer.findings.one_by_one and size > 1
        for piece in [one_sample(batch, j) for j in range(size)] if alone else [batch]:
            inputs = on_device(piece, scorer.anchor.device)
            with scorer.samples(inputs, len(found)):
                losses, values = scorer.losses(inputs, loss, len(found))
                scorer.backward(losses)
            scorer.check_finite()
            found += values
            advance(len(found))
    return found
