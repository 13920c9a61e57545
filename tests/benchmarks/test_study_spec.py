"""What a study may say: one line for every fault, sizes and overrides, the grid and its recipes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from scl_defense_benchmarks.study.cells import changed, check_components, grid
from scl_defense_benchmarks.study.spec import read_spec

from scl_defense.config import TrainConfig
from scl_defense.errors import UserError
from scl_defense.plugins import default_host

STUDIES = Path(__file__).parents[2] / "benchmarks" / "studies"
GOOD = """
seeds = [0, 1]
baseline = "plain"
[base]
epochs = 3
generator = "pgd"
[base.generator_options]
steps = 5
[methods.plain]
trainer = "cross-entropy"
[methods.noise]
generator = "corner-noise"
[batteries.standard]
attacks = "fgsm,native:pgd:steps=3"
"""


@pytest.fixture
def recipe(tmp_path):
    def write(text=GOOD):
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return path

    return write


def whole(path, **options):
    spec = read_spec(path, **options)
    cells = grid(spec)
    check_components(spec, cells, default_host())
    return cells


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("seeds = [0, 1]", "seed = [0, 1]", "did you mean 'seeds'"),
        ("seeds = [0, 1]", "seeds = [0, 0]", "different integers"),
        ("seeds = [0, 1]", "seeds = 3", "different integers"),
        ("seeds = [0, 1]", "seeds = [0]\nn = 0", "must be an integer >= 1"),
        ('baseline = "plain"', 'baseline = "plane"', "did you mean 'plain'"),
        ("epochs = 3", "epoch = 3", "did you mean 'epochs'"),
        ("epochs = 3", "epochs = 0", "epochs"),
        ("epochs = 3", "seed = 3", "list seeds at the top"),
        ("[base]", "[base]\nout = 'x'", "--out decides"),
        ("trainer =", "trainr =", "did you mean 'trainer'"),
        ('"cross-entropy"', '"cross-entrpy"', "did you mean 'cross-entropy'"),
        ('"corner-noise"', '"corner-nose"', "did you mean 'corner-noise'"),
        ("steps = 5", "step = 5", "did you mean 'steps'"),
        ("[methods.noise]", "[methods.'no--ise']", "without '--'"),
        ("[methods.noise]", "[methods.noise]\nfinetune = 'sfl'", "slf, alf, aff"),
        ("[methods.noise]", "[methods.noise]\nrole = 3", "must be text"),
        ("[batteries.standard]", "[battery.standard]", "did you mean 'batteries'"),
        ("[batteries.standard]", "[batteries.standard]\nepss = '0.1'", "did you mean 'eps'"),
        ("[batteries.standard]", "[batteries.record]", "choose another"),
        ('attacks = "fgsm', 'attacks = "fgms', "did you mean 'fgsm'"),
        ("native:pgd:steps=3", "native:pgd:stps=3", "did you mean 'steps'"),
        ("[batteries.standard]", "[curve]\neps = []\n[batteries.standard]", "a list of radii"),
        ("[batteries.standard]", "[curve]\neps = ['0.2', '0.1']\n[batteries.standard]", "and rise"),
        ("[batteries.standard]", "[contrasts.a]\nbetter = 'noise'\n[batteries.standard]", "lacks 'than'"),
        ("[batteries.standard]", "[contrasts.a]\nbetter='noise'\nthan='x'\n[batteries.standard]", "is no method"),
        ("[batteries.standard]", "[generators.g]\ngenerator = 'pgd'\n[batteries.standard]", "both set generator"),
        ('attacks = "fgsm,native:pgd:steps=3"', "", "has no attacks"),
    ],
)
def test_a_fault_is_one_line_that_names_the_file_and_the_remedy(recipe, old, new, says):
    assert old in GOOD
    with pytest.raises(UserError) as error:
        whole(recipe(GOOD.replace(old, new)))
    text = str(error.value)
    assert says in text and "mine.toml" in text and "\n" not in text, text


def test_what_is_not_there_at_all(recipe, tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_spec(tmp_path / "none.toml")
    with pytest.raises(UserError, match="no method"):
        read_spec(recipe("[batteries.a]\nattacks = 'fgsm'\n"))
    with pytest.raises(UserError, match="no battery"):
        read_spec(recipe("[methods.a]\n"))
    with pytest.raises(UserError, match="is not TOML"):
        read_spec(recipe("a = ["))


def test_the_grid_and_its_recipes(recipe):
    cells = whole(recipe())
    assert [cell.id for cell in cells] == ["plain--s0", "plain--s1", "noise--s0", "noise--s1"]
    plain, noise = cells[0].recipe["train"], cells[3].recipe["train"]
    assert (plain["generator"], plain["generator_options"], plain["epochs"]) == ("pgd", {"steps": 5}, 3)
    # Another generator does not inherit the options of the base's.
    assert (noise["generator"], noise["generator_options"], noise["seed"]) == ("corner-noise", {}, 1)
    assert len({cell.sha256 for cell in cells}) == 4
    assert not {"out", "name", "data_root", "logger"} & plain.keys()


def test_axes_multiply_and_arms_are_named_after_both(recipe):
    axes = """
        [generators.weak]
        generator_options = { steps = 1 }
        role = "online"
        [generators.strong]
        generator_options = { steps = 9 }
        [datasets.full]
        [datasets.half]
        limit = 500
    """.replace("        ", "")
    text = GOOD.replace('[methods.noise]\ngenerator = "corner-noise"\n', "") + axes
    cells = whole(recipe(text))
    assert len(cells) == 2 * 2 * 2
    assert cells[0].id == "plain--weak--full--s0" and cells[0].arm == "plain--weak" and cells[0].role == "online"
    assert {cell.context for cell in cells} == {"full", "half"}
    assert [cell.recipe["train"]["generator_options"]["steps"] for cell in cells[:4]] == [1, 1, 9, 9]
    assert {cell.recipe["train"]["limit"] for cell in cells if cell.context == "half"} == {500}


SIZES = (
    GOOD.replace("seeds = [0, 1]", 'seeds = [0, 1]\ndefault_size = "small"')
    + """
[sizes.small]
seeds = [4]
n = 10
[sizes.small.base]
epochs = 1
[sizes.big]
[sizes.big.base]
generator = "uniform-noise"
[sizes.big.batteries.standard]
eps = "0.2"
[sizes.big.methods.plain]
lr = 0.5
"""
)


def test_a_size_overrides_and_the_default_one_is_taken(recipe):
    path = recipe(SIZES)
    small, big = read_spec(path), read_spec(path, size="big")
    assert (small.size, small.seeds, small.n, small.base["epochs"]) == ("small", (4,), 10, 1)
    assert small.base["generator_options"] == {"steps": 5}
    assert big.seeds == (0, 1) and "generator_options" not in big.base and big.base["epochs"] == 3
    assert (big.batteries[0].eps, big.batteries[0].attacks) == ("0.2", "fgsm,native:pgd:steps=3")
    assert big.methods[0].fields == {"trainer": "cross-entropy", "lr": 0.5}
    with pytest.raises(UserError, match="did you mean 'big'"):
        read_spec(path, size="bigg")
    with pytest.raises(UserError, match="has no key 'contrasts'"):
        read_spec(recipe(SIZES + "[sizes.big.contrasts]\n"), size="big")
    with pytest.raises(UserError, match="did you mean 'plain'"):
        read_spec(recipe(SIZES.replace("big.methods.plain", "big.methods.plane")), size="big")


def test_overrides_and_seeds(recipe):
    spec = read_spec(recipe(), seeds=[7], overrides={"epochs": 9, "generator_options.steps": 2})
    assert (spec.seeds, spec.base["epochs"], spec.base["generator_options"]) == ((7,), 9, {"steps": 2})
    other = read_spec(recipe(), overrides={"generator": "uniform-noise"})
    assert "generator_options" not in other.base
    with pytest.raises(UserError, match="did you mean 'epochs'"):
        read_spec(recipe(), overrides={"epoch": 1})
    with pytest.raises(UserError, match="only options have parts"):
        read_spec(recipe(), overrides={"epochs.steps": 1})


def test_a_changed_recipe_is_told_and_a_new_option_at_its_default_is_none(recipe):
    old = whole(recipe())[0].recipe
    assert changed(old, json.loads(json.dumps(old))) is None
    assert changed(old, whole(recipe(GOOD.replace("epochs = 3", "epochs = 4")))[0].recipe) == "train.epochs: 3 -> 4"
    new = whole(recipe(GOOD.replace("steps = 5", "steps = 6")))[0].recipe
    assert changed(old, new) == "train.generator_options.steps: 5 -> 6"
    assert changed(old, whole(recipe(GOOD.replace("fgsm,", "")))[0].recipe).startswith("batteries.standard.attacks")
    # Written before the option was invented: its default means what was meant then.
    older = json.loads(json.dumps(old))
    assert older["train"].pop("momentum") == TrainConfig().momentum
    assert changed(older, old) is None
    assert changed(older, {**old, "train": {**old["train"], "momentum": 0.1}}) == "train.momentum: (not set) -> 0.1"


def test_a_misspelt_method_costs_no_torch(recipe):
    """Naming answers come at once."""
    code = (
        "import sys; from scl_defense.cli.app import run; code = run(sys.argv[1:]); print(code, 'torch' in sys.modules)"
    )
    for text in (GOOD.replace("epochs", "epoch"), GOOD.replace("corner-noise", "corner-nose")):
        line = [sys.executable, "-c", code, "study", str(recipe(text)), "--out", "x"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == "2 False", done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_every_ready_study_can_be_planned_in_every_size():
    files = sorted(STUDIES.glob("*.toml"))
    assert files
    for path in files:
        for size in read_spec(path).sizes or (None,):
            cells = whole(path, size=size)
            assert len({cell.id for cell in cells}) == len(cells) > 1


def test_a_battery_may_be_for_some_seeds_alone(tmp_path):
    path = tmp_path / "s.toml"
    text = 'seeds = [0, 3]\n[methods.a]\n[batteries.main]\nattacks = "fgsm"\n'
    path.write_text(text + '[batteries.dear]\nattacks = "pgd"\nseeds = [3]\n')
    found = {cell.seed: list(cell.recipe["batteries"]) for cell in grid(read_spec(path))}
    assert found == {0: ["main"], 3: ["main", "dear"]}
    path.write_text(text + "seeds = [0]\n")
    with pytest.raises(UserError, match="'main' is the main one: it is for all seeds"):
        read_spec(path)
