"""The command, as it is added to a command line."""

import click
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from scl_defense_example import hooks

from scl_defense import UserError


@pytest.fixture
def preview():
    cli = click.Group()
    hooks.register_commands(cli)
    return lambda *arguments: CliRunner().invoke(cli, ["preview", *map(str, arguments)], catch_exceptions=True)


def pictures(path):
    """(3 rows, 8 columns, 8, 8): one value for every pixel of a digit, from the middle of its enlarged square."""
    sheet = np.asarray(Image.open(path)).astype(float)
    return sheet.reshape(3, 68, 8, 68).swapaxes(1, 2)[:, :, 2:66, 2:66][:, :, 4::8, 4::8] / 255


def test_the_sheet_shows_clean_adversarial_and_difference(preview, tmp_path):
    out = tmp_path / "sheet.png"
    result = preview("--generator", "corner-noise", "--eps", "0.2", "--out", out)
    assert result.exit_code == 0, result.output
    assert "magnified 2.5 times" in result.output  # 0.5 / 0.2: the largest difference becomes black or white
    clean, adversarial, difference = pictures(out)
    moved = adversarial - clean
    assert abs(np.abs(moved).max() - 0.2) < 0.01
    np.testing.assert_allclose(difference, 0.5 + 2.5 * moved, atol=0.02)
    assert len({picture.tobytes() for picture in clean}) == 8


def test_the_same_seed_draws_the_same_sheet(preview, tmp_path):
    sheets = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / f"{number}.png"
        assert preview("--generator", "contrastive-pgd", "-g", "steps=2", "--seed", seed, "--out", out).exit_code == 0
        sheets.append(pictures(out).tobytes())
    assert sheets[0] == sheets[1] != sheets[2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--generator", "pgd"], "needs labels, logits and preview has no network"),
        (["--generator", "none"], "makes no adversarial views"),
        (["--generator", "corner-nois"], "did you mean 'corner-noise'"),
        (["--generator", "contrastive-pgd", "-g", "step=3"], "did you mean 'steps'"),
        (["--generator", "corner-noise", "--eps", "8"], "write 8/255 instead of 8"),
        (["--generator", "corner-noise", "--out", "missing-folder/sheet.png"], "cannot write"),
    ],
)
def test_mistakes_are_one_clear_line(preview, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    result = preview("--out", "sheet.png", *arguments)
    assert isinstance(result.exception, UserError)
    assert says in str(result.exception) and "\n" not in str(result.exception)
    assert list(tmp_path.iterdir()) == []
