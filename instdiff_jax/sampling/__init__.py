"""From layouts and a checkpoint to images."""
