"""What mutation testing found untested (tests/reliability/mutate.py): each test kills mutants that lived before it."""

from types import SimpleNamespace

import pytest
import torch

from scl_defense import checkpoint
from scl_defense.ascent import ascend, ascend_contrast
from scl_defense.errors import UserError
from scl_defense.losses import Contrast, infonce, margin, multiview
from scl_defense.threat import ThreatModel

# -- threat


@pytest.mark.parametrize(("norm", "largest"), [("l0", 32), ("l1", 96), ("l2", 96**0.5), ("linf", 1)])
def test_the_largest_radius_counts_the_pixels_of_images_that_are_not_square(norm, largest):
    ThreatModel(norm, str(largest)).check_fits((3, 4, 8))
    with pytest.raises(UserError, match=r"whole (box|range)"):
        ThreatModel(norm, str(largest + 1)).check_fits((3, 4, 8))


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("radius", [0.1, 0.3, 0.7, 1.1, 2.3])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_rounding_never_leaves_the_ball_where_it_adds_up(norm, radius, value):
    """On black and on white images every coordinate moves by the same amount, and rounds the same way."""
    images = torch.full((1, 1, 32, 32), value)
    found = ThreatModel(norm, str(radius)).project(images, torch.full_like(images, 1 - value)).double()
    moved = torch.linalg.vector_norm((found - images).flatten(), 2 if norm == "l2" else 1)
    assert 0.99 * radius < moved <= radius


def test_a_random_start_in_l0_repaints_that_many_pixels_with_any_colour():
    images = torch.ones(64, 3, 6, 5)
    found = ThreatModel("l0", "4").random_start(images, torch.Generator().manual_seed(0))
    changed = (found != images).any(1).flatten(1)
    assert (changed.sum(1) == 4).all()
    assert changed.any(0).all(), "every place may be chosen"
    colours = found[(found != images).any(1, keepdim=True).expand_as(found)]
    assert colours.min() < 0.02 and colours.max() > 0.98 and abs(float(colours.mean()) - 0.5) < 0.05


# -- checkpoint


def test_lists_and_depth_are_counted_up_to_their_limits():
    most, deepest = checkpoint.MOST_LISTS, checkpoint.DEEPEST
    assert checkpoint.tangled([[] for _ in range(most - 1)]) is None
    assert "larger than" in checkpoint.tangled([[] for _ in range(most)])
    nested = []
    for _ in range(deepest - 1):
        nested = [nested]
    assert checkpoint.tangled(nested) is None
    assert "deeper than" in checkpoint.tangled({"x": nested})
    assert checkpoint.tangled({"a": (1, {2}), "b": "text", "c": frozenset({3})}) is None


def test_parts_are_counted_up_to_their_limit(monkeypatch):
    monkeypatch.setattr(checkpoint, "MOST_PARTS", 10)
    assert checkpoint.tangled([list(range(4)), list(range(4))]) is None
    assert "larger than" in checkpoint.tangled([list(range(4)), list(range(5))])


def test_a_zip_may_unpack_to_twenty_times_its_size_or_to_what_is_always_allowed(monkeypatch):
    monkeypatch.setattr(checkpoint, "INFLATED", 1000)

    def asked(*sizes, size):
        members = [SimpleNamespace(file_size=n) for n in sizes]
        return checkpoint.inflated(SimpleNamespace(infolist=lambda: members), size)

    assert asked(400, 600, size=1) is None
    assert "would unpack to" in asked(400, 601, size=1)
    assert asked(1999, 1, size=100) is None
    assert "would unpack to 2e-06 GB from 100 bytes" in asked(2000, 1, size=100)


@pytest.mark.parametrize("shape", [(10, 4, 1), (10,), (9, 4)])
def test_a_head_that_is_no_matrix_of_a_row_a_class_is_malformed(shape):
    content = {
        "network": {"classifier.weight": torch.zeros(shape)}, "model": "m", "model_options": {}, "config": "{}",
        "classes": [str(n) for n in range(10)], "image_shape": [1, 8, 8], "mean": [0.0], "std": [1.0],
        "threat": "linf:0", "plugins": [],
    }  # fmt: skip
    assert "not those that its network tells apart" in checkpoint._malformed(content)
    content["network"]["classifier.weight"] = torch.zeros(10, 4)
    assert checkpoint._malformed(content) is None


# -- losses


def test_one_image_of_one_view_has_nobody_to_be_compared_with():
    views = torch.ones(1, 1, 3, requires_grad=True)
    loss = multiview(views, ["clean"], torch.tensor([0]), Contrast())
    assert loss == 0 and torch.equal(torch.autograd.grad(loss, views)[0], torch.zeros(1, 1, 3))


def test_one_view_of_several_images_has_no_positive_among_instances():
    views = torch.eye(3)[None].requires_grad_()
    loss = multiview(views, ["clean"], torch.tensor([0, 0, 1]), Contrast(positives="instance"))
    assert loss == 0 and torch.equal(torch.autograd.grad(loss, views)[0], torch.zeros(1, 3, 3))


def test_the_usual_gap_of_the_margin_is_one():
    near = torch.tensor([[1.0, 0.0], [0.8, 0.6]])  # 0.632 apart
    apart = 1 - (0.2**2 + 0.6**2) ** 0.5
    assert float(margin(near, torch.tensor([0, 1]))) == pytest.approx(apart**2, abs=1e-5)


def test_some_of_many_rows_have_references_of_their_own():
    """More rows than are computed at once, those from place 40 on."""
    generator = torch.Generator().manual_seed(0)
    embed, references = (torch.randn(700, 8, generator=generator) for _ in range(2))
    whole = infonce(embed, references, 0.3)
    torch.testing.assert_close(infonce(embed[40:400], references, 0.3, first=40), whole[40:400])


# -- ascent


def test_the_usual_temperature_of_the_contrast_is_a_half():
    generator = torch.Generator().manual_seed(0)
    views, weights = torch.rand(1, 6, 1, 4, 4, generator=generator), torch.randn(16, 5, generator=generator)

    def ascended(**given):
        rng = torch.Generator().manual_seed(1)
        return ascend_contrast(
            lambda images: images.flatten(1) @ weights, views, ThreatModel("l2", "0.5"), steps=3, rng=rng, **given
        )

    assert torch.equal(ascended(), ascended(temperature=0.5))
    assert not torch.equal(ascended(), ascended(temperature=1.5))


def test_who_is_done_stays_where_it_is_and_is_not_asked_again():
    """Every image climbs a plane of its own; image i is done when its points have been seen i + 1 times."""
    images, slopes = torch.full((4, 1, 2, 2), 0.5), torch.tensor([1.0, 2.0, -1.0, -2.0]).view(4, 1, 1, 1)
    threat, seen, asked = ThreatModel("linf", "0.2"), torch.zeros(4, dtype=torch.long), []

    def climbed(points, places):
        return (points * slopes[places]).flatten(1).sum(1)

    def objective(points, places):
        asked.append(places.tolist())
        seen[places] += 1
        return climbed(points, places), seen[places] > places

    def ascended(objective, **how):
        rng = torch.Generator().manual_seed(0)
        return ascend(objective, images, threat, steps=3, rel_step=0.25, start="zero", rng=rng, **how)

    made = ascended(objective, stopping=True)
    assert asked == [[0, 1, 2, 3], [1, 2, 3], [2, 3]]
    moved = (made - images)[:, 0, 0, 0]  # a step is 0.05; the one after which an image is done is not taken
    assert moved.tolist() == pytest.approx([0.0, 0.05, -0.1, -0.15])
    asked.clear()
    seen.zero_()
    none = ascended(lambda points, places: (climbed(points, places), places < 0), stopping=True)
    plain = ascended(lambda points: climbed(points, torch.arange(4)))
    assert torch.equal(none, plain)


def test_nobody_is_asked_once_all_are_done():
    asked = []

    def objective(points, places):
        asked.append(len(places))
        return points.flatten(1).sum(1), torch.ones(len(places), dtype=torch.bool)

    images, rng = torch.full((3, 1, 2, 2), 0.5), torch.Generator().manual_seed(0)
    made = ascend(objective, images, ThreatModel("linf", "0.2"), steps=5, start="zero", stopping=True, rng=rng)
    assert asked == [3] and torch.equal(made, images)


# -- checkpoint: limits as numbers, since a limit that moves is another promise


def test_the_limits_of_what_a_file_may_describe():
    assert checkpoint.INFLATED == 268_435_456
    assert (checkpoint.MOST_LISTS, checkpoint.MOST_PARTS, checkpoint.DEEPEST) == (50_000, 10_000_000, 64)


def test_a_number_among_lists_ends_no_count(monkeypatch):
    monkeypatch.setattr(checkpoint, "MOST_LISTS", 3)
    assert checkpoint.tangled(5) is None
    assert "larger than" in checkpoint.tangled([[], 1, "a", [], {}, []])


def test_sweeping_takes_our_parts_alone(tmp_path):
    for name in (".best.pt.12.part", ".best.pt.x.part", ".other.12.part", "best.pt.12.part"):
        (tmp_path / name).touch()
    (tmp_path / ".best.pt.13.part").mkdir()
    checkpoint.sweep(tmp_path, "best.pt")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".best.pt.x.part", ".other.12.part", "best.pt.12.part", ".best.pt.13.part"}


def test_a_pickle_of_old_is_known_by_two_bytes():
    assert "before 1.6" in checkpoint._fault_of(b"\x80\x02" + b"x" * 20)
    assert "no zip file" in checkpoint._fault_of(b"\x80\x03" + b"x" * 20)


def sound(**more):
    content = {
        "network": {"classifier.weight": torch.zeros(2, 3)}, "model": "small-cnn", "model_options": {},
        "classes": ["a", "b"], "image_shape": [1, 8, 8], "mean": [0.0], "std": [1.0], "threat": "linf:0.1",
        "config": "{}", "plugins": [],
    }  # fmt: skip
    return content | more


def test_two_classes_and_the_largest_sizes_are_sound():
    assert checkpoint._malformed(sound()) is None
    assert checkpoint._malformed(sound(image_shape=[1, 4096, 1])) is None
    assert checkpoint._malformed(sound(image_shape=[3, 8, 8], mean=[0.0] * 3, std=[1.0] * 3)) is None


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"classes": ["a"]}, "at least two names"),
        ({"image_shape": [1, 8, 4097]}, "from 1 to 4096"),
        ({"image_shape": [1, 8, 0]}, "from 1 to 4096"),
        ({"image_shape": [1, 8, -1]}, "from 1 to 4096"),
        ({"std": [1.0, 1.0]}, "1 numbers each"),
        ({"std": []}, "1 numbers each"),
        ({"mean": [0.0, 0.0]}, "1 numbers each"),
        ({"network": {"classifier.weight": torch.zeros(1).expand(2, 3)}}, "larger than its data"),
        ({"network": {"classifier.weight": torch.zeros(5).as_strided((2, 3), (1, 1))}}, "larger than its data"),
    ],
)
def test_what_is_malformed(more, says):
    assert says in checkpoint._malformed(sound(**more))


def test_a_network_of_twice_its_weights_and_a_million_is_the_most():
    """Counted in numbers; 32 are given."""

    def asked(count):
        describe = lambda shape: torch.nn.ParameterList([torch.nn.Parameter(torch.empty(count))])  # noqa: E731
        checkpoint._check_size("x.pt", describe, {"image_shape": [1, 8, 8]}, {"w": torch.zeros(32)})

    asked(1_000_064)
    with pytest.raises(UserError, match="describes 1,000,065 numbers, holds 32"):
        asked(1_000_065)


def test_a_model_that_cannot_be_counted_is_left_to_its_building():
    def refuse(shape):
        raise UserError("images are too small")

    checkpoint._check_size("x.pt", refuse, {"image_shape": [1, 8, 8]}, {})


def test_a_classifier_is_asked_for_by_named_settings():
    with pytest.raises(TypeError):
        checkpoint.load_classifier("x.pt", None)
