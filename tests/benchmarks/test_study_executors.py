"""What every executor must do, with cells that cost nothing: a scripted one, this machine, an imitated SLURM."""

import io
import json
import os
import socket
import sys
import time
from types import SimpleNamespace

import imitation_slurm
import pytest
from scl_defense_benchmarks.study import executors
from scl_defense_benchmarks.study.executors import TRIES, Ended, Resources, check, on_slurm, polled, task
from scl_defense_benchmarks.study.executors.local import Local
from scl_defense_benchmarks.study.pool import run_cells

from scl_defense.cli.study import Screen
from scl_defense.errors import UserError
from scl_defense.runtime import StopRequest

STAND_IN = ("-S", os.path.join(os.path.dirname(__file__), "stand_in_cell.py"))


class Book:
    """A study around an executor: cells with folders, and everything that is said."""

    def __init__(self, folder):
        self.folder, self.events, self.ended, self.stop = folder, [], {}, StopRequest()
        self.react = lambda event: None

    def cell(self, name, **settings):
        def prepare():
            place = self.folder / "cells" / name
            place.mkdir(parents=True, exist_ok=True)
            (place / "cell.json").write_text(json.dumps({"settings": settings}))
            return place

        return SimpleNamespace(id=name), prepare

    def run(self, executor, cells, jobs=9):
        def on_done(cell, reason):
            assert cell.id not in self.ended
            self.ended[cell.id] = reason
            return reason

        def on_event(event):
            if event["event"] != "tick":
                self.events.append(event)
            self.react(event)

        with executor as opened:
            run_cells(cells, executor=opened, jobs=jobs, stop=self.stop, on_done=on_done, on_event=on_event)

    def kinds(self, name):
        return [event["event"] for event in self.events if event["cell"] == name and event["event"] != "progress"]

    def starts(self, name):
        return (self.folder / "cells" / name / "starts.txt").read_text().splitlines()


@pytest.fixture
def book(tmp_path):
    return Book(tmp_path)


# -- the loop, with an executor that does what it is told


class Scripted:
    """Ends the job that was started first with the next of its cell's script; at most so many at a time."""

    def __init__(self, **scripts):
        self.scripts, self.jobs, self.most, self.stopped = scripts, [], 0, []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def start(self, cell, folder):
        job = SimpleNamespace(cell=cell, folder=folder, started=0.0)
        made = type("Job", (), {"__init__": lambda self: None})()
        made.__dict__.update(vars(job))
        self.jobs.append(made)
        self.most = max(self.most, len(self.jobs))
        return made

    def next(self, seconds):
        job = self.jobs.pop(0)
        return job, self.scripts[job.cell.id].pop(0)

    def stop(self, jobs):
        self.stopped += [job.cell.id for job in jobs]


def test_a_lost_worker_costs_one_try_and_is_told(book):
    lost = Ended("the machine is gone", lost=True)
    script = Scripted(a=[lost, Ended(None)], b=[Ended("it is wrong")], c=[Ended(None)])
    book.run(script, [book.cell(name) for name in "abc"], jobs=1)
    assert book.ended == {"a": None, "b": "it is wrong", "c": None}
    assert book.kinds("a") == ["start", "lost", "start", "done"] and book.kinds("b") == ["start", "failed"]
    (told,) = [event for event in book.events if event["event"] == "lost"]
    assert (told["reason"], told["tried"], told["tries"]) == ("the machine is gone", 1, TRIES)
    assert "the machine is gone, try 1 of 3" in (book.folder / "cells" / "a" / "log.txt").read_text()
    # The lost cell comes before those that wait, or a study would be finished by its most unlucky cell.
    assert [event["cell"] for event in book.events if event["event"] == "start"] == ["a", "a", "b", "c"]


def test_a_cell_that_loses_every_worker_is_given_up(book):
    book.run(Scripted(a=[Ended("gone", lost=True)] * 9), [book.cell("a")])
    assert book.ended == {"a": f"gone, {TRIES} tries"} and book.kinds("a").count("start") == TRIES == 3


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_never_more_than_jobs_are_handed_over(book, jobs):
    script = Scripted(**{name: [Ended(None)] for name in "abcde"})
    book.run(script, [book.cell(name) for name in "abcde"], jobs=jobs)
    assert script.most == jobs and len(book.ended) == 5


def test_a_stop_hands_nothing_over_any_more_and_reports_no_failure(book):
    script = Scripted(a=[{"phase": "train"}], b=[Ended("stopped")], c=[])

    def react(event):
        if event["event"] == "progress":
            book.stop.signum = 2

    book.react = react
    book.run(script, [book.cell(name) for name in "abc"], jobs=2)
    assert book.ended == {} and sorted(script.stopped) == ["a", "b"] and book.kinds("c") == []


def test_an_error_of_the_study_stops_what_runs(book):
    def react(event):
        raise ZeroDivisionError

    book.react, script = react, Scripted(a=[])
    with pytest.raises(ZeroDivisionError):
        book.run(script, [book.cell("a")])
    assert script.stopped == ["a"]


# -- this machine


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(task, "PROGRAM", STAND_IN)
    monkeypatch.setattr(task.begin, "__defaults__", (None, None, STAND_IN))
    monkeypatch.setattr(polled, "LOOK", 0.05)


def test_local_cells_are_done_fail_and_are_killed(book, stand_in):
    cells = [book.cell("good"), book.cell("bad", fail="no such thing"), book.cell("dead", kill=True)]
    book.run(Local(threads=3), cells)
    assert book.ended == {"good": None, "bad": "no such thing", "dead": "killed by SIGKILL (out of memory?)"}
    assert "lost" not in book.kinds("dead")
    assert [event["epoch"] for event in book.events if event["event"] == "progress" and event["cell"] == "good"] == [
        0,
        1,
        2,
    ]
    assert book.starts("good")[0].endswith("from 0 threads 3")


def go_on(book):
    """A cell that waits after its first step goes on when the study has seen it."""

    def react(event):
        if event["event"] == "progress" and event["phase"] == "train":
            (book.folder / "cells" / event["cell"] / "go").touch()

    return react


def stop_at_first_step(book):
    def react(event):
        if event["event"] == "progress" and event["phase"] == "train":
            book.stop.signum = 2

    book.react = react


def test_a_stopped_local_cell_goes_on_where_it_was(book, stand_in):
    stop_at_first_step(book)
    book.run(Local(threads=1), [book.cell("a", wait=True)])
    assert book.ended == {}
    book.stop.signum = None
    book.react = lambda event: None
    book.run(Local(threads=1), [book.cell("a")])
    assert book.ended == {"a": None} and [line.split()[2] for line in book.starts("a")] == ["0", "1"]


# -- SLURM, its commands imitated


@pytest.fixture
def slurm(tmp_path, monkeypatch, stand_in):
    pytest.importorskip("submitit")
    home = tmp_path / "imitation"
    home.mkdir()
    imitation_slurm.install(tmp_path / "bin")
    monkeypatch.setattr(imitation_slurm, "HOME", home)
    monkeypatch.setenv("IMITATION_SLURM", str(home))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(on_slurm, "ASK", 0.1)

    def made(**options):
        resources = Resources(**options)
        check("slurm", resources)
        return executors.make("slurm", resources, threads=1, out=tmp_path)

    made.home = home
    yield made
    for path in home.glob("*.json"):  # nothing outlives a test that failed
        imitation_slurm.scancel([path.stem])


def test_slurm_cells_are_done_and_fail(book, slurm):
    more = {"partition": "gpu", "time": "1:30:00", "mem_per_cpu": "2G", "exclusive": "true"}
    book.react = go_on(book)
    book.run(slurm(cpus=2, gpus=1, slurm=more), [book.cell("good", wait=True), book.cell("bad", fail="no such thing")])
    assert book.ended == {"good": None, "bad": "no such thing"}
    assert {event["phase"] for event in book.events if event["event"] == "progress"} >= {"train"}
    assert "something for the log" in (book.folder / "cells" / "good" / "log.txt").read_text()
    options = set(imitation_slurm.read(1)["options"])
    assert options >= {"--partition=gpu", "--time=90", "--cpus-per-task=2", "--gpus-per-node=1", "--mem-per-cpu=2G",
                       "--exclusive", "--job-name=scl-good", "--requeue"}  # fmt: skip
    assert not list(book.folder.glob("cells/*/job.json"))


def test_slurm_jobs_wait_in_a_queue_and_say_so(book, slurm):
    (slurm.home / "hold").touch()

    working = go_on(book)

    def react(event):
        if event["event"] == "progress" and event["phase"] == "queued":
            (slurm.home / "hold").unlink(missing_ok=True)
        working(event)

    book.react = react
    book.run(slurm(), [book.cell("a", wait=True)])
    said = [event for event in book.events if event["event"] == "progress"]
    assert said[0]["phase"] == "queued" and said[0]["why"] == "job 1: Resources" and said[-1]["phase"] == "train"
    assert book.ended == {"a": None}


def test_a_lost_node_of_slurm_is_tried_again(book, slurm):
    def react(event):
        if event["event"] == "progress" and event["phase"] == "train" and len(book.starts("a")) == 1:
            pid = imitation_slurm.read(1)["pid"]
            imitation_slurm.write(1, state="NODE_FAIL")
            os.killpg(pid, 9)
            os.kill(int(book.starts("a")[0].split()[0]), 9)
            (book.folder / "cells" / "a" / "go").touch()

    book.react = react
    book.run(slurm(), [book.cell("a", wait=True)])
    assert book.kinds("a") == ["start", "lost", "start", "done"] and book.ended == {"a": None}
    assert [line.split()[2] for line in book.starts("a")] == ["0", "1"]


def test_a_job_cancelled_by_somebody_else_has_failed(book, slurm):
    def react(event):
        if event["event"] == "progress" and event["phase"] == "train":
            imitation_slurm.scancel(["1"])

    book.react = react
    book.run(slurm(), [book.cell("a", wait=True)])
    assert book.ended == {"a": "job 1 was cancelled from outside"}


def test_a_stop_cancels_running_and_waiting_jobs(book, slurm):
    stop_at_first_step(book)
    book.react, stopping = lambda event: None, book.react

    def react(event):  # the second one is submitted into a queue that does not move
        if event["event"] == "start" and event["cell"] == "a":
            while imitation_slurm.read(1)["state"] == "PENDING":
                time.sleep(0.01)
            (slurm.home / "hold").touch()
        stopping(event)

    book.react = react
    book.run(slurm(), [book.cell("a", wait=True), book.cell("b")])
    assert book.ended == {}
    assert [imitation_slurm.read(number)["state"] for number in (1, 2)] == ["CANCELLED", "CANCELLED"]
    assert not list(book.folder.glob("cells/*/job.json")) and not (book.folder / "cells" / "b" / "starts.txt").exists()


def test_a_study_that_was_killed_takes_its_jobs_over(book, slurm):
    cell, prepare = book.cell("a", wait=True)
    abandoned = slurm()
    abandoned.start(cell, prepare())  # and then nobody asks any more
    while not (book.folder / "cells" / "a" / "starts.txt").exists():
        time.sleep(0.02)
    (book.folder / "cells" / "a" / "go").touch()
    book.run(slurm(), [(cell, prepare)])
    assert book.ended == {"a": None} and len(book.starts("a")) == 1 and imitation_slurm.read(2) is None


def test_what_slurm_refuses_is_told_in_its_words(book, slurm):
    (slurm.home / "refuse").write_text("sbatch: error: invalid partition specified: gpo")
    with pytest.raises(UserError, match=r"SLURM refused cell 'a': .*invalid partition specified: gpo"):
        book.run(slurm(slurm={"partition": "gpo"}), [book.cell("a")])


def test_a_folder_that_the_worker_does_not_see(tmp_path):
    found = task.Task(tmp_path / "elsewhere", 1)()
    assert found["code"] == 2 and "give --out a folder that all machines share" in found["reason"]


# -- options


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("slrm", {}, "did you mean 'slurm'"),
        ("local", {"gpus": 1}, "--gpus is for --executor slurm and ray"),
        ("local", {"slurm": {"partition": "x"}}, r"--slurm partition=\.\.\. is for --executor slurm, not local"),
        ("local", {"ray_address": "h:1"}, "--ray-address is for --executor ray"),
        ("local", {"cpus": 0}, "at least 1"),
        ("slurm", {"gpus": 0.5}, "whole GPUs"),
        ("slurm", {"slurm": {"cpus_per_task": "2"}}, "write --cpus"),
        ("slurm", {"slurm": {"output": "x"}}, "for the study to decide"),
        ("slurm", {"slurm": {"time": "soon"}}, "no time of SLURM"),
    ],
)
def test_options_that_cannot_be(name, options, told):
    if name == "slurm":
        pytest.importorskip("submitit")
    with pytest.raises(UserError, match=told):
        check(name, Resources(**options))


def test_slurm_needs_its_commands(monkeypatch, tmp_path):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="'sbatch' is not on the PATH"):
        check("slurm", Resources())


@pytest.mark.parametrize(("name", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_missing_extra_is_one_line_with_the_command(name, package, monkeypatch):
    monkeypatch.setattr(executors.importlib.util, "find_spec", lambda asked: None if asked == package else 1)
    with pytest.raises(UserError, match=rf'needs the package \'{package}\': pip install "scl-defense\[{name}\]"'):
        check(name, Resources())


def test_a_ray_address_where_nobody_listens_is_told_at_once():
    from scl_defense_benchmarks.study.executors.on_ray import knock

    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound, not listening
        with pytest.raises(ConnectionRefusedError):
            knock(f"127.0.0.1:{held.getsockname()[1]}")
        held.listen()
        knock(f"127.0.0.1:{held.getsockname()[1]}")
    knock(None)
    knock("auto")


def test_neither_library_is_imported_before_it_is_asked_for():
    code = "import sys, scl_defense_benchmarks.study.executors.on_ray, scl_defense_benchmarks.study.executors.on_slurm;"
    code += "sys.exit(bool({'ray', 'submitit', 'torch'} & set(sys.modules)))"
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("1:30", 2), ("2:00:00", 120), ("0:00:01", 1), ("2-12", 3600), ("1-0:30", 1470), ("1-0:0:30", 1441)],
)
def test_times_of_slurm(text, minutes):
    assert on_slurm.minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "x", "1:2:3:4", "-5", "0", "1-"])
def test_what_is_no_time_of_slurm(text):
    with pytest.raises(UserError, match="--slurm time="):
        on_slurm.minutes(text)


# -- the screen


def test_the_screen_tells_waiting_from_running_and_of_lost_workers():
    from rich.console import Console

    screen = Screen(quiet=False)
    screen._console = Console(file=io.StringIO(), width=200)
    screen({"event": "grid", "cells": 3, "left": 3, "jobs": 2, "out": "x"})
    for name in "ab":
        screen({"event": "start", "cell": name})
    screen({"event": "progress", "cell": "a", "phase": "train", "epoch": 0, "epochs": 2})
    screen({"event": "progress", "cell": "b", "phase": "queued", "why": "job 7: Priority"})
    printer = Console(file=io.StringIO(), width=200)
    printer.print(screen._view())
    text = " ".join(printer.file.getvalue().split())
    assert "1 running, 1 in the cluster's queue, 1 waiting" in text and "queued, job 7: Priority" in text
    for phase in ("train", "queued"):
        screen({"event": "progress", "cell": "b", "phase": phase, "why": "job 7: BeginTime"})
    screen({"event": "lost", "cell": "a", "reason": "gone", "tried": 1, "tries": 3})
    screen({"event": "start", "cell": "a"})
    screen({"event": "done", "cell": "a", "reason": None, "seconds": 3.0})
    told = screen._console.file.getvalue()
    assert told.count("requeued b: job 7: BeginTime; it will go on from what it saved") == 1
    assert "lost    a: gone; try 2 of 3 follows" in told and "[1 done, 0 failed, 2 left" in told
