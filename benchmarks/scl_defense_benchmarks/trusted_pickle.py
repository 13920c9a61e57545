"""The only file of this project that runs what a pickle says. It is reached with ``--trust-pickle`` alone."""

import pickle
from pathlib import Path
from typing import Any

import torch

from scl_defense.errors import UserError


def load_trusted(path: Path, *, torch_file: bool) -> Any:
    """Everything in the file, built by running it. The caller has the user's consent and has said what it imports."""
    try:
        if torch_file:
            return torch.load(path, weights_only=False, map_location="cpu")
        with path.open("rb") as stream:
            return pickle.load(stream)
    except Exception as error:  # whatever the classes in it raise
        text = " ".join(str(error).split())[:200]
        raise UserError(f"'{path}' cannot be loaded: {type(error).__name__}: {text}") from None
