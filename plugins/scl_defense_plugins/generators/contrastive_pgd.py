"""Model-free contrastive PGD."""

from typing import Annotated, ClassVar, Literal

from torch import Tensor

from scl_defense.ascent import ascend_contrast
from scl_defense.types import Context, Field, GeneratorBatch, component
from scl_defense_plugins.generators import spaces


@component
class ContrastivePGD:
    """Maximise one-sided InfoNCE in a feature space that holds no trained weight: no label, no classifier, no encoder.

    ``space``: ``pixel``; ``filterbank`` (fixed Gabor moduli); ``random-conv`` (early maps of a seeded random CNN,
    batch-norm calibrated). All are standardised per feature on a fixed sample of training images. It works before
    the first step, and what it makes depends on images, seed and batch alone.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    space: Annotated[Literal["pixel", "filterbank", "random-conv"], Field(description="feature space")] = "random-conv"
    redraw: Annotated[Literal["never", "epoch", "step"], Field(description="when random-conv draws a new network")] = (
        "epoch"
    )
    width: Annotated[int, Field(ge=1, le=512, description="maps of random-conv")] = 8
    depth: Annotated[int, Field(ge=1, le=8, description="layers of random-conv")] = 2
    steps: Annotated[int, Field(ge=1, le=10_000, description="gradient steps")] = 10
    rel_step: Annotated[
        float | None, Field(gt=0, allow_inf_nan=False, description="step in units of eps; default 2.5/steps")
    ] = None
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False, description="temperature of the attacked loss")] = (
        0.5
    )
    start: Annotated[Literal["uniform", "gaussian"], Field(description="start in the ball")] = "uniform"
    perturb: Annotated[Literal["one", "both"], Field(description="perturb view 0, or views 0 and 1")] = "one"

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        return ascend_contrast(
            self._space(context),
            batch.views,
            context.threat,
            perturb=self.perturb,
            temperature=self.temperature,
            steps=self.steps,
            rel_step=self.rel_step,
            start=self.start,
            rng=context.rng,
        )

    def _space(self, context: Context) -> spaces.Space:
        sample = context.calibration
        # Only the latest space is kept: an epoch's random network is not wanted again.
        redraw = self.redraw if self.space == "random-conv" else "never"
        when = {"never": (), "epoch": (context.epoch,), "step": (context.epoch, context.step)}[redraw]
        key, kept = (self.space, self.width, self.depth, when), context.cache.get("space")
        if kept is not None and kept[0] == key:
            return kept[1]
        if self.space == "pixel":
            features = spaces.pixel
        elif self.space == "filterbank":
            features = spaces.filterbank(sample.shape[1], min(sample.shape[-2:]), sample.device)
        else:
            features = spaces.random_conv(sample, context.stream("random-conv", redraw), self.width, self.depth)
        space = spaces.standardised(features, sample)
        context.cache["space"] = (key, space)
        return space
