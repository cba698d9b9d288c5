"""Reading the checkpoints MaxText writes, with tensorstore alone (no jax, no orbax)."""
