"""The mark of the fault-injection suite, and the book in which its figures are kept."""

import json
import os

import pytest


@pytest.fixture
def book():
    """``book(kind, n)``: so many more of a kind, written where ``figures.py`` adds them up (nowhere otherwise)."""

    def add(kind: str, n: int = 1) -> None:
        if place := os.environ.get("SCL_DEFENSE_FIGURES"):
            with open(place, "a") as stream:  # one short line: whole even when two workers write
                stream.write(json.dumps({"kind": kind, "n": n}) + "\n")

    return add


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
