"""A wrong normalisation, channel order, range or label order is found and said, and nothing is said without cause."""

import os
from pathlib import Path

import foreign_modules
import numpy as np
import pytest
import torch
from scl_defense_benchmarks.audited_data import open_named
from scl_defense_benchmarks.prepared import Prepared, Relabelled, read_label_map
from scl_defense_benchmarks.preprocessing import COLOUR, GREY, find_better
from scl_defense_benchmarks.subject import open_subject
from torch import nn

from scl_defense import UserError
from scl_defense.plugins import default_host


class Nearest(nn.Module):
    """The class of the nearest of these images; sensitive to whatever is done to the pixels."""

    def __init__(self, centres):
        super().__init__()
        self.register_buffer("centres", centres.flatten(1))

    def forward(self, images):
        return -torch.cdist(images.flatten(1), self.centres)


@pytest.fixture(scope="module")
def coloured():
    """Images (200, 3, 4, 4) of 10 classes around random prototypes, RGB in [0, 1], and a perfect raw classifier."""
    rng = torch.Generator().manual_seed(0)
    centres = 0.5 + 0.12 * torch.randn(10, 3, 4, 4, generator=rng)  # near each other: a shift or a stretch matters
    labels = torch.arange(200) % 10
    noisy = centres[labels] + 0.03 * torch.randn(200, 3, 4, 4, generator=rng)
    return noisy.clamp(0, 1), labels, centres


def trained_on(centres, mean, std, channels):
    """The network that somebody trained on images prepared like this."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    ready = (centres - mean) / std
    return Nearest(ready.flip(1) if channels == "bgr" else ready)


@pytest.mark.parametrize("channels", ["rgb", "bgr"])
@pytest.mark.parametrize("name", ["CIFAR-10", "0..255", "0..255 minus ImageNet's mean", "[-1, 1]", "no"])
def test_what_the_finding_says_is_the_remedy(coloured, name, channels):
    images, labels, centres = coloured
    network = trained_on(centres, *COLOUR[name], channels)
    finding = find_better(network, images, labels)
    if (name, channels) == ("no", "rgb"):
        assert finding is None
        return
    assert finding.better > 0.95 > finding.accuracy + 0.1 and finding.label_map is None and finding.p < 0.01
    assert "as given" in finding.what and " with " in finding.what and finding.what.endswith(finding.remedy)
    words = finding.remedy.split()
    given = {name[2:]: value for name, value in zip(words[::2], words[1::2], strict=True)}
    options = {key: tuple(map(float, given[key].split("+"))) for key in ("mean", "std")}
    options["channels"] = given.get("channels", "rgb")
    repaired = Prepared(network, **options)
    assert (repaired(images).argmax(1) == labels).float().mean() > 0.95  # what it says can be typed in, and helps
    assert find_better(repaired, images, labels, options) is None


def test_a_wrong_preprocessing_inside_is_taken_off_first(coloured):
    images, labels, centres = coloured
    network = trained_on(centres, *COLOUR["no"], "rgb")
    wrong = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "channels": "bgr"}
    finding = find_better(Prepared(network, **wrong), images, labels, wrong)
    assert finding.better == 1.0 and str(finding.preprocessing) == "no normalisation"
    assert find_better(Prepared(network, **wrong), images, labels) == finding  # what was put around it is known


def test_a_label_map_that_is_wrong_is_replaced_by_one_for_the_networks_own_outputs(coloured):
    images, labels, centres = coloured
    network = Relabelled(nn.Sequential(Nearest(torch.cat([torch.full((1, 3, 4, 4), 9.0), centres.flip(0)]))),
                         [None, *range(10)], 10)  # fmt: skip
    finding = find_better(network, images, labels)
    assert finding.remedy == "--label-map -,9,8,7,6,5,4,3,2,1,0" and finding.better == 1.0


def test_the_datas_own_constants_are_tried():
    """Classes that differ in contrast alone: a wrong scale gives another class."""
    pattern = torch.randint(0, 2, (3, 4, 4), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    contrast = 0.2 + 0.03 * torch.arange(10).view(-1, 1, 1, 1)
    centres, labels = 0.5 + contrast * pattern, torch.arange(200) % 10
    own = ((0.5, 0.5, 0.5), (0.4, 0.4, 0.4))
    network = trained_on(centres, *own, "rgb")
    finding = find_better(network, centres[labels], labels, own=own)
    assert (finding.preprocessing.mean, finding.preprocessing.std) == own and finding.better == 1.0
    assert "the data's own normalisation" in finding.what


@pytest.mark.parametrize("name", ["no", "ImageNet"])
def test_another_order_of_the_classes_is_found(coloured, name):
    images, labels, centres = coloured
    shuffled = torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
    network = trained_on(centres[shuffled], *COLOUR[name], "rgb")  # output j stands for class shuffled[j]
    finding = find_better(network, images, labels)
    assert finding.label_map == tuple(shuffled.tolist()) and finding.better > 0.95
    assert (finding.preprocessing is None) == (name == "no")
    assert "another order of the classes" in finding.what and "--label-map 3,1,4,0,5,9,2,6,8,7" in finding.remedy


def test_an_untrained_network_raises_no_false_hope(coloured):
    images, labels, _ = coloured
    for seed in range(8):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Flatten(), nn.Linear(48, 10))
        shuffled = labels[torch.randperm(len(labels))]  # nothing can be right about these labels
        assert find_better(network, images, shuffled) is None


def test_the_network_comes_back_as_it_was(network, digits):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.train()
    assert find_better(network, *(part[1400:1600] for part in digits)) is None  # trained without normalisation
    assert network.training and all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    network.eval()


# -- label maps

CLASSES = ("cat", "dog", "eel")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["eel", "cat", "dog"], [2, 0, 1]),
        ("eel,cat,dog", [2, 0, 1]),
        ([2, 0, "-", 1, 1], [2, 0, None, 1, 1]),
        ({"0": "dog", "4": "cat", "2": 2}, [1, None, 2, None, 0]),
    ],
)
def test_label_maps(given, expected, tmp_path):
    assert read_label_map(given, CLASSES) == expected
    if not isinstance(given, str):
        import json

        (tmp_path / "map.json").write_text(json.dumps(given))
        assert read_label_map(tmp_path / "map.json", CLASSES) == expected


def test_label_maps_in_toml(tmp_path):
    (tmp_path / "map.toml").write_text('labels = ["eel", "cat", "dog", "-"]')
    assert read_label_map(str(tmp_path / "map.toml"), CLASSES) == [2, 0, 1, None]
    (tmp_path / "map.toml").write_text('[labels]\n0 = "eel"\n1 = 1\n2 = "cat"')
    assert read_label_map(str(tmp_path / "map.toml"), CLASSES) == [2, 1, 0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["eel", "cat", "dogg"], "no class 'dogg'; did you mean 'dog'"),
        (["eel", "cat"], "no output for class 'dog'"),
        ([0, 1, 3], "class 3 is not one of 0..2"),
        ("nowhere.json", "cannot be read"),
        ({"cat": 0}, "outputs' numbers"),
        ([], "is a list"),
    ],
)
def test_label_maps_that_are_wrong(given, message):
    with pytest.raises(UserError, match=message):
        read_label_map(given, CLASSES)


def test_a_mapped_network_answers_in_the_datas_classes(coloured):
    images, labels, centres = coloured
    more = torch.cat([centres[[3, 3, 1]], torch.full((1, 3, 4, 4), 9.0), centres])
    label_map = [3, 3, 1, "-", *range(10)]
    about = {"classes": tuple("0123456789"), "image_shape": (3, 4, 4), "label_map": label_map}
    subject = open_subject(Nearest(more), default_host(), "auto", about)
    logits = subject.network(images)
    assert logits.shape == (200, 10) and subject.num_classes == 10 and subject.about["label_map"][3] is None
    raw = Nearest(more)(images)
    assert torch.equal(logits[:, 3], raw[:, [0, 1, 7]].amax(1)) and (logits.argmax(1) == labels).all()
    with pytest.raises(UserError, match="the label map has 10 entries"):
        open_subject(Nearest(more), default_host(), "auto", {**about, "label_map": list(range(10))}).network(images)
    with pytest.raises(UserError, match="no option 'lable_map'; did you mean 'label_map'"):
        open_subject(Nearest(more), default_host(), "auto", {"lable_map": [0, 1]})
    with pytest.raises(UserError, match="name the data set with --data"):
        open_subject(Nearest(more), default_host(), "auto", {"label_map": [0, 1]})


def test_normalisation_around_a_network_in_memory(coloured):
    images, labels, centres = coloured
    mean, std = COLOUR["CIFAR-10"]
    network = trained_on(centres, mean, std, "rgb")
    about = {"classes": tuple("0123456789"), "image_shape": (3, 4, 4), "mean": mean, "std": std}
    subject = open_subject(network, default_host(), "auto", about)
    assert (subject.network(images).argmax(1) == labels).all() and subject.about["mean"] == list(mean)
    with pytest.raises(UserError, match="leave model out"):
        open_subject(network, default_host(), "auto", {**about, "model": "small-cnn"})


# -- data from a function


@pytest.mark.parametrize("name", ["digits", "both_splits", "Scans"])
def test_data_from_a_function(name):
    opened = open_named(f"foreign_modules:{name}", root=None, options=None, host=default_host())
    known = open_named("digits", root=None, options=None, host=default_host())
    expected, labels, classes = foreign_modules.digits()
    test = opened.split("test")
    assert opened.classes == tuple(classes) and opened.image_shape == known.image_shape
    assert np.array_equal(test.float_images().numpy(), expected) and test.labels.tolist() == labels.tolist()
    if name == "digits":
        with pytest.raises(UserError, match="has a test split alone"):
            opened.split("train")
    else:
        assert len(opened.split("train")) + len(opened.split("val")) == 1400


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("foreign_modules:digitz", None, "did you mean 'digits'"),
        ("foreign_modules:digits", {"begin": 1}, "unexpected keyword"),
        ("foreign_modules:number", None, r"gives a int; return \(images, labels, classes\)"),
        ("foreign_modules:broken", None, "RuntimeError: no such thing"),
        ("digitz", None, "did you mean 'digits'"),
    ],
)
def test_data_that_cannot_be_had(name, options, message):
    with pytest.raises(UserError, match=message) as error:
        open_named(name, root=None, options=options, host=default_host())
    assert "\n" not in str(error.value)


# -- trained networks that this project did not make

REAL = Path(os.environ.get("SCL_DEFENSE_DATA", "")) if os.environ.get("SCL_DEFENSE_DATA") else None
KNOWN = [  # file, network, options, data, normalisation, n, clean accuracy as published or measured elsewhere
    ("mnist_lenet5_clntrained.pt", "Lenet5", {}, "MNIST", None, 1000, 0.9889, 0.01),
    ("mnist_cnn_a_adv.model", "conv_small", {}, "MNIST", None, 1000, 0.9633, 0.015),
    ("mnist_conv_small_nat.pth", "conv_small", {"padding": 0}, "MNIST", "MNIST", "first 1000", 0.980, 0),
    ("cifar_cnn_a_adv.model", "conv_small", {}, "cifar10-lossless", (0.4914, 0.2476), 300, 0.71, 0.02),
    ("cifar_cnn_a_adv_alt.model", "conv_small", {}, "cifar10-lossless", (0.4914, 0.2476), 300, 0.71, 0.02),
    ("resnet32-d509ac18.th", "ResNet32", {}, "cifar10-lossless", "ImageNet", 300, 0.917, 0.004),
    ("cifar_conv_small_pgd.pth", "conv_small", {"padding": 0}, "cifar10-lossless", "CIFAR-10", 300, 0.63, 0.08),
]


def real_images(folder, data, n):
    if data == "MNIST":
        from torchvision.datasets import MNIST

        found = MNIST(folder, train=False, download=False)
        images, labels = found.data[:1000, None].float() / 255, found.targets[:1000]
        return images, labels
    with np.load(folder / data / "test.npz") as archive:
        return torch.from_numpy(archive["images"]).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(
            archive["labels"]
        )


@pytest.mark.parametrize(
    ("file", "model", "options", "data", "norm", "n", "known", "within"), KNOWN, ids=lambda v: None
)
def test_known_accuracies_of_foreign_checkpoints(file, model, options, data, norm, n, known, within):
    if REAL is None or not (REAL / "checkpoints" / file).is_file():
        pytest.skip(f"SCL_DEFENSE_DATA names no folder with checkpoints/{file}")
    if not (REAL / data).is_dir():
        pytest.skip(f"SCL_DEFENSE_DATA names no folder with {data}")
    images, labels = real_images(REAL, data, n)
    right = {"mean": (125.3 / 255, 123 / 255, 113.9 / 255), "std": (63 / 255, 62.1 / 255, 66.7 / 255)}
    if norm is None:
        right = {}
    elif isinstance(norm, str):
        right = dict(zip(("mean", "std"), (COLOUR if images.shape[1] == 3 else GREY)[norm], strict=True))
        if file == "cifar_conv_small_pgd.pth":
            right["std"] = (0.2023, 0.1994, 0.2010)
    about = {"classes": tuple("0123456789"), "image_shape": tuple(images.shape[1:])}
    about |= {"model": f"foreign_modules:{model}", "model_options": options}
    subject = open_subject(REAL / "checkpoints" / file, default_host(), "cpu", {**about, **right})
    with torch.no_grad():
        accuracy = float((subject.network(images).argmax(1) == labels).double().mean())
    assert abs(accuracy - known) <= within + 1e-9, accuracy
    assert find_better(subject.network, images, labels, subject.about) is None
    if file.startswith("resnet32"):  # without its normalisation: the finding names it, or one as good
        bare = open_subject(REAL / "checkpoints" / file, default_host(), "cpu", about)
        finding = find_better(bare.network, images, labels, bare.about)
        assert finding.better > 0.85 and finding.accuracy < 0.75 and finding.preprocessing.channels == "rgb"
