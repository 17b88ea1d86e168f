r"""Sensitivity: S(θ) = Σ_j |θ · ∂L(x_j)/∂θ|, exact per sample, for a whole batch in one backward pass (METHOD, section 1).

How it works. While scoring, the modules that hold almost all parameters run with detached weights and their outputs pass
through an identity (`_Tap`) whose backward sees dY. What a sample gave to a weight follows from X and dY alone: a linear
layer hands both to `ops.linear_sensitivity_`, an embedding its ids, LayerNorm and biases sums over each sample's positions.
Other modules with vector parameters (RMSNorm and its like) run with one copy of the vector per sample, whose gradient is the
per-sample one. No gradient of a matrix is ever stored.

What cannot be done for a batch is found out, not assumed: parameters keep requiring a gradient, so a use that bypasses the
taps makes autograd deliver one; a first small pass checks that sample 0's loss reaches only sample 0's rows. In either case
everything is scored one sample at a time, the untapped parameters by autograd, one gradient alive at a time.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pkt import ops
from pkt.errors import PktError
from pkt.files import atomic_file, safetensors_header, write_tensors
from pkt.models import decoder_layers, kind_of, layer_of, plain_head
from pkt.scoring.head import Tokens, head_losses, probabilities
from pkt.seeds import IGNORE, Seeds

LossFn = Callable[[nn.Module, Any], Tensor]

FORMAT = "pkt-sensitivity-1"
_PROBE_TOKENS = 24


class Sensitivity(Mapping[str, Tensor]):
    """Parameter name -> S, fp32, in the parameter's shape (or its tile sums).

    shapes: the parameters' own shapes; tile: side of the summed tiles, or None; layers: name of the decoder layers' list;
    losses [samples]: the mean loss of each seed, in the loader's order.
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
    ) -> None:
        self.scores, self.shapes, self.tile, self.layers = scores, shapes, tile, layers
        self.losses, self.provenance = losses or [], provenance or {}

    def __getitem__(self, name: str) -> Tensor:
        return self.scores[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        what = f"{self.tile}x{self.tile} tile sums" if self.tile else "elements"
        return f"Sensitivity({len(self)} parameters, {what}, {len(self.losses)} samples)"

    def layer_scores(self) -> Tensor:
        """Σ of S over all parameters of each decoder layer, fp64 [L] (METHOD, section 2)."""
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
        }
        with atomic_file(path) as scratch:
            write_tensors(scratch, self.scores, ("pkt", json.dumps(meta)))

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Read what `save` wrote. Raises `PktError` for a file that is missing, truncated or something else."""
        from safetensors.torch import load_file

        header = safetensors_header(Path(path))
        try:
            meta = json.loads(header["__metadata__"]["pkt"])
            if meta["format"] != FORMAT:
                raise KeyError
        except (KeyError, ValueError, TypeError) as error:
            raise PktError(f"{path} is not a file of sensitivities; make one with `pkt sensitivity`") from error
        return cls(
            load_file(str(path)),
            {name: tuple(shape) for name, shape in meta["shapes"].items()},
            tile=meta["tile"],
            layers=meta["layers"],
            losses=meta["losses"],
            provenance=meta["provenance"],
        )


def sensitivity(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    loss_fn: LossFn | None = None,
    params: str | Iterable[str] | None = None,
    tile: int | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Score every parameter of `model` on the samples of `loader` (METHOD, section 1).

    model: any nn.Module; it is scored in eval mode and left exactly as it was found, also when interrupted.
    loader: batches; for the default loss mappings with `labels` and what the model's forward takes. A batch's first
        dimension is the sample. S does not depend on how samples are batched, padded on the right or ordered. What
        `pkt.load_seeds` returns is taken as it is.
    loss_fn(model, batch) -> [B]: one loss per sample; default: cross-entropy, the mean over each sample's target tokens,
        shifted by one for logits [B, T, V]. A model that only gives a scalar loss is run one sample at a time.
    params: a regular expression or a list of names; the other parameters are not scored.
    tile: return sums over tile x tile blocks of S instead of its elements.
    device: where the scores are kept; default: where each parameter is.

    Returns a `Sensitivity`, fp32 whatever the weights' type. Raises `PktError` for a sample without a target, a loss or a
    gradient that is not finite (naming the sample and the first bad parameter), and an empty loader.
    """
    if not isinstance(model, nn.Module):
        raise PktError(f"sensitivity takes a model in memory, not {model!r}; pkt.transfer takes checkpoint directories")
    if isinstance(loader, (str, bytes, os.PathLike)):
        raise PktError(
            f"sensitivity takes batches, not the file {loader!r}; read it with pkt.load_seeds(path, tokenizer)"
        )
    if torch.is_inference_mode_enabled():
        raise PktError("sensitivity needs gradients; call it outside torch.inference_mode()")
    packed = next((n for n, m in model.named_modules() if kind_of(m) and not _weight_of(m).is_floating_point()), None)
    if packed is not None:
        raise PktError(f"{packed} has a quantized weight; score the model at whole weights: model.dequantize() first")
    names = _choose(model, params)
    parameters = dict(model.named_parameters())
    if any(parameters[name].is_meta for name in names):
        raise PktError("the model has parameters on the meta device, so without values; load its weights first")
    if tile is not None and not 1 <= tile <= max(max(parameters[name].shape, default=1) for name in names):
        raise PktError(f"tile={tile} must be at least 1 and no larger than the largest matrix")
    batches = loader.batches(8) if isinstance(loader, Seeds) else list(loader)
    if not batches:
        raise PktError("the loader gave no batches; there is nothing to score on")
    for batch in batches:
        _check_batch(model, batch, loss_fn)
    scorer = Scorer(model, names, tile=tile)
    loss_fn = loss_fn or default_loss
    sizes = [batch_size(batch) for batch in batches]
    with scorer, _progress(sum(sizes), progress) as advance:
        losses = scorer.run(batches, sizes, loss_fn, advance)
    scores = scorer.finish()
    if device is not None:
        scores = {name: score.to(device) for name, score in scores.items()}
    return Sensitivity(scores, scorer.shapes, tile=tile, layers=decoder_layers(model), losses=losses)


def _check_labels(batch: Any) -> None:
    if not isinstance(batch, Mapping) or "labels" not in batch:
        raise PktError("the default loss needs batches that are mappings with 'labels'; pass loss_fn for anything else")


def _check_batch(model: Any, batch: Any, loss_fn: LossFn | None) -> None:
    """Refuse what would otherwise stop torch inside the model."""
    if loss_fn is None:
        _check_labels(batch)
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    try:
        rows = model.get_input_embeddings().weight.shape[0]
    except (AttributeError, NotImplementedError):
        return
    if isinstance(ids, Tensor) and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
        raise PktError(
            f"token ids {int(ids.min())} to {int(ids.max())} are not all in the model's {rows}; "
            "the tokenizer and the model do not belong together"
        )


def _weight_of(module: Any) -> Tensor:
    weight: Tensor = module.weight
    return weight


def _choose(model: nn.Module, params: str | Iterable[str] | None) -> list[str]:
    names = [name for name, p in model.named_parameters() if p.is_floating_point()]
    if params is None:
        chosen = names
    elif isinstance(params, str):
        try:
            chosen = [name for name in names if re.search(params, name)]
        except re.error as error:
            raise PktError(f"params={params!r} is not a regular expression: {error}") from error
    else:
        wanted = list(params)
        unknown = sorted(set(wanted) - set(names))
        if unknown:
            raise PktError(
                f"the model has no parameter {', '.join(unknown[:5])}; names are those of named_parameters()"
            )
        chosen = [name for name in names if name in set(wanted)]
    if not chosen:
        raise PktError(f"no parameter to score (params={params!r}); names are those of model.named_parameters()")
    return chosen


@contextlib.contextmanager
def _progress(total: int, enabled: bool) -> Iterator[Callable[[int], None]]:
    """A bar with the time left that appears only once the work has taken two seconds."""
    if not enabled:
        yield lambda done: None
        return
    from pkt.progress import bar

    with bar("scoring", total, unit="samples") as advance:
        yield advance


# --- losses ---------------------------------------------------------------------------------------------------------


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """Mean cross-entropy of each sample's target tokens, [B]; a 0-dim tensor when the model gives nothing but a loss."""
    _check_labels(batch)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    labels = batch["labels"]
    accepted = inspect.signature(model.forward).parameters
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    if "output_router_logits" in accepted:
        inputs["output_router_logits"] = False
    required = "labels" in accepted and accepted["labels"].default is inspect.Parameter.empty
    output = model(**inputs, labels=labels) if required else model(**inputs)
    logits = _field(output, "logits")
    if logits is None:
        if not required and "labels" in accepted:
            output = model(**inputs, labels=labels)
        loss = _field(output, "loss")
        if loss is None:
            raise PktError("the model returned neither logits nor a loss; pass loss_fn(model, batch) -> [B]")
        return loss
    return per_sample_loss(logits, labels)


def _field(output: Any, name: str) -> Tensor | None:
    if isinstance(output, Tensor):
        return output if (name == "loss") == (output.ndim == 0) else None
    if isinstance(output, Mapping):
        return output.get(name)
    if isinstance(output, tuple) and not hasattr(output, name):
        return next((t for t in output if isinstance(t, Tensor) and (name == "loss") == (t.ndim == 0)), None)
    return getattr(output, name, None)


def per_sample_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """logits [B, T, V] with labels [B, T] (shifted by one) or logits [B, C] with labels [B] -> mean losses [B], fp32."""
    if logits.ndim == labels.ndim + 1 == 3:
        logits, labels = logits[:, :-1], labels[:, 1:]
    elif logits.ndim != labels.ndim + 1:
        raise PktError(f"logits {list(logits.shape)} and labels {list(labels.shape)} do not fit; pass loss_fn")
    targets = _check_targets(labels)
    work = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(work.reshape(-1, work.shape[-1]), labels.reshape(-1), reduction="none")
    return losses.view(labels.shape[0], -1).sum(1) / targets


def _check_targets(labels: Tensor) -> Tensor:
    """Target tokens of each sample [B]; every sample must have one."""
    targets = (labels != IGNORE).reshape(labels.shape[0], -1).sum(1)
    if not bool(targets.all()):
        sample = int((targets == 0).nonzero()[0, 0])
        raise _SampleError(sample, "has no target token (every label is -100)")
    return targets


class _SampleError(Exception):
    """A fault of one sample of a batch; the caller knows the sample's place in the loader."""

    def __init__(self, sample: int, text: str) -> None:
        super().__init__(text)
        self.sample = sample


# --- batches --------------------------------------------------------------------------------------------------------


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    return [v for v in values if isinstance(v, Tensor)]


def batch_size(batch: Any) -> int:
    """Samples in a batch: the first dimension its tensors share."""
    sizes = {t.shape[0] for t in _tensors(batch) if t.ndim}
    if len(sizes) != 1:
        raise PktError(f"cannot tell the samples of a batch: its tensors' first dimensions are {sorted(sizes)}")
    return sizes.pop()


def _slice(batch: Any, part: slice, tokens: int | None = None) -> Any:
    """Some samples of a batch, and the first `tokens` positions of a batch of token matrices."""

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        return value[part] if tokens is None else value[part, :tokens]

    if isinstance(batch, Tensor):
        return cut(batch)
    if isinstance(batch, Mapping):
        return {k: cut(v) for k, v in batch.items()}
    return type(batch)(cut(v) for v in batch)


def _real_lengths(batch: Any) -> list[int] | None:
    """Tokens of each sample before its right padding, when the batch is of that form."""
    if not isinstance(batch, Mapping):
        return None
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if not isinstance(mask, Tensor) or not isinstance(ids, Tensor) or mask.shape != ids.shape or ids.ndim != 2:
        return None
    if any(t.shape != ids.shape for t in _tensors(batch)):
        return None
    used = mask != 0
    if isinstance(batch.get("labels"), Tensor):
        used = used | (batch["labels"] != IGNORE)
    lengths = used.sum(1)
    if bool((used != (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None])).any()):
        return None
    return [int(n) for n in lengths]


# --- taps -----------------------------------------------------------------------------------------------------------


class _Tap(torch.autograd.Function):
    """The identity on y, whose backward hands (inputs saved for it, dY) to `record`."""

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


class _RestartError(Exception):
    """Something was learnt about the model that changes how it must be scored; begin again."""


class Scorer:
    """Accumulates S of chosen parameters of a module while it is run forward and backward.

    Used as a context: the module is changed on entry and restored on exit. `run` drives whole batches.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], *, tile: int | None = None) -> None:
        self.model, self.tile = model, tile
        wanted = set(names)
        self.parameters = {n: p for n, p in model.named_parameters() if n in wanted}
        self.shapes = {n: tuple(p.shape) for n, p in self.parameters.items()}
        self.name_of = {id(p): n for n, p in self.parameters.items()}
        self.half = any(p.dtype == torch.float16 for p in self.parameters.values())
        # What is learnt while running: parameters used more than once, and those only autograd can follow.
        self.shared = self._tied_names()
        self.untapped: set[str] = set()
        self.one_by_one = False
        self.mode = "score"
        self.fused: tuple[str, nn.Module, nn.Module] | None = None  # weight's name, the head, the model below it
        self.tokens: list[Tokens] = []  # what the fused head keeps of the batch
        self.batch, self.width = 1, 0
        self.lens: Tensor | None = None
        self._undo: list[Callable[[], None]] = []
        self._reset()

    def _tied_names(self) -> set[str]:
        uses: dict[str, int] = defaultdict(int)
        for module in self.model.modules():
            for parameter in module._parameters.values():
                if parameter is not None and id(parameter) in self.name_of:
                    uses[self.name_of[id(parameter)]] += 1
        return {name for name, count in uses.items() if count > 1}

    def _reset(self) -> None:
        self.acc: dict[str, Tensor] = {}
        self.scale = 1.0
        self._begin_batch()

    def _begin_batch(self) -> None:
        self.uses: dict[str, int] = defaultdict(int)
        self.delivered: set[str] = set()
        self.pending: dict[str, list[tuple[str, Tensor, Tensor]]] = defaultdict(list)
        self.dense: list[tuple[Tensor, Tensor, Tensor]] = []
        self.sums: list[tuple[str, Tensor]] = []
        self.peak: Tensor | None = None

    # -- entering and leaving

    def __enter__(self) -> Scorer:
        try:
            self._change()
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._restore()

    def _restore(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _change(self) -> None:
        modes = {m: m.training for m in self.model.modules()}

        def restore_modes() -> None:
            for module, training in modes.items():
                module.training = training

        self._undo.append(restore_modes)
        self.model.eval()
        device = next(iter(self.parameters.values())).device
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        for name, parameter in self.model.named_parameters():
            self._undo.append(_restorer(parameter))
            parameter.grad = None
            scored = name in self.parameters
            parameter.requires_grad_(scored and parameter.is_floating_point())
            if scored:
                handle = parameter.register_post_accumulate_grad_hook(lambda p, n=name: self._on_gradient(n, p))
                self._undo.append(handle.remove)
        for module in self.model.modules():
            wrapped = self._wrapped_forward(module)
            if wrapped is not None:
                had = module.__dict__.get("forward")
                module.forward = wrapped
                self._undo.append(functools.partial(_put_forward, module, had))

    def _wrapped_forward(self, module: nn.Module) -> Callable[..., Any] | None:
        own = {k: p for k, p in module._parameters.items() if p is not None}
        if not own or not any(id(p) in self.name_of for p in own.values()) or "forward" in module.__dict__:
            return None
        kind = kind_of(module)
        plain = type(module).forward
        if kind == "linear" and plain is nn.Linear.forward:
            return self._linear(module, transposed=False)
        if kind == "conv1d":
            return self._linear(module, transposed=True)
        if isinstance(module, nn.Embedding):
            simple = plain is nn.Embedding.forward and module.max_norm is None and not module.scale_grad_by_freq
            return self._embedding(module) if simple else None
        if type(module) is nn.LayerNorm:
            return self._layer_norm(module)
        if all(p.ndim == 1 for p in own.values()) and not list(module.children()):
            return self._vectors(module, own)
        return None

    def _tapped(self, parameter: Tensor | None) -> str | None:
        """The name under which a tap scores this parameter, or None when autograd does or nobody."""
        name = None if parameter is None else self.name_of.get(id(parameter))
        return None if name is None or name in self.untapped else name

    def _operand(self, parameter: Tensor | None) -> Tensor | None:
        return parameter if parameter is None or self._tapped(parameter) is None else parameter.detach()

    def _linear(self, module: Any, *, transposed: bool) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            weight, bias = module.weight, module.bias
            w = self._operand(weight)
            assert w is not None
            y = F.linear(x, w.t() if transposed else w, self._operand(bias))
            name, bias_name = self._tapped(weight), self._tapped(bias)
            if (name is None and bias_name is None) or not torch.is_grad_enabled():
                return y

            def record(saved: Tensor, dy: Tensor) -> None:
                if bias_name is not None:
                    self._record_vector(bias_name, dy)
                if name is not None:
                    self._record_matrix("conv1d" if transposed else "linear", name, saved, dy)

            return _tap(self.anchor, y, x.detach().to(y.dtype), record)

        return forward

    def _embedding(self, module: nn.Embedding) -> Callable[[Tensor], Tensor]:
        def forward(ids: Tensor) -> Tensor:
            name = self._tapped(module.weight)
            if name is None or not torch.is_grad_enabled():
                return F.embedding(ids, module.weight, module.padding_idx)
            if self.batch > 1 and ids.shape[0] == 1:
                # Positions looked up once for all samples: one row of them each, so that gradients stay apart.
                ids = ids.expand(self.batch, *ids.shape[1:])
            y = F.embedding(ids, module.weight.detach())

            def record(saved: Tensor, dy: Tensor) -> None:
                if module.padding_idx is not None:
                    dy = dy.masked_fill((saved == module.padding_idx).unsqueeze(-1), 0.0)
                self._record_matrix("embedding", name, saved, dy)

            return _tap(self.anchor, y, ids, record)

        return forward

    def _layer_norm(self, module: nn.LayerNorm) -> Callable[[Tensor], Tensor]:
        shape, eps = tuple(module.normalized_shape), module.eps

        def forward(x: Tensor) -> Tensor:
            weight, bias = module.weight, module.bias
            y = F.layer_norm(x, shape, self._operand(weight), self._operand(bias), eps)
            name, bias_name = self._tapped(weight), self._tapped(bias)
            if (name is None and bias_name is None) or not torch.is_grad_enabled():
                return y

            def record(saved: Tensor, dy: Tensor) -> None:
                if bias_name is not None:
                    self._record_vector(bias_name, dy, module.bias.ndim)
                if name is not None:
                    work = saved if saved.dtype == torch.float64 else saved.float()
                    self._record_vector(name, dy * F.layer_norm(work, shape, eps=eps), module.weight.ndim)

            return _tap(self.anchor, y, x.detach(), record)

        return forward

    def _vectors(self, module: nn.Module, own: dict[str, nn.Parameter]) -> Callable[..., Any]:
        plain = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            names = {key: name for key, p in own.items() if (name := self._tapped(p)) is not None}
            if self.one_by_one or x is None or x.ndim < 2 or not names or not torch.is_grad_enabled():
                return plain(*args, **kwargs)
            if x.shape[0] != self.batch:
                if self.batch == 1:
                    return plain(*args, **kwargs)
                raise _RestartError
            for key, name in names.items():
                shape = (self.batch, *[1] * (x.ndim - 2), own[key].shape[0])
                # An instance attribute is found before the registered parameter, which stays where it is.
                module.__dict__[key] = _per_sample_copy(
                    self.anchor, own[key].detach(), shape, lambda grad, n=name: self._record_vector(n, grad)
                )
            try:
                y = plain(*args, **kwargs)
            finally:
                for key in names:
                    del module.__dict__[key]
            if self.mode == "probe":
                with torch.no_grad():
                    same = plain(*args, **kwargs)
                if not (isinstance(y, Tensor) and y.shape == same.shape and torch.allclose(y, same, rtol=1e-3)):
                    raise _RestartError
            return y

        return forward

    # -- what the taps deliver

    def _rows(self, dy: Tensor) -> tuple[int, Tensor, Tensor] | None:
        """(rows, starts, lengths) of the samples in dy flattened to rows; None when its layout is not known."""
        rows = dy.numel() // max(1, dy.shape[-1])
        if self.batch == 1:
            each, lens = rows, None
        elif dy.shape[0] == self.batch:
            each = rows // self.batch
            lens = self.lens if dy.ndim == 3 and each == self.width else None
        elif dy.ndim == 2 and rows == self.batch * self.width:
            each, lens = self.width, self.lens
        else:
            return None
        key = (each, lens is None)
        if key not in self.layouts:
            starts = torch.arange(self.batch, device=dy.device) * each
            if lens is None:
                lens = torch.full((self.batch,), each, device=dy.device)
            self.layouts[key] = (starts, lens.to(dy.device))
        return rows, *self.layouts[key]

    def _probe(self, dy: Tensor) -> None:
        """Sample 0's loss must reach only sample 0's rows."""
        layout = self._rows(dy)
        if layout is None:
            raise _RestartError
        rows = layout[0]
        if bool(dy.reshape(rows, -1)[rows // self.batch :].count_nonzero()):
            raise _RestartError

    def _watch(self, name: str, dy: Tensor) -> bool:
        """Note what is needed to find a gradient that is not finite. Returns whether to accumulate."""
        if self.mode == "probe":
            self._probe(dy)
            return False
        if self.mode == "measure":
            peak = dy.detach().abs().amax().float()
            self.peak = peak if self.peak is None else torch.maximum(self.peak, peak)
            return False
        # A sum is finite only if all its terms are (or it overflowed): one read of dy, no wait for the device.
        by_sample = self.batch > 1 and dy.shape[0] == self.batch
        work = torch.float64 if dy.dtype == torch.float64 else torch.float32
        total = dy.reshape(self.batch, -1).sum(1, dtype=work) if by_sample else dy.sum(dtype=work).view(1)
        self.sums.append((name, total))
        return True

    def _accumulator(self, name: str, *, full: bool = False) -> Tensor:
        if name not in self.acc:
            p = self.parameters[name]
            shape = tuple(p.shape)
            if self.tile is not None and p.ndim > 1 and not full:
                shape = (*shape[:-2], -(-shape[-2] // self.tile), -(-shape[-1] // self.tile))
            self.acc[name] = torch.zeros(shape, dtype=torch.float32, device=p.device)
        return self.acc[name]

    def _record_vector(self, name: str, dy: Tensor, ndim: int = 1) -> None:
        """dy [B, ..., *shape of the parameter]: its gradient before the sum over a sample's positions."""
        if not self._watch(name, dy):
            return
        parameter = self.parameters[name]
        layout = self._rows(dy) if ndim == 1 else None
        if (ndim == 1 and layout is None) or (self.batch > 1 and dy.shape[0] != self.batch and layout is None):
            raise _RestartError
        work = torch.float64 if dy.dtype == torch.float64 else torch.float32
        by_sample = dy.reshape(self.batch, -1, *parameter.shape).sum(1, dtype=work)
        self._add_use("dense", name, by_sample, by_sample)

    def _record_matrix(self, kind: str, name: str, saved: Tensor, dy: Tensor) -> None:
        if not self._watch(name, dy):
            return
        if self.tokens and self.fused is not None and name == self.fused[0]:
            self._join_tied(name, saved, dy)
            return
        if dy.dtype == torch.float16 and saved.dtype != dy.dtype and kind != "embedding":
            saved = saved.to(dy.dtype)
        self._add_use(kind, name, saved, dy)

    def _add_use(self, kind: str, name: str, saved: Tensor, dy: Tensor) -> None:
        self.uses[name] += 1
        if name in self.delivered:
            self.untapped.add(name)
            raise _RestartError
        if self.uses[name] > 1 and name not in self.shared:
            self.shared.add(name)
            raise _RestartError
        if name in self.shared:
            self.pending[name].append((kind, saved, dy))
        else:
            self._accumulate(kind, name, saved, dy)

    def _accumulate(self, kind: str, name: str, saved: Tensor, dy: Tensor) -> None:
        parameter = self.parameters[name].detach()
        if kind == "dense":
            acc, total = self._accumulator(name), dy.abs().sum(0)
            if acc.shape == parameter.shape:
                self.dense.append((acc, parameter, total))
            else:
                self._add_abs(acc, parameter, total)
            return
        layout = self._rows(dy)
        if layout is None:
            raise _RestartError
        rows, starts, lens = layout
        dy = dy.reshape(rows, -1)
        if kind == "embedding":
            ids = saved.reshape(rows)
            if self.tile is None:
                ops.embedding_sensitivity_(self._accumulator(name), parameter, ids, dy, starts, lens)
                return
            touched, grads = ops.embedding_rows(ids, dy, starts, lens, parameter.shape[0])
            grads = (grads * parameter[touched].to(grads.dtype)).abs_()
            columns = torch.stack([ops.tile_sums(row, self.tile) for row in grads])
            self._accumulator(name).index_add_(0, touched // self.tile, columns)
            return
        x = saved.reshape(rows, -1)
        if kind == "conv1d":
            x, dy = dy, x
        if self.tile is None:
            ops.linear_sensitivity_(self._accumulator(name), parameter, x, dy, starts, lens)
        else:
            ops.linear_sensitivity_tiles_(self._accumulator(name), parameter, x, dy, starts, lens, self.tile)

    def _add_abs(self, acc: Tensor, parameter: Tensor, grad: Tensor) -> None:
        if acc.shape == parameter.shape:
            ops.abs_accumulate_(acc, parameter, grad)
            return
        assert self.tile is not None
        whole = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        ops.abs_accumulate_(whole, parameter, grad)
        acc += ops.tile_sums(whole, self.tile)

    def _flush(self) -> None:
        """What waits for the end of a batch: vectors, all at once, and parameters used more than once.

        Of the latter the sum of a sample's uses comes before the absolute value.
        """
        if self.dense:
            accs, parameters, grads = zip(*self.dense, strict=True)
            ops.abs_accumulate_many_(accs, parameters, grads)
            self.dense.clear()
        for name, uses in self.pending.items():
            parameter = self.parameters[name].detach()
            acc = self._accumulator(name)
            for sample in range(self.batch):
                self._add_abs(acc, parameter, self._whole_gradient(parameter, uses, sample))
        self.pending.clear()

    # -- the head, whose logits need not exist

    def _find_head(self, batch: Any, *, head_only: bool = False) -> None:
        """Use the fused head when the model's logits are nothing but its head's product with the model below it.

        head_only: of a tied table, this scorer sees no other use.
        """
        model: Any = self.model
        found = plain_head(model)
        if found is None:
            return
        head, below = found
        name = self._tapped(head.weight)
        uses = sum(m._parameters.get("weight") is head.weight for m in self.model.modules())
        tables = [m for m in self.model.modules() if isinstance(m, nn.Embedding) and m.weight is head.weight]
        if name is None or uses != 1 + len(tables) or len(tables) > 1:
            return
        if tables and type(tables[0]).forward is not nn.Embedding.forward and not head_only:
            # No tap on this table's other use (Gemma scales it): the two uses could not be joined.
            return
        seen: list[Tensor] = []
        handle = head.register_forward_hook(lambda m, args, out: seen.extend((args[0].clone(), out.clone())))
        try:
            with torch.no_grad():
                inputs = {k: v for k, v in batch.items() if k != "labels"}
                logits = _field(model(**inputs, use_cache=False), "logits")
                hidden = below(**inputs, use_cache=False)[0]
        except (TypeError, IndexError, KeyError, RuntimeError):
            return
        finally:
            handle.remove()
        if (
            len(seen) == 2
            and logits is not None
            and torch.equal(hidden, seen[0])
            and torch.equal(logits, seen[1].to(logits))
        ):
            self.fused = (name, head, below)

    def _head_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """`default_loss` without logits; the same checks, the same numbers."""
        assert self.fused is not None
        name, head, below = self.fused
        labels = batch["labels"]
        _check_targets(labels[:, 1:])
        hidden = below(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False)[0]
        weight = head.weight
        assert isinstance(weight, Tensor)

        def record(first: int, p: Tensor) -> None:
            if self.mode == "probe":
                return
            if not self._watch(name, p):
                return
            tokens = self.tokens[-1]
            acc, rows = self._accumulator(name), weight.detach()[first : first + p.shape[1]]
            starts, lens = tokens.spans()
            if self.tile is None:
                ops.linear_sensitivity_(acc[first : first + p.shape[1]], rows, tokens.hidden, p, starts, lens)
                return
            top, stop = first // self.tile, -(-(first + p.shape[1]) // self.tile)
            ops.linear_sensitivity_tiles_(acc[top:stop], rows, tokens.hidden, p, starts, lens, self.tile)

        return head_losses(self.anchor, hidden, weight.detach(), labels, record, self.tokens, self.tile or 1)

    def _join_tied(self, name: str, ids: Tensor, dy: Tensor) -> None:
        """The embedding's part of a tied table: only rows a sample touched change, |H + E| − |H| (DESIGN, section 5.6)."""
        layout = self._rows(dy)
        if layout is None:
            raise _RestartError
        rows, starts, lens = layout
        parameter = self.parameters[name].detach()
        flat_ids, flat = ids.reshape(rows), dy.reshape(rows, -1)
        for sample in range(self.batch):
            one = slice(sample, sample + 1)
            touched, e = ops.embedding_rows(flat_ids, flat, starts[one], lens[one], parameter.shape[0])
            h, table = self._head_rows(name, sample, touched), parameter[touched]
            change = ((h + e).abs_() - h.abs()) * table.to(e.dtype).abs()
            acc = self._accumulator(name)
            if self.tile is None:
                acc.index_add_(0, touched, change.to(acc.dtype))
            else:
                columns = torch.stack([ops.tile_sums(row, self.tile) for row in change])
                acc.index_add_(0, touched // self.tile, columns)

    def _head_rows(self, name: str, sample: int, ids: Tensor) -> Tensor:
        """Rows `ids` of the gradient that one sample gives to the fused head, computed again."""
        tokens, table = self.tokens[-1], self.parameters[name].detach()[ids]
        starts, counts = tokens.spans()
        part = slice(int(starts[sample]), int(starts[sample] + counts[sample]))
        work = tokens.lse.dtype
        p = probabilities(tokens, part, table, None, ids).to(table.dtype).to(work)
        return p.t() @ tokens.hidden[part].to(work)

    def _whole_gradient(self, parameter: Tensor, uses: list[tuple[str, Tensor, Tensor]], sample: int) -> Tensor:
        work = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        grad = torch.zeros(parameter.shape, dtype=work, device=parameter.device)
        for kind, saved, dy in uses:
            if kind == "dense":
                grad += dy[sample]
                continue
            layout = self._rows(dy)
            if layout is None:
                raise _RestartError
            rows, starts, lens = layout
            part = slice(int(starts[sample]), int(starts[sample] + lens[sample]))
            d = dy.reshape(rows, -1)[part].to(work)
            if kind == "embedding":
                grad.index_add_(0, saved.reshape(rows)[part], d)
                continue
            x = saved.reshape(rows, -1)[part].to(work)
            left, right = (x, d) if kind == "conv1d" else (d, x)
            grad.addmm_(left.t(), right)
        return grad

    def _on_gradient(self, name: str, parameter: Tensor) -> None:
        """Autograd delivered a gradient: some use of the parameter went past the taps."""
        grad, parameter.grad = parameter.grad, None
        assert grad is not None
        if self.mode == "probe" or (self.batch > 1 and not self.one_by_one):
            raise _RestartError
        if self.uses[name]:
            self.untapped.add(name)
            raise _RestartError
        self.delivered.add(name)
        if self.mode == "measure":
            self._watch(name, grad)
            return
        self.sums.append((name, grad.sum(dtype=torch.float32).view(1)))
        self._add_abs(self._accumulator(name), parameter.detach(), grad)

    # -- driving

    def run(self, batches: list[Any], sizes: list[int], loss_fn: LossFn, advance: Callable[[int], None]) -> list[float]:
        """Score all batches; begins again, knowing more, when a parameter turns out to need another way."""
        if loss_fn is default_loss:
            if _real_lengths(batches[0]) is not None:
                self._find_head(self._to_device(_slice(batches[0], slice(0, 1), _PROBE_TOKENS)))
            if self.fused is not None:
                loss_fn = self._head_loss
        if max(sizes) > 1:
            self._probe_layout(next(b for b, n in zip(batches, sizes, strict=True) if n > 1), loss_fn)
        while True:
            self._reset()
            advance(0)
            losses: list[float] = []
            known = (len(self.shared), len(self.untapped), self.one_by_one)
            try:
                for batch, size in zip(batches, sizes, strict=True):
                    pieces = [batch]
                    if size > 1 and self.one_by_one:
                        pieces = [_one_sample(batch, j) for j in range(size)]
                    for piece in pieces:
                        losses += self._score(piece, batch_size(piece), loss_fn, len(losses))
                        advance(len(losses))
                return losses
            except _RestartError:
                if known == (len(self.shared), len(self.untapped), self.one_by_one):
                    if self.one_by_one:
                        raise PktError(
                            "the model's use of its parameters changes between two runs; score it in eval mode"
                        ) from None
                    self.one_by_one = True

    def _set_layout(self, batch: Any, size: int) -> None:
        device = self.anchor.device
        lengths = _real_lengths(batch)
        first = next((t for t in _tensors(batch) if t.ndim > 1), None)
        self.batch = size
        self.width = first.shape[1] if first is not None else 1
        self.lens = None if lengths is None else torch.tensor(lengths, device=device)
        self.layouts: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}

    def _to_device(self, batch: Any) -> Any:
        device = self.anchor.device

        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        if isinstance(batch, Tensor):
            return move(batch)
        if isinstance(batch, Mapping):
            return {k: move(v) for k, v in batch.items()}
        return type(batch)(move(v) for v in batch)

    def _probe_layout(self, batch: Any, loss_fn: LossFn) -> None:
        """Run two short samples and check that the gradients of the first stay in its own rows."""
        tokens = None
        if loss_fn in (default_loss, self._head_loss) and _real_lengths(batch) is not None:
            tokens = _PROBE_TOKENS
        try:
            small = self._to_device(_slice(batch, slice(0, 2), tokens))
        except (TypeError, IndexError):
            small = self._to_device(batch)
        if tokens is not None:
            small["labels"] = small["input_ids"]
            small["attention_mask"] = torch.ones_like(small["attention_mask"])
        self._set_layout(small, batch_size(small))
        self._begin_batch()
        self.mode = "probe"
        try:
            with torch.enable_grad():
                losses = loss_fn(self.model, small)
                if losses.ndim == 0:
                    self.one_by_one = True
                elif losses.requires_grad:
                    losses[0].backward()
        except (_RestartError, RuntimeError, _SampleError):
            # Not a verdict on the model: scored one sample at a time, a real fault shows itself again.
            self.one_by_one = True
        finally:
            self.mode = "score"
            self._drop_gradients()

    def _drop_gradients(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def _score(self, batch: Any, size: int, loss_fn: LossFn, done: int) -> list[float]:
        """Forward and backward of one batch. Raises `PktError` naming the sample that spoils it."""
        batch = self._to_device(batch)
        self._set_layout(batch, size)
        self._begin_batch()
        self.tokens.clear()
        with torch.enable_grad():
            try:
                losses = loss_fn(self.model, batch)
            except _SampleError as error:
                raise PktError(f"sample {done + error.sample} {error}") from None
            if losses.ndim == 0 and size > 1:
                raise _RestartError
            losses = losses.reshape(-1)
            if losses.shape[0] != size:
                raise PktError(f"loss_fn returned {losses.shape[0]} losses for a batch of {size} samples")
            values = losses.detach().double().cpu().tolist()
            for j, value in enumerate(values):
                if not math.isfinite(value):
                    raise PktError(f"the loss of sample {done + j} is {value}; {self._blame()}")
            if not losses.requires_grad:
                raise PktError(
                    "the loss does not depend on the parameters to be scored (is it computed under no_grad?)"
                )
            scale = self._choose_scale(losses) if self.half else 1.0
            self._set_scale(scale)
            (losses * scale).sum().backward()
        self._check_finite(done)
        self._flush()
        return values

    def _blame(self) -> str:
        """What to do about a value that is not finite: a damaged parameter explains it, otherwise the sample or the type."""
        for name, parameter in self.model.named_parameters():
            if not bool(parameter.detach().isfinite().all()):
                return f"parameter {name} itself holds NaN or Inf: the checkpoint is damaged, copy it again"
        return "every parameter is finite, so look at that sample, or load the model in fp32 or bf16"

    def _choose_scale(self, losses: Tensor) -> float:
        """A power of two that keeps fp16 gradients from underflow and overflow, found by a backward that only looks."""
        scale = 2.0**10
        self.mode = "measure"
        try:
            while True:
                self._begin_batch()
                (losses * scale).sum().backward(retain_graph=True)
                peak = float(self.peak) if self.peak is not None else 0.0
                if math.isfinite(peak) or scale < 2.0**-8:
                    break
                scale /= 2.0**6
        finally:
            self.mode = "score"
        self._begin_batch()
        if 0 < peak < math.inf:
            scale *= 2.0 ** (12 - math.frexp(peak)[1])
        return min(scale, 2.0**40)

    def _set_scale(self, scale: float) -> None:
        if scale != self.scale:
            for acc in self.acc.values():
                acc *= scale / self.scale
            self.scale = scale

    def _check_finite(self, done: int) -> None:
        """One read of the device per batch, naming the first parameter (in backward order) and sample gone wrong."""
        if not self.sums:
            return
        device = self.anchor.device
        good = torch.stack([total.isfinite().all().to(device) for _, total in self.sums])
        if bool(good.all()):
            return
        name, total = self.sums[int((~good).nonzero()[0, 0])]
        sample = int((~total.isfinite()).nonzero()[0, 0]) if len(total) == self.batch else 0
        which = (
            f"sample {done + sample}" if len(total) == self.batch else f"one of samples {done}..{done + self.batch - 1}"
        )
        raise PktError(
            f"the gradient of {name} is not finite for {which} (the first seen, from the output down); {self._blame()}"
        )

    def finish(self) -> dict[str, Tensor]:
        """The scores by parameter, in the model's order; zero for parameters that no sample reached."""
        scores = {}
        for name, parameter in self.parameters.items():
            acc = self._accumulator(name)
            if self.scale != 1.0:
                acc /= self.scale
            if self.tile is not None and parameter.ndim == 1:
                acc = ops.tile_sums(acc, self.tile)
            scores[name] = acc
        self.scale = 1.0
        return scores


def _one_sample(batch: Any, index: int) -> Any:
    """One sample of a batch without its right padding."""
    sample = _slice(batch, slice(index, index + 1))
    lengths = _real_lengths(sample)
    return sample if lengths is None else _slice(sample, slice(0, 1), max(1, lengths[0]))


def _restorer(parameter: Tensor) -> Callable[[], None]:
    grad, requires_grad = parameter.grad, parameter.requires_grad

    def restore() -> None:
        parameter.grad = None
        parameter.requires_grad_(requires_grad)
        parameter.grad = grad

    return restore


def _put_forward(module: nn.Module, forward: Any) -> None:
    del module.__dict__["forward"]
    if forward is not None:
        module.__dict__["forward"] = forward
