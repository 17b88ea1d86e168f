"""Work that ranks share, on gloo: what comes of it is what one process makes, and what ends one of them ends all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import oracle
import pytest
import torch
import zoo
from groups import Failure, Group
from oracle import seeds
from safetensors.torch import load_file

import pkt
from pkt.files import os_errors
from pkt.ranks import ALONE, Ranks, shared_out
from pkt.streaming.parts import LayeredModel
from pkt.transferring import Listeners, RunFolder, score_checkpoint
from pkt.transferring.job import ScoringJob

# Teachers that are streamed in ways of their own: shared keys and values, a table at both ends, experts, biases.
KINDS = ("Llama", "tied", "Mixtral", "GPT-2")


def build(kind: str, size: str = "teacher") -> Any:
    if kind == "tied":
        return zoo.model("Llama", size, tie_word_embeddings=True)
    return zoo.model(kind, size)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        for size in ("teacher", "student"):
            build(kind, size).save_pretrained(folder / f"{kind}-{size}")
    return folder


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Group]]:
    made = {world: Group(world, tmp_path_factory.mktemp("store")) for world in (2, 3)}
    yield made
    for world, group in made.items():
        assert group.end() == [0] * world


@pytest.fixture(params=[2, 3])
def group(request: pytest.FixtureRequest, groups: dict[int, Group]) -> Group:
    return groups[request.param]


@pytest.fixture
def two(groups: dict[int, Group]) -> Group:
    return groups[2]


@contextlib.contextmanager
def nothing(rank: int) -> Iterator[None]:
    yield


@contextlib.contextmanager
def mixing(rank: int) -> Iterator[None]:
    """Samples of a batch change each other: they are run one by one."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    plain = LlamaMLP.forward
    with patch.object(LlamaMLP, "forward", lambda self, x: plain(self, x) + 1e-3 * x.mean(0, keepdim=True)):
        yield


@contextlib.contextmanager
def pieces(rank: int) -> Iterator[None]:
    """Scores are sent in pieces that no matrix is a multiple of."""
    with patch("pkt.ranks.PIECE", 500):
        yield


@contextlib.contextmanager
def small(rank: int) -> Iterator[None]:
    """The last rank has no memory for two samples at once."""
    plain = LayeredModel.call

    def call(self: LayeredModel, index: int, hidden: Any, recorded: Any) -> Any:
        if rank and hidden.requires_grad and hidden.shape[0] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, index, hidden, recorded)

    with patch.object(LayeredModel, "call", call):
        yield


@contextlib.contextmanager
def failing(rank: int) -> Iterator[None]:
    """The last layer's backward pass fails on one rank, as a damaged sample makes it."""
    plain = LayeredModel.call

    def call(self: LayeredModel, index: int, hidden: Any, recorded: Any) -> Any:
        if rank == 1 and hidden.requires_grad and index == 1:
            raise pkt.PktError("the loss of seeds.jsonl:3 is nan")
        return plain(self, index, hidden, recorded)

    with patch.object(LayeredModel, "call", call):
        yield


@contextlib.contextmanager
def full(rank: int) -> Iterator[None]:
    """The first rank's disk is full when the second part is to be saved."""
    plain = RunFolder.save

    def save(self: RunFolder, name: str, *given: Any) -> None:
        if name.startswith("step-0001"):
            with os_errors(f"writing {name}"):
                raise OSError(errno.ENOSPC, "No space left on device")
        plain(self, name, *given)

    with patch.object(RunFolder, "save", save):
        yield


@contextlib.contextmanager
def other_file(rank: int) -> Iterator[None]:
    """Rank 1 sees a configuration of other content."""
    plain = ScoringJob.inputs

    def inputs(self: ScoringJob) -> dict[str, Any]:
        return {**plain(self), **({"teacher's weights": "other"} if rank == 1 else {})}

    with patch.object(ScoringJob, "inputs", inputs):
        yield


def transfer(
    group: Any, models: Path, kind: str, out: Path | None, count: int = 5, during: Any = nothing, **options: Any
) -> dict[str, Any] | None:
    """What the first rank made, in plain values; None elsewhere. During it, what is patched in every process."""
    settings = {"rank": 4, "batch_size": 2, "progress": False, "keep_scores": "full" if out else "none", **options}
    teacher = settings.pop("teacher", None) or models / f"{kind}-teacher"
    with during(Ranks.of(group).rank):
        found = pkt.transfer(teacher, models / f"{kind}-student", seeds(count), out=out, group=group, **settings)
    return None if found is None else {"plan": found.plan.as_dict(), "losses": found.provenance["losses"]}


def compare(one: dict[str, Any] | None, many: dict[str, Any] | None, folder: Path) -> None:
    """The same layers, windows and losses; S and what is made of it up to the order of sums. They lie in one/ and many/."""
    assert one is not None
    assert many is not None
    regions = [[{k: e[k] for k in ("source", "target", "region")} for e in p["plan"]["entries"]] for p in (one, many)]
    assert regions[0] == regions[1]
    assert many["plan"]["layer_map"] == one["plan"]["layer_map"]
    assert many["losses"] == pytest.approx(one["losses"], rel=1e-6)
    scores = [load_file(folder / name / "scores.safetensors") for name in ("one", "many")]
    assert scores[0].keys() == scores[1].keys()
    for name in scores[0]:
        assert oracle.relative_error(scores[1][name], scores[0][name]) < 1e-6, name
    pairs = [pkt.Extraction.load(folder / name).pairs for name in ("one", "many")]
    for name, pair in pairs[0].items():
        assert oracle.relative_error(pairs[1][name].delta(), pair.delta()) < 1e-6, name


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_transfer_by_ranks_is_that_of_one_process(group: Group, models: Path, kind: str, tmp_path: Path) -> None:
    one = transfer(None, models, kind, tmp_path / "one")
    for name in ("many", "again"):
        many, *others = group(transfer, models, kind, tmp_path / name)
        assert others == [None] * (group.world - 1)
    assert files(tmp_path / "many") == files(tmp_path / "again")
    compare(one, many, tmp_path)
    assert not (tmp_path / ".many.run").exists()


@pytest.mark.parametrize(
    ("kind", "count", "during", "options"),
    [
        ("tied", 1, nothing, {}),
        ("Mixtral", 2, nothing, {"batch_size": 1}),
        ("Llama", 5, mixing, {}),
        ("Llama", 5, pieces, {}),
        ("Llama", 5, nothing, {"select": "random"}),
        ("Llama", 6, nothing, {"energy": 0.9, "layers": "first", "keep_scores": "tiles"}),
    ],
    ids=["fewer seeds than ranks", "alone", "one by one", "in pieces", "factors that wait", "ranks by energy"],
)
def test_so_it_is_where_work_is_shared_out_otherwise(
    groups: dict[int, Group],
    models: Path,
    kind: str,
    count: int,
    during: Any,
    options: dict[str, Any],
    tmp_path: Path,
) -> None:
    group = groups[3 if count < 3 else 2]
    one = transfer(None, models, kind, tmp_path / "one", count, during, **options)
    many, *_ = group(partial(transfer, **options), models, kind, tmp_path / "many", count, during)
    compare(one, many, tmp_path)


def transfer_tasks(group: Any, models: Path, out: Path) -> list[str] | None:
    tasks = {"a": seeds(4), "b": seeds(3, seed=1)}
    names = (models / f"tied-{size}" for size in ("teacher", "student"))
    found = pkt.transfer(*names, tasks, out=out, group=group, rank=4, progress=False, keep_scores="full")
    return None if found is None else sorted(found)


def test_several_tasks_are_read_once_by_all(two: Group, models: Path, tmp_path: Path) -> None:
    assert transfer_tasks(None, models, tmp_path / "one") == ["a", "b"]
    assert two(transfer_tasks, models, tmp_path / "many") == [["a", "b"], None]
    for task in ("a", "b"):
        one, many = (pkt.Extraction.load(tmp_path / out / task) for out in ("one", "many"))
        plans = [{"plan": ext.plan.as_dict(), "losses": ext.provenance["losses"]} for ext in (one, many)]
        (tmp_path / task).mkdir()
        for out in ("one", "many"):
            (tmp_path / task / out).symlink_to(tmp_path / out / task)
        compare(*plans, tmp_path / task)


def test_a_model_that_is_no_chain_is_scored_whole_by_all(two: Group, models: Path, tmp_path: Path) -> None:
    with pytest.warns(pkt.PktWarning, match="scored whole"):
        one = transfer(None, models, "Llama", tmp_path / "one", teacher=no_chain())
    many, *others = two(partial(transfer, teacher=no_chain()), models, "Llama", tmp_path / "many")
    assert others == [None] * (two.world - 1)
    compare(one, many, tmp_path)


def no_chain() -> Any:
    model = zoo.model("Llama")
    model.model.layers[2].mlp = model.model.layers[0].mlp
    return model


@pytest.mark.parametrize(
    ("during", "kind", "text"),
    [
        (failing, "PktError", "the loss of seeds.jsonl:3 is nan"),
        (full, "PktError", "writing step-0001.safetensors: No space left on device"),
    ],
    ids=["a sample", "a full disk"],
)
def test_what_fails_on_one_rank_fails_on_all_and_the_same_call_goes_on(
    two: Group, models: Path, during: Any, kind: str, text: str, tmp_path: Path
) -> None:
    out = tmp_path / "many"
    one = transfer(None, models, "tied", tmp_path / "one")
    told = two(transfer, models, "tied", out, 5, during)
    where = 0 if during is full else 1
    assert isinstance(told[where], Failure)
    assert told[where].kind == kind
    assert told[where].text.startswith(text)
    assert {f.kind for rank, f in enumerate(told) if rank != where} == {"OtherRankError"}
    assert not out.exists()
    state = json.loads((tmp_path / ".many.run" / "run.json").read_text())
    assert state["inputs"]["ranks"] == two.world
    # Another number of ranks would sum in another order.
    with pytest.raises(pkt.PktError, match=f"unfinished run of {two.world} ranks, and 1 would.*--rescore"):
        transfer(None, models, "tied", out)
    again, *_ = two(transfer, models, "tied", out)
    compare(one, again, tmp_path)
    two(transfer, models, "tied", tmp_path / "calm")
    assert files(out) == files(tmp_path / "calm")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calm", "many", "one"]


def test_another_number_of_ranks_may_score_anew(two: Group, models: Path, tmp_path: Path) -> None:
    two(transfer, models, "Llama", tmp_path / "many", 5, failing)
    one = transfer(None, models, "Llama", tmp_path / "many", resume=False)
    assert one == transfer(None, models, "Llama", tmp_path / "one")
    assert files(tmp_path / "many") == files(tmp_path / "one")


def test_too_little_memory_on_one_rank_halves_the_micro_batches_of_all(
    two: Group, models: Path, tmp_path: Path
) -> None:
    one = transfer(None, models, "Llama", tmp_path / "one", 6)
    many, *_ = two(partial(transfer, batch_size=4), models, "Llama", tmp_path / "many", 6, small)
    compare(one, many, tmp_path)


def test_a_rank_that_sees_another_file_is_named(group: Group, models: Path, tmp_path: Path) -> None:
    told = group(transfer, models, "Llama", tmp_path / "many", 5, other_file)
    assert {f.text for f in told} == {
        "rank 1 has other inputs than rank 0 (teacher's weights changed); give every rank the same files and packages"
    } or all("rank 1 has other inputs than rank 0 (teacher's weights" in f.text for f in told)
    assert list(tmp_path.iterdir()) == []


def score(group: Any, models: Path, rows: Path, out: Path) -> bool:
    sens = score_checkpoint(models / "tied-teacher", rows, out, group=group, listeners=Listeners(progress=False))
    return sens is None


def test_scores_alone(two: Group, models: Path, teacher_dir: Path, seed_file: Path, tmp_path: Path) -> None:
    shutil.copytree(teacher_dir, tmp_path / "tied-teacher")
    for who, name in ((None, "one"), (two, "many")):
        out = tmp_path / f"{name}.safetensors"
        found = score(None, tmp_path, seed_file, out) if who is None else who(score, tmp_path, seed_file, out)
        assert found in (False, [False] + [True] * (two.world - 1))
    one, many = (pkt.Sensitivity.load(tmp_path / f"{name}.safetensors") for name in ("one", "many"))
    assert many.losses == pytest.approx(one.losses, rel=1e-6)
    assert one.keys() == many.keys()
    for name in one:
        assert oracle.relative_error(many[name], one[name]) < 1e-6, name


def sens_of(group: Any, wrapped: bool, empty: bool) -> dict[str, Any]:
    """S of a model in memory, each rank with every n-th batch; the last one has none, where it is said."""
    ranks, model = Ranks.of(group), zoo.llama(True)
    batches = oracle.batched(oracle.token_samples(7), 2)
    mine = batches[ranks.rank :: ranks.world - empty] if ranks.rank < ranks.world - empty else []
    if wrapped:
        model = torch.nn.parallel.DistributedDataParallel(model, process_group=group)
    found = pkt.sensitivity(model, mine, group=group, progress=False)
    return {"scores": dict(found), "losses": found.losses}


@pytest.mark.parametrize(("wrapped", "empty"), [(False, False), (True, True)])
def test_sensitivity_is_summed_over_a_group(group: Group, wrapped: bool, empty: bool) -> None:
    whole = pkt.sensitivity(zoo.llama(True), oracle.batched(oracle.token_samples(7), 2), progress=False)
    for found in group(sens_of, wrapped, empty):
        assert sorted(found["losses"]) == pytest.approx(sorted(whole.losses), rel=1e-6)
        assert found["scores"].keys() == whole.keys()
        for name, score in found["scores"].items():
            assert oracle.relative_error(score, whole[name]) < 1e-6, name


def sens_of_sharded(group: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    pkt.sensitivity(fully_shard(zoo.llama()), oracle.batched(oracle.token_samples(2), 2), progress=False)


def sens_of_others(group: Any) -> None:
    model = zoo.llama(layers=2 + Ranks.of(group).rank)
    pkt.sensitivity(model, oracle.batched(oracle.token_samples(2), 2), group=group, progress=False)


def test_models_that_are_sharded_or_differ_are_refused(two: Group) -> None:
    assert all("sharded over the ranks" in told.text for told in two(sens_of_sharded))
    assert all("models with other parameters" in told.text for told in two(sens_of_others))


def test_nothing_is_left_open(two: Group, models: Path, tmp_path: Path) -> None:
    before = two(descriptors)
    for _ in range(3):
        two(transfer, models, "Llama", tmp_path / "out", 3)
        shutil.rmtree(tmp_path / "out")
        two(transfer, models, "Llama", tmp_path / "out", 3, failing)
    assert two(descriptors) == before


def descriptors(group: Any) -> int:
    return len(os.listdir("/proc/self/fd"))


def test_shares_are_even_and_owners_too() -> None:
    shares = shared_out([[9, 7, 6, 5, 2], [8, 1]], 3)
    assert shares == [[[0], [0]], [[1, 4], [1]], [[2, 3], []]]
    ranks = Ranks()
    ranks.world = 2
    assert ranks.owners({"a": 1, "b": 5, "c": 3, "d": 2}) == {"b": 0, "c": 1, "d": 1, "a": 0}
    assert ALONE.all_of(3) == [3]
    assert ALONE.summed({"a": torch.ones(1)}).keys() == {"a"}


def planned(group: Any, models: Path, free: int, **options: Any) -> Any:
    """What the first rank is told of how the weights are read, on a machine with so much free memory."""
    found: list[Any] = []
    memory = patch("pkt.transferring.reader.free_memory", lambda: free)
    with memory, contextlib.suppress(pkt.PktError):
        transfer(group, models, "Llama", None, on_memory=found.append, **options)
    return [plan.shared for plan in found]


def test_the_plan_says_how_ranks_come_by_the_weights(two: Group, models: Path) -> None:
    stored = sum(p.numel() * p.element_size() for p in build("Llama").parameters())
    ((ample,), others) = two(partial(planned, device_memory="400kB"), models, 10**9)
    assert others == []
    assert ample.way == "once"
    assert (len(ample.device), ample.passes) == (2, 2)
    assert ample.weights == pytest.approx(stored, rel=0.05)
    held = 10**9 - ample.cache
    assert held >= sum(ample.device)
    for left, way in ((ample.weights, "once"), (ample.weights - 1, "together"), (3 * ample.part - 1, "apart")):
        ((found,), _) = two(partial(planned, device_memory="400kB"), models, held + left)
        assert (found.cache, found.way) == (left, way)
    ((kept,), _) = two(planned, models, 10**9)
    assert kept.passes == 1
    assert planned(None, models, 10**9) == [None]
