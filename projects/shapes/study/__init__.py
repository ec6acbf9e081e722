"""The paper's tables at small scale, measured on scenes of shapes: `python -m projects.shapes.study`."""
