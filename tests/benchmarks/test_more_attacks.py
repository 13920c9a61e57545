"""L1, L0, decision, transfer and random-network attacks: known optima, and the libraries' faults beside repairs."""

import numpy as np
import pytest
import torch
from planted_attacks import run
from scl_defense_benchmarks import art_adapter, native, transfer
from scl_defense_benchmarks.apgd_l1 import APGDL1, _sparse
from scl_defense_benchmarks.art_adapter import EAD, HSJ, JSMA, Boundary, Simba, Spatial
from scl_defense_benchmarks.shims import LibraryNetwork, Softened, pulled_back, random_wrong
from scl_defense_benchmarks.torchattacks_adapter import EOT, Pixle, SparseFool
from torch import nn
from victim_networks import Linear, accuracy

from scl_defense.errors import UserError
from scl_defense.threat import ThreatModel


@pytest.fixture
def plane(rng):
    """Two classes, 24 images well inside the box; gap: the difference of logits, slope: (N, D) what it takes."""
    weight, images = torch.randn(2, 25, generator=rng(1)), 0.45 + 0.1 * torch.rand(24, 1, 5, 5, generator=rng(2))
    network = Linear(weight, torch.zeros(2))
    with torch.no_grad():
        network.bias -= network(images).mean(0)
        logits = network(images)
    labels = logits.argmax(1)
    assert 6 < labels.sum() < 18
    return network, images, labels, (logits.amax(1) - logits.amin(1)), weight[1 - labels] - weight[labels]


def greedy(images, gap, slope):
    """The smallest L1 norm that closes ``gap``: the steepest coordinates first, each as far as its wall."""
    found = []
    for image, need, rise in zip(images.flatten(1), gap, slope, strict=True):
        room, spent = torch.where(rise > 0, 1 - image, image), 0.0
        for place in rise.abs().argsort(descending=True):
            step = min(float(room[place]), float(need / rise[place].abs()))
            spent, need = spent + step, need - step * rise[place].abs()
            if need <= 1e-9:
                break
        found.append(spent)
    return torch.tensor(found, dtype=torch.float64)


# -- L1


@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_apgd_l1_breaks_what_can_be_broken_and_nothing_else(plane, rng, loss):
    network, images, labels, gap, slope = plane
    nearest = greedy(images, gap, slope)
    threat = ThreatModel("l1", f"{float(nearest.median()):.6f}")
    made = APGDL1(loss=loss)(network, images, labels, threat, rng())
    with torch.no_grad():
        broken = network(made).argmax(1) != labels
    assert threat.contains(images, made).all()
    assert broken[nearest < 0.97 * threat.radius].all() and not broken[nearest > 1.001 * threat.radius].any()


def test_l1_pgd_of_art_stalls_at_a_wall_and_ours_does_not(network, victims, rng):
    """The library's step moves the largest coordinate alone: on grey pixels it stays far inside its ball."""
    from art.attacks.evasion import ProjectedGradientDescent

    images, labels = victims
    threat = ThreatModel("l1", "8")
    settings = {"norm": 1, "eps": 8.0, "eps_step": 2.0, "max_iter": 40, "batch_size": 64, "verbose": False}
    build = lambda net: ProjectedGradientDescent(net, **settings)  # noqa: E731
    raw = art_adapter._call(build, network, images, labels, rng(), shim=LibraryNetwork)
    made = APGDL1(steps=40)(network, images, labels, threat, rng())
    assert float(threat.distance(images, raw).median()) < 0.8 * threat.radius
    assert accuracy(network, raw, labels) > accuracy(network, made, labels) + 0.3
    assert accuracy(network, made, labels) <= 0.1


def test_a_sparse_step_moves_only_what_its_wall_lets_move():
    gradient = torch.tensor([[5.0, -4.0, 3.0, 2.0, -1.0, 0.0]]).view(1, 1, 2, 3)
    at = torch.tensor([[1.0, 0.0, 0.5, 0.5, 0.5, 0.5]]).view(1, 1, 2, 3)
    made = _sparse(gradient, at, torch.tensor([0.34])).flatten().tolist()
    assert made == [0, 0, 0.5, 0.5, 0, 0]
    assert _sparse(gradient * 0, at, torch.tensor([0.5])).abs().sum() == 0


def test_apgd_l1_of_a_blind_network_is_no_attempt(victims, rng):
    class Blind(nn.Module):
        def forward(self, images):
            return torch.eye(10)[torch.zeros(len(images), dtype=torch.long)] + 0 * images.flatten(1).sum(1)[:, None]

    made = APGDL1(steps=12)(Blind(), victims[0], torch.zeros(24, dtype=torch.long), ThreatModel("l1", "3"), rng())
    assert torch.equal(made, victims[0])


def test_ead_is_near_the_smallest_l1_of_a_plane(plane, rng):
    network, images, labels, gap, slope = plane
    made = EAD(steps=40)(network, images[:8], labels[:8], ThreatModel("l1", "1"), rng())
    assert accuracy(network, made, labels[:8]) == 0 and float(made.min()) >= 0 and float(made.max()) <= 1
    ratio = ThreatModel("l1", "1").distance(images[:8], made) / greedy(images, gap, slope)[:8]
    assert (ratio >= 1 - 1e-4).all() and ratio.median() <= 1.15


def test_raw_ead_of_torchattacks_leaves_the_box_and_ours_does_not(network, victims, rng):
    import torchattacks
    from scl_defense_benchmarks.library_guard import library_call

    if not hasattr(torchattacks, "EADL1"):
        pytest.skip("this release of torchattacks has no EADL1")
    images, labels = victims[0][:6], victims[1][:6]
    with library_call(network, rng=rng()):
        raw = torchattacks.EADL1(network, max_iterations=20, binary_search_steps=3)(images, labels)
    assert float(raw.min()) < -1e-3 or float(raw.max()) > 1 + 1e-3
    made = EAD(steps=10, binary_search_steps=3)(network, images, labels, ThreatModel("l1", "1"), rng())
    assert float(made.min()) >= 0 and float(made.max()) <= 1


# -- L0


@pytest.mark.parametrize("attack", [SparseFool(steps=10), JSMA(targets=2), Pixle(restarts=40, steps=5)], ids=repr)
def test_few_pixels_are_counted_and_the_others_stay_bit_for_bit(network, victims, rng, attack):
    images, labels = victims[0][:12], victims[1][:12]
    made = attack(network, images, labels, ThreatModel("l0", "1"), rng())
    with torch.no_grad():
        fooled = network(made).argmax(1) != labels
    pixels = ThreatModel("l0", "1").distance(images, made)
    assert fooled.double().mean() >= 0.7
    assert pixels[fooled].median() < 20 and (pixels[fooled] >= 1).all()


def test_jsma_of_art_aims_at_the_labels_it_is_given(network, victims, rng):
    from art.attacks.evasion import SaliencyMapMethod

    images, labels = victims[0][:6], victims[1][:6]
    build = lambda net: SaliencyMapMethod(net, theta=1.0, gamma=0.1, batch_size=6, verbose=False)  # noqa: E731
    raw = art_adapter._call(build, network, images, labels, rng())
    assert torch.equal(raw, images)
    made = JSMA()(network, images, labels, ThreatModel("l0", "1"), rng())
    assert accuracy(network, made, labels) <= 0.5


def test_pixle_says_which_images_it_works_on(network, rng):
    for shape in ((2, 1, 8, 6), (2, 2, 8, 8)):
        with pytest.raises(UserError, match="'pixle' needs square images of 1 or 3 channels"):
            Pixle()(network, torch.rand(shape), torch.zeros(2, dtype=torch.long), ThreatModel("l0", "1"), rng())


# -- by labels and scores alone


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attack", "norm"),
    [
        (HSJ(steps=8, queries=300), "l2"),
        (HSJ(steps=8, queries=300), "linf"),
        (Boundary(steps=150), "l2"),
        (Simba(steps=200, step=0.02), "l2"),
    ],
    ids=str,
)
def test_without_a_gradient_it_comes_near_the_plane(plane, rng, attack, norm):
    network, images, labels, gap, slope = plane
    made = attack(network, images[:6], labels[:6], ThreatModel(norm, "1"), rng())
    assert accuracy(network, made, labels[:6]) == 0
    nearest = (gap / slope.norm(p={"l2": 2, "linf": 1}[norm], dim=1))[:6].double()
    distance = ThreatModel(norm, "1").distance(images[:6], made)
    assert (distance >= nearest * (1 - 1e-4) - 1e-5).all()
    assert (distance <= 4 * nearest + 0.05).all()


def test_raw_art_fails_on_numpy_2_and_the_adapter_does_not(network, victims, rng):
    from art.attacks.evasion import HopSkipJump
    from art.estimators.classification import PyTorchClassifier
    from scl_defense_benchmarks.library_guard import library_call

    images, labels = victims[0][:2], victims[1][:2]
    with library_call(network, rng=rng()):
        estimator = PyTorchClassifier(network, nn.CrossEntropyLoss(), (1, 8, 8), 10, clip_values=(0, 1))
        attack = HopSkipJump(estimator, max_iter=1, max_eval=20, init_eval=10, verbose=False)
        with pytest.raises(RuntimeError, match=r"[dD]ouble"):
            attack.generate(images.numpy(), np.eye(10, dtype=np.float32)[labels])
    made = HSJ(steps=1, queries=20, first_queries=10)(network, images, labels, ThreatModel("l2", "1"), rng())
    assert accuracy(network, made, labels) == 0


def test_saturated_probabilities_blind_simba_and_not_the_adapter(network, victims, rng):
    class Loud(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network

        def forward(self, images):
            return 1000 * self.inner(images)

    class Plain(LibraryNetwork):
        def forward(self, images):
            return super().forward(images).softmax(1)

    images, labels = victims[0][:3], victims[1][:3]
    build = lambda net: art_adapter.SimBA(net, attack="px", max_iter=200, verbose=False)  # noqa: E731
    loud = Loud().eval()
    raw = torch.cat([art_adapter._call(build, loud, x[None], None, rng(), shim=Plain) for x in images])
    assert accuracy(loud, raw, labels) > 0.5
    made = Simba(steps=300)(loud, images, labels, ThreatModel("l2", "1"), rng())
    assert accuracy(loud, made, labels) == 0
    soft = Softened(loud, torch.device("cpu")).eval()
    with torch.no_grad():
        assert torch.equal(soft(images).argmax(1), loud(images).argmax(1)) and float(soft(images).max()) < 1


@pytest.mark.slow
def test_every_image_gets_its_own_rotation_or_shift(network, victims, rng):
    images, labels = victims[0][:8], victims[1][:8]
    attack, ball = Spatial(grid=3), ThreatModel("linf", "1")
    together = attack(network, images, labels, ball, rng())
    alone = torch.cat([attack(network, images[i : i + 1], labels[i : i + 1], ball, rng()) for i in range(8)])
    torch.testing.assert_close(together, alone)
    assert accuracy(network, together, labels) < 0.5
    still = Spatial(rotation=0.0, shift=0.0)(network, images, labels, ball, rng())
    torch.testing.assert_close(still, images, atol=1e-6, rtol=0)


def test_pulled_back_ends_on_the_boundary_and_a_random_start_is_wrong(plane, rng):
    network, images, labels, _, _ = plane
    start, found = random_wrong(network, images, labels, rng())
    assert found.all() and accuracy(network, start, labels) == 0
    nearer = images + 0.9 * (start - images)
    assert accuracy(network, nearer, labels) > 0.9
    assert torch.equal(pulled_back(network, images, labels, images), images)  # what is right is left alone


# -- from another network


@pytest.fixture
def lend(monkeypatch, network):
    """``surrogate.pt`` stands for this network; what is read is what a checkpoint gives."""

    class Loaded:
        classes, image_shape = tuple("0123456789"), (1, 8, 8)

    Loaded.network = network
    monkeypatch.setattr(transfer, "_open", lambda path, device, given: Loaded)


def test_transfer_from_the_network_itself_is_an_attack_on_it(lend, network, victims, rng):
    images, labels = victims
    threat = ThreatModel("linf", "0.2")
    attack = transfer.Transfer(surrogate="surrogate.pt")
    made = attack(network, images, labels, threat, rng())
    assert threat.contains(images, made).all()
    assert accuracy(network, made, labels) <= 0.2
    noise = native.Noise()(network, images, labels, threat, rng())
    assert accuracy(network, noise, labels) > accuracy(network, made, labels) + 0.3
    one = transfer.Transfer(surrogate="surrogate.pt", methods=("mifgsm",))(network, images, labels, threat, rng())
    assert accuracy(network, one, labels) >= accuracy(network, made, labels)


def test_a_surrogate_that_does_not_fit_is_named(lend):
    attack = transfer.Transfer(surrogate="surrogate.pt")
    assert attack.unable(10, (1, 8, 8)) is None
    assert "of 10 classes, the network has 3" in attack.unable(3, None)
    assert "images (1, 8, 8), these are (3, 32, 32)" in attack.unable(10, (3, 32, 32))
    assert "no method for images" in transfer.Transfer(surrogate="s", methods=("tifgsm",)).unable(10, (1, 8, 8))
    assert "has no surrogate network" in transfer.Transfer().unable(10, (1, 8, 8))


def test_a_surrogate_that_is_not_there_is_a_clear_error(victims, network, rng):
    with pytest.raises(UserError, match=r"surrogate 'nowhere\.pt' does not exist"):
        transfer.Transfer(surrogate="nowhere.pt")(network, *victims, ThreatModel("linf", "0.1"), rng())


# -- of a random network


def test_the_mean_of_many_gradients_beats_one_on_a_random_network(network, victims, rng):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network

        def forward(self, images):
            return self.inner(images + 0.5 * torch.randn_like(images))

    images, labels = victims
    threat = ThreatModel("linf", "0.2")
    broken = {}
    for draws in (1, 20):
        made = EOT(steps=15, draws=draws)(Noisy(), images, labels, threat, rng())
        broken[draws] = float(torch.nn.functional.cross_entropy(network(made), labels).detach())
    assert broken[20] > broken[1]


def test_they_run_in_an_evaluation_as_their_rows_say(network, victims):
    attacks = [APGDL1(steps=20)]
    result = run(*victims, *attacks, threat=ThreatModel("l1", "6"), network=network)
    (row,) = result.attacks
    assert row.status == "ok" and row.norm == "l1" and row.broken > 12
    assert row.violations == {"box": 0, "ball": 0, "nonfinite": 0}
