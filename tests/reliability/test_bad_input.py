"""Users' mistakes through the command line: exit code 2, one line that helps, nothing written, no traceback."""

import shlex

import numpy as np
import pytest
from bad_input import FINE, TABLE

from scl_defense.cli.app import run
from scl_defense.config import TrainConfig, options_of
from scl_defense.plugins import default_host

TINY = "--limit 40 --batch-size 16 --val-limit 8 --val-steps 1 --epochs 1 -m width=2 --quiet"
FAST = "--attacks noise:draws=1 --probes none --quiet"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Names in the table -> paths."""
    folder = tmp_path_factory.mktemp("places")
    draw = np.random.RandomState(0)
    grey = draw.randint(0, 256, (40, 8, 8, 1)).astype(np.uint8)
    four = np.arange(40) % 4
    ten = np.arange(40) % 10
    data = {
        "good": (grey, four),
        "empty": (grey[:0], four[:0]),
        "one_class": (grey, four * 0),
        "outside": (grey, four, np.array(["a", "b"])),
        "negative": (grey, four - 1),
        "huge_labels": (grey, four + 10**9),
        "float_labels": (grey, four / 1.0),
        "short_labels": (grey, four[:39]),
        "floats": (grey.astype(np.float32), four),
        "normalised": (grey / 127.5 - 1, four),
        "unit": (grey / 255, four),
        "nan": (np.where(grey > 250, np.nan, grey / 255), four),
        "colour": (grey.repeat(3, 3), ten),
        "larger": (draw.randint(0, 256, (40, 12, 12, 1)).astype(np.uint8), ten),
        "wide": (draw.randint(0, 256, (40, 8, 16, 1)).astype(np.uint8), ten),
        "two_channels": (grey.repeat(2, 3), four),
        "channel_first": (grey.repeat(3, 3).transpose(0, 3, 1, 2), four),
        "dots": (grey[:, :1, :1], four),
        "rare": (grey, np.array([2] * 2 + [0, 1] * 19), np.array(["a", "b", "c", "d"])),
    }
    found = {}
    for name, (images, labels, *classes) in data.items():
        found[name] = folder / name
        found[name].mkdir()
        named = {"classes": classes[0]} if classes else {}
        for split in ("train", "test"):
            np.savez(found[name] / f"{split}.npz", images=images, labels=labels, **named)
    tiny = ["--val-limit", "8", "--val-steps", "1", "--epochs", "1", "-m", "width=2", "--quiet"]
    code = run(["train", *tiny, "--generator", "none", "--limit", "40", "--out", str(folder), "--name", "ck"])
    assert code == 0
    (folder / "recipe.toml").write_text("epochs = 3\n")
    (folder / "taken.safetensors").write_bytes(b"somebody's")
    (folder / "study.toml").write_text(
        'n = 20\n[base]\nepochs = 1\n[methods.plain]\ngenerator = "none"\n[batteries.fast]\nattacks = "fgsm"\n'
    )
    (folder / "here").mkdir()
    return found | {
        "ck": folder / "ck" / "best.pt", "recipe": folder / "recipe.toml", "taken": folder / "taken.safetensors",
        "study": folder / "study.toml", "here": folder / "here", "odd": "ünï çødé 日本 x", "tiny": TINY, "fast": FAST,
    }  # fmt: skip


def arguments_of(text, places):
    text = text.replace("\\", "\\\\").replace("{tiny}", TINY).replace("{fast}", FAST)
    return [part.format(**places) for part in shlex.split(text)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCL_DEFENSE_DATA_ROOT", str(tmp_path / "no-data"))
    return tmp_path


def snapshot(places, here):
    folders = {places["ck"].parent.parent, here}
    return {path: path.stat().st_size for folder in folders for path in folder.rglob("*")}


@pytest.mark.parametrize("row", TABLE, ids=[row.arguments for row in TABLE])
def test_a_mistake_is_one_line_and_nothing_is_written(row, places, here, capsys, book):
    before = snapshot(places, here)
    code = run(arguments_of(row.arguments, places))
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert (code, len(lines), captured.out) == (2, 1, ""), captured
    assert lines[0].startswith("error: ") and row.says in lines[0] and len(lines[0]) < 600
    assert "Traceback" not in captured.err and "unexpected" not in captured.err
    assert snapshot(places, here) == before
    book("bad inputs refused")


@pytest.mark.parametrize("case", FINE, ids=[case[0] for case in FINE])
def test_what_only_looks_like_a_mistake_works(case, places, here, capsys):
    _, arguments, says = case
    code = run(arguments_of(arguments, places))
    captured = capsys.readouterr()
    assert (code, says in captured.out) in ((0, True), (1, True)), captured


def test_debug_shows_the_traceback_before_or_after_the_command(here, capsys):
    for arguments in (["--debug", "train", "--eps", "-1"], ["train", "--eps", "-1", "--debug"]):
        assert run(arguments) == 2
        err = capsys.readouterr().err
        assert err.startswith("Traceback") and "UserError" in err
        assert err.strip().splitlines()[-1].startswith("error: eps '-1'")


# -- every option of every component, beyond its range and of another type


def limits():
    """(kind, component, option, a value that its own description forbids), from the components themselves."""
    host, found = default_host(), []
    for kind in ("generator", "trainer", "attack", "model", "dataset"):
        for entry in host[kind]:
            for option in options_of(entry.load()):
                found += [(kind, entry.qualified, option.name, wrong) for wrong in forbidden(option.type)]
    return found


REQUIRED = {"image-folder": {"path": "x"}, "npz": {"path": "x"}, "npy": {"path": "x"}}


def forbidden(kind):
    """Values that an option of this type cannot have, by the text that ``plugins list`` shows of it."""
    if kind.startswith(("int", "float")) and "|" not in kind:
        inside = kind[kind.find("[" if "[" in kind else "(") + 1 : -1]
        low, _, high = inside.partition(", ") if "," in kind else ("", "", "")
        below = [str(float(low) - 1) if kind.startswith("float") else str(int(float(low)) - 1)] if low else []
        above = [str(float(high) + 1) if kind.startswith("float") else str(int(float(high)) + 1)] if high else []
        return ["x", *below, *above]
    if kind == "bool":
        return ["maybe"]
    if "|" in kind and "list" not in kind and "text" not in kind and "int" not in kind and "float" not in kind:
        return ["no-such-choice"]
    return []


def test_every_option_of_every_component_knows_its_range(book):
    from scl_defense.config import make
    from scl_defense.errors import UserError

    host, tried = default_host(), 0
    for kind, name, option, wrong in limits():
        with pytest.raises(UserError) as error:
            make(host, kind, name, {**REQUIRED.get(name.rpartition(":")[2], {}), option: wrong})
        text = str(error.value)
        assert f"option '{option}'" in text and "\n" not in text and len(text) < 500, (name, option, wrong, text)
        tried += 1
    assert tried > 200
    book("bad inputs refused", tried)


def test_every_field_of_the_recipe_knows_its_range(book):
    from scl_defense.config import train_config
    from scl_defense.errors import UserError

    tried = 0
    for option in options_of(TrainConfig):
        for wrong in forbidden(option.type.removesuffix("|none")):
            with pytest.raises(UserError, match=f"option '{option.name}'") as error:
                train_config({option.name: wrong})
            assert "\n" not in str(error.value)
            tried += 1
    assert tried > 40
    book("bad inputs refused", tried)
