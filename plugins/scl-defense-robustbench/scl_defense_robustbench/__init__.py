"""RobustBench's networks as checkpoints of scl-defense."""
