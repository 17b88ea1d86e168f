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

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pkt import ops
from pkt.errors import PktError, SampleError
from pkt.models import kind_of, plain_head
from pkt.scoring.batches import batch_size, one_sample, real_lengths, sliced, tensors_of
from pkt.scoring.head import Tokens, head_losses, probabilities
from pkt.scoring.losses import LossFn, check_targets, default_loss, output_field
from pkt.scoring.taps import per_sample_copy, tap

_PROBE_TOKENS = 24


class RestartError(Exception):
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

            return tap(self.anchor, y, x.detach().to(y.dtype), record)

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

            return tap(self.anchor, y, ids, record)

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

            return tap(self.anchor, y, x.detach(), record)

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
                raise RestartError
            for key, name in names.items():
                shape = (self.batch, *[1] * (x.ndim - 2), own[key].shape[0])
                # An instance attribute is found before the registered parameter, which stays where it is.
                module.__dict__[key] = per_sample_copy(
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
                    raise RestartError
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
            raise RestartError
        rows = layout[0]
        if bool(dy.reshape(rows, -1)[rows // self.batch :].count_nonzero()):
            raise RestartError

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
            raise RestartError
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
            raise RestartError
        if self.uses[name] > 1 and name not in self.shared:
            self.shared.add(name)
            raise RestartError
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
            raise RestartError
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
                logits = output_field(model(**inputs, use_cache=False), "logits")
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
        check_targets(labels[:, 1:])
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
            raise RestartError
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
                raise RestartError
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
            raise RestartError
        if self.uses[name]:
            self.untapped.add(name)
            raise RestartError
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
            if real_lengths(batches[0]) is not None:
                self._find_head(self._to_device(sliced(batches[0], slice(0, 1), _PROBE_TOKENS)))
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
                        pieces = [one_sample(batch, j) for j in range(size)]
                    for piece in pieces:
                        losses += self._score(piece, batch_size(piece), loss_fn, len(losses))
                        advance(len(losses))
                return losses
            except RestartError:
                if known == (len(self.shared), len(self.untapped), self.one_by_one):
                    if self.one_by_one:
                        raise PktError(
                            "the model's use of its parameters changes between two runs; score it in eval mode"
                        ) from None
                    self.one_by_one = True

    def _set_layout(self, batch: Any, size: int) -> None:
        device = self.anchor.device
        lengths = real_lengths(batch)
        first = next((t for t in tensors_of(batch) if t.ndim > 1), None)
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
        if loss_fn in (default_loss, self._head_loss) and real_lengths(batch) is not None:
            tokens = _PROBE_TOKENS
        try:
            small = self._to_device(sliced(batch, slice(0, 2), tokens))
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
        except (RestartError, RuntimeError, SampleError):
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
            except SampleError as error:
                raise error.shifted(done) from None
            if losses.ndim == 0 and size > 1:
                raise RestartError
            losses = losses.reshape(-1)
            if losses.shape[0] != size:
                raise PktError(f"loss_fn returned {losses.shape[0]} losses for a batch of {size} samples")
            values = losses.detach().double().cpu().tolist()
            for j, value in enumerate(values):
                if not math.isfinite(value):
                    raise SampleError(f"the loss of {{samples}} is {value}; {self._blame()}", [done + j])
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
        samples: Iterable[int] = range(done, done + self.batch)
        if len(total) == self.batch:
            samples = [done + int((~total.isfinite()).nonzero()[0, 0])]
        raise SampleError(
            f"the gradient of {name} is not finite for {{samples}} (the first seen, from the output down); {self._blame()}",
            samples,
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
