"""benchmarks/speed: the timing helper on a clock of its own, the verdicts of the bars, the rewriting of the page."""

import json
import sys
from pathlib import Path

import pytest

from scl_defense.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))  # no package is installed from there but the layer itself

from speed import attacks, bars, command, page, records  # noqa: E402
from speed.timing import Budget, NotInstalled, images_for, interleaved, ratio  # noqa: E402


class Clock:
    """Time that passes only where a call lets it."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def __call__(self):
        return self.now

    def call(self, name, *seconds):
        """A call that takes one of ``seconds`` after the other, the last one from then on."""
        left = list(seconds)

        def run():
            self.order.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]
            return f"{name} {len(self.order)}"

        return run


def test_calls_take_turns_and_every_second_round_goes_backwards():
    clock = Clock()
    calls = {"a": clock.call("a", 1, 5, 3), "b": clock.call("b", 2, 8, 6)}
    found = interleaved(calls, repeats=3, clock=clock)
    assert clock.order == ["a", "b", "b", "a", "a", "b"]
    assert found["a"].seconds == [1, 5, 3] and found["b"].seconds == [2, 8, 6]
    assert found["a"].median == 3 and found["b"].median == 6
    assert found["a"].row() == {"status": "ok", "median": 3, "best": 1, "worst": 5, "seconds": [1, 5, 3]}
    assert found["a"].value == "a 1"
    assert ratio(found["b"], found["a"]) == 2  # of 2, 1.6 and 2: within a round


def test_warming_up_is_not_timed():
    clock = Clock()
    found = interleaved({"a": clock.call("a", 100, 1)}, repeats=2, warm=True, clock=clock)
    assert found["a"].seconds == [1, 1]


def test_no_round_begins_after_the_time_is_up_but_the_first_is_finished():
    clock = Clock()
    calls = {"a": clock.call("a", 4), "b": clock.call("b", 4)}
    found = interleaved(calls, repeats=9, until=12.0, clock=clock)
    assert [len(timing.seconds) for timing in found.values()] == [2, 2]  # the third would begin at 16
    assert [len(timing.seconds) for timing in interleaved(calls, repeats=9, until=0.0, clock=clock).values()] == [1, 1]


def test_a_peer_that_is_missing_or_fails_is_a_row_and_the_others_go_on():
    clock = Clock()

    def missing():
        raise NotInstalled("pip install peer")

    def broken():
        raise RuntimeError("two\nlines")

    calls = {"missing": missing, "broken": broken, "fine": clock.call("fine", 1)}
    found = interleaved(calls, repeats=3, clock=clock)
    assert found["missing"].row() == {"status": "not installed: pip install peer"}
    assert found["broken"].row() == {"status": "failed: RuntimeError: two lines"}
    assert found["fine"].seconds == [1, 1, 1]
    assert ratio(found["broken"], found["fine"]) is None


def test_what_a_group_leaves_over_goes_to_the_others():
    clock = Clock()
    shares = Budget(90.0, 3, clock).shares()
    assert next(shares) == 30
    clock.now = 10
    assert next(shares) == 40
    clock.now = 500
    assert next(shares) == 0
    assert next(shares, None) is None


def test_samples_fit_into_the_time():
    assert images_for(10.0, 0.1, least=16, most=512) == 96
    assert images_for(10.0, 100.0, least=16, most=512) == 16
    assert images_for(10.0, 0.0, least=16, most=512) == 512


# -- the bars


def attack(task, case, side, speed, robust=0.5, gap=(0.0, 0.0, 0.0), **more):
    row = {"kind": "attack", "case": case, "task": task, "side": side, "status": "ok", "images": 64}
    row |= {"images_per_s": speed, "robust": robust, "median": 1.0, "best": 1.0, "worst": 1.0}
    if not side.startswith("ours"):
        row |= {f"{ours} minus this": list(gap) for ours in ("ours auto", "ours fp32")}
    return row | more


def found(text, /, **results):
    (one,) = [one for one in bars.verdicts(results) if one.bar.text == text]
    return one


PGD = "pgd-10, small-cnn robust, auto: images a second over torchattacks"


def pgd(ours, gap=(0.0, 0.0, 0.0)):
    return [
        attack("pgd-10", bars.CNN, "ours auto", ours, share=0.7, share_side_by_side=0.5),
        attack("pgd-10", bars.CNN, "torchattacks", 10.0, gap=gap),
    ]


def test_a_bar_is_met_at_its_limit_and_not_below():
    assert found(PGD, attacks=pgd(35.0)).state == "met"
    short = found(PGD, attacks=pgd(34.0))
    assert short.state == "not met" and "3.40, off by a factor of 1.03, 70 % of the floor" in short.line()


def test_a_faster_attack_that_finds_less_does_not_meet_its_bar():
    """The whole interval above 0: we leave more images standing. One that touches 0 is no evidence of that."""
    less = found(PGD, attacks=pgd(100.0, gap=(0.03, 0.01, 0.05)))
    assert less.state == "not met" and "finds less" in less.line()
    assert found(PGD, attacks=pgd(100.0, gap=(0.03, -0.01, 0.07))).state == "met"
    assert found(PGD, attacks=pgd(100.0, gap=(-0.03, -0.05, -0.01))).state == "met"  # it finds more


def test_the_wide_network_is_only_as_good_as_the_narrow_one_is_accurate():
    """The times of the one count, the accuracies of both."""
    text = "pgd-10, resnet18-w64 robust, auto: images a second over torchattacks"
    rows = [attack("pgd-10", case, "ours auto", 30.0) for case in (bars.RESNET, bars.NARROW)]
    rows += [attack("pgd-10", bars.RESNET, "torchattacks", 10.0)]
    assert found(text, attacks=rows).state == "met"
    rows += [attack("pgd-10", bars.NARROW, "torchattacks", 10.0, gap=(0.03, 0.01, 0.05))]
    assert found(text, attacks=rows).state == "not met"


def test_auto_is_float32_where_nothing_runs_in_bfloat16():
    text = "autoattack, small-cnn robust, auto: images a second over pyautoattack"
    rows = [attack("autoattack", bars.CNN, "ours fp32", 30.0), attack("autoattack", bars.CNN, "pyautoattack", 10.0)]
    assert found(text, attacks=rows).measured.value == pytest.approx(3.0)


def test_what_was_not_measured_is_said():
    missing = [
        attack("pgd-10", bars.CNN, "ours auto", 35.0),
        {**attack("pgd-10", bars.CNN, "torchattacks", 1.0), "status": "not installed"},
    ]
    for rows in ([], pgd(35.0)[:1], missing):
        one = found(PGD, attacks=rows)
        assert one.state == "not measured" and one.line().endswith("at least 3.5: not measured")
    assert {one.state for one in bars.verdicts({})} == {"not measured"} and len(bars.verdicts({})) > 60


def test_upper_limits_take_the_worst_network():
    text = "supcon + contrastive-pgd-online: generator over the floor of its passes"
    name = "supcon + contrastive-pgd-online"
    rows = [
        {"kind": "step", "network": network, "precision": "fp32", "method": name, "generator over floor": value}
        for network, value in (("small-cnn", 1.3), ("resnet18", 1.02))
    ]
    assert found(text, steps=rows[1:]).state == "met"
    worst = found(text, steps=rows)
    assert worst.state == "not met" and worst.measured.value == 1.3 and "off by a factor of 1.18" in worst.line()


def loss(side, rows, over=None, away=1e-6, peak=4.0):
    row = {"kind": "loss", "loss": "supcon", "rows": rows, "side": side, "status": "ok", "peak_mib": peak}
    return row if over is None else row | {"over ours": over, "gradient_difference": away}


def test_the_fastest_peer_counts_the_dense_form_does_not_and_gradients_must_agree():
    text = "supcon, 4096 rows: time of the fastest peer over ours"
    rows = [loss("ours", 4096), loss("pytorch-metric-learning", 4096, 3.0), loss("dense reference", 4096, 1.1)]
    assert found(text, losses=rows).state == "met"
    assert found(text, losses=[*rows, loss("lightly", 4096, 1.5)]).measured.value == 1.5
    assert found(text, losses=[*rows[:1], loss("pytorch-metric-learning", 4096, 3.0, away=0.1)]).state == "not met"


def test_memory_that_grows_with_the_square_is_no_linear_memory():
    text = "supcon: peak memory of 8192 rows over that of 2048"
    linear = [loss("ours", 2048, peak=8.0), loss("ours", 8192, peak=33.0)]
    square = [loss("ours", 2048, peak=64.0), loss("ours", 8192, peak=1040.0)]
    assert found(text, losses=linear).state == "met" and found(text, losses=square).state == "not met"


# -- the page


def test_the_tables_are_replaced_and_the_words_around_them_stay():
    text = "before\n<!-- speed:a -->\nold\n<!-- /speed:a -->\nbetween\n<!-- speed:b -->\n<!-- /speed:b -->\nafter\n"
    once = page.replaced(text, {"a": "| new |"})
    assert once == text.replace("\nold\n", "\n\n| new |\n\n") and page.replaced(once, {"a": "| new |"}) == once
    for broken in (
        text.replace("<!-- /speed:a -->", ""),
        text + "<!-- speed:a -->",
        text.replace("/speed:a", "speed:a"),
    ):
        with pytest.raises(UserError, match="speed:a"):
            page.replaced(broken, {"a": "x"})


def result(folder, part, rows):
    about = {**records.machine(), "processor": "a processor"}
    return records.write(folder, part, rows, {"quick": False}, about)


def test_every_part_has_its_table_in_the_page(tmp_path):
    """The documentation's own page takes all of them; a part that was not measured keeps what it had."""
    target = tmp_path / "speed.md"
    target.write_text((ROOT / "docs" / "speed.md").read_text())
    case = {"kind": "case", "case": bars.CNN, "data": "mnist", "parameters": 10, "clean": 0.9, "eps": "0.2"}
    result(tmp_path, "attacks", [{**case, "right": 64, "accurate": True}, *pgd(35.0)])
    before = target.read_text()
    page.rewrite(target, records.read_all(tmp_path), command.PRECISION)
    now = target.read_text()
    assert "3.50 | 0.500" in now and "| met |" in now and "a processor" in now and "points less, 95 %" in now
    opening, closing = page.marked("losses")
    assert now.split(opening)[1].split(closing)[0] == before.split(opening)[1].split(closing)[0]
    for part in (*records.PARTS, "bars", "precision"):
        assert all(now.count(mark) == 1 for mark in page.marked(part))


def test_a_file_that_is_no_result_is_refused(tmp_path):
    (tmp_path / "attacks.json").write_text(json.dumps({"part": "steps", "rows": []}))
    with pytest.raises(UserError, match=r"attacks\.json"):
        records.read_all(tmp_path)


def row(case, task=None, side="ours fp32", **more):
    kind = {"kind": "attack", "task": task, "side": side, "status": "no"} if task else {"kind": "case"}
    return {**kind, "case": case, **more}


def test_what_is_measured_anew_takes_the_place_of_the_same_comparison_alone():
    before = [row("a"), row("b"), row("a", "x", old=1), row("a", "x", "art", old=1), row("a", "y", old=1)]
    again = [row("a"), row("c"), row("a", "x", old=0), row("c", "x", old=0), row("a", "z", old=0)]
    assert attacks.merged(before, again) == [
        row("a"), row("b"), row("a", "x", old=0), row("a", "y", old=1), row("c"), row("c", "x", old=0),
        row("a", "z", old=0)]  # fmt: skip


def test_some_comparisons_are_measured_anew_on_the_same_machine_only(tmp_path, monkeypatch, capsys):
    plans = []

    def measure(options, say, keep):
        plans.append(options.plan)
        made = [row(case, task, value=2) for case, tasks in options.plan.items() for task in tasks]
        keep(made)
        return made

    monkeypatch.setattr(attacks, "measure", measure)
    here = records.machine()
    records.write(tmp_path, "attacks", [row(bars.CNN, "curve-8", value=1), row(bars.CNN, "cw", value=1)], {}, here)
    assert command.main(["--out", str(tmp_path), "--again", f"{bars.CNN}: curve-8, apgd-100"]) == 0
    wanted = [name for name, tasks in attacks.PLAN.items() if "apgd-100" in tasks]
    assert plans == [{**{name: ("apgd-100",) for name in wanted}, bars.CNN: ("curve-8", "apgd-100")}] and wanted
    content = records.read_all(tmp_path)["attacks"]
    values = {(one["case"], one["task"]): one["value"] for one in content["rows"]}
    assert values[bars.CNN, "curve-8"] == 2 and values[bars.CNN, "cw"] == 1
    (anew,) = content["again"]  # once, although it was written after every comparison
    assert f"{bars.CNN}: curve-8" in anew["comparisons"] and "stopped" not in anew
    path = tmp_path / "attacks.json"
    path.write_text(json.dumps(content | {"machine": here | {"threads": 92, "amx": not here["amx"]}}))
    assert command.main(["--out", str(tmp_path), "--again", bars.CNN]) == 2
    assert "with another threads, amx; measure all of it" in capsys.readouterr().err
    assert command.main(["--out", str(tmp_path), "--again", "no-such-task"]) == 2
    assert "'no-such-task' is no comparison" in capsys.readouterr().err
    assert command.main(["--out", str(tmp_path), "--only", "losses", "--again", bars.CNN]) == 2
    assert "--again is about the attacks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "attacks,nonsense"], "part 'nonsense' is unknown"),
        (["--minutes", "0"], "minutes 0 must be above 0"),
        (["--repeats", "0"], "repeats 0 must be at least 1"),
        (["--bars", "--out", "nowhere"], "there is no result in 'nowhere'"),
        (["--page", "nowhere.md"], "page 'nowhere.md' does not exist"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_measured(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main(arguments) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_committed_page_is_the_one_of_the_committed_results(tmp_path):
    """docs/speed.md was written by the command from benchmarks/results/speed, not by hand."""
    results = records.read_all(command.OUT)
    target = tmp_path / "speed.md"
    target.write_text((ROOT / "docs" / "speed.md").read_text())
    page.rewrite(target, results, command.PRECISION)
    assert target.read_text() == (ROOT / "docs" / "speed.md").read_text()
