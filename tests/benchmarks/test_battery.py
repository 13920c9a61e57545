"""From a battery as the user writes it to planned attacks; every mistake is one clear line before anything runs."""

import dataclasses
import re
from pathlib import Path
from typing import ClassVar

import pytest
from scl_defense_benchmarks import art_adapter, hooks, native, torchattacks_adapter
from scl_defense_benchmarks.battery import (
    ALIASES,
    TIERS,
    Plan,
    PlannedAttack,
    Request,
    parse_battery,
    plan_attacks,
)
from scl_defense_benchmarks.planning import plan_battery

from scl_defense.errors import ComponentError, UserError
from scl_defense.plugins import PluginHost
from scl_defense.registry import Owner
from scl_defense.threat import ThreatModel
from scl_defense.types import component

MAIN = ThreatModel("linf", "8/255")
BUDGETS = {"linf": "8/255", "l2": "0.5", "l1": "12", "l0": "10"}


def test_parsing_takes_names_with_colons_options_and_an_own_ball():
    assert parse_battery(" fgsm, pgd:steps=40 ,art:pgd,cw:c=1+10:eps=0.5:norm=L2") == [
        Request("fgsm", "fgsm", {}, None, None),
        Request("pgd:steps=40", "pgd", {"steps": "40"}, None, None),
        Request("art:pgd", "art:pgd", {}, None, None),
        Request("cw:c=1+10:eps=0.5:norm=L2", "cw", {"c": "1+10"}, "L2", "0.5"),
    ]
    assert parse_battery(["dist:art:pgd:eps=8/255"]) == [
        Request("dist:art:pgd:eps=8/255", "dist:art:pgd", {}, None, "8/255")
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no attack is given"),
        ("fgsm,,pgd", "empty part"),
        ("fgsm,", "empty part"),
        ("pgd::steps=3", "empty part"),
        ("steps=3", "has no name"),
        ("pgd:steps=3:art", "'art' stands after an option"),
        ("pgd:steps=", "'steps=' is no option"),
        ("pgd:=3", "'=3' is no option"),
        ("pgd:steps=3:steps=4", "'steps' is given twice"),
    ],
)
def test_what_cannot_be_parsed(text, message):
    with pytest.raises(UserError, match=message):
        parse_battery(text)


def test_options_reach_the_component_and_lists_are_written_with_plus(host):
    text = "pgd:steps=40:random_start=false,cw:c=1+10+100,art:cw:lr=1e-1"
    plan = plan_attacks(text, host=host, threat=MAIN, budgets=BUDGETS)
    assert [planned.attack for planned in plan.attacks] == [
        torchattacks_adapter.PGD(steps=40, random_start=False),
        torchattacks_adapter.CW(c=(1, 10, 100)),
        art_adapter.CW(lr=0.1),
    ]
    assert plan.attacks[0].options == {"steps": 40, "rel_step": 0.25, "random_start": False}
    single = plan_attacks("cw:c=10", host=host, threat=MAIN, budgets=BUDGETS).attacks[0]
    assert single.attack == torchattacks_adapter.CW(c=(10,))


@pytest.mark.parametrize(
    ("text", "ball"),
    [
        ("pgd", "linf:8/255"),  # the main ball
        ("cw", "l2:0.5"),  # cannot do Linf: its own norm at the data's budget
        ("cw:eps=1.5", "l2:1.5"),
        ("pgd:eps=2/255", "linf:2/255"),  # an own eps in the main norm
        ("pgd:norm=l2", "l2:0.5"),
        ("pgd:norm=L2:eps=1", "l2:1"),
        ("native:pgd:norm=l1", "l1:12"),
        ("pgd:norm=linf", "linf:8/255"),
    ],
)
def test_the_ball_of_an_attack(host, text, ball):
    assert str(plan_attacks(text, host=host, threat=MAIN, budgets=BUDGETS).attacks[0].threat) == ball


def test_under_a_main_l2_ball_everything_that_can_works_in_it(host):
    main = ThreatModel("l2", "0.7")
    plan = plan_attacks("pgd,cw,noise,fgsm:norm=linf", host=host, threat=main, budgets=BUDGETS)
    assert [str(planned.threat) for planned in plan.attacks] == ["l2:0.7", "l2:0.7", "l2:0.7", "linf:8/255"]


def test_no_attack_silently_works_in_another_ball_than_the_one_asked_for(host):
    cases = [("fgsm", "l2", "linf", "native:pgd"), ("pgd", "l1", "linf, l2", "apgd-l1"), ("pgd", "l0", "linf, l2", "s")]
    for attack, norm, can, instead in cases:
        with pytest.raises(UserError, match=f"'{attack}' cannot work in {norm}, only in {can}; use {instead}"):
            plan_attacks(attack, host=host, threat=ThreatModel(norm, "1"), budgets=BUDGETS)


@pytest.mark.parametrize(
    ("text", "budgets", "message"),
    [
        ("pgd:norm=l1", BUDGETS, "cannot work in l1; 'pgd' does linf, l2"),
        ("fgsm:norm=l2", BUDGETS, "cannot work in l2; 'fgsm' does linf"),
        ("cw:norm=linf", BUDGETS, "cannot work in linf"),
        ("pgd:norm=l3", BUDGETS, "norm 'l3' is unknown"),
        ("pgd:eps=8", BUDGETS, "larger than the whole range"),
        ("pgd:eps=big", BUDGETS, "is not a radius"),
        ("cw", {}, "works in l2 and no usual l2 budget is known.*cw:eps="),
        ("pgd:norm=l2", {"linf": "0.1"}, "no usual l2 budget is known"),
        ("pdg", BUDGETS, "no attack named 'pdg'; did you mean 'pgd'"),
        ("pgd:stepz=4", BUDGETS, "did you mean 'steps'"),
        ("pgd:steps=four", BUDGETS, "steps"),
        ("fgsm:steps=4", BUDGETS, "it has none"),
        ("pgd,pgd", BUDGETS, "'pgd' is the same as 'pgd'"),
        ("pgd,torchattacks:pgd", BUDGETS, "'torchattacks:pgd' is the same as 'pgd'"),
        ("pgd,pgd:steps=20", BUDGETS, "'pgd:steps=20' is the same as 'pgd'"),
        ("cw,cw:eps=0.5", BUDGETS, "is the same as 'cw'"),
    ],
)
def test_what_cannot_be_planned(host, text, budgets, message):
    with pytest.raises(UserError, match=message) as caught:
        plan_attacks(text, host=host, threat=MAIN, budgets=budgets)
    assert "\n" not in str(caught.value)


def test_the_same_attack_with_another_option_ball_or_library_is_another_attack(host):
    text = "pgd,pgd:steps=5,pgd:eps=1/255,pgd:norm=l2,art:pgd,native:pgd"
    plan = plan_attacks(text, host=host, threat=MAIN, budgets=BUDGETS)
    assert [planned.label for planned in plan.attacks] == text.split(",")


def test_the_distinct_balls_main_norm_first_from_the_smallest_on(host):
    plan = plan_attacks("cw,pgd:eps=16/510:steps=3,fgsm", host=host, threat=MAIN, budgets=BUDGETS)
    assert [str(threat) for threat in plan.threats()] == ["linf:8/255", "l2:0.5"]
    curve = [ThreatModel("linf", eps) for eps in ("8/255", "1/255", "4/255")]
    plan = plan_battery("cw,cw:eps=0.1,pgd:eps=16/510:steps=3,fgsm", host=host, threats=curve, budgets=BUDGETS)
    assert plan.threat == MAIN  # the largest
    assert [str(one) for one in plan.threats()] == ["linf:1/255", "linf:4/255", "linf:8/255", "l2:0.1", "l2:0.5"]
    only_cw = plan_attacks("cw", host=host, threat=MAIN, budgets=BUDGETS)
    assert [str(threat) for threat in only_cw.threats()] == ["l2:0.5"]


def test_an_empty_or_ambiguous_plan_is_refused():
    with pytest.raises(UserError, match="the battery is empty"):
        Plan(MAIN, ())
    one = PlannedAttack("a", "a", native.FGSM(), MAIN)
    with pytest.raises(UserError, match="'a' is in the battery twice"):
        Plan(MAIN, (one, PlannedAttack("a", "a", native.PGD(), MAIN)))


def test_a_component_that_is_no_attack_is_named(host):
    @component
    class NoAttack:
        norms: ClassVar[frozenset[str]] = frozenset({"linf"})

    host["attack"].add("no-attack", NoAttack, summary="lacks nearly everything", owner=Owner("a test", "1", "here"))
    with pytest.raises(ComponentError, match="'no-attack' must be callable and have norms, minimal and access"):
        plan_attacks("no-attack", host=host, threat=MAIN)


# -- tiers


def labels_of(plan):
    return [planned.label for planned in plan.attacks]


def test_a_tier_stands_for_its_attacks(host):
    plan = plan_attacks("quick", host=host, threat=MAIN, budgets=BUDGETS, classes=10)
    assert labels_of(plan) == ["noise", "fgsm", "pgd", "pgd-l2"] and plan.left_out == ()
    plan = plan_attacks("standard", host=host, threat=MAIN, budgets=BUDGETS, classes=10)
    standard = ["noise", "fgsm", "pgd", "pgd-l2", "cw", "deepfool", "apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square"]
    assert labels_of(plan) == standard and plan.left_out == ()
    assert [str(threat) for threat in plan.threats()] == ["linf:8/255", "l2:0.5"]


@pytest.mark.parametrize("tier", TIERS)
def test_every_attack_of_a_tier_exists(host, tier):
    plan = plan_attacks(tier, host=host, threat=MAIN, budgets=BUDGETS)
    needs_a_file = ["transfer"] if tier == "full" else []
    assert [one.label for one in plan.left_out] == needs_a_file
    assert labels_of(plan) == [label for label in TIERS[tier] if label not in needs_a_file]
    assert set(TIERS["quick"]) < set(TIERS["standard"]) < set(TIERS["full"])
    assert not set(TIERS) & {entry.name for entry in host["attack"]}


def test_what_cannot_work_is_left_out_of_a_tier_with_its_reason(host):
    plan = plan_attacks("standard", host=host, threat=ThreatModel("l2", "0.5"), budgets=BUDGETS, classes=3)
    assert labels_of(plan) == ["noise", "pgd", "pgd-l2", "cw", "deepfool", "apgd-ce", "apgd-dlr", "fab-t", "square"]
    assert [(one.label, one.tier) for one in plan.left_out] == [("fgsm", "standard"), ("apgd-t", "standard")]
    assert plan.left_out[0].reason.startswith("it cannot work in l2")
    assert "needs 4 classes, the network has 3" in plan.left_out[1].reason


def test_under_l1_our_own_descent_takes_the_place_of_the_library_s(host):
    plan = plan_attacks("quick", host=host, threat=ThreatModel("l1", "12"), budgets=BUDGETS, classes=10)
    assert labels_of(plan) == ["noise", "native:pgd", "pgd-l2"]
    assert [one.label for one in plan.left_out] == ["fgsm", "pgd"]
    assert plan.left_out[1].reason.endswith("(native:pgd takes its place)")


def test_a_search_without_a_usual_budget_is_left_out_of_a_tier(host):
    plan = plan_attacks("standard", host=host, threat=MAIN, budgets={"linf": "8/255"}, classes=10)
    assert [one.label for one in plan.left_out] == ["pgd-l2", "cw", "deepfool"]
    assert "no usual l2 budget is known" in plan.left_out[1].reason


@pytest.mark.parametrize(
    ("text", "about", "reason"),
    [
        ("apgd-t", {"classes": 3}, "it needs 4 classes, the network has 3; use apgd-ce or autoattack"),
        ("apgd-dlr:steps=5", {"classes": 2}, "it needs 3 classes, the network has 2"),
        ("fgsm", {"threat": ThreatModel("l2", "1")}, "it cannot work in l2, only in linf; use native:pgd"),
        ("pixle", {"image_shape": (2, 8, 8)}, "it needs images of 1 or 3 channels, these have 2"),
        ("pixle", {"image_shape": (3, 8, 6)}, "it needs square images, these are 8x6"),
        ("hopskipjump", {"n": 101}, "it is slow and takes at most 100 images, not 101"),
        ("transfer", {}, "it has no surrogate network"),
        ("cw", {"budgets": {}}, "it works in l2 and no usual l2 budget is known for this data; give its own: cw:eps="),
        ("pgd-l2", {"budgets": {}}, "it works in l2 and no usual l2 budget is known.*pgd-l2:eps="),
    ],
)
def test_a_named_attack_that_cannot_work_is_skipped_beside_others_and_an_error_alone(host, text, about, reason):
    settings = {"host": host, "threat": MAIN, "budgets": BUDGETS, **about}
    for plan in (
        plan_attacks(f"{text},noise", **settings),
        plan_battery(f"{text},noise", threats=[settings.pop("threat")], **settings),
    ):
        assert labels_of(plan) == ["noise"]
        ((label, tier, why),) = [(one.label, one.tier, one.reason) for one in plan.left_out]
        assert (label, tier) == (text, "") and re.match(reason, why)
    with pytest.raises(UserError, match=f"attack '{text}' {reason.removeprefix('it ')}") as caught:
        plan_attacks(f"{text}", **{"threat": MAIN, **settings, **about})
    assert "\n" not in str(caught.value)


def test_what_is_named_beside_its_tier_is_skipped_once(host):
    plan = plan_attacks("standard,apgd-t", host=host, threat=MAIN, budgets=BUDGETS, classes=3)
    assert [(one.label, one.tier) for one in plan.left_out] == [("apgd-t", "")]
    assert labels_of(plan_attacks("apgd-t", host=host, threat=MAIN, budgets=BUDGETS)) == ["apgd-t"]  # not known yet


@pytest.mark.parametrize("text", ["pdg,noise", "pgd:stepz=4,noise", "fgsm:norm=l2,noise", "pgd-l2:steps=x,noise"])
def test_a_mistake_is_an_error_in_any_company(host, text):
    with pytest.raises(UserError):
        plan_attacks(text, host=host, threat=MAIN, budgets=BUDGETS)


# -- names that stand for an attack with options


@pytest.mark.parametrize(
    ("text", "name", "attack", "ball", "restarts"),
    [
        ("pgd-l2", "pgd", torchattacks_adapter.PGD(steps=40, rel_step=0.2), "l2:0.5", 1),
        ("pgd-l2:eps=1:steps=7", "pgd", torchattacks_adapter.PGD(steps=7, rel_step=0.2), "l2:1", 1),
        ("pgd-20", "pgd", torchattacks_adapter.PGD(steps=20), "linf:8/255", 1),
        ("pgd-100", "pgd", torchattacks_adapter.PGD(steps=100, rel_step=0.1), "linf:8/255", 5),
        ("pgd-100:restarts=2", "pgd", torchattacks_adapter.PGD(steps=100, rel_step=0.1), "linf:8/255", 2),
        ("cw-art", "art:cw", art_adapter.CW(), "l2:0.5", 1),
        ("hopskipjump:norm=l2", "hsj", art_adapter.HSJ(), "l2:0.5", 1),
    ],
)
def test_an_alias_is_an_attack_with_options_under_its_own_label(host, text, name, attack, ball, restarts):
    (one,) = plan_battery(text, host=host, threats=[MAIN], budgets=BUDGETS).attacks
    assert (one.label, one.name, one.attack, str(one.threat)) == (text, name, attack, ball)
    assert getattr(one, "restarts", 1) == restarts


def test_every_alias_can_be_planned_and_is_known_to_who_mistypes_it(host):
    settings = {"host": host, "threats": [MAIN], "budgets": BUDGETS}
    assert {one.label for one in plan_battery(list(ALIASES), **settings).attacks} == set(ALIASES)
    assert not set(ALIASES) & ({entry.name for entry in host["attack"]} | set(TIERS))
    for wrong, right in (("pgd-l22", "pgd-l2"), ("hopskipjmp", "hopskipjump"), ("cw-atr", "cw-art")):
        with pytest.raises(UserError, match=f"did you mean '{right}'"):
            plan_battery(wrong, **settings)
    with pytest.raises(UserError, match="'pgd-l2' works in l2 alone; use pgd"):
        plan_battery("pgd-l2:norm=linf", **settings)
    with pytest.raises(UserError, match="'hopskipjump' is the same as 'hsj'"):
        plan_battery("hsj,hopskipjump", **settings)


def test_a_plugin_s_attack_goes_before_an_alias_of_its_name(host):
    mine = PluginHost(files=[hooks.__file__], disabled=["scl-defense"])
    mine["attack"].add("cw-art", native.FGSM, summary="of a plugin", owner=Owner("a test", "1", "here"))
    (one,) = plan_attacks("cw-art", host=mine, threat=MAIN).attacks
    assert one.attack == native.FGSM()


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("quick,pgd", ["noise", "fgsm", "pgd-l2", "pgd"]),
        ("pgd:steps=20,quick", ["pgd:steps=20", "noise", "fgsm", "pgd-l2"]),
        ("quick,torchattacks:pgd", ["noise", "fgsm", "pgd-l2", "torchattacks:pgd"]),
        ("quick,pgd:steps=40", ["noise", "fgsm", "pgd", "pgd-l2", "pgd:steps=40"]),
        ("quick,pgd:steps=40:rel_step=0.2:norm=l2", ["noise", "fgsm", "pgd", "pgd:steps=40:rel_step=0.2:norm=l2"]),
        ("quick,pgd-20", ["noise", "fgsm", "pgd-l2", "pgd-20"]),
        ("quick,quick", ["noise", "fgsm", "pgd", "pgd-l2"]),
        ("autoattack,quick", ["autoattack", "noise", "fgsm", "pgd", "pgd-l2"]),
    ],
)
def test_a_tier_beside_attacks_that_are_named(host, text, labels):
    plan = plan_attacks(text, host=host, threat=MAIN, budgets=BUDGETS)
    assert labels_of(plan) == labels


def test_a_tier_takes_no_options(host):
    with pytest.raises(UserError, match="'quick' stands for several attacks and takes no options"):
        plan_attacks("quick:eps=0.1", host=host, threat=MAIN, budgets=BUDGETS)
    with pytest.raises(UserError, match="no attack or battery named 'standrad'; did you mean 'standard'"):
        plan_attacks("standrad", host=host, threat=MAIN, budgets=BUDGETS)


# -- what an attack can work on


def test_under_l1_and_l0_a_tier_runs_what_knows_them(host):
    plan = plan_attacks("standard", host=host, threat=ThreatModel("l1", "12"), budgets=BUDGETS, classes=10)
    assert [one for one in labels_of(plan) if str(one).startswith(("apgd", "native"))] == ["native:pgd", "apgd-l1"]
    plan = plan_attacks("full", host=host, threat=ThreatModel("l0", "5"), budgets=BUDGETS, classes=10)
    here = {planned.label for planned in plan.attacks if planned.threat == ThreatModel("l0", "5")}
    assert here == {"noise", "sparsefool", "jsma", "onepixel", "pixle"}
    left_out = {one.label: one.reason for one in plan.left_out}
    assert "cannot work in l0" in left_out["autoattack"] and "takes its place" not in left_out["autoattack"]


def test_under_l0_searches_over_pixels_take_the_places_of_pgd_and_square(host):
    settings = {"host": host, "threat": ThreatModel("l0", "5"), "budgets": BUDGETS, "classes": 10}
    plan = plan_attacks("standard", **settings, n=200)
    here = [planned.label for planned in plan.attacks if planned.threat == settings["threat"]]
    assert here == ["noise", "sparsefool", "onepixel"]
    left_out = {one.label: one.reason for one in plan.left_out}
    assert left_out["pgd"].endswith("(sparsefool takes its place)")
    assert left_out["square"].endswith("(onepixel takes its place)")
    plan = plan_attacks("standard", **settings, n=300)
    assert "onepixel" not in labels_of(plan)
    reason = {one.label: one.reason for one in plan.left_out}["square"]
    assert "(onepixel, in its place, is left out because it is slow and takes at most 200 images, not 300" in reason


def test_a_surrogate_that_cannot_be_read_is_an_error_in_a_tier_too(host):
    for text in ("transfer,noise", "full"):
        with pytest.raises(UserError, match=r"surrogate 'nowhere\.pt' does not exist"):
            plan_attacks(text, host=host, threat=MAIN, budgets=BUDGETS, surrogate="nowhere.pt")


def test_a_limit_is_an_option_and_an_unknown_shape_refuses_nothing(host):
    settings = {"host": host, "threat": MAIN, "budgets": BUDGETS}
    assert labels_of(plan_attacks("hsj:limit=101", n=101, **settings)) == ["hsj:limit=101"]
    assert labels_of(plan_attacks("hsj", n=100, **settings)) == ["hsj"]
    assert labels_of(plan_attacks("pixle,apgd-t", **settings)) == ["pixle", "apgd-t"]
    assert labels_of(plan_attacks("pixle", image_shape=(1, 8, 8), **settings)) == ["pixle"]


def test_rotations_have_a_ball_of_their_own(host):
    settings = {"host": host, "threat": MAIN, "budgets": BUDGETS}
    assert str(plan_attacks("spatial", **settings).attacks[0].threat) == "linf:1"
    assert str(plan_attacks("spatial:eps=0.5", **settings).attacks[0].threat) == "linf:0.5"


def test_the_page_of_the_battery_says_what_the_code_does(host):
    page = (Path(__file__).parents[2] / "docs" / "battery.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]
    named = {row[0].strip("`"): row[1:] for row in rows}
    for alias, text in ALIASES.items():
        assert named[alias] == [f"`{text}`"], alias
    for tier, members in TIERS.items():
        written = [text for text in re.findall(r"`([^`]+)`", named[tier][0]) if text not in TIERS]
        inner = next((other for other in TIERS if f"`{other}` and" in named[tier][0]), None)
        assert [*(TIERS[inner] if inner else ()), *written] == list(members), tier
    described = {name for row in rows if len(row) == 6 for name in re.findall(r"`([^`]+)`", row[0])}
    registered = {entry.name for entry in host["attack"] if entry.owner.name != "a test"}
    assert described <= registered
    assert {name for name in registered if ":" not in name} <= described
    for row in (row for row in rows if len(row) == 6):
        names, parts = re.findall(r"`([^`]+)`", row[0]), row[3].split(";")
        for name, settings in zip(names, parts if len(parts) == len(names) else [row[3]] * len(names), strict=True):
            defaults = {field.name: field.default for field in dataclasses.fields(host["attack"].get(name))}
            for option, value in re.findall(r"`(\w+)=([\d.]+)`", settings):
                if option in defaults and isinstance(defaults[option], (int, float)):
                    assert float(value) == defaults[option], (name, option)
