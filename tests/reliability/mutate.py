"""Mutation testing with cosmic-ray: ``python tests/reliability/mutate.py [MODULE...]``, settings in ``mutation.toml``.

cosmic-ray makes the mutants, in a copy of the working tree, and asks a test command about each. That command asks a
warm interpreter, which has torch imported already and forks: the tests that run the changed lines, the fastest first;
all tests of the module where the lines run at import or in a fixture. Totals and survivors go to ``mutants.json``; the
tests hold every survivor to an explanation in ``mutants.md``.
"""

import argparse
import contextlib
import difflib
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "mutants.json"
OPTIONS = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-p", "no:randomly", "--no-header", "--tb=no"]
WARM = ["torch", "torchvision", "torch._dynamo", "numpy", "scipy.stats", "sklearn.datasets", "pytest", "hypothesis",
        "pydantic", "safetensors.torch", "rich.console", "click", "pluggy", "filelock", "coverage"]  # fmt: skip


def settings():
    return tomllib.loads((HERE / "mutation.toml").read_text())


# -- the warm interpreter


def pytest_in_a_fork(arguments, plugins=(), gone=lambda: False):
    """The exit code of pytest with these arguments; ``gone()``: nobody waits for it any more."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        silence = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(silence, number)
        import pytest

        code = 70
        try:
            code = int(pytest.main(arguments, plugins=list(plugins)))
        finally:
            os._exit(code)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if gone():
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return -9


class Durations:
    def __init__(self, path):
        self.path, self.found = path, {}

    def pytest_runtest_logreport(self, report):
        self.found[report.nodeid] = self.found.get(report.nodeid, 0) + report.duration

    def pytest_sessionfinish(self):
        self.path.write_text(json.dumps(self.found))


def serve(place, module, tests):
    """Answer at the socket: 1 when a test notices that ``module`` changed, 0 when all pass. In the copy's folder."""
    for name in WARM:
        __import__(name)
    import coverage
    import torch

    torch.set_num_threads(1)
    original = Path(module).read_text().splitlines()
    # Once with a trace: which test runs which line, and how long it takes.
    times, data = Durations(Path("durations.json").resolve()), Path(".coverage").resolve()
    data.unlink(missing_ok=True)
    code = pytest_in_a_fork(
        [*OPTIONS, f"--cov={Path(module).parent}", "--cov-context=test", "--cov-report=", *tests], [times]
    )
    if code:
        sys.exit(f"the tests of {module} fail without a mutant (exit code {code})")
    recorded, taken = coverage.CoverageData(str(data)), json.loads(times.path.read_text())
    recorded.read()
    (measured,) = [path for path in recorded.measured_files() if path.endswith(module)]
    by_line = recorded.contexts_by_lineno(measured)

    def of(lines):
        """The tests to ask. What runs at import ("") or in a fixture may be noticed by any test."""
        contexts = set().union(*(by_line.get(line, ()) for line in lines))
        if contexts and all(context.endswith("|run") for context in contexts):
            wanted = {context.removesuffix("|run") for context in contexts} & taken.keys()
        else:
            wanted = taken.keys()
        return sorted(wanted, key=taken.get)

    listening = socket.socket(socket.AF_UNIX)
    listening.bind(place)
    listening.listen()
    print("ready", flush=True)
    while True:
        connection, _ = listening.accept()
        with connection:
            changed = Path(module).read_text().splitlines()
            blocks = difflib.SequenceMatcher(None, original, changed, autojunk=False).get_opcodes()
            places = [range(low, max(high, low + 1)) for kind, low, high, *_ in blocks if kind != "equal"]
            lines = [line + 1 for place in places for line in place]

            def gone(connection=connection):
                return bool(select.select([connection], [], [], 0.02)[0])  # it says nothing: it hung up

            code = pytest_in_a_fork([*OPTIONS, *of(lines)], gone=gone)
            connection.send(bytes([1 if code else 0]))


def ask(place):
    """cosmic-ray's test command."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(place)
        sys.exit(connection.recv(1)[0])


# -- the run


def copied(folder):
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in names.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def key_of(item):
    (spec,) = item.mutations
    return spec.start_pos, spec.end_pos, spec.operator_name, str(spec.operator_args), spec.occurrence


def mutate(module, tests, folder, said, minutes, again):
    from cosmic_ray.work_db import use_db

    tool = str(Path(sys.executable).with_name("cosmic-ray"))
    place, session = str(folder / "ask"), folder / f"{Path(module).stem}.sqlite"
    Path(place).unlink(missing_ok=True)
    command = f"{sys.executable} tests/reliability/mutate.py --ask {place}"
    (folder / "config.toml").write_text(
        f'[cosmic-ray]\nmodule-path = "{module}"\ntimeout = {float(said["timeout"])}\nexcluded-modules = []\n'
        f'test-command = "{command}"\n[cosmic-ray.distributor]\nname = "local"\n'
    )
    without, known = re.compile("|".join(said["without"])), folder / f"{Path(module).stem}.total"
    if not session.exists():
        subprocess.run([tool, "init", "config.toml", str(session)], cwd=folder, check=True)
        with use_db(str(session)) as work:
            every = [one for one in work.work_items if not without.search(one.mutations[0].operator_name)]
            every.sort(key=key_of)
            sample = random.Random(f"{said['seed']} {module}").sample(every, min(said["sample"], len(every)))
            work.clear()
            work.add_work_items(sorted(sample, key=key_of))
        known.write_text(str(len(every)))
    lived = forget_survivors(session) if again else []
    first = os.pathsep.join(str(folder / part) for part in (".", "plugins", "benchmarks"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": first}
    server = subprocess.Popen([sys.executable, "tests/reliability/mutate.py", "--serve", place, module, *tests],
                              cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)  # fmt: skip
    try:
        if server.stdout.readline().strip() != "ready":
            sys.exit(f"{module}: no answer of its tests")
        # cosmic-ray takes them in random order: what is done when the time is over is a random sample too.
        line = [tool, "exec", "config.toml", str(session)]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(line, cwd=folder, env=environment, check=True, timeout=minutes and 60 * minutes)
    finally:
        server.kill()
        server.wait()
        shutil.copy2(ROOT / module, folder / module)
        with contextlib.closing(sqlite3.connect(session)) as database, database:
            for row in lived:  # those that the time did not suffice for live as before
                database.execute(f"insert or ignore into work_results values ({','.join('?' * len(row))})", row)
    return counted(module, folder, said)


def forget_survivors(session):
    """Their rows, taken out of the session: cosmic-ray asks about them anew."""
    with contextlib.closing(sqlite3.connect(session)) as database, database:
        rows = database.execute("select * from work_results where test_outcome = 'SURVIVED'").fetchall()
        database.execute("delete from work_results where test_outcome = 'SURVIVED'")
    return rows


def counted(module, folder, said):
    """What the session in this folder knows by now."""
    from cosmic_ray.work_db import use_db

    without, session = re.compile("|".join(said["without"])), folder / f"{Path(module).stem}.sqlite"
    with use_db(str(session)) as work:
        done = [pair for pair in work.completed_work_items if not without.search(pair[0].mutations[0].operator_name)]
    lives = [(item, result) for item, result in done if result.test_outcome.value == "survived"]
    bad = [result.output for _, result in done if result.test_outcome.value == "incompetent"]
    assert not bad, bad[0]
    return {
        "mutants": int(session.with_suffix(".total").read_text()),
        "tried": len(done),
        "killed": len(done) - len(lives),
        "survivors": [described(item, result) for item, result in sorted(lives, key=lambda pair: key_of(pair[0]))],
    }


def described(item, result):
    """A survivor without its place in the file, which moves: function, operator, and the line before and after."""
    changed = [line for line in (result.diff or "").splitlines() if re.match(r"[-+](?![-+])", line)]
    return {
        "in": item.mutations[0].definition_name or "",
        "operator": item.mutations[0].operator_name.removeprefix("core/"),
        "was": " ".join(line[1:].strip() for line in changed if line[0] == "-"),
        "is": " ".join(line[1:].strip() for line in changed if line[0] == "+"),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", help="only these, by name: threat losses")
    parser.add_argument("--sample", type=int, help="mutants a module, instead of what mutation.toml says; 0: all")
    parser.add_argument("--minutes", type=float, help="the most a module may take; default: no limit")
    parser.add_argument("--work", type=Path, help="folder of the copy; given again, it goes on where it stopped")
    parser.add_argument("--again", action="store_true", help="ask again about those in --work that lived")
    parser.add_argument("--count", action="store_true", help="run nothing: count what --work holds already")
    parser.add_argument("--serve", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--ask", help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.ask:
        ask(said.ask)
    if said.serve:
        serve(said.serve[0], said.serve[1], said.serve[2:])
    import tempfile

    wanted = settings()
    if said.sample is not None:
        wanted["sample"] = said.sample or sys.maxsize
    folder = said.work or Path(tempfile.mkdtemp(prefix="mutants-"))
    folder.mkdir(parents=True, exist_ok=True)
    if not said.count:
        copied(folder)
    for module, tests in wanted["modules"].items():
        if not said.modules or Path(module).stem in said.modules:
            done = counted if said.count else partial(mutate, tests=tests, minutes=said.minutes, again=said.again)
            found = done(module, folder=folder, said=wanted)
            known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            RESULTS.write_text(json.dumps(known | {module: found}, indent=1, ensure_ascii=False) + "\n")
            print(f"{module}: {found['killed']} of {found['tried']} killed, of {found['mutants']} in all", flush=True)


if __name__ == "__main__":
    main()
