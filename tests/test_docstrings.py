"""Examples in docstrings run as they stand; what `import scl_defense` offers has one, and so has the mathematics."""

import doctest
import inspect
from importlib import import_module
from pathlib import Path

import pytest

import scl_defense

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("threat", "losses", "shown", "checkpoint", "config", "models", "ascent", "deprecation", "runtime")
# Without one: the errors and the hook marker, and `agreement`, which takes a minute (benchmarks/test_agreement.py).
CALLS = ("ThreatModel", "TrainConfig", "benchmark", "generate_examples", "load_classifier", "report", "study", "train",
         "finetune")  # fmt: skip


def examples_of(thing, name, values=None):
    found = doctest.DocTestFinder(recurse=inspect.ismodule(thing)).find(thing, name, globs=values)
    return [one for one in found if one.examples]


def run(tests):
    runner, said = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE), []
    for test in tests:
        runner.run(test, out=said.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(said)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder as the reader has it after `git clone`, without anything written into the real one."""
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", CALLS)
def test_what_the_package_offers_has_an_example_that_runs(name, here):
    thing = getattr(scl_defense, name)
    tests = examples_of(thing, name)
    assert tests, f"scl_defense.{name} has no example in its docstring"
    run(tests)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_modules_run(name, here):
    module = import_module(f"scl_defense.{name}")
    run(test for test in examples_of(module, module.__name__) if test.name.rpartition(".")[2] not in CALLS)


def test_every_loss_and_every_geometry_has_an_example():
    from scl_defense import losses, threat

    for module, names in ((losses, ("infonce", "kl", "margin", "ntxent", "supcon", "unit")), (threat, ("parse_eps",))):
        for name in names:
            assert examples_of(getattr(module, name), name, {}), f"{module.__name__}.{name} has no example"


def test_an_example_that_is_wrong_is_found():
    def wrong():
        """
        >>> 1 + 1
        3
        """

    with pytest.raises(AssertionError, match=r"Expected:\s+3\s+Got:\s+2"):
        run(examples_of(wrong, "wrong", {}))
