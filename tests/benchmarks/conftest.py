"""A small network trained on scikit-learn's digits, and a host that knows the benchmark layer alone."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from scl_defense_benchmarks import hooks, native
from sklearn.datasets import load_digits
from torch import Tensor, nn
from victim_networks import DigitsNet

from scl_defense.plugins import PluginHost
from scl_defense.threat import ThreatModel


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    """All images (1797, 1, 8, 8) in [0, 1] and labels, in a fixed random order."""
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(bunch.images / 16, dtype=torch.float32)[:, None]
    return images[order], torch.tensor(bunch.target)[order]


@pytest.fixture(scope="session")
def network(digits) -> nn.Module:
    """Trained on the first 1400 digits, in eval mode, about 97 % on the others."""
    images, labels = digits
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = DigitsNet()
        optimizer = torch.optim.Adam(net.parameters(), 2e-3)
        for _ in range(4):
            for batch in torch.randperm(1400).split(64):
                loss = F.cross_entropy(net(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    for parameter in net.parameters():
        parameter.grad = None
    return net.eval()


@pytest.fixture(scope="session")
def robust(digits):
    """DigitsNet trained on one-step examples from random starts, Linf 0.1: neither hopeless nor unbreakable."""
    images, labels = digits
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = DigitsNet()
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(6):
            for batch in torch.randperm(1400).split(64):
                threat, generator = ThreatModel("linf", "0.1"), torch.Generator().manual_seed(int(batch[0]))
                attack = native.PGD(steps=1, rel_step=1.0)
                made = attack(net, images[batch], labels[batch], threat, generator)
                loss = F.cross_entropy(net(made), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return net.eval()


@pytest.fixture(scope="session")
def victims(digits, network) -> tuple[Tensor, Tensor]:
    """24 images that the network gets right."""
    images, labels = digits[0][1400:1440], digits[1][1400:1440]
    with torch.no_grad():
        right = network(images).argmax(1) == labels
    return images[right][:24], labels[right][:24]


@pytest.fixture
def rng() -> Callable[..., torch.Generator]:
    return lambda seed=0: torch.Generator().manual_seed(seed)


class Clock:
    """The evaluation's time, which passes only where a test lets it: a busy machine decides nothing."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    for module in ("evaluate", "attempt", "chunks"):
        monkeypatch.setattr(f"scl_defense_benchmarks.{module}.time", made)
    return made


@pytest.fixture(scope="session")
def host() -> PluginHost:
    """The benchmark layer's attacks, whether or not this source tree is installed."""
    return PluginHost(files=[hooks.__file__], disabled=["scl-defense"])


@pytest.fixture
def images():
    """First pixel 0.45 or 0.55 on half of the images (0.1 flips them), 0.2 or 0.8 on the others (0.1 does not)."""
    made = torch.full((40, 1, 2, 2), 0.5)
    made[:, 0, 0, 0] = torch.tensor([0.45, 0.55, 0.2, 0.8]).repeat(40 // 4)
    return made


@pytest.fixture
def labels():
    return torch.tensor([0, 1]).repeat(40 // 2)


@pytest.fixture
def digit_images(digits):
    return digits[0][1400:1500], digits[1][1400:1500]
