"""Commands of SLURM as far as a study uses them, for tests without one: jobs are processes of this machine.

Linked as sbatch, srun, squeue, scancel and scontrol; ``IMITATION_SLURM`` is the folder with ``N.json`` of each job.
While ``hold`` lies there, jobs stay pending; while ``refuse`` lies there, sbatch refuses with its text.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HOME = Path(os.environ.get("IMITATION_SLURM", "."))


def write(number, **fields):
    path, beside = HOME / f"{number}.json", HOME / f".{number}.{os.getpid()}"
    known = json.loads(path.read_text()) if path.exists() else {}
    beside.write_text(json.dumps({**known, **fields}))
    os.replace(beside, path)


def read(number):
    path = HOME / f"{number}.json"
    return json.loads(path.read_text()) if path.exists() else None


def install(folder):
    """Link the commands into ``folder``."""
    folder.mkdir()
    for name in ("sbatch", "srun", "squeue", "scancel", "scontrol"):
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{__file__}" {name} "$@"\n')
        (folder / name).chmod(0o755)


def sbatch(arguments):
    if (HOME / "refuse").exists():
        sys.exit((HOME / "refuse").read_text())
    number = 1 + max([int(path.stem) for path in HOME.glob("*.json")], default=0)
    script = Path(arguments[-1]).read_text()
    options = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    (HOME / f"{number}.sh").write_text(script)
    write(number, state="PENDING", options=options)
    subprocess.Popen([sys.executable, "-S", __file__, "job", str(number)], start_new_session=True,
                     stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    print(f"Submitted batch job {number}")


def job(arguments):
    (number,) = arguments
    while (HOME / "hold").exists() and read(number)["state"] == "PENDING":
        time.sleep(0.02)
    if read(number)["state"] != "PENDING":
        return
    variables = {**os.environ, "SLURM_JOB_ID": number, "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1",
                 "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}  # fmt: skip
    process = subprocess.Popen(["bash", str(HOME / f"{number}.sh")], env=variables, start_new_session=True)
    write(number, state="RUNNING", pid=process.pid)
    code = process.wait()
    if read(number)["state"] == "RUNNING":
        write(number, state="FAILED" if code else "COMPLETED")


def srun(arguments):
    files = {}
    while arguments[0].startswith("-"):
        option = arguments.pop(0)
        if option in ("--output", "--error"):
            files[option] = arguments.pop(0).replace("%j", os.environ["SLURM_JOB_ID"]).replace("%t", "0")
    for number, option in ((1, "--output"), (2, "--error")):
        os.dup2(os.open(files[option], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.execvp(arguments[0], arguments)


def squeue(arguments):
    asked = next(word.partition("=")[2] for word in arguments if word.startswith("--jobs="))
    for number in asked.split(","):
        found = read(number)
        if found is not None:
            print(f"{number}|{found['state']}|{'Resources' if found['state'] == 'PENDING' else 'None'}")


def scancel(arguments):
    for number in arguments:
        found = read(number) if number.isdecimal() else None
        if found is not None and found["state"] in ("PENDING", "RUNNING"):
            write(number, state="CANCELLED")
            if "pid" in found:
                with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                    os.killpg(found["pid"], signal.SIGTERM)


def scontrol(arguments):
    sys.exit("not imitated")


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2:])
