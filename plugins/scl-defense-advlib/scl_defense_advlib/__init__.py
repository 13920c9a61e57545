"""Attacks of adversarial-library (Rony et al.), as plugins of scl-defense."""
