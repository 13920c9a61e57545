"""Convolutions one behind the other, with the sums and ReLUs between them, as one call.

A residual network is little else. In one call nothing waits for Python, nor for another worker that is in it; and what
is made on the way back is nobody else's, so that it can be written over.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scl_defense_benchmarks.convolutions import FrozenConv2d, Plan, convolved, is_small, plain
from scl_defense_benchmarks.kernels import PLAIN, called, chain, chain_back

#: Kinds of maps whose plans are kept.
KINDS = 256


@dataclass(frozen=True)
class _Given:
    """What a pass is computed with, layer by layer: weights as they are, and laid out; see :mod:`.kernels`."""

    weights: list[Tensor]
    forms: list[Tensor]
    biases: list[Tensor | None]
    counts: list[int]
    plans: list[Plan]


class Chain:
    """layers: in the order they are computed in. reads, others: of each the place of what it takes and of what is added
    to it (-1 for nothing): 0 for the images of the chain, 1 for what the first layer makes, and so on. rectified:
    whether a ReLU follows. Nobody else reads what is made in between.
    """

    def __init__(
        self, layers: Sequence[FrozenConv2d], reads: list[int], others: list[int], rectified: list[bool]
    ) -> None:
        self.layers, self.reads, self.others, self.rectified = layers, reads, others, rectified
        last = {place: layer for layer, both in enumerate(zip(reads, others, strict=True)) for place in both}
        self.over = [[place for place, at in last.items() if at == layer and place > 0] for layer in range(len(layers))]
        #: The places between the first and the last whose values the way back needs.
        self.kept = [place for place in range(1, len(layers)) if rectified[place - 1] or place in reads]
        self._plans: dict[tuple[Any, ...], list[Plan] | None] = {}

    def __call__(self, maps: Tensor) -> Tensor | None:
        """What the last layer makes of ``maps`` (N, C, H, W); ``None`` where they have to be computed one by one."""
        if maps.dim() != 4 or len(maps) == 0 or not plain(maps):
            return None
        sloping = torch.is_grad_enabled() and maps.requires_grad
        given = self._given(maps, sloping)
        if given is None:
            return None
        maps = maps.to(given.weights[0].dtype)
        if sloping:
            made: Tensor = _Chained.apply(maps, self, given)
            return made
        return self.values([maps], given, keep=False)[-1]

    def rest(self, values: list[Tensor | None], *, keep: bool) -> list[Tensor] | None:
        """Without a gradient, all values from the first ones on; ``None`` where they have to be computed one by one.

        values: the first ones, in the chain's own precision: what later layers read, and maps like those that it begins
        with.
        """
        maps = values[0]
        given = None if maps is None or len(maps) == 0 else self._given(maps, False)
        if given is None:
            return None
        return self.values([torch.empty(0) if value is None else value for value in values], given, keep=keep)

    def read_from(self, layer: int) -> set[int]:
        """The places that this layer and those after it read."""
        return {place for place in (*self.reads[layer:], *self.others[layer:]) if place >= 0}

    def values(self, values: list[Tensor], given: _Given, *, keep: bool) -> list[Tensor]:
        """The maps and what each layer makes, by place; without ``keep`` only the last one is there.

        values: the first of them.
        """
        sizes = [plan.sizes for plan in given.plans]
        steps = (given.forms, given.biases, sizes, given.counts, self.rectified, self.over)
        found: list[Tensor] = called(chain, values, self.reads, self.others, *steps, keep)
        return found

    def slope(self, gradient: Tensor, values: list[Tensor], given: _Given) -> Tensor:
        """The gradient to ``maps`` from that of the last layer's output. values: see :meth:`values`."""
        forms, backs = [], []
        for layer, weight, count, plan in zip(self.layers, given.weights, given.counts, given.plans, strict=True):
            forms.append(layer.back_form(weight, plan) if count else weight)
            backs.append(plan.back if count else PLAIN)
        sizes = [plan.sizes for plan in given.plans]
        steps = (given.weights, forms, sizes, backs, self.rectified)
        over_own = not torch.is_grad_enabled()  # else somebody wants the gradient's gradient
        found: Tensor = called(chain_back, gradient, values, self.reads, self.others, *steps, over_own)
        return found

    def _given(self, maps: Tensor, sloping: bool) -> _Given | None:
        """The weights of the moment, if all are as the plans want them."""
        weights: list[tuple[Tensor, Tensor | None]] = []
        for layer in self.layers:
            weight, bias = layer.weights(maps)
            if not plain(maps, weight, bias) or weight.requires_grad or (bias is not None and bias.requires_grad):
                return None
            weights.append((weight, bias))
        shapes = (item for weight, _ in weights for item in (weight.shape, weight.dtype))
        kind = (maps.shape[1:], maps.dtype, torch.is_autocast_enabled("cpu"), *shapes)
        if kind not in self._plans:
            if len(self._plans) == KINDS:
                self._plans.clear()
            self._plans[kind] = self._planned(maps)
        plans = self._plans[kind]
        if plans is None:
            return None
        given = _Given([], [], [], [], plans)
        for layer, plan, (weight, bias) in zip(self.layers, plans, weights, strict=True):
            small = is_small(plan, len(maps), sloping)
            form, laid = (weight, bias) if small else layer.forward_form(weight, bias, plan)
            given.weights.append(weight)
            given.forms.append(form)
            given.biases.append(laid)
            given.counts.append(0 if small else plan.forward)
        return given

    @torch.no_grad()
    def _planned(self, maps: Tensor) -> list[Plan] | None:
        """The plan of every layer for maps of this kind, found by passing them once; ``None`` where one of them is not
        computed in one go.
        """
        values, plans, dtype = [maps], list[Plan](), self.layers[0].weights(maps)[0].dtype
        for layer, read, other, rectified in zip(self.layers, self.reads, self.others, self.rectified, strict=True):
            weight, _ = layer.weights(values[read])
            plan = layer.plan(values[read], weight)
            if not plan.served or plan.heavy or weight.dtype != dtype:
                return None
            added = values[other] if other >= 0 else None
            made = convolved(layer, values[read], added, rectified=rectified)
            alike = added is None or added.shape == made.shape == (len(maps), *plan.shape)
            if not alike or made.dtype != dtype:  # a sum where one was repeated, or is more exact
                return None
            values.append(made)
            plans.append(plan)
        return plans


class _Chained(torch.autograd.Function):
    """A chain with a gradient to its maps."""

    @staticmethod
    def forward(context: Any, maps: Tensor, own: Chain, given: _Given) -> Tensor:
        *inner, made = own.values([maps], given, keep=True)
        if made._is_view():  # a network may write over it, which autograd forbids for a view made in here
            made = made.new_empty(0).set_(made.untyped_storage(), made.storage_offset(), made.shape, made.stride())
        # Saved, not kept: torch says if they were written over meanwhile, and lets them go with the graph. What no ReLU
        # has made is only read for its size, and mostly not read at all.
        masks = [inner[place] for place in own.kept]
        context.own, context.given, context.shape = own, given, maps.shape
        context.save_for_backward(*given.weights, *masks, *([made] if own.rectified[-1] else []))
        return made

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        own, given = context.own, context.given
        saved = list(context.saved_tensors)[len(given.weights) :]
        made = saved.pop() if own.rectified[-1] else gradient
        values = [torch.empty(0) for _ in own.layers]
        for place, value in zip(own.kept, saved, strict=True):
            values[place] = value
        # Of what was read its size alone is needed: a network may have written over it.
        values[0] = gradient.new_empty(context.shape).contiguous(memory_format=torch.channels_last)
        return own.slope(gradient, [*values, made], given), None, None
