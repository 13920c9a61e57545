"""Attacks of Foolbox 3, as plugins of scl-defense."""
