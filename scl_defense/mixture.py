"""Several generators as one."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from scl_defense.errors import UserError
from scl_defense.generation import call
from scl_defense.types import Context, Field, Generator, GeneratorBatch, component

By = Literal["image", "batch", "stack"]


@component
class MixtureOptions:
    """The options of a mixture itself."""

    by: Annotated[
        By, Field(description="a part is drawn for every image, or for the batch; stack: the views of all parts")
    ] = "image"


@dataclass(frozen=True)
class Part:
    """One generator of a mixture. share > 0, relative to the other parts'."""

    name: str
    share: float
    generator: Generator


@dataclass(frozen=True)
class Mixture:
    """Adversarial views of several generators.

    by: ``image``: every image takes the views of one part, drawn with the parts' shares (every part sees the whole
    batch, so the cost is the sum of the parts'); ``batch``: one part, drawn so, makes the whole batch; ``stack``: every
    part makes views of its own, A is the sum of theirs (view a of all lies around ``views[a % V]``, so the second part
    goes on where the first one stopped), and the shares do not matter.

    A part sees what it declared, not what another declared, and draws from random streams of its own: a part's
    examples do not change when another is added. Raises :class:`UserError` when parts that follow the encoder want
    different averaged twins.
    """

    parts: tuple[Part, ...]
    by: By = "image"

    def __post_init__(self) -> None:
        following = [part for part in self.parts if "embed" in part.generator.needs]
        if len({getattr(part.generator, "ema", 0.0) for part in following}) > 1:
            values = ", ".join(f"{part.name}.ema={getattr(part.generator, 'ema', 0.0)}" for part in following)
            raise UserError(f"the parts of a mixture share one encoder: {values} cannot go together; give one value")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(part.generator.needs for part in self.parts))

    @property
    def ema(self) -> float:
        """Momentum of the averaged twin behind ``context.embed``; 0: the encoder itself."""
        return max((getattr(p.generator, "ema", 0.0) for p in self.parts if "embed" in p.generator.needs), default=0.0)

    def prepare(self, data: Any, threat: Any) -> None:
        """Before training: every part that wants to may refuse the data or the threat."""
        for part in self.parts:
            if hasattr(part.generator, "prepare"):
                part.generator.prepare(data, threat)

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        everyone = range(len(self.parts))
        if self.by == "stack":
            stacked: list[Tensor] = []
            for place in everyone:
                first = sum(len(views) for views in stacked)  # its first view is this one of the whole
                stacked.append(self._views_of(place, batch, context, first))
            return torch.cat(stacked)
        draws = 1 if self.by == "batch" else batch.views.shape[1]
        shares = torch.tensor([part.share for part in self.parts], dtype=torch.float64)
        chosen = torch.multinomial(shares, draws, replacement=True, generator=context.stream("mixture", "step"))
        if self.by == "batch":
            return self._views_of(int(chosen), batch, context)
        made = {place: self._views_of(place, batch, context) for place in chosen.unique().tolist()}
        counts = {self.parts[place].name: len(views) for place, views in made.items()}
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise UserError(f"by=image needs parts with equally many adversarial views ({told}); use by=batch or stack")
        mixed = torch.empty_like(next(iter(made.values())))
        for place, views in made.items():
            mine = (chosen == place).to(mixed.device)
            mixed[:, mine] = views[:, mine]
        return mixed

    def _views_of(self, place: int, batch: GeneratorBatch, context: Context, first: int = 0) -> Tensor:
        part, count = self.parts[place], len(batch.views)
        # Streams go by name, and by number among parts of one name: another part beside it changes nothing.
        twin = sum(other.name == part.name for other in self.parts[:place])
        mine = f"{part.name} {twin}"
        streams, again = context.streams, context.reaugment
        return call(
            part.generator,
            replace(batch, views=batch.views.roll(-first, 0)),
            replace(
                context,
                rng=context.stream(f"part {mine}", "step"),
                streams=None if streams is None else lambda purpose, *counters: streams(f"{mine} {purpose}", *counters),
                cache=context.cache.setdefault(("part", mine), {}),
                granted={need: context.granted[need] for need in part.generator.needs if need in context.granted},
                reaugment=None if again is None else lambda images, view: again(images, (view + first) % count),
                generator=f"part '{part.name}' of {context.generator}",
            ),
        )
