"""A smaller model out of a larger one's own units: chosen by score, gathered as they are, ready to be healed."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pkt.errors import PktError
from pkt.matching.cutting import Cutter
from pkt.matching.lineage import Lineage
from pkt.matching.matrices import Matrices
from pkt.models import HEAD_NORMS, SIZES, Model, ModelSpec, Target, embedding_scale, unit_offset

# What the rows and the columns of a role are units of; its group's key/value heads stand for a query too.
_ROWS = {
    "router": "experts",
    "q": "queries",
    "k": "groups",
    "v": "groups",
    "gate": "neurons",
    "up": "neurons",
    "o": "hidden",
    "down": "hidden",
}
_COLUMNS = {"o": "queries", "down": "neurons"}
_SPOKEN = {
    "hidden": "hidden units",
    "neurons": "neurons a layer",
    "groups": "key/value groups a layer",
    "layers": "layers",
    "queries": "heads a group",
    "experts": "experts a layer",
}


@dataclass(frozen=True)
class Shape:
    """What a shrunk model keeps: hidden units, FFN neurons (of each expert), key/value groups, layers; queries of each group and
    experts (None: all)."""

    hidden: int
    neurons: int
    groups: int
    layers: int
    queries: int | None = None
    experts: int | None = None

    def __str__(self) -> str:
        share = "" if self.queries is None else f" of {self.queries} heads"
        share += "" if self.experts is None else f", {self.experts} experts"
        return (
            f"{self.layers} layers of {self.hidden} hidden units, {self.neurons} neurons, {self.groups} groups{share}"
        )


def shape_of(model: Matrices) -> Shape:
    """A model's own shape, of its first layer. Raises `PktError` for one whose units are not all known."""
    check_shrinkable(model.spec)
    heads, groups = model.heads(0)
    if not groups or not (model.has("up", 0) and model.has("down", 0)):
        raise PktError(
            f"{model.spec.name}: the heads or neurons of its layers are not known by name: it cannot be shrunk"
        )
    counts = {model.experts(layer) for layer in range(model.spec.num_layers)}
    if len(counts) > 1:
        raise PktError(f"{model.spec.name} cannot be shrunk: some of its layers have experts and others have not")
    neurons = model.index["down", 0][0].shape[1]
    return Shape(model.hidden, neurons, groups, model.spec.num_layers, heads // groups, counts.pop() or None)


def check_shrinkable(spec: ModelSpec) -> None:
    """Raises `PktError` for a model that has units of which pkt cannot take some."""
    why = "it reads more than text" if spec.multimodal else ""
    why = why or ("" if spec.num_layers else "it has no decoder layers that pkt knows")
    for target in spec.targets:
        if target.doubt or (target.layer is not None and not all(role in _ROWS for role, _ in target.roles())):
            why = why or f"what the units of {target.module} are is not known"
    if why:
        raise PktError(f"{spec.name} cannot be shrunk: {why}; shrink a model of which `pkt models` knows every matrix")


class UnitScores:
    """What each unit of a model is worth: the sum of the scores of all matrices it touches, added as they come.

    hidden [hidden]; layers [layers]; for each layer neurons (of all its experts, one after another), groups, queries, experts.
    """

    def __init__(self, old: Matrices) -> None:
        whole = shape_of(old)
        self.old, count = old, whole.layers
        self.layers = torch.zeros(count, dtype=torch.float64)
        self.hidden = torch.zeros(whole.hidden, dtype=torch.float64)
        heads = [old.heads(layer) for layer in range(count)]
        sizes = [max(1, old.experts(i)) * old.index["down", i][0].shape[1] for i in range(count)]
        self.neurons = [torch.zeros(size, dtype=torch.float64) for size in sizes]
        self.queries = [torch.zeros(queries, dtype=torch.float64) for queries, _ in heads]
        self.groups = [torch.zeros(groups, dtype=torch.float64) for _, groups in heads]
        self.experts = [torch.zeros(old.experts(i), dtype=torch.float64) for i in range(count)]

    def add(self, scores: Mapping[str, Tensor]) -> None:
        """Add scores of parameters, in their shapes; those of no matrix are left alone."""
        targets = {target.parameter: target for target in (*self.old.spec.targets, *self.old.others)}
        for name, target in targets.items():
            if name in scores:
                for expert in range(target.experts) if target.experts else (None,):
                    self._add_matrix(target, target.oriented(scores[name], expert).double(), expert)

    def _add_matrix(self, target: Target, scores: Tensor, expert: int | None) -> None:
        layer = target.layer
        if layer is None:
            if scores.shape[1] == len(self.hidden):
                self.hidden += scores.sum(0)
            return
        self.layers[layer] += scores.sum()
        if expert is not None:
            self.experts[layer][expert] += scores.sum()
        for role, rows in target.roles():
            part = torch.cat([scores[a:b] for a, b in rows])
            self._add(_ROWS[role], layer, part.sum(1), expert)
            self._add(_COLUMNS.get(role, "hidden"), layer, part.sum(0), expert)

    def _add(self, axis: str, layer: int, sums: Tensor, expert: int | None) -> None:
        """Sums of single rows or columns; a head's are added up, and a query's are its group's too."""
        if axis == "hidden":
            self.hidden += sums
            return
        units = getattr(self, axis)[layer]
        if expert is not None:
            units = units.view(len(self.experts[layer]), -1)[expert]
        found = sums.view(len(units), -1).sum(1)
        units += found
        if axis == "queries":
            self.groups[layer] += found.view(len(self.groups[layer]), -1).sum(1)

    def draw(self, generator: torch.Generator) -> None:
        """Random scores in their place."""
        for units in (self.layers, self.hidden, *self.neurons, *self.queries, *self.groups, *self.experts):
            units.copy_(torch.rand(len(units), generator=generator, dtype=torch.float64))

    def check(self, shape: Shape) -> None:
        """Raises `PktError` for a shape that is not a part of the model's."""
        whole = shape_of(self.old)
        for name in ("hidden", "neurons", "groups", "layers", "queries", "experts"):
            asked, there = getattr(shape, name), getattr(whole, name)
            if asked is not None and not 0 < asked <= (there or 0):
                raise PktError(
                    f"{self.old.spec.name} has {there or 0} {_SPOKEN[name]}, and {asked} are asked for; a part of them can be kept"
                )

    def choose(self, shape: Shape) -> Lineage:
        """The units with the largest scores, in their order. Raises `PktError` for a shape that the model does not have."""
        spec = self.old.spec
        self.check(shape)
        layers = _largest(self.layers, shape.layers)
        found = Lineage(
            spec.identity(), {}, _largest(self.hidden, shape.hidden), layers, verdict="descends", reason="cut from it"
        )
        for layer in layers:
            groups = _largest(self.groups[layer], shape.groups)
            queries = self.queries[layer].view(len(self.groups[layer]), -1)
            kept = queries.shape[1] if shape.queries is None else shape.queries
            neurons = self.neurons[layer].view(max(1, len(self.experts[layer])), -1)
            experts = _largest(self.experts[layer], shape.experts or len(self.experts[layer]))
            found.experts.append(experts)
            found.neurons.append([i for e in experts or [0] for i in _largest(neurons[e], shape.neurons)])
            found.groups.append([[g] for g in groups])
            found.queries.append([g * queries.shape[1] + q for g in groups for q in _largest(queries[g], kept)])
        return found


def choose_units(old: Matrices, scores: Mapping[str, Tensor], shape: Shape) -> Lineage:
    """The units of `old` with the largest score, Σ over all matrices they touch; layers by the score of all of theirs.

    scores: parameter -> S, in the parameter's shape (`pkt.sensitivity`, |W|, ...). Raises `PktError` for a shape that the
    model does not have.
    """
    units = UnitScores(old)
    units.add(scores)
    return units.choose(shape)


def _largest(scores: Tensor, count: int) -> list[int]:
    return [int(i) for i in scores.topk(count).indices.sort().values]


def shrunk_config(old: Matrices, shape: Shape, layers: list[int] | None = None) -> Any:
    """The model's configuration in another shape. layers: the layers kept, for the settings that are listed by layer."""
    config = copy.deepcopy(old.model.config)
    whole, dim = shape_of(old), old.spec.head_dim or 1
    heads = shape.groups * (whole.queries if shape.queries is None else shape.queries)  # type: ignore[operator]
    known = config.to_dict()
    experts = shape.experts or whole.experts
    # Beside experts the FFN's own size is that of layers without, of which there are none here.
    inner = (
        "neurons of an expert"
        if whole.experts and any(n in known for n in SIZES["neurons of an expert"])
        else "neurons"
    )
    values = {"hidden": shape.hidden, inner: shape.neurons, "layers": shape.layers, "heads": heads,
              "groups": shape.groups}  # fmt: skip
    kept = list(range(shape.layers)) if layers is None else layers
    if experts:
        values |= {"experts": experts, "experts at once": min(experts, int(known.get("num_experts_per_tok", 1)))}
    listed = [k for k, v in known.items() if isinstance(v, list) and len(v) == whole.layers and "token" not in k]
    for what in values:
        for name in (n for n in SIZES[what] if n in known or n in getattr(config, "attribute_map", ())):
            setattr(config, name, values[what])
    if dim * heads != shape.hidden or known.get("head_dim") is not None:
        # Where a class works it out from the others, the shapes tell below.
        config.update({"head_dim": dim})
    for name in listed:
        setattr(config, name, [known[name][i] for i in kept])
    config.tie_word_embeddings = old.spec.tied
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def shrunk_model(old: Matrices, shape: Shape, layers: list[int] | None = None) -> Model:
    """The model of another shape, without weights. Raises `PktError` for a shape that its family cannot have."""
    whole = shape_of(old)
    config = shrunk_config(old, shape, layers)
    try:
        getattr(config, "validate", lambda: None)()
    except Exception as error:  # whatever a configuration class raises for sizes that it does not take
        raise PktError(
            f"no {old.spec.model_type} has {shape}: {str(error).splitlines()[-1].strip()} ask for another shape"
        ) from error
    made = Model.of(config)
    found = shape_of(Matrices(made))
    dim, share = old.spec.head_dim or 1, whole.queries if shape.queries is None else shape.queries
    wanted = replace(shape, queries=share, experts=shape.experts or whole.experts)
    if found != wanted or made.spec.head_dim != dim:
        raise PktError(
            f"no {old.spec.model_type} has {wanted}, each head of {dim}: the heads' sizes add up to the hidden units there; "
            f"ask for {dim} hidden units a head"
        )
    return made


def shrink_to(model: Any, found: Lineage, *, rescale: bool = True) -> Any:
    """The model of the units in `found`, in memory, its weights as they are and of the type they are.

    model: a model, or a checkpoint, which is then read a matrix at a time. rescale: the gains of the norms before a product
    times √(H/h), for h of H hidden units: what zeros in place of the others give, since a norm divides by the mean over fewer
    (docs/lineage.md). Raises `PktError` for weights that are not finite.
    """
    old = model if isinstance(model, Matrices) else Matrices(model)
    groups = len(found.groups[0])
    experts = len(found.experts[0]) if found.experts else 0
    neurons = len(found.neurons[0]) // max(1, experts)
    shape = Shape(
        len(found.hidden), neurons, groups, len(found.layers), len(found.queries[0]) // groups, experts or None
    )
    new = Matrices(shrunk_model(old, shape, found.layers))
    small: Any = new.model.hollow(old.parameter(old.index["embed", None][0].parameter).dtype, torch.device("cpu"))
    cutter, factors = Cutter(found, old, new), cut_factors(old, new, rescale)
    with torch.no_grad():
        for name, shape_ in new.shapes.items():
            value = _gathered(cutter, name)
            factor, offset = factors.get(name, (1.0, 0.0))
            if factor != 1:
                value = (value + offset) * factor - offset
            if tuple(value.shape) != shape_:
                raise PktError(
                    f"{old.spec.name}: {name} is {list(value.shape)} once cut and {list(shape_)} in the small model"
                )
            home, _, key = name.rpartition(".")
            owner = small.get_submodule(home)
            owner._parameters[key] = nn.Parameter(value.to(owner._parameters[key].dtype).contiguous())
    small.tie_weights()
    found.student = new.spec.identity()
    return small.eval()


def cut_factors(old: Matrices, new: Matrices, rescale: bool = True) -> dict[str, tuple[float, float]]:
    """(factor, what a stored gain lacks of the gain) of the parameters of the small model that are not as they were."""
    offset = unit_offset(old.spec.model_type)
    louder = math.sqrt(old.hidden / new.hidden) if rescale else 1.0
    norms = [new.norm(before, layer) for before in ("attention", "ffn") for layer in range(new.spec.num_layers)]
    found = {name: (louder, offset) for name in (*norms, new.norm("head", None)) if name}
    # Gemma multiplies its embeddings by what follows from their width; the last norm takes that back for a tied head.
    scale = embedding_scale(old.model.config) / embedding_scale(new.model.config)
    found[new.index["embed", None][0].parameter] = (scale, 0.0)
    last = new.norm("head", None)
    if old.spec.tied and last:
        found[last] = (louder / scale, offset)
    return found


def _gathered(cutter: Cutter, name: str) -> Tensor:
    """A parameter of the small model: its rows and columns of the large one's, fp32."""
    old, new = cutter.old, cutter.new
    target = next((t for t in (*new.others, *new.spec.targets) if t.parameter == name), None)
    if target is None:
        over_heads = name.split(".")[-2] in HEAD_NORMS and new.shapes[name] != (new.spec.head_dim,)
        value = None if over_heads else cutter.vector(name, old.parameter)
    elif len(cutter.roles(target)) < len(target.roles()):
        value = None
    else:
        value = cutter.matrix(target, old.raw)
        value = value.mT if target.kind == "conv1d" else value
    if value is None:
        raise PktError(f"{old.spec.name} cannot be shrunk: what the units of {name} are is not known")
    if not bool(torch.isfinite(value).all()):
        raise PktError(
            f"{old.spec.name}: {name} or its like holds NaN or Inf; the checkpoint is damaged: copy it again"
        )
    return value
