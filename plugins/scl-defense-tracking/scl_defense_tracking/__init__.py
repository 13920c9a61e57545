"""Loggers of scl-defense that write to experiment trackers."""
