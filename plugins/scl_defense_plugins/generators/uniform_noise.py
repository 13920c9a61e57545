"""Control: uniform noise."""

from typing import ClassVar

from torch import Tensor

from scl_defense.types import Context, GeneratorBatch, component


@component
class UniformNoise:
    """A uniform point of the ball around view 0. A method that does not beat it has learnt nothing from its attack."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        return context.threat.random_start(batch.views[0], context.rng)[None]
