"""One cell, in a process of its own: train, fine-tune, attack, embed, record. Every part done is never done again.

    python -m scl_defense_benchmarks.study.cell FOLDER

The folder holds ``cell.json``. Progress goes to stdout, one JSON object a line; everything that anybody prints goes to
stderr. Stdin is a rope to the study: when it ends, because the study let go or died, the cell saves and stops.
"""

import contextlib
import json
import os
import platform
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from scl_defense.errors import Interrupted, SclDefenseError

STOPPED = 143
TESTED = 300  # test points of an embedding map


class Worker:
    """Reports to the study and stops when it is told to, or when the study is gone."""

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self.events = os.dup(1)
        os.dup2(2, 1)  # what components print must not mix with the reports
        self._last = 0.0
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the study's to answer
        # While training runs it handles the signal itself, and saves. Elsewhere nothing needs saving: files are whole.
        signal.signal(signal.SIGTERM, lambda signum, frame: os._exit(STOPPED))
        threading.Thread(target=self._hold_rope, daemon=True).start()

    def _hold_rope(self) -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 64):
                pass
        self.stopping.set()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(120)  # one training step and a save are long done
        os._exit(STOPPED)

    def say(self, **event: Any) -> None:
        with contextlib.suppress(OSError):  # nobody reads any more: the rope will tell
            os.write(self.events, (json.dumps(event, default=str) + "\n").encode())

    def check(self) -> None:
        """Between two parts: a stop that came in the last moment of training is not lost."""
        if self.stopping.is_set():
            os._exit(STOPPED)

    def on_train(self, phase: str) -> Any:
        def report(event: Mapping[str, Any]) -> None:
            if event["event"] == "note":
                print(f"note: {event['text']}", file=sys.stderr, flush=True)  # into the cell's log
            elif event["event"] == "epoch" or time.monotonic() - self._last > 0.5:
                self._last = time.monotonic()
                keep = ("epoch", "epochs", "step", "steps", "loss", "val_clean", "val_robust")
                self.say(phase=phase, **{name: event[name] for name in keep if name in event})

        return report

    def on_attack(self, battery: str) -> Any:
        def report(label: str, done: int, total: int) -> None:
            if done == total or time.monotonic() - self._last > 0.5:
                self._last = time.monotonic()
                self.say(phase="attack", battery=battery, attack=label, done=done, total=total)

        return report


def main() -> int:
    worker, folder = Worker(), Path(sys.argv[1])
    try:
        # An orphan of a study that was killed may still be saving: wait for it, it is short.
        with FileLock(folder / ".lock", timeout=150):
            run(folder, worker)
        return 0
    except Interrupted:
        return STOPPED
    except Timeout:
        sys.stderr.write(f"error: another process still works in '{folder}'; wait for it or stop it\n")
        return 1
    except SclDefenseError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return error.exit_code
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.write(f"error: unexpected {type(error).__name__}: {' '.join(str(error).split())[:300]}\n")
        return 1


def run(folder: Path, worker: Worker) -> None:
    """Everything that is still missing of this cell; ``record.json`` comes last."""
    from scl_defense import checkpoint
    from scl_defense.config import train_config
    from scl_defense.plugins import default_host

    cell = json.loads((folder / "cell.json").read_text())
    recipe, settings = cell["recipe"], cell["settings"]
    host = default_host(settings["plugins"])
    started = time.perf_counter()
    lies = {name: settings[name] for name in ("data_root", "logger") if settings[name] is not None}
    config = train_config({**recipe["train"], **lies, "out": str(folder), "name": "train"})
    trained = _trained(folder / "train", lambda: config, host, worker, "train")
    best, tuned = folder / "train" / "best.pt", None
    if "finetune" in recipe:
        from scl_defense.protocols import finetune_config

        protocol = recipe["finetune"]["protocol"]
        name = f"finetune-{protocol}"
        own = {key: value for key, value in recipe["finetune"].items() if key != "protocol"}
        where = {**lies, "device": recipe["train"]["device"], "out": str(folder), "name": name}
        made = partial(finetune_config, best, protocol, **{**where, **own})
        tuned = _trained(folder / name, made, host, worker, name)
        best = folder / name / "best.pt"
    _, sha256 = checkpoint.read(best)
    found = {
        name: _attacked(folder / f"{name}.json", best, sha256, asked, recipe["train"]["seed"], settings, worker)
        for name, asked in recipe["batteries"].items()
    }
    curve = recipe.get("curve")
    if curve is not None:
        found["curve"] = _attacked(
            folder / "curve.json", best, sha256, curve, recipe["train"]["seed"], settings, worker
        )
    if settings["embed"] and not (folder / "embedding.json").exists():
        worker.check()
        worker.say(phase="embedding")
        content = embedding(best, host, settings["data_root"])
        checkpoint.atomic_write_bytes(folder / "embedding.json", json.dumps(content).encode())
    worker.check()
    record = {
        "line": _line(cell, trained, tuned, found, settings),
        "times": _times(cell, trained, tuned, found, started),
    }
    checkpoint.atomic_write_bytes(folder / "record.json", json.dumps(record).encode())


def _trained(run_dir: Path, config: Callable[[], Any], host: Any, worker: Worker, phase: str) -> dict[str, Any]:
    """What the last checkpoint of a finished run says; the run is begun, gone on with, or left as it is."""
    from scl_defense import checkpoint, train

    worker.check()
    last = run_dir / "last.pt"
    if not last.exists():
        shutil.rmtree(run_dir, ignore_errors=True)  # it was stopped before its first checkpoint
        worker.say(phase=phase)
        train(config(), host=host, on_event=worker.on_train(phase))
    else:
        content, _ = checkpoint.read(last)
        if content["epoch"] < json.loads(content["config"])["epochs"] and not content.get("stopped"):
            worker.say(phase=phase)
            train(resume=run_dir, host=host, on_event=worker.on_train(phase))
    worker.check()
    content, _ = checkpoint.read(last)
    forwards, backwards = content.get("passes") or (None, None)
    return {
        "generator": _bare(json.loads(content["config"])["generator"]),
        "epochs": content["epoch"],
        "best_epoch": int(content["best"]["epoch"]),
        "validation": {"clean": content["best"]["clean"], "robust": content["best"]["robust"]},
        "forwards": forwards,
        "backwards": backwards,
        "seconds": content["seconds"],
        "versions": content["versions"],
        "plugins": {plugin["plugin"]: plugin["version"] for plugin in content["plugins"]},
    }


def _attacked(
    path: Path,
    best: Path,
    sha256: str,
    asked: Mapping[str, Any],
    seed: int,
    settings: Mapping[str, Any],
    worker: Worker,
) -> dict[str, Any]:
    """The benchmark result in ``path``, made when it is not there or belongs to another checkpoint."""
    from scl_defense import benchmark

    worker.check()
    if path.exists():
        result = json.loads(path.read_text())
        if result["checkpoint"].get("sha256") == sha256:
            return result
        path.unlink()
    worker.say(phase="attack", battery=path.stem)
    chosen = {name: asked[name] for name in ("attacks", "n", "eps", "norm") if asked.get(name) is not None}
    benchmark(
        best,
        **chosen,
        seed=seed,
        data_root=settings["data_root"],
        device=settings["device"],
        plugins=settings["plugins"],
        out=path,
        probes="none",  # a study compares its own networks: the audit's probes would cost as much as an attack
        restart="if-stale",
        progress=worker.on_attack(path.stem),
    )
    return json.loads(path.read_text())


def embedding(best: Path, host: Any, data_root: str | None) -> dict[str, Any]:
    """Encoder features of test points and of their adversarials (20 steps of PGD on the margin), on two common axes.

    The axes are the first two principal components of both clouds together; ``explained``: their share of the
    variance. The sign of an axis is chosen so that its largest coordinate is positive.
    """
    import torch

    from scl_defense.checkpoint import load_classifier
    from scl_defense.data import open_data
    from scl_defense.guard import frozen
    from scl_defense.runtime import repeatable, stream
    from scl_defense_benchmarks.native import PGD

    loaded = load_classifier(best, host=host)
    data = open_data(loaded.data, root=data_root or loaded.data_root, options=loaded.data_options, host=host)
    split = data.split("test", limit=TESTED)
    images, network = split.float_images(), loaded.network
    with frozen(network), repeatable("fp32"):
        with torch.enable_grad():
            adversarial = PGD(steps=20, loss="margin")(
                network, images, split.labels, loaded.threat, stream(0, "embedding")
            )
        with torch.no_grad():
            both = torch.cat([torch.cat([network.features(part) for part in cloud.split(100)])
                              for cloud in (images, adversarial)]).flatten(1).double()  # fmt: skip
            fooled = torch.cat([network(part).argmax(1) for part in adversarial.split(100)]) != split.labels
    centred = both - both.mean(0)
    _, scale, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes[:2]
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    points = (centred @ axes.T).float()
    return {
        "labels": split.labels.tolist(),
        "classes": list(loaded.classes),
        "threat": str(loaded.threat),
        "clean": [[float(f"{v:.4g}") for v in point] for point in points[: len(images)].tolist()],
        "adversarial": [[float(f"{v:.4g}") for v in point] for point in points[len(images) :].tolist()],
        "fooled": [int(value) for value in fooled.tolist()],
        "explained": [round(float(value), 4) for value in (scale.square() / scale.square().sum())[:2]],
    }


def _line(
    cell: Mapping[str, Any],
    trained: Mapping[str, Any],
    tuned: Mapping[str, Any] | None,
    found: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The cell in ``results.jsonl``: no times, dates, paths or host names: the same however often it was stopped."""
    main = found[next(iter(cell["recipe"]["batteries"]))]
    last = tuned or trained
    radii = (found.get("curve") or {"worst_cases": []})["worst_cases"]
    return {
        **cell["names"],
        "generator": trained["generator"],
        "recipe": cell["sha256"],
        "n": main["n"],
        "threat": f"{main['norm']}:{main['eps']}",
        "clean": main["clean_accuracy"],
        "worst": _worst(main),
        "batteries": {name: _battery(result) for name, result in found.items() if name != "curve"},
        "curve": {case["eps"]: case["robust_accuracy"] for case in radii},
        "flags": sorted({flag["id"] for name, result in found.items() if name != "curve" for flag in result["flags"]}),
        "epochs": trained["epochs"],
        "best_epoch": last["best_epoch"],
        "validation": last["validation"],
        "forwards": trained["forwards"],
        "backwards": trained["backwards"],
        "finetune": tuned and {"protocol": cell["recipe"]["finetune"]["protocol"],
                               **{name: tuned[name] for name in ("epochs", "forwards", "backwards")}},
        "versions": trained["versions"],
        "plugins": trained["plugins"],
        "machine": {"processor": platform.machine(), "cores": settings["cores"], "threads": settings["threads"],
                    "device": main["device"]},
        "images": main["data"]["indices_sha256"][:16],
        "outcomes": _outcomes(main),
    }  # fmt: skip


def _bare(generator: str) -> str:
    """``file:some/where/x.safetensors`` -> ``file:x.safetensors``: a results file holds no paths."""
    prefix, _, rest = generator.partition(":")
    return f"file:{Path(rest).name}" if prefix == "file" else generator


def _worst(result: Mapping[str, Any]) -> float | None:
    own = _main_case(result)
    return None if own is None else own["robust_accuracy"]


def _main_case(result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    ball = result["norm"], result["eps"]
    return next((case for case in result["worst_cases"] if (case["norm"], case["eps"]) == ball), None)


def _outcomes(result: Mapping[str, Any]) -> str | None:
    """A character an image: 1 when it survives the worst case of the main ball."""
    case, robust = _main_case(result), result["outcome_codes"]["robust"]
    known = case is not None and case["robust_accuracy"] is not None
    return "".join("1" if outcome == robust else "0" for outcome in case["outcomes"]) if known else None


def _battery(result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "n": result["n"],
        "clean": result["clean_accuracy"],
        "threat": f"{result['norm']}:{result['eps']}",
        "attacks": {
            row["label"]: {"robust": row["robust_accuracy"], "ball": f"{row['norm']}:{row['eps']}",
                           "status": row["status"], "median_distance": row["median_distance"]}
            for row in result["attacks"]
        },
        "worst_cases": {f"{case['norm']}:{case['eps']}": case["robust_accuracy"] for case in result["worst_cases"]},
        "worst": _worst(result),
    }  # fmt: skip


def _times(
    cell: Mapping[str, Any],
    trained: Mapping[str, Any],
    tuned: Mapping[str, Any] | None,
    found: Mapping[str, Any],
    started: float,
) -> dict[str, Any]:
    return {
        "cell": cell["names"]["cell"],
        "train_seconds": round(trained["seconds"], 3),
        "finetune_seconds": None if tuned is None else round(tuned["seconds"], 3),
        "attack_seconds": round(sum(row["seconds"] for result in found.values() for row in result["attacks"]), 3),
        "last_start_seconds": round(time.perf_counter() - started, 1),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


if __name__ == "__main__":
    sys.exit(main())
