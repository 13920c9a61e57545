"""Trainers: what is minimised."""
