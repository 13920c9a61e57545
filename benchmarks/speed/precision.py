"""Does an attack in bfloat16 find less than in float32? Attack by attack, on trained networks, paired by image.

    python benchmarks/speed/precision.py --data-root DIR --out benchmarks/results/precision/precision.json

Trains its own networks (PGD-7), three of them with three seeds each, so that nothing but the data is needed, and goes
on where it was stopped: ``--out`` holds every line that is done. What is compared is what ``--precision auto`` would do
with the attack: bfloat16, then float32 on the images whose bfloat16 twin was fooled and whose network was not
(``auto``); with ``--alone`` also bfloat16 and nothing else. Every example is judged in float32 on the original network;
all runs start from the same points. Behind :data:`scl_defense_benchmarks.twin.BF16_ENOUGH`: a family may do without the
second pass where ``auto`` finds at most 0.2 points less than float32 over all networks and seeds, by the upper end of
the 95 % interval, and on no network more than 0.2 points beyond chance (its interval lies above).
"""

import argparse
import contextlib
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch
from scl_defense_benchmarks import chunks
from scl_defense_benchmarks.battery import Plan
from scl_defense_benchmarks.evaluate import evaluate
from scl_defense_benchmarks.planning import plan_battery
from scl_defense_benchmarks.twin import bf16_pays

from scl_defense import train
from scl_defense.checkpoint import atomic_write_bytes, load_classifier
from scl_defense.data import open_data
from scl_defense.plugins import default_host
from scl_defense.runtime import versions

CIFAR = {"data": "cifar10-jpeg75", "data_options": {"flip": True}, "eps": "4/255"}
NETWORKS = {
    "mnist small-cnn": {"data": "mnist", "eps": "0.2", "model": "small-cnn"},
    "cifar10-jpeg75 small-cnn": {**CIFAR, "model": "small-cnn"},
    "cifar10-jpeg75 resnet18 width 8": {**CIFAR, "model": "resnet18", "model_options": {"width": 8}},
}
ATTACKS = ("fgsm", "pgd:steps=20", "native:pgd:steps=20", "native:pgd:steps=20:loss=margin", "mifgsm", "apgd-ce",
           "apgd-dlr", "pgd-min:steps=20")  # fmt: skip
ROUNDS = {
    "fp32": [("fp32", 0, False)],
    "auto": [("bf16", 0, False), ("fp32", 0, True)],
    "alone": [("bf16", 0, False)],
}
LEAST = 0.2  # points


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--runs", default="runs/precision", help="where the trained networks are kept")
    parser.add_argument("--out", required=True)
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--attacks", default=",".join(ATTACKS))
    parser.add_argument("--networks", help="comma-separated; default: all of NETWORKS")
    parser.add_argument("--alone", action="store_true", help="also bfloat16 without any float32")
    parser.add_argument("--limit", type=int, default=4000, help="training images")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--minutes", type=float, help="begin nothing new after so long; the same command goes on")
    given = parser.parse_args(arguments)
    out, started = Path(given.out), time.monotonic()
    fixed = {name: getattr(given, name) for name in ("n", "limit", "epochs", "alone")}
    found = _so_far(out, fixed)
    for name in given.networks.split(",") if given.networks else NETWORKS:
        for seed in range(given.seeds):
            wanted = [label for label in given.attacks.split(",") if (name, seed, label) not in found]
            if not wanted or (given.minutes and time.monotonic() - started > 60 * given.minutes):
                continue
            loaded, images, labels, classes = _opened(name, seed, given)
            for label in wanted:
                if given.minutes and time.monotonic() - started > 60 * given.minutes:
                    break
                found[name, seed, label] = _line(name, seed, label, loaded, images, labels, classes, given.alone)
                print(json.dumps(found[name, seed, label]), flush=True)
                _write(out, fixed, list(found.values()), images.device)
    print(json.dumps(families(list(found.values())), indent=1))


def _opened(name, seed, given):
    host, recipe = default_host(), NETWORKS[name]
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
            device=given.device,
            out=str(folder.parent),
            name=folder.name,
        )
    loaded = load_classifier(folder / "best.pt", host=host)
    opened = open_data(recipe["data"], root=given.data_root, options=recipe.get("data_options"), host=host)
    device = next(loaded.network.parameters()).device
    split = opened.split("test", limit=given.n, device=device)
    if len(split) < given.n:
        raise SystemExit(f"'{recipe['data']}' has {len(split)} test images, not {given.n}")
    return loaded, split.float_images(), split.labels, len(opened.classes)


def _line(name, seed, label, loaded, images, labels, classes, alone):
    (planned,) = plan_battery([label], host=default_host(), threats=[loaded.threat], classes=classes).attacks
    rows, seconds = {}, {}
    for how in ("fp32", "auto", *(["alone"] if alone else [])):
        with _running(ROUNDS[how]):
            row = evaluate(loaded.network, images, labels, Plan(planned.threat, (planned,)), seed=seed).attacks[0]
        if row.status != "ok":
            raise SystemExit(f"{name}, seed {seed}, {label}: {row.status} ({row.note})")
        rows[how], seconds[how] = np.array(row.outcomes) == 1, round(row.seconds, 2)
    line = {"network": name, "seed": seed, "attack": label, "n": len(images), "seconds": seconds}
    line["robust"] = {how: round(100 * float(one.mean()), 3) for how, one in rows.items()}
    line["missed"] = {how: int((one & ~rows["fp32"]).sum()) for how, one in rows.items() if how != "fp32"}
    line["gained"] = {how: int((~one & rows["fp32"]).sum()) for how, one in rows.items() if how != "fp32"}
    return line


@contextlib.contextmanager
def _running(rounds):
    original = chunks.rounds
    chunks.rounds = lambda planned, choice, device: rounds
    try:
        yield
    finally:
        chunks.rounds = original


def _so_far(out, fixed):
    if not out.exists():
        return {}
    content = json.loads(out.read_text())
    if content.get("settings") != fixed:
        raise SystemExit(f"'{out}' was measured with {content.get('settings')}, not {fixed}; choose another --out")
    return {(line["network"], line["seed"], line["attack"]): line for line in content["lines"]}


def _write(out, fixed, lines, device):
    content = {
        "machine": f"{platform.machine()}, {device.type}, {torch.get_num_threads()} threads, bfloat16 in hardware: "
        f"{bf16_pays(device)}",
        "versions": versions(),
        "settings": fixed,
        "families": families(lines),
        "lines": lines,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(out, (json.dumps(content, indent=1) + "\n").encode())


def families(lines):
    """Per attack and way: how many points less it finds than float32, over all and network by network."""
    families = {}
    for label in dict.fromkeys(line["attack"] for line in lines):
        mine = [line for line in lines if line["attack"] == label]
        for how in mine[0]["missed"]:
            networks = {
                name: _gap([line for line in mine if line["network"] == name], how)
                for name in dict.fromkeys(line["network"] for line in mine)
            }
            whole = _gap(mine, how)
            times = [line["seconds"][how] / max(line["seconds"]["fp32"], 1e-9) for line in mine]
            families.setdefault(label, {})[how] = {
                **whole,
                "networks": networks,
                "runs": len(mine),
                "time_ratio": round(float(np.median(times)), 3),
                "within": whole["interval"][1] <= LEAST
                and all(one["interval"][0] <= LEAST for one in networks.values()),
            }
    return families


def _gap(lines, how):
    n = sum(line["n"] for line in lines)
    missed, gained = (sum(line[name][how] for line in lines) for name in ("missed", "gained"))
    gap = (missed - gained) / n
    spread = 1.96 * max((missed + gained) / n - gap**2, 0.0) ** 0.5 / n**0.5
    return {
        "points_less": round(100 * gap, 3),
        "interval": [round(100 * (gap - spread), 3), round(100 * (gap + spread), 3)],
        "images": n,
    }


if __name__ == "__main__":
    main()
