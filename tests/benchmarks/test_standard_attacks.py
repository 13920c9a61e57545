"""The attacks of the standard battery: they reach known optima, fail honestly, and the library's faults are gone."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
import torchattacks
from planted_attacks import run
from scl_defense_benchmarks import loans, native
from scl_defense_benchmarks import torchattacks_adapter as adapter
from scl_defense_benchmarks.autoattack import AutoAttack
from scl_defense_benchmarks.loans import Passes
from scl_defense_benchmarks.results import ROBUST, UNMOVED
from scl_defense_benchmarks.torchattacks_adapter import APGDCE, APGDDLR, APGDT, FAB, MIFGSM, DeepFool, Square
from scl_defense_benchmarks.twin import Twin
from torch import nn
from victim_networks import Linear, accuracy

from scl_defense.errors import UserError
from scl_defense.guard import frozen
from scl_defense.threat import ThreatModel

SHORT = AutoAttack(steps=30, targets=3, queries=100)


def raw(attack, network, images, labels, **settings):
    """An attack of the library as its users call it."""
    with frozen(network), torch.enable_grad():
        return attack(network, **settings)(images, labels).detach()


def predicted(network, images):
    with torch.no_grad():
        return network(images).argmax(1)


def linear_problem(classes, shape=(1, 6, 6), count=48):
    """A linear network with images well inside the box, and the closed-form distance of each to its nearest example.

    distances: norm -> (N,): the smallest gap between two logits over the dual norm of their weights' difference.
    """
    rng = torch.Generator().manual_seed(classes)
    size = shape[0] * shape[1] * shape[2]
    weight, images = torch.randn(classes, size, generator=rng), 0.4 + 0.2 * torch.rand(count, *shape, generator=rng)
    network = Linear(weight, torch.zeros(classes))
    with torch.no_grad():
        network.bias -= network(images).mean(0)  # every class occurs
        logits = network(images).double()
    labels = logits.argmax(1)
    assert len(labels.unique()) == classes
    slopes = weight.double()[None] - weight.double()[labels][:, None]
    gaps = logits.gather(1, labels[:, None]) - logits
    own = F.one_hot(labels, classes).bool()
    distances = {
        norm: (gaps / slopes.norm(p=dual, dim=2)).masked_fill(own, torch.inf).amin(1)
        for norm, dual in (("linf", 1), ("l2", 2))
    }
    return network, images, labels, distances


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    ("attack", "classes"),
    [
        (APGDCE(steps=40), 2),
        (APGDCE(steps=40), 5),
        (APGDDLR(steps=40), 3),
        (APGDT(steps=40), 5),
        (AutoAttack(steps=40, queries=20), 2),
        (AutoAttack(steps=40, queries=20), 3),
        (AutoAttack(steps=40, queries=20), 5),
    ],
    ids=repr,
)
def test_it_breaks_what_can_be_broken_in_a_linear_network_and_nothing_else(rng, norm, attack, classes):
    network, images, labels, distances = linear_problem(classes)
    nearest = distances[norm]
    threat = ThreatModel(norm, f"{float(nearest.median()):.6f}")
    made = attack(network, images, labels, threat, rng())
    assert threat.contains(images, made).all()
    broken = predicted(network, made) != labels
    easy, hard = nearest < 0.95 * threat.radius, nearest > 1.001 * threat.radius
    assert easy.sum() > 15 and hard.sum() > 15
    assert not broken[hard].any()
    # Cross-entropy of several classes is convex here: one descent can end at the class that is not the nearest.
    assert broken[easy].double().mean() >= (0.8 if attack == APGDCE(steps=40) and classes > 2 else 1)


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize(
    ("attack", "norm"), [(FAB(steps=20), "linf"), (FAB(steps=20), "l2"), (DeepFool(), "l2")], ids=str
)
def test_the_smallest_perturbation_of_a_linear_network(rng, attack, norm, classes):
    network, images, labels, distances = linear_problem(classes)
    threat = ThreatModel(norm, "0.001")  # must bound nothing
    made = attack(network, images, labels, threat, rng())
    assert accuracy(network, made, labels) == 0
    distance = threat.distance(images, made)
    assert (distance >= distances[norm] * (1 - 1e-4)).all()
    assert (distance <= distances[norm] * 1.06 + 1e-5).all()  # the overshoots: 1.05 and 1.02


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_square_finds_half_of_what_there_is_without_a_gradient(rng, norm):
    network, images, labels, distances = linear_problem(5)
    threat = ThreatModel(norm, f"{3 * float(distances[norm].median()):.6f}")
    with torch.no_grad():
        made = Square(queries=600)(network, images, labels, threat, rng())
    broken = predicted(network, made) != labels
    assert threat.contains(images, made).all()
    assert not broken[distances[norm] > threat.radius].any()
    assert broken[distances[norm] <= threat.radius].double().mean() > 0.5


def test_mifgsm_is_the_sign_step_of_a_linear_network(rng):
    network, images, labels, _ = linear_problem(2)
    normal = (network.weight[1 - labels] - network.weight[labels]).view_as(images).detach()
    made = MIFGSM()(network, images, labels, ThreatModel("linf", "0.05"), rng())
    torch.testing.assert_close(made, images + 0.05 * normal.sign(), atol=1e-6, rtol=0)


# -- as the library computes it, where the library is right


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (APGDCE(steps=20), lambda net, **own: torchattacks.APGD(net, loss="ce", **own)),
        (APGDDLR(steps=20), lambda net, **own: torchattacks.APGD(net, loss="dlr", **own)),
        (APGDT(steps=20, targets=4), lambda net, **own: torchattacks.APGDT(net, n_classes=5, **own)),
    ],
    ids=["ce", "dlr", "t"],
)
@pytest.mark.parametrize("early", [False, True], ids=["whole", "early"])
def test_linf_apgd_is_that_of_the_library_where_it_succeeds(network, victims, rng, ours, theirs, early):
    """And with an early stop it breaks the same images in fewer passes; a failure is the same best iterate."""
    images, labels = victims
    threat, passed = ThreatModel("linf", "0.12"), []
    hook = network.register_forward_hook(lambda module, given, output: passed.append(len(output)))
    made = dataclasses.replace(ours, early_stop=early)(network, images, labels, threat, rng(4))
    hook.remove()
    whole = dataclasses.replace(ours, early_stop=False)(network, images, labels, threat, rng(4))
    seed = int(torch.randint(2**62, (), generator=rng(4)))
    with torch.random.fork_rng():
        reference = raw(theirs, network, images, labels, norm="Linf", eps=0.12, steps=20, seed=seed)
    found = predicted(network, reference) != labels
    assert 5 < found.sum() < len(labels) and threat.contains(images, made).all()
    assert torch.equal(predicted(network, made) != labels, found)
    kept = ~found if early else found
    torch.testing.assert_close(made[kept], (whole if early else reference)[kept], atol=1e-6, rtol=0)
    without = 20 * len(labels) * getattr(ours, "targets", 1)
    assert sum(passed) < 0.8 * without if early else sum(passed) > 20 * len(labels)


def test_an_early_stop_of_apgd_passes_each_image_until_it_falls():
    """A straight slope, whose first step reaches the ball's edge: an image falls with it or never."""
    network = Linear(torch.tensor([[0.0, 0, 0, 0], [20.0, 0, 0, 0]]), torch.tensor([10.0, 0.0]))
    images, labels = torch.full((6, 1, 2, 2), 0.5), torch.ones(6, dtype=torch.long)
    images[:, 0, 0, 0] = torch.tensor([0.51, 0.52, 0.53, 0.54, 0.9, 0.95])
    made = Twin(network)
    passes = Passes()
    passes.begin(6, images.device)
    handles = loans._watch_passes(made, passes)
    with frozen(made), torch.enable_grad():
        found = APGDCE(steps=20)(made, images, labels, ThreatModel("linf", "0.1"), torch.Generator().manual_seed(0))
    for handle in handles:
        handle.remove()
    assert (predicted(network, found) != labels).tolist() == [True] * 4 + [False] * 2
    paid = passes.paid.tolist()  # the start, and every step
    assert all(count <= 2 for count in paid[:4]) and paid[4:] == [21, 21]
    assert passes.witness.all() and passes.traceable and made.rows is None


@pytest.mark.parametrize("attack", [APGDCE(steps=20), APGDT(steps=20, targets=3)], ids=["ce", "t"])
def test_where_all_images_are_wrong_the_library_s_loop_ends(network, victims, monkeypatch, attack):
    """With the examples that it had kept by then; its arithmetic on what is passed no more is spared."""
    images, labels = victims
    threat, asked = ThreatModel("linf", "0.6"), []
    logits = torchattacks.attack.Attack.get_logits
    monkeypatch.setattr(
        torchattacks.attack.Attack, "get_logits", lambda self, *given: asked.append(0) or logits(self, *given)
    )
    made = attack(network, images, labels, threat, torch.Generator().manual_seed(0))
    assert (predicted(network, made) != labels).all() and threat.contains(images, made).all()
    assert len(asked) < 15
    asked.clear()
    whole = dataclasses.replace(attack, early_stop=False)(
        network, images, labels, threat, torch.Generator().manual_seed(0)
    )
    assert (predicted(network, whole) != labels).all() and len(asked) > 20


# -- the library's faults, and that they are gone


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (APGDCE(steps=5), torchattacks.APGD),
        (APGDT(steps=5), torchattacks.APGDT),
        (Square(queries=5), lambda net, steps, **own: torchattacks.Square(net, n_queries=steps, **own)),
    ],
    ids=["apgd-ce", "apgd-t", "square"],
)
def test_a_failure_is_the_best_iterate_and_not_the_clean_image(network, victims, rng, ours, theirs):
    images, labels = victims
    with torch.random.fork_rng():
        clean = raw(theirs, network, images, labels, norm="Linf", eps=1e-3, steps=5)
    assert torch.equal(clean, images)  # the fault
    threat = ThreatModel("linf", "1e-3")
    made = ours(network, images, labels, threat, rng())
    assert threat.contains(images, made).all()
    assert (threat.distance(images, made) > 0.5e-3).all()
    with torch.no_grad():
        higher = native.margin(network(made), labels) > native.margin(network(images), labels)
    assert higher.double().mean() > 0.8


class Scaled(nn.Module):
    def __init__(self, network, factor):
        super().__init__()
        self.network, self.factor = network, factor

    def forward(self, images):
        return self.network(images) * self.factor


def test_small_logits_blind_fab_and_not_the_adapter(rng):
    """Slopes below 1e-8 a pixel are zero to the library."""
    network, images, labels, distances = linear_problem(5)
    small = Scaled(network, 1e-9)
    settings = {"norm": "L2", "eps": 10.0, "steps": 20, "multi_targeted": True, "n_classes": 5}
    with torch.random.fork_rng():
        blind = raw(torchattacks.FAB, small, images, labels, **settings)
        seeing = raw(torchattacks.FAB, network, images, labels, **settings)
    assert accuracy(small, blind, labels) > 0.9 > 0 == accuracy(network, seeing, labels)
    made = FAB(steps=20)(small, images, labels, ThreatModel("l2", "1"), rng())
    assert (ThreatModel("l2", "1").distance(images, made) <= 1.06 * distances["l2"] + 1e-5).all()


@pytest.mark.slow
def test_deepfool_stops_on_the_boundary_and_the_adapter_behind_it(network, victims, rng):
    images, labels = victims
    stopped = raw(torchattacks.DeepFool, network, images, labels)
    assert accuracy(network, stopped, labels) > 0.2
    threat = ThreatModel("l2", "1")
    made = DeepFool()(network, images, labels, threat, rng())
    assert accuracy(network, made, labels) == 0
    assert (threat.distance(images, made) <= 1.021 * threat.distance(images, stopped)).all()


def test_fab_keeps_the_nearest_class_and_not_the_first_inside_eps(network, victims, rng):
    images, labels = victims
    threat = ThreatModel("linf", "0.9")
    settings = {"norm": "Linf", "eps": 0.9, "steps": 30, "multi_targeted": True}
    with torch.random.fork_rng():
        first = threat.distance(images, raw(torchattacks.FAB, network, images, labels, **settings))
    made = FAB(steps=30)(network, images, labels, threat, rng())
    nearest = threat.distance(images, made)
    assert accuracy(network, made, labels) == 0
    assert (nearest <= 1.002 * first).all() and (nearest < 0.98 * first).any()


@pytest.mark.parametrize("side", [3, 5, 6, 8, 11, 12, 14, 18, 19, 24, 28, 32])
def test_square_under_l2_takes_images_of_any_side(rng, side):
    """Raw, the library fails for instance on sides 3, 12, 14 and 24, and on every image that is not square."""
    for shape in ((side, side), (side, side + 3), (side + 4, side)):
        size = shape[0] * shape[1]
        network = Linear(torch.randn(3, size, generator=rng(side)), torch.zeros(3))
        images = torch.rand(2, 1, *shape, generator=rng(1))
        labels, threat = predicted(network, images), ThreatModel("l2", "1")
        made = Square(queries=40)(network, images, labels, threat, rng())
        assert made.shape == images.shape and threat.contains(images, made).all()
        assert (threat.distance(images, made) > 0.1).all()


class _Spoilt(torch.autograd.Function):
    """The identity; below 0.7 the slope is not a number."""

    @staticmethod
    def forward(context, pixel):
        context.save_for_backward(pixel)
        return pixel.clone()

    @staticmethod
    def backward(context, slope):
        (pixel,) = context.saved_tensors
        return torch.where(pixel < 0.7, torch.nan, slope)


class Spoilt(nn.Module):
    """Class 1 from 0.6 of the first pixel on, or always."""

    def __init__(self, always):
        super().__init__()
        self.always = always
        self.where = nn.Parameter(torch.zeros(1))  # the library asks a parameter for the device

    def forward(self, images):
        value = _Spoilt.apply(images[:, 0, 0, 0]) - 0.6
        value = value.clamp(min=0.01) if self.always else value
        return torch.stack([-value, value], dim=1)


@pytest.mark.parametrize("always", [False, True])
def test_a_slope_that_is_not_a_number_does_not_take_away_what_fab_had_found(rng, always):
    """After a success the library goes back towards the image, meets NaN there and puts it into the example."""
    images, labels = torch.full((3, 1, 2, 2), 0.75), torch.ones(3, dtype=torch.long)
    network, threat = Spoilt(always), ThreatModel("l2", "1")
    settings = {"norm": "L2", "eps": 1.0, "multi_targeted": True, "n_classes": 2}
    with torch.random.fork_rng():
        lost = raw(torchattacks.FAB, network, images, labels, **settings)
    assert not ((predicted(network, lost) == 0) & lost.flatten(1).isfinite().all(1)).any()
    made = FAB(steps=10)(network, images, labels, threat, rng())
    assert accuracy(network, made, labels) == always  # a failure is the last iterate that was an image
    torch.testing.assert_close(threat.distance(images, made), torch.full((3,), 1.05 * 0.15).double(), atol=1e-3, rtol=0)
    images[:, 0, 0, 0] = 0.65  # no usable slope from the start
    assert torch.equal(FAB(steps=10)(network, images, labels, threat, rng()), images)


# -- few classes, and shapes


@pytest.mark.parametrize(("attack", "name", "needed"), [(APGDDLR(), "apgd-dlr", 3), (APGDT(), "apgd-t", 4)])
def test_too_few_classes_are_a_clear_error(rng, attack, name, needed):
    network, images, labels, _ = linear_problem(needed - 1)
    message = f"attack '{name}' needs {needed} classes, the network has {needed - 1}; use apgd-ce or autoattack"
    with pytest.raises(UserError, match=message):
        attack(network, images, labels, ThreatModel("linf", "0.1"), rng())


def test_the_stages_of_autoattack():
    assert list(AutoAttack().stages(10)) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert list(AutoAttack().stages(4)) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert list(AutoAttack().stages(3)) == ["apgd-ce", "apgd-dlr", "fab-t", "square"]
    assert list(AutoAttack().stages(2)) == ["apgd-ce", "apgd-margin", "fab-t", "square"]
    assert AutoAttack().stages(10)["square"] == Square(queries=5000)
    assert AutoAttack().stages(10)["apgd-t"] == APGDT(steps=100, targets=9)


@pytest.mark.parametrize("classes", [2, 3])
def test_saturated_logits_of_few_classes_do_not_stop_autoattack(rng, classes):
    """Logits x 1e6: cross-entropy has no gradient, and the targeted loss is not defined."""
    network, images, labels, distances = linear_problem(classes)
    masked, nearest = Scaled(network, 1e6), distances["linf"]
    threat = ThreatModel("linf", f"{float(nearest.median()):.6f}")
    second = list(SHORT.stages(classes).values())[1]
    for attack in (second, SHORT):
        made = attack(masked, images, labels, threat, rng())
        assert ((predicted(network, made) != labels) | (nearest > 0.95 * threat.radius)).all()


@pytest.mark.parametrize("attack", [APGDT(steps=10), FAB(steps=10), Square(queries=20), SHORT], ids=repr)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_colour_and_oblong_images_and_one_alone(rng, attack, norm):
    network, images, labels, distances = linear_problem(5, shape=(3, 7, 10))
    threat = ThreatModel(norm, f"{4 * float(distances[norm].max()):.6f}")
    for count in (1, 9):
        made = attack(network, images[:count], labels[:count], threat, rng())
        assert made.shape == images[:count].shape and made.is_contiguous() and not made.requires_grad
        if attack.access == "white-box":
            assert accuracy(network, made, labels[:count]) == 0


@pytest.mark.parametrize("attack", [FAB(steps=20), DeepFool(), APGDT(steps=20)], ids=repr)
def test_an_image_does_not_depend_on_its_neighbours(rng, attack):
    network, images, labels, distances = linear_problem(5)
    threat = ThreatModel("l2", f"{1.2 * float(distances['l2'].max()):.6f}")
    together = attack(network, images, labels, threat, rng())
    order = torch.randperm(len(images), generator=rng(2))
    mixed = attack(network, images[order], labels[order], threat, rng())
    assert accuracy(network, together, labels) == accuracy(network, mixed, labels[order]) == 0
    if attack.minimal:
        torch.testing.assert_close(mixed, together[order], atol=1e-5, rtol=0)


# -- what must not pass for robustness


class Blind(nn.Module):
    """The same decisions without a gradient, for all images or for those whose first pixel is black."""

    def __init__(self, network, dark_only=False):
        super().__init__()
        self.network, self.dark_only = network, dark_only

    def forward(self, images):
        logits = self.network(images)
        hidden = images[:, 0, 0, 0] < 0.1 if self.dark_only else torch.ones(len(images), dtype=torch.bool)
        return torch.where(hidden[:, None], logits.detach() + 0 * logits, logits)


WHITE = [APGDCE(steps=5), APGDDLR(steps=5), APGDT(steps=5), FAB(steps=5), DeepFool(), MIFGSM()]
WHITE.append(AutoAttack(steps=5, queries=3))


@pytest.mark.parametrize("attack", WHITE, ids=repr)
def test_without_a_gradient_there_is_no_attempt(rng, attack):
    network, images, labels, _ = linear_problem(5)
    norm = "l2" if isinstance(attack, DeepFool) else "linf"
    blind, threat = Blind(network), ThreatModel(norm, "1e-5")
    made = attack(blind, images, labels, threat, rng())
    unbroken = predicted(network, made) == labels
    assert unbroken.sum() > 40 and torch.equal(made[unbroken], images[unbroken])
    row = run(images, labels, attack, threat=threat, network=blind).attacks[0]
    assert row.status == "invalid" and row.robust_accuracy is None
    assert run(images, labels, attack, threat=threat, network=network).attacks[0].status == "ok"


@pytest.mark.parametrize("attack", WHITE, ids=repr)
def test_images_without_a_gradient_spoil_no_others(rng, attack):
    network, images, labels, _ = linear_problem(5)
    norm = "l2" if isinstance(attack, DeepFool) else "linf"
    images = images.clone()
    images[::4, 0, 0, 0] = 0.01
    labels = predicted(network, images)
    threat = ThreatModel(norm, "1e-5")
    row = run(images, labels, attack, threat=threat, network=Blind(network, dark_only=True)).attacks[0]
    dark = torch.zeros(len(images), dtype=torch.bool)
    dark[::4] = True
    outcomes = torch.tensor(row.outcomes)
    assert (outcomes[dark] == UNMOVED).sum() >= 11
    assert not (outcomes[~dark] == UNMOVED).any() and row.violations["nonfinite"] == 0


@pytest.mark.parametrize("attack", [FAB(steps=5), DeepFool(steps=2), Square(queries=30), SHORT], ids=repr)
def test_a_search_that_fails_is_an_attempt(victims, attack):
    """A network that is robust by construction: what was honestly tried and did not fall counts as robust."""

    class Confident(nn.Module):
        def forward(self, images):
            waves = torch.sin(40 * images.flatten(1)[:, :3])
            return torch.cat([100 + 0 * waves[:, :1], waves], dim=1)

    images, labels = victims[0][:12].clamp(0.2, 0.8), torch.zeros(12, dtype=torch.long)
    norm = "l2" if isinstance(attack, DeepFool) else "linf"
    row = run(images, labels, attack, threat=ThreatModel(norm, "0.05"), network=Confident()).attacks[0]
    assert row.status == "ok" and row.robust_accuracy == 1 and set(row.outcomes) == {ROBUST}
    assert row.found == 0 and row.median_distance is None


# -- on a network that was trained to be robust


@pytest.fixture(scope="module")
def rows(robust, digits):
    images, labels = digits[0][1400:1520], digits[1][1400:1520]
    attacks = {
        "pgd": native.PGD(steps=60, rel_step=0.1, loss="margin"),
        "apgd-ce": APGDCE(steps=40),
        "apgd-t": APGDT(steps=40, targets=3),
        "fab-t": FAB(steps=40, targets=3),
        "square": Square(queries=300),
        "autoattack": AutoAttack(steps=40, targets=3, queries=300),
    }
    result = run(images, labels, *attacks.values(), threat=ThreatModel("linf", "0.12"), network=robust, batch_size=120)
    assert result.flags == ()
    return dict(zip(attacks, result.attacks, strict=True))


@pytest.mark.slow
def test_autopgd_agrees_with_our_own_descent(rows):
    counts = {name: row.broken for name, row in rows.items()}
    assert 15 < counts["pgd"] < 100
    for name in ("apgd-ce", "apgd-t", "fab-t"):
        assert abs(counts[name] - counts["pgd"]) <= 5, counts
    assert counts["apgd-t"] >= counts["apgd-ce"] - 1
    assert 0.5 * counts["pgd"] < counts["square"] <= counts["autoattack"]


def test_autoattack_breaks_what_any_of_its_stages_breaks(rows):
    whole = torch.tensor(rows["autoattack"].outcomes) == 2
    for name in ("apgd-ce", "apgd-t", "fab-t", "square"):
        alone = torch.tensor(rows[name].outcomes) == 2
        # The first stage starts alike; the others meet fewer images, so their random starts are others.
        assert int((alone & ~whole).sum()) <= (0 if name in ("apgd-ce", "fab-t") else 1), name
    assert rows["autoattack"].status == "ok" and rows["autoattack"].violations == {"box": 0, "ball": 0, "nonfinite": 0}


def test_the_same_seed_gives_the_same_images_and_another_seed_others(robust, digits, rng):
    images, labels = digits[0][1500:1530], digits[1][1500:1530]
    threat = ThreatModel("linf", "0.1")
    for attack in (APGDCE(steps=5, restarts=2), Square(queries=20), AutoAttack(steps=5, targets=1, queries=10)):
        first, again, other = (attack(robust, images, labels, threat, rng(seed)) for seed in (3, 3, 4))
        assert torch.equal(first, again) and not torch.equal(first, other)


def test_restarts_and_targets_go_on_with_what_is_left(robust, digits, rng):
    images, labels = digits[0][1400:1520], digits[1][1400:1520]
    threat = ThreatModel("linf", "0.12")

    def broken(attack):
        return predicted(robust, attack(robust, images, labels, threat, rng())) != labels

    once, often = broken(APGDCE(steps=3)), broken(APGDCE(steps=3, restarts=6))
    assert (often | ~once).all() and often.sum() > once.sum()
    one, three = broken(APGDT(steps=10, targets=1)), broken(APGDT(steps=10, targets=3))
    assert (three | ~one).all() and three.sum() >= one.sum()
    assert adapter.class_count(robust, images) == 10
