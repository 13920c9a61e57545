"""The contract test: the named checks that every component passes, first-party and third-party alike.

In a plugin's own tests::

    from scl_defense.testing import assert_contract

    def test_my_generator():
        assert_contract(MyGenerator(steps=3), "generator")

On the command line: ``scl-defense plugins check NAME``. A check is a short function in this package whose docstring
says what is promised and why; those that a component's own declarations rule out (a model-free generator is not asked
whether it leaves the network alone) give no result. Everything runs on synthetic data made from seeds, on the CPU.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from scl_defense.config import construct
from scl_defense.errors import UserError, nearest
from scl_defense.registry import KINDS, Entry
from scl_defense.testing._common import BUILT, Check, CheckResult, label, one_line
from scl_defense.testing.attacks import ATTACK_CHECKS, check_attack
from scl_defense.testing.datasets import AVAILABLE, DATASET_CHECKS, check_dataset
from scl_defense.testing.generators import GENERATOR_CHECKS, check_generator
from scl_defense.testing.loggers import LOGGER_CHECKS, check_logger
from scl_defense.testing.models import MODEL_CHECKS, check_model
from scl_defense.testing.trainers import TRAINER_CHECKS, check_trainer

#: kind -> its checks, in the order in which they run.
CHECKS: Mapping[str, tuple[Check, ...]] = {
    "generator": GENERATOR_CHECKS,
    "trainer": TRAINER_CHECKS,
    "attack": ATTACK_CHECKS,
    "model": MODEL_CHECKS,
    "dataset": DATASET_CHECKS,
    "logger": LOGGER_CHECKS,
}
_RUNNERS: Mapping[str, Callable[..., list[CheckResult]]] = {
    "generator": check_generator,
    "trainer": check_trainer,
    "attack": check_attack,
    "model": check_model,
    "dataset": check_dataset,
    "logger": check_logger,
}


def check_entry(
    entry: Entry, options: Mapping[str, Any] | None = None, *, root: str | Path | None = None
) -> list[CheckResult]:
    """Run the contract test on a registered component, built with ``options`` (text is converted).

    root: see :func:`check_dataset`. A component that cannot be imported or built is one failed result.
    """
    try:
        component = construct(entry.load(), options or {}, f"{entry.kind} '{entry.name}'")
    except Exception as error:
        return [CheckResult(entry.name, AVAILABLE if entry.kind == "dataset" else BUILT, False, one_line(error))]
    extra = {"root": root} if entry.kind == "dataset" else {}
    return _RUNNERS[entry.kind](component, entry.name, **extra)


def assert_contract(component: Any, kind: str, name: str | None = None, *, root: str | Path | None = None) -> None:
    """For use inside pytest: raise ``AssertionError`` listing every failed check of a component (instance or class).

    kind: generator, trainer, attack, model, dataset or logger; raises :class:`UserError` for another one.
    """
    if kind not in _RUNNERS:
        raise UserError(f"there is no kind of component '{kind}'{nearest(kind, KINDS)} (kinds: {', '.join(KINDS)})")
    extra = {"root": root} if kind == "dataset" else {}
    results = _RUNNERS[kind](component, name, **extra)
    failed = [result for result in results if not result.passed]
    if failed:
        lines = "".join(f"\n  {result.check}: {result.message}" for result in failed)
        raise AssertionError(f"{failed[0].component} fails {len(failed)} of {len(results)} checks:{lines}")


__all__ = [
    "CHECKS",
    "CheckResult",
    "assert_contract",
    "check_attack",
    "check_dataset",
    "check_entry",
    "check_generator",
    "check_logger",
    "check_model",
    "check_trainer",
    "label",
]
