"""Contrastive PGD in a fixed feature space; without a trained weight unless a checkpoint is asked for."""

from pathlib import Path
from typing import Annotated, Any, Literal

from torch import Tensor

from scl_defense.ascent import ascend_contrast, check_negatives
from scl_defense.errors import UserError
from scl_defense.types import Context, Field, GeneratorBatch, component
from scl_defense_plugins.generators import spaces


@component
class ContrastivePGD:
    """Maximise a contrastive loss in a feature space that holds no trained weight: no classifier, no encoder.

    ``space``: ``pixel``; ``filterbank`` (fixed Gabor moduli); ``scattering`` (wavelet moduli of kymatio);
    ``random-conv`` (early maps of a seeded random CNN, batch-norm calibrated); and, for comparison, ``checkpoint``: the
    frozen encoder of the file ``path``, a static control that is *not* model-free. All are standardised per feature
    on a fixed sample of training images. It works before the first step, and what it makes depends on images, seed
    and batch alone. ``objective=supcon`` and ``negatives=other-classes`` use the labels.
    """

    space: Annotated[
        Literal["pixel", "filterbank", "scattering", "random-conv", "checkpoint"], Field(description="feature space")
    ] = "random-conv"
    path: Annotated[str | None, Field(description="file of the encoder for space=checkpoint")] = None
    redraw: Annotated[Literal["never", "epoch", "step"], Field(description="when random-conv draws a new network")] = (
        "epoch"
    )
    width: Annotated[int, Field(ge=1, le=512, description="maps of random-conv")] = 8
    depth: Annotated[int, Field(ge=1, le=8, description="layers of random-conv")] = 2
    objective: Annotated[
        Literal["infonce", "ntxent-joint", "align", "supcon"], Field(description="loss to be maximised")
    ] = "infonce"
    negatives: Annotated[
        Literal["all", "other-classes"], Field(description="negatives of infonce; other-classes uses the labels")
    ] = "all"
    steps: Annotated[int, Field(ge=1, le=10_000, description="gradient steps")] = 10
    rel_step: Annotated[
        float | None, Field(gt=0, allow_inf_nan=False, description="step in units of eps; default 2.5/steps")
    ] = None
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False, description="temperature of the attacked loss")] = (
        0.5
    )
    start: Annotated[Literal["uniform", "gaussian"], Field(description="start in the ball")] = "uniform"
    views: Annotated[int, Field(ge=1, le=8, description="adversarial views, around views 0, 1, 0, 1, ...")] = 1

    def __post_init__(self) -> None:
        check_negatives(self.objective, self.negatives)
        if (self.space == "checkpoint") != (self.path is not None):
            raise UserError("space=checkpoint and path=FILE go together: give both, or leave both out")

    @property
    def needs(self) -> frozenset[str]:
        labels = self.objective == "supcon" or self.negatives == "other-classes"
        return frozenset({"labels"} if labels else ()) | ({"checkpoint"} if self.space == "checkpoint" else set())

    def prepare(self, data: Any, threat: Any) -> None:
        """Before training: a checkpoint that is not there is said at once."""
        if self.path is not None and not Path(self.path).is_file():
            raise UserError(f"checkpoint '{self.path}' of space=checkpoint does not exist; give the file of a run")

    @property
    def by_row(self) -> bool:
        """Against fixed references every image goes its own way; jointly perturbed ones do not."""
        return self.objective != "ntxent-joint"

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        return ascend_contrast(
            self._space(context),
            batch.views,
            context.threat,
            objective=self.objective,
            negatives=self.negatives,
            labels=context.labels if "labels" in self.needs else None,
            count=self.views,
            temperature=self.temperature,
            steps=self.steps,
            rel_step=self.rel_step,
            start=self.start,
            rng=context.rng,
            gather=context.gather,
            first=context.first,
        )

    def _space(self, context: Context) -> spaces.Space:
        sample = context.calibration
        # Only the latest space is kept: an epoch's random network is not wanted again.
        redraw = self.redraw if self.space == "random-conv" else "never"
        when = {"never": (), "epoch": (context.epoch,), "step": (context.epoch, context.step)}[redraw]
        key, kept = (self.space, self.path, self.width, self.depth, when), context.cache.get("space")
        if kept is not None and kept[0] == key:
            return kept[1]
        if self.space == "pixel":
            features: spaces.Space = spaces.pixel
        elif self.space == "filterbank":
            features = spaces.filterbank(sample.shape[1], min(sample.shape[-2:]), sample.device)
        elif self.space == "scattering":
            features = spaces.scattering(sample.shape[-2:], sample.device)
        elif self.space == "checkpoint":
            features = context.checkpoint(str(self.path))
        else:
            features = spaces.random_conv(sample, context.stream("random-conv", redraw), self.width, self.depth)
        space = spaces.standardised(features, sample)
        context.cache["space"] = (key, space)
        return space
