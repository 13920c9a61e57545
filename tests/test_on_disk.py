"""Mapped data sets: the same numbers as in memory, and never the whole in memory."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from scl_defense import benchmark, train
from scl_defense.checkpoint import read
from scl_defense.data import OnDisk, open_data
from scl_defense.errors import UserError


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same images as archives and as mapped files: grey, and too many for one block."""
    folder = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    for split, count in (("train", 1100), ("test", 60)):
        labels = rng.integers(0, 3, count)
        images = rng.integers(0, 120, (count, 8, 8), dtype=np.uint8)
        images[np.arange(count), labels * 2] += 100  # a bright row tells the class
        (folder / "mapped" / split).mkdir(parents=True)
        (folder / "archives").mkdir(exist_ok=True)
        np.savez(folder / "archives" / f"{split}.npz", images=images, labels=labels)
        np.save(folder / "mapped" / split / "images.npy", images)
        np.save(folder / "mapped" / split / "labels.npy", labels)
    return folder


def test_the_same_data_from_disk_as_from_memory(both):
    memory, disk = (open_data(str(both / name)) for name in ("archives", "mapped"))
    assert disk.provenance["component"] == "npy"
    assert (disk.classes, disk.image_shape, disk.mean, disk.std) == (
        memory.classes, memory.image_shape, memory.mean, memory.std)  # fmt: skip
    assert {which: disk.fingerprint(which) for which in ("train", "test")} == {
        which: memory.fingerprint(which) for which in ("train", "test")}  # fmt: skip
    for which, options in (("train", {}), ("val", {}), ("train", {"limit": 50}), ("test", {}), ("test", {"limit": 7})):
        one, other = memory.split(which, **options), disk.split(which, **options)
        assert isinstance(other.images, OnDisk) and other.images.shape == one.images.shape
        assert torch.equal(one.labels, other.labels) and torch.equal(one.indices, other.indices)
        assert torch.equal(one.float_images(), other.float_images())
        places = torch.tensor([3, 0, 3, 5])
        assert torch.equal(one.float_images(places), other.float_images(places))
        assert torch.equal(one.images[2], other.images[2]) and torch.equal(one.images[1:4], other.images[1:4])
        assert other.float_images(places).is_contiguous()


def test_training_and_benchmark_do_not_know_where_the_images_lie(both, tmp_path):
    weights, results = [], []
    for name in ("archives", "mapped"):
        train(data=str(both / name), trainer="cross-entropy", generator="corner-noise", limit=128, epochs=1,
              val_limit=20, eps="0.1", batch_size=32, seed=3, out=str(tmp_path), name=name)  # fmt: skip
        weights.append(read(tmp_path / name / "last.pt")[0]["network"])
        found = benchmark(tmp_path / name / "best.pt", attacks="native:pgd:steps=2", n=30, probes="none")
        results.append(
            (found.indices, found.attacks[0].outcomes, found.attacks[0].distances, found.data["fingerprint"])
        )
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    assert results[0] == results[1]


# What may be used: what is used after the imports, and a quarter of what the file would take.
LIMITED = """
import resource, sys, torch
import numpy as np
import scl_defense_plugins.datasets.npy as npy
from scl_defense.data import open_data
open_data("digits").split("test")
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + (80 << 20), used + (80 << 20)))
data = open_data(sys.argv[1])
train, test = data.split("train"), data.split("test", limit=10)
order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:64]
print(len(train), train.float_images(order).shape, test.float_images().mean().item(), data.fingerprint("train")[:8])
mapped, npy._mapped = npy._mapped, lambda path: np.array(mapped(path))
try:
    open_data(sys.argv[1])
except Exception as error:
    print("whole:", error)
"""


@pytest.mark.slow  # seconds
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA covers mappings on Linux alone")
def test_a_file_larger_than_the_memory_allowed_is_used_all_the_same(tmp_path):
    count, shape = 80_000, (64, 64, 1)  # 312 MiB that take no room on disk
    for split, images in (("train", count), ("test", 40)):
        (tmp_path / split).mkdir()
        made = np.lib.format.open_memmap(tmp_path / split / "images.npy", "w+", np.uint8, (images, *shape))
        made[::1000] = 200
        made.flush()
        np.save(tmp_path / split / "labels.npy", np.arange(images) % 2)
    assert (tmp_path / "train" / "images.npy").stat().st_size > 300 << 20
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, timeout=600,
                          env={"PATH": "", "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("72000 torch.Size([64, 1, 64, 64])")
    assert "whole:" in done.stdout and "Unable to allocate" in done.stdout, "the limit would not have been noticed"


def save(folder, name, array, **options):
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / name, array, **options)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda at: (at / "images.npy").write_bytes(b"no array"), "is no .npy file"),
        (lambda at: (at / "images.npy").write_bytes((at / "images.npy").read_bytes()[:300]), "is damaged"),
        (lambda at: save(at, "images.npy", np.array([{}, {}]), allow_pickle=True), "could run code"),
        (lambda at: save(at, "images.npy", np.asfortranarray(np.zeros((9, 4, 4, 3), np.uint8))), "Fortran order"),
        (lambda at: save(at, "images.npy", np.zeros((9, 4, 4, 3))), "must be uint8"),
        (lambda at: save(at, "labels.npy", np.zeros(5, int)), "9 images but 5 labels"),
        (lambda at: save(at, "labels.npy", np.full(9, 10**9)), "run up to 1000000000"),
        (lambda at: (at / "labels.npy").unlink(), "labels.npy' does not exist"),
        (lambda at: (at.parent / "classes.txt").write_text("only\n"), "at least 2 classes"),
        (lambda at: (at.parent / "classes.txt").write_bytes(b"\xff\xfe\n"), "UTF-8"),
    ],
)
def test_files_that_cannot_be_used_are_one_line(tmp_path, change, said):
    at = tmp_path / "set" / "train"
    save(at, "images.npy", np.zeros((9, 4, 4, 3), np.uint8))
    save(at, "labels.npy", np.arange(9) % 3)
    open_data(str(tmp_path / "set"))
    change(at)
    with pytest.raises(UserError, match=said) as error:
        open_data(str(tmp_path / "set"))
    assert "\n" not in str(error.value)


def test_classes_have_names(tmp_path):
    at = tmp_path / "set" / "test"
    save(at, "images.npy", np.zeros((4, 4, 4, 3), np.uint8))
    save(at, "labels.npy", np.arange(4) % 2)
    (tmp_path / "set" / "classes.txt").write_text("ant\nbee\ncow\n")
    data = open_data(str(tmp_path / "set"))
    assert data.classes == ("ant", "bee", "cow") and len(data.split("test")) == 4
    with pytest.raises(UserError, match=r"images\.npy' does not exist"):
        data.split("train")
