"""``python -m scl_defense``."""

from scl_defense.cli import main

main()
