"""docs/reliability.md says what the tests do, and no more."""

import re
import runpy
from pathlib import Path

import page
import pytest

TESTS = page.ROOT / "tests"
TEXT = page.PAGE.read_text()


def test_the_table_of_mistakes_is_that_of_the_tests():
    """``python tests/reliability/figures.py --tables`` writes it."""
    assert page.between(TEXT, "bad input") == page.bad_input()
    assert page.between(TEXT, "mutants") == page.score()


def test_every_test_that_the_page_names_exists():
    named = set(re.findall(r"`([\w/]+\.py)(?:::(test_\w+))?`", TEXT))
    named = {(file, test) for file, test in named if not file.startswith("tests/")}
    assert len(named) > 50
    for file, test in named:
        functions = re.findall(r"^def (test_\w+)", (TESTS / file).read_text(), re.MULTILINE)
        assert not test or test in functions, f"{file}::{test}"


def test_every_command_and_file_of_the_suite_that_the_page_names_exists():
    for name in set(re.findall(r"`(?:python )?((?:tests|\.ci)/[\w/.]+)", TEXT)):
        assert (page.ROOT / name).exists(), name


def test_the_figures_are_of_a_full_run():
    """Over the numbers that are promised, as the command wrote them."""
    table = page.between(TEXT, "figures")
    if "has not been run" in table:
        pytest.skip("run: python tests/reliability/figures.py")
    figures = dict(re.findall(r"^\| ([^|]+?) \| ([\d,]+)", table, re.MULTILINE))

    def number(name):
        return int(figures[name].replace(",", ""))

    assert number("of them processes killed at random or in a save") >= 50
    assert number("inputs fuzzed") >= 100_000
    assert f"survived: {figures['faults injected']} " in table


def test_every_mutant_that_lives_is_explained_and_nothing_else():
    living = [
        (Path(module).stem, one["in"], one["was"], one["is"])
        for module, found in page.known_mutants().items()
        for one in found["survivors"]
    ]
    assert len(page.known_mutants()) >= 1
    text = (page.HERE / "mutants.md").read_text()
    entry = r"^- \*\*(\w+)\*\*(?: `([^`]*)`)?: `` (.+?) `` → `` (.+?) ``\n  \S.{20,}"
    explained = re.findall(entry, text, re.MULTILINE)
    assert sorted(explained) == sorted(living)


def test_an_audit_that_could_not_look_is_no_good_news():
    verdict = runpy.run_path(str(page.ROOT / ".ci" / "audit"))["verdict"]
    known = {"name": "a", "version": "1", "vulns": []}
    bad = {"name": "b", "version": "2", "vulns": [{"id": "X-1", "fix_versions": ["3"]}]}
    unknown = {"name": "c", "skip_reason": "not found"}
    assert verdict({"dependencies": [known]}) == (0, ["1 of 1 packages were looked up, 0 advisories"])
    assert verdict({"dependencies": [known, unknown]})[0] == 3 and verdict({"dependencies": []})[0] == 3
    code, lines = verdict({"dependencies": [known, bad, unknown]})
    assert code == 1 and lines[0] == "b 2: X-1, repaired in 3" and lines[-1] == "nothing is known of: c"
