"""Whatever is registered trains: every trainer and every generator, on grey digits and on colour images."""

import importlib.util
import math

import numpy as np
import pytest

from scl_defense import benchmark, train
from scl_defense.plugins import default_host

SHORT = {"batch_size": 16, "epochs": 1, "val_limit": 20, "val_steps": 1, "model_options": {"width": 2}}
VARIANTS = [
    ("contrastive-pgd", {"space": "scattering", "steps": 1}),
    ("contrastive-pgd", {"space": "pixel", "objective": "supcon", "steps": 1}),
    ("contrastive-pgd-online", {"objective": "ntxent-joint", "views": 2, "steps": 1}),
    ("contrastive-pgd-online", {"negatives": "other-classes", "ema": 0.9, "steps": 1}),
    ("pgd", {"loss": "kl", "steps": 1}),
    ("pgd", {"loss": "margin", "steps": 1}),
    ("mix:contrastive-pgd=0.5,corner-noise=0.5", {"contrastive-pgd.steps": 1}),
]
TRAINERS = default_host()["trainer"].names()
GENERATORS = [(name, {}) for name in default_host()["generator"].names()] + VARIANTS


@pytest.fixture(scope="module")
def colour(tmp_path_factory):
    """Colour images whose class can be seen: a coloured square in one of three places."""
    folder, rng = tmp_path_factory.mktemp("colour"), np.random.RandomState(0)
    for split, count in (("train", 60), ("test", 12)):
        labels = np.arange(count) % 3
        images = rng.randint(0, 80, (count, 12, 12, 3)).astype(np.uint8)
        for place, label in enumerate(labels):
            images[place, 4 * label : 4 * label + 4, 3:9, label] = 250
        np.savez(folder / f"{split}.npz", images=images, labels=labels)
    return folder


def data_of(kind, colour):
    return {"data": "digits", "limit": 48} if kind == "grey" else {"data": str(colour), "eps": "0.05", "limit": 48}


def test_there_is_something_to_try():
    assert len(TRAINERS) >= 14 and len(GENERATORS) >= 13
    named = {
        "simclr",
        "supcon",
        "adv-supcon",
        "rocl",
        "acl",
        "clae",
        "ascl",
        "wang-scl",
        "wang-scl-margin",
        "trades",
        "mart",
    }
    assert named <= set(TRAINERS)


@pytest.mark.parametrize("kind", ["grey", "colour"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_trainer_trains_with_its_usual_generator(tmp_path, colour, kind, trainer):
    result = train(**SHORT, **data_of(kind, colour), trainer=trainer, out=str(tmp_path))
    assert math.isfinite(result.clean) and result.best.exists() and result.forwards > 0
    found = benchmark(result.best, attacks="fgsm", n=6)
    assert found.row("fgsm").status in ("ok", "doubtful", "invalid")


@pytest.mark.parametrize("kind", ["grey", "colour"])
@pytest.mark.parametrize(("generator", "options"), GENERATORS, ids=str)
def test_every_generator_trains(tmp_path, colour, kind, generator, options):
    if options.get("space") == "scattering" and importlib.util.find_spec("kymatio") is None:
        pytest.skip("kymatio is an optional extra")
    recipe = {**SHORT, **data_of(kind, colour), "generator": generator, "generator_options": options}
    result = train(**recipe, out=str(tmp_path))
    assert math.isfinite(result.clean) and result.best.exists()


def test_the_encoder_of_a_saved_run_is_a_static_generator(tmp_path):
    """space=checkpoint: not model-free, and says so in what it needs."""
    first = train(**SHORT, data="digits", limit=48, trainer="simclr", out=str(tmp_path))
    options = {"space": "checkpoint", "path": str(first.best), "steps": 1}
    second = train(**SHORT, data="digits", limit=48, generator_options=options, out=str(tmp_path))
    assert second.best.exists()
    generator = default_host()["generator"].get("contrastive-pgd")(**options)
    assert generator.needs == {"checkpoint"}
