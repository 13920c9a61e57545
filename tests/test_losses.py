"""The contrastive losses against loops over the papers' equations, a second library, and numbers known by hand."""

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_metric_learning.losses import NTXentLoss, SupConLoss

from scl_defense.losses import infonce, margin, ntxent, supcon, unit

LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 2, 2, 1, 0])
LONELY = torch.tensor([0, 1, 0, 7, 1, 0, 8, 9, 1, 0])  # rows 3, 6 and 7 have no positive


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def value_and_gradients(loss, *tensors):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    value = loss(*leaves)
    return value.detach(), torch.autograd.grad(value.sum(), leaves)


def assert_same(left, right, *tensors, **tolerance):
    """Equal values and equal gradients, to 1e-10 unless said otherwise."""
    tolerance = tolerance or {"rtol": 0, "atol": 1e-10}
    (value, gradients), (expected, expected_gradients) = (value_and_gradients(f, *tensors) for f in (left, right))
    torch.testing.assert_close(value, expected, **tolerance)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, **tolerance)


# -- against the papers' equations


@pytest.mark.parametrize("labels", [LABELS, LONELY, LABELS * 1000 - 5], ids=["classes", "lonely", "sparse-ids"])
@pytest.mark.parametrize("temperature", [0.07, 0.5, 2.0])
def test_supcon_is_equation_2(labels, temperature):
    assert_same(
        lambda z: supcon(z, labels, temperature), lambda z: reference.supcon(z, labels, temperature), 3 * normal(10, 5)
    )


@given(st.integers(0, 2**31), st.lists(st.integers(0, 3), min_size=3, max_size=7), st.sampled_from([0.1, 1.0]))
def test_supcon_is_equation_2_for_any_labels(seed, labels, temperature):
    if len(set(labels)) == len(labels):
        labels[0] = labels[1]
    embed = normal(len(labels), 3, seed=seed)
    expected = reference.supcon(embed, labels, temperature)
    torch.testing.assert_close(supcon(embed, torch.tensor(labels), temperature), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("temperature", [0.07, 0.5, 2.0])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_ntxent_is_algorithm_1(count, temperature):
    assert_same(
        lambda a, b: ntxent(torch.stack([a, b]), temperature),
        lambda a, b: reference.ntxent(a, b, temperature),
        normal(count, 4),
        normal(count, 4, seed=1),
    )


@pytest.mark.parametrize("gap", [0.3, 1.0, 2.0])
def test_margin_is_equation_4(gap):
    assert_same(
        lambda z: margin(z, LABELS, gap),
        lambda z: reference.margin(z, LABELS, gap),
        normal(10, 3),
        rtol=0,
        atol=1e-9,  # the floor under the square root: 1e-12 / (2 d)
    )


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("false_negatives", [False, True])
def test_infonce_is_the_equation(temperature, false_negatives):
    exclude = LABELS[:, None] == LABELS[None, :] if false_negatives else None
    assert_same(
        lambda z, r: infonce(z, r, temperature, exclude=exclude),
        lambda z, r: reference.infonce(z, r, temperature, exclude),
        normal(10, 4),
        normal(10, 4, seed=1),
    )


# -- against a second library


@pytest.mark.parametrize("temperature", [0.07, 0.5, 1.0])
def test_supcon_is_that_of_pytorch_metric_learning(temperature):
    library = SupConLoss(temperature=temperature)
    assert_same(lambda z: supcon(z, LABELS, temperature), lambda z: library(z, LABELS), normal(10, 6))


@pytest.mark.parametrize("temperature", [0.07, 0.5, 1.0])
def test_ntxent_is_that_of_pytorch_metric_learning(temperature):
    library, identity = NTXentLoss(temperature=temperature), torch.arange(6).repeat(2)
    assert_same(lambda z: ntxent(z.view(2, 6, 5), temperature), lambda z: library(z, identity), normal(12, 5))


# -- identities in the limits


@pytest.mark.parametrize("views", [2, 3, 4])
def test_supcon_with_instance_labels_is_ntxent(views):
    embed = normal(views, 5, 4)
    identity = torch.arange(5).repeat(views)
    assert_same(lambda z: supcon(z.flatten(0, 1), identity, 0.3), lambda z: ntxent(z, 0.3), embed)
    if views == 2:
        assert_same(lambda z: ntxent(z, 0.3), lambda z: reference.ntxent(z[0], z[1], 0.3), embed)


def test_one_class():
    """All rows are positives of each other: log-sum-exp minus the mean of the similarities."""
    z = unit(normal(6, 4))
    others = (z @ z.T / 0.2)[~torch.eye(6, dtype=torch.bool)].view(6, 5)
    expected = (others.logsumexp(1) - others.mean(1)).mean()
    torch.testing.assert_close(supcon(z, torch.zeros(6, dtype=torch.long), 0.2), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_all_labels_distinct_is_zero_with_a_usable_backward(rows):
    embed = normal(rows, 4).requires_grad_()
    loss = supcon(embed, torch.arange(rows))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(embed.grad, torch.zeros_like(embed))


def test_two_identical_views_of_one_image_cost_nothing():
    """No negatives, one positive: -log(e^s / e^s)."""
    one = normal(1, 4)
    assert ntxent(torch.stack([one, one])).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_two_identical_views_of_orthogonal_images(temperature):
    """s = 1 with the twin, 0 with the 2(N-1) others."""
    loss = ntxent(torch.eye(5, dtype=torch.float64).expand(2, 5, 5), temperature)
    assert loss.item() == pytest.approx(math.log(1 + 8 * math.exp(-1 / temperature)), abs=1e-12)


def test_collapsed_embeddings_cost_the_logarithm_of_the_choices():
    same = normal(1, 4).expand(10, 4)
    assert supcon(same, LABELS, 0.1).item() == pytest.approx(math.log(9), abs=1e-9)
    assert infonce(same, same, 0.1).tolist() == pytest.approx([math.log(10)] * 10, abs=1e-9)


def test_large_temperature_tends_to_the_logarithm_of_the_choices():
    embed = normal(10, 4)
    assert supcon(embed, LABELS, 1e6).item() == pytest.approx(math.log(9), abs=1e-5)
    assert ntxent(embed.view(2, 5, 4), 1e6).item() == pytest.approx(math.log(9), abs=1e-5)
    assert infonce(embed, normal(10, 4, seed=1), 1e6).tolist() == pytest.approx([math.log(10)] * 10, abs=1e-5)


def test_small_temperature_tends_to_the_hardest_negative():
    """temperature * loss -> max_a s_ia - mean_p s_ip."""
    z = unit(normal(10, 4))
    similarity = (z @ z.T).masked_fill(torch.eye(10, dtype=torch.bool), -torch.inf)
    same = (LABELS[:, None] == LABELS[None, :]) & ~torch.eye(10, dtype=torch.bool)
    expected = (similarity.amax(1) - similarity.masked_fill(~same, 0).sum(1) / same.sum(1)).mean()
    torch.testing.assert_close(1e-4 * supcon(z, LABELS, 1e-4), expected, rtol=0, atol=1e-4)


def test_margin_wide_apart_is_the_pull_alone():
    """Opposite poles: the classes are 2 apart, beyond any gap, and each class is one point."""
    poles = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    assert margin(poles, torch.tensor([0, 0, 1, 1]), 2.0).item() == pytest.approx(0, abs=1e-11)
    assert margin(poles, torch.tensor([0, 1, 1, 0]), 0.5).item() == pytest.approx((4 * 0.25 + 4 * 4) / 12, abs=1e-5)


# -- by hand: unit vectors in the plane, whose similarities are cosines of known angles


def plane(*degrees, dtype=torch.float64):
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1).to(dtype)


def test_supcon_by_hand():
    """0 and 60 degrees of class A, 180 of class B: s_12 = .5, s_13 = -1, s_23 = -.5; the third row is left out."""
    first = -math.log(math.exp(1) / (math.exp(1) + math.exp(-2)))
    second = -math.log(math.exp(1) / (math.exp(1) + math.exp(-1)))
    loss = supcon(7 * plane(0, 60, 180), torch.tensor([3, 3, 5]), 0.5)
    assert loss.item() == pytest.approx((first + second) / 2, abs=1e-12)


def test_infonce_by_hand():
    """Row 1 at 0 degrees, references at 90 and 180 degrees: scores 0 and -1."""
    rows = infonce(plane(0, 90), plane(90, 180), 1.0)
    assert rows.tolist() == pytest.approx([math.log(1 + math.exp(-1)), math.log(math.e + 1)], abs=1e-12)


def test_margin_by_hand():
    """60 degrees apart: d = 1; 120 and 180: d = sqrt 3 and 2. Six ordered pairs."""
    loss = margin(plane(0, 60, 180), torch.tensor([0, 0, 1]), 1.9)
    assert loss.item() == pytest.approx(2 * (1 + (1.9 - math.sqrt(3)) ** 2 + 0) / 6, abs=1e-9)


# -- what the mean runs over


def test_lonely_anchors_are_left_out_of_the_mean_not_counted_as_zero():
    """Rows alone in their class stand in the denominators, but the mean runs over the two anchors of the pair."""
    near = plane(0, 30, 15, 16, 17)
    expected = sum(
        math.log(sum(math.exp(math.cos(math.radians(a - b)) / 0.5) for b in (0, 30, 15, 16, 17) if a != b))
        - math.cos(math.radians(30)) / 0.5
        for a in (0, 30)
    )
    assert supcon(near, torch.tensor([0, 0, 1, 2, 3]), 0.5).item() == pytest.approx(expected / 2, abs=1e-12)


def test_infonce_rows_are_separable():
    embed, references = normal(5, 4).requires_grad_(), normal(5, 4, seed=1)
    (gradient,) = torch.autograd.grad(infonce(embed, references)[2], embed)
    assert gradient[2].abs().sum() > 0
    assert torch.equal(gradient[[0, 1, 3, 4]], torch.zeros(4, 4, dtype=torch.float64))
    changed = embed.detach().clone()
    changed[0] = 9.0
    assert torch.equal(infonce(changed, references)[1:], infonce(embed, references).detach()[1:])


def test_infonce_never_excludes_its_own_reference():
    embed, references = normal(4, 3), normal(4, 3, seed=1)
    everything = infonce(embed, references, exclude=torch.ones(4, 4, dtype=torch.bool))
    torch.testing.assert_close(everything, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_rows_does_not_matter(seed):
    embed, order = normal(10, 4), torch.randperm(10, generator=torch.Generator().manual_seed(seed))
    for loss in (supcon, margin):
        torch.testing.assert_close(loss(embed[order], LABELS[order]), loss(embed, LABELS), rtol=0, atol=1e-12)
    torch.testing.assert_close(ntxent(embed.view(2, 5, 4).flip(0)), ntxent(embed.view(2, 5, 4)), rtol=0, atol=1e-12)
    references = normal(10, 4, seed=1)
    torch.testing.assert_close(
        infonce(embed[order], references[order]), infonce(embed, references)[order], rtol=0, atol=1e-12
    )


def test_lengths_and_names_of_classes_do_not_matter():
    embed, lengths = normal(10, 4), normal(10, 1, seed=1).abs() + 0.1
    for loss in (supcon, margin):
        torch.testing.assert_close(loss(embed * lengths, LABELS), loss(embed, LABELS), rtol=0, atol=1e-10)
        torch.testing.assert_close(loss(embed, 100 - 7 * LABELS), loss(embed, LABELS), rtol=0, atol=1e-12)


# -- numbers that break other implementations

EVERY = {
    "supcon": lambda z, **options: supcon(z, LABELS, **options),
    "ntxent": lambda z, **options: ntxent(z.view(2, 5, -1), **options),
    "margin": lambda z, **_: margin(z, LABELS),
    "infonce": lambda z, **options: infonce(z, z.roll(1, 0).detach(), **options),
}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_inputs_give_finite_float32(name, dtype):
    embed = normal(10, 4).to(dtype).requires_grad_()
    value = EVERY[name](embed)
    assert value.dtype == torch.float32 and value.isfinite().all()
    torch.testing.assert_close(value.double(), EVERY[name](embed.detach().double()), rtol=1e-5, atol=1e-6)
    value.sum().backward()
    assert embed.grad.dtype == dtype and embed.grad.isfinite().all() and embed.grad.abs().sum() > 0


@pytest.mark.parametrize("name", EVERY)
def test_autocast_does_not_coarsen_a_loss(name):
    embed = normal(10, 4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = EVERY[name](embed)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, EVERY[name](embed), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["supcon", "ntxent", "infonce"])
def test_low_temperature_does_not_overflow(name):
    embed = (100 * normal(10, 4)).half().requires_grad_()
    value = EVERY[name](embed, temperature=0.005)  # exp(200) is beyond float32
    value.sum().backward()
    assert value.isfinite().all() and embed.grad.isfinite().all()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("rows", [[0], [0, 2], list(range(10))], ids=["one", "one-class", "all"])
def test_zero_rows_have_finite_gradients(name, rows):
    embed = normal(10, 4, dtype=torch.float32)
    embed[rows] = 0
    embed.requires_grad_()
    value = EVERY[name](embed)
    value.sum().backward()
    assert value.isfinite().all() and embed.grad.isfinite().all()
    assert embed.grad.abs().max() < 1e8


def test_a_zero_row_is_similar_to_nothing():
    """All similarities of the first two anchors are 0: each picks its positive out of two."""
    embed = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 3.0]])
    assert supcon(embed, torch.tensor([4, 4, 5]), 0.1).item() == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_identical_rows_have_finite_gradients(name):
    embed = torch.ones(10, 4, requires_grad=True)
    EVERY[name](embed).sum().backward()
    assert embed.grad.isfinite().all()


def test_unit_divides_by_the_length():
    embed = normal(5, 4)
    torch.testing.assert_close(unit(embed), embed / embed.square().sum(1, keepdim=True).sqrt(), rtol=0, atol=1e-14)
    assert unit(embed.half()).dtype == torch.float32
    assert torch.equal(unit(torch.zeros(2, 3)), torch.zeros(2, 3))


# -- wrong shapes


@pytest.mark.parametrize("loss", [supcon, margin])
@pytest.mark.parametrize(
    ("embed", "labels"), [((4, 3), (5,)), ((2, 4, 3), (4,)), ((4,), (4,)), ((4, 3), (4, 1)), ((4, 3), ())]
)
def test_rows_and_labels_must_match(loss, embed, labels):
    with pytest.raises(ValueError, match=r"\(R, D\)"):
        loss(torch.ones(embed), torch.zeros(labels, dtype=torch.long))


@pytest.mark.parametrize("shape", [(4, 3), (1, 4, 3), (4,)])
def test_ntxent_needs_two_views(shape):
    with pytest.raises(ValueError, match="two views"):
        ntxent(torch.ones(shape))


@pytest.mark.parametrize("count", [0, 1])
def test_infonce_needs_a_negative(count):
    with pytest.raises(ValueError, match="at least two"):
        infonce(torch.ones(count, 3), torch.ones(count, 3))
