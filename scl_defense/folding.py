"""Batch norm folded into the convolution before it: in eval mode the same function, and a cheaper one to pass through.

Only where a forward pass shows that the norm reads the convolution's output, and a check that nobody else does.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

# Folded and original outputs may differ by so much of the largest: reordered float32 sums, no other function.
SAME = 1e-4
Pair = tuple[nn.Conv2d, nn.BatchNorm2d]


@dataclass(frozen=True)
class Folding:
    """Which batch norms of a network go into which convolutions, by name; it stays true while the weights move."""

    pairs: tuple[tuple[str, str], ...] = ()

    @contextmanager
    def folded(self, network: nn.Module, precision: str = "fp32") -> Iterator[None]:
        """Inside, ``network`` (in eval mode) passes without these norms, its state dict lacks them, and gradients to
        the parameters are not to be had; after, it is as it was. ``bf16``: the folded weights are in bfloat16, so that
        autocast need not convert them in every pass.
        """
        undo = []
        try:
            for names in self.pairs:
                undo.append(_fold(network, *names, torch.bfloat16 if precision == "bf16" else None))
            yield
        finally:
            for back in reversed(undo):
                back()


def plan(network: nn.Module, sample: Tensor, output: Callable[[Any, Tensor], Tensor] | None = None) -> Folding:
    """What can be folded in ``network``, which is left alone, whatever values its batch norms may take in training.

    sample: (N, C, H, W), a few images. output: (network, images) -> what must stay the same; the default is the
    forward pass. A network that cannot be copied, or draws or counts in eval mode, keeps its norms.
    """
    try:
        trial = copy.deepcopy(network).eval().requires_grad_(False)
        if any(module.training for module in trial.modules()):
            return Folding()
        names = {module: name for name, module in trial.named_modules()}
        with torch.no_grad():
            _shake(trial)  # fresh statistics are the identity: folding them wrongly would not show
            kept = fold_batch_norms(trial, sample, output)
        return Folding(tuple((names[convolution], names[norm]) for convolution, norm in kept))
    except Exception:  # a stranger's network: what cannot be rebuilt stays as it is
        return Folding()


def fold_batch_norms(
    network: nn.Module, sample: Tensor, output: Callable[[Any, Tensor], Tensor] | None = None
) -> list[Pair]:
    """Fold every batch norm that reads a convolution's output, both called once, into it; in place, in eval mode.

    What reads what is seen in one forward pass. Where folding changes the output, because a convolution's output is
    read elsewhere too, halves are tried, down to the pairs that change it: those stay as they are. Returns the others.
    """
    output = output or (lambda network, images: network(images))
    pairs, few = _pairs(network, lambda: output(network, sample[:2])), sample[:8]
    names = {module: name for name, module in network.named_modules()}
    expected = output(network, few)

    def settle(pairs: list[Pair]) -> list[Pair]:
        undo = [_fold(network, names[convolution], names[norm]) for convolution, norm in pairs]
        if agree(output(network, few), expected):
            return pairs
        for back in reversed(undo):
            back()
        half = len(pairs) // 2
        return settle(pairs[:half]) + settle(pairs[half:]) if half else []

    return settle(pairs)


def agree(found: Any, expected: Any) -> bool:
    """Whether two outputs are the same up to rounding."""
    if not isinstance(expected, Tensor) or found.shape != expected.shape:
        return False
    scale = expected.abs().amax().clamp(min=1e-6)
    return bool(((found - expected).abs() <= SAME * scale).all())


def _shake(network: nn.Module) -> None:
    """Statistics, weights and biases of all batch norms drawn at random, from a generator of its own."""
    rng = torch.Generator().manual_seed(0)
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            for values in (module.running_mean, module.bias, module.running_var, module.weight):
                if values is not None:
                    positive = values is module.running_var or values is module.weight
                    values.copy_(torch.rand(values.shape, generator=rng) + (0.5 if positive else -0.5))


def _pairs(network: nn.Module, forward: Callable[[], Any]) -> list[Pair]:
    calls: dict[nn.Module, int] = {}
    made_by: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    found: list[Pair] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        calls[module] = calls.get(module, 0) + 1
        if type(module) is nn.Conv2d:
            made_by[id(output)] = (module, output)  # kept alive, so that its id stays its own
        elif isinstance(module, nn.BatchNorm2d) and inputs and id(inputs[0]) in made_by:
            found.append((made_by[id(inputs[0])][0], module))

    parts = [module for module in network.modules() if type(module) in (nn.Conv2d, nn.BatchNorm2d)]
    hooked = {part for part in parts if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks}
    handles = [module.register_forward_hook(note) for module in parts]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return [
        (convolution, norm)
        for convolution, norm in found
        if norm.running_mean is not None
        and norm.running_var is not None
        and not {convolution, norm} & hooked
        and calls[convolution] == calls[norm] == 1
    ]


def _fold(network: nn.Module, convolution: str, norm: str, dtype: torch.dtype | None = None) -> Callable[[], None]:
    """Fold one pair in place; the result takes it back."""
    layer: Any = network.get_submodule(convolution)
    statistics: Any = network.get_submodule(norm)
    parent, _, last = norm.rpartition(".")
    owner = network.get_submodule(parent)
    before = layer.weight, layer.bias
    layer.weight, layer.bias = (
        nn.Parameter(value.detach().to(dtype or value.dtype), requires_grad=False)
        for value in fuse_conv_bn_weights(
            layer.weight, layer.bias, statistics.running_mean, statistics.running_var, statistics.eps,
            statistics.weight, statistics.bias,
        )
    )  # fmt: skip
    owner._modules[last] = nn.Identity()

    def back() -> None:
        layer.weight, layer.bias = before
        owner._modules[last] = statistics

    return back
