"""Every named method's whole loss against a direct transcription of its equation, through the trainer's own step."""

import copy

import pytest
import reference_methods as slow
import torch
from torch import nn

from scl_defense.config import make, train_config, with_generator
from scl_defense.models import Network
from scl_defense.plugins import default_host
from scl_defense.types import Batch

LABELS = [0, 1, 0, 2, 1, 2]
CONTRASTIVE = (
    "simclr", "supcon", "adv-supcon", "rocl", "acl", "clae", "ascl", "wang-scl", "wang-scl-margin", "multiview",
)  # fmt: skip


class Encoder(nn.Module):
    """One linear map of nine pixels, or the same behind batch norm."""

    def __init__(self, normed=False):
        super().__init__()
        self.norm = nn.BatchNorm2d(1) if normed else nn.Identity()
        self.linear = nn.Linear(9, 6)
        self.feature_dim = 6

    def forward(self, images):
        return self.linear(self.norm(images).flatten(1))


def trainer_of(name, **options):
    return make(default_host(), "trainer", name, options)


def network_of(trainer, normed=False, seed=0):
    torch.manual_seed(seed)
    return trainer.build(Encoder(normed), 3, (0.4,), (0.3,)).double()


def batch_of(views=2, adversarial=1, seed=1):
    rng = torch.Generator().manual_seed(seed)
    draws = torch.rand((views + adversarial, len(LABELS), 1, 3, 3), generator=rng, dtype=torch.float64)
    labels = torch.tensor(LABELS)
    return Batch(draws[:views], labels, draws[0], torch.arange(len(LABELS))), draws[views:]


def loss_and_gradient(network, loss):
    network.zero_grad()
    loss.backward()
    return loss.detach(), network.encoder.linear.weight.grad.clone()


def agree(network, found, reference):
    found, gradient = loss_and_gradient(network, found)
    expected, expected_gradient = loss_and_gradient(network, reference)
    assert abs(float(found - expected)) < 1e-6
    assert float((gradient - expected_gradient).abs().max()) < 1e-6
    assert float(expected_gradient.abs().max()) > 1e-3


def embedded(network, views):
    return [network.embed(view) for view in views]


def test_simclr_is_ntxent_and_supcon_with_instance_labels():
    batch, none = batch_of(adversarial=0)
    trainer = trainer_of("simclr")
    network = network_of(trainer)
    agree(network, trainer.step(network, batch, none).loss, slow.nt_xent(*embedded(network, batch.views), 0.5))
    supervised = trainer_of("supcon", temperature=0.5)
    instances = Batch(batch.views, torch.arange(len(LABELS)), batch.images, batch.indices)
    agree(network, supervised.step(network, instances, none).loss, slow.nt_xent(*embedded(network, batch.views), 0.5))


def test_rocl_equals_its_released_loss():
    batch, adversarial = batch_of()
    trainer = trainer_of("rocl")
    network = network_of(trainer)
    views = embedded(network, [*batch.views, *adversarial])
    agree(network, trainer.step(network, batch, adversarial).loss, slow.rocl(*views, 0.5, 256.0))


def test_acl_equals_its_equation_with_both_branches():
    """1/2 [ NTXent(t1, t2; BN) + NTXent(a1, a2; BN_adv) ], each branch with weights and batch statistics of its own."""
    batch, adversarial = batch_of(adversarial=2)
    trainer = trainer_of("acl")
    network = network_of(trainer, normed=True).train()
    assert network.branches == ("adv", "clean")
    with torch.no_grad():  # two branches that differ, or the test would not see which one is used
        network.encoder.norm.weight.fill_(1.5)
        network.clean_norms["norm"].weight.fill_(0.5)
        network.clean_norms["norm"].bias.fill_(0.2)
    before = copy.deepcopy(network.encoder.norm.state_dict())

    def branch(views, scale, shift):
        pixels = network.normalize(views.flatten(0, 1))
        scaled = (pixels - pixels.mean()) / (pixels.var(correction=0) + 1e-5).sqrt() * scale + shift
        rows = network.projector(network.encoder.linear(scaled.flatten(1)))
        return rows.view(2, len(LABELS), -1)

    clean, attacked = branch(batch.views, 0.5, 0.2), branch(adversarial, 1.5, 0.0)
    expected = 0.5 * (slow.nt_xent(*clean, 0.5) + slow.nt_xent(*attacked, 0.5))
    agree(network, trainer.step(network, batch, adversarial).loss, expected)
    for own, images in ((network.encoder.norm, adversarial), (network.clean_norms["norm"], batch.views)):
        mean = network.normalize(images.flatten(0, 1)).mean()
        torch.testing.assert_close(own.running_mean, 0.1 * mean[None])  # each saw its own images, once
    assert not torch.equal(before["running_mean"], network.encoder.norm.running_mean)


def test_clae_equals_its_equation():
    batch, adversarial = batch_of()
    trainer = trainer_of("clae", alpha=0.7)
    network = network_of(trainer)
    t1, t2, a1 = embedded(network, [*batch.views, *adversarial])
    agree(
        network,
        trainer.step(network, batch, adversarial).loss,
        slow.nt_xent(t1, t2, 0.5) + 0.7 * slow.nt_xent(t1, a1, 0.5),
    )


def test_ascl_equals_its_equation():
    """CE(a) + SCL(t1, t2, a1, a2) + 2 KL(p(a) || p(t))."""
    batch, adversarial = batch_of(adversarial=2)
    trainer = trainer_of("ascl")
    network = network_of(trainer)
    views = embedded(network, [*batch.views, *adversarial])
    roles = dict(zip(("clean:0", "clean:1", "adv:0", "adv:1"), views, strict=True))
    contrast = slow.general(roles, LABELS, 0.2, same=lambda i, k: LABELS[i] == LABELS[k])
    clean, attacked = (network(images.flatten(0, 1)) for images in (batch.views, adversarial))
    expected = slow.cross_entropy(attacked, LABELS * 2) + contrast + 2 * slow.kl(attacked, clean)
    agree(network, trainer.step(network, batch, adversarial).loss, expected)


@pytest.mark.parametrize("name", ["wang-scl", "wang-scl-margin", "adv-supcon"])
def test_joint_methods_equal_their_sums(name):
    batch, adversarial = batch_of(adversarial=1 if name == "adv-supcon" else 0)
    trainer = trainer_of(name)
    network = network_of(trainer)
    views = embedded(network, [*batch.views, *adversarial])
    roles = {f"view:{place}": view for place, view in enumerate(views)}
    expected = slow.general(roles, LABELS, 0.1, same=lambda i, k: LABELS[i] == LABELS[k])
    expected = expected + slow.cross_entropy(network(batch.views.flatten(0, 1)), LABELS * 2)
    if name == "adv-supcon":
        expected = expected + slow.cross_entropy(network(adversarial[0]), LABELS)
    if name == "wang-scl-margin":
        rows, truth = torch.cat(views), LABELS * 2
        for i in range(len(rows)):
            for k in range(len(rows)):
                squared = 2 - 2 * slow.cosine(rows[i], rows[k])
                if i != k and truth[i] == truth[k]:
                    expected = expected + squared / (len(rows) * (len(rows) - 1))
                elif i != k and squared < 1:
                    expected = expected + (1 - squared.sqrt()) ** 2 / (len(rows) * (len(rows) - 1))
    agree(network, trainer.step(network, batch, adversarial).loss, expected)


def test_trades_equals_its_equation():
    batch, adversarial = batch_of(views=1)
    trainer = trainer_of("trades", beta=3.0)
    network = network_of(trainer)
    clean, attacked = network(batch.views[0]), network(adversarial[0])
    expected = slow.cross_entropy(clean, LABELS) + 3 * slow.kl(clean, attacked)
    agree(network, trainer.step(network, batch, adversarial).loss, expected)


def test_mart_equals_its_equation():
    batch, adversarial = batch_of(views=1)
    trainer = trainer_of("mart", beta=4.0)
    network = network_of(trainer)
    expected = slow.mart(network(batch.views[0]), network(adversarial[0]), LABELS, 4.0)
    agree(network, trainer.step(network, batch, adversarial).loss, expected)


def test_mart_is_finite_where_the_network_is_sure():
    """-log(1 - p_k) with p_k = 1 in float32: the sum of the others must not have been rounded away."""
    from scl_defense_plugins.trainers.mart import boosted_cross_entropy

    logits = torch.tensor([[60.0, 0.0, 0.0]], requires_grad=True)
    loss = boosted_cross_entropy(logits, torch.tensor([1]))
    assert float(loss) == pytest.approx(60 + 60 - 0.6931, abs=1e-3)
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_inferior_positives_are_a_weighted_pull_each_way():
    """A-InfoNCE (IP): alpha l(adv -> sg(clean)) + (1 - alpha) l(clean -> sg(adv)) beside the views' own pull."""
    batch, adversarial = batch_of()
    trainer = trainer_of("simclr", inferior=0.8)
    network = network_of(trainer)
    roles = dict(zip(("clean:0", "clean:1", "adv:0"), embedded(network, [*batch.views, *adversarial]), strict=True))

    def kind(role):
        return role.split(":")[0]

    def part(mine, other, stopped):
        return slow.general(
            roles, LABELS, 0.5, same=lambda i, k: i == k,
            anchors=lambda role: kind(role) == mine,
            weight=lambda a, b: float((kind(a), kind(b)) == (mine, other)),
            constant=lambda a, b: stopped and (kind(a), kind(b)) == (mine, other),
        )  # fmt: skip

    expected = part("clean", "clean", False) + 0.8 * part("adv", "clean", True) + 0.2 * part("clean", "adv", True)
    agree(network, trainer.step(network, batch, adversarial).loss, expected)


@pytest.mark.parametrize("pool", ["adv", "cross"])
def test_pools_of_acl(pool):
    batch, adversarial = batch_of(adversarial=2)
    trainer = trainer_of("acl", pool=pool, bn="shared")
    network = network_of(trainer)
    views = embedded(network, [adversarial[0], adversarial[1] if pool == "adv" else batch.views[1]])
    agree(network, trainer.step(network, batch, adversarial).loss, slow.nt_xent(*views, 0.5))


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_every_contrastive_method_has_a_generator_that_exists(name):
    config = with_generator(train_config({"trainer": name}), default_host())
    make(default_host(), "generator", config.generator, config.generator_options)
    expected = {"adv-supcon": "contrastive-pgd", "multiview": "contrastive-pgd", "ascl": "pgd"}
    online = dict.fromkeys(("rocl", "acl", "clae"), "contrastive-pgd-online")
    assert config.generator == {**expected, **online}.get(name, "none")


def test_a_given_generator_wins_and_given_options_join_the_usual_ones():
    host = default_host()
    named = with_generator(train_config({"trainer": "trades", "generator": "corner-noise"}), host)
    assert (named.generator, named.generator_options) == ("corner-noise", {})
    joined = with_generator(train_config({"trainer": "trades", "generator_options": {"steps": 3}}), host)
    assert (joined.generator, joined.generator_options) == ("pgd", {"loss": "kl", "steps": 3})


def test_a_branch_that_does_not_exist():
    network = Network(Encoder(True), 3, (0.4,), (0.3,), dual=True)
    with pytest.raises(Exception, match="adv or clean"), network.branch("pgd"):
        pass
    kept = network.encoder.norm
    with pytest.raises(RuntimeError, match="inside"), network.branch("clean"):
        assert network.encoder.norm is network.clean_norms["norm"]
        raise RuntimeError("inside")
    assert network.encoder.norm is kept
