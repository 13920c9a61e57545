"""Which process of several this one is, as ``torchrun`` tells it. Imports no torch, for answers that must be quick."""

import os
from typing import NamedTuple


class Launch(NamedTuple):
    """rank: of ``world`` processes in all. local: its number on this machine, of ``local_world``."""

    rank: int
    world: int
    local: int
    local_world: int


def launched() -> Launch | None:
    """Our place among the processes of a ``torchrun``; ``None``: there is one process, and nobody to meet."""
    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local, local_world = int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", world))
    except (KeyError, ValueError):
        return None
    there = "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ
    return Launch(rank, world, local, local_world) if there and world > 1 else None


def leads() -> bool:
    """Whether this process speaks and writes for all."""
    launch = launched()
    return launch is None or launch.rank == 0
