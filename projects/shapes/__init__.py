"""The toy world of the small model: scenes of coloured shapes, a segmenter that finds them, and a study."""
