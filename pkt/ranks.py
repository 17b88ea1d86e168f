"""Processes that share one piece of work, through torch.distributed: torchrun's, or a caller's own group (docs/scaling.md).

All that ranks exchange begins with `all_of`, and nothing that can fail comes between it and the tensors that follow. So a rank
that fails says so in its `all_of`, the others learn of it at their next one, and none waits for what does not come. A process
that is killed closes its connections, which ends every exchange with it.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from pkt.errors import PktError
from pkt.heartbeats import BEAT, MISSES, Heartbeat

T = TypeVar("T")

# Of one exchange, during which others may compute for long: a rank that ends closes its connections, and the heartbeat misses one
# whose machine vanishes.
TIMEOUT = datetime.timedelta(hours=12)
PIECE = 1 << 20  # elements of a tensor that are sent at once
PATIENCE = 10.0  # seconds that a rank that failed waits for the others' next exchange, before it ends without them


class OtherRankError(PktError):
    """Another rank failed, and says so itself."""


class LostRankError(PktError):
    """Another rank is gone without a word."""


class _Failed:
    """What a rank that fails gives to `all_of`. error: where all ranks are to go on from it alike."""

    def __init__(self, rank: int, error: Exception | None) -> None:
        self.rank, self.error = rank, error


class Ranks:
    """This process among those that share the work; alone, everything here does nothing and costs nothing.

    rank, world: its number, of how many; beside: those of this machine, here: its place among them. sent: bytes of tensors that it
    gave to others. give_up: how a process ends whose failure the others do not hear in time.
    """

    def __init__(self, group: Any = None) -> None:
        self.group, self.sent = group, 0
        self.give_up: Callable[[Exception], None] | None = None
        self.store: c10d.Store | None = None
        self._known: BaseException | None = None  # what all ranks know of
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world = 1 if group is None else dist.get_world_size(group)
        hosts = self.all_of(socket.gethostname())
        self.beside = [rank for rank, host in enumerate(hosts) if host == hosts[self.rank]]
        self.here = self.beside.index(self.rank)

    @classmethod
    def of(cls, given: Any) -> Ranks:
        """Those of a torch.distributed group, all of which call this; None: alone."""
        if given is None:
            return ALONE
        return given if isinstance(given, Ranks) else cls(given)

    @property
    def alone(self) -> bool:
        return self.world == 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    # -- values

    def all_of(self, value: T) -> list[T]:
        """Every rank's value, by rank. Raises what ends the work where a rank failed, or `LostRankError`."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.world
        with _connected():
            dist.all_gather_object(found, value, self.group)
        failed = next((each for each in found if isinstance(each, _Failed)), None)
        if failed is not None and not isinstance(value, _Failed):
            self._known = failed.error or OtherRankError(f"rank {failed.rank} failed, and says why")
            raise self._known
        return found

    def first_of(self, make: Callable[[], T]) -> T:
        """What `make` gives on the first rank, on all."""
        return self.all_of(make() if self.first else None)[0]  # type: ignore[return-value]

    def joined(self, mine: Mapping[Any, T]) -> dict[Any, T]:
        """Every rank's entries in one dictionary, by rank."""
        return {key: value for part in self.all_of(dict(mine)) for key, value in part.items()}

    def gathered(self, value: T, to: int = 0) -> list[T] | None:
        """Every rank's value, which may hold tensors on the CPU, on one rank; None on the others."""
        if self.alone:
            return [value]
        self.all_of(None)
        found: list[Any] | None = [None] * self.world if self.rank == to else None
        if self.rank != to:
            self.sent += _bytes_in(value)
        with _connected():
            dist.gather_object(value, found, group=self.group, group_dst=to)
        return found

    def scattered(self, values: Sequence[T] | None) -> T:
        """The first rank's values, one for each rank."""
        if self.alone:
            assert values is not None
            return values[0]
        self.all_of(None)
        found: list[Any] = [None]
        with _connected():
            dist.scatter_object_list(found, None if values is None else list(values), group=self.group, group_src=0)
        return found[0]  # type: ignore[no-any-return]

    # -- scores

    def owners(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """A rank for each name, so that all have about as much of the sizes: the largest first, to who has least."""
        loads, found = [0] * self.world, {}
        for name in sorted(sizes, key=lambda n: -sizes[n]):
            rank = loads.index(min(loads))
            loads[rank] += sizes[name]
            found[name] = rank
        return found

    def summed(self, tensors: dict[str, Tensor], *, spread: bool = True) -> dict[str, Tensor]:
        """The sums over all ranks of the tensors that this rank owns; all on the first one unless they are spread.

        Every rank gives the same names and shapes in one order. What is given is used up.
        """
        if self.alone:
            return tensors
        owner = self.owners({n: t.numel() for n, t in tensors.items()}) if spread else dict.fromkeys(tensors, 0)
        self.all_of(None)
        given = {name: tensor for name, tensor in tensors.items() if owner[name] != self.rank}
        self.sent += _bytes_in(given)
        with _connected():
            if any(tensor.is_cuda for tensor in tensors.values()):
                for name, tensor in tensors.items():
                    dist.reduce(tensor, group=self.group, group_dst=owner[name])
            else:
                self._send(given, owner, tensors)
        return {name: tensor for name, tensor in tensors.items() if owner[name] == self.rank}

    def _send(self, given: Mapping[str, Tensor], owner: Mapping[str, int], tensors: Mapping[str, Tensor]) -> None:
        """Tensors to their owners, who add them rank by rank: gloo's ring would send twice as much between two."""
        # In pieces that are added while they are in the cache. Gloo pairs what has one tag as it comes.
        tags = itertools.count()
        pieces = {name: [(part, next(tags)) for part in t.view(-1).split(PIECE)] for name, t in tensors.items()}
        sending = [
            dist.isend(part, group=self.group, group_dst=owner[name], tag=tag)
            for name in given
            for part, tag in pieces[name]
        ]
        for name in (name for name in tensors if name not in given):
            theirs = torch.empty_like(pieces[name][0][0])
            for part, tag in pieces[name]:
                for other in range(self.world):
                    if other != self.rank:
                        dist.recv(theirs[: len(part)], group=self.group, group_src=other, tag=tag)
                        part += theirs[: len(part)]
        for work in sending:
            if work is not None:
                work.wait()

    def totalled(self, tensors: Mapping[str, Tensor]) -> None:
        """Every tensor becomes its sum over all ranks, on all of them."""
        if not self.alone:
            self.all_of(None)
            self.sent += _bytes_in(tensors)
            with _connected():
                for tensor in tensors.values():
                    dist.all_reduce(tensor, group=self.group)

    def copied(self, tensors: Mapping[str, Tensor]) -> None:
        """Every tensor becomes the first rank's."""
        if not self.alone:
            self.all_of(None)
            with _connected():
                for tensor in tensors.values():
                    dist.broadcast(tensor, group=self.group, group_src=0)

    # -- failing together

    @contextlib.contextmanager
    def together(self, *alike: type[Exception]) -> Iterator[None]:
        """What fails inside on one rank fails on all, elsewhere as `OtherRankError`; of the types `alike`, as it is."""
        try:
            yield
        except Exception as error:
            if not (self.alone or error is self._known or isinstance(error, LostRankError)):
                self._known = error
                self._tell(error, error if isinstance(error, alike) else None)
            raise

    def _tell(self, error: Exception, shown: Exception | None) -> None:
        timer = threading.Timer(PATIENCE, self.give_up or _nothing, [error])
        timer.daemon = True
        timer.start()
        with contextlib.suppress(LostRankError):
            others = self.all_of(_Failed(self.rank, shown))
            unlike = (each for each in others if isinstance(each, _Failed) and each.error is None)
            failed = next(unlike, None)
            if shown is not None and failed is not None:
                # One rank could go on from its error, another cannot.
                timer.cancel()
                self._known = OtherRankError(f"rank {failed.rank} failed, and says why")
                raise self._known from error
        timer.cancel()

    def miss(self, rank: int | None) -> None:
        """Give up, from beside an exchange that waits for a rank that gives no sign of life; None: whoever keeps the store."""
        who = f"rank {rank}"
        if rank is None:
            # It would not answer who may speak either.
            self.store, who = None, "the machine that the ranks met on"
        error = LostRankError(
            f"{who} has given no sign of life for {BEAT * MISSES:.0f} seconds (its machine is gone, or it was stopped); "
            "what is finished is kept, and the same command continues"
        )
        (self.give_up or _nothing)(error)

    def speaks(self) -> bool:
        """Whether this rank is the first that has to say how the work ended; asked once."""
        try:
            return self.store is None or self.store.add("pkt/said", 1) == 1
        except RuntimeError:
            return True  # whoever kept the store is gone


@contextlib.contextmanager
def _connected() -> Iterator[None]:
    """What torch says when a connection is closed is a `LostRankError`."""
    try:
        yield
    except RuntimeError as error:
        raise LostRankError(
            "another rank ended without a word (killed, or its memory used up); where there is an output, what is finished is "
            "kept, and the same command continues"
        ) from error


def _nothing(error: Exception) -> None:
    pass


def _bytes_in(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(_bytes_in, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_bytes_in, value))
    return sum(map(_bytes_in, vars(value).values())) if hasattr(value, "__dict__") else 0


ALONE = Ranks()


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that torchrun started, this process one of them; inside, their group: gloo, and nccl where there are GPUs."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(own_gpu())
    store, rank, world = next(rendezvous("env://", timeout=datetime.timedelta(minutes=10)))
    own = c10d.PrefixStore("pkt/group", store)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=own, rank=rank, world_size=world, timeout=TIMEOUT)
    try:
        ranks = Ranks(dist.group.WORLD)
        ranks.store = store
        heart = Heartbeat(c10d.PrefixStore("pkt/alive", store.clone()), rank, world, ranks.miss)
        with contextlib.closing(heart):
            yield ranks
    finally:
        # A group that is left open aborts some processes at their end.
        dist.destroy_process_group()


def own_gpu() -> int:
    """The number of this rank's GPU on its machine. Raises `PktError` where there are fewer GPUs than ranks."""
    number, count = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))), torch.cuda.device_count()
    if number >= count:
        raise PktError(
            f"rank {os.environ['RANK']} has no GPU of its own: this machine shows {count}; start as many ranks "
            f"(--nproc-per-node {count}), or compute on the CPU with CUDA_VISIBLE_DEVICES= and --device cpu"
        )
    return number


def shared_out(lengths: Sequence[Sequence[int]], world: int) -> list[list[list[int]]]:
    """By rank and task, the samples that a rank takes, so that all have about as many tokens.

    lengths: tokens of each task's samples, longest first; a sample goes to the rank that has fewest so far.
    """
    loads = [0] * world
    found: list[list[list[int]]] = [[[] for _ in lengths] for _ in range(world)]
    for task, of_task in enumerate(lengths):
        for sample, tokens in enumerate(of_task):
            rank = loads.index(min(loads))
            loads[rank] += tokens
            found[rank][task].append(sample)
    return found
