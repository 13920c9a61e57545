"""Tables, figures and sentences against results made by hand, where the right answer is known."""

import csv
import io
import itertools

import pytest
from scl_defense_benchmarks.study import figures, summary, tables
from scl_defense_benchmarks.study.cells import grid
from scl_defense_benchmarks.study.spec import read_spec
from scl_defense_benchmarks.study.store import Store

RECIPE = """
title = "By hand"
seeds = [0, 1, 2, 3]
baseline = "corner"
[methods.corner]
label = "corner & noise_1"
role = "control"
[methods.good]
role = "model-free"
[methods.same]
role = "model-free"
[methods.bad]
[batteries.standard]
attacks = "pgd:steps=5,apgd"
[curve]
eps = ["0.05", "0.1"]
[contrasts.one]
better = "good"
than = "bad"
says = "A positive helps"
"""
# Robust test images of 100 in each seed, after pgd and after apgd (which is also the worst case here).
COUNTS = {
    "corner": [(40, 30), (41, 31), (39, 29), (42, 32)],
    "good": [(61, 50), (63, 52), (61, 49), (67, 53)],
    "same": [(40, 31), (41, 30), (39, 30), (42, 31)],
    "bad": [(20, 10), (21, 11), (19, 9), (22, 12)],
}


def line_of(cell, pgd, apgd, **more):
    share = {"pgd:steps=5": pgd / 100, "apgd": apgd / 100}
    rows = {label: {"robust": value, "ball": "linf:0.1", "status": "ok", "median_distance": None}
            for label, value in share.items()}  # fmt: skip
    battery = {"n": 100, "clean": 0.9, "threat": "linf:0.1", "attacks": rows,
               "worst_cases": {"linf:0.1": apgd / 100}, "worst": apgd / 100}  # fmt: skip
    return {
        "cell": cell.id, "method": cell.method, "arm": cell.arm, "data": "digits", "model": "m",
        "context": cell.context, "seed": cell.seed, "recipe": "0" * 64, "n": 100,
        "generator": "corner-noise" if cell.arm == "corner" else "x",
        "threat": "linf:0.1", "clean": 0.9 + cell.seed / 100, "worst": apgd / 100, "batteries": {"standard": battery},
        "curve": {"0.1": apgd / 100, "0.05": pgd / 100}, "flags": [], "epochs": 10, "best_epoch": 3,
        "validation": {"clean": 0.9, "robust": 0.5}, "forwards": 3.0, "backwards": 2.0, "finetune": None,
        "versions": {"torch": "2.99"}, "plugins": {}, "images": "abc",
        "machine": {"processor": "abacus", "cores": 2, "threads": 1, "device": "cpu"},
        "outcomes": "1" * apgd + "0" * (100 - apgd), **more,
    }  # fmt: skip


@pytest.fixture
def made(tmp_path):
    (tmp_path / "hand.toml").write_text(RECIPE)

    def make(edit=lambda lines: lines, failed=(), missing=(), seeds=None):
        spec = read_spec(tmp_path / "hand.toml", seeds=seeds)
        cells = grid(spec)
        lines = [line_of(cell, *COUNTS[cell.arm][cell.seed]) for cell in cells]
        about = tables.About(spec, "scl-defense study hand.toml", tuple(edit(lines)), dict(failed), tuple(missing))
        return about, tables.make_rows(about, cells), cells

    return make


def test_the_csv_holds_the_numbers(made):
    about, rows, _ = made()
    text = tables.comma(about, rows)
    found = {row["arm"]: row for row in csv.DictReader(io.StringIO("".join(
        line for line in text.splitlines(True) if not line.startswith("#"))))}  # fmt: skip
    good = found["good"]
    assert float(good["worst case"]) == pytest.approx((50 + 52 + 49 + 53) / 400)
    assert float(good["worst case sd"]) == pytest.approx(0.0182574, abs=1e-6)  # sd of 50, 52, 49, 53 by hand
    assert float(good["pgd"]) == pytest.approx((61 + 63 + 61 + 67) / 400)
    assert float(good["difference"]) == pytest.approx((20 + 21 + 20 + 21) / 400)
    # Differences 20, 21, 20, 21: sd 0.57735, error 0.288675, t(0.975, 3) = 3.182446.
    assert float(good["seeds low"]) == pytest.approx(0.205 - 0.0028868 * 3.182446, abs=1e-5)
    assert float(good["images low"]) > 0.1 and found["corner"]["difference"] == ""
    assert float(good["backwards in all"]) == 20.0
    # Holm: the smallest of three p-values is tripled.
    p_values = {arm: float(found[arm]["seeds p"]) for arm in ("good", "same", "bad")}
    smallest = min(p_values, key=p_values.get)
    assert float(found[smallest]["p holm"]) == pytest.approx(3 * p_values[smallest])


def test_every_table_says_what_made_it_and_shows_the_same(made):
    about, rows, _ = made()
    shown = tables.markdown(about, rows), tables.comma(about, rows), tables.latex(about, rows)
    for text in (*shown, summary.text(about, rows)):
        for fact in (
            "By hand",
            "scl-defense study hand.toml",
            "torch 2.99",
            "n = 100",
            "linf:0.1",
            "abacus",
            "0, 1, 2, 3",
        ):
            assert fact in text
    assert "| good | 91.5 ± 1.3 | 63.0 ± 2.8 | 51.0 ± 1.8 | 51.0 ± 1.8 | 2 | +20.5 [+19.6, +21.4]" in shown[0]
    assert r"corner \& noise\_1 & 91.5 $\pm$ 1.3" in shown[2] and shown[2].count(r"\\") == 5


def test_beats_needs_both_intervals_and_holm(made):
    about, rows, _ = made()
    text = summary.text(about, rows)
    assert "good **beats** corner & noise_1: +20.5 points" in text
    assert "bad is **worse** than corner & noise_1" in text
    assert "not shown that same differs from corner & noise_1: +0.0 points" in text
    assert "So good earned the cost" in text
    assert "A positive helps: good **beats** bad: +40.5 points" in text
    # pgd says 10 points more than apgd for 3 methods, 12 for good: (10 + 12 + 10 + 10) / 4, the largest is good's.
    assert "pgd reports +10.5 points more than apgd on average over methods, at most +12.0 (good; battery" in text


def test_the_same_mean_from_few_images_is_not_shown(made):
    """+1 point in every seed, each from other images: certain over seeds, nothing over images."""

    def noisy(lines):
        for line in lines:
            k, seed = {"corner": 30, "good": 31}.get(line["arm"], 10), line["seed"]
            outcomes = ["0"] * 100
            for j in range(k):
                outcomes[(j * 7 + (50 if line["arm"] == "good" else 0)) % 100] = "1"
            line |= {"worst": k / 100, "outcomes": "".join(outcomes), "seed": seed}
        return lines

    about, rows, _ = made(noisy)
    good = next(row for row in rows if row.arm == "good").against
    assert good.by_seed.low == pytest.approx(0.01) and good.holm == 0 and good.by_image.low < 0
    assert not good.shown and "not shown that good differs" in summary.text(about, rows)


def test_one_seed_is_an_anecdote(made):
    about, rows, _ = made(seeds=[2])
    text, table = summary.text(about, rows), tables.markdown(about, rows)
    assert "One seed is an anecdote" in text and "One seed is an anecdote" in table
    assert "**beats**" not in text and "good against corner & noise_1: +20.0 points, one seed" in text
    assert "±" not in table.split("|---")[1].split("\n\n")[0] and "[no interval]" in table


def test_other_images_are_no_pair(made):
    def other(lines):
        return [{**line, "images": "xyz"} if line["arm"] == "good" else line for line in lines]

    about, rows, _ = made(other)
    assert next(row for row in rows if row.arm == "good").against is None
    assert "good: its baseline 'corner' has no finished cell to compare with" in summary.text(about, rows)


def test_what_is_missing_is_said(made):
    def fewer(lines):
        lines = [line for line in lines if line["cell"] not in ("bad--s3", "same--s0")]
        lines[0]["batteries"]["standard"]["attacks"]["apgd"]["robust"] = None
        lines[0] |= {"flags": ["gradient-masking"]}
        return lines

    about, rows, _ = made(fewer, failed={"bad--s3": "killed by SIGKILL"}, missing=["same--s0"])
    text, table = summary.text(about, rows), tables.markdown(about, rows)
    for written in (text, table):
        assert "bad--s3: killed by SIGKILL" in written and "same--s0" in written
    assert "bad (3 of 4 seeds)" in table and "*: an attack failed" in table
    assert "gradient-masking: corner & noise_1 s0" in text
    pair = next(row for row in rows if row.arm == "bad").against
    assert pair.by_seed.n == 3  # by seed: 0, 1, 2 against 0, 1, 2


def test_no_control_no_verdict(made):
    about, rows, _ = made()
    for row in rows:
        row.role = None if row.role == "control" else row.role
    assert "whether the model-free methods beat noise is not known" in summary.text(about, rows)


def test_figures_show_what_the_lines_hold(made, tmp_path):
    about, rows, cells = made()
    files = figures.draw(about, rows, cells, Store(tmp_path))
    assert {path.name for path in files} == {f"{name}.{end}" for name in ("clean-robust", "curve", "cost")
                                             for end in ("png", "pdf")}  # fmt: skip
    first = {path.name: path.read_bytes() for path in files}
    assert all(len(content) > 5000 for content in first.values())
    again = {path.name: path.read_bytes() for path in figures.draw(about, rows, cells, Store(tmp_path))}
    assert again == first
    figure = figures.curves(rows)
    line = next(line for line in figure.axes[0].lines if line.get_label() == "good")
    # Clean accuracy at 0, then the radii in order of size, though the results file has them in another.
    assert line.get_xdata() == pytest.approx([0, 0.05, 0.1])
    assert line.get_ydata() == pytest.approx([91.5, 63.0, 51.0])


def test_short_labels_tell_namesakes_apart():
    labels = [
        "fgsm",
        "pgd:steps=50:rel_step=0.1",
        "native:pgd:steps=50:loss=margin",
        "native:pgd:steps=50:loss=ce",
        "cw",
    ]
    assert list(tables.short_labels(labels).values()) == [
        "fgsm", "pgd", "native:pgd loss=margin", "native:pgd loss=ce", "cw"]  # fmt: skip


def test_names_that_lie_on_each_other_are_moved_apart_and_no_others():
    places, widths, height = [[0.0, 0.0], [0.1, 0.02], [0.2, -0.01], [5.0, 0.0], [0.0, 9.0]], [1.0] * 5, 0.3
    figures.apart(places, widths, height)
    assert places[3:] == [[5.0, 0.0], [0.0, 9.0]]
    ys = sorted(y for _, y in places[:3])
    assert [x for x, _ in places[:3]] == [0.0, 0.1, 0.2]
    assert all(b - a >= 0.3 * (1 - 1e-5) for a, b in itertools.pairwise(ys)) and ys[2] - ys[0] < 0.7
    same = [[1.0, 1.0], [1.0, 1.0]]
    figures.apart(same, [1.0, 1.0], height)
    assert abs(same[0][1] - same[1][1]) == pytest.approx(height)
