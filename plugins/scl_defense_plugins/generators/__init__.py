"""Generators of adversarial views."""
