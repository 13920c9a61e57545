"""Commands as processes that can be watched and killed, and what must hold after every fault."""

import json
import os
import queue
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from scl_defense import checkpoint

PATIENCE = 1200.0  # seconds until a run counts as hanging: for slow machines, no moment is drawn by it


class Process:
    """One running command. ``out`` and ``err``: what it wrote."""

    def __init__(self, warm, pid, place):
        self._warm, self.pid, self._place, self.code = warm, pid, place, None

    def poll(self):
        self._warm.listen()
        if self.code is None and self.pid in self._warm.ended:
            self.code = self._warm.ended.pop(self.pid)
        return self.code

    def wait(self):
        until = time.monotonic() + PATIENCE
        while self.poll() is None:
            assert time.monotonic() < until, f"it hangs: {self.err[-500:]}"
            time.sleep(0.003)
        return self.code

    def kill(self, number=signal.SIGKILL):
        if self.poll() is None:
            os.kill(self.pid, number)

    @property
    def out(self):
        return (self._place / "out").read_text() if (self._place / "out").exists() else ""

    @property
    def err(self):
        return (self._place / "err").read_text() if (self._place / "err").exists() else ""


class Warm:
    """Starts commands through :mod:`warm`."""

    def __init__(self, folder):
        self._folder, self._count, self.ended, self._answers = folder, 0, {}, queue.SimpleQueue()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process = subprocess.Popen([sys.executable, str(Path(__file__).with_name("warm.py"))], env=environment,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()
        self._pids = []
        assert self._answers.get(timeout=PATIENCE)["ready"]

    def _read(self):
        for line in self._process.stdout:
            self._answers.put(json.loads(line))

    def listen(self, timeout=None):
        try:
            while True:
                answer = self._answers.get(timeout=timeout) if timeout else self._answers.get_nowait()
                if "pid" in answer:
                    self._pids.append(answer["pid"])
                    timeout = None
                else:
                    self.ended[answer["ended"]] = answer["code"]
        except queue.Empty:
            pass

    def start(self, *arguments, cwd, **order):
        self._count += 1
        place = self._folder / str(self._count)
        place.mkdir(mode=0o777)
        place.chmod(0o777)
        order |= {"arguments": [str(a) for a in arguments], "cwd": str(cwd), "out": str(place / "out"),
                  "err": str(place / "err")}  # fmt: skip
        self._process.stdin.write((json.dumps(order) + "\n").encode())
        self._process.stdin.flush()
        until = time.monotonic() + PATIENCE
        while not self._pids:
            assert time.monotonic() < until
            self.listen(timeout=1)
        return Process(self, self._pids.pop(0), place)

    def run(self, *arguments, cwd, **order):
        process = self.start(*arguments, cwd=cwd, **order)
        process.wait()
        return process

    def close(self):
        self._process.stdin.close()
        self._process.wait(30)


# -- moments, drawn relative to progress


def size_of(path):
    try:
        return path.stat().st_size
    except OSError:
        return -1


def lines_of(path):
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0


def parts_in(folder):
    """Temporary files of saves that are under way, or were when their writer died."""
    try:
        return [name for name in os.listdir(folder) if re.fullmatch(r"\..+\.\d+\.part", name)]
    except OSError:
        return []


def strike(process, number, moment, draw):
    """Wait for the moment, send the signal, wait for the end. Whether it came before the process was done."""
    until = time.monotonic() + PATIENCE
    while not moment():
        if process.poll() is not None:
            return False
        assert time.monotonic() < until, process.err
        time.sleep(0.0005)
    if draw is None:  # now, exactly
        process.kill(number)
        process.wait()
        return process.code != 0
    # A random number of turns of this loop, not of seconds: a loaded machine slows both alike.
    for _ in range(draw.choice([0, 0, 0, 1, 3, 10, 30])):
        if process.poll() is not None:
            return False
        time.sleep(0.0005)
    process.kill(number)
    process.wait()
    return process.code != 0


# -- what must hold


def whole(folder):
    """Every file under a final name is whole: checkpoints load, JSON parses, TOML is complete."""
    for path in Path(folder).rglob("*"):
        if path.suffix == ".pt":
            checkpoint.read(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".toml":
            import tomllib

            assert tomllib.loads(path.read_text())
        elif path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    opened.get_tensor(name)


def same_tensors(one, two, where=""):
    """Raise unless two nested states are equal bit by bit."""
    assert type(one) is type(two), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype and torch.equal(one, two), where
    elif isinstance(one, dict):
        assert list(one) == list(two), where
        for name in one:
            same_tensors(one[name], two[name], f"{where}.{name}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), where
        for place, (left, right) in enumerate(zip(one, two, strict=True)):
            same_tensors(left, right, f"{where}.{place}")
    elif isinstance(one, float) and one != one:
        assert two != two, where
    else:
        assert one == two, where


TIMES = ("seconds", "config", "versions")  # of a checkpoint: what a stop may change (config names the folder)


def same_checkpoint(one, two):
    first, second = (
        {name: value for name, value in checkpoint.read(path)[0].items() if name not in TIMES} for path in (one, two)
    )
    same_tensors(first, second)


def records(path):
    """Lines of metrics.jsonl without their times."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in one.items() if name != "seconds"} for one in found]


def draw_for(name):
    """Other moments in every run of the suite; ``SCL_DEFENSE_FAULT_SEED`` repeats one."""
    seed = os.environ.get("SCL_DEFENSE_FAULT_SEED") or str(random.SystemRandom().randrange(10**9))
    print(f"SCL_DEFENSE_FAULT_SEED={seed}")
    return random.Random(f"{seed}-{name}")
