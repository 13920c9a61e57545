"""Part (e): start-up of the command, checkpoints to disk and back, and the report of ten thousand images."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from scl_defense_benchmarks.report import report

from scl_defense import benchmark, checkpoint, train
from scl_defense.plugins import default_host
from speed.timing import Timing, interleaved

_PYTHON = [sys.executable, "-c"]
_CLI = [sys.executable, "-m", "scl_defense"]
COMMANDS: dict[str, list[str]] = {
    "python alone": [*_PYTHON, "pass"],
    "scl-defense --help": [*_CLI, "--help"],
    "scl-defense plugins list": [*_CLI, "plugins", "list"],
    "a misspelt name": [*_CLI, "train", "--generator", "contrastive-pdg"],
    "import torch": [*_PYTHON, "import torch"],
    "import scl_defense": [*_PYTHON, "import scl_defense"],
    "import torchattacks": [*_PYTHON, "import torchattacks"],
    "import foolbox": [*_PYTHON, "import foolbox"],
    "import art.attacks.evasion": [*_PYTHON, "import art.attacks.evasion"],
}


@dataclass
class Options:
    """images: of the report. width: of the ResNet-18 that is saved and loaded; 64 has 11 million parameters."""

    seconds: float = 90.0
    repeats: int = 5
    images: int = 10_000
    width: int = 64
    commands: tuple[str, ...] = tuple(COMMANDS)


def measure(options: Options, say: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:
    until = perf_counter() + options.seconds
    say("start-up")
    calls: dict[str, Callable[[], Any]] = {name: _started(COMMANDS[name]) for name in options.commands}
    rows = _rows("start-up", interleaved(calls, repeats=options.repeats, until=until, warm=True))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say("checkpoints")
        rows += _rows("checkpoint", interleaved(_checkpoints(folder, options), repeats=options.repeats, warm=True))
        say(f"report of {options.images} images")
        rows += _rows("report", _reported(folder, options))
    return rows


def _started(command: list[str]) -> Callable[[], None]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSTARTUP"}
    # What this process was given to find the project by, the child gets too.
    environment["PYTHONPATH"] = os.pathsep.join([*filter(None, [environment.get("PYTHONPATH")]), str(_root())])

    def call() -> None:
        done = subprocess.run(command, capture_output=True, env=environment, text=True, timeout=300)
        if done.returncode not in (0, 2):
            raise RuntimeError((done.stderr or done.stdout).strip()[-200:])

    return call


def _root() -> Path:
    return Path(__file__).resolve().parents[2]


def _checkpoints(folder: Path, options: Options) -> dict[str, Callable[[], Any]]:
    host = default_host()
    made = train(
        data="digits",
        trainer="cross-entropy",
        generator="none",
        model="resnet18",
        model_options={"width": options.width},
        limit=32,
        val_limit=16,
        batch_size=32,
        epochs=1,
        host=host,
        out=str(folder),
        name="saved",
    )
    content, _ = checkpoint.read(made.best)
    content = {name: value for name, value in content.items() if name != "format"}
    size = made.best.stat().st_size
    state = {key: value for key, value in content["network"].items()}
    megabytes = f"{size / 1e6:.0f} MB"
    return {
        f"save {megabytes}": lambda: checkpoint.save(folder / "again.pt", content),
        f"load {megabytes}, checked, as a classifier": lambda: checkpoint.load_classifier(made.best, host=host),
        f"torch.save {megabytes}, the weights alone": lambda: torch.save(state, folder / "bare.pt"),
        f"torch.load {megabytes}, the weights alone": lambda: torch.load(folder / "bare.pt", weights_only=True),
    }


def _reported(folder: Path, options: Options) -> dict[str, Timing]:
    """A real result of so many images, a cheap battery on a tiny network, and its page; timed once."""
    rng = torch.Generator().manual_seed(0)
    images = torch.rand((options.images, 1, 8, 8), generator=rng)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    with torch.no_grad():
        labels = network(images).argmax(1)
    benchmark(
        network, images, labels, attacks="native:fgsm,native:pgd:steps=3", norm="linf", eps="0.02", probes="none",
        out=folder / "result.json",
    )  # fmt: skip
    calls = {
        f"report of {options.images} images": lambda: report(folder / "result.json", folder / "page.html", alone=True)
    }
    return interleaved(calls, repeats=min(3, options.repeats))


def _rows(kind: str, found: dict[str, Timing]) -> list[dict[str, Any]]:
    return [{"kind": kind, "what": name, **timing.row()} for name, timing in found.items()]
