"""Loggers of training records."""
