"""Control: noise at the extreme points of the ball."""

from typing import ClassVar

from torch import Tensor

from scl_defense.types import Context, GeneratorBatch, component


@component
class CornerNoise:
    """A random extreme point of the ball around view 0: +-eps in every pixel (Linf), full length (L2, L1).

    It costs nothing and is the strongest noise: the control that every model-free method has to beat.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        return context.threat.random_corner(batch.views[0], context.rng)[None]
