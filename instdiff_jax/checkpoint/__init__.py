"""Checkpoint folders (orbax), and PyTorch files in both directions."""
