"""Calls of one generator, made the way training makes them, with everything that a check may ask about kept."""

from collections.abc import Callable, MutableMapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from scl_defense.draws import RowsOf
from scl_defense.generation import centres, generate
from scl_defense.models import Network, Twin
from scl_defense.runtime import stream
from scl_defense.testing import _worlds as worlds
from scl_defense.testing._common import (
    applies_if,
    changes,
    global_state_watched,
    network_state,
    same,
    seed_globals,
    settings_kept,
)
from scl_defense.threat import ThreatModel
from scl_defense.types import NEEDS, Batch, Context


@dataclass(frozen=True)
class _Watched(Context):
    """A context that remembers what was asked for, also when the refusal was swallowed."""

    touched: set[str] = field(default_factory=set)

    def _grant(self, need: str) -> Any:
        self.touched.add(need)
        return super()._grant(need)


class _Spy:
    """Stands in for the generator in the real :func:`scl_defense.generation.generate`: the same needs, the raw output
    kept, no view given back. So every promise can be asked about by itself, and a fault is not stopped half-way.
    """

    def __init__(self, generator: Any, needs: frozenset[str], lent: list[Network]):
        self.generator, self.needs, self.lent, self.disturbed = generator, needs, lent, list[str]()
        self.output: Any = None
        self.moved: list[str] = []

    def __call__(self, batch: Any, context: Context) -> Tensor:
        none: Tensor = batch.views[:0].clone()
        before = [network_state(network) for network in self.lent]
        with settings_kept(), global_state_watched() as self.moved:
            self.output = self.generator(batch, context)
        for state, network in zip(before, self.lent, strict=True):
            self.disturbed += changes(state, network_state(network))
        return none


@dataclass(frozen=True)
class Trial:
    """One call: under which threat, around which views (as they were before), and what came back."""

    where: str
    threat: ThreatModel
    views: Tensor
    output: Any
    mutated: list[str]
    disturbed: list[str]
    moved: list[str]

    @property
    def shaped(self) -> bool:
        if not isinstance(self.output, Tensor) or self.output.dim() != 5:
            return False
        return self.output.shape[1:] == self.views.shape[1:]

    @property
    def origin(self) -> Tensor:
        """(A * N, C, H, W): where the balls are centred."""
        return centres(self.views, len(self.output)).flatten(0, 1)

    @property
    def flat(self) -> Tensor:
        """(A * N, C, H, W): the output as float32; what is not finite is another check's and put to the centre."""
        out = self.output.detach().flatten(0, 1).to(self.views)
        return torch.where(out.isfinite(), out, self.origin)


class Trials:
    """Calls of one generator in small worlds."""

    def __init__(self, generator: Any, name: str):
        self.component, self.name = generator, name
        self._touched: dict[frozenset[str], frozenset[str]] = {}

    @cached_property
    def needs(self) -> frozenset[str]:
        """What it declares, and what it was seen to use besides: a wrong declaration is one failure, not all."""
        declared: Any = getattr(self.component, "needs", frozenset())
        needs = frozenset(need for need in declared if need in NEEDS)
        while not self.touched(needs) <= needs:
            needs |= self.touched(needs)
        return needs

    def touched(self, granted: frozenset[str]) -> frozenset[str]:
        """What it asks the context for when it is handed ``granted``."""
        if granted not in self._touched:
            seen: set[str] = set()
            for threat in worlds.THREATS:
                with suppress(Exception):
                    self.call(worlds.batch_of(), threat, needs=granted, touched=seen)
            self._touched[granted] = frozenset(seen)
        return self._touched[granted]

    def call(
        self,
        batch: Batch,
        threat: ThreatModel = worlds.LINF,
        *,
        seed: int = 0,
        global_seed: int = 0,
        epoch: int = 0,
        step: int = 0,
        network: Network | str | None = "lived-in",
        cache: MutableMapping[Any, Any] | None = None,
        needs: frozenset[str] | None = None,
        touched: set[str] | None = None,
        gather: Callable[[Tensor], Tensor] | None = None,
        rows: tuple[int, int] | None = None,
    ) -> Trial:
        """rows: (first, of how many): ``batch`` is one process's share of the images, as under ``torchrun``."""
        needs = self.needs if needs is None else needs
        shape = worlds.shape_of(batch.images)
        if isinstance(network, str):
            network = worlds.lived_in_network(shape)
        encoder = network
        momentum = getattr(self.component, "ema", 0.0)
        if network is not None and momentum and "embed" in needs:
            encoder = Twin(network, momentum).network
        rng = stream(seed, "generator", epoch, step)
        first, total = rows or (0, len(batch.labels))
        context = _Watched(
            threat=threat,
            rng=rng,
            calibration=worlds.pictures(12, shape, seed=77)[0],
            epoch=epoch,
            step=step,
            cache={} if cache is None else cache,
            streams=lambda purpose, *counters: stream(seed, f"generator {purpose}", *counters),
            generator=f"generator '{self.name}'",
            reaugment=lambda images, view: (images + (batch.views[view] - batch.images)).clamp(0, 1),
            touched=set() if touched is None else touched,
            first=first,
            gather=gather or (lambda values: values),
        )
        lent: list[Network] = []
        if network is not None and encoder is not None and needs & {"embed", "logits"}:
            lent = [network] if encoder is network else [network, encoder]
        given = {
            "views": batch.views, "images": batch.images, "indices": batch.indices, "labels": batch.labels,
            "calibration": context.calibration,
        }  # fmt: skip
        before = {name: value.clone() for name, value in given.items()}
        outside = {} if network is None else network_state(network)
        spy: Any = _Spy(self.component, needs, lent)
        seed_globals(global_seed)  # so that drawing from them is one failure, not all
        with nullcontext() if rows is None else RowsOf(first, first + len(batch.labels), total, rng):
            generate(
                spy, batch, context, network=network, encoder=encoder, saved=lambda path: worlds.saved_encoder(shape)
            )
        after = {} if network is None else network_state(network)
        where = f"{threat}, {len(batch.labels)} images {'x'.join(map(str, shape))}"
        disturbed = sorted({*spy.disturbed, *changes(outside, after)})
        return Trial(where, threat, before["views"], spy.output, changes(before, given), disturbed, spy.moved)

    def output(self, batch: Batch, threat: ThreatModel = worlds.LINF, **how: Any) -> Any:
        return self.call(batch, threat, **how).output

    @cached_property
    def grid(self) -> list[Trial]:
        """Every threat, shape and batch size once."""
        return [
            self.call(worlds.batch_of(count, shape), threat)
            for threat in worlds.THREATS
            for shape in worlds.SHAPES
            for count in (2, 7)
        ]

    @property
    def tensors(self) -> list[Trial]:
        found = [trial for trial in self.grid if isinstance(trial.output, Tensor)]
        applies_if(found)
        return found

    @property
    def shaped(self) -> list[Trial]:
        """Calls whose output has the right shape; without any, the checks of its values have nothing to look at."""
        found = [trial for trial in self.grid if trial.shaped]
        applies_if(found)
        return found

    @cached_property
    def repeatable(self) -> bool:
        return all(same(*(self.output(worlds.batch_of(), threat) for _ in range(2))) for threat in worlds.THREATS)
