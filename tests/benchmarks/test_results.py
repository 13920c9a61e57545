"""Intervals, JSON, the file and the table."""

import io
import json
import os

import pytest
import torch
from rich.console import Console
from scl_defense_benchmarks.battery import Plan, PlannedAttack, plan_attacks
from scl_defense_benchmarks.display import render
from scl_defense_benchmarks.evaluate import evaluate
from scl_defense_benchmarks.native import FGSM
from scl_defense_benchmarks.results import OUTCOMES, SCHEMA, write
from scl_defense_benchmarks.statistics import wilson

from scl_defense.errors import UserError
from scl_defense.threat import ThreatModel


class Broken(FGSM):
    def __call__(self, *arguments):
        raise RuntimeError("[red]no such[/red] thing: " + "long " * 60)


class Lazy(FGSM):
    def __call__(self, classifier, images, labels, threat, rng):
        return images.clone()


@pytest.fixture(scope="module")
def result(network, digits, host):
    threat = ThreatModel("linf", "0.2")
    plan = plan_attacks(
        "fgsm,pgd:steps=3:rel_step=0.5,native:pgd:loss=margin:steps=4:norm=l2,noise,cw:c=10:steps=40",
        host=host,
        threat=threat,
        budgets={"l2": "0.5"},
    )
    failing = (PlannedAttack("broken", "broken", Broken(), threat), PlannedAttack("lazy", "lazy", Lazy(), threat))
    return evaluate(network, digits[0][1400:1450], digits[1][1400:1450], Plan(threat, plan.attacks + failing), seed=3)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals(successes, n, low, high):
    interval = wilson(successes, n)
    assert interval == pytest.approx((low, high), abs=5e-5)
    z, p = 1.959963984540054, successes / n
    centre, half = (p + z * z / (2 * n)), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    formula = ((centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n))
    assert interval == pytest.approx(formula, abs=1e-9)


def test_json_holds_the_whole_evaluation(result):
    data = result.to_json()
    assert data["schema"] == SCHEMA == "scl-defense-result/1"
    assert data["outcome_codes"] == OUTCOMES
    assert (data["n"], data["seed"], data["norm"], data["eps"]) == (50, 3, "linf", "0.2")
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    rows = {row["label"]: row for row in data["attacks"]}
    assert rows["pgd:steps=3:rel_step=0.5"]["options"] == {"steps": 3, "rel_step": 0.5, "random_start": True}
    assert rows["cw:c=10:steps=40"]["options"]["c"] == [10.0]
    assert rows["broken"]["robust_accuracy"] is rows["lazy"]["robust_accuracy"] is None
    for row in rows.values():
        assert len(row["outcomes"]) == len(row["distances"]) == 50
    code = OUTCOMES
    for row in data["attacks"]:
        assert row["outcomes"].count(code["broken"]) == row["broken"]
        assert row["outcomes"].count(code["misclassified"]) == 50 - data["clean_correct"]
        if row["robust_accuracy"] is not None:
            assert row["robust_accuracy"] == row["outcomes"].count(code["robust"]) / 50  # unmoved is no evidence
    for case in data["worst_cases"]:
        assert case["robust_accuracy"] == case["outcomes"].count(code["robust"]) / 50
        same = [row for row in data["attacks"] if (row["norm"], row["eps"]) == (case["norm"], case["eps"])]
        for row in same:
            for one, together in zip(row["outcomes"], case["outcomes"], strict=True):
                assert one != code["broken"] or together == code["broken"]


def test_rows_are_found_by_label(result):
    assert result.row("noise").access == "control"
    with pytest.raises(KeyError):
        result.row("none such")
    assert result.worst_case is result.worst_cases[0]


def test_the_file_is_json_with_one_line_for_each_list_of_images(result, tmp_path):
    path = tmp_path / "new folder" / "résult.json"
    write(result, path)
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == result.to_json()
    assert len(text.splitlines()) < 60 * (len(result.attacks) + len(result.worst_cases))
    line = next(line for line in text.splitlines() if '"outcomes"' in line)
    assert line.count(",") >= 49
    assert os.listdir(path.parent) == [path.name]


def test_the_old_file_survives_a_failed_write(result, tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    path.write_text("old")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="No space left"):
        write(result, path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["result.json"]


def table_of(result, width=80):
    console = Console(file=io.StringIO(), width=width, force_terminal=False, color_system=None)
    console.print(render(result))
    return console.file.getvalue()


def test_the_table_fits_80_columns_and_shows_every_number(result):
    text = table_of(result)
    assert max(map(len, text.splitlines())) <= 80
    assert f"{100 * result.row('fgsm').robust_accuracy:.1f}" in text
    low, high = result.clean_interval
    assert f"{100 * low:.1f} to {100 * high:.1f}" in text
    assert "worst case" in text and "n = 50" in text and "seed 3" in text
    lines = text.splitlines()
    for label in ("broken", "lazy"):
        line = next(line for line in lines if line.strip().startswith(label))
        assert " - " in line and "%" not in line
    assert "failed" in text and "invalid" in text
    assert "median l2 distance" in text
    assert "[red]no such[/red]" in " ".join(text.split())  # a library's message is text, never markup


def test_every_flag_says_what_why_and_what_to_do(result):
    text = " ".join(table_of(result).split())
    assert {"attack-failed", "moved-nothing"} <= {flag.id for flag in result.flags}
    for flag in result.flags:
        for part in (flag.id, flag.what, flag.why, flag.remedy):
            assert " ".join(part.split()) in text


def test_an_unknown_worst_case_is_no_number(network, digits):
    threat = ThreatModel("linf", "0.2")
    plan = Plan(threat, (PlannedAttack("lazy", "lazy", Lazy(), threat),))
    text = table_of(evaluate(network, digits[0][:8], digits[1][:8], plan, seed=0))
    line = next(line for line in text.splitlines() if "worst case" in line)
    assert "unknown" in line and " - " in line


def test_torch_numbers_do_not_leak_into_the_json(result):
    def walk(value):
        assert isinstance(value, (dict, list, str, int, float, bool, type(None)))
        assert not isinstance(value, torch.Tensor)
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            walk(item)

    walk(result.to_json())
