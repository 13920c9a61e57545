"""Components that break the rules for every kind; shown on generators that are otherwise sound."""

from dataclasses import dataclass
from dataclasses import field as plain_field
from typing import Annotated, ClassVar

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as pydantic_dataclass
from torch import Tensor

from broken import Case
from scl_defense.types import Context, Field, GeneratorBatch, component

MODEL_FREE: frozenset[str] = frozenset()
FORBID = ConfigDict(extra="forbid")


class Noise:
    """Uniform noise: the sound behaviour of everything in this file."""

    needs: ClassVar[frozenset[str]] = MODEL_FREE

    def __call__(self, batch: GeneratorBatch, context: Context) -> Tensor:
        return context.threat.random_start(batch.views[0], context.rng)[None]


class NoDataclass(Noise):
    """Not a dataclass."""


@pydantic_dataclass(kw_only=True, config=FORBID)
class NotFrozen(Noise):
    """Its options can be changed under way."""

    draws: Annotated[int, Field(description="not used")] = 1


@pydantic_dataclass(frozen=True, config=FORBID)
class Positional(Noise):
    """Its options can be given without their names."""

    draws: Annotated[int, Field(description="not used")] = 1


@component
class NoDocstring(Noise):
    pass


NoDocstring.__doc__ = None


@component
class UndescribedOption(Noise):
    """An option that no help page can explain."""

    draws: int = 1


@component
class OptionIsNoData(Noise):
    """A set is no JSON."""

    shapes: Annotated[frozenset[str], Field(description="not used")] = frozenset({"ring"})


@component
class DoublesItsOption(Noise):
    """Every rebuilding doubles an option."""

    draws: Annotated[int, Field(description="not used")] = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "draws", 2 * self.draws)


@component
class HidesAnOption(Noise):
    """An option that its repr, and so a checkpoint's record, leaves out."""

    draws: Annotated[int, Field(description="not used")] = plain_field(default=1, repr=False)


@dataclass(frozen=True, kw_only=True)
class OptionsNotConverted(Noise):
    """A dataclass of the standard library: the text '1' stays a text."""

    draws: Annotated[int, Field(description="not used")] = 1


@component
class AcceptsAnything(Noise):
    """No fault."""


@pydantic_dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="ignore"))
class IgnoresUnknownOptions(Noise):
    """A misspelt option is swallowed."""


@component
class OptionRequired(Noise):
    """Cannot be built without being told something."""

    draws: Annotated[int, Field(description="not used")]


CASES = [
    Case("generator", NoDataclass(), "frozen-dataclass", "is no dataclass"),
    Case("generator", NotFrozen, "frozen-dataclass", "is not frozen"),
    Case("generator", Positional, "frozen-dataclass", "'draws' is not keyword-only"),
    Case("generator", NoDocstring, "documented", "no docstring"),
    Case("generator", UndescribedOption, "documented", "'draws' has no description"),
    Case("generator", OptionIsNoData, "options-are-plain-data", "'shapes'"),
    Case("generator", DoublesItsOption, "options-rebuild-it", "draws=4"),
    Case("generator", HidesAnOption, "options-rebuild-it", "draws=1"),
    Case("generator", OptionsNotConverted, "options-from-text", "'1'"),
    Case("generator", IgnoresUnknownOptions, "options-from-text", "unknown option"),
    Case("generator", OptionRequired, "can-be-built", "option 'draws' is required"),
]
