"""What a plugin does to everybody while it is imported: put back, and said with its name; or it is set aside."""

import json
import logging
import random
import subprocess
import sys
import textwrap
import threading
import warnings

import numpy as np
import pytest
import torch

from scl_defense import containment
from scl_defense.checkpoint import load_classifier
from scl_defense.cli.app import run
from scl_defense.errors import ComponentError, UserError

HOOK = """
from scl_defense import hookimpl

@hookimpl
def register_generators(register):
    register("toy", "m:C", summary="A generator.")
"""

CHANGES = {  # what is said -> (what the plugin does, what must be as it was)
    "Python's random state": ("import random; random.seed(7)", random.getstate),
    "NumPy's random state": ("import numpy; numpy.random.seed(7)", lambda: np.random.get_state()[1].tolist()),
    "torch's random state": ("import torch; torch.manual_seed(7)", lambda: torch.get_rng_state().tolist()),
    "torch's default dtype": ("import torch; torch.set_default_dtype(torch.float64)", torch.get_default_dtype),
    "torch's default device": ("import torch; torch.set_default_device('meta')", lambda: torch.empty(()).device),
    "torch's gradients": ("import torch; torch.set_grad_enabled(False)", torch.is_grad_enabled),
    "torch's number of threads": ("import torch; torch.set_num_threads(torch.get_num_threads() + 1)",
                                  torch.get_num_threads),
    "the root logger": ("import logging; logging.basicConfig(level=1, force=True); logging.disable(50)",
                        lambda: (logging.root.level, list(logging.root.handlers), logging.root.manager.disable)),
    "the filters of warnings": ("import warnings; warnings.filterwarnings('ignore')", lambda: list(warnings.filters)),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_what_a_plugin_changes_for_everybody_is_put_back_and_said(what, site, capsys, book):
    change, state = CHANGES[what]
    before = state()
    host = site.install("loud", f"{change}\n{HOOK}").install("quiet").host()
    assert state() == before
    assert list(host.loaded) == ["loud", "quiet"], "it is not set aside for it"
    told = capsys.readouterr().err
    assert told == f"note: plugin 'loud' changed {what} while it was imported; put back as it was\n"
    book("bad plugins")


def test_a_plugin_that_fails_has_its_changes_put_back_too(site, capsys):
    before = random.getstate()
    host = site.install("loud", "import random\nrandom.seed(7)\nraise RuntimeError('no licence')").host()
    assert random.getstate() == before and not host.loaded
    assert "Python's random state" in capsys.readouterr().err


def test_what_a_plugin_asks_of_its_own_warnings_stays(site, capsys):
    source = "import warnings\nwarnings.filterwarnings('ignore', module='loud')\n" + HOOK
    with warnings.catch_warnings():
        site.install("loud", source).host()
        assert any(entry[0] == "ignore" and entry[3] and entry[3].match("loud") for entry in warnings.filters)
    assert capsys.readouterr().err == ""


def test_what_a_plugin_prints_at_import_reaches_no_machine_that_reads_us(site, tmp_path, monkeypatch, capsys, book):
    (tmp_path / "loud.py").write_text("print('hello from the plugin')\n" + HOOK)
    assert run(["plugins", "list", "--json", "--plugin", str(tmp_path / "loud.py")]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) and "hello from the plugin" in err
    book("bad plugins")


def test_an_import_that_takes_long_is_named_while_it_lasts(site, monkeypatch, book):
    """The import below ends when it was named: no second is counted."""
    told, named = [], threading.Event()

    def say(text):
        told.append(text)
        if "'slow'" in text:  # others take longer than that too
            named.set()

    monkeypatch.setattr(containment, "SLOW", 0.01)
    monkeypatch.setattr(containment, "_say", say)
    monkeypatch.setattr(containment, "named_for_test", named, raising=False)
    site.install("slow", "from scl_defense import containment\nassert containment.named_for_test.wait(60)\n" + HOOK)
    host = site.install("quick").host()
    assert "slow" in host.loaded and "quick" in host.loaded
    first = next(text for text in told if "'slow'" in text)
    assert "still being imported" in first and "SCL_DEFENSE_DISABLE_PLUGINS=slow" in first
    assert any(text.startswith("plugin 'slow' took") for text in told)
    book("bad plugins")


PATCHES = {
    "a function": "torch.nn.functional.cross_entropy = lambda *a, **k: 0",
    "a method": "torch.Tensor.backward = lambda self, *a, **k: None",
    "a module's method": "torch.nn.Module.eval = lambda self: self",
    "an optimiser's method": "torch.optim.Optimizer.zero_grad = lambda self, *a: None",
    "a function of its own put there": "torch.sneaky = lambda: None",
}


@pytest.mark.parametrize("what", PATCHES)
def test_a_plugin_that_patches_torch_is_set_aside_and_torch_is_whole(what, site, book):
    place = PATCHES[what].partition(" = ")[0].removeprefix("torch.").split(".")
    owner = torch
    for name in place[:-1]:
        owner = getattr(owner, name)
    before = vars(owner).get(place[-1])
    host = site.install("patcher", f"import torch\n{PATCHES[what]}\n{HOOK}").install("quiet").host()
    assert vars(owner).get(place[-1]) is before and hasattr(owner, place[-1]) == (before is not None)
    (aside,) = host.quarantined
    assert aside.owner.name == "patcher" and f"replaces torch.{'.'.join(place)} for everybody" in aside.reason
    assert list(host.loaded) == ["quiet"]
    book("bad plugins")


def test_a_patch_that_cannot_be_taken_back_stops_the_command(site, book):
    """The plugin is the first to import torch: nobody knows any more what stood there before."""
    site.install("patcher", f"import torch\n{PATCHES['a function']}\n{HOOK}")
    script = "import sys; from scl_defense.cli.app import run; sys.exit(run(['plugins', 'list']))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=site.folder)
    assert found.returncode == 2 and found.stdout == "", found
    line = found.stderr.strip().splitlines()[-1]  # before it, on a slow machine: that the import takes long
    assert line.startswith("error: ") and "Traceback" not in found.stderr
    assert "plugin 'patcher': it replaces torch.nn.functional.cross_entropy" in line
    assert "SCL_DEFENSE_DISABLE_PLUGINS=patcher" in line
    book("bad plugins")


def test_components_are_contained_when_they_are_imported(site, capsys, book):
    """A hook module names its components; their own modules are imported when they are used."""
    parts = """
        import random, torch
        from dataclasses import dataclass
        random.seed(7)
        print("hello")
        torch.nn.functional.relu = lambda *a: 0

        class Part:
            pass
        """
    relu, before = torch.nn.functional.relu, random.getstate()
    (site.folder / "patcher_parts.py").write_text(textwrap.dedent(parts))
    host = site.install("patcher").host()
    with pytest.raises(ComponentError, match=r"'patcher'.*replaces torch\.nn\.functional\.relu"):
        host["generator"].entry("patcher").load()
    out, err = capsys.readouterr()
    assert torch.nn.functional.relu is relu and random.getstate() == before
    assert out == "" and "hello" in err and "changed Python's random state" in err
    book("bad plugins")


# -- what a plugin says of itself, and what it answers


def test_a_module_that_is_registered_twice_is_loaded_once(site, book):
    host = site.install("twice").install("twice", point="again").host()
    assert list(host.loaded) == ["twice"] or list(host.loaded) == ["again"]
    (aside,) = host.quarantined
    assert aside.owner.name == "twice" and "already loaded" in aside.reason
    book("bad plugins")


def test_a_plugin_for_another_version_is_set_aside(site, book):
    """It imports what this version does not have (yet, or any more)."""
    host = site.install("newer", "from scl_defense import of_tomorrow\n" + HOOK).install("aaa").host()
    (aside,) = host.quarantined
    assert aside.owner.name == "newer" and "cannot import name 'of_tomorrow'" in aside.reason
    assert list(host.loaded) == ["aaa"]
    book("bad plugins")


WRONG = {"text": "'a network'", "a number": "0", "a bare network": "__import__('torch').nn.Linear(1, 1)"}


@pytest.mark.parametrize("what", WRONG)
def test_a_hook_that_answers_with_another_type_is_named(what, site, tmp_path, book):
    source = f"""
        from scl_defense import hookimpl

        @hookimpl
        def load_checkpoint(path, options):
            return {WRONG[what]}
        """
    (tmp_path / "x.pt").write_bytes(b"not ours")
    host = site.install("wrong", source).host()
    with pytest.raises(ComponentError, match=r"load_checkpoint of plugin 'wrong' .*not a LoadedClassifier"):
        load_classifier(tmp_path / "x.pt", host=host)
    book("bad plugins")


def test_ctrl_c_during_an_import_stops_the_program(site):
    with pytest.raises(KeyboardInterrupt):
        site.install("loud", "raise KeyboardInterrupt").host()


def test_a_plugin_file_is_contained_like_an_installed_one(site, tmp_path):
    relu = torch.relu
    (tmp_path / "patch.py").write_text(f"import torch\ntorch.relu = lambda x: x\n{HOOK}")
    with pytest.raises(UserError, match=r"patch\.py' was not loaded: it replaces torch\.relu for everybody"):
        site.host(files=[tmp_path / "patch.py"])
    assert torch.relu is relu
