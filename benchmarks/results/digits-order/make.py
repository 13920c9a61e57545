"""Trains and benchmarks every method of the README's table, and writes results.jsonl and table.md beside this file.

    python benchmarks/results/digits-order/make.py [--seeds 3] [--work DIR] [--jobs 2]

A method x seed that results.jsonl already holds is not done again. About a minute each on one core.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ATTACKS = "noise,fgsm,pgd:steps=50:rel_step=0.1,native:pgd:steps=50:rel_step=0.1:loss=margin,cw"
METHODS = {
    "cross-entropy, no generator": ["--trainer", "cross-entropy", "--generator", "none"],
    "adv-supcon, no generator": ["--generator", "none"],
    "adv-supcon, uniform-noise": ["--generator", "uniform-noise"],
    "adv-supcon, corner-noise": ["--generator", "corner-noise"],
    "adv-supcon, contrastive-pgd, space=pixel": ["--generator", "contrastive-pgd", "-g", "space=pixel"],
    "adv-supcon, contrastive-pgd, space=filterbank": ["--generator", "contrastive-pgd", "-g", "space=filterbank"],
    "adv-supcon, contrastive-pgd (random-conv)": ["--generator", "contrastive-pgd"],
    "adv-supcon, contrastive-pgd-online": ["--generator", "contrastive-pgd-online"],
    "adv-supcon, pgd": ["--generator", "pgd"],
    "cross-entropy, pgd": ["--trainer", "cross-entropy", "--generator", "pgd"],
}


def command(*arguments: str) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", "from scl_defense.cli import main; main()", *arguments, "--json"]
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def one(method: str, seed: int, work: Path) -> dict:
    train = ["train", *METHODS[method], "--seed", str(seed), "--out", str(work)]
    trained = command(*train)
    attack = ["--attacks", ATTACKS, "--seed", str(seed)]
    found = command("benchmark", trained["best"], *attack)
    linf = next(case for case in found["worst_cases"] if case["norm"] == "linf")
    return {
        "method": method,
        "seed": seed,
        "n": found["n"],
        "clean": found["clean_accuracy"],
        **{row["label"].split(":")[0] if row["name"] != "native:pgd" else "pgd-margin": row["robust_accuracy"]
           for row in found["attacks"]},
        "cw_median_l2": next(row["median_distance"] for row in found["attacks"] if row["name"] == "cw"),
        "worst": linf["robust_accuracy"],
        "flags": [flag["id"] for flag in found["flags"]],
        "best_epoch": trained["best_epoch"],
        "train_seconds": round(trained["seconds"], 1),
        "commands": ["scl-defense train " + " ".join(METHODS[method]) + f" --seed {seed}",
                     "scl-defense benchmark RUN/best.pt " + " ".join(attack)],
        "versions": found["versions"],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread a run",
    }  # fmt: skip


def table(rows: list[dict]) -> str:
    seeds = len({row["seed"] for row in rows})
    lines = [
        f"| method | clean | FGSM | PGD-50 | worst case, linf 0.1 | CW median L2 | training, s |\n|{'---|' * 7}",
    ]
    groups = {method: [row for row in rows if row["method"] == method] for method in METHODS}
    for method, group in sorted(groups.items(), key=lambda item: statistics.mean(row["worst"] for row in item[1])):
        cells = [method]
        for name in ("clean", "fgsm", "pgd", "worst"):
            values = [100 * row[name] for row in group]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        cells.append(f"{statistics.mean(row['cw_median_l2'] for row in group):.2f}")
        cells.append(f"{statistics.median(row['train_seconds'] for row in group):.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    versions = ", ".join(f"{name} {rows[0]['versions'][name]}" for name in ("torch", "torchattacks"))
    note = (
        f"\nDigits 8x8, {rows[0]['n']} test images, Linf eps 0.1, mean ± standard deviation over {seeds} seeds, in %. "
        "Worst case: per image over noise, FGSM, PGD-50 on cross-entropy and on the margin, and CW examples inside the "
        f"ball. {rows[0]['machine']}; {versions}."
    )
    return "\n".join(lines) + "\n" + note + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--work", type=Path, default=None)
    options = parser.parse_args()
    path = HERE / "results.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(row["method"], row["seed"]) for row in rows}
    todo = [(m, s) for s in range(options.seeds) for m in METHODS if (m, s) not in done]
    work = options.work or Path(tempfile.mkdtemp())
    with ThreadPoolExecutor(options.jobs) as pool:
        for row in pool.map(lambda item: one(*item, work), todo):
            rows.append(row)
            with open(path, "a") as stream:
                stream.write(json.dumps(row) + "\n")
            print(
                f"{row['method']}, seed {row['seed']}: clean {row['clean']:.3f}, worst {row['worst']:.3f}", flush=True
            )
    (HERE / "table.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
