"""Runs of several processes on this machine, for tests: ``python together.py WHAT.json OUT`` is one of them."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

PLUGIN = Path(__file__).with_name("wide_trainers.py")


def environment(**more):
    """Without the proxies and threads of others; gloo talks over the loopback."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "NO_PROXY": "*", **more}


def processes(arguments, world, cwd, **more):
    """``world`` Python processes that know of each other, as torchrun starts them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=cwd,
            env=environment(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **more,
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]  # fmt: skip


def finished(started, timeout=240):
    """(exit code, stdout, stderr) of each; none is left running."""
    try:
        told = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(started, told, strict=True)]


def torchrun(arguments, world, cwd, **more):
    """The command as a user gives it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}",
               *map(str, arguments)]  # fmt: skip
    return subprocess.Popen(
        command, cwd=cwd, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


ACCIDENTS = ("_stop", "_die", "_raise", "_memory")


def accident(kind):
    """What befalls a process in the middle of a step."""
    if kind == "_stop":
        signal.raise_signal(signal.SIGTERM)
    elif kind == "_die":
        os._exit(7)
    elif kind == "_memory":
        raise MemoryError("planted")
    else:
        raise ValueError("planted")


def trained(options, out):
    """Train; returns the records, the gradients of the first step, as tensors, the weights, and what else to compare.

    An option ``_stop`` (or another of ACCIDENTS) = [rank, step]: that befalls the process in that step of the first
    epoch, when it backpropagates.
    """

    from scl_defense import checkpoint, train
    from scl_defense.runtime import ranks
    from scl_defense.train import Run

    planned = {kind: options[kind] for kind in ACCIDENTS if kind in options}
    options = {name: value for name, value in options.items() if name not in ACCIDENTS}
    seen, backward, gradients = {}, Run.backward, Run.gradients

    def stumbling(self, made, epoch, step):
        for kind, (rank, when) in list(planned.items()):
            if (rank, when, 0) == (ranks().rank, step, epoch):
                del planned[kind]
                accident(kind)
        return backward(self, made, epoch, step)

    def watched(self, *arguments):
        found = gradients(self, *arguments)
        if not seen:
            seen.update({name: p.grad.clone() for name, p in self.network.named_parameters() if p.grad is not None})
        return found

    Run.backward, Run.gradients = stumbling, watched
    place = {} if "resume" in options else {"out": str(out)}
    try:
        result = train(plugins=[PLUGIN], **place, **options)
    finally:
        Run.backward, Run.gradients = backward, gradients
    if not ranks().leads:
        return {}
    records = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    content, _ = checkpoint.read(result.last)
    return {
        "records": records, "gradients": seen, **{name: content[name] for name in ("network", "ranks", "parts")},
    }  # fmt: skip


def main(what, out):
    import torch

    from scl_defense import runtime

    found = {}
    with runtime.joined(torch.device("cpu")) as ranks:
        for name, options in json.loads(what).items():
            found[name] = trained(options, Path(out) / name)
        if ranks.leads:
            torch.save(found, Path(out) / "found.pt")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except SystemExit:
        raise
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 9))
