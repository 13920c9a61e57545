"""Augmentation against slow references, torchvision's colour operations, and its own promises."""

import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF

from scl_defense.augment import hue_shifted, luminance, resized_crop
from scl_defense.data import Augment
from scl_defense.errors import ComponentError, UserError

SHAPES = [(1, 8, 8), (3, 32, 32), (3, 16, 24), (1, 28, 28)]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(n, shape, seed=0):
    return torch.rand((n, *shape), generator=rng(seed))


def augment(kind, shape, *, flip=True, strength=1.0):
    return Augment(kind, strength=strength, flip=flip, image_shape=shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["weak", "simclr"])
def test_each_image_has_its_own_draw_in_range_and_the_draw_repeats(kind, shape):
    images = random_images(1, shape).expand(64, *shape).clone()
    before = images.clone()
    out = augment(kind, shape)(images, rng())
    assert out.shape == images.shape and out.dtype == images.dtype
    assert out.min() >= 0 and out.max() <= 1
    distinct = len({row.numpy().tobytes() for row in out})
    most = 64 if kind == "simclr" else 2 * (2 * (shape[1] // 8) + 1) * (2 * (shape[2] // 8) + 1)
    assert distinct > 0.6 * min(64, most)
    assert torch.equal(out, augment(kind, shape)(images, rng()))
    assert not torch.equal(out, augment(kind, shape)(images, rng(1)))
    assert torch.equal(images, before)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 24)])
def test_weak_gives_every_crop_of_the_padded_image_and_nothing_else(shape, flip):
    """Slow reference: NumPy's reflect padding and all crops of it, mirrored or not."""
    image = random_images(1, shape)[0]
    pads = shape[1] // 8, shape[2] // 8
    padded = np.pad(image.numpy(), ((0, 0), (pads[0], pads[0]), (pads[1], pads[1])), mode="reflect")
    allowed = {}
    for top, left in itertools.product(range(2 * pads[0] + 1), range(2 * pads[1] + 1)):
        crop = padded[:, top : top + shape[1], left : left + shape[2]]
        allowed[crop.tobytes()] = (top, left, False)
        if flip:
            allowed[crop[..., ::-1].tobytes()] = (top, left, True)
    n = 200 * len(allowed)
    out = augment("weak", shape, flip=flip)(image.expand(n, *shape), rng())
    hits = dict.fromkeys(allowed.values(), 0)
    for row in out:
        hits[allowed[row.numpy().tobytes()]] += 1  # KeyError: something that is no crop
    assert all(abs(count / 200 - 1) < 0.4 for count in hits.values())  # uniform: 0.4 is 5.6 standard errors


@pytest.mark.parametrize("kind", ["weak", "simclr"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)])
def test_nothing_is_mirrored_unless_flip_is_allowed(kind, shape, monkeypatch):
    """The direction of an image that grows from left to right is that of its two halves."""
    monkeypatch.setattr(Augment, "_recoloured", lambda self, images, u: images)
    ramp = torch.linspace(0, 1, shape[2]).expand(2000, *shape)
    for flip, expected in ((False, 0.0), (True, 0.5)):
        out = augment(kind, shape, flip=flip)(ramp, rng())
        half = shape[2] // 2
        mirrored = (out[..., :half].mean((1, 2, 3)) > out[..., half:].mean((1, 2, 3))).float().mean().item()
        assert mirrored == pytest.approx(expected, abs=0 if flip is False else 0.06)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["weak", "simclr"])
def test_strength_zero_leaves_nothing_but_the_flip(kind, shape):
    images = random_images(64, shape)
    assert torch.equal(augment(kind, shape, flip=False, strength=0.0)(images, rng()), images)
    out = augment(kind, shape, flip=True, strength=0.0)(images, rng())
    same = (out == images).flatten(1).all(1)
    mirrored = (out == images.flip(3)).flatten(1).all(1)
    assert (same ^ mirrored).all() and 16 < int(mirrored.sum()) < 48


@pytest.mark.parametrize("kind", ["weak", "simclr"])
def test_a_small_strength_is_near_the_identity(kind):
    # A continuous schedule must not jump when it reaches 0.
    images = random_images(64, (3, 32, 32))
    out = augment(kind, (3, 32, 32), flip=False, strength=1e-4)(images, rng())
    changed = (out - images).abs().flatten(1).amax(1)
    assert changed.median() < 1e-2


def test_none_is_the_identity():
    images = random_images(3, (3, 8, 8))
    assert augment("none", (3, 8, 8))(images, rng()) is images


def test_randomness_comes_from_the_passed_generator_on_its_own_device_alone():
    """Images on another device (here: meta) draw the same numbers from a generator on the CPU."""
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for kind in ("weak", "simclr"):
        here, there = rng(), rng()
        images = random_images(5, (3, 16, 16))
        augment(kind, (3, 16, 16))(images, here)
        assert augment(kind, (3, 16, 16))(images.to("meta"), there).device.type == "meta"
        assert torch.equal(here.get_state(), there.get_state())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["weak", "simclr"])
def test_a_gpu_gives_the_same_images(kind):
    images = random_images(64, (3, 32, 32))
    here = augment(kind, (3, 32, 32))(images, rng())
    there = augment(kind, (3, 32, 32))(images.cuda(), rng()).cpu()
    # Continuous up to rounding; a pixel on the edge between two hues may take the other branch.
    assert ((here - there).abs() > 1e-4).float().mean() < 1e-4


# -- the crop


def slow_crop(image, box, mirrored):
    """Bilinear interpolation written out, pixel by pixel: pixel k of n has its centre at (2 k + 1) / n - 1."""
    channels, height, width = image.shape
    out = np.zeros_like(image)
    for row, column in itertools.product(range(height), range(width)):
        source_column = width - 1 - column if mirrored else column
        x = box[0] + box[2] * ((2 * source_column + 1) / width - 1)
        y = box[1] + box[3] * ((2 * row + 1) / height - 1)
        at_x = min(max(((x + 1) * width - 1) / 2, 0), width - 1)
        at_y = min(max(((y + 1) * height - 1) / 2, 0), height - 1)
        left, top = int(at_x), int(at_y)
        right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
        fx, fy = at_x - left, at_y - top
        for c in range(channels):
            upper = (1 - fx) * image[c, top, left] + fx * image[c, top, right]
            lower = (1 - fx) * image[c, bottom, left] + fx * image[c, bottom, right]
            out[c, row, column] = (1 - fy) * upper + fy * lower
    return out


@pytest.mark.parametrize("channels", [1, 3])  # one way each
def test_resized_crop_equals_the_loop(channels):
    images = random_images(6, (channels, 9, 12)).double()
    size = 0.3 + 0.7 * torch.rand((6, 2), generator=rng(1)).double()
    centre = (1 - size) * (2 * torch.rand((6, 2), generator=rng(2)).double() - 1)
    # Into two corners, where the outermost samples lie beyond the middle of the outermost pixels, and the whole image.
    centre[0], centre[1], size[2], centre[2] = size[0] - 1, 1 - size[1], 1, 0
    boxes, mirrored = torch.cat([centre, size], dim=1), torch.arange(6) % 2 == 0
    out = resized_crop(images, boxes, mirrored)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (resized_crop(images.float(), boxes.float(), mirrored) - out).abs().max() < 1e-5
    for k in range(6):
        expected = slow_crop(images[k].numpy(), boxes[k].tolist(), bool(mirrored[k]))
        assert np.abs(out[k].numpy() - expected).max() < 1e-12


@pytest.mark.parametrize(("side", "smallest"), [(32, 0.2), (16, 0.2), (8, 0.6)])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_crops_have_the_documented_areas_and_aspects_and_stay_inside(side, smallest, strength, monkeypatch):
    """Measured on two ramps: the slope of the result is the size of the crop, its middle the place."""
    monkeypatch.setattr(Augment, "_recoloured", lambda self, images, u: images)
    line = (torch.arange(side) + 0.5) / side
    ramps = torch.stack([line.expand(side, side), line[:, None].expand(side, side), torch.zeros(side, side)])
    out = augment("simclr", (3, side, side), flip=False, strength=strength)(ramps.expand(4000, 3, side, side), rng())
    middle = side // 2
    width = (out[:, 0, middle, middle] - out[:, 0, middle, middle - 1]) * side
    height = (out[:, 1, middle, middle] - out[:, 1, middle - 1, middle]) * side
    area, floor = width * height, 1 - (1 - smallest) * strength
    bound = (4 / 3) ** strength
    # A crop that would be wider than the image is cut at its border and so loses area: down to 1 / sqrt(bound) of it.
    assert area.max() <= 1 + 1e-3 and area.min() >= floor / bound**0.5 - 1e-3
    uncut = (width < 0.999) & (height < 0.999)
    assert area[uncut].min() == pytest.approx(floor, abs=0.02)
    aspect = (width / height)[uncut]
    assert bound**-1 - 1e-2 <= aspect.min() <= bound**-0.9 and bound**0.9 <= aspect.max() <= bound + 1e-2
    centre = (out[:, 0, middle, middle] + out[:, 0, middle, middle - 1]) / 2
    left, right = centre - width / 2, centre + width / 2
    assert left.min() > -1e-3 and right.max() < 1 + 1e-3
    slack = (1 - width) > 0.05
    position = (left / (1 - width))[slack]  # uniform in [0, 1]
    assert position.mean().item() == pytest.approx(0.5, abs=0.05) and position.std().item() == pytest.approx(
        12**-0.5, abs=0.03
    )


# -- colour


def test_grey_and_hue_equal_torchvisions():
    images = random_images(8, (3, 10, 10))
    images[0] = images[0, :1]  # no chroma: hue is undefined and must not matter
    assert torch.allclose(luminance(images), TF.rgb_to_grayscale(images), atol=1e-6)
    turns = torch.linspace(-0.5, 0.5, 8).view(8, 1, 1, 1)
    out = hue_shifted(images, turns)
    for k in range(8):
        assert torch.allclose(out[k], TF.adjust_hue(images[k], turns[k].item()), atol=1e-5)


def recolour_with(images, strength, factors, shape):
    """Run the colour part with chosen factors in [-1, 1]: brightness, contrast, saturation, hue; apply; grey."""
    *jitter, apply, grey = factors
    u = torch.zeros((len(images), 11, 1, 1, 1))
    for column, factor in zip((6, 7, 8, 9), jitter, strict=True):
        u[:, column] = (factor + 1) / 2
    u[:, 5], u[:, 10] = (0.0 if apply else 0.9), (0.0 if grey else 0.9)
    return augment("simclr", shape, strength=strength)._recoloured(images, u)


@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize(
    "factors",
    [(1, 0, 0, 0), (-1, 0, 0, 0), (0, 1, 0, 0), (0, -1, 0, 0), (0, 0, 1, 0), (0, 0, -1, 0), (0.4, -0.7, 0.9, -1)],
)
def test_colour_jitter_equals_torchvisions_operations_in_the_documented_order(factors, strength):
    images = random_images(4, (3, 12, 12))
    out = recolour_with(images, strength, (*factors, True, False), (3, 12, 12))
    for k in range(4):
        expected = TF.adjust_brightness(images[k], 1 + 0.4 * strength * factors[0])
        expected = TF.adjust_contrast(expected, 1 + 0.4 * strength * factors[1])
        expected = TF.adjust_saturation(expected, 1 + 0.4 * strength * factors[2])
        expected = TF.adjust_hue(expected, 0.1 * strength * factors[3])
        assert torch.allclose(out[k], expected, atol=2e-5)


def test_images_of_one_channel_get_brightness_and_contrast_only():
    images = random_images(4, (1, 12, 12))
    out = recolour_with(images, 1.0, (0.5, -0.5, 1, 1, True, True), (1, 12, 12))
    for k in range(4):
        expected = TF.adjust_contrast(TF.adjust_brightness(images[k], 1.2), 0.8)
        assert torch.allclose(out[k], expected, atol=1e-6)


def test_jitter_and_grayscale_come_as_often_as_documented():
    colour = torch.tensor([0.2, 0.5, 0.7]).view(3, 1, 1).expand(4000, 3, 16, 16)  # a crop of it is itself
    for strength in (1.0, 0.5):
        out = augment("simclr", (3, 16, 16), strength=strength)(colour, rng())
        grey = (out.amax(1) - out.amin(1)).amax((1, 2)) < 1e-6
        assert grey.float().mean().item() == pytest.approx(0.2 * strength, abs=0.03)
        kept = (out - colour).abs().amax((1, 2, 3)) < 1e-5
        assert kept[~grey].float().mean().item() == pytest.approx(0.2, abs=0.03)


# -- misuse


def test_misuse_is_told():
    with pytest.raises(UserError, match="'strong' is unknown; it must be none, weak or simclr"):
        augment("strong", (3, 8, 8))
    for strength in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match=r"strength .* must lie in \[0, 1\]"):
            augment("weak", (3, 8, 8), strength=strength)
    with pytest.raises(ComponentError, match="uint8"):
        augment("weak", (3, 8, 8))(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), rng())
    with pytest.raises(ComponentError, match=r"\(2, 1, 8, 8\)"):
        augment("weak", (3, 8, 8))(torch.zeros(2, 1, 8, 8), rng())
