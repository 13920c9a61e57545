"""The measurement behind --precision auto: its arithmetic, and that it goes on where it was stopped."""

import importlib.util
import json
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "speed" / "precision.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("precision_script", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def line(network, missed, gained, n=1000, seconds=(1.0, 0.5)):
    return {"network": network, "attack": "pgd", "n": n, "missed": {"auto": missed}, "gained": {"auto": gained},
            "seconds": dict(zip(("fp32", "auto"), seconds, strict=True))}  # fmt: skip


def test_the_gap_is_paired_and_every_network_counts(script):
    lines = [line("a", 5, 2), line("a", 4, 5), line("b", 1, 0, n=2000)]
    found = script.families(lines)["pgd"]["auto"]
    assert (found["points_less"], found["images"], found["time_ratio"]) == (0.075, 4000, 0.5)
    assert not found["within"], "its interval ends above 0.2"
    assert script.families([line("a", 9, 7, n=20_000)])["pgd"]["auto"]["within"]
    assert found["networks"]["a"]["points_less"] == 0.1 and found["networks"]["b"]["points_less"] == 0.05
    low, high = found["interval"]
    width = 2 * 1.96 * 100 * (17 / 4000 - 0.00075**2) ** 0.5 / 4000**0.5
    assert low < 0.075 < high and high - low == pytest.approx(width, abs=0.01)
    assert not script.families([line("a", 30, 2)])["pgd"]["auto"]["within"]
    hidden = [line("a", 0, 0, n=100_000), line("b", 30, 0)]
    assert script.families(hidden)["pgd"]["auto"]["points_less"] < 0.2
    assert not script.families(hidden)["pgd"]["auto"]["within"], "one bad network is not hidden by good ones"


def test_it_measures_and_goes_on(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(script, "NETWORKS", {"digits": {"data": "digits", "eps": "0.1", "model": "small-cnn"}})
    out = tmp_path / "found.json"
    base = ["--data-root", str(tmp_path), "--runs", str(tmp_path / "runs"), "--out", str(out), "--n", "40",
            "--seeds", "1", "--limit", "128", "--epochs", "1", "--device", "cpu"]  # fmt: skip
    script.main([*base, "--attacks", "fgsm"])
    first = json.loads(out.read_text())
    (only,) = first["lines"]
    assert only["n"] == 40 and set(only["robust"]) == {"fp32", "auto"}
    made = []
    monkeypatch.setattr(script, "_line", lambda *given: made.append(given[2]) or {**only, "attack": given[2]})
    script.main([*base, "--attacks", "fgsm,native:pgd:steps=2"])
    assert made == ["native:pgd:steps=2"] and json.loads(out.read_text())["lines"][0] == only
    with pytest.raises(SystemExit, match="was measured with"):
        script.main([*base[:-6], "--limit", "64", "--epochs", "1"])
