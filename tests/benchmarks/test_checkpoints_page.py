"""docs/checkpoints.md: every command on it works, on files made here."""

import re
import shlex
import warnings
from pathlib import Path

import foreign_modules
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from scl_defense.cli.app import run
from scl_defense.models import Network
from scl_defense.plugins import default_host

PAGE = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
COMMANDS = [
    line.removeprefix("$ ")
    for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
    for line in block.strip().splitlines()
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files that the page speaks of."""
    where = tmp_path_factory.mktemp("page")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lenet = foreign_modules.LeNet().eval()
        ours = Network(default_host()["model"].get("small-cnn")(width=4)((1, 8, 8)), 10, [0.0], [1.0])
    state = lenet.state_dict()
    encoder, head = ours.encoder.state_dict(), ours.classifier.state_dict()
    torch.save({**encoder, "fc.weight": head["weight"], "fc.bias": head["bias"]}, where / "ours.pt")
    torch.save({"model": encoder}, where / "encoder.pt")
    torch.save(head, where / "head.pt")
    torch.save(state, where / "lenet.pt")
    save_file(state, where / "lenet.safetensors")
    torch.save({"model": state, "ema": state}, where / "averaged.pt")
    torch.save({"state_dict": state}, where / "old.th", _use_new_zipfile_serialization=False)
    torch.save(lenet, where / "whole.pt")
    example = (torch.rand(2, 1, 8, 8),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        torch.jit.trace(lenet, example).save(str(where / "scripted.pt"))
    torch.export.save(torch.export.export(lenet, example), where / "exported.pt2")
    (where / "my_nets.py").write_text("from foreign_modules import LeNet, digits\n")
    (where / "labels.toml").write_text('labels = ["1", "0", 2, 3, 4, 5, 6, 7, 8, 9]\n')
    images, labels, classes = foreign_modules.digits()
    pixels = (images * 255).round().astype(np.uint8)[:, 0]
    (where / "tests_only").mkdir()
    np.savez(where / "tests_only" / "test.npz", images=pixels, labels=labels, classes=np.array(classes))
    return where


def test_the_page_shows_commands():
    assert len(COMMANDS) >= 14


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_page_works(folder, monkeypatch, capsys, command):
    monkeypatch.chdir(folder)
    words = shlex.split(command)[1:]
    code = run(
        [*words, "--attacks", "native:fgsm", "--n", "20", "--out", "result.json", "--restart", "--probes", "none"]
    )
    told = capsys.readouterr()
    assert code == 0, told.err
    assert ("imports:" in told.err) == ("--trust-pickle" in words)
