"""The networks, in Flax Linen, channels last. No I/O and no sampler here."""
