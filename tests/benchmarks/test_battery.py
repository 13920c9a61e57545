"""From a battery as the user writes it to planned attacks; every mistake is one clear line before anything runs."""

from typing import ClassVar

import pytest
from scl_defense_benchmarks import art_adapter, native, torchattacks_adapter
from scl_defense_benchmarks.battery import Plan, PlannedAttack, Request, parse_battery, plan_attacks

from scl_defense.errors import ComponentError, UserError
from scl_defense.registry import Owner
from scl_defense.threat import ThreatModel
from scl_defense.types import component

MAIN = ThreatModel("linf", "8/255")
BUDGETS = {"linf": "8/255", "l2": "0.5", "l1": "12"}


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
    for attack, norm, can in (("fgsm", "l2", "linf"), ("pgd", "l1", "linf, l2")):
        with pytest.raises(UserError, match=f"'{attack}' cannot work in {norm}, only in {can}; use native:pgd"):
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


def test_the_distinct_balls_main_one_first(host):
    plan = plan_attacks("cw,pgd:eps=16/510:steps=3,fgsm", host=host, threat=MAIN, budgets=BUDGETS)
    assert [str(threat) for threat in plan.threats()] == ["linf:8/255", "l2:0.5"]
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
