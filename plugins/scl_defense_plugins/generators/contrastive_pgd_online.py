"""Label-free contrastive PGD on the encoder in training."""

from typing import Annotated, ClassVar, Literal

from torch import Tensor

from scl_defense.ascent import ascend_contrast
from scl_defense.types import Context, Field, GeneratorBatch, component


@component
class ContrastivePGDOnline:
    """Maximise one-sided InfoNCE of the projector's output, no label and no classifier needed.

    The label-free attack of RoCL (Kim, Tack & Hwang 2020) on the current encoder, in eval mode, against the other
    view. With ``ema`` > 0 a weight-averaged twin with batch statistics of its own is attacked instead; its momentum
    is warmed up as min(ema, (1 + t) / (10 + t)).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"embed"})

    steps: Annotated[int, Field(ge=1, le=10_000, description="gradient steps")] = 5
    rel_step: Annotated[
        float | None, Field(gt=0, allow_inf_nan=False, description="step in units of eps; default 2.5/steps")
    ] = None
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False, description="temperature of the attacked loss")] = (
        0.5
    )
    start: Annotated[Literal["uniform", "gaussian"], Field(description="start in the ball")] = "uniform"
    perturb: Annotated[Literal["one", "both"], Field(description="perturb view 0, or views 0 and 1")] = "one"
    ema: Annotated[float, Field(ge=0, lt=1, description="momentum of the averaged twin; 0: the encoder itself")] = 0.0

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        return ascend_contrast(
            context.embed,
            batch.views,
            context.threat,
            perturb=self.perturb,
            temperature=self.temperature,
            steps=self.steps,
            rel_step=self.rel_step,
            start=self.start,
            rng=context.rng,
        )
