"""Studies on real clusters of two nodes on this machine: Ray, and SLURM; a node dies, a study dies, Ctrl-C."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm_cluster
from scl_defense_benchmarks.study import study
from scl_defense_benchmarks.study.executors import on_slurm, task

RECIPE = """
title = "Two cells"
seeds = [0]
baseline = "plain"
n = 20
[base]
device = "cpu"
epochs = 20
limit = 200
val_limit = 20
val_steps = 1
batch_size = 32
trainer = "cross-entropy"
[base.model_options]
width = 4
[methods.plain]
generator = "none"
[methods.corner]
generator = "corner-noise"
[batteries.fast]
attacks = "native:fgsm"
"""
PATIENCE = 240.0  # until something counts as hanging
STAND_IN = ("-S", os.path.join(os.path.dirname(__file__), "stand_in_cell.py"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clusters")
    (folder / "two.toml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def unbroken(place):
    """The results of the study on this machine; what a cell is given is not this machine's cores elsewhere."""
    study(place / "two.toml", out=place / "unbroken", cpus=1, jobs=2)
    text = (place / "unbroken" / "results.jsonl").read_text()
    cores = json.loads(text.splitlines()[0])["machine"]["cores"]
    return text.replace(f'"cores": {cores},', '"cores": 1,')


def wait_for(condition):
    until = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.05)
    return found


def cell_process(folder):
    """The process that works in a cell's folder, or ``None``."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            if str(folder) in words and any(word.endswith(("study.cell", "stand_in_cell.py")) for word in words):
                return int(path.parent.name)
    return None


def ancestors(pid):
    found = []
    while pid > 1:
        found.append(pid)
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return found


class Killer:
    """Told of a study's events; kills the machine of cell ``plain`` once, in the middle of its training."""

    def __init__(self, out, kill):
        self.train, self.kill, self.kinds, self.pid = out / "cells" / "plain--s0" / "train", kill, [], None

    def __call__(self, event):
        if event["event"] != "tick":
            kind = "queued" if self.pid and event.get("phase") == "queued" else event["event"]
            self.kinds.append((kind, event.get("cell")))
        if self.pid is None and (self.train / "last.pt").exists():
            self.pid = cell_process(self.train.parent.resolve())
            assert self.pid is not None, "the cell was done before its machine could be killed"
            self.kill(self.pid)


# -- Ray


@pytest.fixture
def ray_cluster():
    """A head that runs nothing, and two nodes with one CPU each."""
    pytest.importorskip("ray", reason='needs pip install "scl-defense[ray]"')
    from ray.cluster_utils import Cluster

    def node(cpus):
        # Ports given, not found by each agent: a node gives up when a slow machine lets it wait for them.
        names = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
        ports = zip(names, slurm_cluster.free_ports(len(names)), strict=True)
        return {"num_cpus": cpus, "object_store_memory": 80 << 20, **dict(ports)}

    cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **node(0)})
    try:
        for _ in range(2):
            cluster.add_node(**node(1))
        yield cluster
    finally:
        cluster.shutdown()


def test_a_ray_node_dies_in_the_middle(place, unbroken, ray_cluster):
    def kill(pid):
        above = ancestors(pid)
        (node,) = [node for node in ray_cluster.worker_nodes
                   if node.all_processes["raylet"][0].process.pid in above]  # fmt: skip
        raylet = node.all_processes["raylet"][0].process.pid
        ray_cluster.remove_node(node, allow_graceful=False)
        for one in above[: above.index(raylet)]:  # a machine without power runs nothing at all
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)

    out = place / "ray"
    killer = Killer(out, kill)
    made = study(place / "two.toml", out=out, executor="ray", ray_address=ray_cluster.address, on_event=killer)
    assert killer.pid is not None and not made.failed
    assert killer.kinds.count(("lost", "plain--s0")) == 1 and ("lost", "corner--s0") not in killer.kinds
    assert "the worker was lost" in (out / "cells" / "plain--s0" / "log.txt").read_text()
    assert (out / "results.jsonl").read_text() == unbroken


def test_ctrl_c_stops_what_ray_runs(place, tmp_path, ray_cluster, monkeypatch):
    """Two cells run and nothing waits; both are told to save, and none of their processes is left."""
    from scl_defense.errors import Interrupted

    monkeypatch.setattr(task, "PROGRAM", STAND_IN)
    folders = [tmp_path / "cells" / name for name in ("plain--s0", "corner--s0")]

    def on_event(event):
        for folder in folders:  # the real cells' settings, and that it stands still
            cell = folder / "cell.json"
            if cell.exists() and "wait" not in (known := json.loads(cell.read_text()))["settings"]:
                known["settings"]["wait"] = True
                cell.write_text(json.dumps(known))
        if all((folder / "steps.txt").exists() for folder in folders):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="--executor ray") as stopped:
        study(place / "two.toml", out=tmp_path, executor="ray", ray_address=ray_cluster.address, on_event=on_event)
    assert stopped.value.exit_code == 130
    assert not [folder for folder in folders if cell_process(folder) or (folder / "failure.json").exists()]


# -- SLURM


@pytest.fixture
def cluster(tmp_path_factory):
    if slurm_cluster.missing():
        pytest.skip(f"needs SLURM (Debian: slurmctld slurmd slurm-client munge); not found: {slurm_cluster.missing()}")
    pytest.importorskip("submitit", reason='needs pip install "scl-defense[slurm]"')
    with contextlib.ExitStack() as stack:
        try:
            running = stack.enter_context(slurm_cluster.SlurmCluster(tmp_path_factory.mktemp("slurm")))
        except RuntimeError as error:  # of the machine (no munge for this user, an unknown host name), not of ours
            pytest.skip(str(error))
        yield running


def jobs():
    made = subprocess.run(["squeue", "--noheader", "--states=all", "--format=%i|%T"], capture_output=True, text=True)
    return dict(line.split("|") for line in made.stdout.split())


@pytest.mark.slurm
def test_a_slurm_node_dies_in_the_middle(place, unbroken, cluster, monkeypatch):
    monkeypatch.setattr(on_slurm, "ASK", 1.0)

    def kill(pid):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        (name,) = [name for name in slurm_cluster.NODES if f"SLURMD_NODENAME={name}".encode() in variables]
        cluster.kill_node(name)

    out = place / "slurm"
    killer = Killer(out, kill)
    made = study(place / "two.toml", out=out, executor="slurm", on_event=killer)
    assert killer.pid is not None and not made.failed
    # SLURM puts the job back itself, or ends it and the study submits another: in any case it began a second time.
    assert {("lost", "plain--s0"), ("queued", "plain--s0")} & set(killer.kinds)
    assert "down" in "".join(cluster.states().values())
    assert (out / "results.jsonl").read_text() == unbroken


@pytest.mark.slurm
def test_ctrl_c_cancels_and_a_killed_study_finds_its_job_again(place, unbroken, cluster, tmp_path):
    cell = tmp_path / "cells" / "plain--s0"
    line = [sys.executable, "-c", "from scl_defense.cli import main; main()", "study", str(place / "two.toml")]
    line += ["--out", str(tmp_path), "--executor", "slurm", "--only", "plain", "--slurm", "partition=all", "--quiet"]
    first = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: cell_process(cell))
    first.send_signal(signal.SIGINT)
    _, told = first.communicate(timeout=PATIENCE)
    assert first.returncode == 130 and "go on with: scl-defense study" in told and "--executor slurm" in told
    assert jobs() == {"1": "CANCELLED"} and cell_process(cell) is None and not (cell / "failure.json").exists()
    second = subprocess.Popen(line)
    wait_for(lambda: (cell / "train" / "last.pt").exists())
    second.kill()
    second.wait()
    assert jobs()["2"] == "RUNNING"
    third = subprocess.run(line, capture_output=True, text=True)
    assert third.returncode == 0, third.stderr
    assert jobs() == {"1": "CANCELLED", "2": "COMPLETED"}
    assert (tmp_path / "results.jsonl").read_text() == unbroken.splitlines(True)[0]


@pytest.mark.slurm
def test_a_job_whose_time_is_up_comes_back(cluster, tmp_path, monkeypatch):
    """SIGUSR2 is what SLURM sends before the end of a job's time."""
    from test_study_executors import Book

    monkeypatch.setattr(on_slurm, "ASK", 1.0)
    monkeypatch.setattr(task, "PROGRAM", STAND_IN)
    book = Book(tmp_path)

    def react(event):
        if event["event"] == "progress" and event["phase"] == "train":
            if len(book.starts("a")) == 1:
                subprocess.run(["scancel", "--signal=USR2", "1"], check=True)
            (tmp_path / "cells" / "a" / "go").touch() if len(book.starts("a")) > 1 else None

    book.react = react
    executor = on_slurm.Slurm(on_slurm.Resources(slurm={"time": "1"}), 1, tmp_path)
    monkeypatch.setattr(on_slurm, "GRACE", 5)
    book.run(executor, [book.cell("a", wait=True)])
    assert book.ended == {"a": None} and [row.split()[2] for row in book.starts("a")] == ["0", "1"]
    wait_for(lambda: jobs() == {"1": "COMPLETED"})  # the same job, the second time to its end
    assert book.kinds("a") == ["start", "done"]
