"""The fixtures for plugin authors: what they check, and that a test run without them pays nothing."""

import os
import subprocess
import sys
import textwrap
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import scl_defense.testing  # noqa: F401  pytester forgets modules imported inside it, and torch can be imported once

pytest_plugins = ["pytester"]
ROOT = Path(__file__).resolve().parent.parent
COMPONENT = """
    import torch
    from scl_defense.types import Annotated, Field, component

    @component
    class Nudge:
        '''Every pixel up by a share of the radius.'''

        needs = frozenset()
        share: Annotated[float, Field(gt=0, description="of the radius")] = 0.5

        def __call__(self, batch, context):
            moved = batch.views[0] + {factor} * self.share * context.threat.radius / batch.views[0][0].numel()
            return context.threat.{project}[None]
"""
SOUND = textwrap.dedent(COMPONENT).format(factor="1", project="project(batch.views[0], moved)")
LEAVES_THE_BALL = textwrap.dedent(COMPONENT).format(factor="1e9", project="__class__ and moved.clamp(0, 1)")


@pytest.fixture
def author(pytester, monkeypatch):
    """A plugin author's folder: pytest in this process, our plugin by its name and no other."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_ADDOPTS", "")

    def run(source, **modules):
        pytester.makepyfile(test_mine=textwrap.dedent(source), **modules)
        return pytester.runpytest_inprocess("-p", "scl_defense.pytest_plugin", "-p", "no:cacheprovider")

    return run


def test_check_component_passes_and_fails(author):
    result = author(
        """
        from good import Nudge as Good
        from bad import Nudge as Bad

        def test_good(check_component):
            check_component(Good(share=0.25), "generator", "nudge")
            check_component(Good, "generator")

        def test_bad(check_component):
            check_component(Bad(), "generator", "nudge")

        def test_kind(check_component):
            check_component(Good(), "generators")
        """,
        good=SOUND,
        bad=LEAVES_THE_BALL,
    )
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(["*nudge fails * checks:*", "*inside-ball: *left the ball*", "*mean 'generator'*"])


def test_batches_networks_and_contexts_fit_each_other(author):
    author(
        """
        import pytest, torch
        from scl_defense.types import UndeclaredNeed

        def test_all(make_batch, make_network, make_context):
            batch = make_batch(5, (3, 12, 10), views=2)
            assert batch.views.shape == (2, 5, 3, 12, 10) and batch.views.min() >= 0 and batch.views.max() <= 1
            network = make_network((3, 12, 10), seed=3)
            context = make_context(batch, "l2", "0.5", network=network, needs={"embed", "labels"})
            assert str(context.threat) == "l2:0.5" and context.embed(batch.images).shape == (5, 10)
            assert torch.equal(context.labels, batch.labels)
            with pytest.raises(UndeclaredNeed):
                context.logits

        def test_seeds(make_batch, make_network, make_context):
            batch = make_batch()
            draws = [torch.rand(3, generator=make_context(batch, seed=seed).rng) for seed in (0, 0, 1)]
            assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
            streams = [make_context(batch).stream("directions").initial_seed() for _ in range(2)]
            assert streams[0] == streams[1]
        """
    ).assert_outcomes(passed=2)


def test_the_linear_problem_is_what_it_says(author):
    """Against the geometry: the best move of a linear network in each ball, written out."""
    author(
        """
        import pytest, torch

        @pytest.mark.parametrize("norm", ["linf", "l2"])
        def test_radius(linear_problem, norm):
            for share, broken in ((0.98, False), (1.02, True)):
                network, images, labels, threat = linear_problem(norm, share)
                assert (network(images).argmax(1) == labels).all()
                images = images.requires_grad_()
                logits = network(images)
                (slope,) = torch.autograd.grad((logits[:, 1] - logits[:, 0]).sum(), images)
                towards = torch.where(labels == 0, 1.0, -1.0).view(-1, 1, 1, 1) * slope
                step = towards.sign() if norm == "linf" else towards / towards.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
                moved = threat.project(images.detach(), images.detach() + threat.radius * step)
                assert bool((network(moved).argmax(1) != labels).all()) == broken
        """
    ).assert_outcomes(passed=2)


def test_check_registered_asks_for_what_is_installed(author):
    result = author(
        """
        import pytest

        def test_there(check_registered):
            assert check_registered("generator", "corner-noise", {"views": "2"}).views == 2

        def test_not_there(check_registered):
            check_registered("generator", "no-such-thing")

        def test_wrong_option(check_registered):
            check_registered("generator", "corner-noise", {"view": "2"})
        """
    )
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(["*no installed plugin registers the generator 'no-such-thing'*"])
    result.stdout.fnmatch_lines(["*did you mean 'views'*"])


def test_a_set_aside_plugin_is_named(author, site):
    site.install("torn", "import no_such_module_at_all")
    result = author("def test_mine(check_registered):\n    check_registered('generator', 'torn')\n")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*set aside: torn (torn 1.0): *no_such_module_at_all*"])


def test_a_plugin_of_one_file(author):
    author(
        '''
        def test_mine(plugin_file):
            host = plugin_file("""
                from scl_defense import hookimpl

                @hookimpl
                def register_models(register):
                    register("mine", "torch.nn:Identity", summary="A model.")
            """)
            assert host["model"].entry("mine").summary == "A model."
        '''
    ).assert_outcomes(passed=1)


def test_every_fixture_is_documented(pytester, monkeypatch):
    page = (ROOT / "docs" / "plugins.md").read_text()
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    from scl_defense import pytest_plugin

    names = [name for name, value in vars(pytest_plugin).items() if type(value).__name__ == "FixtureFunctionDefinition"]
    assert len(names) == 7
    for name in names:
        assert f"`{name}" in page, f"the fixture {name} is not in docs/plugins.md"


# -- what it costs everybody else


def test_it_is_an_entry_point_of_pytest():
    points = {point.name: point.value for point in entry_points(group="pytest11")}
    assert points["scl-defense"] == "scl_defense.pytest_plugin"


def test_a_test_run_that_does_not_use_it_imports_nothing_heavy(tmp_path):
    """In somebody else's project, in a process of its own."""
    (tmp_path / "test_other.py").write_text(
        "import sys\n\ndef test_other():\n"
        "    heavy = {'torch', 'numpy', 'scipy', 'pydantic', 'click', 'rich', 'torchvision', 'sklearn', 'matplotlib'}\n"
        "    assert 'scl_defense.pytest_plugin' in sys.modules\n"
        "    assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "    mine = [name for name in sys.modules if name.startswith('scl_defense')]\n"
        "    assert len(mine) <= 4, mine\n"
    )
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "scl_defense.pytest_plugin", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, str(tmp_path)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
