"""The benchmark layer of scl-defense: attacks of two libraries and our own, and an evaluation that believes none."""
