"""Plugins as users install them: what they add, how names are resolved, and what is recorded."""

import hashlib
import sys
from pathlib import Path

import pytest
from fake_site import GOOD, INSTALLED, READER, write

from scl_defense import hookspecs
from scl_defense.errors import ComponentError, UserError
from scl_defense.plugins import default_host
from scl_defense.registry import KINDS

HOOKS = sorted(name for name, value in vars(hookspecs).items() if hasattr(value, f"{hookspecs.PROJECT}_spec"))

# -- a good plugin


def test_every_kind_of_component_comes_in_by_its_hook(site):
    site.install(
        "toys",
        """
        from scl_defense import hookimpl

        @hookimpl
        def register_generators(register):
            register("my-generator", "nowhere_at_all:Part", summary="One generator.")

        @hookimpl
        def register_trainers(register):
            register("my-trainer", "nowhere_at_all:Part", summary="One trainer.")

        @hookimpl
        def register_attacks(register):
            register("my-attack", "nowhere_at_all:Part", summary="One attack.")

        @hookimpl
        def register_models(register):
            register("my-model", "nowhere_at_all:Part", summary="One model.")

        @hookimpl
        def register_datasets(register):
            register("my-dataset", "nowhere_at_all:Part", summary="One dataset.")

        @hookimpl
        def register_loggers(register):
            register("my-logger", "nowhere_at_all:Part", summary="One logger.")
        """,
        version="2.5",
    )
    host = site.host()
    assert host.quarantined == []
    for kind in KINDS:
        entry = host[kind].entry(f"my-{kind}")
        assert (entry.kind, entry.summary, str(entry.owner)) == (kind, f"One {kind}.", "toys 2.5")
        assert host[kind].names() == [f"my-{kind}"]
    assert host.provenance() == [{"plugin": "toys", "distribution": "toys", "version": "2.5"}]
    assert host.loaded["toys"].source == "toys"
    assert "nowhere_at_all" not in sys.modules


def test_a_class_may_be_registered_itself(site):
    site.install(
        "toys",
        """
        from scl_defense import hookimpl

        class Part:
            pass

        @hookimpl
        def register_models(register):
            register("part", Part, summary="A model.")
        """,
    )
    assert site.host()["model"].get("part").__name__ == "Part"


def test_a_plugin_with_commands_alone_is_a_plugin(site):
    site.install(
        "toys",
        """
        from scl_defense import hookimpl

        @hookimpl
        def register_commands(cli):
            cli.append("toys")
        """,
    )
    host, cli = site.host(), []
    assert host.quarantined == [] and list(host.loaded) == ["toys"]
    host.register_commands(cli)
    assert cli == ["toys"]


def test_the_first_answer_to_load_checkpoint_wins(site):
    site.install("aaa", READER + "\n    answer = lambda path, options: None\n")
    site.install("bbb", READER + "\n    answer = lambda path, options: (path, options)\n")
    host = site.host()
    assert host.call("load_checkpoint", path=Path("x.pt"), options={"model": "m"}) == (Path("x.pt"), {"model": "m"})
    sys.modules["bbb"].answer = lambda path, options: None
    assert host.call("load_checkpoint", path=Path("x.pt"), options={}) is None
    assert sys.modules["aaa"].seen and sys.modules["bbb"].seen


def test_load_checkpoint_may_say_what_is_wrong_with_a_file(site):
    site.install("aaa", READER + "\n    def answer(path, options):\n        raise UserError('aaa: file is cut off')\n")
    with pytest.raises(UserError, match="cut off"):
        site.host().call("load_checkpoint", path=Path("x.pt"), options={})


# -- names


def test_one_name_of_two_distributions(site):
    for name in ("aaa", "bbb"):
        site.install(name, GOOD.replace('"{name}"', '"shared"'), version={"aaa": "1.5", "bbb": "0.3"}[name])
        (site.folder / f"{name}_parts.py").write_text(f"class Part:\n    of = '{name}'\n")
    host = site.host()
    assert host.quarantined == []
    with pytest.raises(UserError) as caught:
        host["generator"].get("shared")
    for said in ("aaa 1.5", "bbb 0.3", "'aaa:shared'", "'bbb:shared'"):
        assert said in str(caught.value)
    assert [host["generator"].get(f"{name}:shared").of for name in ("aaa", "bbb")] == ["aaa", "bbb"]
    assert list(host["generator"].conflicts()) == ["shared"]
    assert host["attack"].conflicts() == {}


def test_a_component_that_cannot_be_imported_is_an_error_only_when_asked_for(site):
    site.install("toys", version="3.1")
    host = site.host()
    assert host["generator"].names() == ["toys"] and host.quarantined == []
    with pytest.raises(ComponentError, match=r"generator 'toys' of toys 3\.1 cannot be imported from toys_parts:Part"):
        host["generator"].get("toys")


@pytest.mark.parametrize("by", ["toys", "point"])
def test_plugins_can_be_switched_off_by_distribution_or_entry_point(site, by):
    site.install("other").install("toys", "raise RuntimeError('was imported')", point="point")
    host = site.host(disabled=[by])
    assert host["generator"].names() == ["other"] and host.quarantined == []
    assert "toys" not in sys.modules


def test_the_environment_switches_plugins_off(site, monkeypatch):
    site.install("aaa").install("bbb").install("ccc")
    monkeypatch.setenv("SCL_DEFENSE_DISABLE_PLUGINS", " aaa , ccc,," + ",".join(INSTALLED))
    host = default_host()
    assert host["generator"].names() == ["bbb"]
    assert default_host() is host
    monkeypatch.setenv("SCL_DEFENSE_DISABLE_PLUGINS", "bbb," + ",".join(INSTALLED))
    assert default_host()["generator"].names() == ["aaa", "ccc"]


def test_the_trace_shows_every_hook_call(site, monkeypatch, capsys):
    monkeypatch.setenv("SCL_DEFENSE_TRACE", "1")
    site.install("toys").host()
    assert "register_generators" in capsys.readouterr().err
    monkeypatch.delenv("SCL_DEFENSE_TRACE")
    site.host()
    assert capsys.readouterr().err == ""


# -- one file


def test_one_file_is_a_plugin(site, tmp_path):
    path = write(
        tmp_path,
        "mine.py",
        """
        from dataclasses import dataclass
        from scl_defense import hookimpl

        @dataclass
        class Mine:
            steps: "int" = 3

        @hookimpl
        def register_generators(register):
            register("mine", Mine, summary="My idea.")
        """,
    )
    host = site.host(files=[path])
    assert host["generator"].get("mine")().steps == 3
    entry = host["generator"].entry("mine")
    assert entry.owner.name == "mine" and entry.owner.source == str(path)
    (record,) = host.provenance()
    assert record["version"] == hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    path.write_text(path.read_text().replace("= 3", "= 4"))
    changed = site.host(files=[str(path)])
    assert changed["generator"].get("mine")().steps == 4
    assert changed.provenance()[0]["version"] != record["version"]


def test_a_file_with_a_name_of_the_standard_library_harms_nothing(site, tmp_path):
    import json

    host = site.host(files=[write(tmp_path, "json.py", GOOD)])
    assert host["generator"].names() == ["mine"]
    assert sys.modules["json"] is json


def test_two_files_of_one_stem(site, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = write(tmp_path / "a", "mine.py", GOOD.replace('"{name}"', '"first"'))
    second = write(tmp_path / "b", "mine.py", GOOD.replace('"{name}"', '"second"'))
    host = site.host(files=[first, second])
    assert host["generator"].names() == ["first", "second"]
    assert len({record["plugin"] for record in host.provenance()}) == 2


# -- the page of hooks


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_says_when_it_is_called_and_which_answer_counts(hook):
    text = getattr(hookspecs, hook).__doc__ or ""
    assert "called" in text or "answer" in text
    assert "first answer" in text or "every answer counts" in text
    options = getattr(getattr(hookspecs, hook), f"{hookspecs.PROJECT}_spec")
    assert options["firstresult"] == ("first answer" in text)


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_implemented_by_a_plugin_in_the_tests(hook):
    files = list(Path(__file__).parent.rglob("*.py"))
    assert Path(__file__) in files
    assert any(f"def {hook}(" in path.read_text() for path in files), f"no test has a plugin with the hook {hook}"
