"""How cost grows with images, steps, restarts, eps points, classes and ranks; and the plan for 64 GPUs made from it.

    python benchmarks/speed/scaling.py                   # about three minutes on 2 cores; rewrites docs/scaling.md
    python benchmarks/speed/scaling.py --no-measuring    # the page again, from benchmarks/results/scaling.json

Passes are counted, so their laws are exact; seconds of CPU time, which other work on the machine leaves alone, are
fitted by least squares. The network is small and untrained, and the ball so small that nothing is fooled: every image
pays for the whole attack, the dearest case.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
PAGE, RESULTS = ROOT / "docs" / "scaling.md", ROOT / "benchmarks" / "results" / "scaling.json"

# -- the plan's assumptions; the page states them


@dataclass(frozen=True)
class Cluster:
    """peak: dense bfloat16 FLOP/s of one GPU by its data sheet. used: share of it that a step reaches. scaling: what is
    left of the speed of one GPU, on average, when ``gpus`` work together."""

    gpus: int = 64
    peak: float = 989e12
    used: float = 0.10
    scaling: float = 0.9

    @property
    def flops(self) -> float:
        return self.gpus * self.peak * self.used * self.scaling


IMAGENET = {"train": 1_281_167, "test": 50_000, "pixels": 224}
# name, trainer, generator, its options, epochs
RECIPES = (
    ("cross-entropy", "cross-entropy", "none", {}, 90),
    ("PGD-AT, 3 steps", "cross-entropy", "pgd", {"steps": 3}, 90),
    ("TRADES, 10 steps", "trades", "pgd", {"steps": 10, "loss": "kl"}, 90),
    ("SupCon, two views", "supcon", "none", {}, 100),
    ("adv-supcon, contrastive-pgd-online, 5 steps", "adv-supcon", "contrastive-pgd-online", {"steps": 5}, 100),
    ("adv-supcon, contrastive-pgd (model-free)", "adv-supcon", "contrastive-pgd", {}, 100),
)
# name, attacks, eps points, share of the test split
EVALUATIONS = (
    ("PGD-20", "native:pgd:steps=20", 1, 1.0),
    ("PGD-20, 5 restarts", "native:pgd:steps=20:restarts=5", 1, 1.0),
    ("PGD-20, curve of 8 eps", "native:pgd:steps=20", 8, 1.0),
    ("apgd-ce, apgd-t", "apgd-ce,apgd-t", 1, 0.1),
)


# -- fitting


def fit(rows: Sequence[Mapping[str, float]], terms: Sequence[str], target: str) -> tuple[dict[str, float], float]:
    """Least squares of ``target`` on a constant and ``terms``, weighted so that relative errors count alike.

    Returns the coefficients, none below 0 (a term that would be is left out), and the median relative error. Raises
    ``ValueError`` with fewer rows than coefficients.
    """
    if len(rows) <= len(terms):
        raise ValueError(f"{len(rows)} rows do not determine {len(terms) + 1} coefficients")
    left = ["constant", *terms]
    measured = np.array([row[target] for row in rows], float)
    while True:
        columns = np.array([[1.0 if name == "constant" else row[name] for name in left] for row in rows], float)
        found, *_ = np.linalg.lstsq(columns / measured[:, None], np.ones(len(rows)), rcond=None)
        worst = int(found.argmin())
        if found[worst] >= 0 or len(left) == 1:
            break
        del left[worst]
    error = float(np.median(np.abs(columns @ found / measured - 1)))
    return {name: float(dict(zip(left, found, strict=True)).get(name, 0.0)) for name in ("constant", *terms)}, error


# -- measuring


class Net:
    """A small convolutional classifier for ``classes`` classes, the same weights every time."""

    def __new__(cls, classes: int) -> Any:
        import torch
        from torch import nn

        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
                                 nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes)).eval()  # fmt: skip


def evaluation(images: int = 128, attack: str = "native:pgd", steps: int = 10, restarts: int = 1, points: int = 1,
               classes: int = 10) -> dict[str, Any]:  # fmt: skip
    """One evaluation on images that no attack can fool: seconds, and passes an image summed over the radii."""
    import torch
    from scl_defense_benchmarks.benchmark import benchmark

    network = Net(classes)
    pictures = torch.rand(images, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = network(pictures).argmax(1)
    radii = [1e-7 * (1 + number) for number in range(points)]
    attacks = f"{attack}:steps={steps}" + (f":restarts={restarts}" if restarts > 1 else "")
    began = time.process_time()
    report = benchmark(network, pictures, labels, attacks=attacks, norm="linf", eps=radii, probes="none", device="cpu")
    seconds = time.process_time() - began
    paid = [(row.forwards, row.backwards) for row in report.attacks]
    return {"kind": "eval", "images": images, "attack": attack, "steps": steps, "restarts": restarts, "points": points,
            "classes": classes, "seconds": seconds, "forwards": sum(f for f, _ in paid),
            "backwards": sum(b for _, b in paid)}  # fmt: skip


def training(folder: Path, trainer: str, generator: str, options: Mapping[str, Any], images: int = 320,
             ranks: int = 1) -> dict[str, Any]:  # fmt: skip
    """One epoch on the digits: seconds, and passes a training image. With ranks > 1, by the command under torchrun."""
    from scl_defense.config import train_config

    settings = {"data": "digits", "trainer": trainer, "generator": generator, "generator_options": dict(options),
                "epochs": 1, "limit": images, "val_limit": 20, "val_steps": 1, "batch_size": 64, "device": "cpu",
                "out": str(folder), "model_options": {"width": 8}}  # fmt: skip
    if ranks > 1:
        return _ranked(folder, settings, images, ranks)
    from scl_defense import train

    began = time.process_time()
    made = train(train_config(settings))
    seconds = time.process_time() - began
    return {"kind": "train", "trainer": trainer, "generator": generator, "options": dict(options), "images": images,
            "steps": options.get("steps", 0), "ranks": 1, "seconds": seconds, "wall": made.seconds,
            "forwards": made.forwards, "backwards": made.backwards}  # fmt: skip


def _ranked(folder: Path, settings: Mapping[str, Any], images: int, ranks: int) -> dict[str, Any]:
    from scl_defense import checkpoint
    from scl_defense.config import as_dict, to_toml, train_config

    recipe = folder / f"ranks{ranks}.toml"
    recipe.write_text(to_toml(as_dict(train_config({**settings, "name": f"ranks{ranks}"}))))
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m",
            "scl_defense", "train", "--config", str(recipe), "--quiet"]  # fmt: skip
    subprocess.run(line, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    content, _ = checkpoint.read(folder / f"ranks{ranks}" / "last.pt")
    forwards, backwards = content["passes"]
    return {"kind": "train", "trainer": settings["trainer"], "generator": settings["generator"], "images": images,
            "options": settings["generator_options"], "steps": settings["generator_options"].get("steps", 0),
            "ranks": ranks, "wall": content["seconds"], "forwards": forwards, "backwards": backwards}  # fmt: skip


def measure(ranks: Sequence[int]) -> dict[str, Any]:
    """Every measurement; the first of each kind is made twice, and only the second counts."""
    import torch

    torch.set_num_threads(1)
    asked = [{}, *({"images": n} for n in (64, 256)), *({"steps": k} for k in (5, 20)),
             *({"restarts": r} for r in (2, 4)), *({"points": e} for e in (2, 4, 8)),
             {"images": 256, "steps": 20}, {"steps": 5, "restarts": 3, "points": 2}]  # fmt: skip
    evaluation(images=16)
    evals = [evaluation(**one) for one in asked]
    classes = [evaluation(images=64, attack=attack, steps=5, classes=c)
               for attack in ("native:pgd", "apgd-t") for c in (4, 6, 10, 100, 1000)]  # fmt: skip
    trains = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        training(folder, "cross-entropy", "none", {}, images=64)
        for images in (160, 320, 640, 1280):
            trains.append(training(folder, "cross-entropy", "none", {}, images=images))
        for steps in (1, 5, 10, 20):
            trains.append(training(folder, "cross-entropy", "pgd", {"steps": steps}))
        trains.append(training(folder, "cross-entropy", "pgd", {"steps": 10}, images=1280))
        recipes = [{"name": name, "epochs": epochs, **training(folder, trainer, generator, options)}
                   for name, trainer, generator, options, epochs in RECIPES]  # fmt: skip
        for one in recipes:  # the same trainer on noise, which costs no pass: what is left is the attack's
            noise = "none" if one["generator"] == "none" else "corner-noise"
            own = training(folder, one["trainer"], noise, {}, images=128)
            one["attack_backwards"] = one["backwards"] - own["backwards"]
        ranked = [training(folder, "cross-entropy", "pgd", {"steps": 10}, images=1280, ranks=one) for one in ranks]
    plans = [{"name": name, "points": points, "share": share, **_plan_of(attacks, points)}
             for name, attacks, points, share in EVALUATIONS]  # fmt: skip
    return {"evals": evals, "classes": classes, "trains": trains, "recipes": recipes, "ranks": ranked,
            "evaluations": plans, "flop": flop_per_image(), "machine": machine()}  # fmt: skip


def _plan_of(attacks: str, points: int) -> dict[str, float]:
    """Passes an image of a real evaluation, counted on few images; radii in turn cost alike."""
    import torch
    from scl_defense_benchmarks.benchmark import benchmark

    network, pictures = Net(1000), torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = network(pictures).argmax(1)
    report = benchmark(network, pictures, labels, attacks=attacks, norm="linf", eps="1e-7", probes="none", device="cpu")
    return {"forwards": points * sum(row.forwards for row in report.attacks),
            "backwards": points * sum(row.backwards for row in report.attacks)}  # fmt: skip


def flop_per_image() -> dict[str, float]:
    """Of ResNet-50, counted on tensors without data: forward, and backward to the input or to the weights."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from torchvision.models import resnet50

    found = {}
    with torch.device("meta"):
        network, image = resnet50().eval(), torch.empty(1, 3, IMAGENET["pixels"], IMAGENET["pixels"])
    for name, weights, inputs in (("to input", False, True), ("to weights", True, False)):
        network.requires_grad_(weights)
        with FlopCounterMode(display=False) as forward:
            made = network(image.detach().requires_grad_(inputs)).sum()
        with FlopCounterMode(display=False) as backward:
            made.backward()
        found["forward"], found[name] = forward.get_total_flops(), backward.get_total_flops()
    return found


def machine() -> str:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    python = platform.python_version()
    return f"{platform.machine()}, {cores} cores, 1 thread, torch {torch.__version__}, Python {python}"


# -- the plan


def train_hours(row: Mapping[str, Any], flop: Mapping[str, float], cluster: Cluster) -> tuple[float, float]:
    """Hours of all epochs, and the training images a second that the loaders must bring meanwhile."""
    own = row["backwards"] - row["attack_backwards"]
    image = row["forwards"] * flop["forward"] + own * flop["to weights"] + row["attack_backwards"] * flop["to input"]
    rate = cluster.flops / image
    return row["epochs"] * IMAGENET["train"] / rate / 3600, rate


def evaluation_hours(row: Mapping[str, Any], flop: Mapping[str, float], cluster: Cluster) -> float:
    image = row["forwards"] * flop["forward"] + row["backwards"] * flop["to input"]
    return row["share"] * IMAGENET["test"] * image / cluster.flops / 3600


# -- the page


def replaced(page: str, tables: Mapping[str, str]) -> str:
    """``page`` with what stands between the markers of each table replaced. Raises ``ValueError`` for a missing one."""
    for name, table in tables.items():
        opening, closing = f"<!-- scaling:{name} -->", f"<!-- /scaling:{name} -->"
        if page.count(opening) != 1 or page.count(closing) != 1:
            raise ValueError(f"the page needs {opening} and {closing}, each once")
        page = page.partition(opening)[0] + f"{opening}\n\n{table}\n\n{closing}" + page.partition(closing)[2]
    return page


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def fitted(found: Mapping[str, Any]) -> dict[str, tuple[dict[str, float], float]]:
    """Laws: passes of an image, and seconds from passes."""
    evals = [{**row, "K R E": row["steps"] * row["restarts"] * row["points"], "R E": row["restarts"] * row["points"],
              "E": row["points"], "P": row["images"] * (row["forwards"] + row["backwards"]) / 2}
             for row in found["evals"]]  # fmt: skip
    trains = [{**row, "K": row["steps"], "P": row["images"] * (row["forwards"] + row["backwards"]) / 2}
              for row in found["trains"]]  # fmt: skip
    adversarial = [row for row in trains if row["generator"] == "pgd"]
    return {
        "eval forwards": fit(evals, ("K R E", "R E", "E"), "forwards"),
        "eval backwards": fit(evals, ("K R E", "R E", "E"), "backwards"),
        "eval seconds": fit(evals, ("P",), "seconds"),
        "train forwards": fit(adversarial, ("K",), "forwards"),
        "train backwards": fit(adversarial, ("K",), "backwards"),
        "train seconds": fit(trains, ("P",), "seconds"),
    }


def tables(found: Mapping[str, Any], cluster: Cluster) -> dict[str, str]:
    laws = fitted(found)

    def law(name: str) -> str:
        terms, _ = laws[name]
        shown = [f"{value:.3g}" if term == "constant" else f"{value:.3g} {term}".removeprefix("1 ")
                 for term, value in terms.items() if abs(value) > 1e-6]  # fmt: skip
        return " + ".join(shown) or "0"

    def seconds(name: str) -> str:
        terms, _ = laws[name]
        return f"{terms['constant']:.2g} s + {1e6 * terms['P']:.3g} µs P"

    def error(name: str) -> str:
        return "none" if laws[name][1] < 1e-9 else f"{100 * laws[name][1]:.2g} %"

    counts = [[title, law(name), error(name)] for title, name in (
        ("`benchmark`, `native:pgd`: forward", "eval forwards"),
        ("the same: backward", "eval backwards"),
        ("`train`, cross-entropy on `pgd`: forward", "train forwards"),
        ("the same: backward", "train backwards"),
    )]  # fmt: skip
    times = [[title, seconds(name), error(name), str(rows)] for title, name, rows in (
        ("`benchmark`", "eval seconds", len(found["evals"])),
        ("`train`, one epoch", "train seconds", len(found["trains"])),
    )]  # fmt: skip
    classes = [
        [f"`{row['attack']}:steps={row['steps']}`", str(row["classes"]), f"{row['forwards']:g}",
         f"{row['backwards']:g}", f"{1000 * row['seconds'] / row['images']:.2g}"]
        for row in found["classes"]
    ]  # fmt: skip
    one = next(row["wall"] for row in found["ranks"] if row["ranks"] == 1)
    ranks = [[str(row["ranks"]), f"{row['images'] / row['wall']:.0f}", f"{one / row['wall']:.2f}",
              f"{one / row['wall'] / row['ranks']:.2f}"] for row in found["ranks"]]  # fmt: skip
    flop = found["flop"]
    plan = []
    for row in found["recipes"]:
        hours, rate = train_hours(row, flop, cluster)
        plan.append([row["name"], str(row["epochs"]), f"{row['forwards']:.3g}", f"{row['backwards']:.3g}",
                     _hours(hours), _hours(hours * cluster.gpus), f"{rate:,.0f}"])  # fmt: skip
    checks = []
    for row in found["evaluations"]:
        hours, images = evaluation_hours(row, flop, cluster), row["share"] * IMAGENET["test"]
        checks.append([row["name"], f"{images:,.0f}", f"{row['forwards']:,.0f}", f"{row['backwards']:,.0f}",
                       _hours(hours), _hours(hours * cluster.gpus)])  # fmt: skip
    return {
        "counts": _table(("passes of one image", "law", "error"), counts),
        "seconds": f"{found['machine']}\n\n" + _table(("command", "seconds", "median error", "runs"), times),
        "classes": _table(("attack", "classes", "forward", "backward", "ms an image"), classes),
        "ranks": _table(("ranks", "images/s", "speed-up", "efficiency"), ranks),
        "assumptions": "\n".join((
            f"- ResNet-50, {IMAGENET['pixels']} x {IMAGENET['pixels']}: {flop['forward'] / 1e9:.2f} GFLOP forward, "
            f"{flop['to input'] / 1e9:.2f} backward to the input (an attack's step), {flop['to weights'] / 1e9:.2f} "
            "backward to the weights (a training step); counted, a multiplication and an addition being two.",
            f"- {cluster.gpus} GPUs of {cluster.peak / 1e12:.0f} TFLOP/s dense bfloat16 (data sheet), "
            f"{cluster.used:.0%} of it used, {cluster.scaling:.0%} of that left on all of them together: "
            f"{cluster.flops / 1e15:.2f} PFLOP/s in all.",
        )),
        "training": _table(("recipe", "epochs", "forward", "backward", "time", "GPU time", "images/s to load"), plan),
        "evaluation": _table(("evaluation", "images", "forward", "backward", "time", "GPU time"), checks),
    }  # fmt: skip


def _hours(hours: float) -> str:
    return f"{60 * hours:.2g} min" if hours < 1 else f"{hours:.2g} h" if hours < 10 else f"{hours:,.0f} h"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-measuring", action="store_true", help="the page alone, from the committed results")
    parser.add_argument("--ranks", default="1", help="process counts to measure, like 1,2 (above 1: under torchrun)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args()
    if not given.no_measuring:
        found = measure([int(part) for part in given.ranks.split(",")])
        given.out.write_text(json.dumps(found, indent=1) + "\n")
    found = json.loads(given.out.read_text())
    given.page.write_text(replaced(given.page.read_text(), tables(found, Cluster())))
    print(f"wrote {given.page}")


if __name__ == "__main__":
    main()
