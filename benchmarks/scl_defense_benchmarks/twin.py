"""The frozen twin that every attack runs on: the same function as the judged network, cheaper to pass through.

One object for torchattacks, ART, plugins and our own loop. It decides nothing: labels and distances are the judge's, in
float32, on the original network.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scl_defense.folding import agree, fold_batch_norms
from scl_defense_benchmarks.battery import PlannedAttack
from scl_defense_benchmarks.convolutions import FrozenConv2d, freeze_convolutions
from scl_defense_benchmarks.patches import Patches
from scl_defense_benchmarks.program import Program, program_of

Precision = Literal["fp32", "bf16"]
#: What may be asked for: ``auto`` takes bfloat16 where it is faster here and was measured to find as much.
Choice = Literal["auto", "fp32", "bf16"]

#: So many images a twin is compared with the network on.
CHECKED = 16

#: Families of attacks that, in bfloat16 and once more in float32 where the network did not follow its twin, were
#: measured to find at most 0.2 points less than in float32 by the 95 % interval's upper end, over three networks with
#: three seeds and 2,000 images each (benchmarks/results/precision; docs/speed.md has the table). Auto-PGD is not among
#: them: apgd-t was not measured, and apgd-dlr found 0.23 points less on MNIST. What was not measured is run in float32
#: unless it is asked for.
BF16_ENOUGH: frozenset[str] = frozenset({"pgd", "pgd-min", "fgsm", "mifgsm"})


class Twin(nn.Module):
    """A copy of ``network``: eval mode, frozen weights, batch norm folded into the convolution before, channels-last,
    convolutions that need not be trained (see :mod:`scl_defense_benchmarks.convolutions`).

    precision: what convolutions and matrix products run in; ``bf16`` by autocast, so that whatever the network does
    beside them (its normalisation, a softmax) stays float32. Logits are float32 in any case. rows: an attack that
    passes only some of the images it was given says which; ``None``: all of them, or nobody knows.
    """

    rows: Tensor | None = None

    def __init__(self, network: nn.Module, precision: Precision = "fp32", program: Program | None = None):
        super().__init__()
        self.network, self.precision = network, precision
        self.program = program and program.of(network)
        self.patches: Patches | None = None
        self.eval().requires_grad_(False)
        for module in self.modules():
            if isinstance(module, FrozenConv2d):
                module._scl_forms = {}  # a copy's weights are its own
                if precision == "bf16":
                    module.round_once()

    def __getattr__(self, name: str) -> Any:
        """What an attack asks of the network beside its logits, it is answered by the copy."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)

    def forward(self, images: Tensor) -> Tensor:
        if images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        forward: Any = self._program_for(images) or self.network
        if self.patches is not None and forward is self.program and not torch.is_grad_enabled():
            forward = self.patches
        if self.precision == "fp32":
            return forward(images)
        with torch.autocast(images.device.type, torch.bfloat16):
            return forward(images).float()

    def _program_for(self, images: Tensor) -> Program | None:
        """The program, where nobody would miss what it leaves out: hooks, and what a transform asks of every layer."""
        if self.program is None or images.device.type != "cpu" or torch._C._are_functorch_transforms_active():
            return None
        return self.program if self.program.holds() else None

    @contextmanager
    def remembering(self) -> Iterator[Patches | None]:
        """Inside, passes without a gradient remember the images (see :mod:`scl_defense_benchmarks.patches`), for a
        search that changes a few pixels at a time; ``None`` where that cannot be had.
        """
        if self.program is not None and self.precision == "fp32":
            self.patches = Patches(self.program)
        try:
            yield self.patches
        finally:
            self.patches = None

    @contextmanager
    def exactly(self) -> Iterator[None]:
        """Inside, what passes through this twin does so in float32: for an attack that asks if its example fools."""
        before, self.precision = self.precision, "fp32"
        try:
            yield
        finally:
            self.precision = before


def rounds(planned: PlannedAttack, choice: Choice, device: torch.device) -> list[tuple[Precision, int, bool]]:
    """What is run on an image until it is broken: (precision, restart, only where the twin alone was fooled).

    Only white-box attacks are ever run in bfloat16: the others do without a backward pass. ``bf16``: those inside a
    ball, every start once more in float32 on what has survived. ``auto``: bfloat16 where this machine is faster with it
    and the family is in :data:`BF16_ENOUGH`, then float32 where the bfloat16 twin was fooled and the network was not;
    float32 alone for every other attack, which costs less than both passes. What looks for the smallest radius takes
    part in ``auto`` alone, and only where it measures in float32 by itself (``measures_exactly``): an image that has
    fallen in one ball would not be attacked again in the smaller ones.
    """
    attack = planned.attack
    starts = range(getattr(planned, "restarts", 1))
    exact = not attack.minimal or getattr(attack, "measures_exactly", False)
    family = str(getattr(attack, "family", ""))
    if attack.access == "white-box" and not attack.minimal and choice == "bf16":
        return [("bf16", start, False) for start in starts] + [("fp32", start, False) for start in starts]
    enough = attack.access == "white-box" and exact and family in BF16_ENOUGH
    if enough and choice == "auto" and bf16_pays(device):
        return [("bf16", start, False) for start in starts] + [("fp32", start, True) for start in starts]
    return [("fp32", start, False) for start in starts]


def precision_of(planned: PlannedAttack, choice: Choice, device: torch.device) -> str:
    """What :func:`rounds` comes to, for the row of a result: ``fp32``, ``bf16`` or ``bf16+fp32``."""
    done = rounds(planned, choice, device)
    kinds = dict.fromkeys(precision for precision, _, only_doubted in done if not only_doubted)
    return "+".join(kinds)


def twin_of(network: nn.Module, sample: Tensor, precision: Precision = "fp32", steady: bool = True) -> Twin:
    """A twin of ``network`` (in eval mode), checked on ``sample`` (N, C, H, W): where folding or the memory order gives
    other logits, or breaks the forward pass, the twin is a plain copy.

    steady: a forward pass draws nothing. Of one that does, what Python draws would be written down once for all.
    """
    plain = copy.deepcopy(network).eval()
    if _always_training(network) or not len(sample):
        return Twin(plain, precision)
    with torch.no_grad():
        for rearrange in (_rearranged, _folded):
            try:
                expected = network(sample)
                changed = rearrange(copy.deepcopy(plain), sample)
                if not agree(Twin(changed, "fp32")(sample), expected):
                    continue
                return Twin(changed, precision, _program(changed, sample, expected) if steady else None)
            except Exception:  # a stranger's network: what cannot be rebuilt is attacked as it is
                continue
    return Twin(plain, precision)


def _program(network: nn.Module, sample: Tensor, expected: Tensor) -> Program | None:
    """The program of ``network``, if it has its logits and its gradient: what makes or blocks a gradient of its own, as
    a straight-through estimator or ``with torch.no_grad()`` in the forward pass, is not written down.
    """
    program = program_of(network)
    try:
        if program is None or not agree(program(sample.contiguous(memory_format=torch.channels_last)), expected):
            return None
        found = []
        for forward in (network, program):
            points = sample[:2].contiguous(memory_format=torch.channels_last).requires_grad_()
            with torch.enable_grad():
                logits = forward(points)
                weights = torch.linspace(1, 2, logits.numel(), device=logits.device).view_as(logits)
                slope = torch.autograd.grad(logits, points, weights)[0] if logits.requires_grad else None
            found.append((logits.detach(), slope))
        (logits, slope), (mine, own) = found
        if slope is None or own is None:
            return program if slope is own and agree(mine, logits) else None
        scale = slope.abs().amax().clamp(min=1e-12)
        same = agree(mine, logits) and bool(((own - slope).abs() <= 1e-3 * scale).all())
        return program if same else None
    except Exception:  # a stranger's network: its program is no better than its forward pass
        return None


def _folded(network: nn.Module, sample: Tensor) -> nn.Module:
    fold_batch_norms(network, sample)
    return network.to(memory_format=torch.channels_last)


def _rearranged(network: nn.Module, sample: Tensor) -> nn.Module:
    changed = _folded(network, sample)
    freeze_convolutions(changed)
    return changed


def again(twin: Twin, precision: Precision) -> Twin:
    """Another twin of the same network, which shares nothing with ``twin`` and need not be checked again."""
    return Twin(copy.deepcopy(twin.network), precision, twin.program)


def bf16_pays(device: torch.device) -> bool:
    """Whether this machine multiplies bfloat16 faster than float32.

    A CPU is asked for its features, not timed: what a run finds must not hang on what else the machine does. AVX-512's
    dot products of bfloat16 are not enough, with them alone a product took twice as long as in float32 (docs/speed.md).
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def _always_training(network: nn.Module) -> bool:
    """A network that stays in train mode whatever it is told draws or counts in forward: nothing may be rearranged."""
    return any(module.training for module in network.modules())
