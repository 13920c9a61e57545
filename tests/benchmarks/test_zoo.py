"""A zoo of networks built to deceive: the right diagnostic fires, and the worst case is not above the honest twin's.

The twins are honest networks of three kinds, standard, adversarially trained and contrastive, on which nothing fires.
"""

import pytest
import torch
import torch.nn.functional as F
import victim_networks as zoo
from planted_attacks import fake
from scl_defense_benchmarks import diagnostics
from scl_defense_benchmarks.battery import plan_attacks
from scl_defense_benchmarks.catalogue import flagged
from scl_defense_benchmarks.evaluate import evaluate
from scl_defense_benchmarks.planning import plan_battery
from torch import nn

from scl_defense.ascent import ascend
from scl_defense.losses import supcon
from scl_defense.threat import ThreatModel

EPS = ThreatModel("linf", "0.15")
BATTERY = "fgsm,pgd,noise,native:pgd:loss=margin,apgd-dlr:steps=20,square:queries=300"
COUNT = 60


@pytest.fixture(scope="session")
def adversarial(digits) -> nn.Module:
    """Trained against PGD-4: a network that is robust in earnest."""
    images, labels = digits
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, rng = zoo.DigitsNet(), torch.Generator().manual_seed(1)
        optimizer = torch.optim.Adam(net.parameters(), 2e-3)
        for _ in range(12):
            for batch in torch.randperm(1400).split(64):
                truth = labels[batch]
                net.eval()
                attacked = ascend(
                    lambda points, truth=truth: F.cross_entropy(net(points), truth, reduction="none"),
                    images[batch],
                    EPS,
                    steps=4,
                    rel_step=0.4,
                    rng=rng,
                )
                net.train()
                optimizer.zero_grad()
                F.cross_entropy(net(attacked), truth).backward()
                optimizer.step()
    return net.eval()


@pytest.fixture(scope="session")
def contrastive(digits) -> nn.Module:
    """Supervised contrastive features of noisy views, and a linear classifier on them."""
    images, labels = digits
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = zoo.DigitsNet()
        features = lambda points: F.relu(net.norm2(net.conv2(F.relu(net.norm1(net.conv1(points)))))).flatten(1)  # noqa: E731
        optimizer = torch.optim.Adam(net.parameters(), 2e-3)
        for epoch in range(8):
            for batch in torch.randperm(1400).split(64):
                views = [images[batch] + 0.1 * torch.randn_like(images[batch]) for _ in range(2)]
                found = [features(view) for view in views]
                if epoch < 4:
                    loss = supcon(torch.cat(found), labels[batch].repeat(2), temperature=0.2)
                else:  # the classifier alone
                    loss = F.cross_entropy(net.classifier(found[0].detach()), labels[batch])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
    return net.eval()


@pytest.fixture(scope="session")
def sample(digits):
    return digits[0][1400 : 1400 + COUNT], digits[1][1400 : 1400 + COUNT]


def audit(network, images, labels, host, battery=BATTERY, threat=EPS):
    """The evaluation, with the flags of its checks and of the probes."""
    plan = plan_attacks(battery, host=host, threat=threat)
    return evaluate(network, images, labels, plan, seed=0, probes="quick")


def severities(result):
    """id -> the gravest severity."""
    order = ("info", "warning", "error")
    found = {}
    for flag in result.flags:
        found[flag.id] = max(found.get(flag.id, "info"), flag.severity, key=order.index)
    return found


@pytest.fixture(scope="session")
def honest(adversarial, sample, host):
    return audit(adversarial, *sample, host)


def nothing_fires(result):
    grave = [flag for flag in result.flags if flag.severity != "info"]
    assert not grave, grave
    assert diagnostics.verdict(result).text == "trustworthy within the interval"


# -- honest networks


@pytest.mark.slow
def test_nothing_fires_on_a_robust_network(honest):
    nothing_fires(honest)
    assert 0.3 < honest.worst_case.robust_accuracy < honest.clean_accuracy


@pytest.mark.parametrize("eps", ["0.05", "0.1"])
def test_nothing_fires_on_a_standard_network(network, sample, host, eps):
    nothing_fires(audit(network, *sample, host, threat=ThreatModel("linf", eps)))


def test_nothing_fires_on_a_contrastive_network(contrastive, sample, host):
    result = audit(contrastive, *sample, host, threat=ThreatModel("linf", "0.05"))
    assert result.clean_accuracy > 0.9
    nothing_fires(result)


@pytest.mark.slow
def test_nothing_fires_in_l2(adversarial, sample, host):
    battery = "noise,native:pgd,native:pgd:loss=margin,square:queries=200"
    nothing_fires(audit(adversarial, *sample, host, battery, ThreatModel("l2", "0.5")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrap", "change"),
    [
        (zoo.Halves, lambda images, labels: (images, (labels >= 5).long())),
        (zoo.Narrow, lambda images, labels: (images[..., 1:7].contiguous(), labels)),
        (zoo.Grey, lambda images, labels: (images.expand(-1, 3, -1, -1).contiguous(), labels)),
    ],
)
def test_two_classes_narrow_images_and_three_channels_are_no_fault(adversarial, sample, host, wrap, change):
    battery = "fgsm,pgd,noise,native:pgd:loss=margin,square:queries=200"  # DLR needs three classes
    result = audit(wrap(adversarial).eval(), *change(*sample), host, battery)
    assert result.clean_accuracy > 0.9 and {row.status for row in result.attacks} == {"ok"}
    nothing_fires(result)


# -- cheats

MASKING = [
    # name, the cheat, what must fire, and whether PGD on the cross-entropy alone is deceived
    ("quantised", zoo.Quantised, {"zero-gradient": "error", "full-range-not-zero": "error"}, True),
    ("quantised, made-up gradient", zoo.StraightThrough, {"stepwise-output": "warning"}, False),
    ("jpeg-like", zoo.JpegLike, {"zero-gradient": "error", "stepwise-output": "warning"}, True),
    ("softmax", zoo.Softmaxed, {"probabilities-not-logits": "warning"}, False),
    ("logits x 10000", lambda net: zoo.Scaled(net, 1e4), {"scaled-logits": "info", "zero-gradient": "error"}, True),
    ("logits - 100", lambda net: zoo.Shifted(net, -100.0), {"negative-logits": "info"}, False),
    ("stopped gradient", zoo.Detached, {"zero-gradient": "error", "moved-nothing": "error"}, True),
    ("another gradient", zoo.WrongGradient, {"gradient-disagrees": "error"}, True),
    ("NaN on some images", zoo.NotANumber, {"not-finite-logits": "warning", "silent-success": "info"}, False),
    ("optimises in forward", zoo.Purifying, {"gradient-in-forward": "warning"}, False),
]


@pytest.mark.parametrize(("cheat", "expected", "deceives"), [case[1:] for case in MASKING], ids=[c[0] for c in MASKING])
def test_a_cheat_is_called_one_and_gains_nothing(adversarial, honest, sample, host, cheat, expected, deceives):
    result = audit(cheat(adversarial).eval(), *sample, host)
    fired = severities(result)
    assert expected.items() <= fired.items(), fired
    # Not above the honest twin, within the interval of 60 images; the battery has what breaks each of these.
    assert result.worst_case.robust_accuracy <= honest.worst_case.interval.high
    conclusion = diagnostics.verdict(result)
    assert (conclusion.kind == "trustworthy") == (
        set(fired.values()) <= {"info"} or result.worst_case.robust_accuracy == 0
    )
    if deceives:  # it is a cheat at all: what PGD leaves unbroken is above the honest network's interval
        row, twin = result.row("pgd"), honest.row("pgd")
        assert row.broken < twin.broken and row.attacked - row.broken > COUNT * honest.worst_case.interval.high
        assert conclusion.text.startswith("not trustworthy, because ")


INVALID = [
    ("random noise layer", lambda net: zoo.NoisyInput(net, 0.3), {"random-forward": "error"}),
    ("wrong normalisation", zoo.Misprepared, {"clean-accuracy-at-chance": "error", "normalisation": "error"}),
    ("other order of classes", zoo.Permuted, {"clean-accuracy-at-chance": "error", "label-order": "error"}),
    ("batch statistics", zoo.BatchStatistics, {"batch-dependent-forward": "error"}),
    ("stays in train mode", zoo.AlwaysTraining, {"train-mode": "error", "random-forward": "error"}),
    ("state that changes", zoo.Counting, {"state-changes": "error"}),
    ("only NaN", lambda net: zoo.Scaled(net, float("nan")), {"not-finite-logits": "error"}),
]


@pytest.mark.parametrize(("cheat", "expected"), [case[1:] for case in INVALID], ids=[case[0] for case in INVALID])
def test_what_invalidates_every_number_is_said(adversarial, sample, host, cheat, expected):
    """The measurement itself is worthless here: a worst case proves nothing, and the verdict must say so."""
    result = audit(cheat(adversarial), *sample, host, "native:fgsm,native:pgd:steps=5")
    fired = severities(result)
    assert expected.items() <= fired.items(), fired
    conclusion = diagnostics.verdict(result)
    assert conclusion.kind == "not-trustworthy"
    assert all(any(id in reason for reason in conclusion.reasons) for id in expected)


def test_small_logits_gain_nothing(adversarial, honest, sample, host):
    """Divided by 1000 the loss is nearly linear: cross-entropy may lose a little, the worst case does not mind."""
    tiny = audit(zoo.Scaled(adversarial, 1e-3).eval(), *sample, host)
    assert tiny.worst_case.robust_accuracy <= honest.worst_case.interval.high
    assert "zero-gradient" not in severities(tiny)


def test_probes_repeat_and_leave_everything_as_it_was(adversarial, sample):
    adversarial.train()
    adversarial.classifier.weight.grad = torch.ones_like(adversarial.classifier.weight)
    before = {name: value.clone() for name, value in adversarial.state_dict().items()}
    state = torch.get_rng_state()
    try:
        first, again = (
            diagnostics.probe(adversarial, *sample, EPS, torch.Generator().manual_seed(3)) for _ in range(2)
        )
        assert first == again
        assert adversarial.training and bool((adversarial.classifier.weight.grad == 1).all())
        assert all(torch.equal(value, before[name]) for name, value in adversarial.state_dict().items())
        assert torch.equal(state, torch.get_rng_state())
    finally:
        adversarial.classifier.weight.grad = None
        adversarial.eval()


def test_no_probe_where_there_is_nothing_to_probe(adversarial, sample):
    images, labels = sample
    rng = torch.Generator().manual_seed(0)
    assert diagnostics.probe(adversarial, images, labels, EPS, rng, "none") == []
    assert diagnostics.probe(adversarial, images[:0], labels[:0], EPS, rng) == []
    assert diagnostics.probe(adversarial, images, (labels + 1) % 10, ThreatModel("linf", "0"), rng) == []


# -- batteries that are too weak for a verdict


@pytest.mark.slow
def test_a_battery_that_has_only_begun_is_an_upper_bound(network, sample, host):
    """Two steps and one query leave three quarters of what the probes break beside them."""
    result = audit(network, *sample, host, "pgd:steps=2,square:queries=1")
    assert result.worst_case.robust_accuracy > 0.5
    (flag,) = [flag for flag in result.flags if flag.id == "battery-too-weak"]
    assert flag.severity == "warning" and flag.measured > 0.2
    assert result.conclusion.kind == "upper-bound"
    reasons = " ".join(result.conclusion.reasons)
    assert "10 steps" in reasons and "without gradients" in reasons
    strong = audit(network, *sample, host, "pgd,apgd-t,square:queries=300")
    assert "battery-too-weak" not in severities(strong)


@pytest.mark.parametrize("cheat", [lambda net: zoo.Scaled(net, 1e4), zoo.Quantised])
def test_a_curve_that_ends_at_zero_hides_no_cheat_below(adversarial, sample, host, cheat):
    """In the large ball anything breaks everything; what the small one shows is looked at all the same."""
    plan = plan_battery("pgd,square:queries=50", host=host, threats=[ThreatModel("linf", eps) for eps in ("0.02", "1")])
    result = evaluate(cheat(adversarial).eval(), *sample, plan, seed=0, probes="quick")
    assert result.eps == "1" and result.conclusion.kind != "trustworthy"
    assert any(flag.severity == "error" for flag in result.flags if flag.id != "moved-nothing")


def test_without_probes_nothing_is_called_trustworthy(adversarial, sample, host):
    plan = plan_attacks("pgd,square:queries=300", host=host, threat=EPS)
    result = evaluate(adversarial, *sample, plan, seed=0)
    assert result.probes == "none" and result.conclusion.kind == "upper-bound"
    assert "nobody has looked for masked gradients" in result.conclusion.text


def test_a_network_that_counts_its_questions_is_seen_without_probes(adversarial, sample, host):
    class Counts(zoo.Wrapped):
        def __init__(self, network):
            super().__init__(network)
            self.register_buffer("asked", torch.zeros(()))

        def forward(self, images):
            self.asked += 1
            return self.network(images)

    result = evaluate(Counts(adversarial).eval(), *sample, plan_attacks("fgsm", host=host, threat=EPS), seed=0)
    assert severities(result)["state-changes"] == "error"


def test_a_remedied_loss_is_worth_knowing_and_no_more():
    flags = [flagged("loss-disagreement", "So.", "error"), flagged("zero-gradient", "So.", "error")]
    plain, margin = fake("pgd", range(5)), fake("apgd-t", range(5))
    weak = [*flags, flagged("battery-too-weak", "So.")]
    assert diagnostics.answered(flags, [plain]) == flags and diagnostics.answered(weak, [plain, margin]) == weak
    assert [flag.severity for flag in diagnostics.answered(flags, [plain, margin])] == ["info", "error"]
