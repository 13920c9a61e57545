"""Where the cells of a study run: one interface, behind it the processes of this machine, a Ray cluster, or SLURM."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

from scl_defense.errors import UserError, nearest
from scl_defense_benchmarks.study.cells import Cell

# Executor -> the library that it needs, which is also the name of the extra's package.
EXECUTORS = {"local": None, "slurm": "submitit", "ray": "ray"}
TRIES = 3  # of a cell whose worker was lost, the first one included


@dataclass(frozen=True)
class Resources:
    """What one cell is given. cpus: also its threads. slurm: options of ``sbatch`` by name, ``{"partition": "gpu"}``.

    gpus: whole ones on SLURM; Ray also shares one out (0.5). ray_address: of the cluster's head, ``host:port``.
    """

    cpus: int | None = None
    gpus: float | None = None
    slurm: Mapping[str, str] = field(default_factory=dict)
    ray_address: str | None = None


@dataclass(frozen=True)
class Ended:
    """How a try at a cell ended. reason: ``None`` when it went well. lost: the worker went, not the cell's own work."""

    reason: str | None
    lost: bool = False


class Job(Protocol):
    """A cell that was handed over. started: monotonic seconds, of its real start where there is a queue before it."""

    cell: Cell
    folder: Path
    started: float


class Executor(Protocol):
    """Runs cells somewhere. A cell works in its own folder, on a file system that study and workers share.

    The study calls from one thread, in this order: enter, ``start`` and ``next`` any number of times, ``stop``, exit.
    """

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def start(self, cell: Cell, folder: Path) -> Job:
        """Hand a cell over; returns at once. Raises :class:`UserError` when it is refused for the user's options."""

    def next(self, seconds: float) -> tuple[Any, Ended | Mapping[str, Any]] | None:
        """What happened: a job and its end, or what its cell says of itself; ``None`` when nothing did in that time."""

    def stop(self, jobs: Sequence[Any]) -> None:
        """Let these save and end, and wait for it, queued ones too; what does not end in time is killed."""


def check(name: str, resources: Resources) -> None:
    """Raises :class:`UserError` for an executor that is unknown or not installed, and for options that it has not."""
    if name not in EXECUTORS:
        raise UserError(f"--executor '{name}' is unknown{nearest(name, EXECUTORS)} ({', '.join(EXECUTORS)})")
    if resources.cpus is not None and resources.cpus < 1:
        raise UserError(f"--cpus {resources.cpus} must be at least 1")
    if resources.gpus is not None and resources.gpus < 0:
        raise UserError(f"--gpus {resources.gpus:g} must be at least 0")
    if name == "local" and resources.gpus is not None:
        raise UserError("--gpus is for --executor slurm and ray; on this machine --set device=cuda and --jobs decide")
    if name != "slurm" and resources.slurm:
        raise UserError(f"--slurm {next(iter(resources.slurm))}=... is for --executor slurm, not {name}")
    if name != "ray" and resources.ray_address is not None:
        raise UserError(f"--ray-address is for --executor ray, not {name}")
    library = EXECUTORS[name]
    if library is not None and importlib.util.find_spec(library) is None:
        raise UserError(
            f"--executor {name} needs the package '{library}': pip install \"scl-defense[{name}]\"; or run with "
            "--executor local"
        )
    if name == "slurm":
        from scl_defense_benchmarks.study.executors.on_slurm import check_options

        check_options(resources)


def make(name: str, resources: Resources, *, threads: int, out: Path) -> Executor:
    """An executor that :func:`check` has let pass. threads: of a cell. out: the study's folder."""
    if name == "slurm":
        from scl_defense_benchmarks.study.executors.on_slurm import Slurm

        return Slurm(resources, threads, out)
    if name == "ray":
        from scl_defense_benchmarks.study.executors.on_ray import Ray

        return Ray(resources, threads)
    from scl_defense_benchmarks.study.executors.local import Local

    return Local(threads)
