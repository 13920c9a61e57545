"""ridge-pgd: its closed-form classifier against scikit-learn, its k-means against plain Lloyd, its corners."""

import numpy as np
import pytest
import torch
from scl_defense_plugins.generators import ridge_pgd, spaces
from scl_defense_plugins.generators.ridge_pgd import RidgePGD, kmeans
from sklearn.cluster import KMeans
from sklearn.linear_model import Ridge

from scl_defense import UserError
from scl_defense.data import open_data
from scl_defense.threat import ThreatModel
from scl_defense.types import Context, GeneratorBatch


def images_of(count=60):
    return open_data("digits").split("train", limit=count).float_images()


def test_its_classifier_is_ridge_regression():
    """scikit-learn's Ridge, with alpha in its own units, on the same features and made-up classes."""
    images, ridge = images_of(), 0.3
    generator = RidgePGD(depth=1, fewest=4, most=4, ridge_low=ridge, ridge_high=ridge)
    classify, classes = generator._classifier(images.double(), torch.Generator().manual_seed(0))
    rng = torch.Generator().manual_seed(0)
    torch.rand(3, generator=rng)
    features = spaces.standardised(spaces.random_conv(images.double(), rng, 24, 1, ridge_pgd.PLACES), images.double())
    rows, target = features(images.double()).numpy(), np.eye(4)[classes.numpy()]
    alpha = ridge * np.mean(np.sum(rows**2, axis=1)) + 1e-6 * rows.shape[1]
    model = Ridge(alpha=alpha, fit_intercept=False).fit(rows, target - target.mean(0))
    np.testing.assert_allclose(classify(images.double()).numpy(), model.predict(rows), atol=1e-8)


def test_its_classes_are_lloyds():
    rows = images_of().flatten(1)
    found = kmeans(rows, 5, torch.Generator().manual_seed(1))
    start = rows[torch.randperm(60, generator=torch.Generator().manual_seed(1))[:5]].numpy()
    reference = KMeans(5, init=start, n_init=1, max_iter=ridge_pgd.LLOYD, tol=0, algorithm="lloyd").fit(rows.numpy())
    centres = torch.from_numpy(reference.cluster_centers_)
    assert found.tolist() == torch.cdist(rows, centres).argmin(1).tolist()


def context_of(images, seed=0, norm="linf", eps="0.1"):
    return Context(threat=ThreatModel(norm, eps), rng=torch.Generator().manual_seed(seed), calibration=images)


def batch_of(images):
    return GeneratorBatch(torch.stack([images, images.flip(3)]), images, torch.arange(len(images)))


def test_its_examples_are_corners_that_fool_the_made_up_classifier():
    images = images_of()
    generator = RidgePGD(steps=5)
    (adversarial,) = generator(batch_of(images), context_of(images))
    delta = adversarial - images
    inside = ((images > 0.1) & (images < 0.9)).expand_as(delta)
    torch.testing.assert_close(delta[inside].abs(), torch.full_like(delta[inside], 0.1))
    rng = torch.Generator().manual_seed(0)
    classify, classes = generator._classifier(torch.cat([images, images.flip(3), images]), rng)
    own = classes[-60:]
    with torch.no_grad():
        before, after = (float((classify(x).argmax(1) == own).float().mean()) for x in (images, adversarial))
        noise = context_of(images).threat.random_corner(images, torch.Generator().manual_seed(3))
        by_noise = float((classify(noise).argmax(1) == own).float().mean())
    assert before > 0.8 and after < 0.5 * by_noise


def test_every_view_draws_anew():
    images = images_of()
    batch = GeneratorBatch(images[None], images, torch.arange(60))
    first, second = RidgePGD(views=2)(batch, context_of(images))
    assert float(((first - images).sign() != (second - images).sign()).float().mean()) > 0.1


@pytest.mark.parametrize("options", [{"fewest": 9, "most": 8}, {"ridge_low": 2.0, "ridge_high": 1.0}])
def test_limits_in_the_wrong_order(options):
    with pytest.raises(UserError, match="give fewest <= most"):
        RidgePGD(**options)
