"""A twin's convolutions, whose weights nobody trains: torch's sums up to their order, and less to pay on a CPU."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scl_defense_benchmarks.kernels import PIXELS, PLAIN, PLANES, PRODUCT, Sizes, called, in_one_go, slope
from scl_defense_benchmarks.layouts import abreast, by_parity, turned, widened

#: Weights from this number on outgrow a core's cache; torch reads them anew for every map of at most so many pixels.
#: Measured with 512 x 512 x 3 x 3 on maps of 4 x 4 (the last layers of a ResNet-18 on 32 x 32 images, three quarters of
#: its weights), forward and back: side by side they take 0.45 to 0.65 of the time in bfloat16, 0.71 to 0.92 in float32;
#: 256 x 256 gains a tenth in float32 and nothing that can be told from noise in bfloat16.
HEAVY, SMALL = 1_000_000, 16
#: Outputs per input of a convolution from which on its gradient to the inputs is cheaper as a matrix product, if not
#: more than SPREAD times as many numbers come of it as go in. Measured from 1 to 16 and from 3 to 64 channels, 3 x 3.
SPREADING, SPREAD = 16, 2
#: Up to so many inputs a convolution of stride 2 goes back cheaper as one of stride 1 to four planes: 0.5 to 0.7 of the
#: time in bfloat16 with 8 and 16 inputs, 0.7 in float32 with 8; with 32 and more it gains little or costs more.
BY_PLANES = {torch.bfloat16: 16, torch.float32: 8}
#: Calling torch's one go costs 25 to 40 us more than calling a convolution: it is worth it from so many outputs on.
BUSY = 1 << 16
_LAST = torch.channels_last
_Rounded = tuple[Tensor, Tensor | None, Tensor, Tensor | None]


class FrozenConv2d(nn.Conv2d):
    """A convolution like any other, of a network that is only attacked. Made by :func:`freeze_convolutions`.

    - Small maps under heavy weights are laid side by side into one wide map, with columns of zeros between them.
    - Few outputs, forward, or few inputs, on the way back, are computed for neighbours at once: see
      :mod:`scl_defense_benchmarks.layouts`.
    - From few inputs to many outputs (a first layer), the gradient to the inputs is one matrix product, float32 only.
    - Its weights are rounded to bfloat16 once (:meth:`round_once`), where autocast rounds them in every pass.
    - A sum and a ReLU behind it are taken in the same go (:func:`convolved`).

    All of it with the weights that it was frozen with: of others, put in their place for a pass, nothing is assumed.
    What is written into them through ``.data`` is not seen by what was laid out or rounded before.
    """

    _scl_rounded: _Rounded | None = None
    _scl_forms: dict[tuple[str, int, torch.dtype], tuple[Tensor, int, Tensor]]
    _scl_plans: "dict[tuple[Any, ...], Plan]"

    def round_once(self) -> None:
        """Keep float32 weights in bfloat16 too, for passes under autocast."""
        if self.weight.dtype is torch.float32:
            bias = None if self.bias is None else self.bias.detach().to(torch.bfloat16)
            self._scl_rounded = self.weight, self.bias, self.weight.detach().to(torch.bfloat16), bias

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K, H', W'), as :class:`torch.nn.Conv2d`."""
        return convolved(self, input)

    def weights(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        """Those of this pass: the rounded ones where autocast would round the ones that they were made of."""
        if self._scl_rounded is not None and _lowered(input):
            weight, bias, rounded, rounded_bias = self._scl_rounded
            if weight is self.weight and bias is self.bias and rounded.device == input.device:
                return rounded, rounded_bias
        return self.weight, self.bias

    def form(self, kind: str, values: Tensor, make: Callable[[Tensor], Tensor], count: int = 1) -> Tensor:
        """``make(values)`` of its weight or bias, made once for as long as they are what they were."""
        version = 0 if values.is_inference() else values._version
        name = kind, count, values.dtype
        kept = self._scl_forms.get(name)
        if kept is None or kept[0] is not values or kept[1] != version:
            kept = self._scl_forms[name] = values, version, make(values.detach())
        return kept[2]

    def forward_form(self, weight: Tensor, bias: Tensor | None, plan: "Plan") -> tuple[Tensor, Tensor | None]:
        """Weight and bias for so many neighbours at once as the plan says."""
        count = plan.forward
        if count == 1:
            return weight, bias
        laid = bias if bias is None else self.form("bias", bias, lambda bias: bias.repeat(count), count)
        return self.form("weight", weight, lambda weight: widened(weight, count), count), laid

    def back_form(self, weight: Tensor, plan: "Plan") -> Tensor:
        """What the plan's road back takes of the weight."""
        if plan.back == PIXELS:
            return self.form("back", weight, turned)
        if plan.back == PLANES:
            return self.form("planes", weight, by_parity)
        if plan.back > 1:
            return self.form("back", weight, lambda weight: widened(turned(weight), plan.back), plan.back)
        return weight

    def plan(self, maps: Tensor, weight: Tensor) -> "Plan":
        """What is to be done with maps of this kind, found out once; weights of another shape are another kind."""
        kind = (*maps.shape[1:], maps.dtype, weight.dtype, weight.shape, torch.is_autocast_enabled("cpu"))
        plan = self._scl_plans.get(kind)
        if plan is None:
            plan = Plan.of(self, maps, weight)
            if len(maps) == 0:
                return replace(plan, forward=1, back=1)
            if plan.served and (plan.forward, plan.back) != (1, 1):
                plan = self._tried(plan, maps, weight)
            self._scl_plans[kind] = plan
        return plan

    def _tried(self, plan: "Plan", maps: Tensor, weight: Tensor) -> "Plan":
        """The plan, less what gives other numbers than a plain convolution in float32 on maps of this kind.

        It does happen: with AMX, oneDNN 3.13 computes some bfloat16 convolutions with a stride along the row wrongly
        (16 inputs under 1 x 4 weights, 8 under 5 x 8).
        """
        rng = torch.Generator().manual_seed(0)  # of its own: whoever asks is in the middle of somebody's draws
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            points = torch.randn(maps.shape, generator=rng).to(weight.dtype)
            exact = F.conv2d(points.float(), weight.float(), None, *_sizes(plan))
            gradient = torch.randn(exact.shape, generator=rng).to(weight.dtype).contiguous(memory_format=_LAST)
            kept = weight.detach()
            back = _slope(self, points.float(), gradient.float(), kept.float(), replace(plan, back=PLAIN))
            rough = 0.02 if weight.dtype == torch.bfloat16 else 1e-4
            if not _close(computed(self, points, None, kept, None, rectified=False, plan=plan), exact, rough):
                plan = replace(plan, forward=1)
            if not _close(_slope(self, points, gradient, kept, plan), back, rough):
                plan = replace(plan, back=1)
        self._scl_forms.clear()
        return plan

    def _side_by_side(self, maps: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        count, channels, height, width = maps.shape
        apart = width + weight.shape[3] // 2
        rows = F.pad(maps.permute(2, 0, 3, 1), (0, 0, 0, apart - width)).reshape(1, height, count * apart, channels)
        made = self._conv_forward(rows.permute(0, 3, 1, 2), weight, bias).permute(0, 2, 3, 1)
        made = made.reshape(height, count, apart, len(weight))[:, :, :width]
        return made.permute(1, 3, 0, 2).contiguous(memory_format=_LAST)


@dataclass(frozen=True)
class Plan:
    """What is done with a kind of maps.

    heavy: they are laid side by side. served: torch's one call for a convolution with what follows it takes them.
    forward, back: how many neighbours are computed at once; back is 0 for four planes, -1 for a matrix product, -2
    where pixels are read one by one, with others between them. sizes: padding, stride, dilation, groups. shape: of an
    image's output.
    """

    heavy: bool
    served: bool
    forward: int
    back: int
    sizes: Sizes
    shape: tuple[int, int, int]

    @property
    def outputs(self) -> int:
        channels, rows, columns = self.shape
        return channels * rows * columns

    @classmethod
    def of(cls, layer: FrozenConv2d, maps: Tensor, weight: Tensor) -> "Plan":
        (outputs, inputs), sides, (height, width) = weight.shape[:2], tuple(weight.shape[2:]), maps.shape[2:]
        zeros = layer.padding_mode == "zeros" and isinstance(layer.padding, tuple)
        if not zeros:
            return cls(False, False, 1, 1, ([], [], [], 1), (0, 0, 0))
        dense = layer.dilation == (1, 1) and layer.groups == 1
        same = dense and layer.stride == (1, 1) and all(side % 2 for side in sides)
        same = same and layer.padding == tuple(side // 2 for side in sides)
        half = dense and layer.stride == (2, 2) and layer.padding == (1, 1) and sides == (3, 3)
        heavy = same and weight.numel() >= HEAVY and sides[0] * sides[1] > 1 and height * width <= SMALL
        back = abreast(inputs, width) if same else 1
        if same and weight.dtype == torch.float32 and _spreads(weight):
            back = PRODUCT
        if dense and sides == (1, 1) and layer.padding == (0, 0) and layer.stride != (1, 1):
            back = PIXELS
        if half and inputs <= BY_PLANES.get(weight.dtype, 0):
            back = PLANES
        sizes = (list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups)
        rows, columns = (
            (size + 2 * around - by * (side - 1) - 1) // step + 1
            for size, around, by, side, step in zip(
                (height, width), sizes[0], layer.dilation, sides, layer.stride, strict=True
            )
        )
        served = _takes(maps, weight) and _one_go_works()
        return cls(heavy, served, abreast(outputs, width) if same else 1, back, sizes, (outputs, rows, columns))


def convolved(layer: FrozenConv2d, maps: Tensor, other: Tensor | None = None, *, rectified: bool = False) -> Tensor:
    """``layer(maps)``, then ``+ other``, then ReLU: in one go where that gives the same numbers, else one by one.

    maps: (N, C, H, W); other: what is added, or ``None``. In bfloat16 a sum is taken by itself: in one go it would be
    rounded once instead of twice. The gradient goes to ``maps`` and ``other``, never to the weights. A NaN becomes 0 by
    the ReLU of the one go, where torch's leaves it.
    """
    weight, bias = layer.weights(maps)
    if maps.dim() != 4 or not plain(maps, weight, bias):
        return _finished(layer._conv_forward(maps, weight, bias), other, rectified)
    plan, count = layer.plan(maps, weight), maps.shape[0]
    if plan.heavy and count > 1:
        return _finished(layer._side_by_side(maps, weight, bias), other, rectified)
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if trained or not plan.served or is_small(plan, count, maps.requires_grad):
        return _finished(layer._conv_forward(maps, weight, bias), other, rectified)
    if maps.dtype != weight.dtype:
        maps = maps.to(weight.dtype)
    alike = other is None or (weight.dtype == other.dtype == torch.float32 and other.shape == (count, *plan.shape))
    if other is not None and not (alike and plain(other)):
        return _finished(convolved(layer, maps), other, rectified)
    if torch.is_grad_enabled() and (maps.requires_grad or (other is not None and other.requires_grad)):
        made: Tensor = _Convolved.apply(maps, other, layer, weight, bias, rectified)
        return made
    return computed(layer, maps, other, weight, bias, rectified=rectified)


def is_small(plan: Plan, count: int, sloping: bool) -> bool:
    """Whether calling torch's one go for so many maps costs more than it gains. sloping: they have a gradient."""
    return plan.outputs * count < BUSY and (plan.back == PLAIN or not sloping)


def computed(
    layer: FrozenConv2d,
    maps: Tensor,
    other: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    rectified: bool,
    plan: Plan | None = None,
) -> Tensor:
    """The same without a gradient, for maps that are served."""
    plan = plan or layer.plan(maps, weight)
    weight, bias = layer.forward_form(weight, bias, plan)
    made: Tensor = called(in_one_go, maps, other, weight, bias, plan.sizes, plan.forward, rectified)
    return made


class _Convolved(torch.autograd.Function):
    """:func:`computed` with a gradient to its maps and to what is added."""

    @staticmethod
    def forward(
        context: Any,
        maps: Tensor,
        other: Tensor | None,
        layer: FrozenConv2d,
        weight: Tensor,
        bias: Tensor | None,
        rectified: bool,
    ) -> Tensor:
        made = computed(layer, maps, other, weight, bias, rectified=rectified)
        if made._is_view():  # a network may write over it, which autograd forbids for a view made in here
            made = made.new_empty(0).set_(made.untyped_storage(), made.storage_offset(), made.shape, made.stride())
        context.layer, context.shape, context.plan = layer, maps.shape, layer.plan(maps, weight)
        context.save_for_backward(weight, *([made] if rectified else []))
        return made

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        weight, *made = context.saved_tensors
        gradient = gradient.contiguous(memory_format=_LAST)
        if made:
            gradient = torch.ops.aten.threshold_backward(gradient, made[0], 0)
        to_maps, to_other = context.needs_input_grad[:2]
        # What was read is not needed, but torch asks for it to know its size: a network may have written over it.
        maps = torch.empty(context.shape, dtype=weight.dtype, memory_format=_LAST)
        found = _slope(context.layer, maps, gradient, weight, context.plan) if to_maps else None
        return found, gradient if to_other else None, None, None, None, None


def _slope(layer: FrozenConv2d, maps: Tensor, gradient: Tensor, weight: Tensor, plan: Plan) -> Tensor:
    """The gradient to a convolution's inputs, by the cheapest road; all of them have gradients themselves.

    plan: the forward pass's, which was tried: autocast is over when a gradient comes back.
    """
    form = layer.back_form(weight, plan)
    found: Tensor = called(slope, plan.back, gradient, maps, weight, form, plan.sizes)
    return found


def _sizes(plan: Plan) -> tuple[Any, ...]:
    """As ``F.conv2d`` takes them."""
    around, stride, dilation, groups = plan.sizes
    return stride, around, dilation, groups


def _close(found: Tensor, exact: Tensor, rough: float) -> bool:
    return bool(((found.float() - exact).abs() <= rough * exact.abs().amax()).all())


def _finished(made: Tensor, other: Tensor | None, rectified: bool) -> Tensor:
    made = made if other is None else made + other
    return F.relu(made) if rectified else made


def _lowered(input: Tensor) -> bool:
    """Whether autocast takes it down to bfloat16; double and complex numbers it leaves alone."""
    device = input.device.type
    lower = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.bfloat16
    return lower and input.dtype in (torch.float32, torch.float16, torch.bfloat16)


def plain(maps: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> bool:
    """Whether these are torch's own tensors in a CPU's memory, under no transform."""
    own = type(maps) is Tensor and (weight is None or type(weight) in _OWN) and (bias is None or type(bias) in _OWN)
    here = maps.is_cpu and (weight is None or weight.is_cpu)
    return own and here and not torch._C._are_functorch_transforms_active()


def _takes(maps: Tensor, weight: Tensor) -> bool:
    """Whether the numbers are float32, or what autocast makes bfloat16 of."""
    if torch.is_autocast_enabled("cpu"):
        return _lowered(maps) and weight.dtype == torch.bfloat16
    return maps.dtype == weight.dtype == torch.float32


_OWN = (Tensor, nn.Parameter)


@cache
def _one_go_works() -> bool:
    """Whether this build of torch has the call that its own compiler makes, and it does what it is called for."""
    if not hasattr(torch.ops.mkldnn, "_convolution_pointwise") or not torch.backends.mkldnn.is_available():
        return False
    rng = torch.Generator().manual_seed(0)  # of its own: whoever asks is in the middle of somebody's draws
    maps, other, weight, bias = (
        torch.randn(shape, generator=rng) for shape in ((2, 2, 4, 5), (2, 3, 4, 5), (3, 2, 3, 3), (3,))
    )
    sizes = ([1, 1], [1, 1], [1, 1], 1)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for added in (None, other):
                expected = _finished(F.conv2d(maps, weight, bias, padding=1), added, True)
                made = in_one_go(maps, added, weight, bias, sizes, 1, True)
                if not torch.allclose(made, expected, rtol=1e-4, atol=1e-5):
                    return False
    except (RuntimeError, TypeError):  # another release's
        return False
    return True


def _spreads(weight: Tensor) -> bool:
    return len(weight) >= SPREADING * weight.shape[1] and weight[0].numel() <= SPREAD * len(weight)


def freeze_convolutions(network: nn.Module) -> None:
    """Make every plain convolution of ``network`` a :class:`FrozenConv2d`, in place; its weights stay the same ones.

    Left alone are subclasses, and what a hook of its own prepares (a weight that is computed before every pass).
    """
    for module in network.modules():
        if type(module) is nn.Conv2d and not module._forward_pre_hooks:
            module.__class__ = FrozenConv2d
            module._scl_forms, module._scl_plans = {}, {}
