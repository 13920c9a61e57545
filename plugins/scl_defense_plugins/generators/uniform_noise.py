"""Control: uniform noise."""

from typing import Annotated, ClassVar

import torch
from torch import Tensor

from scl_defense.types import Context, Field, GeneratorBatch, component


@component
class UniformNoise:
    """A uniform point of the ball around each view: a method that does not beat it has learnt nothing."""

    needs: ClassVar[frozenset[str]] = frozenset()
    by_row: ClassVar[bool] = True

    views: Annotated[int, Field(ge=1, le=8, description="adversarial views, around views 0, 1, 0, 1, ...")] = 1

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        centres = [batch.views[place % len(batch.views)] for place in range(self.views)]
        return torch.stack([context.threat.random_start(centre, context.rng) for centre in centres])
