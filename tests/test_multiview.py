"""The weighted multi-view loss against loops written from the equations, and its limits."""

import pytest
import reference_methods as slow
import torch

from scl_defense.losses import Contrast, kl, multiview, ntxent, supcon

LABELS = [0, 1, 0, 2, 1]
ROLES = ("clean:0", "clean:1", "adv:0")


def embeddings(seed=0, roles=ROLES):
    draws = torch.randn(
        (len(roles), len(LABELS), 4), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return draws.requires_grad_()


def named(views, roles=ROLES):
    return dict(zip(roles, views, strict=True))


def of(role, name):
    return role == name or role.split(":")[0] == name


def same_class(i, k):
    return LABELS[i] == LABELS[k]


def same_image(i, k):
    return i == k


def agree(views, fast, reference):
    fast_gradient = torch.autograd.grad(fast, views, retain_graph=True)[0]
    slow_gradient = torch.autograd.grad(reference, views)[0]
    assert abs(float(fast - reference)) < 1e-9
    assert float((fast_gradient - slow_gradient).abs().max()) < 1e-9
    assert float(slow_gradient.abs().max()) > 1e-3


CASES = {
    "class": (Contrast(temperature=0.3), {"same": same_class}),
    "instance": (Contrast(positives="instance", temperature=0.5), {"same": same_image}),
    "two roles": (
        Contrast(positives="instance", temperature=0.5, views=("clean:0", "adv")),
        {"same": same_image, "roles": ("clean:0", "adv:0")},
    ),
    "anchors": (
        Contrast(temperature=0.3, anchors=("adv",)),
        {"same": same_class, "anchors": lambda role: of(role, "adv")},
    ),
    "inferior positives": (
        Contrast(temperature=0.3, weights={("clean", "adv"): 0.3, ("adv", "clean"): 0.7}),
        {
            "same": same_class,
            "weight": lambda a, b: {("clean", "adv"): 0.3, ("adv", "clean"): 0.7}.get((a[:-2], b[:-2]), 1),
        },
    ),
    "no pull between roles": (
        Contrast(positives="instance", temperature=0.3, weights={("clean", "adv"): 0.0, ("adv", "clean"): 0.0}),
        {"same": same_image, "weight": lambda a, b: float(a[:-2] == b[:-2])},
    ),
    "stop one way": (
        Contrast(temperature=0.3, stop=frozenset({("adv", "clean")})),
        {"same": same_class, "constant": lambda a, b: of(a, "adv") and of(b, "clean")},
    ),
    "stop the first clean view": (
        Contrast(temperature=0.3, stop=frozenset({("adv", "clean:0")})),
        {"same": same_class, "constant": lambda a, b: of(a, "adv") and b == "clean:0"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_equals_the_loops(name):
    contrast, settings = CASES[name]
    views = embeddings()
    fast = multiview(views, ROLES, torch.tensor(LABELS), contrast)
    agree(views, fast, slow.general(named(views), LABELS, contrast.temperature, **settings))


@pytest.mark.parametrize("select", ["hard", "soft", "leaked"])
def test_selection_equals_the_loops(select):
    """ASCL, Bui et al. 2021, section 3: which rows of other classes are pushed away."""
    views, count = embeddings(3), len(LABELS)
    predictions = torch.tensor([[0, 1, 0, 0, 1], [0, 0, 1, 0, 1], [1, 1, 0, 2, 0]])
    flat, truth = predictions.flatten().tolist(), LABELS * 3

    def negative(i, k):
        wanted = truth[i] if select == "hard" else flat[i]
        return flat[k] == wanted

    reference = slow.general(
        named(views), LABELS, 0.2, same=same_class, keep_negative=negative,
        keep_positive=lambda i, k: select != "leaked" or flat[i] == flat[k],
    )  # fmt: skip
    fast = multiview(
        views, ROLES, torch.tensor(LABELS), Contrast(temperature=0.2, select=select), predictions=predictions
    )
    agree(views, fast, reference)
    assert len(flat) == 3 * count
    with pytest.raises(ValueError, match="needs the classifier's predictions"):
        multiview(views, ROLES, torch.tensor(LABELS), Contrast(select=select))


def test_a_selection_that_leaves_nothing_is_zero_with_finite_gradients():
    views = embeddings()
    labels, predictions = torch.arange(5), torch.tensor([[0, 1, 2, 3, 4]] * 3)
    loss = multiview(
        views, ROLES, labels, Contrast(select="hard", positives="instance", views=("adv",)), predictions=predictions
    )
    (gradient,) = torch.autograd.grad(loss, views)
    assert float(loss) == 0 and bool((gradient == 0).all())
    # Some anchors with candidates, some without any: no NaN reaches the others.
    mixed = multiview(views, ROLES, torch.tensor([0, 0, 1, 2, 3]), Contrast(select="leaked"), predictions=predictions)
    assert torch.autograd.grad(mixed, views)[0].isfinite().all()


@pytest.mark.parametrize(("beta", "tau_plus"), [(1.0, 0.0), (0.0, 0.1), (0.5, 0.1), (2.0, 0.3)])
def test_hard_negatives_equal_the_published_form(beta, tau_plus):
    views, temperature = embeddings(5, ROLES[:2]), 0.4
    z = [*views[0], *views[1]]
    each = []
    for i, anchor in enumerate(z):
        partner = (i + 5) % 10
        negatives = [row for k, row in enumerate(z) if k not in (i, partner)]
        each.append(slow.a_infonce(anchor, z[partner], negatives, temperature, beta, tau_plus))
    contrast = Contrast(positives="instance", temperature=temperature, beta=beta, tau_plus=tau_plus)
    agree(views, multiview(views, ROLES[:2], torch.tensor(LABELS), contrast), sum(each) / len(each))


def test_limits():
    """Without any switch it is SupCon or NT-Xent, whichever way it is computed."""
    views, labels = embeddings(7), torch.tensor(LABELS)
    rows, repeated = views.flatten(0, 1), labels.repeat(3)
    ones = {("clean", "adv"): 1.0}  # a table that says nothing new: the path with masks
    for weights in ({}, ones):
        by_class = multiview(views, ROLES, labels, Contrast(temperature=0.2, weights=weights))
        by_image = multiview(views, ROLES, labels, Contrast(positives="instance", temperature=0.2, weights=weights))
        torch.testing.assert_close(by_class, supcon(rows, repeated, 0.2), rtol=0, atol=1e-9)
        torch.testing.assert_close(by_image, ntxent(views, 0.2), rtol=0, atol=1e-9)
    instances = multiview(views, ROLES, torch.arange(5), Contrast(temperature=0.2, weights=ones))
    torch.testing.assert_close(instances, ntxent(views, 0.2), rtol=0, atol=1e-9)
    torch.testing.assert_close(
        multiview(views, ROLES, labels, Contrast(positives="instance", temperature=0.2, beta=1e-9)),
        ntxent(views, 0.2), rtol=0, atol=1e-6,
    )  # fmt: skip


def test_images_may_come_in_any_order():
    views, labels, order = embeddings(9), torch.tensor(LABELS), torch.tensor([3, 0, 4, 1, 2])
    contrast = Contrast(temperature=0.3, weights={("clean", "adv"): 0.2}, stop=frozenset({("adv", "adv")}), beta=0.5)
    torch.testing.assert_close(
        multiview(views, ROLES, labels, contrast), multiview(views[:, order], ROLES, labels[order], contrast)
    )


def test_huge_similarities_stay_finite():
    views = embeddings().detach().float().requires_grad_()
    for contrast in (
        Contrast(temperature=0.01, beta=2.0, positives="instance"),
        Contrast(temperature=0.005, tau_plus=0.1),
    ):
        loss = multiview(views, ROLES, torch.tensor(LABELS), contrast)
        assert loss.isfinite() and torch.autograd.grad(loss, views)[0].isfinite().all()


def test_shapes_that_do_not_fit():
    views = embeddings()
    for roles, labels in ((ROLES[:2], torch.tensor(LABELS)), (ROLES, torch.tensor(LABELS[:4]))):
        with pytest.raises(ValueError, match="multiview needs embeddings"):
            multiview(views, roles, labels, Contrast())


def test_kl_equals_its_sum():
    p = torch.randn((6, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    q = torch.randn((6, 4), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fast, reference = kl(p, q).mean(), slow.kl(p, q)
    assert abs(float(fast - reference)) < 1e-12
    torch.testing.assert_close(torch.autograd.grad(fast, p)[0], torch.autograd.grad(reference, p)[0])
    assert float(kl(p, p).abs().max()) == 0
