"""Processes killed at random moments of real runs: nothing is lost, nothing half-written, and the end is the same.

Moments are drawn relative to progress (a file that appears or grows, a line of output), never to seconds: machines
differ in speed. A third of them wait for the temporary file of a save, so that the kill falls into the save.
"""

import contextlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from harness import (
    PATIENCE,
    TIMES,
    Warm,
    draw_for,
    lines_of,
    parts_in,
    records,
    same_checkpoint,
    same_tensors,
    size_of,
    strike,
    whole,
)
from safetensors import safe_open
from scl_defense_benchmarks.results import without_times

from scl_defense import checkpoint

pytestmark = pytest.mark.faults

SIGNALS = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
TRAIN = [
    "train", "--limit", "160", "--batch-size", "32", "--val-limit", "48", "--val-steps", "2", "--epochs", "6",
    "-m", "width=4", "--generator", "contrastive-pgd", "-g", "steps=2", "--quiet", "--out", ".", "--name", "run",
]  # fmt: skip
KINDS = {
    "plain": [],
    "twin and average": ["--generator", "contrastive-pgd-online", "-g", "ema=0.9", "--average", "0.9", "--awp=0.005"],
}


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    found = Warm(tmp_path_factory.mktemp("warm"))
    yield found
    found.close()


def train_moment(draw, run):
    """A moment of training, as a question that becomes true."""
    kind = draw.choice(["save", "save", "epoch", "start", "config"])
    if kind == "save":
        wanted = draw.choice(["best.pt", "last.pt"])
        skip, seen = draw.randrange(4), set()

        def moment():
            seen.update(name for name in parts_in(run) if wanted in name)
            fresh = [name for name in parts_in(run) if wanted in name]
            stamp = size_of(run / wanted), lines_of(run / "metrics.jsonl")
            return bool(fresh) and (skip == 0 or stamp[1] >= skip)

        return moment
    if kind == "epoch":
        wanted = lines_of(run / "metrics.jsonl") + draw.randint(1, 3)
        return lambda: lines_of(run / "metrics.jsonl") >= wanted
    if kind == "config":
        return lambda: (run / "config.toml").exists()
    return lambda: (run / ".holder").exists() or (run / ".lock").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_killed_training_ends_with_the_same_weights(kind, warm, tmp_path, book):
    line, draw = [*TRAIN, *KINDS[kind]], draw_for(f"train {kind}")
    (tmp_path / "whole").mkdir()
    assert warm.run(*line, cwd=tmp_path / "whole").code == 0
    kills = saves = rounds = 0
    while kills < 16:
        rounds += 1
        assert rounds < 60, "the runs end before they are hurt"
        here = tmp_path / f"broken{rounds}"
        here.mkdir()
        run, again = here / "run", line
        for _ in range(draw.randint(1, 5)):
            process = warm.start(*again, cwd=here)
            number = draw.choice(SIGNALS)
            if not strike(process, number, train_moment(draw, run), draw):
                break
            kills += 1
            assert process.code == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number], process.err
            saves += any(f".{process.pid}.part" in name for name in parts_in(run))
            whole(here)
            if number != signal.SIGKILL:
                assert "Traceback" not in process.err
                assert not [name for name in parts_in(run) if f".{process.pid}.part" in name]
            if (run / "last.pt").exists():
                again = ["train", "--resume", "run", "--quiet"]
            elif run.exists():  # killed before its first save: there is nothing to go on with, and that is said
                refused = warm.run("train", "--resume", "run", cwd=here)
                assert refused.code == 2 and "nothing to resume" in refused.err
                run.rename(here / f"lost{kills}")
                again = line
            book("faults injected: train")
        final = warm.run(*again, cwd=here)
        if final.code == 2:
            assert "is finished" in final.err
        else:
            assert final.code == 0, final.err
        assert not parts_in(run), "what a killed save left is swept up"
        for name in ("last.pt", "best.pt"):
            same_checkpoint(tmp_path / "whole" / "run" / name, run / name)
        assert records(tmp_path / "whole" / "run" / "metrics.jsonl") == records(run / "metrics.jsonl")
        book("faults survived: train", kills - getattr(book, "before", 0))
        book.before = kills
    print(f"{kills} kills, {saves} of them in a save")
    book("kills within a save", saves)


ATTACKS = "noise:draws=20,native:pgd:steps=20:restarts=2,fgsm"


def test_killed_benchmarks_end_with_the_same_verdict_for_every_image(warm, tmp_path, book):
    draw = draw_for("benchmark")
    assert warm.run(*TRAIN, "--epochs", "2", cwd=tmp_path).code == 0
    line = ["benchmark", tmp_path / "run" / "best.pt", "--attacks", ATTACKS, "--eps", "0.02,0.05", "--quiet", "--json",
            "--out", "result.json", "--per-image", "images.csv", "--save-examples", "x.safetensors"]  # fmt: skip

    def found(folder):
        return without_times(json.loads((folder / "result.json").read_text()))

    (tmp_path / "whole").mkdir()
    assert warm.run(*line, cwd=tmp_path / "whole").code == 0
    expected, kills, rounds = found(tmp_path / "whole"), 0, 0
    while kills < 12:
        rounds += 1
        assert rounds < 50
        here = tmp_path / f"broken{rounds}"
        here.mkdir()
        state = here / "result.json.state"
        for _ in range(draw.randint(1, 4)):
            process, number = warm.start(*line, cwd=here), draw.choice(SIGNALS)
            wanted = lines_of(state) + draw.randint(1, 4)
            kind = draw.choice(["chunk", "chunk", "start", "save", "csv"])
            moment = {
                "chunk": lambda wanted=wanted, state=state: lines_of(state) >= wanted,
                "start": state.exists,
                "save": lambda here=here: bool(parts_in(here)),
                "csv": (here / "images.csv").exists,
            }[kind]
            if not strike(process, number, moment, draw):
                break
            kills += 1
            book("faults injected: benchmark")
            assert process.code == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number], process.err
            assert "Traceback" not in process.err
            # What an earlier kill left makes some moments come before the command has begun: then it says nothing.
            if number != signal.SIGKILL and process.err:
                assert "error: stopped" in process.err
                # Said by every benchmark that has begun: it has added to its state, which the last act takes away.
                begun = kind == "chunk" and state.exists()
                assert not begun or "the same command goes on where it stopped" in process.err
            whole(here)
            if (here / "result.json").exists():
                assert found(here) == expected
        final = warm.run(*line, cwd=here)
        assert final.code == 0, final.err
        assert found(here) == expected
        assert (here / "images.csv").read_bytes() == (tmp_path / "whole" / "images.csv").read_bytes()
        unbroken = tmp_path / "whole" / "x.safetensors"
        with safe_open(here / "x.safetensors", "pt") as one, safe_open(unbroken, "pt") as two:
            same_tensors({k: one.get_tensor(k) for k in sorted(one.keys())},
                         {k: two.get_tensor(k) for k in sorted(two.keys())})  # fmt: skip
        assert sorted(p.name for p in here.iterdir()) == sorted(p.name for p in (tmp_path / "whole").iterdir())
        book("faults survived: benchmark", kills - getattr(book, "before", 0))
        book.before = kills


def test_killed_generation_leaves_no_file_or_the_whole_one(warm, tmp_path, book):
    draw = draw_for("generate")
    line = ["generate", "--generator", "contrastive-pgd", "-g", "steps=1", "--limit", "600", "--copies", "6",
            "--batch-size", "100", "--out", "x.safetensors"]  # fmt: skip
    (tmp_path / "whole").mkdir()
    assert warm.run(*line, cwd=tmp_path / "whole").code == 0
    expected = (tmp_path / "whole" / "x.safetensors").read_bytes()
    kills = rounds = 0
    while kills < 12:
        rounds += 1
        assert rounds < 60
        here = tmp_path / f"broken{rounds}"
        here.mkdir()
        for _ in range(draw.randint(1, 4)):
            process, number = warm.start(*line, cwd=here), draw.choice(SIGNALS)
            wanted = draw.randint(1, 5)
            moment = draw.choice([
                lambda here=here: bool(parts_in(here)),
                lambda process=process, wanted=wanted: process.err.count("\n") >= wanted,
                (here / ".x.safetensors.lock").exists,
            ])  # fmt: skip
            if not strike(process, number, moment, draw):
                break
            kills += 1
            book("faults injected: generate")
            assert process.code == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number], process.err
            assert "Traceback" not in process.err
            if (here / "x.safetensors").exists():  # the signal came after the file was there
                assert (here / "x.safetensors").read_bytes() == expected
                (here / "x.safetensors").unlink()
            if number != signal.SIGKILL:
                assert [path.name for path in here.iterdir()] == [] or kills
        final = warm.run(*line, cwd=here)
        assert final.code in (0, 2) and ("exists already" in final.err) == (final.code == 2), final.err
        assert (here / "x.safetensors").read_bytes() == expected
        assert [path.name for path in here.iterdir()] == ["x.safetensors"], "what a killed one left is swept up"
        book("faults survived: generate", kills - getattr(book, "before", 0))
        book.before = kills


# -- exactly within a save: the process stands still there until it is killed, on slow and fast machines alike

SAVES = {  # what writes: (its command, {file: the save of it in which the kill falls})
    "train": (TRAIN, {"last.pt": (2, 4), "best.pt": (1, 2), "config.toml": (1,)}),
    "benchmark": (["benchmark", "given.pt", "--attacks", "fgsm", "--n", "40", "--probes", "none", "--quiet", "--out",
                   "r.json", "--per-image", "i.csv"], {"r.json": (1,), "r.json.state": (1,), "i.csv": (1,)}),
    "generate": (["generate", "--generator", "corner-noise", "--limit", "64", "--out", "x.safetensors", "--quiet"],
                 {"x.safetensors": (1,)}),
    "report": (["report", "given.json", "--out", "page.html", "--quiet"], {"page.html": (1,), "page-table.csv": (1,)}),
}  # fmt: skip
POINTS = ["half", "written", "synced", "replaced"]


@pytest.fixture(scope="module")
def prepared(warm, tmp_path_factory):
    """A folder with a checkpoint and a result of it."""
    folder = tmp_path_factory.mktemp("prepared")
    assert warm.run(*TRAIN, "--epochs", "1", cwd=folder).code == 0
    (folder / "run" / "best.pt").rename(folder / "given.pt")
    line = ["benchmark", "given.pt", "--attacks", "fgsm", "--n", "40", "--probes", "none", "--out", "given.json"]
    made = warm.run(*line, cwd=folder)
    assert made.code == 0, made.err
    return folder


def files(folder):
    """Every file that is not hidden (locks, parts) by its name, with its bytes."""
    found = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if not name.name.startswith(".")}


@pytest.mark.parametrize("what", SAVES)
def test_killed_in_the_middle_of_a_save(what, warm, prepared, tmp_path, book):
    """Half of the bytes written, all of them, synced, renamed: the final name holds the old file or the new one."""
    line, wanted = SAVES[what]

    def folder(name):
        shutil.copytree(prepared, tmp_path / name, ignore=shutil.ignore_patterns("run", ".*"))
        return tmp_path / name

    def comparable(here):
        """Files by name, without times; pages are compared by their size alone: they show the time of day."""
        found = {}
        for name, content in files(here).items():
            if name.suffix == ".pt":
                found[name] = {k: v for k, v in checkpoint.read(here / name)[0].items() if k not in TIMES}
            elif name.suffix == ".json" and name.name in ("r.json", "given.json"):
                found[name] = without_times(json.loads(content))
            elif name.suffix == ".jsonl":
                found[name] = records(here / name)
            elif name.suffix not in (".html", ".json"):
                found[name] = content
        return found

    assert warm.run(*line, cwd=folder("whole")).code == 0
    expected = comparable(tmp_path / "whole")
    for file, numbers in wanted.items():
        for place, (point, nth) in enumerate((point, nth) for point in POINTS for nth in numbers):
            here, marker = folder(f"{file}-{place}"), tmp_path / f"{file}-{place}.marker"
            process = warm.start(*line, cwd=here, pause={"name": file, "at": point, "nth": nth, "marker": str(marker)})
            assert strike(process, signal.SIGKILL, marker.exists, None), process.err
            book(f"faults injected: {what}")
            book("kills within a save")
            (target,) = here.rglob(file) if nth > 1 or point == "replaced" else [None]
            assert target is None or target.stat().st_size > 0
            assert target is not None or not list(here.rglob(file)), "a first save has no name before its end"
            whole(here)
            again = line
            if what == "train":
                if (here / "run" / "last.pt").exists():
                    again = ["train", "--resume", "run", "--quiet"]
                else:
                    shutil.rmtree(here / "run")
            final = warm.run(*again, cwd=here)
            taken = what == "generate" and point == "replaced"  # it was done
            assert final.code == (2 if taken else 0), (file, point, final.err)
            same_tensors(expected, comparable(here), f"{file} {point}")
            # A report holds no lock, so that it takes nothing away that another one may be writing.
            assert what == "report" or not list(here.rglob("*.part")), "what the killed save left is swept up"
            book(f"faults survived: {what}")


# -- reports and studies


def test_killed_reports_leave_no_page_or_a_whole_one(warm, prepared, tmp_path, book):
    draw, kills, rounds = draw_for("report"), 0, 0
    line = ["report", "given.json", "--out", "page.html", "--quiet"]
    while kills < 6:
        rounds += 1
        assert rounds < 40
        here = tmp_path / str(rounds)
        shutil.copytree(prepared, here, ignore=shutil.ignore_patterns("run", ".*"))
        process, number = warm.start(*line, cwd=here), draw.choice(SIGNALS)
        name = draw.choice(["page.html", "page-table.csv", "page-model-info.json"])
        moment = draw.choice([lambda here=here: bool(parts_in(here)), (here / name).exists, lambda: True])
        if not strike(process, number, moment, draw):
            continue
        kills += 1
        book("faults injected: report")
        assert process.code == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number], process.err
        assert "Traceback" not in process.err
        whole(here)
        page = here / "page.html"
        assert not page.exists() or page.read_text().rstrip().endswith("</html>")
        assert warm.run(*line, cwd=here).code == 0 and page.read_text().rstrip().endswith("</html>")
        book("faults survived: report")


STUDY = """
title = "Tiny"
seeds = [0]
baseline = "plain"
n = 20
[base]
device = "cpu"
epochs = 3
limit = 200
val_limit = 20
val_steps = 1
batch_size = 32
trainer = "cross-entropy"
[base.model_options]
width = 4
[methods.plain]
generator = "none"
[batteries.fast]
attacks = "native:fgsm,native:pgd:steps=5"
"""


def cells_of(out):
    """Processes that work on cells of this study."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            if "scl_defense_benchmarks.study.cell" in words and any(word.startswith(str(out)) for word in words):
                found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for the cells' processes in /proc")
def test_killed_studies_end_with_the_same_results(warm, tmp_path, book):
    """The study, its cell, or both; every start goes on where the one before was stopped."""
    draw, kills, rounds = draw_for("study"), 0, 0
    (tmp_path / "tiny.toml").write_text(STUDY)
    line = ["study", "tiny.toml", "--jobs", "1", "--quiet", "--out"]
    first = warm.run(*line, tmp_path / "whole", cwd=tmp_path)
    assert first.code == 0, first.err
    expected = (tmp_path / "whole" / "results.jsonl").read_bytes()
    while kills < 4:
        rounds += 1
        assert rounds < 30
        out = tmp_path / f"broken{rounds}"
        cell = out / "cells" / "plain--s0"
        train = cell / "train"
        milestones = [
            (cell / "cell.json").exists,
            train.exists,
            (train / "best.pt").exists,
            (cell / "fast.json.state").exists,
            (cell / "record.json").exists,
            lambda train=train: bool(parts_in(train)),
            lambda train=train: lines_of(train / "metrics.jsonl") >= 2,
            lambda out=out: bool(parts_in(out)),
        ]
        for moment in draw.sample(milestones, draw.randint(2, 3)):
            process, number = warm.start(*line, out, cwd=tmp_path), draw.choice(SIGNALS)
            if not strike(process, number, moment, draw):
                break
            kills += 1
            book("faults injected: study")
            assert process.code == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number], process.err
            if draw.random() < 0.4:  # its cells too; else they notice by themselves that nobody holds the rope
                for pid in cells_of(out):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            until = time.monotonic() + PATIENCE
            while cells_of(out):
                assert time.monotonic() < until, "a cell outlived its study"
                time.sleep(0.02)
            whole(out)
        final = warm.run(*line, out, cwd=tmp_path)
        assert final.code == 0, final.err
        assert (out / "results.jsonl").read_bytes() == expected
        assert not list(out.rglob("*.part"))
        book("faults survived: study", kills - getattr(book, "before", 0))
        book.before = kills
