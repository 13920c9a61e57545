"""PGD on the classifier in training."""

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from scl_defense.ascent import ascend
from scl_defense.errors import UserError
from scl_defense.types import Context, Field, GeneratorBatch, component

FGSM_RS_STEP = 1.25  # Wong, Rice & Kolter 2020: one step of 1.25 eps from a uniform start


@component
class PGD:
    """Projected gradient ascent on a loss of the current classifier, around each view (Madry et al. 2018).

    ``loss``: ``ce`` cross-entropy; ``kl`` KL(p(x) || p(x + delta)), label-free, from a 0.001 N(0, I) start because its
    gradient vanishes at x (TRADES, Zhang et al. 2019); ``margin`` max_{j != y} logit_j - logit_y (Carlini & Wagner
    2017). ``steps=1`` is FGSM-RS: a step of 1.25 eps from a uniform start.
    """

    by_row: ClassVar[bool] = True

    loss: Annotated[Literal["ce", "kl", "margin"], Field(description="loss to be maximised")] = "ce"
    steps: Annotated[int, Field(ge=1, le=10_000, description="gradient steps")] = 10
    rel_step: Annotated[
        float | None,
        Field(gt=0, allow_inf_nan=False, description="step in units of eps; default 2.5/steps, or 1.25 for one step"),
    ] = None
    start: Annotated[
        Literal["uniform", "gaussian", "zero"] | None, Field(description="start; default uniform, gaussian for kl")
    ] = None

    views: Annotated[int, Field(ge=1, le=8, description="adversarial views, around views 0, 1, 0, 1, ...")] = 1

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"logits"} if self.loss == "kl" else {"logits", "labels"})

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        start = self.start or ("gaussian" if self.loss == "kl" else "uniform")
        if start == "zero" and self.views > len(batch.views):
            raise UserError(
                f"start=zero makes the same example twice: views={self.views} of {len(batch.views)}; use start=uniform"
            )
        rel_step = FGSM_RS_STEP if self.rel_step is None and self.steps == 1 else self.rel_step
        adversarial = []
        for place in range(self.views):
            images = batch.views[place % len(batch.views)]
            objective = self._objective(images, context)
            adversarial.append(
                ascend(
                    objective,
                    images,
                    context.threat,
                    steps=self.steps,
                    rel_step=rel_step,
                    start=start,
                    rng=context.rng,
                )
            )
        return torch.stack(adversarial)

    def _objective(self, images: Tensor, context: Context) -> Callable[[Tensor], Tensor]:
        logits = context.logits
        if self.loss == "kl":
            with torch.no_grad():
                clean = F.softmax(logits(images), dim=1)
            return lambda adversarial: F.kl_div(F.log_softmax(logits(adversarial), dim=1), clean, reduction="none").sum(
                1
            )
        labels = context.labels
        if self.loss == "ce":
            return lambda adversarial: F.cross_entropy(logits(adversarial), labels, reduction="none")

        def margin(adversarial: Tensor) -> Tensor:
            scores = logits(adversarial)
            own = scores.gather(1, labels[:, None])
            return scores.scatter(1, labels[:, None], -torch.inf).amax(1) - own.squeeze(1)

        return margin
