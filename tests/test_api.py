"""The public API: the list in docs/api.md is the code, third parties need nothing else, old names warn and then go."""

import ast
import inspect
import re
import warnings
from importlib import import_module
from pathlib import Path

import pytest

import scl_defense
from scl_defense.deprecation import (
    SclDefenseDeprecationWarning,
    deprecated,
    old_names,
    removed_in,
    warn_deprecated,
)

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "api.md").read_text()
MODULES = {
    module: re.findall(r"`(\w+)`", names)
    for module, names in re.findall(r"^\| `(scl_defense\.\w+)` \| (.*) \|$", PAGE, flags=re.MULTILINE)
}
SOURCES = [
    path
    for root in (ROOT / "scl_defense", ROOT / "plugins", ROOT / "benchmarks")
    for path in root.rglob("*.py")
    if "build" not in path.parts
]


def test_the_package_is_the_list():
    section = PAGE.partition("## `scl_defense`\n")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)
    assert sorted(listed) == sorted(scl_defense.__all__)
    assert all(getattr(scl_defense, name) is not None for name in listed)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_listed_name_is_there(module):
    found = import_module(module)
    assert MODULES[module] and all(hasattr(found, name) for name in MODULES[module])
    if hasattr(found, "__all__") and module != "scl_defense.data":
        assert set(MODULES[module]) == set(found.__all__)
    if module in ("scl_defense.losses", "scl_defense.models", "scl_defense.threat"):
        own = {
            name
            for name, value in vars(found).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == module
        }
        assert own <= set(MODULES[module]), "public by its name and not on the page: list it or give it an underscore"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_listed_name_says_what_it_is(module):
    found = import_module(module)
    for name in MODULES[module]:
        value = getattr(found, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value) or module == "scl_defense.types", f"{module}.{name} has no docstring"


def test_plugins_get_by_with_what_is_public():
    """First-party plugins and the distributions in plugins/: every name that they import is on the page."""
    seen, missing = 0, []
    for path in SOURCES:
        if not path.is_relative_to(ROOT / "plugins"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "scl_defense":
                public = scl_defense.__all__ if node.module == "scl_defense" else MODULES.get(str(node.module), [])
                seen += len(node.names)
                missing += [f"{path.relative_to(ROOT)}: {node.module}.{a.name}" for a in node.names
                            if a.name not in public]  # fmt: skip
    assert seen > 50 and missing == []


def test_commands_and_variables_are_the_list():
    from scl_defense.cli.app import COMMANDS

    section = PAGE.partition("## Outside Python\n")[2].partition("\n## ")[0]
    commands = re.search(r"The commands (.*?),\s+their options", section, flags=re.DOTALL)
    assert commands is not None and set(re.findall(r"`(\w+)`", commands[1])) == set(COMMANDS)
    used = {name for path in SOURCES for name in re.findall(r"\bSCL_DEFENSE_[A-Z_]+\b", path.read_text())}
    assert set(re.findall(r"`(SCL_DEFENSE_[A-Z_]+)`", section)) == used


# -- old names


def test_a_deprecated_function_works_and_warns_on_the_callers_line():
    @deprecated(since="0.4", instead="new_name")
    def old_name(a, *, b=2):
        """What it does."""
        return a + b

    with pytest.warns(SclDefenseDeprecationWarning) as caught:
        assert old_name(1, b=5) == 6
    (warning,) = caught
    assert str(warning.message).endswith("old_name is deprecated since 0.4 and goes away in 0.5; write new_name")
    assert warning.filename == __file__ and old_name.__doc__ == "What it does."


def test_a_deprecated_class_warns_when_it_is_made_and_its_subclasses_do_not():
    @deprecated(since="1.9", instead="New")
    class Old:
        def __init__(self, value):
            self.value = value

    class Mine(Old):
        pass

    with pytest.warns(SclDefenseDeprecationWarning, match=r"since 1\.9 and goes away in 1\.10; write New") as caught:
        made = Old(3)
    assert made.value == 3 and isinstance(made, Old) and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Mine(4).value == 4


def test_a_name_that_moved_is_found_where_it_was():
    attribute = old_names("scl_defense.somewhere", {"adversarial_nce": ("scl_defense.losses:infonce", "0.4")})
    from scl_defense.losses import infonce

    with pytest.warns(
        SclDefenseDeprecationWarning, match=r"somewhere\.adversarial_nce .* write scl_defense\.losses\.inf"
    ):
        assert attribute("adversarial_nce") is infonce
    with pytest.raises(AttributeError, match="has no attribute 'other'"):
        attribute("other")


def test_it_is_shown_without_being_asked_for():
    """Python hides a DeprecationWarning outside __main__; this one is for people who run commands."""
    assert not issubclass(SclDefenseDeprecationWarning, DeprecationWarning)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        warn_deprecated("--old", since="0.4", instead="--new")
    assert [str(warning.message) for warning in caught] == [
        "--old is deprecated since 0.4 and goes away in 0.5; write --new"
    ]


@pytest.mark.parametrize("since", ["0.4.1", "4", "next", "0.x", ""])
def test_a_version_of_another_form_is_an_error_where_it_is_written(since):
    with pytest.raises(ValueError, match=r"must be MAJOR\.MINOR"):
        deprecated(since=since, instead="x")
    with pytest.raises(ValueError, match=r"must be MAJOR\.MINOR"):
        old_names("m", {"a": ("b:c", since)})


def overdue(source: str, version: str) -> list[str]:
    """The ``since`` of every deprecation in a source text that this version should no longer hold."""
    numbers = tuple(int(part) for part in version.split(".")[:2])
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or ast.unparse(node.func).rpartition(".")[2] not in (
            "deprecated", "warn_deprecated", "old_names",
        ):  # fmt: skip
            continue
        texts = [
            ast.literal_eval(k.value) for k in node.keywords if k.arg == "since" and isinstance(k.value, ast.Constant)
        ]
        if ast.unparse(node.func).endswith("old_names") and isinstance(node.args[1], ast.Dict):
            texts += [since for _, since in ast.literal_eval(node.args[1]).values()]
        found += [since for since in texts if tuple(map(int, removed_in(since).split("."))) <= numbers]
    return found


def test_nothing_that_was_to_go_away_is_still_here():
    late = {path.relative_to(ROOT).as_posix(): overdue(path.read_text(), scl_defense.__version__) for path in SOURCES}
    assert len(late) > 50 and not {path: since for path, since in late.items() if since}


@pytest.mark.parametrize(("version", "late"), [("0.4.7", []), ("0.5.0", ["0.4"]), ("1.0", ["0.4"])])
def test_what_is_overdue_is_found(version, late):
    assert overdue('@deprecated(since="0.4", instead="x")\ndef f(): pass', version) == late
    assert overdue('__getattr__ = old_names(__name__, {"a": ("b:c", "0.4")})', version) == late
    assert overdue('deprecation.warn_deprecated("x", since="0.4", instead="y")', version) == late
