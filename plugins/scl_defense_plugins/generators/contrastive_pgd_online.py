"""Contrastive PGD on the encoder in training."""

from typing import Annotated, Literal

from torch import Tensor

from scl_defense.ascent import ascend_contrast, check_negatives
from scl_defense.types import Context, Field, GeneratorBatch, component


@component
class ContrastivePGDOnline:
    """Maximise a contrastive loss of the projector's output: no classifier, and no label unless asked for.

    The attack runs on the current encoder, in eval mode, against the other view: ``infonce`` (one-sided),
    ``ntxent-joint`` (RoCL, Kim, Tack & Hwang 2020; with ``views=2`` ACL, Jiang et al. 2020), ``align`` (minus the
    cosine), ``supcon``; the latter and ``negatives=other-classes`` use the labels. With ``ema`` > 0 a weight-averaged
    twin with batch statistics of its own is attacked instead; its momentum is warmed up as
    min(ema, (1 + t) / (10 + t)).
    """

    objective: Annotated[
        Literal["infonce", "ntxent-joint", "align", "supcon"], Field(description="loss to be maximised")
    ] = "infonce"
    negatives: Annotated[
        Literal["all", "other-classes"], Field(description="negatives of infonce; other-classes uses the labels")
    ] = "all"
    steps: Annotated[int, Field(ge=1, le=10_000, description="gradient steps")] = 5
    rel_step: Annotated[
        float | None, Field(gt=0, allow_inf_nan=False, description="step in units of eps; default 2.5/steps")
    ] = None
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False, description="temperature of the attacked loss")] = (
        0.5
    )
    start: Annotated[Literal["uniform", "gaussian"], Field(description="start in the ball")] = "uniform"
    views: Annotated[int, Field(ge=1, le=8, description="adversarial views, around views 0, 1, 0, 1, ...")] = 1
    ema: Annotated[float, Field(ge=0, lt=1, description="momentum of the averaged twin; 0: the encoder itself")] = 0.0

    def __post_init__(self) -> None:
        check_negatives(self.objective, self.negatives)

    @property
    def needs(self) -> frozenset[str]:
        labels = self.objective == "supcon" or self.negatives == "other-classes"
        return frozenset({"embed", "labels"} if labels else {"embed"})

    @property
    def by_row(self) -> bool:
        """Against fixed references every image goes its own way; jointly perturbed ones do not."""
        return self.objective != "ntxent-joint"

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        return ascend_contrast(
            context.embed,
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
