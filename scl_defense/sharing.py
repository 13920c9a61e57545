"""One batch, several processes: each passes its own images through the encoder, and all see what came of all of them.

The batch is the same as with one process, and so is what is drawn for it. What compares images compares those of the
whole batch: the loss is computed from the features of all processes, the same in each, and the gradient of a feature
goes back to the process whose image it is. Components say how much they can be split (``by_row``, see
:mod:`scl_defense.types`); what cannot be split gets the whole batch in every process and a network that shares out
the passes by itself, so that every component gives what it gives in one process.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from scl_defense.data import Split
from scl_defense.draws import RowsOf
from scl_defense.errors import ComponentError
from scl_defense.models import Network
from scl_defense.runtime import ranks
from scl_defense.types import Batch

View = Callable[[Tensor, int], Tensor]  # (images, number) -> one augmented view of them


@dataclass(frozen=True)
class Piece:
    """Images that are forwarded together. given: what the generator sees of them; seen: the trainer. rows: which of
    the ``whole`` images are this process's, ``first`` the place of the first of all in the batch.
    """

    given: Batch
    seen: Batch
    rows: slice
    whole: int
    first: int = 0


class Lot:
    """The images of one step, as pieces. views: how many; ``augment(images, rng)`` makes one of them, ``rng(number)``
    is its generator. generator_by_row, trainer_by_row: whether a process's own images are enough for them.
    """

    def __init__(
        self,
        split: Split,
        chosen: Tensor,
        views: int,
        augment: Callable[[Tensor, torch.Generator], Tensor],
        rng: Callable[[int], torch.Generator],
        *,
        generator_by_row: bool,
        trainer_by_row: bool,
    ):
        self.split, self.chosen, self.views, self.augment, self.rng = split, chosen, views, augment, rng
        self.ranks = ranks()
        self.generator_by_row, self.trainer_by_row = generator_by_row, trainer_by_row
        self._whole: Batch | None = None
        self._pieces: tuple[int, list[Piece]] = (0, [])

    def __len__(self) -> int:
        return len(self.chosen)

    def whole(self) -> Batch:
        if self._whole is None:
            self._whole = self._batch(slice(0, len(self)))
        return self._whole

    def view(self, images: Tensor, number: int, rows: slice | None = None) -> Tensor:
        """View ``number`` of images that stand at ``rows`` of the batch (default: from the first on)."""
        rng = self.rng(number)
        if rows is None or len(images) == len(self):
            return self.augment(images, rng)
        with RowsOf(rows.start, rows.stop, len(self), rng):
            return self.augment(images, rng)

    def _batch(self, rows: slice) -> Batch:
        chosen = self.chosen[rows]
        images = self.split.float_images(chosen)
        views = torch.stack([self.view(images, number, rows) for number in range(self.views)])
        return Batch(views, self.split.labels[chosen], images, self.split.indices[chosen])

    def pieces(self, parts: int) -> list[Piece]:
        """The batch in ``parts`` of (almost) equal size, in its order, and what of each is this process's."""
        if self._pieces[0] != parts:
            self._pieces = (parts, self._cut(parts))
        return self._pieces[1]

    def _cut(self, parts: int) -> list[Piece]:
        places, found = torch.arange(len(self)).tensor_split(parts), []
        for place in places:
            part = slice(int(place[0]), int(place[-1]) + 1)
            rows = self.ranks.rows(len(place))
            if self.ranks.world == 1:
                batch = self.whole() if parts == 1 else _rows(self.whole(), part)
                found.append(Piece(batch, batch, rows, len(place), part.start))
                continue
            own = slice(part.start + rows.start, part.start + rows.stop)
            every = None if self.generator_by_row and self.trainer_by_row else _rows(self.whole(), part)
            mine = self._batch(own) if every is None else _rows(self.whole(), own)
            chosen = self.chosen[part]
            seen = Batch(mine.views, self.split.labels[chosen], mine.images, self.split.indices[chosen])
            found.append(
                Piece(
                    mine if self.generator_by_row or every is None else every,
                    seen if self.trainer_by_row or every is None else every,
                    rows,
                    len(place),
                    part.start,
                )
            )
        return found

    def own_part(self, parts: int) -> Tensor:
        """This process's images, view 0, of the first part of the batch."""
        piece = self.pieces(parts)[0]
        views = piece.seen.views[0]
        return views if len(views) < piece.whole else views[piece.rows]


def _rows(batch: Batch, at: slice) -> Batch:
    return Batch(batch.views[:, at], batch.labels[at], batch.images[at], batch.indices[at])


def own_views(adversarial: Tensor, piece: Piece, *, generator_by_row: bool, trainer_by_row: bool) -> Tensor:
    """What the generator made, (A, n, C, H, W), as the trainer wants it: of its own images, or of all."""
    if generator_by_row == trainer_by_row:
        return adversarial
    if trainer_by_row:
        return adversarial[:, piece.rows]
    rows = adversarial.transpose(0, 1)
    return ranks().gathered(rows, ranks().sizes(piece.whole)).transpose(0, 1).contiguous()


# -- passes that are shared out


class _Gather(torch.autograd.Function):
    """Rows of all processes. Backward: the sum of what they say of the own rows or, ``alike``, what is said here."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], alike: bool) -> Tensor:
        ctx.sizes, ctx.alike = sizes, alike
        return ranks().gathered(rows, sizes)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.alike:
            return gradient.split(ctx.sizes)[ranks().rank], None, None
        return ranks().scattered(gradient, ctx.sizes), None, None


class _Own(torch.autograd.Function):
    """The own rows of what all processes hold alike. Backward: the gradients of all rows, times ``scale``."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], scale: float) -> Tensor:
        ctx.sizes, ctx.scale = sizes, scale
        start = sum(sizes[: ranks().rank])
        return rows[start : start + sizes[ranks().rank]]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ranks().gathered(gradient * ctx.scale if ctx.scale != 1 else gradient, ctx.sizes), None, None


@contextmanager
def passes_shared(network: Network, piece: Piece, *, by_row: bool, training: bool) -> Iterator[None]:
    """Inside, ``network.features`` gives the features of all processes' images.

    by_row: it is handed this process's images, one whole view after another, and gives those of all processes in this
    order; else it is handed all images in every process, each passes its share of them, and a gradient comes back for
    all. training: parameters' gradients are made whose mean over processes is that of one process; else (the loss is
    computed alike everywhere) gradients with respect to images alone.
    """
    everybody = ranks()
    if everybody.world == 1:
        yield
        return
    alone = network.features

    def of_all(features: Tensor, sizes: list[int]) -> Tensor:
        low = features.dtype in (torch.float16, torch.bfloat16)
        found: Tensor = _Gather.apply(features.float() if low else features, sizes, not training)
        return found

    def own_then_all(images: Tensor) -> Tensor:
        sizes = everybody.sizes(piece.whole)
        own = sizes[everybody.rank]
        if len(images) % own:
            raise ComponentError(
                f"a trainer with by_row must pass whole views: {len(images)} images are no multiple of its {own}"
            )
        features = alone(images)
        image_by_image = features.reshape(len(images) // own, own, *features.shape[1:]).transpose(0, 1)
        return of_all(image_by_image, sizes).transpose(0, 1).flatten(0, 1)

    def share_of_all(images: Tensor) -> Tensor:
        sizes = everybody.sizes(len(images))
        if min(sizes) == 0:  # too few to share: everybody passes them
            return alone(images)
        return of_all(alone(_Own.apply(images, sizes, 1 / everybody.world if training else 1.0)), sizes)

    network.features = own_then_all if by_row else share_of_all  # type: ignore[method-assign]
    try:
        yield
    finally:
        del network.features


# -- batch norm


class _Normalised(torch.autograd.Function):
    """Batch norm with the statistics of all processes' images; mean and variance come with it, for the running ones."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
        axes, shape = [0, *range(2, inputs.dim())], [1, -1, *[1] * (inputs.dim() - 2)]
        wide = inputs if inputs.dtype == torch.float64 else inputs.float()
        local = wide.new_tensor([wide.numel() / wide.shape[1]])
        total = ranks().sum(torch.cat([local, wide.sum(axes)]))
        count, mean = total[0], total[1:] / total[0]
        centred = wide - mean.view(shape)  # in two rounds: a mean of squares would lose what it is for
        variance = ranks().sum(centred.square().sum(axes)) / count
        scale = (variance + eps).rsqrt()
        unit = centred * scale.view(shape)
        ctx.save_for_backward(unit, scale, weight, count)
        ctx.axes, ctx.shape, ctx.dtype = axes, shape, inputs.dtype
        found = unit if weight is None else unit * weight.view(shape) + bias.view(shape)  # type: ignore[union-attr]
        ctx.mark_non_differentiable(mean, variance, count)
        return found.to(inputs.dtype), mean, variance, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, *unused: Any) -> Any:
        unit, scale, weight, count = ctx.saved_tensors
        gradient = gradient.to(unit.dtype)
        plain, along = gradient.sum(ctx.axes), (gradient * unit).sum(ctx.axes)
        mean, slope = (ranks().sum(torch.cat([plain, along])) / count).chunk(2)
        within = gradient - mean.view(ctx.shape) - unit * slope.view(ctx.shape)
        factor = scale if weight is None else scale * weight
        return (
            (within * factor.view(ctx.shape)).to(ctx.dtype),
            None if weight is None else along,
            None if weight is None else plain,
            None,
        )


def norms_of(network: nn.Module) -> list[_BatchNorm]:
    return [part for part in network.modules() if isinstance(part, _BatchNorm)]


@contextmanager
def norms_shared(network: nn.Module, wanted: bool) -> Iterator[None]:
    """Inside, and where ``wanted``, batch norm in train mode sees the images of all processes (on a CPU; on cards
    torch's own layers do, see :func:`with_shared_norms`).
    """
    with ExitStack() as undo:
        for norm in norms_of(network) if wanted and ranks().backend == "gloo" else ():
            norm.forward = _forward_of(norm)  # type: ignore[method-assign, assignment]
            undo.callback(norm.__dict__.pop, "forward")
        yield


def _forward_of(norm: _BatchNorm) -> Callable[[Tensor], Tensor]:
    alone = norm.forward

    def forward(inputs: Tensor) -> Tensor:
        if not norm.training:
            return alone(inputs)
        found: Tensor
        found, mean, variance, count = _Normalised.apply(inputs, norm.weight, norm.bias, norm.eps)
        if norm.running_mean is not None and norm.running_var is not None:
            with torch.no_grad():
                seen = norm.num_batches_tracked
                assert seen is not None  # wherever there are statistics, they are counted
                seen.add_(1)
                share = 1 / float(seen) if norm.momentum is None else norm.momentum
                unbiased = variance * (count / (count - 1).clamp(min=1))
                norm.running_mean.lerp_(mean.to(norm.running_mean), share)
                norm.running_var.lerp_(unbiased.to(norm.running_var), share)
        return found

    return forward


def with_shared_norms(network: Network, wanted: bool) -> None:
    """On cards: put torch's synchronised layers in place of the batch norms; weights and names stay."""
    if wanted and ranks().backend == "nccl":
        nn.SyncBatchNorm.convert_sync_batchnorm(network)


def statistics_joined(network: nn.Module, shared: bool) -> None:
    """The running statistics, each process's of its own images, become their mean, so that all hold one network."""
    if not shared:
        kept = [(norm.running_mean, norm.running_var) for norm in norms_of(network) if norm.training]
        ranks().average([part for pair in kept for part in pair if part is not None])


def features_of(network: Network, split: Split, part: slice) -> Tensor:
    """The features of the images at ``part`` of a split, each process passing its share of them; no gradient."""
    everybody, total = ranks(), part.stop - part.start
    if total < everybody.world:
        return network.features(split.float_images(part))
    rows = everybody.rows(total)
    own = slice(part.start + rows.start, part.start + rows.stop)
    return everybody.gathered(network.features(split.float_images(own)), everybody.sizes(total))
