"""The published tables are what their results say: made again by the command in their header, byte for byte."""

import json
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest

from scl_defense import study

ROOT = Path(__file__).parents[2]
PUBLISHED = sorted(path.parent for path in (ROOT / "benchmarks" / "results").glob("*/study.json"))


def test_something_is_published():
    assert "q1-digits" in {folder.name for folder in PUBLISHED}


@pytest.mark.slow
@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_its_tables_are_made_again_by_their_command(folder, tmp_path, monkeypatch):
    for name in ("results.jsonl", "study.json", "times.jsonl"):
        shutil.copy(folder / name, tmp_path / name)
    program, command, recipe, *options = shlex.split(json.loads((folder / "study.json").read_text())["command"])
    assert (program, command) == ("scl-defense", "study") and not Path(recipe).is_absolute()
    monkeypatch.chdir(ROOT)
    size = options[options.index("--size") + 1] if "--size" in options else None
    study(recipe, size=size, out=tmp_path, tables_only=True)
    for name in ("table.md", "table.csv", "table.tex", "summary.md"):
        assert (tmp_path / name).read_text() == (folder / name).read_text(), name
    seeds = {line["seed"] for line in map(json.loads, (folder / "results.jsonl").read_text().splitlines())}
    assert len(seeds) >= 3
    asked = tomllib.loads(Path(recipe).read_text())
    has_curve = "curve" in asked or "curve" in asked.get("sizes", {}).get(size, {})
    for name in ("clean-robust", *(["curve"] if has_curve else []), "cost", "epochs", "embedding"):
        assert (folder / "figures" / f"{name}.png").is_file(), name
