"""The documentation site: the reference is the code, links lead somewhere, and it builds without a warning."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from scl_defense import hookspecs
from scl_defense.cli.app import COMMANDS, cli
from scl_defense.config import options_of
from scl_defense.plugins import PluginHost
from scl_defense.registry import KINDS

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "docs" / "site"


def module(name):
    spec = importlib.util.spec_from_file_location(name, SITE / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def reference():
    return module("reference")


@pytest.fixture(scope="module")
def pages(reference):
    return reference.pages()


def test_every_command_and_option_is_on_the_page(reference, pages):
    page, seen = pages["reference/cli.md"], 0
    for name in COMMANDS:
        for path, command in reference.walk(cli.get_command(click.Context(cli), name), f"scl-defense {name}"):
            section = page.partition(f"# `{path}`\n")[2].partition("\n## ")[0]
            assert section, path
            for option in command.params:
                for flag in option.opts if isinstance(option, click.Option) else ():
                    seen += 1
                    assert f"`{flag}" in section or f", {flag}" in section, f"{path} {flag}"
    assert seen > 100 and "`scl-defense plugins new`" in page


def test_every_component_and_option_is_on_the_page(pages):
    page, host, seen = pages["reference/components.md"], PluginHost(), 0
    for kind in KINDS:
        for entry in host[kind]:
            section = page.partition(f"### {kind} `{entry.name}`\n")[2].partition("\n### ")[0]
            assert section, f"{kind} {entry.name}"
            for option in options_of(entry.load()):
                seen += 1
                assert f"| `{option.name}` |" in section
    assert seen > 200
    assert "L = contrast \\* SupCon" not in page and "L = contrast * SupCon" in page  # equations stand as they are


def test_every_hook_is_on_the_page(pages):
    hooks = [name for name, value in vars(hookspecs).items() if hasattr(value, "scl_defense_spec")]
    assert len(hooks) == 8
    for name in [*hooks, "Register"]:
        assert f"## `{name}`\n" in pages["reference/hooks.md"]
    assert "def load_checkpoint(path: Path, options: dict[str, Any])" in pages["reference/hooks.md"]


def test_every_field_of_a_result_is_on_the_page(pages):
    from scl_defense_benchmarks import results
    from scl_defense_benchmarks.catalogue import Flag

    page = pages["reference/result.md"]
    for cls in (results.EvaluationResult, results.AttackRow, results.WorstCase, Flag):
        section = page.partition(f"## {cls.__name__}\n")[2].partition("\n## ")[0]
        assert len(dataclasses.fields(cls)) > 5
        for field in dataclasses.fields(cls):
            assert f"| `{field.name}` |" in section, f"{cls.__name__}.{field.name}"
    assert results.SCHEMA in page


def test_a_file_holds_what_the_page_names(pages, tmp_path, capsys):
    """Against a real one: every key of the JSON, in it and in its rows."""
    from scl_defense.cli.app import run

    short = ["--limit", "48", "--val-limit", "24", "--val-steps", "1", "--epochs", "1", "--quiet"]
    assert run(["train", "--generator", "none", *short, "--out", str(tmp_path), "--name", "a"]) == 0
    best, out = str(tmp_path / "a" / "best.pt"), tmp_path / "result.json"
    assert run(["benchmark", best, "--attacks", "native:fgsm,noise", "--n", "20", "--out", str(out), "--quiet"]) == 0
    found = json.loads(out.read_text())
    page = pages["reference/result.md"]
    keys = {*found, *found["attacks"][0], *found["worst_cases"][0], *found["flags"][0], *found["conclusion"]}
    assert len(keys) > 50
    for key in keys:
        assert f"`{key}`" in page, key


def test_docstrings_become_markdown(reference):
    def thing():
        """A line with ``code``, a name_with_underscores and :class:`scl_defense.types.Batch`::

            L = a * b   |x|

        After it. Alternatives a | b, <tags> and [brackets], *not* a * b.
        """

    assert reference.docstring(thing) == (
        "A line with `code`, a name\\_with\\_underscores and `Batch`:\n\n"
        "```text\nL = a * b   |x|\n```\n\n"
        "After it. Alternatives a \\| b, &lt;tags&gt; and \\[brackets\\], *not* a \\* b.\n"
    )


def test_the_menu_names_every_page(pages):
    """And nothing else: a page that nobody finds is no documentation."""

    def leaves(part):
        for item in part:
            if isinstance(item, str):
                yield item
            else:
                for below in item.values():
                    yield from leaves(below)

    yaml = pytest.importorskip("yaml", reason="the documentation site is an extra: pip install 'scl-defense[docs]'")
    named = list(leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    written = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    made = {"index.md", "contributing.md", "changelog.md", *pages}
    assert sorted(named) == sorted(written | made) and len(named) == len(set(named))


# -- with mkdocs


@pytest.fixture(scope="module")
def hooks():
    pytest.importorskip("mkdocs", reason="the documentation site is an extra: pip install 'scl-defense[docs]'")
    pytest.importorskip("latex2mathml", reason="the documentation site is an extra: pip install 'scl-defense[docs]'")
    return module("hooks")


@pytest.mark.parametrize(
    ("path", "text", "becomes"),
    [
        ("docs/findings.md", "[a](diagnostics.md#x)", "[a](diagnostics.md#x)"),
        ("docs/tutorials/x.md", "[a](../plugins.md)", "[a](../plugins.md)"),
        ("docs/findings.md", "[`q`](../benchmarks/results/q1-digits/summary.md)",
         "[`q`](repository/benchmarks/results/q1-digits/summary.md)"),
        ("docs/plugins.md", "[e](../plugins/scl-defense-example)",
         "[e](repository/plugins/scl-defense-example/README.md)"),
        ("README.md", "[c](CONTRIBUTING.md) [d](docs/study.md)", "[c](contributing.md) [d](study.md)"),
        ("README.md", "in [`benchmarks/studies`](benchmarks/studies),", "in `benchmarks/studies`,"),
        ("docs/study.md", "[a](https://example.org/a.md) [b](#part)", "[a](https://example.org/a.md) [b](#part)"),
        ("docs/study.md", "`[a](../README.md)`", "`[a](../README.md)`"),
        ("docs/study.md", "```text\n[a](../README.md)\n```", "```text\n[a](../README.md)\n```"),
        ("plugins/scl-defense-example/README.md", "[r](../../README.md)", "[r](../../../index.md)"),
    ],
)  # fmt: skip
def test_links_out_of_the_folder(hooks, path, text, becomes):
    assert hooks.rewritten(text, path) == becomes


def test_equations_become_mathml(hooks):
    inline = '<span class="arithmatex">\\(x &lt; 1\\)</span>'
    block = '<div class="arithmatex">\\[\n\\frac{1}{2}\n\\]</div>'
    page = f"<p>a {inline} b</p>{block}"
    made = hooks.on_page_content(page)
    assert made.count("<math") == 2 and "arithmatex" not in made and "<mfrac>" in made and 'display="block"' in made


@pytest.mark.slow
def test_the_site_builds_without_a_warning(hooks, tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "NO_COLOR": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stdout + done.stderr
    html = {path.relative_to(tmp_path / "site").as_posix(): path.read_text()
            for path in (tmp_path / "site").rglob("*.html")}  # fmt: skip
    assert len(html) > 25 and not any(name.startswith("site/") for name in html)
    for name, text in html.items():
        asked = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', text)
        assert not asked, f"{name} loads {asked[0]}: the pages must open without a network"
        assert "arithmatex" not in text
    assert html["methods.html"].count("<math") > 20
    assert "scl-defense plugins new" in html["reference/cli.html"]
    assert "corner-noise" in html["reference/components.html"]
    for name, text in html.items():  # every link to a page of the site leads to one
        for link in re.findall(r'<a[^>]+href="([^"#:?]+\.html)', text):
            target = os.path.normpath(os.path.join(os.path.dirname(name), link)).replace(os.sep, "/")
            assert target in html or name == "404.html", f"{name} links to {link}"
