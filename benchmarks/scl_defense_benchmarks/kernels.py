"""Frozen convolutions as torch computes them: functions of tensors and numbers alone, compiled by TorchScript.

Compiled, they run without Python's lock: workers are threads, and each operation called from Python has to wait for
the lock when the other worker holds it. Where TorchScript cannot be had they are the same functions, uncompiled.
"""

import warnings
from collections.abc import Callable
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from scl_defense_benchmarks.layouts import gathered, interleaved, spread

Sizes = tuple[list[int], list[int], list[int], int]  # padding, stride, dilation, groups
#: Roads of a gradient back to a convolution's inputs, see :func:`slope`, where they stand as numbers (TorchScript reads
#: no constants): one matrix product; pixels one by one, with others between them; four planes; torch's own. A larger
#: number is how many neighbours are computed at once.
PRODUCT, PIXELS, PLANES, PLAIN = -1, -2, 0, 1
_LOCK, _COMPILED = Lock(), dict[Callable[..., Any], Callable[..., Any]]()


def called(function: Callable[..., Any], *given: Any) -> Any:
    """What ``function``, compiled, makes of ``given``: tensors in the precision they are to be computed in.

    Not under autocast: TorchScript has a way of its own with it, in which a bfloat16 residual network fails.
    """
    made = _COMPILED.get(function) or _compiled(function)
    try:
        if not torch.is_autocast_enabled("cpu"):
            return made(*given)
        with torch.autocast("cpu", enabled=False):
            return made(*given)
    except RuntimeError as error:
        fault = str(error).rpartition("RuntimeError: ")[2].strip()
    # Only what happened, without TorchScript's account of where; raised out here, it holds nobody's tensors.
    raise RuntimeError(fault)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    with _LOCK, warnings.catch_warnings():  # TorchScript is deprecated: there is no other road past the lock yet
        warnings.simplefilter("ignore")
        if function not in _COMPILED:
            try:
                _COMPILED[function] = torch.jit.script(function)
            except Exception:  # another release's, or none
                _COMPILED[function] = function
    return _COMPILED[function]


def in_one_go(
    maps: Tensor,
    other: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    sizes: Sizes,
    count: int,
    rectified: bool,
) -> Tensor:
    """A convolution, ``+ other``, ReLU, by the call that torch's own compiler makes; ``count`` neighbours of a row at
    once, by weights made for that (:func:`scl_defense_benchmarks.layouts.widened`).
    """
    around, stride, dilation, groups = sizes
    maps = maps.contiguous(memory_format=torch.channels_last)
    if count > 1:
        stride = [stride[0], stride[1] * count]
    if other is None:
        last = "relu" if rectified else "none"
        made = torch.ops.mkldnn._convolution_pointwise(
            maps, weight, bias, around, stride, dilation, groups, last, [], ""
        )
    else:
        added = other.contiguous(memory_format=torch.channels_last)
        if count > 1:
            added = gathered(added, count)
        made = torch.ops.mkldnn._convolution_pointwise(
            maps, added, weight, bias, around, stride, dilation, groups, "add", None,
            "relu" if rectified else None, [], "",
        )  # fmt: skip
    return spread(made, count) if count > 1 else made


def slope(back: int, gradient: Tensor, maps: Tensor, weight: Tensor, form: Tensor, sizes: Sizes) -> Tensor:
    """A convolution's gradient to its inputs, by the road that ``back`` names; it has a gradient itself.

    maps: what was read, for its shape alone; weight: the convolution's; form: what that road makes of it.
    """
    around, stride, dilation, groups = sizes
    if back == -1:
        return as_product(gradient, weight)
    if back == -2:
        found = torch.zeros_like(maps, dtype=gradient.dtype, memory_format=torch.channels_last)
        found[:, :, :: stride[0], :: stride[1]] = torch.conv2d(gradient, form)
        return found
    if back == 0:
        planes = torch.conv2d(gradient, form, None, [1, 1], [1, 1])[:, :, 1:, 1:]
        return interleaved(planes, maps.shape[2], maps.shape[3])
    if back > 1:
        return spread(torch.conv2d(gradient, form, None, [1, back], around), back)
    return torch.ops.aten.convolution_backward(
        gradient, maps, weight, None, stride, around, dilation, False, [0, 0], groups, [True, False, False]
    )[0]


def as_product(gradient: Tensor, weight: Tensor) -> Tensor:
    """An output's gradient goes, times a weight, to the input that the weight has met: plane by plane, shifted."""
    outputs, inputs, tall, wide = weight.shape
    count, height, width = gradient.shape[0], gradient.shape[2], gradient.shape[3]
    by_place = weight.permute(2, 3, 1, 0).reshape(-1, outputs) @ gradient.permute(0, 2, 3, 1).reshape(-1, outputs).t()
    planes = by_place.view(tall * wide, inputs, count, height, width)
    found = torch.zeros(
        [inputs, count, height + tall - 1, width + wide - 1], dtype=gradient.dtype, device=gradient.device
    )
    for place in range(tall * wide):
        top, left = place // wide, place % wide
        found[:, :, top : top + height, left : left + width] += planes[place]
    top, left = tall // 2, wide // 2
    return found[:, :, top : top + height, left : left + width].transpose(0, 1)


def chain(
    values: list[Tensor],
    reads: list[int],
    others: list[int],
    weights: list[Tensor],
    biases: list[Tensor | None],
    sizes: list[Sizes],
    counts: list[int],
    rectified: list[bool],
    over: list[list[int]],
    keep: bool,
) -> list[Tensor]:
    """Convolutions one behind the other: the maps they begin with and what each of them makes, (N, C, H, W).

    values: those maps and what the first ones have made already; what nobody reads may be anything. Of each layer:
    reads, others: which of these it takes and adds (-1 for nothing); counts: see :func:`in_one_go`, 0 for a plain
    convolution with the sum and ReLU behind it; over: which nobody reads any more, let go unless ``keep``.
    """
    for place in range(len(values) - 1, len(weights)):
        other = others[place]
        read, added = values[reads[place]], values[other] if other >= 0 else None
        weight, bias, size, count = weights[place], biases[place], sizes[place], counts[place]
        if count == 0:
            made = torch.conv2d(read, weight, bias, size[1], size[0], size[2], size[3])
        else:
            # In bfloat16 a sum in one go would be rounded once instead of twice.
            at_once = added is not None and weight.dtype == torch.float32
            last = rectified[place] and (at_once or added is None)
            made = in_one_go(read, added if at_once else None, weight, bias, size, count, last)
            if at_once:
                added = None
        if added is not None:
            made = made + added
        if rectified[place] and (count == 0 or added is not None):
            made = torch.relu(made)
        values.append(made)
        if not keep:
            for gone in over[place]:
                values[gone] = torch.empty(0)
    return values


def windowed(
    known: Tensor,
    where: list[int],
    part: Tensor,
    known_other: Tensor | None,
    where_other: list[int],
    part_other: Tensor | None,
    window: list[int],
    weight: Tensor,
    bias: Tensor | None,
    sizes: Sizes,
    rectified: bool,
    busy: int,
) -> Tensor:
    """A window of what a convolution, with a sum and a ReLU behind it, makes of known maps with a part put in.

    Windows are [first row, first column, rows, columns]. known: (N, C, H, W); part: (N, C, rows, columns) what is in
    its window ``where``; the same of what is added. busy: numbers from which on the one go is worth calling.
    """
    around, stride = sizes[0], sizes[1]
    rows, columns = (window[2] - 1) * stride[0] + weight.shape[2], (window[3] - 1) * stride[1] + weight.shape[3]
    reach = [window[0] * stride[0] - around[0], window[1] * stride[1] - around[1], rows, columns]
    maps = seen(known, where, part, reach)
    added = part_other
    if known_other is not None and part_other is not None:
        added = seen(known_other, where_other, part_other, window)
    if maps.numel() >= busy:
        return in_one_go(maps, added, weight, bias, ([0, 0], stride, sizes[2], sizes[3]), 1, rectified)
    made = torch.conv2d(maps, weight, bias, stride, [0, 0], sizes[2], sizes[3])
    if added is not None:
        made = made + added
    return torch.relu(made) if rectified else made


def seen(known: Tensor, where: list[int], part: Tensor, window: list[int]) -> Tensor:
    """Known maps with a part put in, as :func:`windowed` has them, in another window, which may reach over their edges:
    there it is zero.
    """
    if where == window:
        return part
    height, width, rows, columns = known.shape[2], known.shape[3], window[2], window[3]
    found = torch.empty(
        [known.shape[0], known.shape[1], rows, columns], dtype=known.dtype, memory_format=torch.channels_last
    )
    if window[0] < 0 or window[1] < 0 or window[0] + rows > height or window[1] + columns > width:
        found.zero_()
    paste(found, window, known, [0, 0, height, width])
    paste(found, window, part, where)
    return found


def paste(target: Tensor, window: list[int], source: Tensor, where: list[int]) -> None:
    """Copy what two windows of a map have in common."""
    top, left = max(window[0], where[0]), max(window[1], where[1])
    end, right = min(window[0] + window[2], where[0] + where[2]), min(window[1] + window[3], where[1] + where[3])
    if end > top and right > left:
        to = target[:, :, top - window[0] : end - window[0], left - window[1] : right - window[1]]
        to.copy_(source[:, :, top - where[0] : end - where[0], left - where[1] : right - where[1]])


def chain_back(
    gradient: Tensor,
    values: list[Tensor],
    reads: list[int],
    others: list[int],
    weights: list[Tensor],
    forms: list[Tensor],
    sizes: list[Sizes],
    backs: list[int],
    rectified: list[bool],
    over_own: bool,
) -> Tensor:
    """The gradient of :func:`chain`'s last output, taken back to its ``maps``.

    values: what it returned; where no ReLU made it for its shape alone, and what nobody reads may be anything. forms,
    backs: see :func:`slope`. over_own: what is made in between may be written over, for nobody wants its gradient.
    """
    slopes = [torch.empty(0) for _ in values]
    there = [False for _ in values]
    slopes[-1], there[-1] = gradient, True
    for back in range(len(weights)):
        place = len(weights) - 1 - back
        if not there[place + 1]:
            continue
        own = slopes[place + 1].contiguous(memory_format=torch.channels_last)
        slopes[place + 1] = torch.empty(0)
        if rectified[place]:
            if over_own and back > 0:
                torch.ops.aten.threshold_backward(own, values[place + 1], 0, grad_input=own)
            else:
                own = torch.ops.aten.threshold_backward(own, values[place + 1], 0)
        elif back == 0 and over_own:
            own = own.clone()  # what came in may be another's gradient too
        read, other = reads[place], others[place]
        made = slope(backs[place], own, values[read], weights[place], forms[place], sizes[place])
        if other >= 0:
            slopes[other] = _sum(slopes[other], own, there[other], over_own)
            there[other] = True
        slopes[read] = _sum(slopes[read], made, there[read], over_own)
        there[read] = True
    return slopes[0]


def _sum(before: Tensor, new: Tensor, there: bool, over: bool) -> Tensor:
    if not there:
        return new
    return before.add_(new) if over else before + new
