"""Broken generators."""

import os
import sys
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from broken import Case
from scl_defense.ascent import ascend, ascend_contrast
from scl_defense.errors import ComponentError
from scl_defense.models import Network
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


def lent_network(context: Context) -> Network:
    """The network behind ``context.embed``: what a closure holds, anybody can dig out."""
    (cell,) = context.embed.__closure__
    return cell.cell_contents.__self__


def up_the_stack(name: str, kind: type) -> Any:
    """A local variable of a caller: nothing in Python is out of reach for somebody who wants it."""
    frame = sys._getframe(2)
    while frame is not None:
        if isinstance(frame.f_locals.get(name), kind):
            return frame.f_locals[name]
        frame = frame.f_back
    return None


class Base:
    needs: NEEDS = FREE


# -- sound ones


@component
class Sound(Base):
    """Noise."""

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
class TooManyViews(Base):
    """Three adversarial views of two views: whose ball is the third in?"""

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        return noise(batch, context).repeat(len(batch.views) + 1, 1, 1, 1, 1)


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


# -- what it was not given, or given only to look at


@component
class QuietlyUsesEncoder(Base):
    """Takes the encoder when it gets it, and hides the refusal."""

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        try:
            return contrast(batch, context)
        except ComponentError:
            return noise(batch, context)


@component
class UsesUndeclaredLabels(Base):
    """Attacks the classifier but declares only the logits."""

    needs: NEEDS = LOGITS

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        labels = context.labels

        def loss(images: Tensor) -> Tensor:
            return F.cross_entropy(context.logits(images), labels, reduction="none")

        return ascend(loss, batch.views[0], context.threat, steps=3, rng=context.rng)[None]


@component
class UnknownNeed(Base):
    """Asks for what there is not."""

    needs: NEEDS = frozenset({"gradients"})

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        return noise(batch, context)


@component
class WritesViews(Base):
    """Perturbs the batch in place after having made its views."""

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        made = noise(batch, context)
        batch.views.mul_(0.5)
        return made


@component
class WritesCalibration(Base):
    """Standardises the calibration sample in place."""

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        context.calibration.sub_(context.calibration.mean())
        return noise(batch, context)


@component
class SwitchesToTrain(Base):
    """Puts the lent network into train mode."""

    needs: NEEDS = EMBED

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        made = contrast(batch, context)
        lent_network(context).train()
        return made


@component
class MovesStatistics(Base):
    """A forward pass in train mode: the mode is put back, the batch-norm statistics are not."""

    needs: NEEDS = EMBED

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        made, network = contrast(batch, context), lent_network(context)
        network.train()
        network.embed(batch.views[0])
        network.eval()
        return made


@component
class LeavesGradients(Base):
    """Calls backward on the parameters."""

    needs: NEEDS = EMBED

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        made, network = contrast(batch, context), lent_network(context)
        weight = network.classifier.weight
        weight.requires_grad_(True)
        network.logits(batch.views[0]).sum().backward()
        weight.requires_grad_(False)
        return made


@component
class ChangesWeights(Base):
    """Perturbs the weights beside the images (as adversarial weight perturbation does) and does not put them back."""

    needs: NEEDS = EMBED

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        made = contrast(batch, context)
        lent_network(context).classifier.weight.data.mul_(1.01)
        return made


@component
class DrawsFromTorch(Base):
    """torch.rand_like without a generator."""

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        view = batch.views[0]
        return context.threat.project(view, view + context.threat.radius * (torch.rand_like(view) - 0.5))[None]


@component
class DrawsFromNumPy(Base):
    """NumPy's global generator."""

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        view = batch.views[0]
        drawn = torch.from_numpy(np.random.uniform(-0.5, 0.5, view.shape)).to(view)
        return context.threat.project(view, view + context.threat.radius * drawn)[None]


@component
class ReadsGlobalSeed(Base):
    """Moves no global generator, but starts its own from the global seed."""

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        drawn = int(torch.randint(2**30, (), generator=context.rng))
        own = torch.Generator().manual_seed(torch.initial_seed() + drawn)
        return context.threat.random_start(batch.views[0], own)[None]


@component
class SwitchesGradientsOff(Base):
    """Leaves gradient recording off for the whole process."""

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        torch.set_grad_enabled(False)
        return noise(batch, context)


# -- repeating


@component
class SeedsFromTheSystem(Base):
    """Every call draws something else."""

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        own = torch.Generator().manual_seed(int.from_bytes(os.urandom(6), "big"))
        return context.threat.random_start(batch.views[0], own)[None]


@component
class CountsItsCalls(Base):
    """Hidden state in a frozen object."""

    calls: ClassVar[list[int]] = []

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        self.calls.append(1)
        made = noise(batch, context)
        return context.threat.project(batch.views[0], made[0] + 1e-3 * len(self.calls) * (0.5 - made[0]))[None]


@component
class CacheIsState(Base):
    """A universal perturbation that grows from step to step in the cache, which no checkpoint holds."""

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        view = batch.views[0]
        moved = (noise(batch, context)[0] - view).mean(0, keepdim=True)
        context.cache["universal"] = 0.9 * context.cache.get("universal", 0) + moved
        return context.threat.project(view, view + context.cache["universal"])[None]


@component
class FixedSeed(Base):
    """The same noise in every step of every run."""

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        return context.threat.random_start(batch.views[0], torch.Generator().manual_seed(0))[None]


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
class FindsTheNetwork(Base):
    """Declares nothing and takes the network from the caller's variables."""

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        view, network = batch.views[0], up_the_stack("network", Network)
        shift = 0.0 if network is None else float(network.classifier.weight.sum())
        return context.threat.project(view, noise(batch, context)[0] + 0.01 * np.sin(shift))[None]


@component
class FindsTheLabels(Base):
    """Declares nothing and takes the labels from the caller's variables."""

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        from scl_defense.types import Batch

        labels = up_the_stack("batch", Batch).labels.view(-1, 1, 1, 1)
        return context.threat.project(batch.views[0], noise(batch, context)[0] + 0.01 * labels)[None]


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


SOUND = [Sound, SoundNothing, SoundByNature, SoundOnline]

CASES = [
    Case(KIND, LeavesBall, "inside-ball", "left the ball"),
    Case(KIND, LeavesBox, "inside-box", "left the box"),
    Case(KIND, ReturnsNaN, "finite", "NaN", also=frozenset({"constant-images"})),
    Case(KIND, ForgetsTheViewAxis, "returns-views", "it returned (2, 1, 8, 8), not (A, 2, 1, 8, 8)"),
    Case(KIND, TooManyViews, "returns-views", "with A <= 2"),
    Case(KIND, ReturnsAList, "returns-views", "it returned list"),
    Case(KIND, DoublePrecision, "dtype-and-device", "torch.float64"),
    Case(KIND, Attached, "detached", "attached to a graph"),
    Case(KIND, QuietlyUsesEncoder, "needs-declared", "used context.embed"),
    Case(KIND, UsesUndeclaredLabels, "needs-declared", "used context.labels"),
    Case(KIND, UnknownNeed, "needs-declared", "gradients"),
    Case(KIND, WritesViews, "batch-untouched", "wrote into views"),
    Case(KIND, WritesCalibration, "batch-untouched", "wrote into calibration"),
    Case(KIND, SwitchesToTrain, "network-untouched", "train/eval mode"),
    Case(KIND, MovesStatistics, "network-untouched", "the buffer encoder.norm"),
    Case(KIND, LeavesGradients, "network-untouched", "the gradient of classifier.weight"),
    Case(KIND, ChangesWeights, "network-untouched", "the values of classifier.weight"),
    Case(KIND, DrawsFromTorch, "global-state", "torch's global random state"),
    Case(KIND, DrawsFromNumPy, "global-state", "NumPy's global random state"),
    Case(KIND, ReadsGlobalSeed, "global-state", "depends on a global random state"),
    Case(KIND, SwitchesGradientsOff, "global-state", "set_grad_enabled"),
    Case(KIND, SeedsFromTheSystem, "deterministic", "two calls with the same seed differ"),
    Case(KIND, CountsItsCalls, "deterministic", "two calls with the same seed differ"),
    Case(KIND, CacheIsState, "cache-is-no-state", "context.cache"),
    Case(KIND, FixedSeed, "seed-matters", "another seed changes nothing"),
    Case(KIND, LeastPerturbation, "eps-zero-is-identity", "moved a pixel by 0.0039"),
    Case(KIND, FindsTheNetwork, "model-free", "changes with the network"),
    Case(KIND, FindsTheLabels, "label-free", "changes with them"),
    Case(KIND, DividesByContrast, "constant-images", "on images that are 0 everywhere"),
    Case(KIND, NeedsTwoViews, "one-view", "IndexError"),
    Case(KIND, NeedsNeighbours, "one-image", "ValueError: bad batch"),
    Case(KIND, PretendsToAttack, "beats-corner-noise", "where random corner noise reaches"),
    Case(KIND, PretendsToContrast, "beats-corner-noise", "where random corner noise reaches"),
    Case(KIND, AttacksTheWrongWay, "beats-corner-noise", "where random corner noise reaches"),
    Case(KIND, StepsTooShort, "linear-optimum", "not 99 %"),
]
