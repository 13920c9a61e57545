"""In place of a cell's process, in tests of executors: steps that are saved, a rope, a record; nothing heavy.

The folder's ``cell.json`` may hold {"settings": {"steps": N, "wait": bool, "fail": text, "kill": bool}}; it goes on
from ``steps.txt``, and with ``wait`` it stands still after the first step until ``go`` is there.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

folder = Path(sys.argv[1])
asked = json.loads((folder / "cell.json").read_text())["settings"]
done = int((folder / "steps.txt").read_text()) if (folder / "steps.txt").exists() else 0
stopped = threading.Event()


def hold_rope():
    while os.read(0, 64):
        pass
    stopped.set()


threading.Thread(target=hold_rope, daemon=True).start()
signal.signal(signal.SIGTERM, lambda signum, frame: stopped.set())
print("something for the log", file=sys.stderr, flush=True)
with open(folder / "starts.txt", "a") as starts:
    starts.write(f"{os.getpid()} from {done} threads {os.environ['OMP_NUM_THREADS']}\n")
while done < asked.get("steps", 3):
    done += 1
    (folder / "steps.txt").write_text(str(done))
    print(json.dumps({"phase": "train", "epoch": done - 1, "epochs": asked.get("steps", 3)}), flush=True)
    while asked.get("wait") and not (folder / "go").exists() and not stopped.is_set():
        time.sleep(0.02)
    if stopped.is_set():
        sys.exit(143)
    if asked.get("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
if "fail" in asked:
    sys.exit(f"error: {asked['fail']}")
(folder / "record.json").write_text(json.dumps({"line": {"cell": folder.name}, "times": {}}))
