"""What a terminal shows while one waits; elsewhere nothing of it is written."""

import io

import pytest
from rich.console import Console

from scl_defense.cli import common, progress


@pytest.fixture
def terminal(monkeypatch):
    """What is drawn on stderr when it is a terminal of 80 columns."""
    drawn = io.StringIO()
    screen = Console(file=drawn, force_terminal=True, width=80, highlight=False)
    monkeypatch.setattr(common, "console", lambda stderr=False: screen)
    return drawn


def test_an_attack_shows_its_name_and_how_far_it_is(terminal):
    with progress.AttackProgress(quiet=False) as told:
        told("torchattacks:pgd (linf:0.1)", 128, 1000)
        told("probes for masked gradients", 0, 0)  # nobody knows how much there is to do
        told._bar.refresh()
    shown = terminal.getvalue()
    assert "torchattacks:pgd (linf:0.1)" in shown and "128/1000 images" in shown
    assert "probes for masked gradients" in shown and "0/0" not in shown


def test_waiting_is_said_on_a_terminal_alone(terminal, capsys, monkeypatch):
    with progress.working("drawing the page"):
        pass
    assert "drawing the page" in terminal.getvalue()
    terminal.truncate(0)
    with progress.working("drawing the page", quiet=True):
        pass
    assert "drawing" not in terminal.getvalue()
    monkeypatch.undo()
    with progress.working("drawing the page"):  # pytest's stderr is no terminal
        pass
    assert capsys.readouterr().err == ""
