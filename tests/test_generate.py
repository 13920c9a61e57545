"""Examples made once: what the file holds, that training from it is what it says, and what is refused."""

import dataclasses
import json
import struct

import pytest
import safetensors.torch
import torch

from scl_defense import UserError, generate_examples, train
from scl_defense.checkpoint import read
from scl_defense.cli.app import run
from scl_defense.compose import make_generator
from scl_defense.data import Augment, open_data
from scl_defense.generation import generate
from scl_defense.plugins import default_host
from scl_defense.replay import RECORD, StoredExamples
from scl_defense.runtime import stream
from scl_defense.threat import ThreatModel
from scl_defense.types import Batch, Context

HOST = default_host()
TINY = {"limit": 96, "batch_size": 32, "val_limit": 48, "val_steps": 2, "epochs": 2, "model_options": {"width": 4}}


def examples(path, **options):
    return generate_examples(path, **{"generator": "corner-noise", "limit": 96, **options})


def stored(path, **options):
    return make_generator(HOST, f"file:{path}", options)


def record_of(path):
    with safetensors.safe_open(path, framework="pt") as opened:
        return json.loads(opened.metadata()[RECORD])


def digits(count=16, start=0):
    split = open_data("digits").split("train", limit=96)
    chosen = split.indices.argsort()[start : start + count]
    return split.float_images(chosen), split.labels[chosen], split.indices[chosen]


def called(generator, kind="weak", *, epoch=0, views=2, threat="linf:0.1", flip=False, count=16):
    """(adversarial, batch) of one call, with the views augmented as training does."""
    images, labels, indices = digits(count)
    augment = Augment(kind, flip=flip, image_shape=(1, 8, 8))

    def view(images, number):
        return augment(images, stream(0, "augment", epoch, 0, number))

    batch = Batch(torch.stack([view(images, number) for number in range(views)]), labels, images, indices)
    context = Context(
        threat=ThreatModel.parse(threat),
        rng=stream(0, "generator", epoch, 0),
        calibration=images,
        epoch=epoch,
        streams=lambda purpose, *counters: stream(0, purpose, *counters),
        generator="generator 'file'",
        reaugment=view,
    )
    return generate(generator, batch, context, network=None), batch


# -- the file


def test_the_file_covers_the_whole_training_split_inside_the_ball(tmp_path):
    data = open_data("digits")
    path = tmp_path / "all.safetensors"
    result = generate_examples(path, generator="contrastive-pgd", generator_options={"steps": 2}, copies=2, seed=3)
    tensors = safetensors.torch.load_file(path)
    images = data.split("train", val_fraction=0).float_images()
    assert tensors["adversarial"].shape == (2, *images.shape) and tensors["adversarial"].dtype == torch.float32
    assert torch.equal(tensors["indices"], torch.arange(len(images)))
    for copy in tensors["adversarial"]:
        assert ThreatModel("linf", "0.1").contains(images, copy).all()
    assert not torch.equal(*tensors["adversarial"])
    assert (result.images, result.copies, str(result.threat)) == (len(images), 2, "linf:0.1")
    record = record_of(path)
    assert record["recipe"]["generator"] == "contrastive-pgd" and record["recipe"]["seed"] == 3
    assert record["generator"] == repr(make_generator(HOST, "contrastive-pgd", {"steps": 2}))
    assert record["data_sha256"] == data.fingerprint("train") and record["threat"] == "linf:0.1"
    assert record["needs"] == [] and record["plugins"] == HOST.provenance() and "torch" in record["versions"]


def test_an_equal_recipe_gives_an_equal_file_and_another_seed_does_not(tmp_path):
    made = [
        examples(tmp_path / f"{place}.safetensors", seed=seed, generator="contrastive-pgd", copies=2)
        for place, seed in enumerate((0, 0, 1))
    ]
    assert made[0].sha256 == made[1].sha256 != made[2].sha256
    assert made[0].path.read_bytes() == made[1].path.read_bytes()


def test_the_examples_are_the_generators_own(tmp_path):
    """Corner noise, read back through training's door without augmentation: +-eps, as live ones are."""
    path = tmp_path / "corners.safetensors"
    examples(path, augment="none", eps="0.05")
    adversarial, batch = called(stored(path), "none", threat="linf:0.05")
    moved = (adversarial[0] - batch.views[0])[(batch.views[0] > 0.05) & (batch.views[0] < 0.95)]
    assert torch.allclose(moved.abs(), torch.tensor(0.05), atol=1e-6)
    assert 0.45 < float((moved > 0).float().mean()) < 0.55


def test_labels_and_negatives_come_from_the_right_images(tmp_path):
    """The same batch given to the generator live gives what the file holds: one batch, no augmentation."""
    path = tmp_path / "labelled.safetensors"
    options = {"space": "pixel", "objective": "supcon", "steps": "3"}
    examples(path, generator="contrastive-pgd", generator_options=options, augment="none", batch_size=96, seed=5)
    images, labels, indices = digits(96)
    order = torch.randperm(96, generator=stream(5, "order", 0))
    shuffled = Batch(torch.stack([images[order]] * 2), labels[order], images[order], indices[order])
    context = Context(
        threat=ThreatModel("linf", "0.1"),
        rng=stream(5, "generator", 0, 0),
        calibration=images[torch.randperm(96, generator=stream(5, "calibration"))],
        streams=lambda purpose, *counters: stream(5, f"generator {purpose}", *counters),
    )
    live = generate(make_generator(HOST, "contrastive-pgd", options), shuffled, context, network=None)
    tensors = safetensors.torch.load_file(path)
    assert torch.equal(tensors["indices"], indices)
    assert torch.equal(tensors["adversarial"][0, order], live[0])


def test_half_precision_halves_the_file(tmp_path):
    full, half = (
        examples(tmp_path / f"{dtype}.safetensors", dtype=dtype, copies=3) for dtype in ("float32", "float16")
    )
    sizes = [made.path.stat().st_size for made in (full, half)]
    assert sizes[0] - sizes[1] == 3 * 96 * 64 * 2
    adversarial, batch = called(stored(half.path))
    assert adversarial.dtype == torch.float32
    assert ThreatModel("linf", "0.1").contains(batch.views[0], adversarial[0]).all()


# -- using it


@pytest.mark.parametrize("kind", ["none", "weak", "simclr"])
def test_examples_that_equal_the_images_give_the_view_itself(tmp_path, kind):
    """eps = 0: the stored images go through the very draws that made the view."""
    path = tmp_path / "clean.safetensors"
    examples(path, eps=0, copies=3)
    for views in (1, 2, 3):
        adversarial, batch = called(stored(path, views=views), kind, epoch=4, flip=True)
        assert torch.equal(adversarial, batch.views[[place % 2 for place in range(views)]])
    moved, batch = called(stored(path), kind, epoch=1)
    assert (torch.equal(moved[0], batch.images)) == (kind == "none")


@pytest.mark.parametrize("threat", ["linf:0.1", "l2:0.5", "l1:2"])
@pytest.mark.parametrize("kind", ["weak", "simclr"])
def test_they_stay_in_the_ball_of_the_augmented_view(tmp_path, threat, kind):
    path = tmp_path / "corners.safetensors"
    ball = ThreatModel.parse(threat)
    examples(path, norm=ball.norm, eps=ball.eps)
    adversarial, batch = called(stored(path), kind, threat=threat, flip=True, count=96)
    assert ball.contains(batch.views[0], adversarial[0]).all()
    distance = ball.distance(batch.views[0], adversarial[0])
    assert float(distance.median()) > 0.5 * ball.radius


def test_weak_augmentation_moves_the_noise_with_the_image(tmp_path):
    """Crop and flip only rearrange pixels: the noise around the view is the rearranged noise around the image."""
    path = tmp_path / "corners.safetensors"
    examples(path)
    raw = safetensors.torch.load_file(path)["adversarial"][0, :16]
    adversarial, batch = called(stored(path), "weak", epoch=2, flip=True)
    augment = Augment("weak", flip=True, image_shape=(1, 8, 8))
    expected = augment(raw, stream(0, "augment", 2, 0, 0))
    assert not torch.equal(batch.views[0], batch.images)
    torch.testing.assert_close(adversarial[0], expected, rtol=0, atol=1e-6)


def test_every_epoch_takes_the_next_copy(tmp_path):
    path = tmp_path / "copies.safetensors"
    examples(path, copies=3)
    raw = safetensors.torch.load_file(path)["adversarial"][:, :16]
    for epoch in range(5):
        torch.testing.assert_close(called(stored(path), "none", epoch=epoch)[0][0], raw[epoch % 3], rtol=0, atol=1e-6)
    both = called(stored(path, views=2), "none", epoch=2)[0]
    torch.testing.assert_close(both, raw[[1, 2]], rtol=0, atol=1e-6)


def test_a_smaller_ball_of_the_moment_is_kept(tmp_path):
    """A schedule of eps: what was made for 0.1 is projected onto the ball of the step."""
    path = tmp_path / "corners.safetensors"
    examples(path)
    adversarial, batch = called(stored(path), threat="linf:0.02")
    assert ThreatModel("linf", "0.02").contains(batch.views[0], adversarial[0]).all()


# -- training


def test_training_from_a_file_uses_it_and_resumes_exactly(tmp_path):
    path = tmp_path / "corners.safetensors"
    examples(path, copies=2)
    options = {**TINY, "generator": f"file:{path}"}
    whole = train(**options, out=str(tmp_path / "whole"))

    class Stopped(Exception):
        pass

    def stop(event):  # in the second epoch; the first one is saved
        if event["event"] == "step" and (event["epoch"], event["step"]) == (1, 2):
            raise Stopped

    with pytest.raises(Stopped):
        train(**options, out=str(tmp_path / "broken"), on_event=stop)
    resumed = train(resume=next((tmp_path / "broken").iterdir()))
    first, second = (read(result.last)[0] for result in (whole, resumed))
    assert all(torch.equal(value, second["network"][name]) for name, value in first["network"].items())
    assert str(path) in first["generator"] and stored(path).content.sha256 in first["generator"]
    none = train(**{**options, "generator": "none"}, out=str(tmp_path / "none"))
    weights = read(none.last)[0]["network"]
    assert any(not torch.equal(value, weights[name]) for name, value in first["network"].items())


def test_the_checkpoint_says_which_file(tmp_path):
    path = tmp_path / "corners.safetensors"
    made = examples(path)
    assert made.sha256 in repr(stored(path))
    assert stored(path, sha256=made.sha256).views == 1
    with pytest.raises(UserError, match="not the file that was asked for"):
        stored(path, sha256="0" * 64)


def test_a_mixture_may_hold_stored_examples(tmp_path):
    path = tmp_path / "clean.safetensors"
    examples(path, eps=0)
    mixture = make_generator(HOST, f"mix:file:{path}=1,corner-noise=1", {})
    adversarial, batch = called(mixture, "weak")
    kept = (adversarial[0] == batch.views[0]).flatten(1).all(1)
    assert 0 < int(kept.sum()) < 16
    data = open_data("digits")
    mixture.prepare(data, ThreatModel("linf", "0.1"))
    other = dataclasses.replace(data, _cache={"fingerprint-train": "0" * 64})
    with pytest.raises(UserError, match="made from other data than 'digits'"):
        mixture.prepare(other, ThreatModel("linf", "0.1"))


# -- what is refused


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"generator": "pgd"}, "needs logits: it follows the network"),
        ({"generator": "contrastive-pgd-online"}, "it follows the network in training"),
        ({"generator": "mix:corner-noise,pgd"}, "it follows the network in training"),
        ({"generator": "none"}, "makes 0 adversarial views"),
        ({"generator_options": {"views": 2}}, "leave views at 1 and ask for more --copies"),
        ({"generator": "contrastive-pdg"}, "did you mean 'contrastive-pgd'"),
        ({"copies": 0}, "option 'copies' should be greater"),
        ({"coppies": 2}, "did you mean 'copies'"),
        ({"dtype": "int8"}, "'float32' or 'float16'"),
        ({"eps": "8"}, "larger than the whole range"),
        ({"data": "digit"}, "did you mean 'digits'"),
    ],
)
def test_a_wrong_recipe_is_one_line_and_leaves_no_file(tmp_path, options, says):
    with pytest.raises(UserError) as caught:
        examples(tmp_path / "x.safetensors", **options)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_stops_half_way_leaves_nothing(tmp_path):
    def stop(event):
        if event["done"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        examples(tmp_path / "x.safetensors", copies=2, batch_size=32, on_event=stop)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_only_replaced_when_told(tmp_path):
    path = tmp_path / "x.safetensors"
    first = examples(path)
    with pytest.raises(UserError, match="--force"):
        examples(path, seed=1)
    assert record_of(path)["recipe"]["seed"] == 0
    assert examples(path, seed=1, force=True).sha256 != first.sha256
    with pytest.raises(UserError, match="must end in"):
        examples(tmp_path / "x.pt")
    with pytest.raises(UserError, match="directory"):
        examples(make_directory(tmp_path / "d.safetensors"))


def make_directory(path):
    path.mkdir()
    return path


def test_other_data_another_ball_and_other_images_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    examples(path)
    with pytest.raises(UserError, match=r"ball linf:0.1, .*than linf:0.05"):
        train(**{**TINY, "generator": f"file:{path}", "eps": "0.05", "out": str(tmp_path / "runs")})
    with pytest.raises(UserError, match=r"than l2:"):
        train(**{**TINY, "generator": f"file:{path}", "norm": "l2", "out": str(tmp_path / "runs")})
    with pytest.raises(UserError, match=r"lack \d+ of this batch; .*same --limit"):
        train(**{**TINY, "limit": 200, "generator": f"file:{path}", "out": str(tmp_path / "other")})
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())
    train(**{**TINY, "epochs": 1, "generator": f"file:{path}", "eps": "0.2", "out": str(tmp_path / "larger")})


def rewritten(path, tensors=None, **record):
    """The file with other content, as somebody could have made it."""
    old = safetensors.torch.load_file(path)
    known = record_of(path)
    for name, value in record.items():
        known[name] = value
    path.write_bytes(safetensors.torch.save({**old, **(tensors or {})}, {RECORD: json.dumps(known)}))
    return path


BAD = {
    "three dimensions": {"adversarial": torch.zeros(1, 96, 64)},
    "no image": {"adversarial": torch.zeros(0, 96, 1, 8, 8)},
    "integers": {"adversarial": torch.zeros(1, 96, 1, 8, 8, dtype=torch.int64)},
    "outside the box": {"adversarial": torch.full((1, 96, 1, 8, 8), 1.5)},
    "not a number": {"adversarial": torch.full((1, 96, 1, 8, 8), torch.nan)},
    "too few indices": {"indices": torch.arange(5)},
    "indices not in order": {"indices": torch.arange(96).flip(0)},
    "negative indices": {"indices": torch.arange(96) - 1},
    "one tensor more": {"extra": torch.zeros(1)},
}


@pytest.mark.parametrize("fault", sorted(BAD))
def test_absurd_content_is_refused(tmp_path, fault):
    path = tmp_path / "x.safetensors"
    examples(path)
    with pytest.raises(UserError, match="malformed") as caught:
        stored(rewritten(path, BAD[fault]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda path: path.write_bytes(b""), "holds no stored examples"),
        (lambda path: path.write_bytes(b"<html>"), "holds no stored examples"),
        (lambda path: path.write_bytes(struct.pack("<Q", 2**62) + b"{}"), "holds no stored examples"),
        (lambda path: path.write_bytes(safetensors.torch.save({"a": torch.zeros(2)})), "holds no stored examples"),
        (lambda path: path.write_bytes(path.read_bytes()[:-10]), "truncated or damaged"),
        (lambda path: rewritten(path, format="scl-defense-examples/9"), "this version reads scl-defense-examples/1"),
        (lambda path: rewritten(path, threat="linf:many"), "malformed: eps 'many'"),
        (lambda path: rewritten(path, data_sha256=None), "lacks data_sha256"),
        (lambda path: path.unlink(), "cannot be read: No such file"),
        (lambda path: (path.unlink(), path.mkdir()), "are a directory"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, change, says):
    path = tmp_path / "x.safetensors"
    examples(path)
    change(path)
    with pytest.raises(UserError) as caught:
        stored(path)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_more_views_than_copies_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    examples(path)
    with pytest.raises(UserError, match="hold 1 copies, not the 2"):
        stored(path, views=2)
    with pytest.raises(UserError, match="did you mean 'views'"):
        stored(path, view=2)
    assert isinstance(stored(path), StoredExamples) and stored(path).needs == frozenset()


# -- the command


def test_the_command_makes_what_training_uses(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ["--generator", "mix:corner-noise,contrastive-pgd", "-g", "contrastive-pgd.steps=2", "--limit", "96"]
    assert run(["generate", *common, "--dry-run"]) == 0
    assert "nothing was written" in capsys.readouterr().out and list(tmp_path.iterdir()) == []
    assert run(["generate", *common, "--copies", "2", "--dtype", "float16", "--json"]) == 0
    told = capsys.readouterr()
    result = json.loads(told.out)
    assert told.err == "" and (result["copies"], result["images"]) == (2, 96)
    path = tmp_path / result["path"]
    assert path.parent.name == "examples" and path.name == "mix-corner-noise-contrastive-pgd-digits-s0.safetensors"
    assert run(["generate", *common]) == 2
    assert "--force" in capsys.readouterr().err
    assert run(["generate", *common, "--out", "mine.safetensors"]) == 0
    told = capsys.readouterr()
    assert "copy 1/1" in told.err and "img/s" in told.err
    assert "next: scl-defense train --generator file:mine.safetensors" in told.out
    flags = ["--limit", "96", "--epochs", "1", "--val-limit", "48", "--val-steps", "1", "--quiet"]
    assert run(["train", "--generator", f"file:{path}", *flags]) == 0


def test_a_generator_that_follows_the_network_is_wrong_usage(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["generate", "--generator", "pgd"]) == 2
    assert capsys.readouterr().err.startswith("error: generator 'pgd' needs logits: it follows the network")
    assert run(["generate", "--generator", "contrastive-pdg"]) == 2
    assert "did you mean 'contrastive-pgd'" in capsys.readouterr().err
