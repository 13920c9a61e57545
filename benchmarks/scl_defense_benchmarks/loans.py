"""Networks in an attack's hands: twins of the judged one, what passes through them, and if they came back whole."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event
from typing import Any

import torch
from torch import Tensor, nn

from scl_defense_benchmarks.forward import logits_of
from scl_defense_benchmarks.twin import Precision, Twin, again


@dataclass
class Passes:
    """What an attack's calls cost, and which images of the call in progress ever had a usable gradient.

    paid, repaid: (M,) forward and backward passes of each image of the call in progress. What cannot be told apart is
    shared equally (paid) or among those of a chunk (repaid: not counted then). An image that only fills a batch up, as
    it is in it already, is not counted twice.
    """

    forwards: int = 0
    backwards: int = 0
    paid: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    repaid: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    witness: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    traceable: bool = True  # every backward pass so far had as many rows as the call

    def begin(self, count: int, device: torch.device) -> None:
        """A call for so many images begins."""
        self.forwards, self.backwards, self.traceable = 0, 0, True
        self.witness = torch.zeros(count, dtype=torch.bool, device=device)
        self.paid, self.repaid = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.int64)

    def add(self, other: "Passes") -> None:
        """Take in what another has counted in all."""
        self.forwards, self.backwards = self.forwards + other.forwards, self.backwards + other.backwards
        self.traceable &= other.traceable


class Withdrawn(BaseException):
    """The next pass of a network that was taken back: nobody waits for what the attack finds any more."""


class Loan:
    """What one attack works on, and nobody else: the judged network is never in an attack's hands; hooks, modules and
    weights that it leaves behind are its own. Twins are made when first asked for; passes through all are counted.

    first: the twin that those in an attack's hands are copies of; nobody passes or changes it. withdrawn: once set, no
    pass begins any more, so that who is stopped does not wait for an attack's end.
    """

    def __init__(self, first: Twin):
        self._first, self.passes, self.withdrawn = first, Passes(), Event()
        self._twins: dict[Precision, tuple[Twin, list[Tensor], list[Any]]] = {}

    def twin(self, precision: Precision) -> Twin:
        if precision not in self._twins:
            made = again(self._first, precision)
            kept = [parameter.detach().clone() for parameter in made.parameters()]
            self._twins[precision] = made, kept, _watch_passes(made, self.passes, self.withdrawn)
        return self._twins[precision][0]

    def unwatched(self, twin: Twin, images: Tensor) -> Tensor:
        """Logits (N, K) of the twin: our own question, not the attack's cost."""
        passes = self.passes
        before = passes.forwards, passes.backwards, passes.paid.clone()
        try:
            return logits_of(twin, images, multiple=8)
        finally:
            passes.forwards, passes.backwards, passes.paid = before

    def changed(self) -> bool:
        """Whether an attack has written to the weights of its twin."""
        return any(
            len(kept) != len(now := list(twin.parameters()))
            or not all(torch.equal(old, new) for old, new in zip(kept, now, strict=True))
            for twin, kept, _ in self._twins.values()
        )

    def close(self) -> None:
        for _, _, handles in self._twins.values():
            for handle in handles:
                handle.remove()


class _Witnessed(torch.autograd.Function):
    """The identity; on the way back it shows the gradient to a witness."""

    @staticmethod
    def forward(context: Any, images: Tensor, witness: Callable[[Tensor], None]) -> Tensor:
        context.witness = witness
        return images.view_as(images)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        context.witness(gradient)
        return gradient, None


def _watch_passes(network: Twin, passes: Passes, withdrawn: Event | None = None) -> list[Any]:
    """Count images passed forward and backward, and note which images ever got a finite gradient that is not zero."""

    def on_backward(gradient: Tensor) -> None:
        rows: Any = network.rows
        if rows is not None and len(gradient) == len(rows):
            passes.backwards += len(set(rows.tolist()))
            passes.repaid[rows.to(passes.repaid.device)] += 1
        else:
            passes.backwards += len(gradient)
            if len(gradient) != len(passes.witness):
                passes.traceable = False
                return
            rows = slice(None)
        # An image is noted once; asking a GPU whether all are would wait for it.
        if gradient.is_cuda or not bool(passes.witness[rows].all()):
            flat = gradient.flatten(1)
            usable = flat.isfinite().all(1) & (flat != 0).any(1)
            if isinstance(rows, slice):
                passes.witness |= usable
            else:  # an image twice in a batch may have its gradient at one place alone
                seen = torch.zeros_like(passes.witness, dtype=torch.uint8)
                passes.witness |= seen.scatter_reduce(0, rows, usable.to(torch.uint8), "amax").bool()

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if withdrawn is not None and withdrawn.is_set():
            raise Withdrawn
        images = inputs[0] if inputs else None
        if isinstance(images, Tensor) and images.requires_grad and torch.is_grad_enabled():
            return (_Witnessed.apply(images, on_backward), *inputs[1:])
        return None

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() > 0:
            if network.rows is not None and len(output) == len(network.rows):
                passes.forwards += len(set(network.rows.tolist()))
                passes.paid[network.rows.to(passes.paid.device)] += 1
                return
            passes.forwards += len(output)
            if len(passes.paid):
                passes.paid += len(output) / len(passes.paid)

    return [network.register_forward_pre_hook(before), network.register_forward_hook(after)]
