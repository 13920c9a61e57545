"""How cost grows: the fit finds planted laws, the plan's arithmetic by hand, the page is what the results say."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks" / "speed" / "scaling.py")
scaling = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scaling)

MADE = json.loads(scaling.RESULTS.read_text())


def planted(images, steps, noise=0.0):
    return {"F": images * steps, "B": images, "seconds": (0.5 + 2e-3 * images * steps + 7e-3 * images) * (1 + noise)}


def test_planted_laws_are_found():
    rows = [planted(images, steps) for images in (10, 50, 300) for steps in (1, 5, 20)]
    terms, error = scaling.fit(rows, ("F", "B"), "seconds")
    assert terms == pytest.approx({"constant": 0.5, "F": 2e-3, "B": 7e-3}) and error < 1e-9


def test_a_term_that_does_not_matter_gets_nothing_and_never_less():
    rows = [{**planted(images, 3, noise), "G": -(images**0.5)}
            for images, noise in ((10, 0.1), (50, -0.1), (90, 0), (300, 0.1))]  # fmt: skip
    terms, error = scaling.fit(rows, ("F", "G"), "seconds")
    assert min(terms.values()) >= 0 and 0 < error < 0.2


def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="2 rows do not determine 3"):
        scaling.fit([planted(1, 1), planted(2, 2)], ("F", "B"), "seconds")


def test_the_plan_by_hand():
    cluster = scaling.Cluster(gpus=2, peak=100.0, used=0.5, scaling=0.5)  # 50 FLOP a second
    flop = {"forward": 1.0, "to input": 1.0, "to weights": 2.0}
    row = {"forwards": 11, "backwards": 11, "attack_backwards": 10, "epochs": 3}
    hours, rate = scaling.train_hours(row, flop, cluster)  # 11 + 10 + 2 = 23 FLOP an image
    assert rate == pytest.approx(50 / 23) and hours == pytest.approx(3 * 1_281_167 * 23 / 50 / 3600)
    row = {"forwards": 20, "backwards": 20, "share": 0.1}
    assert scaling.evaluation_hours(row, flop, cluster) == pytest.approx(5_000 * 40 / 50 / 3600)


def test_tables_go_between_their_markers():
    page = "before\n<!-- scaling:a -->\nold\n<!-- /scaling:a -->\nafter"
    made = scaling.replaced(page, {"a": "new"})
    assert made == "before\n<!-- scaling:a -->\n\nnew\n\n<!-- /scaling:a -->\nafter"
    assert scaling.replaced(made, {"a": "new"}) == made
    with pytest.raises(ValueError, match="scaling:b"):
        scaling.replaced(page, {"b": "new"})


def test_the_page_is_what_the_committed_results_say():
    page = scaling.PAGE.read_text()
    made = scaling.tables(MADE, scaling.Cluster())
    assert set(re.findall(r"<!-- scaling:(\w+) -->", page)) == set(made)
    assert scaling.replaced(page, made) == page


def test_counted_passes_follow_their_laws_exactly():
    """One step of PGD is one pass each way, of every restart at every radius; training adds one."""
    for row in MADE["evals"]:
        assert row["backwards"] == row["steps"] * row["restarts"] * row["points"]
    for row in MADE["trains"]:
        assert row["backwards"] == pytest.approx(1 + (row["steps"] if row["generator"] == "pgd" else 0))
    targeted = {row["classes"]: row["backwards"] for row in MADE["classes"] if row["attack"] == "apgd-t"}
    assert targeted[4] / 3 == targeted[6] / 5 == targeted[10] / 9 and targeted[10] == targeted[100] == targeted[1000]


def test_a_measurement_is_one(tmp_path):
    made = scaling.evaluation(images=8, steps=3, restarts=2, points=2)
    assert made["backwards"] == 3 * 2 * 2 and made["seconds"] > 0
    trained = scaling.training(tmp_path, "cross-entropy", "pgd", {"steps": 3}, images=64)
    assert trained["backwards"] == pytest.approx(4) and trained["seconds"] > 0


@pytest.mark.slow
def test_two_processes_make_the_passes_of_one(tmp_path):
    one, two = (scaling.training(tmp_path, "cross-entropy", "pgd", {"steps": 2}, images=128, ranks=n) for n in (1, 2))
    assert (two["ranks"], two["forwards"], two["backwards"]) == (2, one["forwards"], one["backwards"])
    assert two["wall"] > 0
