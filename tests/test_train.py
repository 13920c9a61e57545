"""The training path: the loop against a plain one, resuming, what it refuses, what it leaves untouched."""

import json
import os
import random
import signal
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scl_defense import ComponentError, UserError, checkpoint, train
from scl_defense.config import TrainConfig
from scl_defense.data import Augment, open_data
from scl_defense.errors import Interrupted
from scl_defense.models import Network, Twin
from scl_defense.plugins import PluginHost, default_host
from scl_defense.runtime import derive_seed, stream
from scl_defense.schedules import learning_rate
from scl_defense.train import Run

TINY = {"limit": 96, "batch_size": 32, "val_limit": 48, "val_steps": 2, "epochs": 2, "model_options": {"width": 4}}


def tiny(tmp_path, **options):
    return train(**{**TINY, "out": str(tmp_path), **options})


def test_a_run_leaves_checkpoints_recipe_and_metrics(tmp_path):
    result = tiny(tmp_path, generator_options={"steps": 2})
    assert result.run_dir == tmp_path / "adv-supcon-contrastive-pgd-digits-s0"
    assert {path.name for path in result.run_dir.iterdir()} - {".lock"} == {
        "best.pt", "last.pt", "config.toml", "metrics.jsonl",
    }  # fmt: skip
    records = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [0, 1]
    assert {"loss", "contrast", "ce_clean", "ce_adv", "val_clean", "val_robust", "lr", "seconds"} <= set(records[0])
    assert tiny(tmp_path, epochs=1).run_dir.name == "adv-supcon-contrastive-pgd-digits-s0-2"  # nothing overwritten


def test_the_loop_equals_a_plain_loop(tmp_path):
    """Cross-entropy on clean images, written here once more with plain torch: the same weights, bit for bit."""
    options = {
        **TINY,
        "trainer": "cross-entropy",
        "generator": "none",
        "out": str(tmp_path),
        "augment": "weak",
        "seed": 5,
    }
    result = train(**options)
    state = random_state()
    data = open_data("digits")
    split = data.split("train", limit=96)
    torch.manual_seed(derive_seed(5, "init"))
    encoder = default_host()["model"].get("small-cnn")(width=4)(data.image_shape)
    network = Network(encoder, 10, data.mean, data.std).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=5e-4)
    augment = Augment("weak", flip=False, image_shape=data.image_shape)
    network.train()
    for epoch in range(2):
        order = torch.randperm(96, generator=stream(5, "order", epoch))
        for step, chosen in enumerate(order.split(32)):
            done = epoch * 3 + step
            share = (done + 1) / (0.6 + 1) if done < 0.6 else 0.5 * (1 + np.cos(np.pi * (done - 0.6) / 5.4))
            optimizer.param_groups[0]["lr"] = 3e-3 * share
            images = augment(split.float_images(chosen), stream(5, "augment", epoch, step, 0))
            optimizer.zero_grad()
            F.cross_entropy(network(images), split.labels[chosen]).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
    restore(state)
    saved = checkpoint.read(result.last)[0]["network"]
    assert saved.keys() == network.state_dict().keys()
    for name, value in network.state_dict().items():
        assert torch.equal(saved[name], value), name


RESUMED = {
    "model-free": {"generator_options": {"steps": 2}},
    "online-ema": {"generator": "contrastive-pgd-online", "generator_options": {"steps": 2, "ema": 0.9}},
    "pgd-probe": {"generator": "pgd", "generator_options": {"steps": 2}, "trainer_options": {"head": "probe"}},
    "dropout-sgd": {
        "trainer": "cross-entropy",
        "generator": "pgd",
        "generator_options": {"steps": 1},
        "optimizer": "sgd",
        "model": "wide-resnet",
        "model_options": {"depth": 10, "widen": 1, "dropout": 0.3},
        "augment": "simclr",
    },
    "averaged-awp": {
        "generator": "pgd",
        "generator_options": {"steps": 1},
        "average": 0.9,
        "awp": 0.01,
        "awp_after": 0.0,
        "strength_end": 0.0,
        "eps_start": 0.0,
        "eps_ramp": 0.5,
    },
    "acl": {"trainer": "acl", "generator_options": {"steps": 1}, "average": 0.5},
}


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("stop_at", [(0, 2), (1, 3)])
def test_resuming_ends_with_exactly_the_same_weights(tmp_path, name, stop_at):
    options = {**TINY, **RESUMED[name]}
    whole = train(**options, out=str(tmp_path / "whole"))

    def stop(event):
        if event["event"] == "step" and (event["epoch"], event["step"]) == stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="--resume") as stopped:
        train(**options, out=str(tmp_path / "broken"), on_event=stop)
    assert stopped.value.exit_code == 130
    torch.rand(7)  # whatever happens between: no hidden state
    (folder,) = (tmp_path / "broken").iterdir()
    resumed = train(resume=folder)
    for file in ("last.pt", "best.pt"):
        mine, other = (checkpoint.read(result.run_dir / file)[0] for result in (resumed, whole))
        for part in ("network", "twin", "training"):
            assert_same(mine[part], other[part])
        assert_same(mine["optimizer"]["state"], other["optimizer"]["state"])
        assert mine["best"] == other["best"] and mine["epoch"] == other["epoch"]
    assert records(resumed) == records(whole)


def test_a_stopped_run_resumes_only_with_its_own_recipe_and_data(tmp_path, monkeypatch):
    def stop(event):
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted) as stopped:
        tiny(tmp_path, generator="none", on_event=stop)
    assert stopped.value.exit_code == 143
    (folder,) = tmp_path.iterdir()
    with pytest.raises(UserError, match="own recipe"):
        train(resume=folder, epochs=5)
    monkeypatch.setattr("scl_defense.data.Data.fingerprint", lambda self, which: "0" * 64)
    with pytest.raises(UserError, match="not what this run began with"):
        train(resume=folder)


def test_a_finished_run_has_nothing_to_resume(tmp_path):
    result = tiny(tmp_path, generator="none", epochs=1)
    with pytest.raises(UserError, match="is finished"):
        train(resume=result.run_dir)
    with pytest.raises(UserError, match="nothing to resume"):
        train(resume=tmp_path / "elsewhere")


def test_the_callers_random_state_and_signal_handlers_stay(tmp_path):
    before, handler = random_state(), signal.getsignal(signal.SIGINT)
    tiny(tmp_path, epochs=1, generator="corner-noise")
    after = random_state()
    assert torch.equal(before[0], after[0]) and np.array_equal(before[1][1], after[1][1]) and before[2] == after[2]
    assert signal.getsignal(signal.SIGINT) is handler


def test_same_seed_same_weights_other_seed_other_weights(tmp_path):
    weights = [
        checkpoint.read(tiny(tmp_path, epochs=1, generator_options={"steps": 1}, seed=seed).last)[0]["network"]
        for seed in (3, 3, 4)
    ]
    assert_same(weights[0], weights[1])
    assert not torch.equal(weights[0]["classifier.weight"], weights[2]["classifier.weight"])


def test_training_learns(tmp_path):
    """Above nine in ten on clean validation images, and adversarial training beats none on the robust ones."""
    common = {"trainer": "cross-entropy", "epochs": 20, "out": str(tmp_path), "limit": 600, "val_limit": 143}
    plain = train(**common, generator="none")
    attacked = train(**common, generator="pgd", generator_options={"steps": 3})
    assert plain.clean > 0.9 and attacked.clean > 0.85
    assert attacked.robust > plain.robust + 0.15


def test_dry_run_writes_nothing(tmp_path):
    plan = train(**TINY, out=str(tmp_path / "runs"), dry_run=True)
    assert plan["steps"] == 6 and plan["estimated_seconds"] > 0 and plan["threat"] == "linf:0.1"
    assert not (tmp_path / "runs").exists()


def test_bf16_trains(tmp_path):
    result = tiny(
        tmp_path, precision="bf16", generator="contrastive-pgd-online", generator_options={"steps": 1}, epochs=1
    )
    assert 0 <= result.robust <= result.clean <= 1


BAD = """
import torch
from scl_defense import hookimpl
from scl_defense.types import component
class Base:
    needs = frozenset()
@component
class OutOfBall(Base):
    def __call__(self, batch, context): return (batch.views[:1] + 0.2).clamp(0, 1)
@component
class OutOfBox(Base):
    def __call__(self, batch, context): return batch.views[:1] - 0.05
@component
class NaN(Base):
    def __call__(self, batch, context): return batch.views[:1] * float("nan")
@component
class Shape(Base):
    def __call__(self, batch, context): return batch.views[0]
@component
class Greedy(Base):
    def __call__(self, batch, context): return context.embed(batch.views[0])
@component
class Odd(Base):
    needs = frozenset({"weights"})
    def __call__(self, batch, context): return batch.views[:1]
@component
class Raises(Base):
    def __call__(self, batch, context): raise KeyError("oops")
@hookimpl
def register_generators(register):
    for cls in (OutOfBall, OutOfBox, NaN, Shape, Greedy, Odd, Raises):
        register(cls.__name__.lower(), cls, summary="broken on purpose")
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("outofball", "left the ball linf:0.1: distance 0.2"),
        ("outofbox", r"left the box \[0, 1\]"),
        ("nan", "NaN or infinite"),
        ("shape", r"must return \(A, 32, 1, 8, 8\), not \(32, 1, 8, 8\)"),
        ("greedy", "used context.embed, which its needs do not declare"),
        ("odd", "needs .*weights"),
        ("raises", "failed: KeyError: 'oops'"),
    ],
)
def test_a_generator_that_breaks_its_contract_is_refused_by_name(tmp_path, name, message):
    plugin = tmp_path / "bad.py"
    plugin.write_text(BAD)
    with pytest.raises(ComponentError, match=f"generator '{name}'.*{message}"):
        tiny(tmp_path / "runs", host=PluginHost(files=[plugin]), generator=name)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    with pytest.raises(ComponentError, match="the loss of trainer 'adv-supcon' is"):
        tiny(tmp_path, generator="none", lr=1e30, clip=0.0, epochs=3, batch_size=96)
    for path in {*tmp_path.rglob("best.pt"), *tmp_path.rglob("last.pt")}:
        assert all(
            torch.isfinite(v).all() for v in checkpoint.read(path)[0]["network"].values() if v.is_floating_point()
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": "-1"}, "eps '-1'"),
        ({"eps": "8"}, "larger than the whole range"),
        ({"generator": "contrastve-pgd"}, "did you mean 'contrastive-pgd'"),
        ({"generator_options": {"stepz": 3}}, "did you mean 'steps'"),
        ({"generator_options": {"steps": "many"}}, "valid integer"),
        ({"trainer_options": {"temperature": 0}}, "greater than 0"),
        ({"data": "no-such-data"}, "no data set named"),
        ({"device": "cuda:9"}, "not there|CUDA"),
        ({"device": "quantum"}, "unknown"),
        ({"epochs": 0}, "epochs"),
        ({"epoch": 3}, "did you mean 'epochs'"),
        ({"logger": ("jsonz",)}, "did you mean 'jsonl'"),
        ({"name": "../up"}, "name"),
        ({"generator": "none", "trainer_options": {"ce_clean": 0}}, "never train its classifier"),
    ],
)
def test_a_wrong_recipe_is_one_line_and_writes_nothing_useful(tmp_path, options, message):
    with pytest.raises(UserError, match=message) as error:
        tiny(tmp_path, **options)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.pt"))


def test_the_schedule_rises_then_falls_along_a_cosine():
    config = TrainConfig(lr=2.0, warmup=0.2)
    values = [learning_rate(config, step, 30) / 2 for step in range(30)]
    assert values[:6] == pytest.approx([(i + 1) / 7 for i in range(6)])
    assert values[6] == 1.0 and values[18] == pytest.approx(0.5) and 0 < values[29] < 0.01
    assert all(a > b for a, b in pairwise(values[6:]))
    assert learning_rate(TrainConfig(warmup=0.0), 0, 5) == 3e-3 and learning_rate(TrainConfig(warmup=1.0), 4, 5) < 3e-3


# clean, robust: half trained, then better and better, then robustness collapses under a clean accuracy that stays
HISTORY = [(0.3, 0.6), (0.7, 0.5), (0.95, 0.4), (0.9, 0.5), (0.96, 0.0)]


@pytest.mark.parametrize(
    ("views", "rule", "kept"),
    [
        (1.0, "auto", [0, 1, 2, 3]),  # the mean, not the half-trained network
        (1.0, "robust", [0]),
        (0.0, "auto", [0, 1, 2, 4]),  # a plain run: the most accurate
        (0.0, "mean", [0, 1, 2, 3]),
        (1.0, "clean", [0, 1, 2, 4]),
        (1.0, "last", [0, 1, 2, 3, 4]),
    ],
)
def test_which_checkpoint_is_kept(views, rule, kept):
    run = Run(TrainConfig(**TINY, select=rule), default_host(), lambda event: None)
    run.progress.sums = {"adversarial_views": views}
    chosen = []
    for place, (clean, robust) in enumerate(HISTORY):
        if run.is_better(clean, robust):
            run.progress.best = {"clean": clean, "robust": robust}
            chosen.append(place)
    assert chosen == kept


def test_a_run_that_fails_before_its_first_checkpoint_leaves_no_folder(tmp_path, monkeypatch):
    def fail(self, *arguments):
        raise ComponentError("broken")

    monkeypatch.setattr(Run, "train_step", fail)
    with pytest.raises(ComponentError):
        tiny(tmp_path, generator="none", epochs=1, name="mine")
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_that_fails_takes_nothing_away(tmp_path, monkeypatch):
    """A copy of a checkpoint under another name, among a user's other files."""

    def stop(event):
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        tiny(tmp_path, generator="none", on_event=stop)
    (folder,) = tmp_path.iterdir()
    (folder / "last.pt").rename(folder / "copy.pt")
    (folder / "thesis.txt").write_text("years of work")

    def fail(self, run_dir, stop):
        raise ComponentError("broken")

    monkeypatch.setattr(Run, "run", fail)
    with pytest.raises(ComponentError):
        train(resume=folder / "copy.pt")
    assert (folder / "thesis.txt").exists() and (folder / "copy.pt").exists()


def test_eps_may_be_a_number_and_an_empty_one_is_an_error(tmp_path):
    assert train(**TINY, eps=0.2, generator="none", out=str(tmp_path), dry_run=True)["threat"] == "linf:0.2"
    with pytest.raises(UserError, match="eps '' is not a radius"):
        tiny(tmp_path, eps="")


def test_bf16_does_not_change_what_a_model_free_generator_makes(monkeypatch):
    made = {}
    for precision in ("fp32", "bf16"):
        run = Run(TrainConfig(**TINY, precision=precision), default_host(), lambda event: None)
        original = run.generate
        monkeypatch.setattr(run, "generate", lambda *a, f=original, p=precision: made.setdefault(p, f(*a)))
        run.train_step(torch.arange(32), 0, 0)
    assert torch.equal(made["fp32"], made["bf16"])


def test_the_twin_averages_weights_and_measures_its_own_statistics():
    torch.manual_seed(0)
    encoder = default_host()["model"].get("small-cnn")(width=4)((1, 8, 8))
    network = Network(encoder, 10, [0.5], [0.5], projection=(8, 4))
    twin = Twin(network, 0.9)
    expected = [p.clone() for p in network.parameters()]
    statistics = [b.clone() for n, b in network.named_buffers() if "running" in n]
    for t in range(3):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
        twin.update(network, torch.rand(16, 1, 8, 8))
        momentum = min(0.9, (1 + t) / (10 + t))
        expected = [momentum * a + (1 - momentum) * b for a, b in zip(expected, network.parameters(), strict=True)]
    for mine, theirs in zip(twin.network.parameters(), expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    moved = [b for n, b in twin.network.named_buffers() if "running" in n]
    assert any(not torch.equal(a, b) for a, b in zip(moved, statistics, strict=True))
    assert all(
        torch.equal(a, b)
        for a, b in zip([b for n, b in network.named_buffers() if "running" in n], statistics, strict=True)
    )
    assert not twin.network.training


def random_state():
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def restore(state):
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])
    random.setstate(state[2])


def records(result):
    lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def assert_same(mine, other):
    if isinstance(mine, dict):
        assert mine.keys() == other.keys()
        for name in mine:
            assert_same(mine[name], other[name])
    elif isinstance(mine, torch.Tensor):
        assert torch.equal(mine, other)
    else:
        assert mine == other
