"""A model whose tensors come and go: what precedes its decoder layers, each layer, and what follows them.

Its layers are recorded and replayed: the model runs with its layers replaced by recorders, which yields every layer's own
arguments (masks, rotary embeddings) for any architecture, and each layer can then be called on them by itself.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from pkt.models import all_tensors, hidden_size, layer_of, tables_of
from pkt.streaming.loader import Loader, NotLayeredError, Teacher

Key: TypeAlias = int | Literal["head", "front"]  # a decoder layer, what follows them, what precedes them


class LayeredModel:
    """A teacher's parts: their tensors are in their modules' places inside `loaded`, and each part runs by itself.

    layer_names, front, head: the names of each part's tensors (front and head are learnt in `watching`); tied: a table in
    both. Raises `NotLayeredError` for a model that is not a plain chain of layers.
    """

    def __init__(
        self,
        teacher: Teacher,
        device: torch.device,
        num_layers: int,
        prefix: str,
        *,
        prefetch: bool,
        resident: bool,
    ) -> None:
        self.model, self.device, self.count, self.prefix = teacher.model, device, num_layers, prefix
        self.stored_as = teacher.stored_as
        self.loader = (
            None
            if teacher.source is None
            else Loader(teacher.source, device, teacher.dtypes(), prefetch=prefetch, resident=resident)
        )
        self.layers = [self.model.get_submodule(f"{prefix}.{i}") for i in range(num_layers)]
        self._map_names()
        self.active: set[tuple[str, ...]] = set()
        self.width: int | None = None  # outputs of a layer that returns a tuple

    def _map_names(self) -> None:
        """Canonical names, all places of each tensor, and the part it belongs to."""
        self.places: dict[str, list[tuple[nn.Module, str, bool]]] = {}
        canonical: dict[int, str] = {}
        parts: dict[str, set[int | None]] = {}
        modules = dict(self.model.named_modules(remove_duplicate=False))
        for name, tensor in all_tensors(self.model):
            first = canonical.setdefault(id(tensor), name)
            owner, _, key = name.rpartition(".")
            self.places.setdefault(first, []).append((modules[owner], key, isinstance(tensor, nn.Parameter)))
            parts.setdefault(first, set()).add(layer_of(name, self.prefix))
        mixed = [name for name, found in parts.items() if len(found) > 1]
        if mixed:
            raise NotLayeredError(f"{mixed[0]} is shared between decoder layers")
        part_of = {name: next(iter(found)) for name, found in parts.items()}
        self.layer_names = [tuple(n for n in self.places if part_of[n] == i) for i in range(self.count)]
        self.outside = tuple(n for n in self.places if part_of[n] is None)
        self.scored = {n for n, p in self.model.named_parameters() if p.is_floating_point()}
        self.front: tuple[str, ...] = ()
        self.head: tuple[str, ...] = ()
        self.tied: str | None = None

    @contextlib.contextmanager
    def loaded(self, names: tuple[str, ...], then: tuple[str, ...] | None = None) -> Iterator[None]:
        """The named tensors are in their modules' places inside."""
        if self.loader is None or not names:
            yield
            return
        if names in self.active:
            self.loader.expect(None if then is None else self._stored(then))
            yield
            return
        self.active.add(names)
        tensors = self.loader.get(self._stored(names), None if then is None else self._stored(then))
        undo = []
        for name in names:
            tensor = tensors[self.stored_as[name]]
            value = nn.Parameter(tensor) if self.places[name][0][2] and tensor.is_floating_point() else tensor
            for module, key, is_parameter in self.places[name]:
                table: dict[str, Any] = module._parameters if is_parameter else module._buffers
                undo.append((table, key, table[key]))
                table[key] = value
        try:
            yield
        finally:
            for table, key, old in undo:
                table[key] = old
            self.active.discard(names)
            self.loader.release(self._stored(names))

    def _stored(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(self.stored_as[name] for name in names)

    def weight(self, name: str) -> Tensor:
        module, key, _ = self.places[name][0]
        value = module._parameters.get(key)
        assert value is not None
        return value.detach()

    @contextlib.contextmanager
    def weights_of(self, key: Key) -> Iterator[Callable[[str], Tensor]]:
        """A part's parameters once more, for what could not be decided while they were there."""
        with self.loaded(self.names_of(key)):
            yield self.weight

    def names_of(self, key: Key) -> tuple[str, ...]:
        return self.layer_names[key] if isinstance(key, int) else self.head if key == "head" else self.front

    def module_of(self, key: Key) -> tuple[nn.Module, str]:
        """What runs a part, and its name in the model: of a layer the layer alone, for a walk through all takes long."""
        return (self.layers[key], f"{self.prefix}.{key}") if isinstance(key, int) else (self.model, "")

    # -- running layers that are not there

    @contextlib.contextmanager
    def _replaced(self, handler: Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], Tensor]) -> Iterator[None]:
        """While active, decoder layer i returns handler(i, hidden states, other arguments) instead of computing."""

        def make(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                named = not args
                hidden = kwargs.pop("hidden_states") if named else args[0]
                return self._shaped(handler(index, hidden, (named, *args[1:]), kwargs))

            return forward

        before = [layer.__dict__.get("forward") for layer in self.layers]
        try:
            for index, layer in enumerate(self.layers):
                layer.forward = make(index)
            yield
        finally:
            for layer, old in zip(self.layers, before, strict=True):
                layer.__dict__.pop("forward", None)
                if old is not None:
                    layer.__dict__["forward"] = old

    def _shaped(self, hidden: Tensor) -> Any:
        return hidden if self.width is None else (hidden, *[None] * (self.width - 1))

    def call(self, index: int, hidden: Tensor, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
        """The real layer on recorded arguments."""
        (named, *args), kwargs = call
        layer = self.layers[index]
        out = layer(hidden_states=hidden, **kwargs) if named else layer(hidden, *args, **kwargs)
        if isinstance(out, tuple):
            if any(isinstance(value, Tensor) for value in out[1:]):
                raise NotLayeredError(f"layer {index} returns more than hidden states")
            self.width = len(out)
            out = out[0]
        if not isinstance(out, Tensor):
            raise NotLayeredError(f"layer {index} returns {type(out).__name__}, not hidden states")
        return out

    def _inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        inputs: dict[str, Any] = {k: v.to(self.device) for k, v in batch.items() if k != "labels"}
        inputs["use_cache"] = False
        return inputs

    def to_first_layer(self, batch: dict[str, Tensor]) -> Tensor:
        """Hidden states before layer 0, with their graph."""

        def handler(index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            raise _ReachedError(hidden)

        with self._replaced(handler):
            try:
                self.model(**self._inputs(batch))
            except _ReachedError as reached:
                return reached.hidden
        raise NotLayeredError("its forward pass does not call its decoder layers")

    def record(self, batch: dict[str, Tensor]) -> tuple[Tensor, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
        """Hidden states before layer 0 and every layer's other arguments. Checks that the layers form a chain."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        first: list[Tensor] = []

        def handler(index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            if index != len(calls):
                raise NotLayeredError(
                    f"its layers do not run once each in order (layer {index} as number {len(calls)})"
                )
            if first and hidden is not first[0]:
                raise NotLayeredError(f"something happens between layers {index - 1} and {index}")
            if any(t.requires_grad for t in _tensors_in((args, kwargs))):
                raise NotLayeredError(f"layer {index} uses parameters or hidden states from outside")
            first.append(hidden)
            calls.append((args, kwargs))
            if index == self.count - 1:
                raise _ReachedError(hidden)
            return hidden

        with torch.enable_grad(), self._replaced(handler):
            try:
                self.model(**self._inputs(batch))
            except _ReachedError as reached:
                return reached.hidden.detach(), calls
        raise NotLayeredError("its forward pass leaves out some of its decoder layers")

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Note which modules outside the layers run before them, loading each when it is called."""
        called: dict[str, None] = {}
        owner_of: dict[int, list[str]] = {}
        for name in self.outside:
            for module, _, _ in self.places[name]:
                owner_of.setdefault(id(module), []).append(name)
        with contextlib.ExitStack() as stack:

            def before(module: nn.Module, args: Any) -> None:
                for name in owner_of[id(module)]:
                    if name not in called:
                        called[name] = None
                        stack.enter_context(self.loaded((name,)))
                        for owner, key, is_parameter in self.places[name]:
                            parameter = owner._parameters.get(key) if is_parameter else None
                            if parameter is not None and parameter.is_floating_point():
                                stack.callback(parameter.requires_grad_, parameter.requires_grad)
                                parameter.requires_grad_()
                ran.add(id(module))

            ran: set[int] = set()
            for module in self.model.modules():
                if id(module) in owner_of:
                    stack.callback(module.register_forward_pre_hook(before).remove)
            yield
            self.front = tuple(called)
            after = [n for n in self.outside if any(id(m) not in ran for m, _, _ in self.places[n])]
            self.head = tuple(after)
            both = [n for n in after if n in called]
            if len(both) > 1:
                raise NotLayeredError(f"{len(both)} tables are used before and after the layers")
            self.tied = both[0] if both else None

    def learn_width(self, batch: dict[str, Tensor]) -> None:
        """Whether a layer returns a tuple must be known before any is replaced: a model may take the first of it."""
        calls: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

        def handler(index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            calls.append((hidden, args, kwargs))
            raise _ReachedError(hidden)

        with self._replaced(handler), contextlib.suppress(_ReachedError):
            self.model(**self._inputs(batch))
        for hidden, args, kwargs in calls:
            self.call(0, hidden, (args, kwargs))

    @contextlib.contextmanager
    def after_layers(self, batch: dict[str, Tensor], leaf: Tensor) -> Iterator[dict[str, Tensor]]:
        """The model's inputs; inside, its last layer returns `leaf`."""

        def handler(index: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            return leaf if index == self.count - 1 else hidden

        inputs = {k: v.to(self.device) for k, v in batch.items()}
        if self._takes_embeddings():
            # The table itself need not be there: nothing of what precedes the layers reaches the head.
            del inputs["input_ids"]
            inputs["inputs_embeds"] = torch.zeros_like(leaf, requires_grad=True)
        with self._replaced(handler), self._lazily(self.front):
            yield inputs

    def _takes_embeddings(self) -> bool:
        """Whether it can be given hidden states in place of token ids."""
        same = getattr(tables_of(self.model)[0], "embedding_dim", None) == hidden_size(self.model)
        return same and "inputs_embeds" in inspect.signature(self.model.forward).parameters

    @contextlib.contextmanager
    def _lazily(self, names: tuple[str, ...]) -> Iterator[None]:
        """Load what is called of `names` (position embeddings, say) for as long as it is needed."""
        if self.loader is None:
            yield
            return
        owners: dict[int, list[str]] = {}
        for name in names:
            if name not in self.head:
                for module, _, _ in self.places[name]:
                    owners.setdefault(id(module), []).append(name)
        with contextlib.ExitStack() as stack:

            def before(module: nn.Module, args: Any) -> None:
                for name in owners.pop(id(module), ()):
                    stack.enter_context(self.loaded((name,)))

            for module in self.model.modules():
                if id(module) in owners:
                    stack.callback(module.register_forward_pre_hook(before).remove)
            yield

    def first_bad_parameter(self) -> str | None:
        """The first parameter of the whole teacher that is not finite; read again, for it is asked only when all is lost."""
        for names in (self.front, *self.layer_names, self.head):
            with self.loaded(names):
                for name in names:
                    if name in self.scored and not bool(self.weight(name).isfinite().all()):
                        return name
        return None

    def close(self) -> None:
        if self.loader is not None:
            self.loader.close()


class _ReachedError(Exception):
    """The forward pass came to where it was wanted."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from itertools.chain.from_iterable(map(_tensors_in, value.values()))
    elif isinstance(value, (tuple, list)):
        yield from itertools.chain.from_iterable(map(_tensors_in, value))
