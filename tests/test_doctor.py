"""``scl-defense doctor``: what it says of a sound machine, and of planted faults."""

import json
import re
import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from scl_defense.cli import doctor
from scl_defense.plugins import PluginHost, default_host

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def sound():
    """One whole examination of this machine, as plain data."""
    return json.loads(json.dumps(doctor.examined(default_host())))


def findings_of(call, *arguments, **keywords):
    findings = []
    call(*arguments, findings, **keywords)
    return findings


def test_a_sound_machine_has_nothing_broken(sound):
    assert sound["broken"] == 0, sound["findings"]
    assert all(finding["severity"] == "note" and finding["remedy"] for finding in sound["findings"])
    assert sound["versions"]["scl-defense"] == metadata.version("scl-defense")
    assert sound["versions"]["torch"] == metadata.version("torch") and None not in sound["versions"].values()


def test_devices_and_precisions_are_tried_not_assumed(sound):
    names = [row["device"] for row in sound["devices"]]
    assert names[0] == "cpu" and ("cuda:0" in names) == torch.cuda.is_available()
    for row in sound["devices"]:
        assert row["precision"].keys() == {"fp32", "bf16"}
        assert all(trial["works"] == (trial["milliseconds"] is not None) for trial in row["precision"].values())
    assert sound["devices"][0]["precision"]["fp32"]["milliseconds"] > 0


def test_data_is_looked_for_and_never_downloaded(sound, tmp_path, monkeypatch):
    sets = {row["name"]: row for row in sound["data"]["sets"]}
    assert sets["digits"]["found"] is True and sets["digits"]["detail"] == "360 test images, 10 classes"
    assert sets["npz"]["found"] is None and "path of yours" in sets["npz"]["detail"]
    monkeypatch.setenv("SCL_DEFENSE_DATA_ROOT", str(tmp_path / "nowhere"))
    found = []
    sets = {row["name"]: row for row in doctor._data(default_host(), found)["sets"]}
    assert sets["cifar10"]["found"] is False and str(tmp_path / "nowhere") in sets["cifar10"]["detail"]
    assert ["SCL_DEFENSE_DATA_ROOT" in finding.what for finding in found] == [True]
    assert not (tmp_path / "nowhere").exists()


def test_every_extra_says_what_it_is_for():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(doctor.EXTRAS) == set(extras) - doctor.OF_DEVELOPMENT


def test_missing_extras_are_named(monkeypatch):
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "tensorboard" else version(name))
    rows = {row["extra"]: row for row in doctor._extras()}
    assert rows["tensorboard"] == {
        "extra": "tensorboard", "for": "train --logger tensorboard", "missing": ["tensorboard"],
    }  # fmt: skip


# -- planted faults


def test_a_dependency_that_is_missing_or_not_admitted_is_broken(monkeypatch):
    real = doctor._version
    planted = {"torchattacks": "3.5.1", "safetensors": None}
    monkeypatch.setattr(doctor, "_version", lambda name: planted[name] if name in planted else real(name))
    findings = {finding.what: finding for finding in findings_of(doctor._versions)}
    broken = sorted(what for what, finding in findings.items() if finding.severity == "broken")
    assert len(broken) == 2
    assert broken[0] == "safetensors is missing" and broken[1].startswith("torchattacks 3.5.1 is not admitted (wanted:")
    assert findings[broken[0]].remedy == "pip install 'safetensors>=0.6'"


def test_what_two_packages_ask_for_is_compared(monkeypatch):
    """The known one: torchattacks that pins an old requests. It is no fault of the run, but pip will act on it."""
    asked = {"scl-defense": ["torchattacks>=3"], "torchattacks": ["requests~=2.25.1", "numpy>=1 ; extra == 'x'"]}
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: asked.get(name, []))
    installed = {"scl-defense": "0.1.0", "torchattacks": "3.5.1", "requests": "2.34.2"}
    monkeypatch.setattr(doctor, "_version", installed.get)
    (finding,) = findings_of(doctor._versions)
    assert finding.severity == "note"
    assert finding.what == "torchattacks 3.5.1 asks for requests~=2.25.1, installed is 2.34.2"
    installed["requests"] = "2.25.1"
    assert findings_of(doctor._versions) == []


def test_a_plugin_that_was_set_aside_and_a_component_that_cannot_be_imported_are_broken(site):
    site.install("torn", "import no_such_module_at_all")
    site.install("hollow")  # its component's module does not exist
    found = []
    report = doctor._plugins(PluginHost(), found, importable=True)
    assert [row["distribution"] for row in report["set_aside"]] == ["torn"]
    assert report["not_importable"] == ["generator hollow"]
    assert sorted(finding.severity for finding in found) == ["broken", "broken"]
    assert any("No module named 'no_such_module_at_all'" in finding.what for finding in found)
    assert any("SCL_DEFENSE_DISABLE_PLUGINS=torn" in finding.remedy for finding in found)
    assert any("hollow_parts:Part" in finding.what for finding in found)


def test_two_owners_of_a_name_are_a_note(site):
    for name in ("aaa", "bbb"):
        site.install(name, (
            "from scl_defense import hookimpl\n\n@hookimpl\ndef register_models(register):\n"
            "    register('shared', 'torch.nn:Identity', summary='A model.')\n"
        ))  # fmt: skip
    (finding,) = findings_of(lambda found: doctor._plugins(PluginHost(), found, importable=True))
    assert finding.severity == "note" and finding.remedy == "write aaa:shared or bbb:shared"


def test_an_installation_without_its_own_components_is_broken(monkeypatch):
    host = PluginHost(disabled=["scl-defense"])
    (finding,) = [f for f in findings_of(lambda found: doctor._plugins(host, found, importable=True))
                  if f.severity == "broken"]  # fmt: skip
    assert "not registered" in finding.what
    monkeypatch.setenv("SCL_DEFENSE_DISABLE_PLUGINS", "scl-defense")  # then it was meant
    notes = findings_of(lambda found: doctor._plugins(host, found, importable=True))
    assert {finding.severity for finding in notes} == {"note"}


def test_without_torch_the_rest_is_still_said(monkeypatch, capsys):
    def importing(name):
        raise ImportError("libtorch.so: cannot open shared object file")

    monkeypatch.setattr("builtins.__import__", lambda name, *rest, real=__import__: (
        importing(name) if name == "torch" and not rest else real(name, *rest)))  # fmt: skip
    result = CliRunner().invoke(doctor.command, ["--json"])
    assert result.exit_code == 1
    report = json.loads(result.output)
    assert report["devices"] == [] and report["data"] is None and report["broken"] == 1
    assert "libtorch.so" in report["findings"][0]["what"]
    shown = CliRunner().invoke(doctor.command, [])
    assert shown.exit_code == 1 and "1 broken, see above" in shown.output


@pytest.mark.parametrize(
    ("cores", "asked", "used", "says"),
    [
        (8, None, 8, None),
        (8, "8", 8, None),
        (2, None, 16, "export OMP_NUM_THREADS=2"),
        (1.5, None, 4, "export OMP_NUM_THREADS=1"),
        (0.5, "1", 1, None),
        (8, "1", 1, "torch uses 1 of 8 cores"),
        (8, "many", 8, "'many' is no number of threads"),
        (8, "0", 8, "is no number of threads"),
        (8, "4,2", 4, "torch uses 4 of 8 cores"),
        (8, None, None, None),
    ],
)
def test_threads_against_cores(cores, asked, used, says):
    found = doctor.thread_findings(cores, asked, used)
    assert len(found) == (says is not None)
    assert says is None or says in f"{found[0].what} {found[0].remedy}"


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000\n"}, [1.5]),
        ({"cpu.max": "max 100000\n"}, []),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, [2.0]),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, []),
        ({"cpu.max": "nonsense"}, []),
        ({}, []),
    ],
)
def test_a_containers_quota_is_read(tmp_path, files, quota):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert doctor._quotas(tmp_path) == quota


def test_a_device_that_computes_nonsense_is_broken(monkeypatch):
    nan = lambda images, weight: images[:, :1] * torch.nan  # noqa: E731
    fake = SimpleNamespace(**{name: getattr(torch, name) for name in ("device", "Generator", "rand", "autograd")})
    fake.nn = SimpleNamespace(functional=SimpleNamespace(conv2d=nan))
    assert doctor._trial(fake, "cpu", "fp32", []) == {"works": False, "milliseconds": None}
    severities = [findings_of(lambda found, p=p: doctor._trial(fake, "cpu", p, found))[0] for p in ("fp32", "bf16")]
    assert [finding.severity for finding in severities] == ["broken", "note"]
    assert "not finite" in severities[0].what


# -- the screen


def test_the_screen_fits_80_columns_and_has_no_colour_in_a_pipe(sound, monkeypatch):
    monkeypatch.setattr(doctor, "examined", lambda host: sound)
    result = CliRunner().invoke(doctor.command, [])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert max(map(len, lines)) <= 80 and "\x1b" not in result.output
    for word in ("versions", "devices", "threads", "data, looked for in", "plugins", "extras", "found"):
        assert any(line.strip().startswith(word) for line in lines), word
    assert lines[-1] == "nothing is broken; next: scl-defense train --generator contrastive-pgd"


def test_a_broken_finding_is_exit_code_1(sound, monkeypatch):
    finding = {"severity": "broken", "what": "torch is missing", "remedy": "pip install torch"}
    monkeypatch.setattr(doctor, "examined", lambda host: {**sound, "broken": 1, "findings": [finding]})
    told = CliRunner().invoke(doctor.command, ["--json"])
    assert told.exit_code == 1 and json.loads(told.output)["findings"] == [finding]
    shown = CliRunner().invoke(doctor.command, [])
    assert shown.exit_code == 1 and re.search(r"broken +torch is missing\. Pip install torch", shown.output)


def test_the_command_is_there(capsys):
    from scl_defense.cli.app import COMMANDS

    assert COMMANDS["doctor"][0] == "scl_defense.cli.doctor"
