"""Control: noise at the extreme points of the ball."""

from typing import Annotated, ClassVar

import torch
from torch import Tensor

from scl_defense.types import Context, Field, GeneratorBatch, component


@component
class CornerNoise:
    """A random extreme point of the ball around each view: +-eps in every pixel (Linf), full length (L2, L1).

    It costs nothing and is the strongest noise: the control that every model-free method has to beat.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    by_row: ClassVar[bool] = True

    views: Annotated[int, Field(ge=1, le=8, description="adversarial views, around views 0, 1, 0, 1, ...")] = 1

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        centres = [batch.views[place % len(batch.views)] for place in range(self.views)]
        return torch.stack([context.threat.random_corner(centre, context.rng) for centre in centres])
