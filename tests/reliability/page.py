"""What ``docs/reliability.md`` shows of the tests: tables between markers, made from the tests themselves."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "reliability.md"
COMMANDS = ("train", "benchmark", "generate", "study", "report")  # what is killed; all other faults are not kills


def between(text: str, name: str) -> str:
    """What stands between the markers of this name."""
    return _block(name).search(text)[2]


def replaced(text: str, name: str, content: str) -> str:
    assert _block(name).search(text), f"the page has no markers '{name}'"
    return _block(name).sub(lambda found: f"{found[1]}{content}{found[3]}", text)


def _block(name):
    return re.compile(rf"(<!-- {name}: [^>]*-->\n)(.*?)(<!-- end of {name} -->)", re.DOTALL)


def _table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)]) + "\n"


def code(text: str) -> str:
    return "`" + text.replace("|", r"\|") + "`"


# -- bad input


def bad_input() -> str:
    from bad_input import FINE, TABLE

    rows = [(row.mistake, code(row.arguments), row.says.replace("|", r"\|")) for row in TABLE]
    fine = [(f"none: {words}", code(arguments), "it works") for words, arguments, _ in FINE]
    return _table(("mistake", "`scl-defense ...`", "the answer says"), [*rows, *fine])


# -- figures


def counted(books: Iterable[Path]) -> Counter:
    found: Counter = Counter()
    for book in books:
        for line in book.read_text().splitlines():
            entry = json.loads(line)
            found[entry["kind"]] += entry["n"]
    return found


def figures(found: Counter, passed: int, skipped: int, conditions: str) -> str:
    """The table of a run. ``found``: the books added up; ``passed``, ``skipped``: tests."""

    def by(kind):
        parts = {name.partition(": ")[2]: n for name, n in found.items() if name.startswith(f"{kind}: ")}
        return parts, sum(parts.values())

    injected, total = by("faults injected")
    survived, alive = by("faults survived")
    kills = {name: injected.get(name, 0) for name in COMMANDS}
    assert survived == injected, f"not every fault was survived: {injected} injected, {survived} survived"
    others = {name: n for name, n in injected.items() if name not in COMMANDS}

    def told(parts):
        return ", ".join(f"{name} {n}" for name, n in sorted(parts.items()))

    rows = [
        ("faults injected", total, f"survived: {alive}"),
        ("of them processes killed at random or in a save", sum(kills.values()), told(kills)),
        ("of them within a save", found["kills within a save"], "the final name held the old file or the new one"),
        ("of them other faults", sum(others.values()), told(others)),
        ("inputs fuzzed", f"{found['inputs fuzzed']:,}", "only this project's own errors left"),
        ("malicious files refused", found["malicious files refused"], "none ran code, unpacked or wrote elsewhere"),
        ("bad inputs refused", found["bad inputs refused"], "one line, exit code 2, nothing written"),
        ("bad plugins set aside or contained", found["bad plugins"], "named, and the others went on"),
        ("steps broken on purpose, noticed by the golden run", found["broken steps noticed"], "none passed for sound"),
        *mutants(),
        ("tests that passed in that run", passed, f"{skipped} skipped; {conditions}"),
    ]
    return _table(("figure", "", ""), rows)


def score() -> str:
    """The score of ``mutants.json``, a line a module."""
    rows = [
        (code(Path(module).stem), one["mutants"], one["tried"], one["killed"], len(one["survivors"]))
        for module, one in known_mutants().items()
    ]
    total = ("all", *(sum(row[place] for row in rows) for place in (1, 2, 3, 4)))
    head = ("module", "mutants there are", "tried, a random sample", "killed", "living, explained")
    return _table(head, [*rows, total])


def known_mutants() -> dict:
    place = HERE / "mutants.json"
    return json.loads(place.read_text()) if place.exists() else {}


def mutants() -> list[tuple]:
    known = known_mutants()
    tried, killed = (sum(one[part] for one in known.values()) for part in ("tried", "killed"))
    every = sum(one["mutants"] for one in known.values())
    if not tried:
        return []
    each = ", ".join(f"{Path(module).stem} {one['killed']}/{one['tried']}" for module, one in known.items())
    sample = "all of them" if tried == every else f"a random sample of {every:,}"
    return [
        ("mutants killed", f"{killed} of {tried} ({killed / tried:.0%})", f"{sample}; {each}"),
        ("mutants that live, each explained", tried - killed, "`tests/reliability/mutants.md`"),
    ]
