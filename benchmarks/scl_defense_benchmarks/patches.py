"""Passes over images that differ from known ones in one window: only what the window reaches is computed anew.

A search by squares (Square Attack) asks thousands of times about a batch that is the last one but for a few pixels. A
convolution carries a window on by half its kernel: of the first layers of a ResNet, which cost most, a few pixels of a
map are left to compute; where a window reaches most of a map, the rest of the network is passed as ever. A window of
two pixels costs 0.61 of a pass of the small CNN, 0.75 of a ResNet-18's at width 8 and 0.79 at width 64.
"""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from scl_defense_benchmarks import convolutions
from scl_defense_benchmarks.kernels import called, seen, windowed
from scl_defense_benchmarks.program import Program, Step, Stretch, run

#: A window on more of a map than this is not worth cutting out. 0.4, 0.55 and 0.7 cost the same to a few per cent.
MOST = 0.55
#: Bytes of maps that may be remembered. A ResNet-18 remembers 1.8 MiB an image of 32 x 32 at width 64, 0.25 at width 8.
LIMIT = 1 << 29
#: Operations that give each pixel from that pixel alone.
_POINTWISE: set[Any] = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, torch.add, torch.sub, torch.mul,
    torch.div, torch.relu, F.relu, F.leaky_relu, F.elu, F.silu, F.gelu, torch.sigmoid, torch.tanh,
}  # fmt: skip
_POINTWISE_MODULES = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.BatchNorm2d)
#: (first row, first column, rows, columns) of a map.
Window = tuple[int, int, int, int]
_Part = tuple[Window, Tensor]  # a window and what is in it, (N, C, rows, columns)


class Patches:
    """A program that remembers a batch. Without gradients, in float32, on a CPU.

    Called with images (N, C, H, W) it gives their output, as the program does: it looks itself where they differ from
    those it knows. After a call :meth:`settle` says which of its images are known from there on. expected: who knows
    where the next images will differ, and nowhere else, may say so before.
    """

    def __init__(self, program: Program):
        self.program = program
        self.known: dict[fx.Node, Tensor] = {}
        self._asked: dict[fx.Node, _Part] = {}
        self.expected: Window | None = None
        self._off = program.writes

    def __call__(self, images: Tensor) -> Any:
        if self._off:
            return self.program(images)
        window, self.expected = self.expected, None
        before = self.known.get(self.program.images)
        if before is None or before.shape != images.shape:
            self.known, self._asked = {}, {}
            return self._whole(images)
        return self._part(images, window or _difference(images, before))

    def settle(self, taken: Tensor, staying: Tensor) -> None:
        """Of the last call's images, (N,) each: ``taken`` are known from now on, ``staying`` will be asked about again
        and in this order, the others are forgotten.
        """
        rows = taken.nonzero().squeeze(1)
        if len(rows):
            for node, ((top, left, height, width), made) in self._asked.items():
                self.known[node][rows, :, top : top + height, left : left + width] = made[rows]
        self._asked = {}
        if not bool(staying.all()):
            left = staying.nonzero().squeeze(1)
            for node, value in self.known.items():
                dense = torch.contiguous_format if node is self.program.images else torch.channels_last
                self.known[node] = value[left].contiguous(memory_format=dense)

    def _whole(self, images: Tensor) -> Any:
        """Pass it all and remember what a window of one pixel would not reach most of."""
        reached: dict[fx.Node, tuple[int, int]] = {self.program.images: (1, 1)}
        depending = {self.program.images}
        values: dict[fx.Node, Any] = {self.program.images: images}
        self.known = {self.program.images: images.clone(memory_format=torch.contiguous_format)}
        for step in self.program.steps:
            made = values[step.node] = run(step, values)
            if any(node in depending for node in step.node.all_input_nodes):
                depending.add(step.node)
            size = None if self._off else _reach(step, values, reached, depending, made)
            if size is not None and size[0] * size[1] <= MOST * made.shape[2] * made.shape[3]:
                reached[step.node] = size
                self.known[step.node] = made
                if sum(value.numel() * value.element_size() for value in self.known.values()) > LIMIT:
                    self._off, self.known = True, {}
            for node in step.over:
                del values[node]
        return fx.node.map_arg(self.program.output, values.__getitem__)

    def _part(self, images: Tensor, window: Window) -> Any:
        """Pass what the window reaches; what is asked of the rest is remembered."""
        values: dict[fx.Node, Any] = {self.program.images: images}
        parts: dict[fx.Node, _Part] = {self.program.images: (window, _cut(images, window))}
        for part in self.program.parts:
            if isinstance(part, Stretch):
                self._stretch(part, parts, values)
            else:
                self._take(part, parts, values)
        self._asked = {node: part for node, part in parts.items() if node in self.known}
        return fx.node.map_arg(self.program.output, values.__getitem__)

    def _take(self, step: Step, parts: dict[fx.Node, _Part], values: dict[fx.Node, Any]) -> None:
        """A step, on windows alone where that is worth it."""
        part = self._step(step, parts, values)
        if part is not None:
            parts[step.node] = part
            return
        for node in step.node.all_input_nodes:
            if node not in values:
                values[node] = self._patched(node, *parts[node])
        made = values[step.node] = run(step, values)
        if step.node in self.known:
            parts[step.node] = (0, 0, *made.shape[2:]), made
        for node in step.over:
            values.pop(node, None)

    def _stretch(self, stretch: Stretch, parts: dict[fx.Node, _Part], values: dict[fx.Node, Any]) -> None:
        """Convolutions one behind the other: the first ones on windows, the others in one call."""
        steps, done = stretch.steps, 0
        while done < len(steps) and (part := self._step(steps[done], parts, values)) is not None:
            parts[steps[done].node] = part
            done += 1
        if done == len(steps):
            return
        whole: list[Tensor | None] = [None] * (done + 1)
        whole[0] = self.known.get(stretch.images)  # for its kind, where it is read no more
        for place in (place for place in stretch.chain.read_from(done) if place <= done):
            node = stretch.node(place)
            whole[place] = values[node] if node in values else self._patched(node, *parts[node])
        keep = any(step.node in self.known for step in steps[done:])
        found = stretch.chain.rest(whole, keep=keep)
        if found is None:
            for step in steps[done:]:
                self._take(step, parts, values)
            return
        values[steps[-1].node] = found[-1]
        for step, made in zip(steps[done:], found[done + 1 :], strict=True):
            if step.node in self.known:
                parts[step.node] = (0, 0, *made.shape[2:]), made
        for node in stretch.over:
            values.pop(node, None)

    def _step(self, step: Step, parts: dict[fx.Node, _Part], values: dict[fx.Node, Any]) -> _Part | None:
        """A step on windows alone; ``None`` where it has to be taken on whole maps. values: those that are whole."""
        if step.node not in self.known:
            return None
        read = [node for node in step.node.all_input_nodes if node in self.known]
        shape = self.known[step.node].shape
        windows = [parts[node][0] for node in read]
        if step.layer is not None:
            windows[0] = _reached(step.layer, parts[_maps(step)][0], shape)
        window = _around(windows)
        if window[2] * window[3] > MOST * shape[2] * shape[3]:
            return None
        if step.layer is None:
            return window, run(step, values | {node: self._seen(node, parts[node], window) for node in read})
        return window, self._convolved(step, parts, window)

    def _convolved(self, step: Step, parts: dict[fx.Node, _Part], window: Window) -> Tensor:
        layer, maps, other = step.layer, _maps(step), step.named.get("other")
        assert layer is not None
        at, part = parts[maps]
        at_other, part_other = (at, None) if other is None else parts[other]
        sizes = (list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups)
        made: Tensor = called(
            windowed, self.known[maps], list(at), part, None if other is None else self.known[other], list(at_other),
            part_other, list(window), layer.weight, layer.bias, sizes, step.named.get("rectified", False),
            convolutions.BUSY,
        )  # fmt: skip
        return made

    def _patched(self, node: fx.Node, window: Window, made: Tensor) -> Tensor:
        """The whole map of a node, with its window in it."""
        top, left, height, width = window
        if (height, width) == self.known[node].shape[2:]:
            return made
        whole = self.known[node].clone()
        whole[:, :, top : top + height, left : left + width] = made
        return whole

    def _seen(self, node: fx.Node, part: _Part, window: Window) -> Tensor:
        """A node's map in another window."""
        made: Tensor = called(seen, self.known[node], list(part[0]), part[1], list(window))
        return made


def _cut(maps: Tensor, window: Window) -> Tensor:
    top, left, height, width = window
    return maps[:, :, top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)


def _difference(images: Tensor, known: Tensor) -> Window:
    """The smallest window outside of which they are equal; one pixel where they are equal everywhere."""
    differs = (images != known).any(0).any(0)
    rows, columns = differs.any(1).nonzero().flatten().tolist(), differs.any(0).nonzero().flatten().tolist()
    if not rows:
        return 0, 0, 1, 1
    return rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1


def _grown(layer: Any, size: tuple[int, int]) -> tuple[int, int]:
    """How many outputs at most read a window of this size."""
    (down, right), (tall, wide) = layer.stride, layer.kernel_size
    return (size[0] + tall - 2) // down + 1, (size[1] + wide - 2) // right + 1


def _reached(layer: Any, window: Window, shape: torch.Size) -> Window:
    """The outputs that read a window. Its size depends on the window's alone, not on where it lies: a convolution of a
    new size is prepared anew, which costs more than to compute it.
    """
    height, width = _grown(layer, window[2:])
    top, left = (
        -((kernel - 1 - start - around) // step)
        for kernel, start, around, step in zip(layer.kernel_size, window[:2], layer.padding, layer.stride, strict=True)
    )
    height, width = min(height, shape[2]), min(width, shape[3])
    return min(max(top, 0), shape[2] - height), min(max(left, 0), shape[3] - width), height, width


def _around(windows: list[Window]) -> Window:
    """The smallest window around all of them."""
    top, left = min(window[0] for window in windows), min(window[1] for window in windows)
    end = max(window[0] + window[2] for window in windows)
    right = max(window[1] + window[3] for window in windows)
    return top, left, end - top, right - left


def _reach(
    step: Step, values: dict[fx.Node, Any], reached: dict[fx.Node, tuple[int, int]], depending: set[fx.Node], made: Any
) -> tuple[int, int] | None:
    """How much of its map one pixel of the images reaches, for a step that can be taken on a window; else ``None``.

    depending: what depends on the images. A number a channel that does, as a mean over a map, is no constant.
    """
    if not isinstance(made, Tensor) or made.dim() != 4 or made.dtype != torch.float32:
        return None
    read = step.node.all_input_nodes
    local = [node for node in read if node in reached]
    if not local:
        return None
    sizes = [reached[node] for node in local]
    if step.layer is not None:
        layer, maps = step.layer, _maps(step)
        if len(local) < len(read) or maps not in reached or layer.dilation != (1, 1):
            return None
        if not layer.plan(values[maps], layer.weight).served or layer.weight.requires_grad:
            return None
        sizes[local.index(maps)] = _grown(layer, reached[maps])
    else:
        listed = step.call in _POINTWISE if not isinstance(step.call, nn.Module) else False
        if not listed and type(step.call) not in _POINTWISE_MODULES:
            return None
        for node in read:
            value = values[node]
            flat = isinstance(value, Tensor) and (value.dim() == 0 or set(value.shape[-2:]) == {1})
            same = node in reached and value.shape[2:] == made.shape[2:]
            if not same and (node in depending or not flat):
                return None
    return max(size[0] for size in sizes), max(size[1] for size in sizes)


def _maps(step: Step) -> fx.Node:
    """What a convolution reads."""
    node: fx.Node = step.arguments[1]
    return node
