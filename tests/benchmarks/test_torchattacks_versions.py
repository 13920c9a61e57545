"""torchattacks 3.3.0 (what an installation gets) and 3.5.1 (excluded for its pins) must give the same examples."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Runs every torchattacks attack that this project uses, through the adapter, on a fixed network and fixed images.
SCRIPT = """
import sys
import torch
import torchattacks
from scl_defense.threat import ThreatModel
from scl_defense_benchmarks import torchattacks_adapter as adapter
from victim_networks import DigitsNet

torch.set_num_threads(1)
torch.manual_seed(0)
network = DigitsNet().eval()
images = torch.rand(16, 1, 8, 8)
images[:8] = (images[:8] > 0.5).float()
with torch.no_grad():
    labels = network(images).argmax(1)
linf, l2 = ThreatModel("linf", "0.2"), ThreatModel("l2", "1")
calls = {
    "fgsm": (adapter.FGSM(), linf),
    "pgd": (adapter.PGD(), linf),
    "pgd from the image": (adapter.PGD(random_start=False), linf),
    "pgd l2": (adapter.PGD(), l2),
    "pgd l2 from the image": (adapter.PGD(random_start=False), l2),
    "cw": (adapter.CW(), l2),
}
made = {
    name: attack(network, images, labels, threat, torch.Generator().manual_seed(3))
    for name, (attack, threat) in calls.items()
}
with torch.no_grad():
    fooled = {name: (network(image).argmax(1) != labels).tolist() for name, image in made.items()}
torch.save({"from": torchattacks.__file__, "images": images, "made": made, "fooled": fooled}, sys.argv[1])
"""


def run(out: Path, first_on_path: list[str]) -> dict:
    here = str(Path(__file__).parent)
    # The test's own search path, with the other version before everything else.
    path = os.pathsep.join([*first_on_path, here, *[entry for entry in sys.path if entry]])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(out)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=True)


def installer() -> list[str]:
    """pip of this environment, or uv where the environment was made without pip."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("neither pip in this environment nor uv on the path")
    return [uv, "pip"]


@pytest.mark.slow
@pytest.mark.install
def test_the_used_attacks_are_the_same_in_3_5_1(tmp_path):
    folder = tmp_path / "torchattacks-3.5.1"
    wanted = ["--quiet", "--no-deps", "--target", str(folder), "torchattacks==3.5.1"]
    done = subprocess.run([*installer(), "install", *wanted], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    installed = run(tmp_path / "installed.pt", [])
    other = run(tmp_path / "other.pt", [str(folder)])
    assert other["from"].startswith(str(folder)) and not installed["from"].startswith(str(folder))
    assert installed["made"].keys() == other["made"].keys()
    for name, images in installed["made"].items():
        assert (images - installed["images"]).abs().amax() > 1e-3, f"{name} did nothing"
        torch.testing.assert_close(other["made"][name], images, atol=1e-6, rtol=0, msg=f"{name} differs")
    assert installed["fooled"] == other["fooled"]
