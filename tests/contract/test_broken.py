"""The contract test bites: every deliberately broken component fails exactly the check that is meant for it."""

import pytest
from broken import cases, sound

from scl_defense import testing
from scl_defense.registry import KINDS
from scl_defense.testing import CHECKS, CheckResult, label
from scl_defense.testing._common import BUILT, COMPONENT_CHECKS

CASES, SOUND = cases(), sound()


def run(kind: str, component: object, **how: object) -> list[CheckResult]:
    return getattr(testing, f"check_{kind}")(component, **how)


@pytest.fixture(autouse=True)
def empty_data_root(monkeypatch, tmp_path):
    monkeypatch.setenv("SCL_DEFENSE_DATA_ROOT", str(tmp_path))


def test_there_are_broken_components_of_every_kind():
    assert {case.kind for case in CASES} == set(KINDS) == set(CHECKS)
    assert len(CASES) >= 100
    assert len({case.id for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_broken_component_fails_the_check_meant_for_it(case):
    results = run(case.kind, case.component)
    failed = {result.check: result.message for result in results if not result.passed}
    assert case.check in failed, f"not caught; failed: {failed}"
    assert case.says in failed[case.check]
    assert set(failed) == {case.check} | case.also, failed
    assert all(message and "\n" not in message for message in failed.values())


@pytest.mark.parametrize(("kind", "component"), SOUND, ids=[f"{kind}-{cls.__name__}" for kind, cls in SOUND])
def test_a_sound_component_passes_every_check(kind, component):
    results = run(kind, component)
    assert len(results) > len(COMPONENT_CHECKS)
    assert [result for result in results if not result.passed] == []


@pytest.mark.parametrize(("kind", "check"), [(kind, check) for kind in KINDS for check in CHECKS[kind]])
def test_every_check_catches_a_broken_component(kind, check):
    """The rules for every component are shown on generators; every other check on a component of its own kind."""
    kinds = set(KINDS) if check in COMPONENT_CHECKS else {kind}
    assert [case.id for case in CASES if case.kind in kinds and case.check == label(check)]


def test_that_a_component_cannot_be_built_is_a_case_too():
    assert [case.id for case in CASES if case.check == BUILT]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_rules_for_components_and_its_own(kind):
    assert CHECKS[kind][: len(COMPONENT_CHECKS)] == COMPONENT_CHECKS
    assert len(CHECKS[kind]) >= len(COMPONENT_CHECKS) + 5
    names = [label(check) for check in CHECKS[kind]]
    assert len(set(names)) == len(names)
    assert all((check.__doc__ or "").strip() for check in CHECKS[kind])
