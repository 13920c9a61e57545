"""No adversarial views."""

from typing import ClassVar

from torch import Tensor

from scl_defense.types import Context, GeneratorBatch, component


@component
class NoGenerator:
    """Returns zero views (0, N, C, H, W), so that every trainer also runs on clean images alone."""

    needs: ClassVar[frozenset[str]] = frozenset()
    by_row: ClassVar[bool] = True

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        return batch.views[:0]
