"""Speed, side by side with the peers: ``python benchmarks/speed/run.py``."""
