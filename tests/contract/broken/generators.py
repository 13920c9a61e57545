"""Broken generators."""

from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from broken import Case
from scl_defense.ascent import ascend, ascend_contrast
from scl_defense.types import Context, Field, GeneratorBatch, component

KIND = "generator"
NEEDS = ClassVar[frozenset[str]]
FREE: frozenset[str] = frozenset()
EMBED, LOGITS = frozenset({"embed"}), frozenset({"logits"})
CLASSIFIER = frozenset({"logits", "labels"})


def noise(batch: GeneratorBatch, context: Context) -> Tensor:
    return context.threat.random_start(batch.views[0], context.rng)[None]


def contrast(batch: GeneratorBatch, context: Context) -> Tensor:
    return ascend_contrast(context.embed, batch.views, context.threat, steps=3, rng=context.rng)


class Base:
    needs: NEEDS = FREE


# -- sound ones


@component
class Sound(Base):
    """Noise."""

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        return noise(batch, context)


@component
class SoundByRow(Base):
    """Noise that a process makes for its own images."""

    by_row: ClassVar[bool] = True

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        return noise(batch, context)


@component
class SoundNothing(Base):
    """No view at all."""

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        return batch.views[:0]


@component
class SoundByNature(Base):
    """Deterministic by nature: contrast lowered as far as the ball allows. Another seed rightly changes nothing."""

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        return context.threat.project(batch.views[0], torch.full_like(batch.views[0], 0.5))[None]


@component
class SoundOnline(Base):
    """Contrastive PGD on the lent encoder."""

    needs: NEEDS = EMBED

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        return contrast(batch, context)


@component
class SoundManyViews(Base):
    """More adversarial views than views: the third belongs to the first view again."""

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        centres = [batch.views[place % len(batch.views)] for place in range(3)]
        return torch.stack([context.threat.random_start(centre, context.rng) for centre in centres])


@component
class SoundSaved(Base):
    """Contrastive PGD on the encoder of a checkpoint."""

    needs: NEEDS = frozenset({"checkpoint"})

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        encoder = context.checkpoint("anyone.pt")
        return ascend_contrast(encoder, batch.views, context.threat, steps=3, rng=context.rng)


# -- what comes back


@component
class LeavesBall(Base):
    """Half as far again as allowed."""

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        return (batch.views[0] + 1.5 * (noise(batch, context)[0] - batch.views[0])).clamp(0, 1)[None]


@component
class LeavesBox(Base):
    """Nobody clamps."""

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        view = batch.views[0]
        return (view + context.threat.radius * context.threat.random_direction(view, context.rng))[None]


@component
class ReturnsNaN(Base):
    """One pixel is NaN."""

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        made = noise(batch, context)
        made[0, 0, 0, 0, 0] = float("nan")
        return made


@component
class ForgetsTheViewAxis(Base):
    """(N, C, H, W)."""

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        return noise(batch, context)[0]


@component
class WrongCentre(Base):
    """The second adversarial view of two lies in the ball of the first view, not in its own."""

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        return noise(batch, context).repeat(2, 1, 1, 1, 1)


@component
class ReturnsAList(Base):
    """A list of images is no tensor."""

    def __call__(self, batch: GeneratorBatch, context: Context) -> Any:
        return list(noise(batch, context)[0])


@component
class DoublePrecision(Base):
    """float64."""

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        return noise(batch, context).double()


@component
class Attached(Base):
    """Still part of a graph."""

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        return noise(batch, context).requires_grad_() * 1


# -- limits


@component
class LeastPerturbation(Base):
    """Never moves less than 1/255, also when eps is 0."""

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        made = noise(batch, context)
        if context.threat.radius == 0:
            made = (made + 1 / 255).clamp(0, 1)
        return made


@component
class DividesByContrast(Base):
    """0 / 0 on an image without contrast."""

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        view = batch.views[0]
        middle = view - view.mean((1, 2, 3), keepdim=True)
        sharper = view + context.threat.radius * middle / middle.abs().amax((1, 2, 3), keepdim=True)
        return context.threat.project(view, sharper)[None]


@component
class NeedsTwoViews(Base):
    """Takes the second view without asking whether there is one."""

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        return context.threat.project(batch.views[0], batch.views[1])[None]


@component
class NeedsNeighbours(Base):
    """Fails on a single image with a message that helps nobody."""

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        if len(batch.images) < 2:
            raise ValueError("bad batch")
        return context.threat.project(batch.views[0], batch.views[0].roll(1, 0))[None]


# -- doing its job


@component
class PretendsToAttack(Base):
    """Asks for logits and labels and returns noise."""

    needs: NEEDS = CLASSIFIER

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        context.logits(batch.views[0])
        context.labels.sum()
        return noise(batch, context)


@component
class PretendsToContrast(Base):
    """Asks for the encoder and returns noise."""

    needs: NEEDS = EMBED

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        context.embed(batch.views[0])
        return noise(batch, context)


@component
class AttacksTheWrongWay(Base):
    """Descends: a sign too many. Its examples are easier than the images."""

    needs: NEEDS = CLASSIFIER

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        def loss(images: Tensor) -> Tensor:
            return -F.cross_entropy(context.logits(images), context.labels, reduction="none")

        return ascend(loss, batch.views[0], context.threat, steps=3, rng=context.rng)[None]


@component
class StepsTooShort(Base):
    """Ten steps do not reach the border of the ball."""

    needs: NEEDS = CLASSIFIER

    steps: Annotated[int, Field(ge=1, description="gradient steps")] = 10

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        def loss(images: Tensor) -> Tensor:
            return F.cross_entropy(context.logits(images), context.labels, reduction="none")

        view = batch.views[0]
        return ascend(loss, view, context.threat, steps=self.steps, rel_step=0.05, start="zero", rng=context.rng)[None]


@component
class LooksAtNeighbours(Base):
    """Moves every image towards the mean of those that happen to be there."""

    by_row: ClassVar[bool] = True

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        view = batch.views[0]
        return context.threat.project(view, view.mean(0).expand_as(view))[None]


@component
class DrawsForTheBatch(Base):
    """One direction for all images, taken from the first row of the draws."""

    by_row: ClassVar[bool] = True

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        noise = torch.randn(batch.views[0].shape, generator=context.rng)
        return context.threat.project(batch.views[0], batch.views[0] + noise[:1].sign())[None]


SOUND = [Sound, SoundByRow, SoundNothing, SoundByNature, SoundOnline, SoundManyViews, SoundSaved]

CASES = [
    Case(KIND, LeavesBall, "inside-ball", "left the ball"),
    Case(KIND, LeavesBox, "inside-box", "left the box"),
    Case(KIND, WrongCentre, "inside-ball", "left the ball", also=frozenset({"eps-zero-is-identity"})),
    Case(KIND, ReturnsNaN, "finite", "NaN", also=frozenset({"constant-images"})),
    Case(KIND, ForgetsTheViewAxis, "returns-views", "it returned (2, 1, 8, 8), not (A, 2, 1, 8, 8)"),
    Case(KIND, ReturnsAList, "returns-views", "it returned list"),
    Case(KIND, DoublePrecision, "dtype-and-device", "torch.float64"),
    Case(KIND, Attached, "detached", "attached to a graph"),
    Case(KIND, LeastPerturbation, "eps-zero-is-identity", "moved a pixel by 0.0039"),
    Case(KIND, DividesByContrast, "constant-images", "on images that are 0 everywhere"),
    Case(KIND, LooksAtNeighbours, "by-row", "changes with the others"),
    Case(KIND, DrawsForTheBatch, "by-row", "changes with the others"),
    Case(KIND, NeedsTwoViews, "one-view", "IndexError"),
    Case(KIND, NeedsNeighbours, "one-image", "ValueError: bad batch"),
    Case(KIND, PretendsToAttack, "beats-corner-noise", "where random corner noise reaches"),
    Case(KIND, PretendsToContrast, "beats-corner-noise", "where random corner noise reaches"),
    Case(KIND, AttacksTheWrongWay, "beats-corner-noise", "where random corner noise reaches"),
    Case(KIND, StepsTooShort, "linear-optimum", "not 99 %"),
]
