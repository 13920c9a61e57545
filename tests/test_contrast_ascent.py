"""Label-free contrastive PGD: which objective it climbs, from where, and when it cannot work."""

import pytest
import reference
import torch
from torch import nn

from scl_defense.ascent import ascend, ascend_contrast
from scl_defense.errors import UserError
from scl_defense.threat import NORMS, ThreatModel

EPS = {"linf": "8/255", "l2": "0.25", "l1": "0.4"}
THREATS = [ThreatModel(norm, EPS[norm]) for norm in NORMS]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def views(count=2, images=5, seed=0):
    return torch.rand(count, images, 2, 4, 4, generator=rng(seed))


def encoder():
    made = nn.Sequential(nn.Flatten(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 6))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=rng(9)))
    return made


def losses(embed, perturbed, others, temperature=0.5):
    """The loop reference, one number an image."""
    with torch.no_grad():
        return reference.infonce(embed(perturbed).flatten(1).double(), embed(others).flatten(1).double(), temperature)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
@pytest.mark.parametrize("start", ["zero", "uniform"])
@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_it_climbs_the_equation(threat, start, temperature):
    """The same walk as climbing the loop reference, whose gradients come from the equation itself."""
    embed, pair = encoder().double(), views().double()
    with torch.no_grad():
        other = embed(pair[1])
    options = {"steps": 3, "rel_step": 0.4, "start": start}
    expected = ascend(lambda z: reference.infonce(embed(z), other, temperature), pair[0], threat, rng=rng(), **options)
    found = ascend_contrast(embed, pair, threat, temperature=temperature, rng=rng(), **options)
    torch.testing.assert_close(found, expected[None], rtol=0, atol=1e-6)


@pytest.mark.parametrize("start", ["zero", "uniform", "gaussian"])
@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_the_loss_rises_in_the_mean(threat, start):
    embed, pair = encoder(), views(images=12)
    found = ascend_contrast(embed, pair, threat, steps=10, start=start, rng=rng())
    assert found.shape == (1, 12, 2, 4, 4) and not found.requires_grad
    assert threat.contains(pair[0], found[0]).all()
    assert losses(embed, found[0], pair[1]).mean() > losses(embed, pair[0], pair[1]).mean() + 0.01


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_both_views_are_each_perturbed_against_the_other(threat):
    embed, pair = encoder(), views(images=8)
    found = ascend_contrast(embed, pair, threat, perturb="both", steps=8, start="zero", rng=rng())
    assert found.shape == pair.shape
    for mine, other in ((0, 1), (1, 0)):
        assert threat.contains(pair[mine], found[mine]).all()
        alone = ascend_contrast(embed, pair[[mine, other]], threat, steps=8, start="zero", rng=rng())
        torch.testing.assert_close(found[mine], alone[0])


def test_references_are_embedded_once_and_from_the_clean_view():
    embed, pair, seen = encoder(), views(), []

    def counting(images):
        seen.append((images.detach().clone(), torch.is_grad_enabled()))
        return embed(images)

    ascend_contrast(counting, pair, THREATS[0], perturb="both", steps=4, rng=rng())
    assert len(seen) == 2 * (1 + 4)
    assert torch.equal(seen[0][0], pair[1]) and torch.equal(seen[5][0], pair[0])
    assert [graded for _, graded in seen] == [False, True, True, True, True] * 2


def test_a_single_view_against_itself_still_has_negatives_to_go_to():
    """The alignment term is flat at its maximum, but the negatives pull: zero start moves, and not at random."""
    embed, alone = encoder(), views(count=1, images=6)
    runs = [ascend_contrast(embed, alone, THREATS[1], steps=10, start="zero", rng=rng(seed)) for seed in (0, 1)]
    assert torch.equal(*runs)
    assert losses(embed, runs[0][0], alone[0]).mean() > losses(embed, alone[0], alone[0]).mean() + 0.01


def test_feature_maps_are_flattened():
    convolution = nn.Conv2d(2, 3, 3)
    flat = ascend_contrast(lambda z: convolution(z).flatten(1), views(), THREATS[0], steps=3, rng=rng())
    assert torch.equal(ascend_contrast(convolution, views(), THREATS[0], steps=3, rng=rng()), flat)


def test_flat_images_give_no_nan():
    """All images equal: every similarity is one, no direction is better than another."""
    same = torch.full((2, 4, 1, 4, 4), 0.5)
    found = ascend_contrast(nn.Flatten(), same, THREATS[0], steps=5, rng=rng())
    assert THREATS[0].contains(same[0], found[0]).all()
    zero = torch.zeros(2, 4, 1, 4, 4)
    found = ascend_contrast(nn.Flatten(), zero, THREATS[0], steps=5, start="zero", rng=rng())
    assert THREATS[0].contains(zero[0], found[0]).all()


def test_inputs_and_parameters_are_untouched():
    embed, pair = encoder(), views()
    kept = pair.clone()
    ascend_contrast(embed, pair, THREATS[0], perturb="both", steps=3, rng=rng())
    assert torch.equal(pair, kept)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in embed.parameters())


@pytest.mark.parametrize("images", [0, 1])
def test_too_few_images_are_an_error_of_one_line(images):
    with pytest.raises(UserError, match="at least 2 images") as caught:
        ascend_contrast(nn.Flatten(), views(images=images), THREATS[0], steps=1, rng=rng())
    assert "\n" not in str(caught.value)


def test_both_of_a_single_view_is_an_error():
    with pytest.raises(UserError, match="two views"):
        ascend_contrast(nn.Flatten(), views(count=1), THREATS[0], perturb="both", steps=1, rng=rng())
