"""The figures of docs/reliability.md: ``python tests/reliability/figures.py``.

Runs the whole suite (what is killed and hurt, malicious files, bad input, bad plugins, fuzzing), adds up what its tests
wrote into their book, prints the figures and writes them into the page. Only a full run in which every test passed
writes; ``--quick`` leaves out what is marked ``faults``, ``--tables`` writes the tables that need no run. Mutants are
counted from ``mutants.json``, which ``mutate.py`` writes.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from page import PAGE, ROOT, bad_input, counted, figures, replaced

SUITE = ["tests/reliability", "tests/test_plugin_faults.py", "tests/test_containment.py", "tests/test_golden.py",
         "tests/test_checkpoint.py", "tests/contract/test_broken.py", "tests/benchmarks/test_cheating_attacks.py",
         "tests/benchmarks/test_foreign_files.py"]  # fmt: skip


def run_suite(book: Path, quick: bool, workers: str, only: str | None) -> tuple[int, int]:
    """(exit code, tests that passed)"""
    marks = "not slow and not install" + (" and not faults" if quick else "")
    line = [sys.executable, "-m", "pytest", "-o", "addopts=", "--strict-markers", "-q", "-m", marks, "-n", workers,
            "--timeout", "3600", *(["-k", only] if only else []), *SUITE]  # fmt: skip
    environment = {**os.environ, "SCL_DEFENSE_FIGURES": str(book), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    last = ""
    for last in process.stdout:
        print(last, end="", flush=True)
    passed = re.search(r"(\d+) passed", last)
    return process.wait(), int(passed[1]) if passed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="without the tests marked faults; prints, writes nothing")
    parser.add_argument("--tables", action="store_true", help="write the tables of the page that need no run")
    parser.add_argument("-n", dest="workers", default="0", help="workers of pytest-xdist (default: 0, one process)")
    parser.add_argument("-k", dest="only", metavar="WORDS", help="only these tests; prints, writes nothing")
    said = parser.parse_args()
    PAGE.write_text(replaced(PAGE.read_text(), "bad input", bad_input()))
    if said.tables:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        book = Path(folder) / "book.jsonl"
        book.touch()
        code, passed = run_suite(book, said.quick, said.workers, said.only)
        found = counted(book)
    conditions = (f"scl-defense {version('scl-defense')}, torch {version('torch')}, Python "
                  f"{platform.python_version()}, {platform.system()}")  # fmt: skip
    if code:
        print(f"the suite failed (exit code {code}): nothing is written; in its book so far:")
        for name in sorted(found):
            print(f"  {name}: {found[name]}")
        return 1
    table = figures(found, passed, conditions)
    print(table)
    if said.quick or said.only:
        print("not a full run: docs/reliability.md is as it was")
    else:
        PAGE.write_text(replaced(PAGE.read_text(), "figures", table))
        print(f"written into {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
