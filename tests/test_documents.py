"""README, CONTRIBUTING and docs say what is so: their commands and code run, every hook and component is named."""

import json
import re
import shlex
import statistics
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from scl_defense import hookspecs
from scl_defense.cli.app import run
from scl_defense.plugins import default_host

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
HOOKS = [name for name, value in vars(hookspecs).items() if hasattr(value, "scl_defense_spec")]
FAST = ["--limit", "96", "--batch-size", "32", "--val-limit", "48", "--val-steps", "1", "--epochs", "1"]


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_ci_script_calls_the_readmes_test_command():
    (setup,) = [block for block in blocks(README, "console") if "pytest" in block]
    train, test = [line.removeprefix("$ ") for line in setup.strip().splitlines() if line.startswith("$ ")]
    assert test in (ROOT / ".ci" / "run").read_text().splitlines()
    assert train.endswith(".venv/bin/scl-defense train --generator contrastive-pgd")
    assert all("pip install" in line and line.startswith("python3 -m venv .venv && ") for line in (train, test))


def test_every_hook_is_documented():
    page = (ROOT / "docs" / "plugins.md").read_text()
    assert len(HOOKS) == 8
    for hook in HOOKS:
        assert f"`{hook}(" in page


def test_every_built_in_component_is_named_in_the_readme():
    host, seen = default_host(), 0
    for kind in ("generator", "trainer", "model", "dataset"):
        for name in host[kind].names():
            seen += 1
            assert f"`{name}`" in README, f"{kind} {name} is not in the README"
    assert seen > 15


def test_the_plugin_page_runs(tmp_path, monkeypatch, capsys):
    """Its code becomes a file, its commands are run on it."""
    page = (ROOT / "docs" / "plugins.md").read_text()
    (code,) = blocks(page, "python")
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(code)
    commands = [line.removeprefix("$ scl-defense ") for line in blocks(page, "console")[0].strip().splitlines()]
    assert len(commands) == 2
    for command in commands:
        extra = FAST if command.startswith("train") else []
        assert run([*shlex.split(command), *extra]) == 0, capsys.readouterr()
    assert "FAIL" not in capsys.readouterr().out


def test_the_readmes_table_is_the_measured_one():
    """Mean and standard deviation over seeds, from the published results."""
    lines = (ROOT / "benchmarks" / "results" / "q1-digits" / "results.jsonl").read_text().splitlines()
    methods = tomllib.loads((ROOT / "benchmarks" / "studies" / "q1-generators.toml").read_text())["methods"]
    arms: dict[str, list] = {}
    for line in map(json.loads, lines):
        arms.setdefault(methods[line["method"]]["label"], []).append(line)

    def shown(values):
        percent = [100 * value for value in values]
        return f"{statistics.mean(percent):.1f} ± {statistics.stdev(percent):.1f}"

    assert len(arms) == 12
    for label, group in arms.items():
        attacks = [line["batteries"]["standard"]["attacks"] for line in group]
        cells = [
            shown([line["clean"] for line in group]),
            *(shown([found[name]["robust"] for found in attacks]) for name in ("fgsm", "pgd:steps=20")),
            shown([line["worst"] for line in group]),
            f"{group[0]['backwards']:g}",
        ]
        assert f"| {label} | {' | '.join(cells)} |" in README, label
        assert len({line["seed"] for line in group}) >= 3


def test_installing_changes_nothing_else_in_an_environment():
    """torchattacks 3.4.0 to 3.5.1 pin an old requests and would downgrade a user's packages: none is admitted."""
    needed = {Requirement(line).name: Requirement(line) for line in requires("scl-defense") if "extra ==" not in line}
    torchattacks = needed["torchattacks"].specifier
    assert all(torchattacks.contains(version) for version in ("3.3", "3.3.0", "3.5.2", "3.6"))
    assert not any(
        torchattacks.contains(version) for version in ("3.2", "3.4", "3.4.0", "3.4.3", "3.5.0", "3.5.1", "4.0")
    )
    assert needed["torch"].specifier.contains("2.10") and not needed["torch"].specifier.contains("2.9.1")
    assert "requests" not in needed and "timm" not in needed
    for name, requirement in needed.items():
        assert not any(part.operator in ("==", "~=", "===") for part in requirement.specifier), name
        assert any(part.operator == ">=" for part in requirement.specifier), f"{name} has no lower bound"


def test_the_metadata_names_the_pythons_and_the_folders_are_no_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["requires-python"] == ">=3.11"
    assert not (ROOT / "plugins" / "__init__.py").exists() and not (ROOT / "benchmarks" / "__init__.py").exists()
    listed = set(project["tool"]["setuptools"]["packages"])
    found = {
        str(path.parent.relative_to(root)).replace("/", ".")
        for root in (ROOT, ROOT / "plugins", ROOT / "benchmarks")
        for top in root.glob("scl_defense*")
        for path in [*top.glob("__init__.py"), *top.glob("*/__init__.py")]
    }
    assert found == listed


def test_the_study_page_shows_a_recipe_that_is_one(tmp_path):
    from scl_defense_benchmarks.study.cells import check_components, grid
    from scl_defense_benchmarks.study.spec import read_spec

    page = (ROOT / "docs" / "study.md").read_text()
    (recipe,) = blocks(page, "toml")
    (tmp_path / "mine.toml").write_text(recipe)
    for size, cells in ((None, 6), ("mnist", 6)):
        spec = read_spec(tmp_path / "mine.toml", size=size)
        found = grid(spec)
        check_components(spec, found, default_host())
        assert len(found) == cells and [battery.name for battery in spec.batteries] == ["standard", "autoattack"]
    for line in blocks(page, "console")[0].strip().splitlines():
        assert (ROOT / shlex.split(line)[3]).is_file()


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
)
def test_relative_links_lead_somewhere(name):
    page = ROOT / name
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()) if "://" not in link]
    for link in links:
        assert (page.parent / link).exists(), link
