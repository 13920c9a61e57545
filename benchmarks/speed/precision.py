"""Does an attack in bfloat16 find less than in float32? Attack by attack, on trained networks, paired by image.

    python benchmarks/speed/precision.py --data-root DIR --out benchmarks/results/precision.json

Trains its own networks (PGD-7, then float32 evaluation of both), so that nothing but the data is needed. Every example
is judged in float32 on the original network; both runs start from the same points. Behind ``--precision auto``
(:data:`scl_defense_benchmarks.twin.BF16_ENOUGH`): a family counts as unharmed where the paired difference of robust
accuracy over all networks and seeds is at most 0.2 points with its 95 % interval's end at most 0.5.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch
from scl_defense_benchmarks.battery import Plan
from scl_defense_benchmarks.evaluate import evaluate
from scl_defense_benchmarks.planning import plan_battery

from scl_defense import train
from scl_defense.checkpoint import atomic_write_bytes, load_classifier
from scl_defense.data import open_data
from scl_defense.plugins import default_host
from scl_defense.runtime import versions

NETWORKS = {
    "mnist small-cnn": {"data": "mnist", "eps": "0.2", "model": "small-cnn"},
    "fashion-mnist small-cnn": {"data": "fashion-mnist", "eps": "0.05", "model": "small-cnn"},
    "cifar10-jpeg75 resnet18 width 8": {
        "data": "cifar10-jpeg75",
        "data_options": {"flip": True},
        "eps": "4/255",
        "model": "resnet18",
        "model_options": {"width": 8},
    },
}
ATTACKS = ("fgsm", "pgd:steps=20", "native:pgd:steps=20", "native:pgd:steps=20:loss=margin", "apgd-ce", "apgd-dlr")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--runs", default="runs/precision", help="where the trained networks are kept")
    parser.add_argument("--out", required=True)
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--attacks", default=",".join(ATTACKS))
    parser.add_argument("--limit", type=int, default=4000, help="training images")
    parser.add_argument("--epochs", type=int, default=5)
    given = parser.parse_args()
    host, found = default_host(), []
    for name, recipe in NETWORKS.items():
        opened = open_data(recipe["data"], root=given.data_root, options=recipe.get("data_options"), host=host)
        split = opened.split("test", limit=min(given.n, len(opened.split("test"))))
        images, labels = split.float_images(), split.labels
        for seed in range(given.seeds):
            folder = Path(given.runs) / f"{recipe['model']}-{recipe['data']}-s{seed}"
            if not (folder / "best.pt").exists():
                train(
                    **recipe,
                    data_root=given.data_root,
                    trainer="cross-entropy",
                    generator="pgd",
                    generator_options={"steps": 7},
                    limit=given.limit,
                    epochs=given.epochs,
                    val_limit=200,
                    seed=seed,
                    out=str(folder.parent),
                    name=folder.name,
                )
            loaded = load_classifier(folder / "best.pt", host=host)
            plan = plan_battery(given.attacks, host=host, threats=[loaded.threat], classes=len(opened.classes))
            for planned in plan.attacks:
                rows = {}
                for precision in ("fp32", "bf16"):
                    started = time.perf_counter()
                    rows[precision] = _alone(precision, loaded.network, images, labels, planned, seed)
                    rows[precision]["seconds"] = round(time.perf_counter() - started, 2)
                line = {"network": name, "seed": seed, "attack": planned.label, "n": len(images), **_paired(rows)}
                line["family"] = str(getattr(planned.attack, "family", ""))
                found.append(line)
                print(json.dumps(line), flush=True)
    result = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": versions(),
        "settings": {key: value for key, value in vars(given).items() if key not in ("data_root", "runs", "out")},
        "lines": found,
        "families": families(found),
    }
    atomic_write_bytes(Path(given.out), (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(result["families"], indent=1))


def _alone(precision, network, images, labels, planned, seed):
    """One attack in one precision and nothing else: no second pass."""
    from scl_defense_benchmarks import attempt

    original = attempt.rounds
    attempt.rounds = lambda one, choice, device: [(precision, 0, False)]
    try:
        row = evaluate(network, images, labels, Plan(planned.threat, (planned,)), seed=seed).attacks[0]
    finally:
        attempt.rounds = original
    return {"robust": np.array(row.outcomes) == 1, "status": row.status}


def _paired(rows):
    difference = rows["bf16"]["robust"].astype(float) - rows["fp32"]["robust"].astype(float)
    return {
        "fp32": round(100 * float(rows["fp32"]["robust"].mean()), 3),
        "bf16": round(100 * float(rows["bf16"]["robust"].mean()), 3),
        "only_fp32_breaks": int((difference > 0).sum()),
        "only_bf16_breaks": int((difference < 0).sum()),
        "status": [rows[name]["status"] for name in ("fp32", "bf16")],
        "seconds": [rows[name]["seconds"] for name in ("fp32", "bf16")],
    }


def families(lines):
    """Per attack: how much less bfloat16 finds, in points of robust accuracy, over all networks and seeds."""
    families = {}
    for label in dict.fromkeys(line["attack"] for line in lines):
        mine = [line for line in lines if line["attack"] == label]
        n = sum(line["n"] for line in mine)
        more = sum(line["only_fp32_breaks"] for line in mine)
        less = sum(line["only_bf16_breaks"] for line in mine)
        gap = (more - less) / n
        spread = 1.96 * ((more + less) / n - gap**2) ** 0.5 / n**0.5
        families[label] = {
            "points_less_in_bf16": round(100 * gap, 3),
            "interval": [round(100 * (gap - spread), 3), round(100 * (gap + spread), 3)],
            "images": n,
            "enough": bool(100 * gap <= 0.2 and 100 * (gap + spread) <= 0.5),
            "time_ratio": round(sum(x["seconds"][1] for x in mine) / sum(x["seconds"][0] for x in mine), 3),
        }
    return families


if __name__ == "__main__":
    main()
