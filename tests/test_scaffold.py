"""``plugins new``: what it writes works before anybody has touched it, for every kind of component."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from scl_defense import plugins
from scl_defense.cli.app import run
from scl_defense.config import options_of
from scl_defense.errors import UserError
from scl_defense.plugins import PluginHost
from scl_defense.registry import KINDS
from scl_defense.scaffold import command_of, write_plugin
from scl_defense.testing import check_entry

ROOT = Path(__file__).resolve().parent.parent
OPTION = {
    "generator": "tile",
    "trainer": "weight",
    "attack": "steps",
    "model": "width",
    "dataset": "per_class",
    "logger": "file",
}


def install(folder: Path, site: Path) -> None:
    """As ``pip install -e`` leaves it: the package on the path, name and entry points in the metadata."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = project["entry-points"]["scl_defense"]
    lines = "".join(f"{name} = {target}\n" for name, target in points.items())
    (info / "entry_points.txt").write_text(f"[scl_defense]\n{lines}")


@pytest.fixture
def installed(tmp_path, site, monkeypatch):
    """Called with a kind: a new plugin of it, written and installed in this process."""

    def make(kind: str, name: str = "") -> Path:
        name = name or f"fresh-{kind}"
        folder = write_plugin(name, kind, tmp_path)[0].parent
        install(folder, site.folder)
        monkeypatch.syspath_prepend(folder)
        plugins._cached.cache_clear()
        return folder

    yield make
    plugins._cached.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_found_shows_its_option_and_passes_the_contract(installed, kind, capsys):
    folder = installed(kind)
    host = PluginHost()
    assert host.quarantined == [] and f"fresh-{kind}" in host.loaded
    entry = host[kind].entry(f"fresh-{kind}")
    assert entry.owner.name == folder.name == f"scl-defense-fresh-{kind}" and entry.owner.version == "0.1.0"
    results = check_entry(entry)
    assert [f"{result.check}: {result.message}" for result in results if not result.passed] == []
    assert len(results) > 8
    assert [option.name for option in options_of(entry.load())] == [OPTION[kind]]
    assert run(["plugins", "list", f"fresh-{kind}"]) == 0
    shown = capsys.readouterr().out
    assert f"{kind} fresh-{kind}, from scl-defense-fresh-{kind} 0.1.0" in shown and f"  {OPTION[kind]} (" in shown


def test_listing_them_imports_nothing_heavy(tmp_path):
    for kind in KINDS:
        install(write_plugin(f"fresh-{kind}", kind, tmp_path)[0].parent, tmp_path / "site")
    code = (
        "import sys; from scl_defense.plugins import PluginHost; host = PluginHost(); assert host.quarantined == [];"
        f"assert all('fresh-' + kind in host[kind] for kind in {KINDS!r});"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    paths = [tmp_path / "site", *tmp_path.glob("scl-defense-*"), ROOT, ROOT / "plugins", ROOT / "benchmarks"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr


@pytest.mark.slow
def test_their_own_tests_pass_unchanged(tmp_path):
    """All kinds in one process, as their authors would run them; pytest's plugin comes by its name here."""
    for kind in KINDS:
        install(write_plugin(f"fresh-{kind}", kind, tmp_path)[0].parent, tmp_path / "site")
    folders = sorted(tmp_path.glob("scl-defense-*"))
    assert len(folders) == 6
    paths = [tmp_path / "site", *folders, ROOT, ROOT / "plugins", ROOT / "benchmarks"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "scl_defense.pytest_plugin", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *(str(folder / "tests") for folder in folders)],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "28 passed" in done.stdout and "skipped" not in done.stdout.splitlines()[-1], done.stdout


def test_the_code_is_as_clean_as_the_projects_own(tmp_path):
    ruff = pytest.importorskip("ruff", reason="the linter is an extra of development").find_ruff_bin()
    for kind in KINDS:
        write_plugin(f"a-rather-long-name-of-{kind}", kind, tmp_path)
    rules = ["--isolated", "--line-length", "120", "--target-version", "py311"]
    lint = [ruff, "check", *rules, "--select", "E,F,I,B,UP,SIM,RUF", "--ignore", "RUF001,RUF002,RUF003"]
    done = subprocess.run([*lint, "--no-cache", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    texts = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(texts) == 36 and not any("@" in text.replace("@component", "").replace("@hookimpl", "")
                                        .replace("@pytest", "") for text in texts)  # fmt: skip


@pytest.mark.parametrize("kind", ["generator", "trainer", "model", "dataset", "logger"])
def test_the_command_that_it_ends_with_works(installed, kind, tmp_path, monkeypatch, capsys):
    """With a short run in place of the epochs it names; the attack's is tried below."""
    installed(kind)
    monkeypatch.chdir(tmp_path)
    program, *arguments = command_of(f"fresh-{kind}", kind).split()
    short = ["--limit", "48", "--batch-size", "24", "--val-limit", "24", "--val-steps", "1", "--epochs", "1"]
    assert program == "scl-defense"
    assert run([*arguments, *short, "--quiet", "--name", "a"]) == 0, capsys.readouterr().err
    assert run(["info", "runs/a/best.pt", "--json"]) == 0
    info = json.loads(capsys.readouterr().out.partition("next: ")[2].partition("\n")[2])
    assert f"scl-defense-fresh-{kind}" in {plugin["distribution"] for plugin in info["plugins"]}
    if kind == "logger":
        assert (tmp_path / "runs" / "a" / "metrics.csv").read_text().count("\n") == 2


def test_the_attack_is_one_of_a_battery(installed, tmp_path, capsys):
    installed("attack")
    short = ["--limit", "48", "--val-limit", "24", "--val-steps", "1", "--epochs", "1", "--quiet"]
    assert run(["train", "--generator", "none", *short, "--out", str(tmp_path), "--name", "a"]) == 0
    capsys.readouterr()
    _, *arguments = command_of("fresh-attack", "attack").replace("runs/NAME", str(tmp_path / "a")).split()
    assert run([*arguments, "--n", "20", "--probes", "none", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["attacks"]
    assert row["status"] == "ok" and "fresh-attack" in json.dumps(row)


# -- names, and what is there already


@pytest.mark.parametrize("name", ["My-Noise", "my noise", "my_noise", "-x", "x--y", "3d", "", "é", "../x", "a" * 51])
def test_a_bad_name_is_one_clear_line(tmp_path, capsys, name):
    assert run(["plugins", "new", "--out", str(tmp_path), "--", name]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cannot be a plugin's name; write lower case letters" in error
    assert list(tmp_path.iterdir()) == []


def test_names_that_are_taken(tmp_path):
    with pytest.raises(UserError, match="generator 'pgd' is there already, from scl-defense"):
        write_plugin("pgd", "generator", tmp_path)
    write_plugin("ridge-pgd", "attack", tmp_path)  # of another kind it is free
    with pytest.raises(UserError, match="part of scl-defense"):
        write_plugin("plugins", "model", tmp_path)
    with pytest.raises(UserError, match="did you mean 'generator'"):
        write_plugin("mine", "generators", tmp_path)


@pytest.mark.parametrize("name", ["class", "true", "json", "tensor", "x", "a1-2b", "scl-defense-mine"])
def test_names_that_mean_something_to_python_do_no_harm(installed, name):
    bare = name.removeprefix("scl-defense-")
    assert installed("generator", name).name == f"scl-defense-{bare}"
    host = PluginHost()
    assert host.quarantined == [] and host["generator"].get(bare)().tile == 2


def test_nothing_is_overwritten_and_nothing_is_half_written(tmp_path, capsys, monkeypatch):
    first = ["plugins", "new", "mine", "--kind", "model", "--out", str(tmp_path / "new" / "folder")]
    assert run(first) == 0
    said = capsys.readouterr().out
    assert "next: pip install -e" in said and "plugins check model:mine" in said
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(files) == 6
    assert run(first) == 2 and "exists and is left as it is" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(UserError, match="No space left on device; choose another --out"):
        write_plugin("other", "model", tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name != "new"]


def test_as_json(tmp_path, capsys):
    assert run(["plugins", "new", "mine", "--kind", "logger", "--out", str(tmp_path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["kind"] == "logger" and all(Path(path).is_file() for path in said["files"])


@pytest.mark.install
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_pip_installs_it(tmp_path, kind):
    """Into a fresh environment that sees this one's packages."""
    place = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    (packages,) = place.glob("lib/python*/site-packages")
    own = [path for path in sys.path if path.endswith("site-packages")]
    # addsitedir, not a line with the path: the editable installs there are .pth files themselves.
    (packages / "lent.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in own))
    python = str(place / "bin" / "python")
    folder = write_plugin("fresh", kind, tmp_path)[0].parent
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "-e", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    main = "from scl_defense.cli import main; main()"
    listed = subprocess.run(
        [python, "-c", main, "plugins", "list", "fresh"], env=environment, capture_output=True, text=True
    )
    assert f"  {OPTION[kind]} (" in listed.stdout, listed.stderr
    tested = subprocess.run([python, "-m", "pytest", "-q"], cwd=folder, env=environment, capture_output=True, text=True)
    assert tested.returncode == 0 and "passed" in tested.stdout, tested.stdout + tested.stderr
