"""Names, provenance and errors that lead to the right name."""

import sys

import pytest

from scl_defense.errors import ComponentError, Interrupted, SclDefenseError, UserError, nearest
from scl_defense.registry import KINDS, Owner, Registry

TOYS, TOOLS = Owner("toys", "1.0", "toys.hooks"), Owner("tools", "2.1", "tools.hooks")


class Component:
    pass


def filled(*names, owner=TOYS):
    registry = Registry("generator")
    for name in names:
        registry.add(name, Component, summary="Does a thing.", owner=owner)
    return registry


def message(registry, name):
    with pytest.raises(UserError) as caught:
        registry.get(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- what may be registered


@pytest.mark.parametrize("name", ["pgd", "contrastive-pgd", "art:pgd", "resnet18", "1-step", "a.b", "art:x:y"])
def test_good_names(name):
    registry = filled(name)
    assert registry.get(name) is Component
    assert registry.entry(name).owner is TOYS and registry.entry(name).kind == "generator"
    assert name in registry and registry.names() == [name]


@pytest.mark.parametrize("name", ["", "PGD", "my pgd", "-pgd", "pgd:", ":pgd", "a/b", "pgd\n", "übel", "a_b", None, 3])
def test_bad_names(name):
    with pytest.raises(ValueError, match="generator name"):
        filled(name)


@pytest.mark.parametrize("target", ["os.path", "os.path:", ":Class", "a b:C", "m:C.D", "m:C()", "m:1", 3, None, len])
def test_bad_targets(target):
    with pytest.raises(TypeError, match="'x'"):
        Registry("generator").add("x", target, summary="s", owner=TOYS)


@pytest.mark.parametrize("summary", ["", "  ", "two\nlines", None, 3])
def test_bad_summaries(summary):
    with pytest.raises(ValueError, match="summary"):
        Registry("generator").add("x", Component, summary=summary, owner=TOYS)


def test_summary_is_required():
    with pytest.raises(TypeError):
        Registry("generator").add("x", Component, owner=TOYS)


def test_one_owner_cannot_take_a_name_twice():
    registry = filled("pgd")
    with pytest.raises(ValueError, match=r"'pgd' is registered twice by toys 1\.0"):
        registry.add("pgd", Component, summary="Again.", owner=TOYS)
    assert registry.get("pgd") is Component


def test_a_refused_registration_leaves_nothing():
    registry = Registry("generator")
    for wrong in ({"target": 3}, {"summary": ""}):
        with pytest.raises((TypeError, ValueError)):
            registry.add("x", **{"target": Component, "summary": "s", "owner": TOYS, **wrong})
    assert len(registry) == 0 and "x" not in registry and registry.names() == [] and list(registry) == []


# -- listing


def test_listing_is_sorted_and_complete():
    registry = filled("zeta", "alpha", "mid")
    registry.add("alpha", Component, summary="Theirs.", owner=TOOLS)
    assert registry.names() == ["alpha", "mid", "zeta"]
    assert [entry.qualified for entry in registry] == ["toys:alpha", "tools:alpha", "toys:mid", "toys:zeta"]
    assert len(registry) == 3


def test_listing_imports_nothing(monkeypatch):
    registry = Registry("attack")
    registry.add("slow", "module_that_is_not_there:Class", summary="Later.", owner=TOYS)
    assert [entry.summary for entry in registry] == ["Later."]
    assert registry.entry("slow").target == "module_that_is_not_there:Class"


# -- asking by name


def test_unknown_name_suggests_the_nearest():
    text = message(filled("contrastive-pgd", "uniform", "corner"), "contrastve-pgd")
    assert "no generator named 'contrastve-pgd'" in text
    assert "did you mean 'contrastive-pgd'?" in text
    assert "scl-defense plugins list generators" in text


def test_unknown_name_far_from_everything_suggests_nothing():
    assert "did you mean" not in message(filled("uniform"), "qqqqq")
    assert "did you mean" not in message(Registry("generator"), "pgd")


def test_the_nearest_name_does_not_depend_on_the_order():
    names = ["pgd-b", "pgd-a", "pgd-c"]
    assert nearest("pgd-x", names) == nearest("pgd-x", reversed(names)) == nearest("pgd-x", set(names)) != ""


def test_two_owners_of_a_name_are_both_named():
    registry = filled("pgd", "other")
    registry.add("pgd", dict, summary="Theirs.", owner=TOOLS)
    text = message(registry, "pgd")
    assert "toys 1.0" in text and "tools 2.1" in text
    assert "'toys:pgd'" in text and "'tools:pgd'" in text
    assert registry.get("toys:pgd") is Component and registry.get("tools:pgd") is dict
    assert set(registry.conflicts()) == {"pgd"}
    assert [entry.owner for entry in registry.conflicts()["pgd"]] == [TOYS, TOOLS]


def test_qualified_names_always_work():
    registry = filled("pgd", "art:pgd")
    assert registry.get("toys:pgd") is Component
    assert registry.entry("toys:art:pgd").name == "art:pgd"
    message(registry, "tools:pgd")
    message(registry, "toys:nothing")
    message(registry, "toys:")


def test_a_grouped_name_that_is_also_a_qualified_one_is_ambiguous():
    """``art:pgd`` of toys, and ``pgd`` of a distribution called art: which one runs must not be a matter of luck."""
    registry = filled("art:pgd")
    registry.add("pgd", dict, summary="Theirs.", owner=Owner("art", "1.20", "art.hooks"))
    text = message(registry, "art:pgd")
    assert "toys 1.0" in text and "art 1.20" in text


# -- loading


def test_a_target_is_imported_only_when_asked_for(tmp_path, monkeypatch):
    (tmp_path / "late_module.py").write_text("class Late:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry("model")
    registry.add("late", "late_module:Late", summary="s", owner=TOYS)
    assert "late_module" not in sys.modules
    assert registry.get("late").__name__ == "Late"
    assert sys.modules.pop("late_module").Late.__name__ == "Late"


@pytest.mark.parametrize(
    ("source", "target", "says"),
    [
        ("import nothing_like_this", "m_bad:X", "ModuleNotFoundError"),
        ("1 / 0", "m_bad:X", "ZeroDivisionError"),
        ("class (", "m_bad:X", "SyntaxError"),
        ("", "m_bad:Missing", "AttributeError"),
        ("raise ImportError('libfoo.so\\n  not found')", "m_bad:X", "libfoo.so not found"),
        ("", "m_absent.deep:X", "ModuleNotFoundError"),
    ],
)
def test_a_target_that_cannot_be_imported_names_its_owner(tmp_path, monkeypatch, source, target, says):
    (tmp_path / "m_bad.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry("generator")
    registry.add("bad", target, summary="s", owner=TOYS)
    with pytest.raises(ComponentError, match=r"generator 'bad' of toys 1\.0 cannot be imported") as caught:
        registry.get("bad")
    sys.modules.pop("m_bad", None)
    assert says in str(caught.value) and target in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None


# -- the errors themselves


def test_exit_codes():
    assert SclDefenseError.exit_code == ComponentError.exit_code == 1
    assert UserError.exit_code == 2
    assert [Interrupted("stopped", number).exit_code for number in (2, 15)] == [130, 143]
    assert all(issubclass(kind, SclDefenseError) for kind in (UserError, ComponentError, Interrupted))


def test_kinds_are_the_hooks():
    from scl_defense import hookspecs

    hooks = {name for name in vars(hookspecs) if name.startswith("register_")}
    assert hooks - {"register_commands"} == {f"register_{kind}s" for kind in KINDS}
