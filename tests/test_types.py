"""Components as validated hyper-parameters, and a context that gives what was declared and no more."""

import dataclasses

import pytest
import torch
from pydantic import ValidationError

from scl_defense.errors import ComponentError
from scl_defense.runtime import stream
from scl_defense.threat import ThreatModel
from scl_defense.types import (
    NEEDS,
    Annotated,
    Batch,
    Context,
    Eps,
    Field,
    Generator,
    GeneratorBatch,
    UndeclaredNeed,
    component,
    with_labels_hidden,
)


@component
class Example:
    """A generator with one field of each usual kind."""

    needs = frozenset()

    steps: Annotated[int, Field(ge=1, le=100, description="updates")] = 10
    rel_step: float | None = None
    eps: Eps = "8/255"
    redraw: bool = False

    def __call__(self, batch, context):
        return batch.views[:1]


def context(**granted):
    images = torch.zeros(2, 1, 4, 4)
    return Context(
        threat=ThreatModel("linf", "0.1"),
        rng=torch.Generator(),
        calibration=images,
        epoch=3,
        step=5,
        granted=granted,
        generator="generator 'example' of toys 1.0",
        streams=lambda purpose, *counters: stream(0, purpose, *counters),
    )


# -- components


def test_a_component_is_its_hyper_parameters():
    made = Example(steps="20", rel_step="0.5", eps=" 4/255 ", redraw="true")  # as the command line gives them
    assert dataclasses.asdict(made) == {"steps": 20, "rel_step": 0.5, "eps": "4/255", "redraw": True}
    assert made == Example(**dataclasses.asdict(made))
    assert [field.name for field in dataclasses.fields(Example)] == ["steps", "rel_step", "eps", "redraw"]
    assert isinstance(made, Generator)


def test_a_component_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Example().steps = 3
    with pytest.raises((TypeError, ValidationError)):
        Example(20)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"steps": 101},
        {"steps": "many"},
        {"steps": 1.5},
        {"stpes": 3},
        {"eps": "-1"},
        {"eps": "nan"},
        {"eps": "8/0"},
        {"eps": None},
        {"redraw": "perhaps"},
    ],
)
def test_wrong_names_and_values_are_refused(options):
    with pytest.raises(ValidationError) as caught:
        Example(**options)
    assert caught.value.errors()[0]["loc"][0] == next(iter(options))


def test_defaults_are_checked_too():
    @component
    class Wrong:
        steps: Annotated[int, Field(ge=1)] = 0

    with pytest.raises(ValidationError):
        Wrong()


def test_eps_is_kept_as_written():
    assert Example(eps="8/255").eps == "8/255"
    assert Example(eps=0.1).eps == "0.1"


# -- what a generator is handed


def test_nothing_undeclared_is_given():
    bare = context()
    for need in sorted(NEEDS):
        with pytest.raises(UndeclaredNeed, match=f"generator 'example' of toys 1.0 used context.{need}"):
            getattr(bare, need)
    assert issubclass(UndeclaredNeed, ComponentError)


@pytest.mark.parametrize("need", sorted(NEEDS))
def test_what_was_declared_is_given_alone(need):
    given = object()
    one = context(**{need: given})
    assert getattr(one, need) is given
    for other in NEEDS - {need}:
        with pytest.raises(UndeclaredNeed):
            getattr(one, other)


def test_labels_are_not_in_a_generators_batch():
    views, labels = torch.rand(2, 3, 1, 4, 4), torch.tensor([1, 0, 1])
    hidden = with_labels_hidden(Batch(views=views, labels=labels, images=views[0], indices=torch.arange(3)))
    assert isinstance(hidden, GeneratorBatch)
    assert hidden.views is views and torch.equal(hidden.indices, torch.arange(3))
    assert not any(value is labels for value in vars(hidden).values())
    assert {field.name for field in dataclasses.fields(hidden)} == {"views", "images", "indices"}


def test_streams_repeat_for_the_run_the_epoch_or_the_step():
    def draw(redraw, **changes):
        return torch.rand(3, generator=dataclasses.replace(context(), **changes).stream("filters", redraw)).tolist()

    for redraw in ("never", "epoch", "step"):
        assert draw(redraw) == draw(redraw)
    assert draw("never", epoch=4, step=9) == draw("never")
    assert draw("epoch", step=9) == draw("epoch") != draw("epoch", epoch=4)
    assert draw("step") != draw("step", step=9) and draw("step") != draw("step", epoch=4)
    assert len({str(draw(redraw)) for redraw in ("never", "epoch", "step")}) == 3


def test_a_stream_outside_a_run_is_an_error():
    with pytest.raises(ComponentError, match="example"):
        dataclasses.replace(context(), streams=None).stream("filters")


def test_a_context_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        context().granted = {"labels": torch.zeros(2)}
    with pytest.raises(AttributeError):
        context().labels = torch.zeros(2)


def test_protocols_tell_a_component_from_something_else():
    assert not isinstance(object(), Generator)
