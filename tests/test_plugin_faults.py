"""Every kind of bad plugin: it is set aside with one line that names its distribution, and the others go on."""

import sys
from pathlib import Path

import pytest
from fake_site import GOOD, READER, write

from scl_defense.errors import UserError
from scl_defense.registry import KINDS


def only_reason(host, *, owner, count=1):
    """The reason of the quarantined plugin; it names the distribution and is one line."""
    assert len(host.quarantined) == count
    found = next(item for item in host.quarantined if item.owner.name == owner)
    assert found.plugin not in host.loaded
    assert found.reason and "\n" not in found.reason
    assert "Traceback" in found.details
    return found.reason


BAD = {
    "missing import": ("import package_that_is_not_there", "package_that_is_not_there"),
    "raises at import": ("raise RuntimeError('no\\n licence')", "RuntimeError: no licence"),
    "exits at import": ("raise SystemExit('bye')", "SystemExit"),
    "syntax error": ("def register_generators(register:", "SyntaxError"),
    "raising hook": (
        """
        from scl_defense import hookimpl

        @hookimpl
        def register_generators(register):
            raise OSError("disk on fire")
        """,
        "disk on fire",
    ),
    "misspelt hook": (
        """
        from scl_defense import hookimpl

        @hookimpl
        def register_generator(register):
            register("toy", "m:C", summary="s")
        """,
        "'register_generator' is marked as a hook but there is no such hook; did you mean 'register_generators'?",
    ),
    "forgotten marker": (
        """
        from scl_defense import hookimpl

        @hookimpl
        def register_generators(register):
            register("toy", "m:C", summary="s")

        def register_models(register):
            register("toy", "m:C", summary="s")
        """,
        "'register_models' has a hook's name but no @hookimpl marker",
    ),
    "no marker at all": (
        """
        def register_generators(register):
            register("toy", "m:C", summary="s")
        """,
        "'register_generators' has a hook's name but no @hookimpl marker",
    ),
    "wrong argument": (
        """
        from scl_defense import hookimpl

        @hookimpl
        def register_generators(registry):
            registry("toy", "m:C", summary="s")
        """,
        "registry",
    ),
    "too many arguments": (
        """
        from scl_defense import hookimpl

        @hookimpl
        def register_generators(register, context):
            pass
        """,
        "context",
    ),
    "no hook": ("x = 1", "it implements no hook"),
    "bad name": (GOOD.replace("{name}", "Bad Name"), "'Bad Name' must be lower case"),
    "bad target": (GOOD.replace(":Part", ".Part"), "must be a class or 'module:Class'"),
    "no summary": (GOOD.replace(', summary="A generator."', ""), "summary"),
    "several-line summary": (GOOD.replace("A generator.", "A\\nB"), "one non-empty line"),
    "unknown option": (GOOD.replace("summary=", "tags=1, summary="), "tags"),
    "same name twice": (
        """
        from scl_defense import hookimpl

        @hookimpl
        def register_generators(register):
            register("toy", "m:C", summary="s")
            register("toy", "m:D", summary="s")
        """,
        "'toy' is registered twice by faulty 1.0",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_plugin_is_set_aside_and_the_others_go_on(site, fault, book):
    source, says = BAD[fault]
    site.install("aaa").install("faulty", source).install("zzz")
    host = site.host()
    assert says in only_reason(host, owner="faulty")
    assert list(host.loaded) == ["aaa", "zzz"]
    assert host["generator"].names() == ["aaa", "zzz"]
    assert [record["distribution"] for record in host.provenance()] == ["aaa", "zzz"]
    assert all(host[kind].names() == [] for kind in KINDS if kind != "generator")
    book("bad plugins")


def test_an_entry_point_to_nothing_is_set_aside(site):
    site.install("aaa").install("faulty", target="module_that_is_not_there").install("ccc", target="ccc:missing_object")
    host = site.host()
    assert "module_that_is_not_there" in only_reason(host, owner="faulty", count=2)
    assert "missing_object" in only_reason(host, owner="ccc", count=2)
    assert host["generator"].names() == ["aaa"]


def test_a_plugin_that_fails_half_way_leaves_nothing(site):
    site.install(
        "faulty",
        """
        from scl_defense import hookimpl

        @hookimpl
        def register_generators(register):
            register("one", "m:C", summary="s")
            register("two", "m:C", summary="s")

        @hookimpl
        def register_attacks(register):
            register("three", "m:C", summary="s")
            raise ValueError("after three names")

        @hookimpl
        def load_checkpoint(path, options):
            return "still here"
        """,
    )
    host = site.host()
    assert "after three names" in only_reason(host, owner="faulty")
    assert all(len(host[kind]) == 0 for kind in KINDS)
    assert host.call("load_checkpoint", path=Path("x"), options={}) is None


def test_two_entry_points_of_one_distribution_cannot_share_a_name_and_the_second_leaves_nothing(site):
    clash = GOOD.replace('register("{name}"', 'register("unique", "m:C", summary="s")\n        register("toys"')
    site.install("toys", point="first").install("toys", clash, module="toys_more", point="second")
    host = site.host()
    assert "'toys' is registered twice by toys 1.0" in only_reason(host, owner="toys")
    assert list(host.loaded) == ["first"]
    assert host["generator"].names() == ["toys"]


def test_two_distributions_with_one_entry_point_name_do_not_harm_each_other(site):
    """Nothing tells the authors of two packages not to call their entry point ``plugin`` both."""
    site.install("aaa", GOOD + READER + "\n    answer = lambda p, o: 'aaa'\n", point="plugin")
    site.install("bbb", point="plugin")
    host = site.host()
    assert {"aaa"} <= {record["distribution"] for record in host.provenance()}
    assert host.call("load_checkpoint", path=Path("x"), options={}) == "aaa"
    assert host["generator"].entry("aaa").owner.name == "aaa"
    told = {owner.name for owner in host.loaded.values()} | {item.owner.name for item in host.quarantined}
    assert told == {"aaa", "bbb"}
    assert ("bbb" in host["generator"]) == ("bbb" in {owner.name for owner in host.loaded.values()})


def test_a_raising_command_hook_sets_the_plugin_aside_and_the_others_go_on(site):
    commands = "\n    @hookimpl\n    def register_commands(cli):\n        cli.append('{name}')\n"
    site.install("aaa", GOOD + commands)
    site.install("faulty", GOOD + commands + "        raise KeyError('no such parent')\n")
    site.install("zzz", GOOD + commands)
    host, cli = site.host(), []
    host.register_commands(cli)
    assert [name for name in cli if name != "faulty"] == ["aaa", "zzz"]
    (aside,) = host.quarantined
    assert aside.owner.name == "faulty" and "no such parent" in aside.reason


def test_whatever_can_be_used_is_in_the_provenance(site):
    """Also after a plugin was set aside late: a checkpoint must record everything that may have made it."""
    site.install("faulty", GOOD + "\n    @hookimpl\n    def register_commands(cli):\n        raise KeyError('late')\n")
    host = site.host()
    host.register_commands([])
    recorded = {record["distribution"] for record in host.provenance()}
    assert {entry.owner.name for kind in KINDS for entry in host[kind]} <= recorded


# -- one file: it was asked for by name, so a fault is an error


@pytest.mark.parametrize("fault", [fault for fault in BAD if fault != "exits at import"])
def test_a_bad_file_is_an_error_of_one_line(site, tmp_path, fault):
    source, says = BAD[fault]
    path = write(tmp_path, "broken.py", source)
    with pytest.raises(UserError) as caught:
        site.host(files=[path])
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    if "1.0" not in says:  # a file has a fingerprint instead of a version
        assert says in str(caught.value)


@pytest.mark.parametrize("name", ["missing.py", "folder", "notes.txt", ""])
def test_what_is_no_python_file_is_an_error_of_one_line(site, tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("from scl_defense import hookimpl")
    with pytest.raises(UserError, match="plugin file") as caught:
        site.host(files=[tmp_path / name])
    assert "\n" not in str(caught.value)


def test_a_broken_file_leaves_no_module_behind(site, tmp_path):
    before = set(sys.modules)
    with pytest.raises(UserError):
        site.host(files=[write(tmp_path, "broken.py", "import colorsys\nraise RuntimeError")])
    assert not {name for name in set(sys.modules) - before if "faulty" in name}
