"""A worked example of a scl-defense plugin."""
