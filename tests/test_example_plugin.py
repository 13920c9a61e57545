"""The worked third-party distribution: as a plugin of this process, and installed into an environment of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from scl_defense import plugins, train
from scl_defense.cli.app import run
from scl_defense.config import make, options_of
from scl_defense.plugins import PluginHost
from scl_defense.testing import check_entry

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "plugins" / "scl-defense-example"
FAST = {"epochs": 1, "limit": 96, "batch_size": 32, "val_limit": 48, "val_steps": 1}
FLAGS = [part for name, value in FAST.items() for part in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture
def installed(site, monkeypatch):
    """As ``pip install`` leaves it: importable, with its entry point in the metadata; nothing is built."""
    monkeypatch.syspath_prepend(EXAMPLE)
    info = site.folder / "scl_defense_example-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: scl-defense-example\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[scl_defense]\nexample = scl_defense_example.hooks\n")
    plugins._cached.cache_clear()  # the host of this process was made without it
    yield
    plugins._cached.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "scl_defense_example"]:
        del sys.modules[name]


def test_it_is_found_listed_and_passes_the_contract(installed):
    host = PluginHost()
    assert host.quarantined == []
    assert str(host.loaded["example"]) == "scl-defense-example 0.1.0"
    entry = host["generator"].entry("hybrid-pattern")
    assert entry.owner.name == "scl-defense-example" and entry.qualified == "scl-defense-example:hybrid-pattern"
    for options in ({}, {"pattern": "square", "tile": 5}, {"pattern": "rhombus", "weight": 3.0}):
        results = check_entry(entry, options)
        assert [f"{result.check}: {result.message}" for result in results if not result.passed] == []
        assert {"model-free", "label-free", "inside-ball"} <= {result.check for result in results}
    assert {option.name for option in options_of(entry.load())} == {"pattern", "tile", "ring", "sigma", "weight"}


def test_it_trains_and_the_checkpoint_says_who_made_it(installed, tmp_path, capsys):
    host = PluginHost()
    result = train(generator="hybrid-pattern", generator_options={"tile": "4"}, out=str(tmp_path), host=host, **FAST)
    assert run(["info", str(result.best), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["generator"] == repr(make(host, "generator", "hybrid-pattern", {"tile": 4}))
    assert {"plugin": "example", "distribution": "scl-defense-example", "version": "0.1.0"} in info["plugins"]


def test_its_command_draws_with_its_own_generator(installed, tmp_path):
    cli = click.Group()
    host = PluginHost()
    host.register_commands(cli)
    assert host.quarantined == []
    out = tmp_path / "sheet.png"
    cli.main(["preview", "--generator", "hybrid-pattern", "--out", str(out)], standalone_mode=False)
    assert out.read_bytes().startswith(b"\x89PNG")


def test_without_it_the_name_is_unknown(capsys):
    assert "hybrid-pattern" not in PluginHost()["generator"]
    assert run(["train", "--generator", "hybrid-pattern"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "there is no generator named 'hybrid-pattern'" in error


def test_listing_it_imports_nothing_heavy(installed):
    """In a process of its own: the hooks are imported by every command, also by --help."""
    code = (
        "import sys; from scl_defense.plugins import PluginHost; host = PluginHost();"
        "import click; host.register_commands(click.Group());"
        "print('hybrid-pattern' in host['generator'], 'torch' in sys.modules, 'PIL' in sys.modules)"
    )
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "False", "False"]


@pytest.mark.slow
def test_its_own_tests_pass():
    """The tests that its author would run, in a process of their own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLE), str(ROOT)])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLE / "tests")]
    done = subprocess.run(command, cwd=EXAMPLE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout and "skipped" not in done.stdout


# -- in an environment of its own


def tool(environment: Path, name: str) -> str:
    folder = environment / ("Scripts" if os.name == "nt" else "bin")
    return str(folder / name)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A fresh virtual environment with scl-defense and the example installed from the source tree, not editable.

    An interpreter that has torch outside every virtual environment lends it (no download); else everything is fetched.
    """
    place = tmp_path_factory.mktemp("fresh") / "env"
    base = getattr(sys, "_base_executable", sys.executable)
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    lent = subprocess.run([base, "-c", "import torch, torchvision"], env=clean, capture_output=True).returncode == 0
    subprocess.run(
        [base, "-m", "venv", *(["--system-site-packages"] if lent else []), str(place)], env=clean, check=True
    )
    for source in (ROOT, EXAMPLE):
        copy = _copy_of(source, tmp_path_factory.mktemp("source"))  # building writes beside the sources
        command = [tool(place, "python"), "-m", "pip", "install", "--quiet", str(copy)]
        done = subprocess.run(command, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    yield place
    shutil.rmtree(place, ignore_errors=True)  # gigabytes, and pytest would keep the last three


def _copy_of(source: Path, target: Path) -> Path:
    """What a build of this folder needs, and nothing else."""
    left_out = ("*.egg-info", "__pycache__", "build", ".git", ".venv", "tests", "results", "docs", ".*_cache", "runs")
    return Path(shutil.copytree(source, target / source.name, ignore=shutil.ignore_patterns(*left_out)))


@pytest.mark.install
@pytest.mark.timeout(3600)
def test_installed_used_and_uninstalled(environment, tmp_path):
    """The whole life of a third-party plugin, on the command line."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def call(*arguments):
        command = [tool(environment, "scl-defense"), *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True)

    def listed():
        done = call("plugins", "list", "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    before = listed()
    mine = [row for row in before["components"] if row["distribution"] == "scl-defense-example"]
    assert [(row["kind"], row["name"], row["version"]) for row in mine] == [("generator", "hybrid-pattern", "0.1.0")]
    assert before["quarantined"] == []

    checked = call("plugins", "check", "hybrid-pattern")
    assert checked.returncode == 0 and ", 0 failed" in checked.stdout, checked.stdout + checked.stderr
    trained = call("train", "--generator", "hybrid-pattern", "-g", "pattern=square", *FLAGS, "--name", "mine", "--json")
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "runs" / "mine" / "best.pt").is_file()
    drawn = call("preview", "--generator", "hybrid-pattern", "--out", "sheet.png")
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    refused = call("preview", "--generator", "pgd", "--out", "sheet.png")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "preview" in call("--help").stdout

    pip = [tool(environment, "python"), "-m", "pip", "uninstall", "--quiet", "--yes", "scl-defense-example"]
    subprocess.run(pip, env=clean, check=True)
    after = listed()
    assert "hybrid-pattern" not in {row["name"] for row in after["components"]}
    assert len(after["components"]) == len(before["components"]) - 1
    gone = call("train", "--generator", "hybrid-pattern")
    assert gone.returncode == 2 and gone.stderr.count("\n") == 1, gone.stderr
    assert "there is no generator named 'hybrid-pattern'" in gone.stderr
    assert call("preview", "--generator", "corner-noise", "--out", "x.png").returncode == 2
    assert "preview" not in call("--help").stdout
