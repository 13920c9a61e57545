"""Cells as tasks of a Ray cluster. A task is a process on some node that holds the cell by its rope."""

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from scl_defense.errors import SclDefenseError, UserError
from scl_defense_benchmarks.study.cells import Cell
from scl_defense_benchmarks.study.executors import Ended, Resources
from scl_defense_benchmarks.study.executors.polled import Handed, Polled
from scl_defense_benchmarks.study.executors.task import PATIENCE, Task


class Ray(Polled):
    """The cluster at ``ray_address``, or ``$RAY_ADDRESS``, or the one this machine is in, or one of this machine alone.

    When the study dies its tasks die with it, and their cells save and stop.
    """

    def __init__(self, resources: Resources, threads: int):
        super().__init__()
        self._address = resources.ray_address
        self._threads = threads
        self._needs = {"num_cpus": resources.cpus or threads, "num_gpus": resources.gpus or 0}
        self._ours = False

    def __enter__(self) -> Self:
        import ray

        if not ray.is_initialized():
            self._connect()
            self._ours = True
        # A lost task is tried again by the study, which counts and reports; Ray alone would do it in silence.
        self._run = ray.remote(max_retries=0, scheduling_strategy="SPREAD", **self._needs)(_call)
        return self

    def _connect(self) -> None:
        import ray

        quiet = {"logging_level": "ERROR", "log_to_driver": False}
        address = self._address or os.environ.get("RAY_ADDRESS")
        try:
            knock(address)
            ray.init(address=address or "auto", **quiet)
        except (OSError, ValueError, RuntimeError) as error:
            if address is not None:
                raise UserError(
                    f"no Ray cluster answers at '{address}' ({' '.join(str(error).split())[:200]}); start one with "
                    "'ray start --head' or leave --ray-address out"
                ) from None
            ray.init(include_dashboard=False, **quiet)

    def __exit__(self, *error: object) -> None:
        import ray

        if self._ours:
            ray.shutdown()

    def hand_over(self, cell: Cell, folder: Path) -> Any:
        return self._run.options(name=cell.id).remote(Task(folder, self._threads))

    def look(self, jobs: Sequence[Handed]) -> Mapping[Handed, Ended | str]:
        import ray

        if not jobs:
            return {}
        try:
            ended, _ = ray.wait([job.handle for job in jobs], num_returns=len(jobs), timeout=0)
        except (ray.exceptions.RaySystemError, ConnectionError) as error:
            raise SclDefenseError(f"the Ray cluster is gone: {_short(error)}; what was done is kept") from None
        found: dict[Handed, Ended | str] = {job: _how(job.handle) for job in jobs if job.handle in ended}
        for job in jobs:
            if job not in found and not job.begun and not (job.folder / "progress.json").exists():
                found[job] = self._waits_for()
        return found

    def _waits_for(self) -> str:
        """A cell that is too large for every node would wait in silence; a cluster that grows may get the node yet."""
        import ray

        cpus, gpus = self._needs["num_cpus"], self._needs["num_gpus"]
        sizes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if any(size.get("CPU", 0) >= cpus and size.get("GPU", 0) >= gpus for size in sizes):
            return "for a free node"
        return f"for a node with {cpus} CPUs and {gpus:g} GPUs: the cluster has none of that size now"

    def cancel(self, jobs: Sequence[Handed]) -> None:
        import ray

        left = [job.handle for job in jobs]
        for force in (False, True):
            for one in left:
                ray.cancel(one, force=force)
            try:
                _, left = ray.wait(left, num_returns=len(left), timeout=PATIENCE)
            except KeyboardInterrupt:  # a second Ctrl-C: what was saved is saved
                continue
            if not left:
                return


def knock(address: str | None) -> None:
    """Raises ``OSError`` when nobody listens at ``host:port``: Ray itself would try for minutes."""
    host, colon, port = (address or "").rpartition(":")
    if colon and port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=15).close()


def _call(task: Task) -> dict[str, Any]:
    return task()


def _how(handle: Any) -> Ended:
    import ray

    try:
        return Ended(ray.get(handle)["reason"])
    except ray.exceptions.RayTaskError as error:  # raised in the task: the same everywhere
        return Ended(f"on the worker: {_short(error.cause if error.cause is not None else error)}")
    except ray.exceptions.TaskCancelledError:
        return Ended("cancelled from outside")
    except ray.exceptions.RayError as error:
        return Ended(f"the worker was lost ({type(error).__name__})", lost=True)


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
