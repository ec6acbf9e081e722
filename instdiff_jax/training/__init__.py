"""The training state, step and optimizer."""
