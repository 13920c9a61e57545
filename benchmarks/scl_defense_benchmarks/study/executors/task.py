"""One try at a cell, on whatever machine: the cell's process, its log, and what it says of itself.

A worker of a cluster imports this file and nothing heavy. The study, elsewhere, reads ``progress.json`` in the cell's
folder; a file and not a connection, because the folder is shared anyway and outlives both ends.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scl_defense_benchmarks.study.cell import STOPPED

PROGRAM = ("-P", "-m", "scl_defense_benchmarks.study.cell")  # what Python runs, with the cell's folder behind it
PATIENCE = 90.0  # seconds that a stopped cell may take to finish a step and save
PROGRESS = "progress.json"
EVERY = 1.0  # seconds between two versions of it
# One BLAS pool per cell, or cells that run side by side fight over the cores.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def begin(
    folder: Path,
    threads: int,
    variables: Mapping[str, str] | None = None,
    cwd: str | None = None,
    program: Sequence[str] = PROGRAM,
) -> tuple["subprocess.Popen[bytes]", int]:
    """The cell's process and where in ``log.txt`` its own lines begin. stdin: the rope; stdout: its reports."""
    environment = {**os.environ, **(variables or {}), **dict.fromkeys(THREADS, str(threads))}
    line = [sys.executable, *program, str(folder)]
    with open(folder / "log.txt", "ab") as log:
        log_start = log.tell()
        # A session of its own: Ctrl-C reaches the study alone, which then lets go of the rope.
        process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment,
                                   cwd=cwd, start_new_session=True)  # fmt: skip
    return process, log_start


def reason(code: int, folder: Path, log_start: int) -> str | None:
    """Why a process failed, on one line: the last one it wrote, or the signal that ended it; ``None``: it did not."""
    if code == 0:
        return None
    if code == STOPPED:
        return "stopped from outside by a signal"
    if code < 0:
        name = signal.Signals(-code).name if -code in {s.value for s in signal.Signals} else f"signal {-code}"
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    with open(folder / "log.txt", "rb") as log:
        log.seek(log_start)  # what earlier starts wrote is not the reason
        lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else f"exit code {code}"


class Task:
    """What is sent to a worker: called there, it runs the cell and returns ``{"code": int, "reason": text or None}``.

    It takes along the working directory (recipes may hold relative paths) and the variables ``SCL_DEFENSE_*``.
    stop_signals: whether SIGTERM to the worker stops the cell, for workers that are processes of the job alone.
    """

    def __init__(self, folder: Path, threads: int, stop_signals: bool = False):
        self.folder, self.threads, self.stop_signals = str(folder), threads, stop_signals
        self.cwd, self.program = os.getcwd(), PROGRAM
        self.variables = {name: value for name, value in os.environ.items() if name.startswith("SCL_DEFENSE_")}
        self._process: subprocess.Popen[bytes] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": None}

    def __call__(self) -> dict[str, Any]:
        folder = Path(self.folder)
        if not (folder / "cell.json").exists():
            text = f"this worker does not see '{folder}'; give --out a folder that all machines share"
            return {"code": 2, "reason": text}
        cwd = self.cwd if os.path.isdir(self.cwd) else None
        process, log_start = begin(folder, self.threads, self.variables, cwd, self.program)
        self._process = process
        if self.stop_signals:
            signal.signal(signal.SIGTERM, lambda signum, frame: self.let_go())
        listener = threading.Thread(target=self._listen, args=(process,), daemon=True)
        listener.start()
        try:
            while not self._over():
                time.sleep(0.1)
        except BaseException:  # cancelled: Ray raises KeyboardInterrupt in here
            self.stop()
            raise
        code = process.wait()
        listener.join()
        if code == STOPPED and self.stop_signals:
            sys.exit(STOPPED)  # no result: whether the job is over, or comes back, is for the scheduler to say
        return {"code": code, "reason": reason(code, folder, log_start)}

    def _listen(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdout is not None
        last = float("-inf")
        for line in process.stdout:
            if time.monotonic() - last < EVERY:
                continue
            with contextlib.suppress(ValueError, OSError):  # a part of a line; a disk that is full for a moment
                _replace(Path(self.folder) / PROGRESS, json.loads(line))
                last = time.monotonic()

    def let_go(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def _over(self) -> bool:
        """Asked in signal handlers too, so without the locks of ``Popen.wait``."""
        assert self._process is not None
        try:
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # somebody has collected it
            return True

    def stop(self) -> None:
        """Let the cell save and end; kill it when it does not."""
        self.let_go()
        until = time.monotonic() + PATIENCE
        while not self._over():
            if time.monotonic() > until:
                assert self._process is not None
                os.kill(self._process.pid, signal.SIGKILL)
            time.sleep(0.1)


def _replace(path: Path, content: Any) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    beside.write_text(json.dumps(content))
    os.replace(beside, path)


def read_progress(folder: Path) -> dict[str, Any] | None:
    """What the cell in ``folder`` last said, or ``None``."""
    try:
        return json.loads((folder / PROGRESS).read_text())
    except (OSError, ValueError):
        return None
