"""The frozen twin that every attack runs on: the same function as the judged network, cheaper to pass through.

One object for torchattacks, ART, plugins and our own loop. It decides nothing: labels and distances are the judge's, in
float32, on the original network.
"""

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from scl_defense_benchmarks.battery import PlannedAttack

Precision = Literal["fp32", "bf16"]
#: What may be asked for: ``auto`` takes bfloat16 where it is faster here and was measured to find as much.
Choice = Literal["auto", "fp32", "bf16"]

#: So many images a twin is compared with the network on.
CHECKED = 64

#: Families of attacks that, in bfloat16 and once more in float32 where the network did not follow its twin, were
#: measured to find within 0.2 points of what float32 finds (benchmarks/results/precision-mnist). Of all others, which
#: lose up to 1.2 points in bfloat16, nothing is run in it unless it is asked for.
BF16_ENOUGH: frozenset[str] = frozenset({"pgd", "fgsm"})

# Twin and original may differ by so much of the largest logit: reordered float32 sums, no other function.
_SAME = 1e-4


class Twin(nn.Module):
    """A copy of ``network``: eval mode, frozen weights, batch norm folded into the convolution before, channels-last.

    precision: what convolutions and matrix products run in; ``bf16`` by autocast, so that whatever the network does
    beside them (its normalisation, a softmax) stays float32. Logits are float32 in any case. rows: an attack that
    passes only some of the images it was given says which; ``None``: all of them, or nobody knows.
    """

    rows: Tensor | None = None

    def __init__(self, network: nn.Module, precision: Precision = "fp32"):
        super().__init__()
        self.network, self.precision = network, precision
        self.eval().requires_grad_(False)

    def __getattr__(self, name: str) -> Any:
        """What an attack asks of the network beside its logits, it is answered by the copy."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)

    def forward(self, images: Tensor) -> Tensor:
        if images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        if self.precision == "fp32":
            return self.network(images)
        with torch.autocast(images.device.type, torch.bfloat16):
            return self.network(images).float()


def rounds(planned: PlannedAttack, choice: Choice, device: torch.device) -> list[tuple[Precision, int, bool]]:
    """What is run on an image until it is broken: (precision, restart, only where the twin alone was fooled).

    Only white-box attacks inside a ball are ever run in bfloat16: the others do without a backward pass, or measure
    distances. ``bf16``: every start once more in float32 on what has survived. ``auto``: bfloat16 where this machine is
    faster with it and the family is in :data:`BF16_ENOUGH`, then float32 where the bfloat16 twin was fooled and the
    network was not; float32 alone for every other attack, which costs less than both passes.
    """
    attack = planned.attack
    starts = range(getattr(planned, "restarts", 1))
    fixed = attack.access == "white-box" and not attack.minimal
    family = str(getattr(attack, "family", ""))
    if fixed and choice == "bf16":
        return [("bf16", start, False) for start in starts] + [("fp32", start, False) for start in starts]
    if fixed and choice == "auto" and family in BF16_ENOUGH and bf16_pays(device):
        return [("bf16", start, False) for start in starts] + [("fp32", start, True) for start in starts]
    return [("fp32", start, False) for start in starts]


def precision_of(planned: PlannedAttack, choice: Choice, device: torch.device) -> str:
    """What :func:`rounds` comes to, for the row of a result: ``fp32``, ``bf16`` or ``bf16+fp32``."""
    done = rounds(planned, choice, device)
    kinds = dict.fromkeys(precision for precision, _, only_doubted in done if not only_doubted)
    return "+".join(kinds)


def twin_of(network: nn.Module, sample: Tensor, precision: Precision = "fp32") -> Twin:
    """A twin of ``network`` (in eval mode), checked on ``sample`` (N, C, H, W): where folding or the memory order gives
    other logits, or breaks the forward pass, the twin is a plain copy.
    """
    plain = copy.deepcopy(network).eval()
    if _always_training(network) or not len(sample):
        return Twin(plain, precision)
    with torch.no_grad():
        try:
            expected = network(sample)
            changed = copy.deepcopy(plain)
            _fold_batch_norms(changed, sample)
            changed = changed.to(memory_format=torch.channels_last)
            found = Twin(changed, "fp32")(sample)
            if _agree(found, expected):
                return Twin(changed, precision)
        except Exception:  # a stranger's network: what cannot be rebuilt is attacked as it is
            pass
    return Twin(plain, precision)


def again(twin: Twin, precision: Precision) -> Twin:
    """Another twin of the same network, which shares nothing with ``twin`` and need not be checked again."""
    return Twin(copy.deepcopy(twin.network), precision)


def bf16_pays(device: torch.device) -> bool:
    """Whether this machine multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def _agree(found: Tensor, expected: Tensor) -> bool:
    if not isinstance(expected, Tensor) or found.shape != expected.shape:
        return False
    scale = expected.abs().amax().clamp(min=1e-6)
    return bool(((found - expected).abs() <= _SAME * scale).all())


def _always_training(network: nn.Module) -> bool:
    """A network that stays in train mode whatever it is told draws or counts in forward: nothing may be rearranged."""
    return any(module.training for module in network.modules())


def _fold_batch_norms(network: nn.Module, sample: Tensor) -> None:
    """Fold every batch norm that reads a convolution's output, both called once, into it; in place.

    What reads what is seen in one forward pass. Where folding changes the logits, because a convolution's output is
    read elsewhere too, the pairs are tried one by one and those that change them are left as they are.
    """
    pairs, few = _pairs(network, sample[:2]), sample[:8]
    expected = network(few)
    undo = [_fold(network, *pair) for pair in pairs]
    if _agree(network(few), expected):
        return
    for back in reversed(undo):
        back()
    for pair in pairs:
        back = _fold(network, *pair)
        if not _agree(network(few), expected):
            back()


def _pairs(network: nn.Module, sample: Tensor) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    calls: dict[nn.Module, int] = {}
    made_by: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    found: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1
        if type(module) is nn.Conv2d:
            made_by[id(output)] = (module, output)  # kept alive, so that its id stays its own
        elif inputs and id(inputs[0]) in made_by:
            found.append((made_by[id(inputs[0])][0], module))

    parts = [module for module in network.modules() if type(module) in (nn.Conv2d, nn.BatchNorm2d)]
    hooked = {part for part in parts if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks}
    handles = [module.register_forward_hook(note) for module in parts]
    try:
        network(sample)
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


def _fold(network: nn.Module, convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> Callable[[], None]:
    """Fold one pair in place; the result takes it back."""
    name = next(name for name, module in network.named_modules() if module is norm)
    parent, _, last = name.rpartition(".")
    before = convolution.weight, convolution.bias
    convolution.weight, convolution.bias = fuse_conv_bn_weights(
        convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    setattr(network.get_submodule(parent), last, nn.Identity())

    def back() -> None:
        convolution.weight, convolution.bias = before
        setattr(network.get_submodule(parent), last, norm)

    return back
