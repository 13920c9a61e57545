"""Attacks of Foolbox and adversarial-library, as plugins of scl-defense."""
