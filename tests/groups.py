"""Process groups on gloo that many checks share: ranks are started once and do what they are given, one thing after another."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# Processes are forked from one that has imported everything and computed nothing.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["transformers.models.llama.modeling_llama", "pkt.transferring", "oracle"])


class Failure(NamedTuple):
    """What a rank raised."""

    kind: str
    text: str


class Group:
    """So many ranks. Calling it gives `function(group of torch.distributed, *args)` of every rank, or its `Failure`."""

    def __init__(self, world: int, folder: Path) -> None:
        self.world, self.pipes, self.processes = world, [], []
        for rank in range(world):
            here, there = SERVER.Pipe()
            process = SERVER.Process(target=_serve, args=(rank, world, str(folder / "store"), there), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, args))
        return [pipe.recv() if pipe.poll(120) else Failure("Silence", "no answer in 120 s") for pipe in self.pipes]

    def end(self) -> list[int | None]:
        """Exit codes, in order."""
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(30)
        return [process.exitcode for process in self.processes]


def _serve(rank: int, world: int, store: str, pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    while (given := pipe.recv()) is not None:
        function, args = given
        try:
            pipe.send(function(dist.group.WORLD, *args))
        except Exception as error:
            pipe.send(Failure(type(error).__name__, str(error)))
    dist.destroy_process_group()
