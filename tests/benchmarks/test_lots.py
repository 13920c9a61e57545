"""Chunks that are attacked together: no number depends on it, whatever happens to them."""

import dataclasses
import threading

import pytest
import torch
from planted_attacks import LINF
from scl_defense_benchmarks import chunks as chunks_module
from scl_defense_benchmarks import crew, native
from scl_defense_benchmarks.battery import Plan, PlannedAttack
from scl_defense_benchmarks.chunks import Budget, Target, attack_chunks
from scl_defense_benchmarks.evaluate import evaluate
from scl_defense_benchmarks.loans import Loan
from scl_defense_benchmarks.planning import Repeated
from torch import nn

from scl_defense import benchmark
from scl_defense.threat import ThreatModel

CHUNK = 16  # as large as what rounds alike, whatever else is in a batch


@pytest.fixture
def together(monkeypatch):
    """Whether what was attacked in one call was attacked."""
    done, called = [], chunks_module._called_together
    monkeypatch.setattr(chunks_module, "_called_together", lambda *given: done.append(called(*given)) or done[-1])
    return done


@pytest.fixture
def lots(monkeypatch, together):
    """How many chunks a worker was given, time by time."""
    taken = []

    def counted(target, planned, loan, chunks, *more):
        taken.append(len(chunks))
        return attack_chunks(target, planned, loan, chunks, *more)

    monkeypatch.setattr("scl_defense_benchmarks.attempt.CHUNK", CHUNK)
    monkeypatch.setattr(crew, "attack_chunks", counted)
    return taken


def once(attack, threat=LINF, restarts=1):
    return Plan(threat, (Repeated("it", "it", attack, threat, restarts=restarts),))


def told(result):
    """A result's rows without the times."""
    return [{k: v for k, v in dataclasses.asdict(row).items() if k != "seconds"} for row in result.attacks]


CASES = [
    (native.PGD(steps=6), ThreatModel("linf", "0.15"), 1),
    (native.PGD(steps=3), ThreatModel("linf", "0.1"), 3),
    (native.PGD(steps=4, loss="margin"), ThreatModel("l2", "0.8"), 2),
    (native.PGD(steps=4), ThreatModel("l1", "3"), 1),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("attack", "threat", "restarts"), CASES)
def test_no_number_depends_on_who_is_attacked_together(
    network, digits, monkeypatch, lots, together, attack, threat, restarts, precision
):
    images, labels = digits[0][1400:1560], digits[1][1400:1560]
    found = []
    ways = ((1, 1, 128), (8, 2, 128), (8, 1, 48), (3, 3, 128), (8, 1, 128))
    for most, workers, batch_size in ways if precision == "fp32" else ways[:2]:
        monkeypatch.setattr(crew, "LOT", most)
        lots.clear(), together.clear()
        plan = once(attack, threat, restarts)
        found.append(
            evaluate(network, images, labels, plan, seed=3, workers=workers, batch_size=batch_size, precision=precision)
        )
        assert sum(lots) == 10 and max(lots) == {1: 1, 3: 3, 8: 5}[most]
        assert all(together) and bool(together) is (most > 1)
    rows = [told(one) for one in found]
    assert all(row == rows[0] for row in rows[1:])
    outcomes = set(rows[0][0]["outcomes"])
    assert len(outcomes) > 1 and rows[0][0]["forwards"] > 1


def test_each_chunk_is_told_its_own_passes(network, digits, together):
    images, labels = digits[0][1400:1532], digits[1][1400:1532]
    target = Target(network, images, labels, torch.ones(132, dtype=torch.bool), repeatable=True)
    planned = PlannedAttack("it", "it", native.PGD(steps=5), ThreatModel("linf", "0.15"))
    chunks = [(number, places) for number, places in enumerate(torch.arange(132).split(33))]
    with torch.no_grad():
        joined = attack_chunks(target, planned, Loan(target.twin), chunks, [planned.threat], 3, Budget(128), True)
        apart = [
            found
            for one in chunks
            for found in attack_chunks(
                target, planned, Loan(target.twin), [one], [planned.threat], 3, Budget(128), True
            )
        ]
    assert len(joined) == len(apart) == 4 and together == [True]
    for (record, best), (own, own_best) in zip(joined, apart, strict=True):
        assert record | {"seconds": 0} == own | {"seconds": 0} and torch.equal(best, own_best)
        # An image is passed once a step until it is wrong; what fills a batch up is nobody's.
        assert record["forwards"] == sum(record["paid"]) == record["backwards"] <= 5 * 33
    assert len({record["forwards"] for record, _ in joined}) > 1


def test_what_waits_long_or_draws_is_attacked_chunk_by_chunk(network, digits, monkeypatch):
    images, labels = digits[0][1400:1560], digits[1][1400:1560]
    everything = torch.ones(160, dtype=torch.bool)
    chunks = [(number, places) for number, places in enumerate(torch.arange(160).split(CHUNK))]
    pgd = native.PGD(steps=10)

    def sizes(attack=pgd, restarts=1, beside=1, budget=None, repeatable=True, net=network):
        target = Target(net, images, labels, everything, repeatable=repeatable)
        (planned,) = once(attack, restarts=restarts).attacks
        found = crew.lots(planned, target, chunks, beside, budget or Budget(128))
        assert [number for lot in found for number, _ in lot] == list(range(10))
        return [len(lot) for lot in found]

    assert sizes() == [5, 5] and sizes(beside=2) == [5, 5] and sizes(beside=4) == [3, 3, 3, 1]
    assert sizes(restarts=20) == [2] * 5 and sizes(restarts=50) == sizes(native.PGD(steps=1000)) == [1] * 10
    assert sizes(budget=Budget(128, deadline=1e9)) == sizes(repeatable=False) == [1] * 10
    assert sizes(native.PGD(early_stop=False)) == sizes(native.FGSM()) == [1] * 10
    monkeypatch.setattr(crew, "LOT_BYTES", 3 * CHUNK * images[:1].nbytes)
    assert sizes() == [3, 3, 3, 1]
    monkeypatch.setattr(crew, "LOT_PARAMETERS", sum(one.numel() for one in network.parameters()) - 1)
    assert sizes() == [1] * 10

    monkeypatch.undo()
    calls = []

    class Own(native.PGD):
        def __call__(self, *given):
            return super().__call__(*given)

    class OtherTogether(native.PGD):
        def together(self, *given):
            return super().together(*given)

    class Around:
        """An attack that does something of its own with another, and is that one in all else."""

        minimal, access, norms, family, parallel = False, "white-box", frozenset({"linf"}), "pgd", True

        def __getattr__(self, name):
            return getattr(pgd, name)

        def __call__(self, *given):
            calls.append(pgd(*given))
            return calls[-1]

    class Stranger(Around):
        grouped, together, steps = True, None, ("a",)

    for attack in (Own(steps=10), OtherTogether(steps=10), Around(), Stranger()):
        assert sizes(attack) == [1] * 10
    monkeypatch.setattr("scl_defense_benchmarks.attempt.CHUNK", CHUNK)
    assert evaluate(network, images, labels, once(Around()), seed=1).attacks[0].status == "ok" and len(calls) == 10
    patched = lambda self, *given: calls.append(0) or given[1]  # noqa: E731
    monkeypatch.setattr(native.PGD, "__call__", patched)
    assert sizes() == [1] * 10


class Breaks(nn.Module):
    """Fails where an image is passed that it cannot bear."""

    def __init__(self, network, image):
        super().__init__()
        self.network, self.image = network, nn.Parameter(image.mean()[None])

    def forward(self, images):
        # Of the images as they were: an attacked one has another mean, and the one is met at its own start alone.
        if images.requires_grad and bool((images.detach().flatten(1).mean(1) == self.image).any()):
            raise ValueError("this one")
        return self.network(images)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_fault_is_its_chunk_s_and_what_was_attacked_before_stays(network, digits, monkeypatch, lots, workers):
    images, labels = digits[0][1400:1560], digits[1][1400:1560]
    broken, found = Breaks(network, images[70]).eval(), []
    for most in (1, 8):
        monkeypatch.setattr(crew, "LOT", most)
        lots.clear()
        plan = once(native.PGD(steps=3, random_start=False))
        found.append(evaluate(broken, images, labels, plan, seed=1, workers=workers).attacks[0])
        assert max(lots) == (1 if most == 1 else 5)
    assert found[0].status == found[1].status == "failed" and "this one" in found[0].note == found[1].note
    assert found[0].outcomes == found[1].outcomes and len(set(found[0].outcomes)) > 2


def test_nothing_behind_a_fault_is_attacked(network, digits, lots):
    asked = []

    class Never(nn.Module):
        def forward(self, images):
            if images.requires_grad:
                asked.append(len(images))
                raise ValueError("never")
            return network(images)

    images, labels = digits[0][1400:1560], digits[1][1400:1560]
    result = evaluate(Never().eval(), images, labels, once(native.PGD(steps=3)), seed=1)
    assert result.attacks[0].status == "failed" and lots == [5]
    assert asked[-2:] == [80, CHUNK] and asked.count(CHUNK) == 1  # together, and its first chunk


def test_who_stops_does_not_wait_for_a_lot(network, digits, lots, monkeypatch):
    """Not for the steps that are left of it: the other worker's next pass is its last."""
    images, labels = digits[0][1400:1560], digits[1][1400:1560]
    asked, calm = [], threading.Event()

    class Slow(nn.Module):
        def forward(self, images):
            if images.requires_grad and threading.current_thread() is not threading.main_thread():
                asked.append(len(images))
                calm.wait(0.05)
            return network(images)

    def progress(label, done, total):
        if done:
            raise KeyboardInterrupt

    monkeypatch.setattr(crew, "LOT", 2)
    plan = once(native.PGD(steps=100, early_stop=True), ThreatModel("linf", "0.001"))
    monkeypatch.setattr(crew, "LOT_STEPS", 1000)
    with pytest.raises(KeyboardInterrupt):
        evaluate(Slow().eval(), images, labels, plan, seed=1, workers=2, progress=progress)
    assert max(lots) == 2 and 100 < len(asked) < 270  # 300 if they waited for the third


def test_what_does_not_fit_into_memory_together_is_passed_chunk_by_chunk(network, digits, lots, together):
    images, labels = digits[0][1400:1560], digits[1][1400:1560]
    seen = []

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, images):
            if images.requires_grad:
                seen.append(len(images))
                if len(images) > 40:
                    raise MemoryError
            return self.network(images)

    result = evaluate(Small().eval(), images, labels, once(native.PGD(steps=4)), seed=1, batch_size=128)
    assert together == [False, False] and result.batch_size == 128  # each chunk fits
    plain = evaluate(network, images, labels, once(native.PGD(steps=4)), seed=1)
    assert max(lots) == 5 and max(seen) > 40 and seen[-1] <= 40
    assert told(result)[0] == told(plain)[0] and result.attacks[0].status == "ok"


def test_an_attack_that_writes_on_its_input_is_seen(network, digits, monkeypatch, lots, together):
    images, labels = digits[0][1400:1480], digits[1][1400:1480]

    ascend = native.ascend

    def writes(objective, images, *given, **named):
        found = ascend(objective, images, *given, **named)
        images[-1] = 0
        return found

    monkeypatch.setattr(native, "ascend", writes)
    found = evaluate(network, images, labels, once(native.PGD(steps=2)), seed=1)
    assert all(together) and together
    assert max(lots) > 1 and "input-written" in {flag.id for flag in found.flags}


def test_a_named_attack_is_attacked_together(network, digits, lots, together):
    """As a user asks for it."""
    images, labels = digits[0][1400:1560], digits[1][1400:1560]
    result = benchmark(network, images, labels, attacks="native:pgd:steps=3:restarts=2", eps="0.2", probes="none")
    assert result.attacks[0].status == "ok" and max(lots) >= 3 and all(together)
