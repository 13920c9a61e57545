"""The twin that attacks run on: the same function, cheaper; and what is done with what it says."""

import dataclasses
import random
import sys
import threading
from contextlib import nullcontext
from typing import ClassVar

import numpy as np
import pytest
import torch
from planted_attacks import LINF, Brightness, Planted, first_pixel, run
from scl_defense_benchmarks import native, twin
from scl_defense_benchmarks.battery import Plan, PlannedAttack, plan_attacks
from scl_defense_benchmarks.evaluate import evaluate
from scl_defense_benchmarks.loans import Loan
from scl_defense_benchmarks.results import TIMES
from scl_defense_benchmarks.twin import precision_of, rounds, twin_of
from torch import nn

from scl_defense.draws import OwnDraws, RowsOf
from scl_defense.errors import UserError
from scl_defense.models import Network
from scl_defense.plugins import default_host
from scl_defense.threat import ThreatModel


def grown(encoder, shape, seed=0):
    """A network whose batch norms have seen something, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Network(encoder, 10, (0.4,) * shape[0], (0.3,) * shape[0]).train()
        with torch.no_grad():
            for part in network.modules():
                if isinstance(part, nn.BatchNorm2d):
                    part.weight.uniform_(0.5, 1.5), part.bias.uniform_(-0.5, 0.5)
            network(torch.rand(32, *shape))
        return network.eval(), torch.rand(8, *shape)


def norms(network):
    return sum(isinstance(part, nn.BatchNorm2d) for part in network.modules())


MODELS = [("small-cnn", {}, True), ("resnet18", {"width": 4}, True), ("preact-resnet18", {"width": 4}, False),
          ("wide-resnet", {"depth": 10, "widen": 1}, False)]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "foldable"), MODELS)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_it_is_the_same_function_with_the_same_gradient(name, options, foldable, shape):
    network, images = grown(default_host()["model"].get(name)(**options)(shape), shape)
    # In float32 a ReLU whose input is zero but for rounding may flip.
    network, images = network.double(), images.double()
    made = twin_of(network, images)
    assert norms(network) > 0 and (norms(made) == 0 if foldable else 0 < norms(made) < norms(network))
    found = []
    for one in (network, made):
        points = images.clone().requires_grad_()
        logits = one(points)
        (gradient,) = torch.autograd.grad(logits.square().sum(), points)
        found.append((logits.detach(), gradient))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-8, atol=1e-9)
    assert not any(parameter.requires_grad for parameter in made.parameters())
    assert all(parameter.requires_grad for parameter in network.parameters())  # the original is nobody's business


class ReadTwice(nn.Module):
    """The convolution's own output is read beside the batch norm's: folding would change it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, images):
        raw = self.conv(images)
        return self.out((raw + self.norm(raw)).mean((2, 3)))


class CalledTwice(ReadTwice):
    """One batch norm after two passes of one convolution."""

    def forward(self, images):
        return self.out(self.norm(self.conv(images)).mean((2, 3)) + self.norm(self.conv(1 - images)).mean((2, 3)))


class Fixed(ReadTwice):
    """Takes its images apart in a way that asks for their memory order."""

    def forward(self, images):
        return self.out(self.norm(self.conv(images.view(-1, 1, 6, 6))).mean((2, 3)))


@pytest.mark.parametrize("kind", [ReadTwice, CalledTwice, Fixed])
def test_what_cannot_be_rearranged_stays_as_it_is(kind):
    torch.manual_seed(0)
    network = kind()
    network.norm.running_mean.normal_(), network.norm.running_var.uniform_(0.5, 2)
    network.eval()
    images = torch.rand(5, 1, 6, 6)
    torch.testing.assert_close(twin_of(network, images)(images), network(images), rtol=1e-4, atol=1e-5)


def test_an_attack_finds_the_networks_own_parts():
    network, images = grown(default_host()["model"].get("small-cnn")(width=4)((1, 8, 8)), (1, 8, 8))
    made = twin_of(network, images)
    assert made.classifier.weight.shape == (10, network.classifier.in_features)
    torch.testing.assert_close(made.features(images), network.features(images), rtol=1e-4, atol=1e-5)
    with pytest.raises(AttributeError, match="no_such_part"):
        _ = made.no_such_part


def test_bfloat16_answers_in_float32_and_is_a_little_off():
    network, images = grown(default_host()["model"].get("resnet18")(width=8)((3, 32, 32)), (3, 32, 32))
    logits = twin_of(network, images, "bf16")(images)
    wanted = network(images)
    error = float((logits - wanted).abs().max() / wanted.abs().max())
    assert logits.dtype == torch.float32 and 0 < error < 0.05


def test_what_an_attack_writes_into_its_twin_is_seen():
    network, images = grown(default_host()["model"].get("small-cnn")(width=4)((1, 8, 8)), (1, 8, 8))
    loan = Loan(twin_of(network, images))
    made = loan.twin("fp32")
    made(images)
    assert not loan.changed() and loan.passes.forwards == len(images)
    loan.unwatched(made, images)
    assert loan.passes.forwards == len(images)
    made.classifier.weight.data[0, 0] += 1
    assert loan.changed()
    loan.close()


# -- precision


def planned(attack, restarts=1, **more):
    class Once(PlannedAttack):
        pass

    one = Once("it", "it", attack, LINF)
    object.__setattr__(one, "restarts", restarts)
    return one


CPU = torch.device("cpu")


def test_what_runs_in_which_precision(monkeypatch):
    pgd, other = planned(native.PGD(), 2), planned(Planted(lambda *given: given[1]))
    assert rounds(pgd, "fp32", CPU) == [("fp32", 0, False), ("fp32", 1, False)]
    twice = [("bf16", 0, False), ("bf16", 1, False), ("fp32", 0, False), ("fp32", 1, False)]
    assert rounds(pgd, "bf16", CPU) == twice and precision_of(pgd, "bf16", CPU) == "bf16+fp32"
    for pays in (True, False):
        monkeypatch.setattr(twin, "bf16_pays", lambda device, pays=pays: pays)
        assert precision_of(pgd, "auto", CPU) == ("bf16" if pays else "fp32")
        assert precision_of(other, "auto", CPU) == "fp32"  # not a family that was measured
    assert all(doubted for precision, _, doubted in rounds(pgd, "auto", CPU) if precision == "fp32") or not pays
    for exempt in (native.Noise(), dataclasses.replace(native.PGD())):
        control = planned(exempt)
        assert precision_of(control, "bf16", CPU) == ("fp32" if exempt.access == "control" else "bf16+fp32")
    with pytest.raises(UserError, match="precision 'half' is unknown"):
        run(torch.rand(4, 1, 2, 2), torch.zeros(4, dtype=torch.long), native.FGSM(), precision="half")


@pytest.mark.parametrize("tiles", [True, False])
def test_bfloat16_pays_on_a_cpu_with_tiles(monkeypatch, tiles):
    """AVX-512's products of bfloat16, which every CPU with tiles has too, are slower than those of float32."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    assert twin.bf16_pays(CPU) is tiles
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")  # a torch that does not say
    assert twin.bf16_pays(CPU) is False and twin.bf16_pays(torch.device("meta")) is False


class Fine(nn.Module):
    """Class 1 where the first pixel is above 0.5, by however little; in bfloat16 0.501 is 0.5."""

    def forward(self, images):
        score = images[:, 0, 0, :1] - 0.5 @ torch.ones(1, 1) if False else images.flatten(1)[:, :1]
        moved = torch.nn.functional.linear(score, torch.ones(1, 1), -0.5 * torch.ones(1))
        return torch.cat([torch.zeros_like(moved), moved], 1)


@dataclasses.dataclass
class Nudge:
    """Sets the first pixel to a value of its own in each precision, and notes what it was asked."""

    norms: ClassVar[frozenset[str]] = frozenset({"linf"})
    minimal: ClassVar[bool] = False
    access: ClassVar[str] = "white-box"
    family: ClassVar[str] = "pgd"
    calls: list = dataclasses.field(default_factory=list)

    def __call__(self, classifier, images, labels, threat, rng):
        self.calls.append((classifier.precision, len(images)))
        torch.autograd.grad(classifier(points := images.clone().requires_grad_())[:, 1].sum(), points)
        made = images.clone()
        # In float32 it goes below the border; in bfloat16 half of the images stop where the twin alone is fooled.
        made[:, 0, 0, 0] = 0.49 if classifier.precision == "fp32" else torch.where(torch.arange(len(images)) % 2 == 0,
                                                                                  0.501, 0.52)  # fmt: skip
        return made


@pytest.mark.parametrize(("choice", "again"), [("auto", 10), ("bf16", 20)])
def test_no_image_is_robust_because_of_bfloat16(monkeypatch, choice, again):
    """``bf16`` attacks everything again that has survived; ``auto`` what has fooled the bfloat16 twin alone."""
    monkeypatch.setattr(twin, "bf16_pays", lambda device: True)
    images, labels = torch.full((20, 1, 2, 2), 0.55), torch.ones(20, dtype=torch.long)
    attack = Nudge()
    result = run(images, labels, attack, network=Fine(), precision=choice)
    assert attack.calls == [("bf16", 16), ("bf16", 4), ("fp32", again if again < 16 else 16)] + (
        [("fp32", 4)] if again > 16 else []
    )
    row = result.attacks[0]
    assert row.broken == again and row.precision == ("bf16" if choice == "auto" else "bf16+fp32")


class Slope(nn.Module):
    """Logits 10 + (0, m) for the margin m, ten times how far the first pixel is above 0.5."""

    def forward(self, images):
        margin = 10 * (images[:, :1, 0, 0] - 0.5)
        return 10 + torch.cat([torch.zeros_like(margin), margin], 1)


@pytest.mark.parametrize(("precision", "passed"), [("fp32", 3), ("bf16", 4)])
def test_an_image_that_is_wrong_by_rounding_alone_is_attacked_on(precision, passed):
    """Margins 0.14, 0.04, -0.06, -0.16 beside logits of 10: bfloat16 could take the third for either sign."""
    counted = []
    made = twin.Twin(Slope(), precision)
    made.register_forward_hook(lambda module, given, output: counted.append(len(output)))
    images = torch.full((1, 1, 2, 2), 0.514)
    PGD = native.PGD(steps=5, rel_step=0.2, random_start=False)
    PGD(made, images, torch.ones(1, dtype=torch.long), ThreatModel("linf", "0.05"), torch.Generator())
    assert sum(counted) == passed


@pytest.mark.parametrize("attack", [native.PGD(steps=10), native.PGD(steps=5, loss="margin"), native.FGSM()])
def test_two_passes_break_whatever_float32_breaks(network, digits, attack):
    images, labels = digits[0][1400:1500], digits[1][1400:1500]
    found = {
        precision: evaluate(
            network, images, labels, Plan(LINF, (PlannedAttack("it", "it", attack, LINF),)), seed=3, precision=precision
        ).attacks[0]
        for precision in ("fp32", "bf16")
    }
    broken = {name: {place for place, code in enumerate(row.outcomes) if code == 2} for name, row in found.items()}
    assert broken["fp32"] and broken["fp32"] <= broken["bf16"]


# -- side by side


def test_workers_reach_no_number(network, digits, host, monkeypatch):
    monkeypatch.setattr("scl_defense_benchmarks.attempt.CHUNK", 16)
    images, labels = digits[0][1400:1500], digits[1][1400:1500]
    plan = plan_attacks(
        "noise,native:fgsm,native:pgd:steps=8,native:pgd:loss=margin,pgd:steps=3", host=host, threat=LINF
    )

    def told(workers):
        result = evaluate(network, images, labels, plan, seed=1, workers=workers)
        assert result.workers == workers

        def without_times(value):
            if isinstance(value, dict):
                return {k: without_times(v) for k, v in value.items() if k not in (*TIMES, "workers")}
            return [without_times(item) for item in value] if isinstance(value, (list, tuple)) else value

        return without_times(result.to_json())

    before = torch.get_num_threads(), torch.random.get_rng_state()
    assert told(1) == told(3) == told(8)
    assert torch.get_num_threads() == before[0] and torch.equal(torch.random.get_rng_state(), before[1])
    with pytest.raises(UserError, match="workers is 0"):
        told(0)


def test_a_free_worker_takes_the_next_chunk(network, digits, monkeypatch):
    """One slow chunk holds up nobody: the others are done meanwhile, and come back in their order."""
    monkeypatch.setattr("scl_defense_benchmarks.attempt.CHUNK", 10)
    images, labels = digits[0][1400:1480], digits[1][1400:1480]
    others_done, done, first = threading.Event(), [], threading.Event()

    @dataclasses.dataclass(frozen=True)
    class Waits(native.PGD):
        def __call__(self, classifier, images, labels, threat, rng):
            slow = not first.is_set()
            first.set()
            if slow:
                assert others_done.wait(60)
            made = super().__call__(classifier, images, labels, threat, rng)
            done.append(len(done))
            if len(done) == 3:
                others_done.set()
            return made

    told = []
    plan = Plan(LINF, (PlannedAttack("it", "it", Waits(steps=2), LINF),))
    result = evaluate(network, images, labels, plan, seed=1, workers=2, progress=lambda *given: told.append(given[1]))
    plain = Plan(LINF, (PlannedAttack("it", "it", native.PGD(steps=2), LINF),))
    assert result.attacks[0].status == "ok" and told == sorted(told) and len(told) > 5
    assert result.attacks[0].outcomes == evaluate(network, images, labels, plain, seed=1).attacks[0].outcomes


def test_workers_print_nothing_and_who_waits_for_them_may(network, digits, monkeypatch, capsys):
    monkeypatch.setattr("scl_defense_benchmarks.attempt.CHUNK", 8)
    images, labels = digits[0][1400:1440], digits[1][1400:1440]

    beside = []

    @dataclasses.dataclass(frozen=True)
    class Chatty(native.PGD):
        def __call__(self, *given):
            if threading.current_thread() is not threading.main_thread():
                beside.append(print("chatter") or print("chatter", file=sys.stderr))
            return super().__call__(*given)

    def progress(label, done, total):
        print(f"{done} done")
        print(f"{done} done", file=sys.stderr, flush=True)

    plan = Plan(LINF, (PlannedAttack("it", "it", Chatty(steps=2), LINF),))
    evaluate(network, images, labels, plan, seed=1, workers=2, progress=progress)
    said = capsys.readouterr()
    done = said.out.split("\n")
    assert beside and said.out == said.err and "chatter" not in said.out
    assert done[0] == "0 done" and len(done) > 4


def test_a_fault_ends_an_attack_at_the_same_chunk_whoever_works(network, digits, monkeypatch):
    monkeypatch.setattr("scl_defense_benchmarks.attempt.CHUNK", 8)
    images, labels = digits[0][1400:1480], digits[1][1400:1480]
    chosen = images[30]

    @dataclasses.dataclass(frozen=True)
    class Breaks(native.PGD):
        def __call__(self, classifier, images, labels, threat, rng):
            if any(torch.equal(image, chosen) for image in images):
                raise ValueError("this one")
            return super().__call__(classifier, images, labels, threat, rng)

    plan = Plan(LINF, (PlannedAttack("it", "it", Breaks(steps=2), LINF),))
    rows = [evaluate(network, images, labels, plan, seed=1, workers=workers).attacks[0] for workers in (1, 3)]
    assert rows[0].status == rows[1].status == "failed" and rows[0].note == rows[1].note == "ValueError: this one"
    assert rows[0].outcomes == rows[1].outcomes and len(set(rows[0].outcomes)) > 2


LIBRARY = (
    "fgsm", "pgd:steps=2", "mifgsm:steps=2", "cw:c=1:steps=5:eps=0.5", "deepfool:steps=2:eps=0.5", "apgd-ce:steps=4",
    "apgd-dlr:steps=4", "fab-t:steps=2:targets=2", "autoattack:steps=3:targets=2:queries=8", "pgd-l2:steps=2:eps=0.5",
    "square:queries=8:norm=l2:eps=0.5",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [128, 5])
def test_a_library_that_draws_gives_the_same_numbers_side_by_side(network, digits, host, monkeypatch, batch_size):
    """Each thread has generators of its own, with the numbers of the global ones; what is printed stays swallowed."""
    monkeypatch.setattr("scl_defense_benchmarks.attempt.CHUNK", 8)
    images, labels = digits[0][1400:1428], digits[1][1400:1428]
    plan = plan_attacks(LIBRARY, host=host, threat=LINF, classes=10)
    assert all(one.attack.parallel for one in plan.attacks) and len(plan.attacks) == len(LIBRARY)
    before, stdout = (torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()), sys.stdout
    alone, beside = (
        evaluate(network, images, labels, plan, seed=1, workers=workers, batch_size=batch_size) for workers in (1, 3)
    )
    for one, other in zip(alone.attacks, beside.attacks, strict=True):
        assert one.status != "failed", one.note
        for name in ("status", "outcomes", "distances", "predictions", "queries", "backwards"):
            assert getattr(one, name) == getattr(other, name), (one.label, name)
    assert sum(row.broken for row in alone.attacks) > 20
    assert sys.stdout is stdout and torch.equal(torch.random.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all() and random.getstate() == before[2]


def test_own_draws_are_those_of_the_global_generator():
    """Everything that :class:`OwnDraws` knows, in one order, inside parts of a chunk too; the global one stays put."""

    def draw():
        image = torch.zeros(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
        return [
            torch.rand(4, 3), torch.randn((4, 3, 5, 5)), torch.randint(10, (4, 2)), torch.randperm(9),
            torch.rand_like(image), torch.randn_like(image), torch.empty_like(image).uniform_(-1, 1),
            torch.zeros(4).normal_(), torch.zeros(4, 2).bernoulli_(0.5), torch.zeros(4).exponential_(),
            torch.zeros(4, dtype=torch.int64).random_(5), torch.nn.init.uniform_(torch.zeros(4, 2)),
        ]  # fmt: skip

    for part in (nullcontext, lambda: RowsOf(2, 6, 9)):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            with part():
                wanted = draw()
            torch.manual_seed(6)
            state = torch.random.get_rng_state()
            with part(), OwnDraws(5):
                found = draw()
            assert torch.equal(torch.random.get_rng_state(), state)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_the_twin_is_checked_once_for_a_whole_battery(network, digits, host, monkeypatch):
    """A copy of it for every attack and worker, which no attack shares with another."""
    made, lent = [], []

    def making(*given, **named):
        made.append(twin_of(*given, **named))
        return made[-1]

    monkeypatch.setattr("scl_defense_benchmarks.chunks.twin_of", making)

    @dataclasses.dataclass(frozen=True)
    class Spoils(native.PGD):
        def __call__(self, classifier, *given):
            lent.append(classifier)
            returned = super().__call__(classifier, *given)
            next(classifier.parameters()).zero_()
            return returned

    images, labels = digits[0][1400:1440], digits[1][1400:1440]
    attacks = [Spoils(steps=2), native.PGD(steps=2), Spoils(steps=3)]
    plan = Plan(LINF, tuple(PlannedAttack(f"a{k}", "it", attack, LINF) for k, attack in enumerate(attacks)))
    rows = evaluate(network, images, labels, plan, seed=1).attacks
    assert len(made) == 1 and len({id(one) for one in lent}) == 2 and made[0] not in lent
    assert [row.status for row in rows] == ["failed", "ok", "failed"]
    alone = evaluate(network, images, labels, Plan(LINF, plan.attacks[1:2]), seed=1).attacks[0]
    assert rows[1].outcomes == alone.outcomes and rows[1].distances == alone.distances


def test_a_network_that_draws_is_attacked_by_one_worker_and_never_stopped_early(monkeypatch):
    """Side by side its draws would come in any order; and one wrong answer of a random network is no success."""
    monkeypatch.setattr("scl_defense_benchmarks.attempt.CHUNK", 8)

    class Noisy(Brightness):
        def forward(self, images):
            return super().forward(images + 0.05 * torch.randn_like(images))

    images = torch.rand(32, 1, 2, 2, generator=torch.Generator().manual_seed(5))
    labels = (images[:, 0, 0, 0] > 0.5).long()
    attack = native.PGD(steps=4)
    runs = [run(images, labels, attack, network=Noisy(), workers=workers).attacks[0] for workers in (1, 4)]
    assert runs[0].outcomes == runs[1].outcomes and runs[0].options["early_stop"] is False
    assert run(images, labels, attack, workers=4).attacks[0].options["early_stop"] is True


# -- stopping early


def test_an_early_stop_costs_less_and_breaks_no_less(network, digits):
    images, labels = digits[0][1400:1480], digits[1][1400:1480]
    rows = {}
    for early in (True, False):
        plan = Plan(LINF, (PlannedAttack("it", "it", native.PGD(early_stop=early), LINF),))
        rows[early] = evaluate(network, images, labels, plan, seed=0).attacks[0]
    broken = {early: {k for k, code in enumerate(row.outcomes) if code == 2} for early, row in rows.items()}
    assert broken[False] <= broken[True]
    assert rows[True].backwards < 0.8 * rows[False].backwards == 0.8 * 20
    # Each image pays for itself: who fell at once paid once, who held paid for every step.
    queries = rows[True].queries
    held = [queries[k] for k, code in enumerate(rows[True].outcomes) if code == 1]
    assert held and all(paid == 20 for paid in held) and min(queries[k] for k in broken[True]) < 10


def test_an_early_stop_does_not_know_the_batch_size(network, digits):
    images, labels = digits[0][1400:1464], digits[1][1400:1464]
    plan = Plan(LINF, (PlannedAttack("it", "it", native.PGD(steps=10), LINF),))
    rows = [evaluate(network, images, labels, plan, seed=0, batch_size=size).attacks[0] for size in (64, 7)]
    assert rows[0].outcomes == rows[1].outcomes
    assert rows[0].distances == pytest.approx(rows[1].distances, abs=1e-6)


def test_a_saturated_network_is_still_no_attempt():
    """Passing some of the images only must not hide which of them ever had a gradient."""
    images, labels = torch.rand(40, 1, 2, 2) * 0.6 + 0.2, torch.zeros(40, dtype=torch.long)
    labels = (images[:, 0, 0, 0] > 0.5).long()

    class Flat(Brightness):
        def forward(self, images):
            return 1000 * super().forward(images)

    row = run(images, labels, native.PGD(), network=Flat(), threat=ThreatModel("linf", "0.02")).attacks[0]
    assert row.status == "invalid" and row.unmoved > 0
    first = first_pixel(images, torch.zeros(len(images)))
    assert torch.equal(first, images)
