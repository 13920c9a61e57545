"""Chunks that are attacked together: no number depends on it, whatever happens to them."""

import dataclasses

import pytest
import torch
from planted_attacks import LINF
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
def lots(monkeypatch):
    """How many chunks were attacked together, call by call."""
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
    network, digits, monkeypatch, lots, attack, threat, restarts, precision
):
    images, labels = digits[0][1400:1560], digits[1][1400:1560]
    found = []
    ways = ((1, 1, 128), (8, 2, 128), (8, 1, 48), (3, 3, 128), (8, 1, 128))
    for most, workers, batch_size in ways if precision == "fp32" else ways[:2]:
        monkeypatch.setattr(crew, "LOT", most)
        lots.clear()
        plan = once(attack, threat, restarts)
        found.append(
            evaluate(network, images, labels, plan, seed=3, workers=workers, batch_size=batch_size, precision=precision)
        )
        assert sum(lots) == 10 and max(lots) == {1: 1, 3: 3, 8: 5}[most]
    rows = [told(one) for one in found]
    assert all(row == rows[0] for row in rows[1:])
    outcomes = set(rows[0][0]["outcomes"])
    assert len(outcomes) > 1 and rows[0][0]["forwards"] > 1


def test_each_chunk_is_told_its_own_passes(network, digits, lots):
    images, labels = digits[0][1400:1532], digits[1][1400:1532]
    target = Target(network, images, labels, torch.ones(132, dtype=torch.bool), repeatable=True)
    planned = PlannedAttack("it", "it", native.PGD(steps=5), ThreatModel("linf", "0.15"))
    chunks = [(number, places) for number, places in enumerate(torch.arange(132).split(33))]
    with torch.no_grad():
        together = attack_chunks(target, planned, Loan(target.twin), chunks, [planned.threat], 3, Budget(128), True)
        apart = [
            found
            for one in chunks
            for found in attack_chunks(
                target, planned, Loan(target.twin), [one], [planned.threat], 3, Budget(128), True
            )
        ]
    assert len(together) == len(apart) == 4
    for (record, best), (own, own_best) in zip(together, apart, strict=True):
        assert record | {"seconds": 0} == own | {"seconds": 0} and torch.equal(best, own_best)
        # An image is passed once a step until it is wrong; what fills a batch up is nobody's.
        assert record["forwards"] == sum(record["paid"]) == record["backwards"] <= 5 * 33
    assert len({record["forwards"] for record, _ in together}) > 1


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

    class Own(native.PGD):
        def __call__(self, *given):
            return super().__call__(*given)

    monkeypatch.undo()
    assert sizes(Own(steps=10)) == [1] * 10  # a subclass has something to do in its call


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


def test_what_does_not_fit_into_memory_is_passed_in_smaller_parts(network, digits, monkeypatch, lots):
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
    plain = evaluate(network, images, labels, once(native.PGD(steps=4)), seed=1)
    assert max(lots) == 5 and max(seen) > 40 and seen[-1] <= 40
    assert max(size for size in seen if size <= 40) > CHUNK  # still together
    assert told(result)[0] == told(plain)[0] and result.attacks[0].status == "ok"


def test_an_attack_that_writes_on_its_input_is_seen(network, digits, monkeypatch, lots):
    images, labels = digits[0][1400:1480], digits[1][1400:1480]

    class Writes(native.PGD):
        @property
        def grouped(self):
            return True

        def together(self, classifier, images, *more):
            found = super().together(classifier, images, *more)
            images[-1] = 0
            return found

    found = evaluate(network, images, labels, once(Writes(steps=2)), seed=1)
    assert max(lots) > 1 and "input-written" in {flag.id for flag in found.flags}


def test_a_named_attack_is_attacked_together(network, digits, lots):
    """As a user asks for it."""
    images, labels = digits[0][1400:1560], digits[1][1400:1560]
    result = benchmark(network, images, labels, attacks="native:pgd:steps=3:restarts=2", eps="0.2", probes="none")
    assert result.attacks[0].status == "ok" and max(lots) >= 3
