"""README, CONTRIBUTING and docs say what is so: their commands and code run, every hook and component is named."""

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import statistics
import subprocess
import sys
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


@pytest.mark.slow
def test_the_plugin_page_runs(tmp_path, monkeypatch, capsys):
    """Its code becomes a file, its commands are run on it."""
    page = (ROOT / "docs" / "plugins.md").read_text()
    code, its_test = blocks(page, "python")
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(code)
    Path("test_mine.py").write_text(its_test)
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": "", "PYTHONPATH": str(ROOT)}
    tested = [sys.executable, "-m", "pytest", "-q", "-p", "scl_defense.pytest_plugin", "-p", "no:cacheprovider"]
    done = subprocess.run(tested, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "2 passed" in done.stdout, done.stdout + done.stderr
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
        for path in top.rglob("__init__.py")
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
    "name",
    ["README.md", "CONTRIBUTING.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))],
)
def test_relative_links_lead_somewhere(name):
    page = ROOT / name
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()) if "://" not in link]
    for link in links:
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", ["README.md", "docs/api.md"])
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """Each page is one session."""
    monkeypatch.chdir(tmp_path)
    code, session = blocks((ROOT / page).read_text(), "python"), {"__name__": "session"}
    assert code
    for block in code:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(block, page, "exec"), session)
    if page == "docs/api.md":
        assert {"training.png", "attacks.pdf", "page.html"} <= {path.name for path in tmp_path.iterdir()}


# -- the tutorials run, from the first line to the last

# Not run: they change an environment, or wait for one. Everything else that a tutorial types is.
OUTSIDE = ("python3 -m venv ", "pip install ")


class Reader:
    """Somebody who follows a page: files are written, commands typed, Python typed into one session.

    Runs are short and evaluations small; every option of the page is kept beside that.
    """

    def __init__(self, capsys):
        self.capsys, self.session, self.typed = capsys, {"__name__": "session"}, []

    def follow(self, page):
        text = (ROOT / "docs" / "tutorials" / page).read_text()
        for language, block in re.findall(r"^```(\w+)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
            named = re.match(r"# (\w+\.(?:py|toml))\n", block)
            if named:
                Path(named[1]).write_text(block)
            elif language == "python":
                with contextlib.redirect_stdout(io.StringIO()) as said:
                    exec(compile(block, page, "exec"), self.session)
                self.typed.append(said.getvalue())
            elif language == "console":
                for line in block.strip().splitlines():
                    assert line.startswith("$ "), line
                    self.type(line.removeprefix("$ "))
            else:
                assert language == "text", language

    def type(self, line):
        if line.startswith(OUTSIDE):
            return
        program, *arguments = shlex.split(line)
        if program == "python":
            with contextlib.redirect_stdout(io.StringIO()) as said:
                runpy.run_path(arguments[0], run_name="__main__")
            self.typed.append(said.getvalue())
            return
        assert program == "scl-defense", line
        code = run([*arguments, *self.shorter(arguments)])
        shown = self.capsys.readouterr()
        assert code == 0, f"{line}: {shown.err}"
        self.typed.append(shown.out)

    def shorter(self, arguments):
        if arguments[0] == "train":
            return FAST
        if arguments[0] == "benchmark":
            own_file = "--model" in arguments  # the tiny network of a page takes no time as it is
            return [] if own_file else ["--n", "20", "--probes", "none"]
        return []


@pytest.fixture
def reader(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield Reader(capsys)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.slow
def test_train_and_audit_in_five_minutes(reader):
    reader.follow("five-minutes.md")
    train, audit = reader.typed[1], reader.typed[2]
    advice = re.search(r"^next: (.*)$", train, flags=re.MULTILINE)
    page = (ROOT / "docs" / "tutorials" / "five-minutes.md").read_text()
    assert advice is not None and f"$ {advice[1]}" in page  # the page's next command is the one that train names
    assert "worst case" in audit and re.search(r"\d+% at linf 0\.1", reader.typed[-1])


@pytest.mark.slow
def test_audit_your_own_model(reader):
    reader.follow("your-own-model.md")
    wrong, right = reader.typed[1:3]
    told = " ".join(wrong.split())
    assert "not trustworthy, because clean-accuracy-at-chance" in told
    advice = re.search(r"0\.\.255 normalisation: add (--mean \S+ --std [\d.]+\d)", told)
    page = (ROOT / "docs" / "tutorials" / "your-own-model.md").read_text()
    assert advice is not None and f"MyNet {advice[1]} --attacks fgsm,pgd" in page  # the next command does as it is told
    assert "not trustworthy" not in right and "none (clean)" in right


def test_write_a_generator(reader):
    reader.follow("generator.md")
    assert "steps (int [1, 1000]) [default: 5]  gradient steps" in reader.typed[0]
    assert reader.typed[2].strip().endswith(" 0 failed") and "6 of 6 cells to do" in reader.typed[3]
    # The mistake that the page describes fails as it says.
    text = Path("repel.py").read_text()
    wrong = text.replace("rng=context.rng)[None]", "rng=context.rng)[None].mul(1.2).clamp(-0.1, 1.1)")
    Path("repel.py").write_text(wrong)
    assert wrong != text and run(["plugins", "check", "repel", "--plugin", "repel.py"]) == 1
    assert "FAIL  repel  inside-box: it left the box [0, 1] (linf:0.1" in reader.capsys.readouterr().out


@pytest.mark.slow
def test_read_a_result(reader):
    reader.follow("read-a-result.md")
    told = reader.typed[2]
    assert re.search(r"^clean \d+\.\d% of 20 images$", told, flags=re.MULTILINE)
    for attack in ("fgsm", "pgd", "square", "noise"):
        assert re.search(rf"^{attack} +linf:0\.1  \d+\.\d%  \[.*\]  ok$", told, flags=re.MULTILINE), told
    assert Path("images.csv").is_file() and Path("examples.safetensors").is_file()


@pytest.mark.slow
def test_reproduce_the_study(reader, monkeypatch):
    """The hours of the published study are a dry run here; the small one is done in full."""
    os.symlink(ROOT / "benchmarks", "benchmarks")

    def type_(line, whole=reader.type):
        if line.endswith("q1-generators.toml --size digits"):
            line += " --dry-run"
        if line.endswith("--tables-only"):
            line = "scl-defense study benchmarks/studies/smoke.toml --tables-only"
        whole(line)

    monkeypatch.setattr(reader, "type", type_)
    reader.follow("reproduce.md")
    assert "PGD-AT" in reader.typed[0] and "36 of 36 cells to do" in reader.typed[1]
    assert sorted(path.name for path in Path("studies/smoke-digits").glob("table.*")) == [
        "table.csv", "table.md", "table.tex",
    ]  # fmt: skip


def test_every_tutorial_is_followed_by_a_test():
    pages = {path.name for path in (ROOT / "docs" / "tutorials").glob("*.md")}
    assert pages and all(f'follow("{page}")' in Path(__file__).read_text() for page in pages)


def test_the_how_to_page_types_commands_that_exist():
    """Its commands need files and devices of the reader's; the options are held to the commands."""
    from scl_defense.cli.app import COMMANDS, cli

    lines = [line.removeprefix("$ ") for block in blocks((ROOT / "docs" / "how-to.md").read_text(), "console")
             for line in block.strip().splitlines()]  # fmt: skip
    assert len(lines) > 8
    for line in lines:
        words = [word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)]
        if words[0] == "eval" or "COMPLETE" in line:
            continue
        assert words[0] == "scl-defense" and words[1] in COMMANDS, line
        command = cli.get_command(None, words[1])
        known = {flag for option in command.params for flag in option.opts}
        assert {word for word in words if word.startswith("-")} <= known, line


# -- the terminal


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell):
    """The script that the how-to page evaluates, and what it then asks for."""
    page = (ROOT / "docs" / "how-to.md").read_text()
    assert f"_SCL_DEFENSE_COMPLETE={shell}_source scl-defense" in page
    call = [sys.executable, "-c", "from scl_defense.cli import main; main()"]

    def ask(**given):
        environment = {**os.environ, **given}
        done = subprocess.run(call, env=environment, capture_output=True, text=True)
        return done.stdout

    assert f"_SCL_DEFENSE_COMPLETE={shell}_complete" in ask(_SCL_DEFENSE_COMPLETE=f"{shell}_source")
    if shell == "bash":
        words = {"plug": "plugins", "plugins ne": "new", "benchmark --fail": "--fail-under"}
        for typed, wanted in words.items():
            given = {"COMP_WORDS": f"scl-defense {typed}", "COMP_CWORD": str(len(typed.split()))}
            assert f"plain,{wanted}" in ask(_SCL_DEFENSE_COMPLETE="bash_complete", **given).splitlines()


@pytest.mark.parametrize(
    "arguments",
    [["plugins", "list"], ["plugins", "list", "contrastive-pgd"], ["plugins", "list", "attacks"], ["plugins", "--help"],
     ["--help"], ["info", "--help"]],
)  # fmt: skip
def test_screens_fit_80_columns_and_have_no_colour_in_a_pipe(arguments, capsys):
    run(arguments)
    shown = capsys.readouterr().out
    assert shown and "\x1b" not in shown
    assert max(map(len, shown.splitlines())) <= 80, max(shown.splitlines(), key=len)


def test_no_color_is_honoured(monkeypatch):
    """On a terminal that can show colour: styles are gone, the text is not."""
    from scl_defense.cli import common

    def drawn():
        console = common.console()
        with console.capture() as captured:
            console.print("[red]worst case[/red]")
        return captured.get()

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[31m" in drawn()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[31m" not in drawn() and "worst case" in drawn()


# -- who to cite


def test_the_citation_file_says_what_the_metadata_says():
    yaml = pytest.importorskip("yaml", reason="PyYAML reads it; the documentation extra brings it")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cited["cff-version"] == "1.2.0" and cited["type"] == "software" and cited["message"]
    assert (cited["title"], str(cited["version"]), cited["license"]) == (
        project["name"], project["version"], project["license"],
    )  # fmt: skip
    assert cited["authors"] and cited["abstract"] and cited["keywords"]
