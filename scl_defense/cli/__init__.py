"""The command line. click lives in this folder alone."""

from scl_defense.cli.app import main

__all__ = ["main"]
