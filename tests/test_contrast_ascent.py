"""Contrastive PGD: which objective it climbs, from where, and when it cannot work."""

import pytest
import reference
import torch
from torch import nn

from scl_defense.ascent import ascend, ascend_contrast
from scl_defense.errors import ComponentError, UserError
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
    found = ascend_contrast(embed, pair, threat, count=2, steps=8, start="zero", rng=rng())
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

    ascend_contrast(counting, pair, THREATS[0], count=2, steps=4, rng=rng())
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
    ascend_contrast(embed, pair, THREATS[0], count=2, steps=3, rng=rng())
    assert torch.equal(pair, kept)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in embed.parameters())


@pytest.mark.parametrize("images", [0, 1])
def test_too_few_images_are_an_error_of_one_line(images):
    with pytest.raises(UserError, match="at least 2 images") as caught:
        ascend_contrast(nn.Flatten(), views(images=images), THREATS[0], steps=1, rng=rng())
    assert "\n" not in str(caught.value)


# -- several adversarial views, other objectives


def test_more_adversarial_views_than_views_go_round():
    """View a lies around view a % V, against the next one, from a start of its own."""
    embed, pair = encoder(), views(images=6)
    found = ascend_contrast(embed, pair, THREATS[0], count=5, steps=4, rng=rng())
    assert found.shape == (5, *pair.shape[1:])
    for place in range(5):
        assert THREATS[0].contains(pair[place % 2], found[place]).all()
    assert not THREATS[0].contains(pair[0], found[1]).any()
    assert not torch.equal(found[0], found[2]) and not torch.equal(found[2], found[4])
    generator = rng()  # the same walk, one view after the other
    for place in range(5):
        turned = pair[[place % 2, (place + 1) % 2]]
        assert torch.equal(ascend_contrast(embed, turned, THREATS[0], steps=4, rng=generator)[0], found[place])


LABELS = torch.tensor([0, 1, 0, 2, 1])
SLOW = {
    "align": lambda z, r: reference.alignment(z, r, 0.3),
    "supcon": lambda z, r: reference.one_sided_supcon(z, r, LABELS, 0.3),
    "infonce": lambda z, r: reference.infonce(z, r, 0.3, exclude=LABELS[:, None] == LABELS[None, :]),
}


@pytest.mark.parametrize("objective", sorted(SLOW))
@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_it_climbs_the_equation_of_each_objective(threat, objective):
    """The same walk as climbing the loops of the paper's equation; the L2 ball shows the gradient, not its signs."""
    embed, pair = encoder().double(), views().double()
    with torch.no_grad():
        other = embed(pair[1])
    options = {"steps": 3, "rel_step": 0.4}
    negatives = "other-classes" if objective == "infonce" else "all"
    expected = ascend(lambda x: SLOW[objective](embed(x), other), pair[0], threat, rng=rng(), **options)
    found = ascend_contrast(
        embed,
        pair,
        threat,
        objective=objective,
        negatives=negatives,
        labels=LABELS,
        temperature=0.3,
        rng=rng(),
        **options,
    )
    torch.testing.assert_close(found, expected[None], rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_joint_ntxent_climbs_the_loss_of_the_whole_batch(threat, count):
    """One view: NT-Xent of the perturbed view and the other, clean one (RoCL); two: of both, perturbed (ACL)."""
    embed, pair = encoder().double(), views().double()

    def total(x):
        first = embed(x[: pair.shape[1]])
        second = embed(x[pair.shape[1] :] if count == 2 else pair[1])
        return reference.ntxent(first, second if count == 2 else second.detach(), 0.3).expand(len(x))

    options = {"steps": 3, "rel_step": 0.4}
    expected = ascend(total, pair[:count].flatten(0, 1), threat, rng=rng(), **options)
    found = ascend_contrast(
        embed, pair, threat, objective="ntxent-joint", count=count, temperature=0.3, rng=rng(), **options
    )
    torch.testing.assert_close(found.flatten(0, 1), expected, rtol=0, atol=1e-6)
    with torch.no_grad():
        before, after = (total(x).mean() for x in (pair[:count].flatten(0, 1), found.flatten(0, 1)))
    assert after > before


def test_joint_ntxent_lets_images_push_each_other():
    """With a steep slope between the images, the joint walk ends elsewhere than one-sided InfoNCE does."""
    embed, pair = encoder(), views()
    walks = [
        ascend_contrast(embed, pair, THREATS[1], objective=objective, steps=5, rng=rng())
        for objective in ("infonce", "ntxent-joint")
    ]
    assert not torch.allclose(*walks, atol=1e-4)
    third = views(count=3)
    joint = ascend_contrast(encoder(), third, THREATS[0], objective="ntxent-joint", count=3, steps=3, rng=rng())
    for place in range(3):
        assert THREATS[0].contains(third[place], joint[place]).all()


def test_limits_of_the_objectives():
    """One label an image: SupCon is InfoNCE, and leaving out class-mates leaves out nobody."""
    embed, pair, alone = encoder(), views(), torch.arange(5)
    options = {"steps": 3, "labels": alone}
    plain = ascend_contrast(embed, pair, THREATS[1], rng=rng(), **options)
    supcon = ascend_contrast(embed, pair, THREATS[1], objective="supcon", rng=rng(), **options)
    torch.testing.assert_close(supcon, plain, rtol=0, atol=1e-5)
    assert torch.equal(ascend_contrast(embed, pair, THREATS[1], negatives="other-classes", rng=rng(), **options), plain)


def test_alignment_needs_no_negative():
    found = ascend_contrast(encoder(), views(images=1), THREATS[0], objective="align", steps=3, rng=rng())
    assert found.shape[:2] == (1, 1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"objective": "align", "start": "zero", "views": 1}, "no gradient at a view against itself"),
        ({"objective": "triplet"}, "objective 'triplet' is unknown"),
        ({"negatives": "hard"}, "negatives 'hard' is unknown"),
        ({"objective": "supcon", "negatives": "other-classes"}, "goes with objective=infonce"),
        ({"objective": "ntxent-joint", "images": 1}, "at least 2 images"),
        ({"objective": "supcon", "images": 1}, "at least 2 images"),
    ],
)
def test_what_cannot_work_is_an_error_of_one_line(options, says):
    pair = views(count=options.pop("views", 2), images=options.pop("images", 5))
    with pytest.raises(UserError, match=says) as caught:
        ascend_contrast(nn.Flatten(), pair, THREATS[0], steps=1, rng=rng(), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"objective": "supcon"}, {"negatives": "other-classes"}])
def test_labels_must_be_given_where_they_are_used(options):
    with pytest.raises(ComponentError, match="needs labels"):
        ascend_contrast(nn.Flatten(), views(), THREATS[0], steps=1, rng=rng(), **options)
