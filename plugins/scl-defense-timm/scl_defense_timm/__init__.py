"""Networks of timm for scl-defense."""
