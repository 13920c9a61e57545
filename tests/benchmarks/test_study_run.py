"""Real studies of a few seconds: finished, failed, changed, killed and continued cells."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scl_defense_benchmarks.study import study
from scl_defense_benchmarks.study.cells import grid
from scl_defense_benchmarks.study.executors.local import Running
from scl_defense_benchmarks.study.spec import read_spec
from scl_defense_benchmarks.study.store import Store

from scl_defense.cli.app import run as cli
from scl_defense.errors import Interrupted, UserError

BROKEN = """
import torch
from scl_defense import hookimpl
from scl_defense.types import component

@component
class Broken:
    needs = frozenset()
    def __call__(self, batch, context):
        if context.epoch:
            raise RuntimeError("it broke in the second epoch")
        return batch.views[:1].clone()

@hookimpl
def register_generators(register):
    register("broken-late", Broken, summary="breaks in the second epoch")
"""
TINY = """
title = "Tiny"
seeds = [0]
baseline = "plain"
n = 20
[base]
device = "cpu"
epochs = 2
limit = 200
lr = 0.02
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
role = "control"
finetune = "slf"
[batteries.fast]
attacks = "native:fgsm"
"""
FAILING = TINY + '[methods.broken]\nlabel = "Broken one"\nrole = "model-free"\ngenerator = "broken-late"\n'

pytestmark = pytest.mark.slow  # whole studies as processes; every part has its fast tests beside this file


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    (folder / "tiny.toml").write_text(TINY)
    (folder / "failing.toml").write_text(FAILING)
    (folder / "broken.py").write_text(BROKEN)
    return folder


@pytest.fixture(scope="module")
def finished(place):
    """The failing study, run once in one go: two methods are done, one is not."""
    events = []
    options = {"out": place / "unbroken", "jobs": 2, "plugins": [place / "broken.py"]}
    return study(place / "failing.toml", on_event=events.append, **options), events


def test_a_failed_cell_is_reported_and_the_rest_goes_on(finished):
    result, events = finished
    assert [line["cell"] for line in result.lines] == ["plain--s0", "corner--s0"]
    assert set(result.failed) == {"broken--s0"} and "second epoch" in result.failed["broken--s0"]
    folder = result.out / "cells" / "broken--s0"
    assert "second epoch" in (folder / "log.txt").read_text() and not (folder / "record.json").exists()
    assert sorted(event["event"] for event in events if event["event"] in ("done", "failed")) == [
        "done",
        "done",
        "failed",
    ]
    assert {event["phase"] for event in events if event["event"] == "progress"} >= {"train", "attack"}
    assert "second epoch" in (result.out / "summary.md").read_text()
    assert "2 of 3 done, 1 failed" in (result.out / "table.md").read_text()


def test_a_line_says_what_the_cell_found(finished):
    result, _ = finished
    for line in result.lines:
        own = json.loads((result.out / "cells" / line["cell"] / "fast.json").read_text())
        assert (line["n"], line["clean"], line["threat"]) == (20, own["clean_accuracy"], "linf:0.1")
        assert line["batteries"]["fast"]["attacks"]["native:fgsm"]["robust"] == own["attacks"][0]["robust_accuracy"]
        assert line["worst"] == own["worst_cases"][0]["robust_accuracy"] == line["outcomes"].count("1") / 20
        assert len(line["outcomes"]) == 20 and line["epochs"] == 2 and line["best_epoch"] in (0, 1)
        assert line["forwards"] > 0 and line["backwards"] > 0
    plain, corner = result.lines
    assert (plain["generator"], plain["finetune"], plain["backwards"]) == ("none", None, 1.0)
    # The probe of SLF replaces the classifier: the network attacked is not the one that training left.
    assert corner["finetune"]["protocol"] == "slf" and corner["finetune"]["backwards"] == 0
    tuned = json.loads((result.out / "cells" / "corner--s0" / "fast.json").read_text())["checkpoint"]
    assert tuned["config"]["trainer"] == "linear" and tuned["path"].endswith("finetune-slf/best.pt")
    text = (result.out / "results.jsonl").read_text()
    # Nothing that differs between two equal runs.
    for word in (os.uname().nodename, str(result.out), "seconds", time.strftime("%Y-%m-%d")):
        assert word not in text
    times = [json.loads(line) for line in (result.out / "times.jsonl").read_text().splitlines()]
    assert all(one["train_seconds"] > 0 and one["attack_seconds"] > 0 for one in times) and len(times) == 2


def test_figures_and_maps_are_there(finished):
    result, _ = finished
    drawn = {path.name for path in (result.out / "figures").iterdir()}
    assert {
        f"{name}.{end}" for name in ("clean-robust", "epochs", "embedding", "cost") for end in ("png", "pdf")
    } <= drawn
    assert not any(name.startswith("curve") for name in drawn)  # none was asked for
    points = json.loads((result.out / "cells" / "plain--s0" / "embedding.json").read_text())
    assert len(points["clean"]) == len(points["adversarial"]) == len(points["labels"]) == 300


def test_finished_cells_are_not_done_again_and_tables_are_the_same(finished, place, capsys):
    result, _ = finished
    files = [path for path in result.out.glob("*.*") if path.suffix in (".jsonl", ".md", ".csv", ".tex")]
    before = {path: path.read_bytes() for path in [*files, *result.out.glob("cells/*/record.json")]}
    assert len(before) == 6 + 2
    for path in files:
        path.unlink()
    plugin = ["--plugin", str(place / "broken.py")]
    line = ["study", str(place / "failing.toml"), "--out", str(result.out), "--only", "plain,corner"]
    assert cli([*line, *plugin]) == 1  # the one that failed still counts
    told = capsys.readouterr()
    assert "failed: broken--s0" in told.out and "2 done before, 0 to do" in told.err and "done    " not in told.err
    for path, content in before.items():
        # The command is part of every header, and this one was another.
        assert path.read_bytes().replace(b" --only plain,corner", b"") == content, path.name


def test_tables_only_needs_the_results_alone(finished, place, tmp_path, capsys):
    result, _ = finished
    (tmp_path / "results.jsonl").write_bytes((result.out / "results.jsonl").read_bytes())
    assert cli(["study", str(place / "tiny.toml"), "--tables-only", "--json", "--out", str(tmp_path)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["arm"] for row in told["table"]] == ["plain", "corner"]
    ours, theirs = ((folder / "table.csv").read_text().splitlines() for folder in (tmp_path, result.out))
    assert ours[-2:] == theirs[-3:-1]
    with pytest.raises(UserError, match="run the study first"):
        study(place / "tiny.toml", out=tmp_path / "none", tables_only=True)


def test_a_changed_recipe_is_noticed_and_moved_aside_when_asked(finished, place):
    result, _ = finished
    with pytest.raises(UserError, match=r"'plain--s0'.* train\.epochs: 2 -> 1 \(and 1 more cells\); .*--redo"):
        study(place / "tiny.toml", overrides={"epochs": 1}, out=result.out)
    store, cells = Store(result.out), grid(read_spec(place / "tiny.toml", overrides={"epochs": 1}))
    store.check(cells[:1], redo=True)
    aside = result.out / "replaced" / "plain--s0-1"
    assert json.loads((aside / "record.json").read_text())["line"]["epochs"] == 2
    assert store.record(cells[0]) is None and store.record(cells[1]) is not None
    aside.rename(result.out / "cells" / "plain--s0")


def test_a_dry_run_measures_and_writes_nothing(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli(["study", str(place / "tiny.toml"), "--dry-run", "--seeds", "0,1", "--jobs", "1", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [row["cell"] for row in plan["cells"]] == ["plain--s0", "plain--s1", "corner--s0", "corner--s1"]
    assert plan["left"] == 4 and plan["training_seconds"] == pytest.approx(sum(row["seconds"] for row in plan["cells"]))
    assert all(row["seconds"] > 0 for row in plan["cells"])
    assert list(tmp_path.iterdir()) == []


def test_one_study_at_a_time_and_the_holder_is_named(place, tmp_path):
    store = Store(tmp_path)
    with store.locked(), pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        study(place / "tiny.toml", out=tmp_path)


def test_only_and_other_faults(place, tmp_path):
    with pytest.raises(UserError, match="did you mean 'corner'"):
        study(place / "tiny.toml", only=["corne"], out=tmp_path)
    with pytest.raises(UserError, match="at least 1"):
        study(place / "tiny.toml", jobs=0, out=tmp_path)
    assert list(tmp_path.iterdir()) == []


# -- killed and stopped


def start(place, out, *more):
    line = [sys.executable, "-c", "from scl_defense.cli import main; main()", "study", str(place / "tiny.toml")]
    line += ["--plugin", str(place / "broken.py")]  # as in the unbroken one: every result names the plugins
    with open(place / "output.txt", "ab") as output:
        return subprocess.Popen([*line, "--out", str(out), "--jobs", "2", *more], stdout=output, stderr=output)


def wait_for(condition, seconds=240):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.02)
    return found


def cells_running(out):
    """Processes that work in this study's folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "scl_defense_benchmarks.study.cell" in words and any(word.startswith(str(out)) for word in words):
            found.append(int(path.parent.name))
    return found


def files_in(out):
    return sum(1 for path in out.rglob("*") if path.is_file() and path.suffix in (".pt", ".json"))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")
def test_kill_and_restart_gives_the_same_bytes(finished, place, tmp_path):
    """kill -9 of the study at a random moment of a cell: the cell stops by itself, nothing of it is lost or doubled."""
    result, _ = finished
    out, chance = tmp_path / "killed", random.Random()
    process = start(place, out, "--only", "plain")
    wait_for(lambda: (out / "cells" / "plain--s0" / "train").exists())
    time.sleep(chance.uniform(0, 2))
    process.kill()
    process.wait()
    wait_for(lambda: not cells_running(out), 30)
    again = study(place / "tiny.toml", out=out, only=["plain"], jobs=1, plugins=[place / "broken.py"])
    assert not again.failed
    assert (out / "results.jsonl").read_text() == (result.out / "results.jsonl").read_text().splitlines(True)[0]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")
def test_killed_again_and_again_at_random_moments(finished, place, tmp_path):
    """Study and cells alike, each time at another moment; several starts do what one does."""
    result, _ = finished
    out, chance, kills = tmp_path / "killed", random.Random(), 0
    for _ in range(8):
        process, before = start(place, out), files_in(out)
        # A moment after the study has got further, not after some seconds: a fast machine would be done by then.
        wait_for(lambda before=before, process=process: process.poll() is not None or files_in(out) > before)
        try:
            process.wait(chance.uniform(0, 3))
            break
        except subprocess.TimeoutExpired:
            pids = cells_running(out)
            process.kill()
            process.wait()
            if chance.random() < 0.5:
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
            kills += 1
    assert kills > 0
    assert not study(place / "tiny.toml", out=out, jobs=1, plugins=[place / "broken.py"]).failed
    assert (out / "results.jsonl").read_bytes() == (result.out / "results.jsonl").read_bytes()


def test_ctrl_c_stops_the_cells_and_says_how_to_go_on(place, tmp_path):
    """The signal comes while a cell trains; it saves, and the study says what to type."""
    seen = []

    def on_event(event):
        seen.append(event["event"])
        if event["event"] == "progress" and event.get("phase") == "train" and "epoch" in event:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match=r"go on with: scl-defense study .*--out") as stopped:
        study(place / "tiny.toml", out=tmp_path, jobs=1, overrides={"epochs": 400}, on_event=on_event)
    assert stopped.value.exit_code == 130 and "failed" not in seen
    assert (tmp_path / "cells" / "plain--s0" / "train" / "last.pt").exists()
    assert not (tmp_path / "cells" / "plain--s0" / "failure.json").exists()
    assert cells_running(tmp_path) == []


def test_a_cell_that_is_killed_is_told_from_one_that_fails(tmp_path):
    """As the kernel does when memory runs out."""
    one = Running.__new__(Running)
    one.folder, one._log_start = tmp_path, 0
    (tmp_path / "log.txt").write_text("error: an old one\n")
    one.process = subprocess.Popen([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])
    one.process.wait()
    assert one.reason() == "killed by SIGKILL (out of memory?)"
