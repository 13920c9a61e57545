"""The network that every trainer trains: what is normalised, what the heads see, and what its checkpoint holds."""

import pytest
import torch
from torch import nn

from scl_defense.errors import ComponentError
from scl_defense.models import Network, Normalize, Twin

MEAN, STD = (0.1, 0.5, 0.9), (0.2, 0.25, 0.5)


class Flat(nn.Module):
    """Images as features, so that every number behind it is known."""

    feature_dim = 12

    def forward(self, images):
        return images.flatten(1)


def images(count=4):
    return torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(0))


def network(projection=(), **options):
    torch.manual_seed(0)
    return Network(Flat(), 5, MEAN, STD, projection, **options)


def test_normalisation_is_per_channel():
    normalised = Normalize(MEAN, STD)(images())
    for channel in range(3):
        expected = (images()[:, channel] - MEAN[channel]) / STD[channel]
        torch.testing.assert_close(normalised[:, channel], expected)


def test_normalised_data_has_mean_zero_and_variance_one():
    data = images(500)
    mean, std = data.mean((0, 2, 3)), data.std((0, 2, 3))
    normalised = Normalize(mean.tolist(), std.tolist())(data)
    torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(normalised.std((0, 2, 3)), torch.ones(3), rtol=0, atol=1e-5)


def test_grey_images_and_one_channel():
    torch.testing.assert_close(Normalize((0.5,), (0.25,))(torch.full((2, 1, 3, 5), 0.75)), torch.ones(2, 1, 3, 5))


def test_gradients_with_respect_to_the_images_pass_the_normalisation():
    point = images().requires_grad_()
    Normalize(MEAN, STD)(point).sum().backward()
    torch.testing.assert_close(point.grad, (1 / torch.tensor(STD)).view(1, 3, 1, 1).expand(4, 3, 2, 2))


@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.5,), (0.5, 0.5)), (MEAN, (0.1, 0.0, 0.1)), (MEAN, (0.1, -0.1, 0.1)), (MEAN, (0.1, float("nan"), 0.1))],
)
def test_impossible_normalisation_is_an_error(mean, std):
    with pytest.raises(ComponentError, match="normalisation"):
        Normalize(mean, std)
    with pytest.raises(ComponentError, match="normalisation"):
        Network(Flat(), 5, mean, std)


def test_normalisation_travels_in_the_state_dict():
    made = network((8, 4))
    other = Network(Flat(), 5, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (8, 4))
    assert not torch.allclose(made(images()), other(images()))
    other.load_state_dict(made.state_dict())
    assert torch.equal(made(images()), other(images()))
    assert torch.equal(made.embed(images()), other.embed(images()))
    assert {"normalize.mean", "normalize.std"} <= set(made.state_dict())
    assert not any(name.startswith("normalize") for name, _ in made.named_parameters())


def test_the_network_is_its_classifier():
    made = network((8, 4))
    normalised = Normalize(MEAN, STD)(images()).flatten(1)
    assert torch.equal(made.features(images()), normalised)
    expected = normalised @ made.classifier.weight.T + made.classifier.bias
    torch.testing.assert_close(made.logits(images()), expected)
    assert torch.equal(made(images()), made.logits(images()))
    assert made.num_classes == 5 and made(images()).shape == (4, 5)


def test_without_projection_the_embedding_is_the_features():
    made = network(())
    assert torch.equal(made.embed(images()), made.features(images()))
    assert not list(made.projector.parameters())


def test_one_projection_layer_is_linear():
    made = network((7,))
    layer = dict(made.projector.named_parameters())
    expected = made.features(images()) @ layer["0.weight"].T + layer["0.bias"]
    torch.testing.assert_close(made.embed(images()), expected)
    assert (made.embed(images()) < 0).any()


@pytest.mark.parametrize("projection", [(8, 4), [16, 8, 3]])
def test_projection_is_an_mlp_with_relu_between_and_none_at_the_end(projection):
    made = network(projection)
    value = made.features(images())
    linears = [part for part in made.projector if isinstance(part, nn.Linear)]
    assert [part.out_features for part in linears] == list(projection)
    for number, part in enumerate(linears):
        value = value @ part.weight.T + part.bias
        if number < len(linears) - 1:
            value = value.clamp(min=0)
    torch.testing.assert_close(made.embed(images()), value)
    assert (made.embed(images()) < 0).any()


def test_heads_learn_apart():
    """The contrastive loss reaches encoder and projector; the classifier is not in its graph, nor the reverse."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
    encoder.feature_dim = 6
    made = Network(encoder, 5, MEAN, STD, (4,))
    made.embed(images()).square().sum().backward()
    assert made.encoder[1].weight.grad.abs().sum() > 0 and made.projector[0].weight.grad.abs().sum() > 0
    assert made.classifier.weight.grad is None
    made.zero_grad()
    made.logits(images()).square().sum().backward()
    assert made.encoder[1].weight.grad.abs().sum() > 0 and made.classifier.weight.grad.abs().sum() > 0
    assert made.projector[0].weight.grad is None


@pytest.mark.parametrize("width", [None, 0, -3, "64", 2.0])
def test_an_encoder_without_a_width_is_named(width):
    class Nameless(nn.Module):
        pass

    encoder = Nameless()
    if width is not None:
        encoder.feature_dim = width
    with pytest.raises(ComponentError, match="encoder Nameless has no feature_dim"):
        Network(encoder, 5, MEAN, STD)


def test_an_empty_batch_passes():
    made = network((4,))
    assert made(images(0)).shape == (0, 5) and made.embed(images(0)).shape == (0, 4)


# -- the weight-averaged twin


class Normed(nn.Module):
    """One linear layer and batch statistics."""

    feature_dim = 6

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(12, 6), nn.BatchNorm1d(6)

    def forward(self, images):
        return self.norm(self.linear(images.flatten(1)))


def normed(seed=0):
    torch.manual_seed(seed)
    return Network(Normed(), 5, MEAN, STD, (4,))


def test_a_twin_is_a_frozen_copy():
    network = normed().train()
    twin = Twin(network, 0.9)
    for mine, theirs in zip(twin.network.parameters(), network.parameters(), strict=True):
        assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr()
        assert not mine.requires_grad and theirs.requires_grad
    assert not any(part.training for part in twin.network.modules())
    assert network.training and network.encoder.norm.training


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99])
def test_a_twin_follows_the_warmed_up_average(momentum):
    """m_t = min(m, (1 + t) / (10 + t)) and twin <- m_t twin + (1 - m_t) network, number by number."""
    networks = [normed(seed) for seed in range(6)]
    twin, expected = Twin(networks[0], momentum), networks[0].classifier.weight.detach().clone()
    for t, network in enumerate(networks[1:]):
        twin.update(network, images(8))
        now = min(momentum, (1 + t) / (10 + t))
        expected = now * expected + (1 - now) * network.classifier.weight.detach()
        torch.testing.assert_close(twin.network.classifier.weight, expected)
    assert twin.updates == 5


def test_a_twin_measures_batch_statistics_of_its_own():
    network = normed()
    network.encoder.norm.running_mean.fill_(100)
    twin = Twin(normed(), 0.5)
    before = twin.network.encoder.norm.running_mean.clone()
    batch = images(8)
    twin.update(network, batch)
    features = twin.network.encoder.linear(twin.network.normalize(batch).flatten(1)).mean(0)
    torch.testing.assert_close(twin.network.encoder.norm.running_mean, 0.9 * before + 0.1 * features)
    assert (network.encoder.norm.running_mean == 100).all()
    assert not any(part.training for part in twin.network.modules())
    assert all(parameter.grad is None for parameter in (*network.parameters(), *twin.network.parameters()))


def test_a_twin_resumes_exactly():
    first, networks = Twin(normed(), 0.99), [normed(seed) for seed in range(1, 7)]
    for network in networks[:3]:
        first.update(network, images(8))
    resumed = Twin(normed(9), 0.99)
    resumed.load_state_dict(first.state_dict())
    for network in networks[3:]:
        first.update(network, images(8))
        resumed.update(network, images(8))
    for left, right in zip(first.network.state_dict().values(), resumed.network.state_dict().values(), strict=True):
        assert torch.equal(left, right)
