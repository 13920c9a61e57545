"""Cells as SLURM jobs, submitted by submitit. States are asked of the controller, so no accounting is needed."""

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scl_defense.errors import UserError
from scl_defense_benchmarks.study.cells import Cell
from scl_defense_benchmarks.study.executors import Ended, Resources
from scl_defense_benchmarks.study.executors.polled import COMEBACKS, Handed, Polled
from scl_defense_benchmarks.study.executors.task import PATIENCE, Task

ASK = 5.0  # seconds between two questions to the controller
MINUTES = 240  # of a job when --slurm time=... is not given; a cell that needs longer saves and comes back
GRACE = 90  # seconds before a job's end at which its cell is told to save
OWN = {"cpus_per_task": "--cpus", "gpus_per_node": "--gpus", "gpus": "--gpus", "array": "--jobs"}
FIXED = ("job_name", "output", "error", "open_mode", "signal", "nodes", "ntasks", "ntasks_per_node", "requeue",
         "no_requeue")  # fmt: skip
WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SUSPENDED", "RESV_DEL_HOLD",
           "SPECIAL_EXIT", "STOPPED"}  # fmt: skip
ALIVE = WAITING | {"RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "RESIZING"}


def check_options(resources: Resources) -> None:
    """Raises :class:`UserError` for options that cannot be, and where there is no SLURM."""
    for name in resources.slurm:
        if name in OWN:
            raise UserError(f"--slurm {name}=... has an option of its own: write {OWN[name]}")
        if name in FIXED:
            raise UserError(f"--slurm {name}=... is for the study to decide; leave it out")
    if resources.gpus is not None and resources.gpus != int(resources.gpus):
        raise UserError(f"--gpus {resources.gpus:g}: SLURM gives whole GPUs; write an integer")
    minutes(resources.slurm.get("time", str(MINUTES)))
    for program in ("sbatch", "srun", "squeue", "scancel"):
        if shutil.which(program) is None:
            raise UserError(f"--executor slurm: '{program}' is not on the PATH; run on a machine that submits to SLURM")


def minutes(text: str) -> int:
    """SLURM's times (``90``, ``1:30:00``, ``2-12``, ``1-0:30``) in minutes, rounded up. Raises :class:`UserError`."""
    days, dash, rest = text.strip().rpartition("-")
    try:
        parts = [int(part) for part in rest.split(":")]
        if dash:  # D-H, D-H:M, D-H:M:S
            hours, minute, second = [*parts, 0, 0][:3]
            whole = int(days) * 24
        else:  # M, M:S, H:M:S
            hours, minute, second = parts if len(parts) == 3 else (0, *[*parts, 0][:2])
            whole = 0
        if len(parts) > 3 or min(whole, *parts) < 0:
            raise ValueError(text)
    except ValueError:
        raise UserError(f"--slurm time={text!r} is no time of SLURM; write minutes, H:MM:SS or D-HH:MM:SS") from None
    found = (whole + hours) * 60 + minute + (second > 0)
    if found < 1:
        raise UserError(f"--slurm time={text!r} must be at least one minute")
    return found


class SlurmTask(Task):
    """submitit looks for ``checkpoint`` when the time of the job is nearly up."""

    def checkpoint(self) -> Any:
        """Save, and come back: SLURM puts the job into its queue again."""
        import submitit

        self.stop()
        return submitit.helpers.DelayedSubmission(self)


class Slurm(Polled):
    """One job a cell. ``OUT/slurm/`` holds what submitit writes, ``job.json`` in a cell's folder its job.

    Jobs outlive a study that is killed; started again, the study takes them over.
    """

    def __init__(self, resources: Resources, threads: int, out: Path):
        super().__init__()
        self._resources, self._threads = resources, threads
        self._notes = (out / "slurm").resolve()
        self._asked, self._states = float("-inf"), dict[str, tuple[str, str]]()
        self._unknown: dict[str, float] = {}

    # -- handing over

    def hand_over(self, cell: Cell, folder: Path) -> Any:
        import submitit
        from submitit.core.utils import FailedJobError

        known = _read(folder / "job.json")
        if known is not None:
            state = ask([known]).get(known, ("", ""))[0]
            if state in ALIVE:
                return submitit.SlurmJob(self._notes, known)
        executor = submitit.SlurmExecutor(self._notes, max_num_timeout=COMEBACKS)
        executor.update_parameters(**self._parameters(cell))
        try:
            job = executor.submit(SlurmTask(folder, self._threads, stop_signals=True))
        except FailedJobError as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise UserError(f"SLURM refused cell '{cell.id}': {lines[-1] if lines else error}") from None
        (folder / "job.json").write_text(json.dumps({"job": job.job_id}))
        self._asked = float("-inf")
        return job

    def _parameters(self, cell: Cell) -> dict[str, Any]:
        cpus = self._resources.cpus or self._threads
        # Numbers of our own beat partition, account and whatever else sbatch knows, which are passed on as they are.
        more = {name.replace("_", "-"): True if value == "true" else value
                for name, value in self._resources.slurm.items() if name != "time"}  # fmt: skip
        gpus = int(self._resources.gpus or 0)
        return {
            "job_name": f"scl-{cell.id}",
            "time": minutes(self._resources.slurm.get("time", str(MINUTES))),
            "signal_delay_s": GRACE,
            "cpus_per_task": cpus,
            "srun_args": [f"--cpus-per-task={cpus}"],  # since 22.05 a step does not inherit it
            **({"gpus_per_node": gpus} if gpus else {}),
            "additional_parameters": {"requeue": True, **more},
        }

    # -- looking

    def look(self, jobs: Sequence[Handed]) -> Mapping[Handed, Ended | str]:
        found: dict[Handed, Ended | str] = {}
        if jobs and time.monotonic() - self._asked >= ASK:
            self._states = ask([job.handle.job_id for job in jobs])
            self._asked = time.monotonic()
        for job in jobs:
            state = self._state(job)
            if state is not None:
                found[job] = state
            if isinstance(state, Ended):
                (job.folder / "job.json").unlink(missing_ok=True)
        return found

    def _state(self, job: Handed) -> Ended | str | None:
        name = job.handle.job_id
        if job.handle.paths.result_pickle.exists():
            return _result(job)
        if name not in self._states:
            return self._forgotten(name)
        self._unknown.pop(name, None)
        state, why = self._states[name]
        if state in ALIVE:
            return f"job {name}: {why}" if state in WAITING else None
        # It is over without a result; look once more, the result may have come in between.
        if job.handle.paths.result_pickle.exists():
            return _result(job)
        if state == "CANCELLED":
            return Ended(f"job {name} was cancelled from outside")
        if state in ("OUT_OF_MEMORY", "TIMEOUT", "DEADLINE"):
            remedy = "--slurm mem=..." if state == "OUT_OF_MEMORY" else "--slurm time=..."
            return Ended(f"job {name} ended with {state}; give it more with {remedy}")
        return Ended(f"the worker of job {name} was lost ({state}, {why})", lost=True)

    def _forgotten(self, name: str) -> Ended | None:
        """The controller forgets old jobs after minutes, and may not answer for a while: wait before it counts."""
        since = self._unknown.setdefault(name, time.monotonic())
        if time.monotonic() - since < 12 * ASK:
            return None
        return Ended(f"job {name} is unknown to SLURM and left no result", lost=True)

    # -- stopping

    def cancel(self, jobs: Sequence[Handed]) -> None:
        names = [job.handle.job_id for job in jobs]
        subprocess.run(["scancel", "--quiet", *names], capture_output=True)
        until = time.monotonic() + PATIENCE
        with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C: SLURM will kill them
            while any(state in ALIVE for state, _ in ask(names).values()) and time.monotonic() < until:
                time.sleep(min(1.0, ASK))
            for job in jobs:
                (job.folder / "job.json").unlink(missing_ok=True)


def ask(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Job -> state and the reason for it, of those that the controller knows."""
    made = subprocess.run(
        ["squeue", "--noheader", "--states=all", f"--jobs={','.join(names)}", "--format=%i|%T|%r"],
        capture_output=True, text=True,
    )  # fmt: skip
    rows = [line.strip().split("|") for line in made.stdout.splitlines()]
    return {row[0]: (row[1], row[2]) for row in rows if len(row) == 3}


def _result(job: Handed) -> Ended:
    error = job.handle.exception()
    if error is None:
        return Ended(job.handle.result()["reason"])
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" -\n")]
    told = next((line for line in reversed(lines) if "Error" in line or "requeued" in line), str(lines[:1]))
    return Ended(f"job {job.handle.job_id}: {told}")


def _read(path: Path) -> str | None:
    try:
        return str(json.loads(path.read_text())["job"])
    except (OSError, ValueError, KeyError):
        return None
