"""The mathematics of a training step, as pure functions over flat per-token arrays."""
