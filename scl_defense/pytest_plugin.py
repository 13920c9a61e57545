"""pytest fixtures for the tests of plugins; pytest finds them where scl-defense is installed (``-p no:scl-defense``
leaves them out).

Every fixture is a function to be called. Nothing but pytest is imported before one of them is: a test run that uses
none pays nothing.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from scl_defense.models import Network
    from scl_defense.threat import ThreatModel
    from scl_defense.types import Batch, Context


@pytest.fixture
def check_component() -> Callable[..., None]:
    """``check_component(component, kind, name=None, *, root=None)``: the contract test, an error with all that failed.

    component: an instance, or a class (then with its default options). kind: generator, trainer, attack, model,
    dataset or logger. root: where a data set's files lie.
    """
    from scl_defense.testing import assert_contract

    return assert_contract


@pytest.fixture
def check_registered() -> Callable[..., Any]:
    """``check_registered(kind, name, options=None)``: the component as a user gets it, from what is installed here.

    Fails when its plugin was set aside, when the name is not registered, when the class cannot be imported, and when
    it does not take ``options`` (text, as on a command line). Returns the component.
    """
    from scl_defense.config import make
    from scl_defense.errors import SclDefenseError
    from scl_defense.plugins import PluginHost

    def check(kind: str, name: str, options: Mapping[str, Any] | None = None) -> Any:
        host = PluginHost()
        if name not in host[kind]:
            aside = "".join(f"\n  set aside: {q.plugin} ({q.owner}): {q.reason}" for q in host.quarantined)
            raise AssertionError(f"no installed plugin registers the {kind} '{name}' (pip install -e .){aside}")
        try:
            return make(host, kind, name, options)
        except SclDefenseError as error:
            raise AssertionError(str(error)) from error

    return check


@pytest.fixture
def make_batch() -> "Callable[..., Batch]":
    """``make_batch(count=7, shape=(1, 8, 8), *, views=2, seed=0)``: a :class:`scl_defense.types.Batch` of four classes.

    The images are coarse patterns with noise, many of their pixels exactly 0 or 1.
    """
    from scl_defense.testing import _worlds

    return _worlds.batch_of


@pytest.fixture
def make_network() -> "Callable[..., Network]":
    """``make_network(shape=(1, 8, 8), *, seed=0)``: a small :class:`scl_defense.models.Network` of four classes.

    It has what a component could disturb: batch norm with moved statistics, dropout, layers in both modes, a frozen
    parameter, gradients.
    """
    from scl_defense.testing import _worlds

    def make(shape: "tuple[int, int, int]" = _worlds.GREY, *, seed: int = 0) -> "Network":
        return _worlds.lived_in_network(shape, seed=seed)

    return make


@pytest.fixture
def make_context() -> "Callable[..., Context]":
    """``make_context(batch, norm="linf", eps="0.1", *, network=None, needs=(), seed=0)``: what a generator is given.

    It grants what ``needs`` names out of embed and logits (of ``network``) and labels, as a run does; the rest raises.
    """
    from scl_defense.runtime import stream
    from scl_defense.threat import ThreatModel
    from scl_defense.types import Context

    def make(
        batch: "Batch",
        norm: str = "linf",
        eps: str = "0.1",
        *,
        network: "Network | None" = None,
        needs: "frozenset[str] | tuple[str, ...]" = (),
        seed: int = 0,
    ) -> "Context":
        everything: dict[str, Any] = {"labels": batch.labels}
        if network is not None:
            everything |= {"embed": network.embed, "logits": network.logits}
        return Context(
            threat=ThreatModel(norm, eps),
            rng=stream(seed, "generator"),
            calibration=batch.images,
            streams=lambda purpose, *counters: stream(seed, purpose, *counters),
            granted={need: everything[need] for need in needs},
        )

    return make


@pytest.fixture
def linear_problem() -> "Callable[..., tuple[nn.Module, Tensor, Tensor, ThreatModel]]":
    """``linear_problem(norm, share=1.0, *, count=8, seed=0)`` -> (network, images, labels, threat), the answer known.

    A linear network of two classes with images that it gets right. ``threat`` has ``share`` times the smallest radius
    at which every image can be broken, in closed form; norm: linf, l2 or l1. An attack must break all of them at a
    share above 1, and can never at one below.
    """
    from scl_defense.testing import _worlds
    from scl_defense.threat import ThreatModel

    distance = 0.1

    def make(
        norm: str, share: float = 1.0, *, count: int = 8, seed: int = 0
    ) -> "tuple[nn.Module, Tensor, Tensor, ThreatModel]":
        network, images, labels = _worlds.two_class_problem(count, distance, seed=seed)
        weight = _worlds.slopes(network)[1] - _worlds.slopes(network)[0]
        radius = _worlds.smallest_radius(norm, weight, images, labels, distance)
        return network, images, labels, ThreatModel(norm, f"{share * radius:.8f}")

    return make


@pytest.fixture
def plugin_file(tmp_path: Path) -> Callable[[str], Any]:
    """``plugin_file(source)``: a :class:`scl_defense.plugins.PluginHost` with this text as a plugin of one file."""
    from scl_defense.plugins import PluginHost

    def load(source: str) -> Any:
        import textwrap

        path = tmp_path / "plugin_under_test.py"
        path.write_text(textwrap.dedent(source), encoding="utf-8")
        return PluginHost(files=[path])

    return load
