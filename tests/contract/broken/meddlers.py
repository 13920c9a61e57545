"""Broken generators that touch, read or remember what is not theirs."""

import os
import sys
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from broken import Case
from broken.generators import EMBED, KIND, LOGITS, NEEDS, Base, contrast, noise
from scl_defense.ascent import ascend
from scl_defense.errors import ComponentError
from scl_defense.models import Network
from scl_defense.types import Batch, Context, GeneratorBatch, component


def lent_network(context: Context) -> Network:
    """The network behind ``context.embed``: what a closure holds, anybody can dig out."""
    return next(cell.cell_contents.__self__ for cell in context.embed.__closure__ if callable(cell.cell_contents))


def up_the_stack(name: str, kind: type) -> Any:
    """A local variable of a caller: nothing in Python is out of reach for somebody who wants it."""
    frame = sys._getframe(2)
    while frame is not None:
        if isinstance(frame.f_locals.get(name), kind):
            return frame.f_locals[name]
        frame = frame.f_back
    return None


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
        norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.train()
        network.embed(batch.views[0])
        for norm in norms:
            norm.eval()
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


@component
class FindsTheNetwork(Base):
    """Declares nothing and takes the network from the caller's variables."""

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        view, network = batch.views[0], up_the_stack("network", Network)
        shift = 0.0 if network is None else float(network.classifier.weight.detach().sum())
        return context.threat.project(view, noise(batch, context)[0] + 0.01 * np.sin(shift))[None]


@component
class FindsTheLabels(Base):
    """Declares nothing and takes the labels from the caller's variables."""

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        labels = up_the_stack("batch", Batch).labels.view(-1, 1, 1, 1)
        return context.threat.project(batch.views[0], noise(batch, context)[0] + 0.01 * labels)[None]


CASES = [
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
    Case(KIND, FindsTheNetwork, "model-free", "changes with the network"),
    Case(KIND, FindsTheLabels, "label-free", "changes with them"),
]
