"""The linear probe against scikit-learn, and validation accuracy against its definition."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from scl_defense import probe
from scl_defense.data import Split
from scl_defense.models import Network
from scl_defense.runtime import stream
from scl_defense.threat import ThreatModel


def features(seed=0, n=300, d=6, k=4):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, n)
    centres = rng.normal(size=(k, d)) * 1.5
    return torch.tensor(
        centres[labels] * [1, 5, 0.1, 1, 1, 1] + rng.normal(size=(n, d)), dtype=torch.float32
    ), torch.tensor(labels)


def test_the_probe_is_regularised_logistic_regression():
    x, y = features()
    weight, bias = probe.fit_linear(x, y, 4)
    scaled = ((x - x.mean(0)) / x.std(0)).numpy()
    # scikit-learn minimises C * sum of losses + ||W||^2 / 2; ours mean loss + decay / 2 ||W||^2.
    other = LogisticRegression(C=1 / (probe.PROBE_DECAY * len(x)), tol=1e-8, max_iter=5000).fit(scaled, y.numpy())
    mine = torch.softmax(x @ weight.T + bias, 1).numpy()
    np.testing.assert_allclose(mine, other.predict_proba(scaled), atol=2e-3)


def test_a_constant_feature_and_a_missing_class_do_no_harm():
    x, y = features(k=3)
    x[:, 2] = 7.0
    weight, bias = probe.fit_linear(x, y, 4)  # class 3 never appears
    assert torch.isfinite(weight).all() and torch.isfinite(bias).all()
    assert ((x @ weight.T + bias).argmax(1) != 3).all()


class Flat(nn.Module):
    feature_dim = 4

    def forward(self, images):
        return images.flatten(1)


def linear_network(weight, bias):
    network = Network(Flat(), 2, [0.0], [1.0])
    with torch.no_grad():
        network.classifier.weight.copy_(torch.tensor(weight))
        network.classifier.bias.copy_(torch.tensor(bias))
    return network


def test_robust_accuracy_of_a_linear_classifier_is_its_closed_form():
    """An image survives Linf eps when its margin w.x + b exceeds eps * ||w||_1 (interior images)."""
    torch.manual_seed(0)
    raw = torch.randint(60, 196, (400, 1, 2, 2), dtype=torch.uint8)
    w = [1.0, -2.0, 0.5, 1.5]
    network = linear_network([[-v / 2 for v in w], [v / 2 for v in w]], [0.25, -0.25])
    margin = (raw.float() / 255).flatten(1) @ torch.tensor(w) - 0.5
    labels = (margin > 0).long()
    labels[:40] = 1 - labels[:40]  # some are wrong already: they count as not robust
    split = Split(raw, labels, torch.arange(400))
    for eps in ("0.05", "0.1", "0"):
        right = (margin > 0).long() == labels
        expected = (right & ((margin.abs() > float(eps) * 5.0) | (eps == "0"))).float().mean().item()
        clean, robust = probe.accuracy(
            network, split, ThreatModel("linf", eps), steps=10, rng=stream(0, "x"), batch_size=97
        )
        assert clean == pytest.approx(0.9) and robust == pytest.approx(expected)


def test_fit_probe_changes_the_classifier_alone():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
    encoder.feature_dim = 8
    network = Network(encoder, 2, [0.5], [0.25]).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    raw = torch.randint(0, 256, (200, 1, 2, 2), dtype=torch.uint8)
    split = Split(raw, (raw[:, 0, 0, 0] > raw[:, 0, 1, 1]).long(), torch.arange(200))
    probe.fit_probe(network, split, batch_size=64)
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"} and network.training
    with torch.no_grad():
        accuracy = (network.eval()(split.float_images()).argmax(1) == split.labels).float().mean()
    assert accuracy > 0.85
