"""A small run whose figures are pinned: a step that breaks silently moves them further than the tolerance.

The tolerance leaves room for another processor and another release of torch (sums in another order), and none for a
step that does something else: the tests marked ``faults`` break one step after the other and see it.
"""

import importlib
import json
import math

import pytest
import torch

import scl_defense
from scl_defense import checkpoint, losses
from scl_defense.augment import Augment
from scl_defense.errors import ComponentError
from scl_defense.models import Normalize
from scl_defense.threat import ThreatModel

training = importlib.import_module("scl_defense.train")  # the package has a function of this name

RECIPE = {
    "data": "digits", "limit": 448, "batch_size": 64, "val_limit": 32, "val_steps": 1, "epochs": 3, "seed": 0,
    "trainer": "adv-supcon", "generator": "contrastive-pgd", "generator_options": {"steps": 3}, "device": "cpu",
    "model_options": {"width": 8},
}  # fmt: skip
ATTACKS = {"attacks": "native:fgsm,native:pgd:steps=5", "eps": "0.05", "n": 200, "probes": "none", "device": "cpu"}
LOSSES = (9.7091, 8.5748, 7.9629)  # the mean of each epoch
WITHIN = 3e-3  # relative
RIGHT = {"clean": 145, "native:fgsm": 90, "native:pgd:steps=5": 83}  # images of 200
IMAGES = 5


def mean_losses(folder):
    scl_defense.train(**RECIPE, out=str(folder), name="run")
    return [json.loads(line)["loss"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def right(path):
    result = scl_defense.benchmark(path, **ATTACKS)
    rows = {row.label: row.robust_accuracy for row in result.attacks}  # of an attack that proves nothing: None
    robust = {label: None if share is None else round(share * result.n) for label, share in rows.items()}
    return {"clean": result.clean_correct, **robust}


def same_losses(found):
    return all(math.isclose(one, known, rel_tol=WITHIN) for one, known in zip(found, LOSSES, strict=True))


def same_verdicts(found):
    near = [found.get(name) is not None and abs(found[name] - known) <= IMAGES for name, known in RIGHT.items()]
    return found.keys() == RIGHT.keys() and all(near)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    return folder, mean_losses(folder)


def test_the_losses_of_a_small_run_are_what_they_were(run):
    assert same_losses(run[1]), run[1]


def test_the_verdicts_on_a_small_run_are_what_they_were(run):
    found = right(run[0] / "run" / "best.pt")
    assert same_verdicts(found), found


def test_the_same_seed_gives_the_same_weights_bit_by_bit(run, tmp_path):
    mean_losses(tmp_path)
    one, two = (checkpoint.read(folder / "run" / "last.pt")[0]["network"] for folder in (run[0], tmp_path))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# -- broken on purpose


def still(self, gradient, adversarial):
    return torch.zeros_like(gradient)


STEEPEST = ThreatModel.steepest


def a_tenth(self, gradient, adversarial):
    return STEEPEST(self, gradient, adversarial) / 10


IN_TRAINING = {
    "the ascent does not climb": (ThreatModel, "steepest", still),
    "the ascent climbs down": (ThreatModel, "steepest", lambda self, gradient, adversarial: -gradient.sign()),
    "nothing is projected": (ThreatModel, "project", lambda self, images, adversarial: adversarial),
    "embeddings keep their length": (losses, "unit", lambda embed: embed),
    "the learning rate stays": (training, "learning_rate", lambda config, step, steps: config.peak_lr),
    "pixels are not normalised": (Normalize, "forward", lambda self, images: images),
    "nothing is augmented": (Augment, "__call__", lambda self, images, rng: images),
    "gradients are not forgotten": (torch.optim.AdamW, "zero_grad", lambda self, set_to_none=True: None),
}
IN_EVALUATION = {
    "an attack that does not climb": (ThreatModel, "steepest", still),
    "steps of a tenth": (ThreatModel, "steepest", a_tenth),
    "pixels are not normalised": (Normalize, "forward", lambda self, images: images),
}


@pytest.mark.faults
@pytest.mark.parametrize("what", IN_TRAINING)
def test_a_broken_step_of_training_is_noticed(what, tmp_path, monkeypatch, book):
    monkeypatch.setattr(*IN_TRAINING[what])
    try:
        found = mean_losses(tmp_path)
    except ComponentError:  # it breaks the contract of generators: noticed earlier
        found = (math.nan,) * len(LOSSES)
    assert not same_losses(found), found
    book("broken steps noticed")


@pytest.mark.faults
@pytest.mark.parametrize("what", IN_EVALUATION)
def test_a_broken_step_of_evaluation_is_noticed(what, run, monkeypatch, book):
    monkeypatch.setattr(*IN_EVALUATION[what])
    found = right(run[0] / "run" / "best.pt")
    assert not same_verdicts(found), found
    book("broken steps noticed")
