"""What a run may do beside its plain loop: weight averages, AWP, early stopping, schedules, starting weights, cost."""

import copy
import json
import os
import shutil
import signal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from scl_defense import UserError, checkpoint, load_classifier, train
from scl_defense.config import TrainConfig
from scl_defense.data import open_data
from scl_defense.errors import Interrupted
from scl_defense.models import Network, Twin
from scl_defense.optim import adversarial_weights
from scl_defense.passes import counted
from scl_defense.plugins import default_host
from scl_defense.probe import fit_probe
from scl_defense.protocols import PROTOCOLS, finetune, finetune_config
from scl_defense.schedules import radius_at, strength_at
from scl_defense.threat import ThreatModel
from scl_defense.train import Run

TINY = {"limit": 96, "batch_size": 32, "val_limit": 48, "val_steps": 2, "epochs": 2, "model_options": {"width": 4}}
PLAIN = {"trainer": "cross-entropy", "generator": "none"}


def tiny(tmp_path, **options):
    return train(**{**TINY, "out": str(tmp_path), **options})


def run_of(**options):
    return Run(TrainConfig(**{**TINY, **PLAIN, **options}), default_host(), lambda event: None)


def one_step(run):
    return run.train_step(torch.arange(32), 0, 0)


# -- adversarial weight perturbation


def test_awp_moves_matrices_up_their_gradient_and_brings_them_back():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    before = copy.deepcopy(network.state_dict())
    network(torch.randn(8, 3)).square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters()}
    with adversarial_weights(network, 0.1):
        for name, weight in network.named_parameters():
            moved = weight.detach() - before[name]
            if weight.dim() == 1:
                assert not moved.any()
            else:  # relative length gamma, along the gradient
                torch.testing.assert_close(moved.norm(), 0.1 * before[name].norm())
                assert float(F.cosine_similarity(moved.flatten(), gradients[name].flatten(), dim=0)) > 0.9999
            assert weight.grad is None
        network[0].weight.grad = torch.ones_like(network[0].weight)
    for name, weight in network.named_parameters():
        assert torch.equal(weight, before[name])
    assert bool((network[0].weight.grad == 1).all())  # the gradient made inside is the one that counts


def test_a_step_with_awp_takes_the_gradient_at_the_moved_weights():
    """Written once more with autograd: one SGD step from w along the gradient at w + gamma ||w|| g / ||g||."""
    options = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "clip": 0.0, "warmup": 0.0, "lr": 0.1}
    run = run_of(**options, awp=0.05, awp_after=0.0, augment="none")
    network = copy.deepcopy(run.network).train()
    images, labels = run.train_split.float_images(torch.arange(32)), run.train_split.labels[:32]
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    F.cross_entropy(copy.deepcopy(network)(images), labels)  # statistics of the first pass must not stay
    probe = copy.deepcopy(network)
    F.cross_entropy(probe(images), labels).backward()
    with torch.no_grad():
        for mine, theirs in zip(network.parameters(), probe.parameters(), strict=True):
            if mine.dim() > 1:
                mine.add_(0.05 * mine.norm() * theirs.grad / theirs.grad.norm())
    loss = F.cross_entropy(network(images), labels)
    loss.backward()
    metrics = one_step(run)
    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    for (name, mine), other in zip(run.network.named_parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(mine, before[name] - 0.1 * other.grad, rtol=1e-4, atol=1e-6)
    for mine, other in zip(run.network.buffers(), network.buffers(), strict=True):
        torch.testing.assert_close(mine, other)  # the batch was seen once
    assert metrics["backwards"] == 2


def test_awp_waits_for_its_share_of_the_steps():
    run = run_of(awp=0.05, awp_after=0.5)  # 3 steps an epoch, 2 epochs
    costs = [run.train_step(torch.arange(32), epoch, step)["backwards"] for epoch in (0, 1) for step in range(3)]
    assert costs == [1, 1, 1, 2, 2, 2]


# -- weight averages


def test_the_average_is_the_running_mean_of_the_weights(tmp_path):
    torch.manual_seed(1)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3))
    encoder.feature_dim = 3
    network = Network(encoder, 2, (0.5,), (0.5,))
    average = Twin(network, 0.6, "averaged")
    expected = {name: value.clone() for name, value in network.state_dict().items()}
    for step in range(6):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
        network.train()(torch.rand(5, 1, 2, 2))
        momentum = min(0.6, (1 + step) / (10 + step))
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                expected[name] = momentum * expected[name] + (1 - momentum) * value
        average.update(network, torch.rand(5, 1, 2, 2))
    found = average.network.state_dict()
    for name, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(found[name], value)
    assert found["encoder.2.num_batches_tracked"] == 6 and not average.network.training


def test_the_average_is_what_is_validated_saved_and_loaded(tmp_path):
    result = tiny(tmp_path, **PLAIN, average=0.9)
    content, _ = checkpoint.read(result.last)
    different = [
        name for name, value in content["training"].items()
        if value.is_floating_point() and not torch.equal(value, content["network"][name])
    ]  # fmt: skip
    assert "classifier.weight" in different
    loaded = load_classifier(result.last).network
    assert torch.equal(loaded.classifier.weight, content["network"]["classifier.weight"])
    data = open_data("digits")
    val = data.split("val", limit=48)
    with torch.no_grad():
        right = float((loaded(val.float_images()).argmax(1) == val.labels).float().mean())
    last = json.loads((result.run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["val_clean"] == pytest.approx(right)


# -- early stopping, schedules


def test_patience_ends_a_run_that_no_longer_gets_better(tmp_path, monkeypatch):
    accuracies = iter([(0.5, 0.1), (0.6, 0.1), (0.6, 0.1), (0.55, 0.1), (0.9, 0.9)])
    monkeypatch.setattr("scl_defense.probe.accuracy", lambda *a, **k: next(accuracies))
    result = tiny(tmp_path, **PLAIN, epochs=5, patience=2)
    assert (result.epochs, result.best_epoch, result.clean) == (4, 1, 0.6)
    with pytest.raises(UserError, match="is finished"):
        train(resume=result.run_dir)


def test_radius_schedule():
    threat = ThreatModel("linf", "8/255")
    config = TrainConfig(eps_start=0.0, eps_ramp=0.5)
    radii = [radius_at(config, threat, step, 8).radius / threat.radius for step in range(8)]
    assert radii == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1, 1, 1])
    assert radius_at(config, threat, 4, 8) is threat  # exactly the ball as written, from then on
    falling = TrainConfig(eps_start=2.0, eps_ramp=1.0)
    assert [radius_at(falling, threat, s, 4).radius / threat.radius for s in range(4)] == pytest.approx(
        [2, 1.75, 1.5, 1.25]
    )
    assert radius_at(TrainConfig(), threat, 0, 8) is threat


def test_the_radius_of_a_step_reaches_the_generator():
    run = run_of(trainer="adv-supcon", generator="corner-noise", eps_start=0.5, eps_ramp=1.0)
    seen = []
    original = run.trainer.step

    class Spy:
        views, head = run.trainer.views, run.trainer.head

        def step(self, network, batch, adversarial):
            seen.append(float((adversarial[0] - batch.views[0]).abs().max()))
            return original(network, batch, adversarial)

    run.trainer = Spy()
    for step in range(3):
        run.train_step(torch.arange(32), 0, step)
    assert seen == pytest.approx([0.05, 0.05 + 0.05 / 6, 0.05 + 0.05 / 3], abs=1e-6)


def test_strength_schedule_is_dynacls():
    """Luo et al. 2023: s(t) = 1 - (t - 1) / T, set anew every 50 of 1000 epochs."""
    config = TrainConfig(epochs=1000, strength_end=0.0, strength_every=50)
    for epoch in range(1000):
        assert strength_at(config, epoch) == pytest.approx(1 - (epoch // 50) * 50 / 1000)
    assert strength_at(TrainConfig(strength=0.7), 30) == 0.7


# -- cost


def test_cost_counts_every_pass_of_the_encoder(tmp_path):
    """PGD of K steps: K passes with a gradient. SupCon: one pass a view, clean and adversarial."""
    for options, forwards, backwards in (
        (PLAIN, 1, 1),
        ({"trainer": "adv-supcon", "generator": "corner-noise"}, 3, 3),
        ({"trainer": "adv-supcon", "generator_options": {"steps": 4}}, 3, 3),  # model-free: not on the encoder
        ({"trainer": "cross-entropy", "generator": "pgd", "generator_options": {"steps": 4}}, 5, 5),
        ({"trainer": "adv-supcon", "generator": "contrastive-pgd-online", "generator_options": {"steps": 4}}, 8, 7),
        ({"trainer": "trades", "generator_options": {"steps": 4}}, 7, 6),
    ):
        result = tiny(tmp_path, **options, epochs=1)
        assert (result.forwards, result.backwards) == (forwards, backwards), options
        assert tuple(checkpoint.read(result.last)[0]["passes"]) == (forwards, backwards)


def test_counting_ends_with_its_block():
    layer = nn.Linear(2, 2)
    with counted(layer, layer) as passes:
        layer(torch.rand(3, 2))
        with torch.no_grad():
            layer(torch.rand(4, 2))
    layer(torch.rand(5, 2))
    assert (passes.forwards, passes.backwards) == (7, 3)


# -- starting from an encoder, and the protocols


@pytest.fixture(scope="module")
def encoder_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    return train(**{**TINY, "out": str(folder), "trainer": "acl", "generator_options": {"steps": 1}, "seed": 3})


def test_slf_is_a_probe_on_the_untouched_encoder(encoder_run, tmp_path):
    result = finetune(encoder_run.last, "slf", out=str(tmp_path))
    before, after = (checkpoint.read(path)[0]["network"] for path in (encoder_run.last, result.best))
    for name, value in before.items():
        if name.startswith(("encoder.", "normalize.")):
            assert torch.equal(after[name], value), name
    loaded = load_classifier(encoder_run.last)
    loaded.network.to(memory_format=torch.channels_last)  # as in training: the probe on 96 images feels every rounding
    fit_probe(loaded.network, open_data("digits").split("train", limit=96))
    torch.testing.assert_close(after["classifier.weight"], loaded.network.classifier.weight)


def test_alf_trains_the_head_alone_on_adversarials(encoder_run, tmp_path):
    result = finetune(encoder_run.last, "alf", epochs=2, out=str(tmp_path))
    before, after = (checkpoint.read(path)[0]["network"] for path in (encoder_run.last, result.last))
    for name, value in before.items():
        if name.startswith("encoder."):
            assert torch.equal(after[name], value), name
    slf = finetune(encoder_run.last, "slf", out=str(tmp_path))
    assert not torch.equal(after["classifier.weight"], checkpoint.read(slf.best)[0]["network"]["classifier.weight"])
    assert result.backwards == 10  # the attack's; the head's own step goes through no encoder


def test_aff_trains_everything_with_trades(encoder_run, tmp_path):
    result = finetune(encoder_run.last, "aff", epochs=1, out=str(tmp_path))
    content = checkpoint.read(result.last)[0]
    before = checkpoint.read(encoder_run.last)[0]["network"]
    assert "TRADES" in content["trainer"] and "'kl'" in content["generator"]
    weight = next(name for name in before if name.startswith("encoder.") and name.endswith("weight"))
    assert not torch.equal(content["network"][weight], before[weight])


def test_a_protocol_keeps_data_network_and_ball_of_the_encoders_run(encoder_run):
    for protocol in PROTOCOLS:
        config = finetune_config(encoder_run.best, protocol)
        assert (config.limit, config.model_options, config.seed, config.norm) == (96, {"width": 4}, 3, "linf")
        assert config.init == str(encoder_run.best)
    with pytest.raises(UserError, match="'slg' is unknown; did you mean 'slf'"):
        finetune_config(encoder_run.best, "slg")
    with pytest.raises(UserError, match="no option 'epoch'"):
        finetune_config(encoder_run.best, "slf", epoch=3)


def test_an_encoder_that_does_not_fit(encoder_run, tmp_path):
    with pytest.raises(UserError, match="does not fit this model"):
        tiny(tmp_path, **PLAIN, init=str(encoder_run.best), model_options={"width": 8})
    with pytest.raises(UserError, match="holds a small-cnn"):
        tiny(tmp_path, **PLAIN, init=str(encoder_run.best), model="resnet18")
    with pytest.raises(UserError, match="cannot be read"):
        tiny(tmp_path, **PLAIN, init=str(tmp_path / "none.pt"))
    assert not any(tmp_path.iterdir())


def test_resuming_does_not_need_the_starting_checkpoint(encoder_run, tmp_path):
    start = tmp_path / "start.pt"
    shutil.copy(encoder_run.best, start)
    options = {**PLAIN, "init": str(start)}
    whole = tiny(tmp_path / "whole", **options)

    def stop(event):
        if event["event"] == "step" and event["epoch"] == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        tiny(tmp_path / "broken", **options, on_event=stop)
    start.unlink()
    (folder,) = (tmp_path / "broken").iterdir()
    resumed = train(resume=folder)
    mine, other = (checkpoint.read(result.last)[0]["network"] for result in (resumed, whole))
    assert all(torch.equal(mine[name], other[name]) for name in other)
