"""A warm interpreter that starts commands: ``python warm.py``, told on stdin, answers on stdout, a JSON object a line.

Importing torch takes seconds, hundreds of times. So this process imports it once and forks a process for each command
line: with a pid, a session, a working directory and output files of its own, running what ``scl-defense`` runs.
"""

import faulthandler
import importlib
import json
import os
import re
import resource
import selectors
import signal
import sys
import time

STOPS = {signal.SIGINT, signal.SIGTERM}


def pause_in_save(name, at, nth, marker):
    """Stand still at this place of the nth save of a file of this name, and say so by the marker: to be killed there.

    at: ``half`` (of the bytes are written), ``written``, ``synced`` or ``replaced`` (it has its final name).
    """
    from scl_defense import checkpoint

    count, active = [0], [False]
    real_open, real_sync, real_replace = os.open, os.fsync, os.replace

    def here(place):
        if active[0] and place == at:
            os.close(real_open(marker, os.O_WRONLY | os.O_CREAT, 0o666))
            while True:
                signal.pause()

    class Halved:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.stream.close()

        def __getattr__(self, name):
            return getattr(self.stream, name)

        def write(self, payload):
            self.stream.write(payload[: len(payload) // 2])
            self.stream.flush()
            here("half")
            self.stream.write(payload[len(payload) // 2 :])

    def opening(path, *arguments, **keywords):
        if re.fullmatch(rf"\.{re.escape(name)}\.\d+\.part", os.path.basename(path)):
            count[0] += 1
            active[0] = count[0] == nth
        return real_open(path, *arguments, **keywords)

    def syncing(descriptor):
        here("written")
        real_sync(descriptor)
        here("synced")

    def replacing(*arguments):
        real_replace(*arguments)
        here("replaced")
        active[0] = False

    os.open, os.fsync, os.replace = opening, syncing, replacing
    checkpoint.open = lambda *arguments: Halved(open(*arguments))  # noqa: SIM115


def child(order):
    os.setsid()
    os.chdir(order["cwd"])
    os.environ.update(order.get("environment", {}))
    for number, name in ((0, os.devnull), (1, order["out"]), (2, order["err"])):
        opened = os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(opened, number)
        os.close(opened)
    faulthandler.register(signal.SIGUSR2)
    from scl_defense.cli import app

    signal.signal(signal.SIGTERM, app._stop)  # as main() does at once
    signal.signal(signal.SIGINT, app._stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    if order.get("file_limit"):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_limit"], order["file_limit"]))
    if order.get("user"):
        os.setgroups([])
        os.setgid(order["user"])
        os.setuid(order["user"])
    if order.get("clock"):  # seconds that the wall clock is off, and jumps by at every look
        real, jump = time.time, [0.0]

        def jumping():
            jump[0] += order["clock"]
            return real() + jump[0]

        time.time = jumping
    if order.get("pause"):
        pause_in_save(**order["pause"])
    sys.argv = ["scl-defense", *order["arguments"]]
    app.main()


# What commands import when they are run; a process that is to be killed has it already.
MODULES = [
    "matplotlib.figure", "scl_defense_benchmarks.report", "scl_defense_benchmarks.study",
    "sklearn.datasets", "torch._dynamo", "torchattacks", "safetensors.torch", "scl_defense.cli.benchmark",
    "scl_defense.cli.generate", "scl_defense.cli.progress", "scl_defense.cli.train", "scl_defense.stored",
    "scl_defense.train",
    "scl_defense_benchmarks.benchmark", "scl_defense_plugins.generators.contrastive_pgd",
    "scl_defense_plugins.generators.contrastive_pgd_online", "scl_defense_plugins.trainers.presets",
    "scl_defense_plugins.trainers.cross_entropy", "scl_defense_plugins.models.small_cnn",
    "scl_defense_plugins.datasets.digits", "scl_defense_plugins.loggers.jsonl",
    "scl_defense_benchmarks.torchattacks_adapter", "scl_defense_benchmarks.native", "scl_defense_benchmarks.examples",
]  # fmt: skip


def work():
    for name in MODULES:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)

    def say(**answer):
        os.write(1, (json.dumps(answer) + "\n").encode())

    say(ready=True)
    waiting, chooser, buffer = set(), selectors.DefaultSelector(), b""
    chooser.register(0, selectors.EVENT_READ)
    while True:
        if chooser.select(0.003 if waiting else None):
            data = os.read(0, 1 << 16)
            if not data:
                break
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # until the child can answer them
                pid = os.fork()
                if pid == 0:
                    try:
                        child(json.loads(line))
                    except SystemExit as end:
                        code = end.code if isinstance(end.code, int) else 1
                    except KeyboardInterrupt as stop:  # before the command had begun, or when it was done
                        code = 130 if type(stop) is KeyboardInterrupt else 143
                    except BaseException:
                        import traceback

                        traceback.print_exc()
                        code = 70
                    else:
                        code = 0
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
                waiting.add(pid)
                say(pid=pid)
        for pid in list(waiting):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                waiting.remove(pid)
                say(ended=pid, code=os.waitstatus_to_exitcode(status))
    for pid in waiting:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    work()
