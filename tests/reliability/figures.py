"""The figures of docs/reliability.md: ``python tests/reliability/figures.py``.

Runs the whole suite (what is killed and hurt, malicious files, bad input, bad plugins, fuzzing) file by file, adds up
what its tests wrote into their book, prints the figures and writes them into the page. Only a run of everything in
which every test passed writes. A file that passed stays in ``build/reliability/`` and is not run again by
``--go-on``. Mutants are counted from ``mutants.json``, which ``mutate.py`` writes.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from page import PAGE, ROOT, bad_input, counted, figures, replaced, score

SUITE = [
    "tests/reliability/test_kills.py", "tests/reliability/test_faults.py", "tests/reliability/test_fuzz.py",
    "tests/reliability/test_malicious_files.py", "tests/reliability/test_bad_input.py", "tests/test_plugin_faults.py",
    "tests/test_containment.py", "tests/test_golden.py", "tests/test_checkpoint.py", "tests/contract/test_broken.py",
    "tests/benchmarks/test_cheating_attacks.py", "tests/benchmarks/test_foreign_files.py",
    "tests/benchmarks/test_batch_size.py",
]  # fmt: skip
WORK = ROOT / "build" / "reliability"


def run_file(file: str, quick: bool, workers: str) -> bool:
    """Whether every test of the file passed; then its book and how many there were are kept."""
    book = WORK / f"{Path(file).stem}.jsonl"
    done = book.with_suffix(".done")
    book.write_text("")
    done.unlink(missing_ok=True)
    marks = "not slow and not install" + (" and not faults" if quick else "")
    line = [sys.executable, "-m", "pytest", "-o", "addopts=", "--strict-markers", "-q", "-m", marks, "-n", workers,
            "--timeout", "3600", "-p", "no:cacheprovider", file]  # fmt: skip
    environment = {**os.environ, "SCL_DEFENSE_FIGURES": str(book), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    last = ""
    for last in process.stdout:
        print(last, end="", flush=True)
    passed, code = re.search(r"(\d+) passed", last), process.wait()
    if code == 0:
        counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|skipped)", last)}
        done.write_text(json.dumps({"passed": int(passed[1]) if passed else 0, **counts}))
    return code == 0 or (quick and code == 5)  # 5: all of its tests are marked faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="only these files of the suite: test_kills test_fuzz")
    parser.add_argument("--quick", action="store_true", help="without what is marked faults; prints, writes nothing")
    parser.add_argument("--go-on", action="store_true", help="leave out the files that passed in the run before")
    parser.add_argument("--tables", action="store_true", help="write the tables of the page that need no run")
    parser.add_argument("-n", dest="workers", default="0", help="workers of pytest-xdist (default: 0, one process)")
    said = parser.parse_args()
    PAGE.write_text(replaced(replaced(PAGE.read_text(), "bad input", bad_input()), "mutants", score()))
    if said.tables:
        return 0
    if not said.go_on and not said.files:
        shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True, exist_ok=True)
    wanted = [file for file in SUITE if not said.files or Path(file).stem in said.files]
    if said.go_on:
        wanted = [file for file in wanted if not (WORK / f"{Path(file).stem}.done").exists()]
    failed = [file for file in wanted if not run_file(file, said.quick, said.workers)]
    if failed:
        print(f"failed: {', '.join(failed)}; nothing is written")
        return 1
    done = [json.loads(path.read_text()) for path in WORK.glob("*.done")]
    found = counted(WORK.glob("*.jsonl"))
    conditions = (f"scl-defense {version('scl-defense')}, torch {version('torch')}, Python "
                  f"{platform.python_version()}, {platform.system()}")  # fmt: skip
    table = figures(found, sum(one["passed"] for one in done), sum(one.get("skipped", 0) for one in done), conditions)
    print(table)
    if said.quick:
        shutil.rmtree(WORK)  # no part of a full run
    missing = [file for file in SUITE if not (WORK / f"{Path(file).stem}.done").exists()]
    if missing:
        print(f"not everything was run ({', '.join(missing)}): docs/reliability.md keeps its figures")
        return 0
    PAGE.write_text(replaced(PAGE.read_text(), "figures", table))
    print(f"written into {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
