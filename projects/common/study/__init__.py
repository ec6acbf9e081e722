"""The paper's tables at small scale, measured on rendered scenes of a world."""
