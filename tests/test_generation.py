"""What a generator is lent: a saved encoder, and the feature spaces built on it and on wavelets."""

import sys

import pytest
import torch

from scl_defense import UserError, train
from scl_defense.checkpoint import load_classifier
from scl_defense.compose import make_generator
from scl_defense.errors import ComponentError
from scl_defense.generation import centres, check_adversarial, generate, saved_encoder
from scl_defense.plugins import default_host
from scl_defense.runtime import stream
from scl_defense.testing import _worlds as worlds
from scl_defense.threat import ThreatModel
from scl_defense.types import Context

HOST, THREAT = default_host(), ThreatModel("linf", "0.1")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny = {"limit": 96, "batch_size": 32, "val_limit": 48, "val_steps": 1, "epochs": 1, "model_options": {"width": 4}}
    return train(**tiny, generator="none", out=str(folder)).best


def context(shape=worlds.GREY, **more):
    return Context(
        threat=THREAT,
        rng=stream(0, "generator"),
        calibration=worlds.pictures(24, shape, seed=77)[0],
        streams=lambda purpose, *counters: stream(0, purpose, *counters),
        generator="generator 'example'",
        **more,
    )


def pgd(**options):
    return make_generator(HOST, "contrastive-pgd", {"steps": 5, **options})


# -- a saved encoder


def test_the_saved_encoder_gives_the_features_of_the_file(checkpoint):
    images = worlds.pictures(6, worlds.GREY)[0]
    network = load_classifier(checkpoint).network
    encoder = saved_encoder(str(checkpoint), worlds.GREY, torch.device("cpu"), host=HOST)
    with torch.no_grad():
        assert torch.equal(encoder(images), network.features(images))
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not any(module.training for module in encoder.modules())


def test_the_checkpoint_space_attacks_that_encoder_and_needs_no_other(checkpoint):
    generator = pgd(space="checkpoint", path=str(checkpoint), objective="align", steps=10)
    assert generator.needs == {"checkpoint"}
    batch = worlds.batch_of(12)
    found = generate(generator, batch, context(), network=None)[0]
    assert THREAT.contains(batch.views[0], found).all()
    encoder = saved_encoder(str(checkpoint), worlds.GREY, torch.device("cpu"))
    noise = THREAT.random_corner(batch.views[0], stream(1, "noise"))
    with torch.no_grad():
        clean, attacked, corner = (encoder(images) for images in (batch.views[0], found, noise))
    assert (attacked - clean).norm(dim=1).mean() > 1.3 * (corner - clean).norm(dim=1).mean()


def test_a_file_is_opened_once_a_run():
    opened, kept = [], {}

    def saved(path):
        opened.append(path)
        return worlds.saved_encoder(worlds.GREY)

    generator = pgd(space="checkpoint", path="anyone.pt")
    for _ in range(3):
        generate(generator, worlds.batch_of(6), context(cache=kept), network=None, saved=saved)
    assert opened == ["anyone.pt"]


def test_a_checkpoint_is_lent_only_where_it_is_declared():
    class Greedy:
        needs = frozenset()

        def __call__(self, batch, context):
            return context.checkpoint("anyone.pt")(batch.views[0])

    with pytest.raises(ComponentError, match=r"used context.checkpoint, which its needs do not declare"):
        generate(Greedy(), worlds.batch_of(4), context(), network=None)


def test_images_of_another_size_are_refused(checkpoint):
    generator = pgd(space="checkpoint", path=str(checkpoint))
    with pytest.raises(UserError, match="trained on images 1x8x8, these are 3x12x10; choose another one"):
        generate(generator, worlds.batch_of(4, worlds.COLOUR), context(worlds.COLOUR), network=None)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"space": "checkpoint"}, "go together"),
        ({"path": "x.pt"}, "go together"),
        ({"objective": "align", "negatives": "other-classes"}, "goes with objective=infonce"),
        ({"space": "checkpiont"}, "'pixel', 'filterbank', 'scattering', 'random-conv' or 'checkpoint'"),
    ],
)
def test_options_that_do_not_fit_are_one_line(options, says):
    with pytest.raises(UserError) as caught:
        pgd(**options)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_checkpoint_is_said_before_training(tmp_path):
    with pytest.raises(UserError, match=r"gone.pt' of space=checkpoint does not exist"):
        train(generator_options={"space": "checkpoint", "path": str(tmp_path / "gone.pt")}, out=str(tmp_path / "runs"))
    assert list(tmp_path.iterdir()) == []


def test_needs_follow_the_options():
    assert pgd().needs == frozenset()
    assert pgd(objective="supcon").needs == pgd(negatives="other-classes").needs == {"labels"}
    online = make_generator(HOST, "contrastive-pgd-online", {"negatives": "other-classes"})
    assert online.needs == {"embed", "labels"}


# -- more adversarial views than views


def test_the_ball_of_view_a_is_centred_on_view_a_modulo_v():
    batch = worlds.batch_of(5)
    origin = centres(batch.views, 5)
    assert torch.equal(origin, batch.views[[0, 1, 0, 1, 0]])
    assert torch.equal(check_adversarial(origin, batch.views, THREAT, "it"), origin)
    with pytest.raises(ComponentError, match="left the ball"):
        check_adversarial(batch.views[[0, 1, 1]], batch.views, THREAT, "it")


def test_classifier_pgd_of_one_view_makes_different_examples_of_it():
    network = worlds.lived_in_network(worlds.GREY)
    batch = worlds.batch_of(6, views=1)
    for name, options in (("pgd", {"steps": 2}), ("uniform-noise", {}), ("corner-noise", {})):
        generator = make_generator(HOST, name, {**options, "views": 3})
        found = generate(generator, batch, context(), network=network)
        assert found.shape == (3, *batch.views.shape[1:])
        assert THREAT.contains(batch.views.expand(3, -1, -1, -1, -1).flatten(0, 1), found.flatten(0, 1)).all()
        assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])
    with pytest.raises(UserError, match="start=zero makes the same example twice"):
        generate(make_generator(HOST, "pgd", {"views": 2, "start": "zero"}), batch, context(), network=network)


# -- scattering


def test_scattering_equals_kymatios_numpy_front_end():
    pytest.importorskip("kymatio", reason="kymatio is an optional extra")
    from kymatio.scattering2d.frontend.numpy_frontend import ScatteringNumPy2D
    from scl_defense_plugins.generators import spaces

    for shape, octaves in (((3, 16, 12), 2), ((1, 8, 8), 2), ((1, 3, 3), 1)):
        images = worlds.pictures(2, shape)[0] if shape[1] > 3 else torch.rand(2, *shape)
        found = spaces.scattering(shape[1:], torch.device("cpu"))(images)
        slow = ScatteringNumPy2D(J=octaves, shape=shape[1:], L=8)(images.numpy())
        torch.testing.assert_close(found, torch.from_numpy(slow).flatten(1), rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="at least 2x2, not 1x8"):
        spaces.scattering((1, 8), torch.device("cpu"))


def test_scattering_without_kymatio_names_the_extra(monkeypatch):
    from scl_defense_plugins.generators import spaces

    spaces._scattering_transform.cache_clear()
    monkeypatch.setitem(sys.modules, "kymatio.scattering2d.frontend.torch_frontend", None)
    with pytest.raises(UserError, match=r"pip install scl-defense\[scattering\]"):
        generate(pgd(space="scattering"), worlds.batch_of(4), context(), network=None)
