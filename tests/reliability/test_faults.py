"""Disks, data, clocks, memory and numbers that fail in the middle of real work: what must be left, and what is said."""

import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from harness import parts_in, records, same_checkpoint, whole
from scl_defense_benchmarks.results import without_times
from scl_defense_benchmarks.state import locked as benchmark_locked
from scl_defense_plugins.generators.corner_noise import CornerNoise
from scl_defense_plugins.trainers.cross_entropy import CrossEntropy

from scl_defense import checkpoint, logs
from scl_defense.cli.app import run
from scl_defense.errors import ComponentError, Interrupted, SclDefenseError, UserError
from scl_defense.recovery import MOST_SKIPPED
from scl_defense.train import train
from scl_defense.types import StepOutput

TINY = {
    "data": "digits", "limit": 128, "batch_size": 32, "val_limit": 16, "val_steps": 1, "epochs": 3,
    "trainer": "cross-entropy", "generator": "corner-noise", "model_options": {"width": 4}, "device": "cpu",
}  # fmt: skip
LINE = ["train", "--limit", "64", "--batch-size", "32", "--val-limit", "16", "--val-steps", "1", "--epochs", "1",
        "-m", "width=2", "--trainer", "cross-entropy", "--generator", "none", "--quiet"]  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return train(**TINY, out=str(tmp_path_factory.mktemp("unbroken")), name="run").run_dir


@pytest.fixture(scope="module")
def best(unbroken):
    return unbroken / "best.pt"


def mounted(*arguments):
    """Whether this machine lets us mount something; the reason when it does not."""
    found = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    return found.stderr.strip() if found.returncode else None


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 600 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if sys.platform != "linux" or (why := mounted("-t", "tmpfs", "-o", "size=600k", "tmpfs", disk)):
        pytest.skip(f"cannot mount a small disk here: {why if sys.platform == 'linux' else sys.platform}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture
def read_only(tmp_path):
    """``read_only(folder)``: nothing can be written there from now on, not even by root."""
    held = []

    def make(folder):
        if sys.platform != "linux" or (why := mounted("--bind", folder, folder)):
            pytest.skip(f"cannot make a folder read-only here: {why if sys.platform == 'linux' else sys.platform}")
        held.append(folder)
        assert mounted("-o", "remount,ro,bind", folder) is None
        with pytest.raises(OSError, match="Read-only"):
            (folder / "x").touch()

    yield make
    for folder in held:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk):
    """Nothing more fits."""
    with open(disk / "filler", "wb", buffering=0) as stream:
        for size in (1 << 16, 1 << 10, 1):
            while True:
                try:
                    stream.write(bytes(size))
                except OSError as error:
                    assert error.errno == errno.ENOSPC
                    break


def one_line(capsys, *says):
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1 and err.startswith("error: "), err
    assert "Traceback" not in err and "unexpected" not in err and all(text in err for text in says), err
    return err


# -- a full disk


def test_training_on_a_full_disk_keeps_the_last_checkpoint_and_goes_on_later(small_disk, unbroken, book):
    def later(event):
        if event["event"] == "epoch" and event["epoch"] == 0:
            fill(small_disk)

    book("faults injected: disk")
    with pytest.raises(UserError, match=r"cannot write .*(best|last)\.pt' \(\d+ bytes\): No space left.* is kept"):
        train(**TINY, out=str(small_disk), name="run", on_event=later)
    here = small_disk / "run"
    assert checkpoint.read(here / "last.pt")[0]["epoch"] == 1 and not parts_in(here)
    with pytest.raises(SclDefenseError, match=r"No space left|cannot write"):  # still full: refused, nothing is lost
        train(resume=here)
    assert checkpoint.read(here / "last.pt")[0]["epoch"] == 1
    (small_disk / "filler").unlink()
    train(resume=here)
    for name in ("last.pt", "best.pt"):
        same_checkpoint(unbroken / name, here / name)
    assert records(here / "metrics.jsonl") == records(unbroken / "metrics.jsonl")
    book("faults survived: disk")


def test_every_writer_on_a_full_disk_is_one_line_and_leaves_nothing(small_disk, best, capsys, book):
    (small_disk / "old.json").write_text("{}")
    fill(small_disk)
    before = sorted(path.name for path in small_disk.iterdir())
    attack = ["benchmark", str(best), "--attacks", "fgsm", "--n", "40", "--probes", "none", "--quiet"]
    for line in (
        [*LINE, "--out", str(small_disk)],
        [*attack, "--out", str(small_disk / "r.json")],
        [*attack, "--out", str(best.parent / "r.json"), "--per-image", str(small_disk / "i.csv")],
        [*attack, "--out", str(best.parent / "r.json"), "--save-examples", str(small_disk / "x.safetensors")],
        ["generate", "--generator", "corner-noise", "--limit", "64", "--out", str(small_disk / "x.safetensors")],
    ):
        book("faults injected: disk")
        assert run([*line, *([] if "--quiet" in line else ["--quiet"])]) == 2, line
        one_line(capsys, "No space left")
        left = [path.name for path in small_disk.rglob("*") if path.suffix in (".pt", ".json", ".csv", ".safetensors")]
        assert left == ["old.json"], left
        assert {"filler", "old.json"} <= set(before)
        book("faults survived: disk")


def test_a_disk_that_is_full_when_bytes_are_synced(tmp_path, monkeypatch, best, capsys):
    """Network and compressing file systems say so late. (Runs everywhere.)"""

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert run([*LINE, "--out", str(tmp_path / "runs")]) == 2
    one_line(capsys, "No space left", "what was there before is kept")
    assert list(tmp_path.iterdir()) == []


# -- folders that cannot be written, or that belong to others


def test_a_read_only_folder_is_one_line(read_only, best, tmp_path, capsys, book):
    closed = tmp_path / "closed"
    (closed / "run").mkdir(parents=True)
    content, _ = checkpoint.read(best.parent / "last.pt")
    checkpoint.save(closed / "run" / "last.pt", {**content, "epoch": 1})
    read_only(closed)
    attack = ["benchmark", str(best), "--attacks", "fgsm", "--n", "20", "--probes", "none", "--quiet"]
    for line, says in (
        ([*LINE, "--out", str(closed)], "choose another --out"),
        (["train", "--resume", str(closed / "run"), "--quiet"], "cannot write in"),
        ([*attack, "--out", str(closed / "r.json")], "choose another --out"),
        (["generate", "--generator", "corner-noise", "--limit", "64", "--quiet", "--out",
          str(closed / "x.safetensors")],
         "choose another --out"),
    ):  # fmt: skip
        book("faults injected: disk")
        assert run(line) == 2, line
        one_line(capsys, says)
        book("faults survived: disk")
    # A checkpoint in a read-only folder can be attacked: its result must only go elsewhere.
    assert run(["info", str(closed / "run" / "last.pt")]) == 0


def test_a_run_folder_of_another_recipe_is_not_touched(unbroken, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in unbroken.iterdir() if path.is_file()}
    assert run([*LINE, "--out", str(unbroken.parent), "--name", "run"]) == 2
    one_line(capsys, "exists; choose another --name")
    assert {path.name: path.read_bytes() for path in unbroken.iterdir() if path.is_file()} == before


def test_a_checkpoint_of_another_recipe_cannot_be_resumed(best, tmp_path):
    """The recipe in the file says another network than its weights."""
    content, _ = checkpoint.read(best.parent / "last.pt")
    config = json.loads(content["config"]) | {"model_options": {"width": 8}, "epochs": 9}
    checkpoint.save(tmp_path / "last.pt", {**content, "config": json.dumps(config)})
    with pytest.raises(UserError, match="not of the run that its recipe describes"):
        train(resume=tmp_path)


def test_the_second_process_is_told_who_holds_the_folder(best, tmp_path, capsys):
    me = f"process {os.getpid()}"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pt").write_bytes((best.parent / "last.pt").read_bytes())
    content, _ = checkpoint.read(tmp_path / "run" / "last.pt")
    checkpoint.save(tmp_path / "run" / "last.pt", {**content, "epoch": 1})
    with logs.locked(tmp_path / "run"):
        assert run(["train", "--resume", str(tmp_path / "run"), "--quiet"]) == 2
        one_line(capsys, me, "wait for it or stop it")
    out = tmp_path / "r.json"
    with benchmark_locked(out):
        assert run(["benchmark", str(best), "--attacks", "fgsm", "--n", "9", "--quiet", "--out", str(out)]) == 2
        one_line(capsys, me, "choose another --out")
    out = tmp_path / "x.safetensors"
    with logs.one_writer(out):
        assert run(["generate", "--generator", "corner-noise", "--limit", "64", "--out", str(out), "--quiet"]) == 2
        one_line(capsys, me, "choose another --out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_a_dead_process_says_of_itself_stops_nobody(best, tmp_path):
    """A holder's name without its lock; and one that a terminal would obey is no command."""
    out = tmp_path / "r.json"
    (tmp_path / ".r.json.holder").write_bytes(b"process 1 \x1b[31m\xff")
    assert "\x1b" not in logs.who_holds(tmp_path / ".r.json.holder")
    line = ["benchmark", str(best), "--attacks", "fgsm", "--n", "9", "--probes", "none", "--quiet", "--out", str(out)]
    assert run(line) == 0 and [path.name for path in tmp_path.iterdir()] == ["r.json"]


# -- data that changed between start and resume


def stop_after_first_epoch(event):
    if event["event"] == "step" and event["epoch"] == 1:
        os.kill(os.getpid(), signal.SIGINT)


def test_changed_or_missing_data_stop_a_resumed_run(tmp_path, capsys, book):
    draw = np.random.RandomState(0)
    images, labels = draw.randint(0, 256, (80, 8, 8, 1)).astype(np.uint8), np.arange(80) % 4
    (tmp_path / "data").mkdir()

    def write(images, labels):
        for split in ("train", "test"):
            np.savez(tmp_path / "data" / f"{split}.npz", images=images, labels=labels)

    write(images, labels)
    with pytest.raises(Interrupted):
        train(**{**TINY, "data": str(tmp_path / "data"), "eps": 0.1}, out=str(tmp_path), name="run",
              on_event=stop_after_first_epoch)  # fmt: skip
    last = (tmp_path / "run" / "last.pt").read_bytes()
    one_pixel, one_label = images.copy(), labels.copy()
    one_pixel[3, 4, 4] ^= 1
    one_label[5] = (one_label[5] + 1) % 4
    for changed in ((one_pixel, labels), (images, one_label), (images[:-1], labels[:-1]), (images[::-1], labels[::-1])):
        write(*changed)
        book("faults injected: data")
        assert run(["train", "--resume", str(tmp_path / "run"), "--quiet"]) == 2
        one_line(capsys, "is not what this run began with", "restore it or start a new run")
        assert (tmp_path / "run" / "last.pt").read_bytes() == last
        book("faults survived: data")
    (tmp_path / "data").rename(tmp_path / "away")
    assert run(["train", "--resume", str(tmp_path / "run"), "--quiet"]) == 2
    one_line(capsys, "data")
    (tmp_path / "away").rename(tmp_path / "data")
    write(images, labels)
    assert run(["train", "--resume", str(tmp_path / "run"), "--quiet"]) == 0


# -- a clock that jumps


def test_a_clock_that_jumps_reaches_no_number(unbroken, tmp_path, monkeypatch, book):
    """Years forwards and backwards at every look: a suspended laptop, a time server, a dead battery."""
    draw, real = random.Random(0), time.time
    monkeypatch.setattr(time, "time", lambda: real() + draw.uniform(-1e9, 1e9))
    began = time.monotonic()
    found = train(**TINY, out=str(tmp_path), name="run")
    assert 0 < found.seconds <= time.monotonic() - began
    same_checkpoint(unbroken / "last.pt", found.last)
    line = ["benchmark", str(found.best), "--attacks", "fgsm,pgd:steps=3", "--n", "60", "--probes", "none", "--quiet",
            "--time-limit", "10m", "--out"]  # fmt: skip
    assert run([*line, str(tmp_path / "a.json")]) == 0
    monkeypatch.undo()
    assert run([*line, str(tmp_path / "b.json")]) == 0
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert all(0 <= row["seconds"] < 600 and row["status"] != "not run" for row in one["attacks"])
    one, two = without_times(one), without_times(two)
    assert one["attacks"] == two["attacks"] and one["worst_cases"] == two["worst_cases"]
    book("faults injected: clock")
    book("faults survived: clock")


# -- memory runs out

NO_MEMORY = {
    "CUDA": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "Python": MemoryError,
    "CPU": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
}


def images_only(most, error, monkeypatch, where):
    """``where`` fails with more than ``most`` images; returns the sizes that it was asked for."""
    sizes = []
    if where == "trainer":
        real = CrossEntropy.step

        def step(self, network, batch, adversarial):
            sizes.append(len(batch.labels))
            if len(batch.labels) > most:
                raise error()
            return real(self, network, batch, adversarial)

        monkeypatch.setattr(CrossEntropy, "step", step)
    else:
        real = CornerNoise.__call__

        def call(self, batch, context):
            sizes.append(batch.views.shape[1])
            if batch.views.shape[1] > most:
                raise error()
            return real(self, batch, context)

        monkeypatch.setattr(CornerNoise, "__call__", call)
    return sizes


@pytest.mark.parametrize("where", ["trainer", "generator"])
@pytest.mark.parametrize("kind", NO_MEMORY)
def test_training_goes_on_in_smaller_parts_and_says_so_once(kind, where, tmp_path, monkeypatch, book):
    sizes, notes = images_only(10, NO_MEMORY[kind], monkeypatch, where), []

    def told(event):
        if event["event"] == "note":
            notes.append(event["text"])

    found = train(**TINY, out=str(tmp_path), name="run", on_event=told)
    assert found.epochs == 3 and len(notes) == 1 and "memory ran out with 32 images" in notes[0]
    assert sizes[:3] == [32, 16, 8] and set(sizes[3:]) == {8} and len(sizes) == 2 + 3 * 4 * 4
    content, _ = checkpoint.read(found.last)
    assert content["parts"] == 4 and all(torch.isfinite(v).all() for v in content["network"].values())
    lines = records(found.run_dir / "metrics.jsonl")
    assert all(math.isfinite(line["loss"]) for line in lines)
    book("faults injected: memory")
    book("faults survived: memory")


def test_a_run_in_parts_is_resumed_in_parts_to_the_same_weights(tmp_path, monkeypatch):
    images_only(20, NO_MEMORY["CUDA"], monkeypatch, "trainer")
    whole_run = train(**TINY, out=str(tmp_path), name="whole")
    with pytest.raises(Interrupted):
        train(**TINY, out=str(tmp_path), name="cut", on_event=stop_after_first_epoch)
    monkeypatch.undo()  # memory is back: the run goes on as it was, for its numbers' sake
    train(resume=tmp_path / "cut")
    same_checkpoint(whole_run.last, tmp_path / "cut" / "last.pt")


def test_the_gradient_of_the_parts_is_that_of_the_whole(tmp_path, monkeypatch):
    """Of a mean over images, where no layer looks at its neighbours (every batch norm uses its running statistics)."""
    real = CrossEntropy.step

    def still(self, network, batch, adversarial):
        network.eval()
        return real(self, network, batch, adversarial)

    monkeypatch.setattr(CrossEntropy, "step", still)
    options = {**TINY, "generator": "none", "batch_size": 27, "precision": "fp32", "optimizer": "sgd", "lr": 0.01}
    one = train(**options, out=str(tmp_path), name="one")
    monkeypatch.undo()
    monkeypatch.setattr(CrossEntropy, "step", still)
    sizes = images_only(7, NO_MEMORY["CPU"], monkeypatch, "trainer")  # 27 = 7 + 7 + 7 + 6
    two = train(**options, out=str(tmp_path), name="two")
    assert set(sizes[2:]) == {7, 6} and checkpoint.read(two.last)[0]["parts"] == 4
    a, b = (checkpoint.read(found.last)[0]["network"] for found in (one, two))
    for name in a:
        if a[name].is_floating_point():
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)
    first, second = (records(found.run_dir / "metrics.jsonl") for found in (one, two))
    assert [line["loss"] for line in first] == pytest.approx([line["loss"] for line in second], rel=1e-4)


def test_memory_that_never_suffices_is_one_line(tmp_path, monkeypatch, capsys):
    images_only(0, NO_MEMORY["CUDA"], monkeypatch, "trainer")
    assert run([*LINE, "--out", str(tmp_path / "runs")]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line.partition(":")[0] for line in lines] == ["note", "error"], lines
    assert "memory ran out with 2 images at a time" in lines[1] and list(tmp_path.iterdir()) == []


# -- numbers that are none


def broken_steps(numbers, monkeypatch, how="loss"):
    """The trainer's steps of these numbers have a loss, or a gradient, that is no number."""
    real, count = CrossEntropy.step, [0]

    def step(self, network, batch, adversarial):
        output, count[0] = real(self, network, batch, adversarial), count[0] + 1
        if count[0] - 1 not in numbers:
            return output
        if how == "loss":
            return StepOutput(output.loss * float("nan"), output.metrics)
        weight = next(network.parameters())
        # The loss is fine, its gradient is 0 times the infinite slope of the root.
        return StepOutput(output.loss + (weight * 0).abs().sqrt().sum() * 0, output.metrics)

    monkeypatch.setattr(CrossEntropy, "step", step)


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_loss_that_is_no_number_stops_with_its_batch_saved(how, tmp_path, monkeypatch, book):
    broken_steps({6}, monkeypatch, how)
    with pytest.raises(ComponentError, match=f"the {how} of trainer 'cross-entropy' is nan at epoch 1, step 2; .*"
                                             r"its batch is in '.*not-finite\.pt'; try a lower --lr"):  # fmt: skip
        train(**TINY, out=str(tmp_path), name="run")
    here = tmp_path / "run"
    content, _ = checkpoint.read(here / "last.pt")
    assert content["epoch"] == 1 and all(torch.isfinite(v).all() for v in content["network"].values())
    saved = torch.load(here / "not-finite.pt", weights_only=True)
    assert (saved["epoch"], saved["step"], saved["seed"]) == (1, 2, 0) and how in saved["what"]
    assert saved["views"].shape == (1, 32, 1, 8, 8) and saved["adversarial"].shape == (1, 32, 1, 8, 8)
    from scl_defense.data import open_data

    split = open_data("digits").split("train", val_fraction=content_of(content)["val_fraction"], limit=128)
    rows = [(split.indices == index).nonzero().item() for index in saved["indices"]]
    assert torch.equal(split.labels[rows], saved["labels"])
    assert torch.equal(split.float_images(torch.tensor(rows)), saved["images"])
    book("faults injected: numbers")
    book("faults survived: numbers")


def content_of(content):
    return json.loads(content["config"])


def test_a_batch_whose_loss_is_no_number_may_be_left_out(tmp_path, monkeypatch, book):
    notes = []
    broken_steps({2, 5}, monkeypatch)
    found = train(**TINY, on_nan="skip", out=str(tmp_path), name="run",
                  on_event=lambda event: notes.append(event["text"]) if event["event"] == "note" else None)  # fmt: skip
    assert len(notes) == 2 and "epoch 0, step 2: this batch is left out, number 1 of at most 10" in notes[0]
    content, _ = checkpoint.read(found.last)
    assert content["skipped"] == 2 and content["skipped_now"] == 0
    for line in records(found.run_dir / "metrics.jsonl"):
        assert math.isfinite(line["loss"]) and line["adversarial_views"] == 1  # means over the batches that were taken
    book("faults injected: numbers")
    book("faults survived: numbers")


def test_a_batch_that_is_left_out_changes_nothing(tmp_path, monkeypatch):
    """Weights, statistics and moments after a step that was left out are those before it."""
    from scl_defense.config import TrainConfig
    from scl_defense.plugins import default_host
    from scl_defense.train import Run

    def state(run):
        return {name: value.clone() for name, value in run.network.state_dict().items()}

    running = Run(TrainConfig(**TINY, on_nan="skip"), default_host(), lambda event: None)
    running.training_mode()
    running.train_step(torch.arange(32), 0, 0)
    before, moments = state(running), str(running.optimizer.state_dict()["state"])
    broken_steps({0}, monkeypatch)
    assert running.train_step(torch.arange(32), 0, 1) == {}
    after = state(running)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert str(running.optimizer.state_dict()["state"]) == moments
    assert all(parameter.grad is None for parameter in running.network.parameters())


def test_too_many_of_them_stop_the_run(tmp_path, monkeypatch):
    broken_steps(set(range(1, 200, 2)), monkeypatch)
    with pytest.raises(ComponentError, match=rf"is nan .* \({MOST_SKIPPED} batches were left out before\)"):
        train(**{**TINY, "epochs": 9}, on_nan="skip", out=str(tmp_path), name="run")
    whole_run = checkpoint.read(tmp_path / "run" / "last.pt")[0]
    assert whole_run["skipped"] <= MOST_SKIPPED
    assert all(torch.isfinite(v).all() for v in whole_run["network"].values())


def test_what_was_left_out_is_in_no_half_written_file(tmp_path, monkeypatch):
    broken_steps({1}, monkeypatch)
    train(**TINY, on_nan="skip", out=str(tmp_path), name="run")
    (tmp_path / "run" / "not-finite.pt").unlink()
    whole(tmp_path)
