"""PGD on classifiers that are solved for, not trained: random features, made-up classes, a new draw for every view."""

from collections.abc import Callable
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from scl_defense.ascent import ascend
from scl_defense.errors import UserError
from scl_defense.types import Context, Field, GeneratorBatch, component
from scl_defense_plugins.generators import spaces

LLOYD = 8  # iterations of k-means
PLACES = 4  # feature maps are averaged down to at most about 4 x 4 places
SCALE = 10.0  # ridge outputs are shares of a class, in [0, 1]: as logits they need a scale


@component
class RidgePGD:
    """Attack a random classifier that nobody trained: no label, no encoder, no gradient step on any weight.

    Every view draws anew: early maps phi of a random CNN of 1 to ``depth`` layers (batch-norm calibrated), centred and
    standardised on the sample S = calibration images and the batch's views; a number of clusters k from
    [``fewest``, ``most``]; a k-means partition c of S in pixel space (the made-up classes); a ridge lambda, log-uniform
    in [``ridge_low``, ``ridge_high``]. The classifier has the closed form of ridge regression::

        f(x) = phi(x)^T Phi^T ( Phi Phi^T + (lambda m + 1e-6) I )^-1 (Y - mean(Y)),   Y = onehot(c(S)),
        Phi = phi(S) / sqrt(D),   m = mean(diag(Phi Phi^T))

    and ``steps`` of PGD climb CE(10 f(x + delta), c(x)). The last iterate goes to the extreme point of the ball in its
    direction, x + eps * steepest(delta) (Linf: the sign). The solution is closed form, yet it is fitted to images:
    model-free means here that no network in training and no gradient-trained weight is used.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    steps: Annotated[int, Field(ge=1, le=10_000, description="gradient steps")] = 2
    width: Annotated[int, Field(ge=1, le=512, description="maps of the random CNN")] = 24
    depth: Annotated[int, Field(ge=1, le=8, description="most layers of the random CNN (drawn from 1 to this)")] = 2
    fewest: Annotated[int, Field(ge=2, le=1000, description="fewest clusters")] = 5
    most: Annotated[int, Field(ge=2, le=1000, description="most clusters")] = 40
    ridge_low: Annotated[float, Field(gt=0, allow_inf_nan=False, description="smallest ridge")] = 1e-3
    ridge_high: Annotated[float, Field(gt=0, allow_inf_nan=False, description="largest ridge")] = 10.0
    views: Annotated[int, Field(ge=1, le=8, description="adversarial views, around views 0, 1, 0, 1, ...")] = 1

    def __post_init__(self) -> None:
        if self.most < self.fewest or self.ridge_high < self.ridge_low:
            raise UserError("ridge-pgd draws between limits: give fewest <= most and ridge_low <= ridge_high")

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        return torch.stack(
            [self._attack(place % len(batch.views), batch.views, context) for place in range(self.views)]
        )

    def _attack(self, index: int, views: Tensor, context: Context) -> Tensor:
        rng, threat, images = context.rng, context.threat, views[index]
        others = [view for number, view in enumerate(views) if number != index]
        sample = torch.cat([context.calibration, *others, images])  # the attacked images last
        classify, classes = self._classifier(sample, rng)
        own = classes[-len(images) :]

        def objective(adversarial: Tensor) -> Tensor:
            return F.cross_entropy(SCALE * classify(adversarial), own, reduction="none")

        delta = ascend(objective, images, threat, steps=self.steps, rng=rng) - images
        # A pixel that the box has kept in its place is no direction: random there, as in corner noise.
        random = 1e-6 * torch.randn(images.shape, generator=rng, device=rng.device).to(images)
        delta = torch.where(delta == 0, random, delta)
        return threat.project(images, images + threat.radius * threat.steepest(delta, images))

    def _classifier(self, sample: Tensor, rng: torch.Generator) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        draws = torch.rand(3, generator=rng, device=rng.device).tolist()
        depth = 1 + min(int(draws[0] * self.depth), self.depth - 1)
        clusters = self.fewest + int(draws[1] * (self.most - self.fewest + 1))
        ridge = self.ridge_low * (self.ridge_high / self.ridge_low) ** draws[2]
        with torch.no_grad():
            features = spaces.standardised(spaces.random_conv(sample, rng, self.width, depth, PLACES), sample)
            rows = features(sample)
            classes = kmeans(sample.flatten(1), min(clusters, len(sample)), rng)
            target = F.one_hot(classes).to(rows.dtype)
            gram = rows @ rows.T / rows.shape[1]
            shift = ridge * gram.diagonal().mean() + 1e-6
            dual = torch.linalg.solve(gram + shift * torch.eye(len(rows)).to(gram), target - target.mean(0))
            weight = rows.T @ dual / rows.shape[1]
        return lambda images: features(images) @ weight, classes


def kmeans(rows: Tensor, clusters: int, rng: torch.Generator) -> Tensor:
    """(N,) cluster of each row (N, D) after a few of Lloyd's iterations from random rows; empty clusters stay."""
    start = torch.randperm(len(rows), generator=rng, device=rng.device)[:clusters].to(rows.device)
    centres = rows[start]
    for _ in range(LLOYD):
        member = F.one_hot(torch.cdist(rows, centres).argmin(1), clusters).to(rows.dtype)
        size = member.sum(0)[:, None]
        centres = torch.where(size > 0, member.T @ rows / size.clamp(min=1), centres)
    return torch.cdist(rows, centres).argmin(1)
