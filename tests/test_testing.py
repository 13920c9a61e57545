"""The contract test's own promises: every failure is reported, the process is left as it was, closed forms are true."""

import random
from typing import ClassVar

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from scl_defense.cli.app import run
from scl_defense.errors import UserError
from scl_defense.registry import Entry, Owner
from scl_defense.testing import CHECKS, CheckResult, assert_contract, check_entry, check_generator, label
from scl_defense.testing import _worlds as worlds
from scl_defense.testing._common import changes, network_state, same
from scl_defense.threat import ThreatModel
from scl_defense.types import component

OWNER = Owner("somebody", "1.0", "somebody.hooks")


@component
class Good:
    """Noise."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, batch, context):
        return context.threat.random_start(batch.views[0], context.rng)[None]


@component
class Raises:
    """Never gets anywhere."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, batch, context):
        torch.rand(3)
        raise RuntimeError("a message\nof several\nlines")


@component
class TwoFaults:
    """Double precision, and attached to a graph."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, batch, context):
        return context.threat.random_start(batch.views[0], context.rng)[None].double().requires_grad_() * 1


# -- what is reported


def test_a_component_that_raises_is_asked_everything_and_answers_in_one_line():
    results = check_generator(Raises)
    failed = {result.check: result.message for result in results if not result.passed}
    assert {result.check for result in results if result.passed} >= {"can-be-built", "documented", "needs-declared"}
    assert {"inside-ball", "detached", "deterministic", "constant-images", "one-view"} <= set(failed)
    assert failed["inside-ball"] == "generator 'Raises' failed: RuntimeError: a message of several lines"
    assert all("\n" not in message for message in failed.values())


def test_the_checks_come_in_their_order_under_the_given_name():
    results = check_generator(Good(), "my-noise")
    order = ["can-be-built", *(label(check) for check in CHECKS["generator"])]
    assert [r.check for r in results] == [name for name in order if name in {r.check for r in results}]
    assert {r.component for r in results} == {"my-noise"} and {r.passed for r in results} == {True}
    assert {r.component for r in check_generator(Good)} == {"Good"}


def test_what_is_not_promised_is_not_reported():
    """A model-free generator is not asked whether it leaves the network alone."""
    checks = {result.check for result in check_generator(Good)}
    assert {"model-free", "label-free"} <= checks
    assert not {"network-untouched", "beats-corner-noise", "linear-optimum"} & checks


def test_assert_contract_lists_every_failure():
    assert assert_contract(Good, "generator") is None
    with pytest.raises(AssertionError) as caught:
        assert_contract(TwoFaults(), "generator", "mine")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("mine fails 2 of ")
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["dtype-and-device", "detached"]


def test_an_unknown_kind_is_an_error():
    with pytest.raises(UserError, match="did you mean 'generator'"):
        assert_contract(Good, "generators")


# -- registered components


def test_an_entry_is_built_from_text_and_reported_under_its_name():
    entry = Entry("generator", "pgd", "scl_defense_plugins.generators.pgd:PGD", "PGD", OWNER)
    results = check_entry(entry, {"steps": "2", "loss": "margin"})
    assert {r.component for r in results} == {"pgd"} and {r.passed for r in results} == {True}


@pytest.mark.parametrize(
    ("entry", "options", "expected"),
    [
        (Entry("generator", "gone", "no_such_module:Thing", "x", OWNER), {}, ("can-be-built", "somebody 1.0")),
        (Entry("generator", "good", Good, "x", OWNER), {"stps": "3"}, ("can-be-built", "no option 'stps'")),
        (
            Entry("dataset", "npz", "scl_defense_plugins.datasets.npz:Npz", "x", OWNER),
            {},
            ("available", "option 'path' is required"),
        ),
    ],
    ids=["not importable", "wrong option", "data without a path"],
)
def test_what_cannot_be_built_is_one_failed_result(entry, options, expected):
    (result,) = check_entry(entry, options)
    assert isinstance(result, CheckResult) and not result.passed and result.component == entry.name
    assert result.check == expected[0] and expected[1] in result.message


def test_the_command_fails_with_the_component(tmp_path, capsys):
    source = """
from scl_defense import hookimpl
from scl_defense.types import component

@component
class {name}:
    "Moves nothing."
    needs = frozenset()

    def __call__(self, batch, context):
        return batch.views[:1]{change}

@hookimpl
def register_generators(register):
    register("still", {name}, summary="moves nothing")
"""
    for number, (change, code, line) in enumerate(
        [("", 0, ", 0 failed"), (" + 1", 1, "FAIL  still  inside-box: it left")]
    ):
        file = tmp_path / f"plugin{number}.py"
        file.write_text(source.format(name="Still", change=change))
        assert run(["plugins", "check", "still", "--plugin", str(file)]) == code
        assert line in capsys.readouterr().out


# -- nothing of the process is left changed


def test_global_state_is_put_back_whatever_the_component_does():
    @component
    class Wild:
        """Draws from everything and switches gradients off."""

        needs: ClassVar[frozenset[str]] = frozenset()

        def __call__(self, batch, context):
            torch.rand(3), np.random.rand(3), random.random()
            torch.set_grad_enabled(False)
            torch.set_default_dtype(torch.float64)
            return batch.views[:1]

    before = (torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate())
    (failed,) = [result for result in check_generator(Wild) if not result.passed]
    assert failed.check == "global-state" and "and 4 more" in failed.message
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tobytes(), random.getstate())
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32


# -- its tools


def test_same_is_bitwise_and_nan_equals_nan():
    values = torch.tensor([0.1, float("nan"), float("inf")])
    assert same(values, values.clone())
    assert not same(values, torch.tensor([0.1, 0.0, float("inf")]))
    assert not same(values, torch.nextafter(values, torch.zeros(3)))
    assert not same(torch.zeros(2), torch.zeros(1, 2))


def test_changes_of_a_network_are_all_seen():
    network = worlds.lived_in_network(worlds.GREY)
    assert changes(network_state(network), network_state(network)) == []
    before = network_state(network)
    network.encoder.norm.train()
    network.encoder.norm.running_mean += 1
    network.classifier.bias.data += 1
    network.classifier.weight.grad += 1
    network.projector[0].weight.grad = torch.zeros(10, 12)
    network.encoder.conv.bias.requires_grad_(True)
    assert changes(before, network_state(network)) == [
        "requires_grad of encoder.conv.bias",
        "the buffer encoder.norm.running_mean",
        "the gradient of classifier.weight",
        "the gradient of projector.0.weight",
        "the train/eval mode of encoder.norm",
        "the values of classifier.bias",
    ]


def test_the_lived_in_network_has_everything_that_can_be_disturbed():
    network = worlds.lived_in_network(worlds.COLOUR)
    assert {module.training for module in network.modules()} == {True, False}
    assert {parameter.requires_grad for parameter in network.parameters()} == {True, False}
    assert {parameter.grad is None for parameter in network.parameters()} == {True, False}
    assert any(bool((buffer != 0).any()) for name, buffer in network.named_buffers() if "running_mean" in name)
    assert any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in network.modules())


def test_pictures_have_saturated_pixels_and_every_class():
    images, labels = worlds.pictures(8, worlds.COLOUR)
    assert ((images == 0).any() and (images == 1).any()).item()
    assert images.min() >= 0 and images.max() <= 1 and set(labels.tolist()) == set(range(worlds.CLASSES))
    torch.testing.assert_close(images * 255, (images * 255).round(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_closed_form_radius_is_the_smallest(norm):
    """Against linear programming (Linf, L1, with the box) and against the plane's distance (L2)."""
    depth = 0.1
    network, images, labels = worlds.two_class_problem(4, depth)
    weight = worlds.slopes(network)[1] - worlds.slopes(network)[0]
    assert (worlds.margins(network, images, labels) < 0).all()
    assert images.min() > 0.15 and images.max() < 0.85
    needed = []
    for image, own in zip(images.flatten(1).double(), labels, strict=True):
        toward = (weight if own == 0 else -weight).double()
        missing = depth * float(weight.norm())
        size = len(toward)
        if norm == "l2":
            needed.append(missing / float(toward.norm()))
            continue
        # Variables: delta (size), then one bound per pixel (L1) or one for all (Linf).
        bounds = size if norm == "l1" else 1
        cost = np.concatenate([np.zeros(size), np.ones(bounds)])
        tie = -np.eye(size) if norm == "l1" else -np.ones((size, 1))
        rows = np.block([[np.eye(size), tie], [-np.eye(size), tie], [-toward.numpy()[None], np.zeros((1, bounds))]])
        limits = np.concatenate([np.zeros(2 * size), [-missing]])
        box = [(-float(value), 1 - float(value)) for value in image] + [(0, None)] * bounds
        needed.append(linprog(cost, A_ub=rows, b_ub=limits, bounds=box).fun)
    found = worlds.smallest_radius(norm, weight, images, labels, depth)
    assert found == pytest.approx(max(needed), rel=1e-4)
    if norm == "linf":  # and the network agrees: just below nothing falls, just above everything does
        toward = torch.where(labels[:, None] == 0, weight, -weight).sign().view_as(images)
        assert (worlds.margins(network, images + 0.99 * found * toward, labels) < 0).all()
        assert (worlds.margins(network, images + 1.01 * found * toward, labels) > 0).all()
        assert ThreatModel("linf", f"{1.02 * found:.6f}").contains(images, images + 1.01 * found * toward).all()
