"""Cells side by side: one process each, watched; a failed one is reported and the others go on."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scl_defense.runtime import StopRequest
from scl_defense_benchmarks.study.cell import STOPPED
from scl_defense_benchmarks.study.cells import Cell

Event = Callable[[Mapping[str, Any]], None]
PATIENCE = 90.0  # seconds that stopped cells may take to finish a step and save
# One BLAS pool per cell, or cells that run side by side fight over the cores.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Running:
    """One cell's process. Its stdin is the rope that the cell holds on to: closing it, or dying, stops the cell."""

    def __init__(self, cell: Cell, folder: Path, threads: int, events: "queue.SimpleQueue[tuple[Running, Any]]"):
        self.cell, self.folder, self.started = cell, folder, time.monotonic()
        environment = {**os.environ, **dict.fromkeys(THREADS, str(threads))}
        line = [sys.executable, "-P", "-m", "scl_defense_benchmarks.study.cell", str(folder)]
        with open(folder / "log.txt", "ab") as log:
            self._log_start = log.tell()
            # A session of its own: Ctrl-C reaches the study alone, which then lets go of the rope.
            self.process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                                            env=environment, start_new_session=True)  # fmt: skip
        self._events = events
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                self._events.put((self, json.loads(line)))
            except ValueError:  # a part of a line: the process was killed
                continue
        self.process.wait()
        self._events.put((self, None))

    def let_go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    def reason(self) -> str:
        """Why it failed, on one line: the last one it wrote, or the signal that ended it."""
        code = self.process.returncode
        if code == STOPPED:
            return "stopped from outside by a signal"
        if code < 0:
            name = signal.Signals(-code).name if -code in {s.value for s in signal.Signals} else f"signal {-code}"
            return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
        with open(self.folder / "log.txt", "rb") as log:
            log.seek(self._log_start)  # what earlier starts wrote is not the reason
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1].removeprefix("error: ") if lines else f"exit code {code}"


def run_cells(
    cells: Sequence[tuple[Cell, Callable[[], Path]]],
    *,
    jobs: int,
    threads: int,
    stop: StopRequest,
    on_done: Callable[[Cell, str | None], None],
    on_event: Event,
) -> None:
    """Run cells, at most ``jobs`` at a time, in order. Each comes with what prepares its folder.

    on_done: told of every cell that ended, with the reason when it failed. Returns early when a stop is asked for:
    the cells then save and end, and are not reported as failed.
    """
    waiting, running = list(cells), []
    events: queue.SimpleQueue[tuple[Running, Any]] = queue.SimpleQueue()
    try:
        while (waiting and not stop) or running:
            while waiting and not stop and len(running) < jobs:
                cell, prepare = waiting.pop(0)
                running.append(Running(cell, prepare(), threads, events))
                on_event({"event": "start", "cell": cell.id})
            try:
                one, said = events.get(timeout=0.2)
            except queue.Empty:
                on_event({"event": "tick"})
            else:
                if said is None:
                    running.remove(one)
                    _ended(one, stop, on_done, on_event)
                else:
                    on_event({"event": "progress", "cell": one.cell.id, **said})
            if stop and running:
                _stop_all(running)
                return
    finally:  # an error of the study itself: no cell is left behind
        if running:
            _stop_all(running)


def _ended(one: Running, stop: StopRequest, on_done: Callable[[Cell, str | None], None], on_event: Event) -> None:
    code = one.process.returncode
    if code and stop:
        return
    reason = None if code == 0 else one.reason()
    on_done(one.cell, reason)
    seconds = time.monotonic() - one.started
    on_event({"event": "done" if reason is None else "failed", "cell": one.cell.id, "reason": reason,
              "seconds": seconds, "log": str(one.folder / "log.txt")})  # fmt: skip


def _stop_all(running: list[Running]) -> None:
    for one in running:
        one.let_go()
    until = time.monotonic() + PATIENCE
    for one in running:
        try:
            one.process.wait(max(0.1, until - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C: what was saved is saved
            one.process.kill()
            one.process.wait()
    running.clear()
